"""Pictures of a GPT-2 at work, for readers: each made from `trace`, each with its numbers.

    from gpt2np import pictures
    reading = pictures.read(gpt2np.load(), "Once upon a time")
    pictures.attention(reading)  # a notebook shows it; .save("attention.svg") writes it

A picture needs Vega-Altair: pip install altair vl-convert-python.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import reference, tokenizer
from .arguments import one_of
from .errors import InputError, TokenizerError
from .html import Picture
from .optional import ALL_FOR_PAGES, needs
from .weights import Array

if TYPE_CHECKING:
    from .model import GPT2

with needs("altair", "gpt2np.pictures", ALL_FOR_PAGES):
    import altair as alt

BLUE, ORANGE = "#2a7ae2", "#d1690a"
ROWS = alt.NamedData(name="rows")


class Reading(NamedTuple):
    """One text on its way through a model."""

    model: GPT2
    ids: list[int]
    tokens: list[str]  # the text of each token, white space made visible
    taps: dict[str, Array]  # what `model.trace` gives; the batch is this one text

    @property
    def labels(self) -> list[str]:
        """Position and token, as "2 ␣time": a token may come twice, a label does not."""
        return [f"{i} {token}" for i, token in enumerate(self.tokens)]


def read(model: GPT2, text: str) -> Reading:
    """Run a text through a model and keep every intermediate result.

    Raises
    ------
    TokenizerError
        If there is no tokenizer beside the model.
    InputError, TokenRangeError, ContextOverflowError
        If the text is empty, not Unicode, not this tokenizer's, or longer than the model's context.
    """
    if model.tokenizer is None:
        raise TokenizerError(f"a text needs a tokenizer; {tokenizer.HOW_TO_GET_ONE}")
    ids = tokenizer.encode_for(model.config.vocab_size, model.tokenizer, text)
    if not ids:
        raise InputError("the text is empty: there is nothing to look at")
    return Reading(model, ids, [show(model, i) for i in ids], model.trace([ids]))


def show(model: GPT2, token_id: int) -> str:
    """A token's text with its white space made visible."""
    text = tokenizer.decode(model.tokenizer, [token_id]) if model.tokenizer is not None else str(token_id)
    visible = text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in visible)


def rounded(value: Any) -> float:
    """Four significant digits: a picture shows no more, and the page stays small."""
    return float(f"{float(value):.4g}")


def flow(reading: Reading, layer: int = 0) -> Picture:
    """One sentence's way through the machine: every tap of one layer with its shape and size."""
    B, T, C = reading.taps["embed"].shape
    L = reading.model.config.n_layer
    one_of("layer", layer, range(L))
    parts = {
        "embed": ("a vector for each token, plus one for its position", 0),
        "ln_1": ("a normalised copy of the stream", 1),
        "attn.q": ("what each position looks for", 1), "attn.k": ("what each position offers", 1),
        "attn.v": ("what each position has to say", 1), "attn.scores": ("how well they fit", 1),
        "attn.probs": ("as probabilities, nothing of the future", 1), "attn.heads": ("the mix of what was said", 1),
        "attn.out": ("mapped back to the stream's width", 1), "resid_mid": ("stream + attention", 0),
        "ln_2": ("a normalised copy of the stream", 1), "mlp.c_fc": ("four times as wide", 1),
        "mlp.gelu": ("negative numbers pushed to 0", 1), "mlp.out": ("and back", 1),
        "resid_post": (f"stream + MLP; {L} layers like this one", 0),
        "ln_f": ("normalised once more", 0), "logits": ("a score for each token of the vocabulary", 0),
    }  # fmt: skip
    rows = []
    shown = [tap for tap in reading.taps if tap in parts or tap.startswith(f"h.{layer}.")]
    for order, tap in enumerate(shown):
        words, branch = parts.get(tap.removeprefix(f"h.{layer}."), ("", 1))
        value = reading.taps[tap]
        size = rounded(np.sqrt(np.square(value, dtype=np.float64).mean()))
        shape = ", ".join(map(str, value.shape))
        rows.append(
            {"step": order, "tap": tap, "shape": f"({shape})", "rms": size, "what it is": words, "side": branch}
        )
    x = alt.X("side:Q", axis=None, scale=alt.Scale(domain=[-0.2, 12]))
    y = alt.Y("step:O", axis=None)
    base = alt.Chart(ROWS).encode(x=x, y=y)
    stream = alt.Chart(ROWS).transform_filter("datum.side == 0").encode(x=x, y=y)
    dots = base.mark_point(filled=True, size=90, opacity=1).encode(
        color=alt.Color("side:N", legend=None), shape=alt.Shape("side:N", legend=None),
        tooltip=["tap:N", "shape:N", "rms:Q", "what it is:N"],
    )  # fmt: skip
    name = base.mark_text(align="left", dx=10, font="monospace").encode(text="tap:N")
    shape = base.mark_text(align="left", dx=150, font="monospace").encode(text="shape:N")
    words = base.mark_text(align="left", dx=270).encode(text=alt.Text("what it is:N"))
    chart = (stream.mark_line(strokeWidth=2) + dots + name + shape + words).properties(width=620, height=alt.Step(24))
    caption = (
        f"B = {B} text, T = {T} tokens, width C = {C}. Round marks: the residual stream and what is made of its end. "
        "Square ones lie beside the stream: they read a copy and add what they found. rms, among the numbers, is the "
        "root of the mean square."
    )
    return Picture("flow", "One sentence's way through the machine", caption, rows, chart)


def attention(reading: Reading) -> Picture:
    """Which earlier tokens each token looks at, in every head of every layer; click one to see it large."""
    labels = reading.labels
    L, H, T = reading.model.config.n_layer, reading.model.config.n_head, len(labels)
    rows = [
        {"layer": layer, "head": head, "query": labels[i], "key": labels[j], "probability": rounded(probs[head, i, j])}
        for layer in range(L)
        for probs in [reading.taps[f"h.{layer}.attn.probs"][0]]  # (H, T, T)
        for head in range(H)
        for i in range(T)
        for j in range(i + 1)
    ]
    chosen = alt.selection_point(
        name="chosen", fields=["layer", "head"], value=[{"layer": 0, "head": 0}], on="click", toggle=False,
        bind={  # type: ignore[arg-type]  # one for each field, which Altair's types do not know
            "layer": alt.binding_select(options=list(range(L)), name="layer "),
            "head": alt.binding_select(options=list(range(H)), name="head "),
        },
    )  # fmt: skip
    x, y = alt.X("key:N", sort=labels, title="looks at (key)"), alt.Y("query:N", sort=labels, title="token (query)")
    shade = alt.Opacity("probability:Q", scale=alt.Scale(domain=[0, 1], range=[0.05, 1]), legend=None)
    side = max(36, 320 // H)
    small = (
        alt.Chart(ROWS, width=side, height=side)
        .mark_rect(color=BLUE)
        .encode(
            alt.X("key:N", sort=labels, axis=None), alt.Y("query:N", sort=labels, axis=None), shade,
            alt.Column("head:O", spacing=4, title="head"), alt.Row("layer:O", spacing=4, title="layer"),
            tooltip=["layer:O", "head:O", "query:N", "key:N", "probability:Q"],
        )
        .add_params(chosen)
    )  # fmt: skip
    one = alt.Chart(ROWS).transform_filter(chosen).encode(x, y, tooltip=["query:N", "key:N", "probability:Q"])
    large = one.mark_square(color=BLUE, opacity=0.85).encode(
        alt.Size("probability:Q", scale=alt.Scale(domain=[0, 1], range=[0, 520]), title="probability")
    ).properties(width=alt.Step(26), height=alt.Step(26), title="the chosen head")  # fmt: skip
    caption = (
        "Each small square is one head: a row for each token, a column for each token it may look at; the stronger the "
        "blue, the more. Choose a layer and a head below, or click one, to see it with its tokens; there the larger "
        "the square, the higher the probability. Each row adds up to 1, and nobody looks to the right: that "
        "is the causal mask."
    )
    return Picture("attention", "Attention of every head", caption, rows, alt.vconcat(small, large))


def logit_lens(reading: Reading, top: int = 4) -> Picture:
    """What each layer would say next: the stream after each layer, put through ln_f and the head."""
    w, labels, L = reading.model.weights, reading.labels, reading.model.config.n_layer
    streams = {"embed": "embed"} | {f"h.{i}": f"h.{i}.resid_post" for i in range(L)}
    rows = []
    for order, (name, tap) in enumerate(streams.items()):
        hidden = reference.layer_norm(reading.taps[tap][0], *w.ln_f)  # (T, C)
        probs = reference.softmax(reference.logits(hidden, w.lm_head, w.lm_head_bias))  # (T, V)
        for i, best in enumerate(np.argsort(-probs, axis=-1, kind="stable")[:, :top]):
            says = [show(reading.model, int(token)) for token in best]
            then = ", ".join(f"{word} {p:.1%}" for word, p in zip(says[1:], probs[i, best[1:]], strict=True))
            rows.append({"after": name, "order": order, "token": labels[i], "says next": says[0],
                         "probability": rounded(probs[i, best[0]]), "then": then})  # fmt: skip
    base = alt.Chart(ROWS).encode(
        alt.X("token:N", sort=labels, title="after reading up to this token", axis=alt.Axis(labelAngle=-45)),
        alt.Y("after:N", sort=list(streams)[::-1], title="after layer"),
        tooltip=["after:N", "token:N", "says next:N", "probability:Q", "then:N"],
    )
    shade = alt.Opacity("probability:Q", scale=alt.Scale(domain=[0, 1], range=[0.04, 0.75]))
    cells = base.mark_rect(color=BLUE).encode(shade)
    words = base.mark_text(fontSize=11, dy=-5).encode(text="says next:N")
    share = base.mark_text(fontSize=9, dy=8, opacity=0.8).encode(text=alt.Text("probability:Q", format=".0%"))
    chart = (cells + words + share).properties(width=alt.Step(64), height=alt.Step(34))
    caption = (
        "In each cell stands the token that would come out if the layers above were left out, and its probability. "
        "The top row is the model's own answer. Point at a cell, or open the numbers, for the tokens that come next to "
        "it in rank. nostalgebraist 2020 called this the logit lens."
    )
    return Picture("logit_lens", "What each layer would say next", caption, rows, chart)


def residual(reading: Reading) -> Picture:
    """The length of the residual stream's vector at each position, and of what each part adds to it."""
    L, labels = reading.model.config.n_layer, reading.labels
    rows: list[dict[str, Any]] = []

    def add(place: str, what: str, tap: str) -> None:
        for label, norm in zip(labels, np.linalg.norm(reading.taps[tap][0], axis=-1), strict=True):
            rows.append({"place": place, "token": label, "what": what, "norm": rounded(norm)})

    add("embed", "the stream", "embed")
    for i in range(L):
        for part, after in (("attn", "resid_mid"), ("mlp", "resid_post")):
            add(f"h.{i}.{part}", "what this part adds", f"h.{i}.{part}.out")
            add(f"h.{i}.{part}", "the stream", f"h.{i}.{after}")
    places = list(dict.fromkeys(row["place"] for row in rows))
    token = alt.param(name="token", value=labels[-1], bind=alt.binding_select(options=labels, name="token "))
    base = (
        alt.Chart(ROWS)
        .transform_filter("datum.token == token")
        .encode(
            alt.X("place:N", sort=places, title="after", axis=alt.Axis(labelAngle=-45)),
            alt.Y("norm:Q", title="length of the vector"),
            alt.Color("what:N", title=None, legend=alt.Legend(orient="top")),
            tooltip=["place:N", "token:N", "what:N", "norm:Q"],
        )
    )
    bars = base.transform_filter("datum.what != 'the stream'").mark_bar(opacity=0.7)
    line = base.transform_filter("datum.what == 'the stream'").mark_line(point=True, strokeWidth=2)
    chart = (bars + line).add_params(token).properties(width="container", height=260)
    caption = (
        "The line is the stream, the bars are what attention and MLP of each layer add to it, at the chosen token. "
        "Every part adds, none replaces: the stream carries everything that was ever said."
    )
    return Picture("residual", "The residual stream and what each part adds", caption, rows, chart)


def next_token(reading: Reading, shown: int = 15, single: int = 200, groups: int = 100) -> Picture:
    """What comes next, with the three knobs of sampling: temperature, top-k and top-p."""
    scores = reading.taps["logits"][0, -1].astype(np.float64)  # (V,)
    order = np.argsort(-scores, kind="stable")
    rows: list[dict[str, Any]] = []

    def add(token: str, token_id: int, logit: float, tokens: int) -> None:
        rank = rows[-1]["rank"] + rows[-1]["tokens"] if rows else 1
        logit = round(float(logit), 5)
        rows.append({"rank": rank, "token": f"{rank} {token}", "id": token_id, "logit": logit, "tokens": tokens})

    for i in order[:single]:
        add(show(reading.model, int(i)), int(i), scores[i], 1)
    for group in np.array_split(order[single:], groups):  # the rest in groups, so that all probabilities add up to 1
        if len(group):
            mean = np.exp(scores[group] - scores[order[0]]).mean()
            add(f"({len(group)} others)", -1, np.log(mean) + scores[order[0]], len(group))
    V = len(scores)
    knobs = [
        alt.param(name="temperature", value=1, bind=alt.binding_range(min=0.1, max=2, step=0.1, name="temperature ")),
        alt.param(name="top_k", value=V, bind=alt.binding_range(min=1, max=V, step=1, name="top-k ")),
        alt.param(name="top_p", value=1, bind=alt.binding_range(min=0.05, max=1, step=0.05, name="top-p ")),
    ]
    chart = (
        alt.Chart(ROWS)
        .transform_calculate(exp=f"datum.tokens * exp((datum.logit - {rows[0]['logit']}) / temperature)")
        .transform_calculate(w="datum.rank <= top_k ? datum.exp : 0")
        .transform_window(upto="sum(w)", sort=[{"field": "rank"}])
        .transform_joinaggregate(all="sum(w)")
        .transform_calculate(kept="top_p >= 1 || (datum.upto - datum.w) / datum.all < top_p ? datum.w : 0")
        .transform_joinaggregate(sum="sum(kept)")
        .transform_calculate(probability="datum.kept / datum.sum")
        .transform_filter(f"datum.rank <= {shown}")
        .encode(
            alt.Y("token:N", sort=[row["token"] for row in rows[:shown]], title=None),
            alt.X("probability:Q", axis=alt.Axis(format="%"), title="probability"),
            tooltip=["rank:Q", "token:N", "logit:Q", alt.Tooltip("probability:Q", format=".2%")],
        )
    )  # fmt: skip
    words = chart.mark_text(align="left", dx=4).encode(text=alt.Text("probability:Q", format=".1%"))
    bars = chart.mark_bar(color=BLUE).add_params(*knobs)
    caption = (
        f"The {shown} most probable tokens after “{''.join(reading.tokens)}”. Temperature divides the scores: below 1 "
        "the best gets better. top-k keeps the k best, top-p the fewest that have p of the probability together."
    )
    layers = alt.layer(bars, words).properties(width="container", height=20 * shown)
    return Picture("next_token", "What comes next", caption, rows, layers)


def similar_tokens(reading: Reading) -> Picture:
    """How alike the token vectors of a sentence are: the cosine of the angle between their rows of wte."""
    caption = (
        "1: the same direction; 0: nothing in common. The larger the mark, the further from 0; round ones are negative."
    )
    return _cosines(
        "similar_tokens", "Similarity of tokens", caption, reading.model.weights.wte[reading.ids], reading.labels
    )


def similar_positions(reading: Reading, every: int = 0) -> Picture:
    """How alike the position vectors are: the cosine of the angle between rows of wpe, `every` so many of them."""
    N = reading.model.config.n_ctx
    step = every or max(1, N // 24)
    rows = list(range(0, N, step))
    caption = (
        f"One position in {step}. Positions near each other mostly have vectors that point the same way, those far "
        "apart do not; nobody told the model so, it learned that from text. The larger the mark, the further from 0; "
        "round ones are negative."
    )
    labels = [str(row) for row in rows]
    return _cosines("similar_positions", "Similarity of positions", caption, reading.model.weights.wpe[rows], labels)


def _cosines(name: str, title: str, caption: str, vectors: Array, labels: list[str]) -> Picture:
    unit = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    rows = [
        {"one": a, "other": b, "cosine": rounded(cosine)}
        for a, line in zip(labels, unit @ unit.T, strict=True)
        for b, cosine in zip(labels, line, strict=True)
    ]
    return squares(name, title, caption, rows, "other", "one", "cosine")


# every picture of a text, in the order of the page
PICTURES: tuple[Callable[[Reading], Picture], ...] = (
    flow, similar_tokens, similar_positions, attention, residual, logit_lens, next_token,
)  # fmt: skip


# ---------------------------------------------------------------- drawings of any rows, for the book's chapters


def lines(name: str, title: str, caption: str, rows: list[dict[str, Any]], x: str, y: str, by: str) -> Picture:
    """One line for each value of `by`, told apart by dashes as well as colours."""
    chart = (
        alt.Chart(ROWS)
        .mark_line(strokeWidth=2)
        .encode(
            alt.X(f"{x}:Q"), alt.Y(f"{y}:Q"), alt.Color(f"{by}:N", title=None, legend=alt.Legend(orient="top")),
            alt.StrokeDash(f"{by}:N", title=None), tooltip=_tips(rows),
        )
        .properties(width="container", height=260)
    )  # fmt: skip
    return Picture(name, title, caption, rows, chart)


def _tips(rows: list[dict[str, Any]]) -> list[str]:
    return [f"{key}:{'N' if isinstance(value, str) else 'Q'}" for key, value in rows[0].items()]


def bars(name: str, title: str, caption: str, rows: list[dict[str, Any]], x: str, y: str) -> Picture:
    """A bar for each row: `x` is a number, `y` the name of the row; the number stands beside it."""
    names = [str(row[y]) for row in rows]
    base = alt.Chart(ROWS).encode(alt.X(f"{x}:Q"), alt.Y(f"{y}:N", sort=names, title=None), tooltip=_tips(rows))
    words = base.mark_text(align="left", dx=4).encode(text=alt.Text(f"{x}:Q", format=".3~g"))
    chart = (base.mark_bar(color=BLUE) + words).properties(width="container", height=22 * len(rows))
    return Picture(name, title, caption, rows, chart)


def squares(name: str, title: str, caption: str, rows: list[dict[str, Any]], x: str, y: str, value: str) -> Picture:
    """A mark for each row at (x, y): its size says how large `value` is, shape and colour whether it is negative."""
    signs = ["positive", "negative"]
    rows = [{**row, "sign": signs[row[value] < 0]} for row in rows]
    legend = alt.Legend(orient="top") if any(row["sign"] == "negative" for row in rows) else None
    columns, lines = (list(dict.fromkeys(str(row[key]) for row in rows)) for key in (x, y))
    chart = (
        alt.Chart(ROWS)
        .transform_calculate(size=f"abs(datum['{value}'])")
        .mark_point(filled=True, opacity=0.85)
        .encode(
            alt.X(f"{x}:N", sort=columns), alt.Y(f"{y}:N", sort=lines),
            alt.Size("size:Q", scale=alt.Scale(range=[0, 300]), legend=None),
            alt.Shape("sign:N", scale=alt.Scale(domain=signs, range=["square", "circle"]), title=None, legend=legend),
            alt.Color("sign:N", scale=alt.Scale(domain=signs, range=[BLUE, ORANGE]), title=None, legend=legend),
            tooltip=_tips(rows),
        )
        .properties(width=alt.Step(26), height=alt.Step(26))
    )  # fmt: skip
    return Picture(name, title, caption, rows, chart)
