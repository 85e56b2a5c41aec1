"""The usual mistakes at both ends: token ids, positions, the embedding matrices; the head and its logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from ...call import Call
from ...weights import Array
from ..metrics import difference
from ..operations import Run, embed_at
from ..program import Program
from .gradients import F64
from .mistakes import misread
from .problem import Guess, Problem, afterwards
from .rounding import quantised

TOKENS = 64  # as many other tokens are looked for


def embedding(problem: Problem) -> Iterator[Guess]:
    """Guesses at the tap `embed`."""
    yield from _positions(problem)
    yield from _tokens(problem)
    yield from _matrices(problem)
    yield from _other_positions(problem)


def _positions(problem: Problem) -> Iterator[Guess]:
    call, N = problem.call, problem.program.config.n_ctx
    B, T = call.input_ids.shape
    now = call.position_ids

    def at(rows: Array) -> dict[str, Run]:
        rows = np.broadcast_to(rows % N, (B, T))
        return {"embed": lambda p, call, tap, x, dtype: embed_at(p, call, rows, dtype)}

    tried: list[tuple[str, str, Array]] = [
        ("position_offset", f"positions were off by {abs(by)} ({'+-'[by < 0]}{abs(by)})", now + by)
        for by in (1, -1, 2, -2)
    ]
    tried += [
        ("positions", "position_ids were not used: every row counted from 0", np.arange(T)),
        (
            "positions",
            "position_ids were not used: every row counted from the cached length",
            call.start + np.arange(T),
        ),
        ("position_offset", "positions started again at 0 after the cached ones", now - call.start),
        ("positions", "every position were 0", np.zeros(T, int)),
        ("positions", "positions ran backwards", now[:, ::-1]),
        ("positions", "the positions of the first sequence were used for all", now[:1]),
    ]
    if call.attention_mask is not None and call.attention_mask.ndim == 2:
        mask = (call.attention_mask != 0).astype(int)
        counted = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, call.start :]
        tried.append(("positions", "positions were counted from the first real token", counted))
    seen = [now]
    for cause, text, rows in tried:
        rows = np.broadcast_to(rows, (B, T))
        if not any(np.array_equal(rows % N, other % N) for other in seen):
            seen.append(rows)
            yield Guess(cause, "embed", text, runs=at(rows))
    without = {"embed": lambda p, call, tap, x, dtype: p.weights("wte.weight", dtype)[call.input_ids].astype(dtype)}
    yield Guess("missing_positions", "embed", "no position vector were added", runs=without)


def _tokens(problem: Problem) -> Iterator[Guess]:
    ids = problem.call.input_ids
    V = problem.program.config.vocab_size
    others = other_tokens(problem.program, problem.call, problem.observed)
    if others is not None:
        text = f"there were {tokens_in_words(others, ids)}"
        yield Guess("token_ids", "embed", text, call=problem.call._replace(input_ids=others))
    types = problem.call.token_type_ids
    if types is None:
        zeros = problem.call._replace(token_type_ids=np.zeros_like(ids))
        text = "token_type_ids of zeros were given: row 0 of wte were added everywhere"
        yield Guess("token_types", "embed", text, "none", call=zeros)
    else:
        yield Guess(
            "token_types", "embed", "token_type_ids were not used", call=problem.call._replace(token_type_ids=None)
        )
    first = ids[:, :1]
    for text, moved in (
        ("the tokens were shifted by one to the right, the last one first", np.roll(ids, 1, axis=1)),
        ("the tokens were shifted by one to the right, the first one twice", np.concatenate([first, ids[:, :-1]], 1)),
        ("the tokens were shifted by one to the left, the first one last", np.roll(ids, -1, axis=1)),
        ("the tokens were shifted by one to the right, token 0 first", np.concatenate([0 * first, ids[:, :-1]], 1)),
        ("the tokens came in reverse order", ids[:, ::-1]),
        ("every token id were one higher", (ids + 1) % V),
        ("every token id were one lower", (ids - 1) % V),
        ("the sequences of the batch were in reverse order", ids[::-1]),
    ):
        if not np.array_equal(moved, ids):
            cause = "token_shift" if "shifted" in text else "token_order" if "order" in text else "token_ids"
            yield Guess(cause, "embed", text, call=problem.call._replace(input_ids=moved))


def other_tokens(program: Program, call: Call, taps: Mapping[str, Array]) -> Array | None:
    """The ids that the embedding, or layer 0's keys and values, say were run, which depend on each token alone.

    None where they are the call's own, where too many differ, or where no token of the vocabulary explains one.
    """
    names = ["embed"] if "embed" in taps else [n for n in ("h.0.attn.k", "h.0.attn.v") if n in taps]
    if not names or not all(np.isfinite(taps[n]).all() for n in names):
        return None
    exact = dict(program.walk(call, F64, until=names[-1]))
    by_token = {n: (lambda x: x) if n == "embed" else (lambda x: x.swapaxes(1, 2)) for n in names}  # (B, T, ..)
    right, given = ({n: by_token[n](values[n]) for n in names} for values in (exact, taps))
    ids, scale = np.array(call.input_ids), max(float(np.abs(right[n]).max()) for n in names)
    apart = sum(difference(given[n], right[n]).reshape(*ids.shape, -1).max(axis=2) for n in names)
    wrong = [(int(b), int(t)) for b, t in np.argwhere(apart > 1e-3 * scale)]
    if not 0 < len(wrong) <= TOKENS:
        return None
    V, made = program.config.vocab_size, dict[int, dict[str, Array]]()
    for b, t in wrong:
        position = int(call.position_ids[b, t])
        if position not in made:
            every = call._replace(
                input_ids=np.arange(V)[:, None], position_ids=np.full((V, 1), position), past=None,
                attention_mask=None, token_type_ids=None, start=0,
            )  # fmt: skip
            made[position] = {n: v for n, v in program.walk(every, np.float32, until=names[-1]) if n in names}
        distance = sum(np.abs(by_token[n](made[position][n])[:, 0] - given[n][b, t]).reshape(V, -1).max(axis=1)
                       for n in names)  # fmt: skip
        ids[b, t] = int(np.argmin(distance))
        if distance[ids[b, t]] > 1e-3 * scale or ids[b, t] == call.input_ids[b, t]:
            return None
    shifts = [np.roll(call.input_ids, k, axis=1) for k in (1, -1)]
    if any(np.array_equal(ids[:, 1:-1], other[:, 1:-1]) for other in (*shifts, call.input_ids[:, ::-1])):
        return None  # a mistake of whole rows: there are words for it
    return ids


def tokens_in_words(ids: Array, now: Array) -> str:
    """ "token 11 at input_ids[0,3], where the input holds 7", of the tokens that differ."""
    wrong = [(int(b), int(t)) for b, t in np.argwhere(ids != now)]
    places = [f"{ids[p]} at input_ids[{p[0]},{p[1]}]" for p in wrong[:3]]
    few = ", ".join(places) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
    held = f", where the input holds {', '.join(str(now[p]) for p in wrong[:3])}"
    what = "token" if len(wrong) == 1 else "other tokens than the stored ones:"
    return f"{what} {few}{held}{' ...' if len(wrong) > 3 else ''}"


def _matrices(problem: Problem) -> Iterator[Guess]:
    p, call = problem.program, problem.call
    C = p.config.n_embd
    rows = np.unique(call.position_ids)
    wpe, wte = p.weights("wpe.weight", F64), p.weights("wte.weight", F64)

    def table(cause: str, text: str, new: Array) -> Guess:
        return Guess(cause, "embed", text, weights={"wpe.weight": new})

    for text, new in (
        ("the rows of wpe were in reverse order", wpe[::-1]),
        ("the rows of wpe were shifted by one (row i holds row i - 1)", np.roll(wpe, 1, axis=0)),
        ("the rows of wpe were shifted by one (row i holds row i + 1)", np.roll(wpe, -1, axis=0)),
    ):
        yield table("position_rows", text, np.asarray(new))
    if "embed" in problem.observed and np.isfinite(problem.observed["embed"]).all():
        yield from _rows_seen(problem, wpe, rows, table)
    else:
        yield from _rows_guessed(problem, wpe, table)
    for name, factor in (("wte", math.sqrt(C)), ("wte", 1 / math.sqrt(C)), ("wpe", math.sqrt(C))):
        what = "token" if name == "wte" else "position"
        word = "multiplied" if factor > 1 else "divided"

        text = f"the {what} vectors were {word} by sqrt(C)"
        run = _stretched(factor, 1.0) if name == "wte" else _stretched(1.0, factor)
        yield Guess("scaled_embedding", "embed", text, runs={"embed": run})
    for name, value in (("wte", wte), ("wpe", wpe)):
        if value.size <= 1 << 25:
            for by_row, words in ((False, "with one scale"), (True, "with a scale for each row")):
                new = quantised(value.astype(np.float64).T, by_row).T
                text = f"{name}.weight held int8 values {words}"
                yield Guess("quantised", "embed", text, weights={f"{name}.weight": new})
                if name == "wte" and p.config.tied:
                    text = f"{text} where tokens are looked up, though not in the head"
                    lookup = {"embed": _looked_up(p.with_({"wte.weight": new}))}
                    yield Guess("quantised", "embed", text, runs=lookup)


def _looked_up(changed: Program) -> Run:
    """The embedding with another program's weights."""
    return lambda p, call, tap, x, dtype: embed_at(changed, call, call.position_ids, dtype)


def _other_positions(problem: Problem) -> Iterator[Guess]:
    """Position vectors that are not wpe's, or not once: sinusoids, added twice, with fitted factors, normalised."""
    p, call = problem.program, problem.call
    C, N = p.config.n_embd, p.config.n_ctx
    angles = np.arange(N)[:, None] / 10000.0 ** (np.arange((C + 1) // 2) * 2 / C)
    halves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)[:, :C]
    pairs = np.stack([np.sin(angles), np.cos(angles)], axis=2).reshape(N, -1)[:, :C]
    for words, table in (("sines, then cosines", halves), ("sines and cosines in turn", pairs)):
        text = f"positions were sinusoids ({words}), not wpe"
        yield Guess("positions", "embed", text, weights={"wpe.weight": table})
    for what, tokens, positions in (("position", 1.0, 2.0), ("token", 2.0, 1.0)):
        text = f"the {what} vectors were added twice"
        yield Guess("scaled_embedding", "embed", text, runs={"embed": _stretched(tokens, positions)})

    def normalised(x: Array) -> Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        return np.asarray(centred / np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + 1e-5))

    text = "the embedding were normalised (mean 0, variance 1)"
    yield Guess("norm_form", "embed", text, runs=afterwards(problem, "embed", normalised))
    seen = problem.observed.get("embed")
    if seen is not None and np.isfinite(seen).all():
        parts = [_stretched(*pair)(p, call, "embed", [], F64).ravel() for pair in ((1.0, 0.0), (0.0, 1.0))]
        (a, b), *_ = np.linalg.lstsq(np.stack(parts, axis=1), seen.ravel(), rcond=None)
        text = f"the token vectors were multiplied by {a:.6g}, the position vectors by {b:.6g}"
        yield Guess("scaled_embedding", "embed", text, runs={"embed": _stretched(float(a), float(b))}, fitted=2)


def _stretched(tokens: float, positions: float) -> Run:
    def run(p: Program, call: Call, tap: str, x: list[Array], dtype: Any) -> Array:
        rows = p.weights("wpe.weight", dtype)[call.position_ids]
        return np.asarray(p.weights("wte.weight", dtype)[call.input_ids].astype(dtype) * tokens + rows * positions)

    return run


def _rows_seen(problem: Problem, wpe: Array, rows: Array, table: Callable[[str, str, Array], Guess]) -> Iterator[Guess]:
    """What each row of wpe must have been, from the embedding that was observed: zero, or another row."""
    call = problem.call
    tokens = problem.program.weights("wte.weight", F64)[call.input_ids]
    left = problem.observed["embed"] - tokens  # (B, T, C)
    new, wrong = wpe.astype(np.float64), []
    scale = float(np.sqrt(np.mean(np.square(wpe)))) or 1.0
    for row in rows:
        vectors = left[call.position_ids == row]
        if np.sqrt(np.mean(np.square(vectors - wpe[row]))) < 1e-4 * scale:
            continue
        distance = np.sqrt(np.square(wpe - vectors.mean(axis=0)).mean(axis=1))
        nearest = int(distance.argmin())
        if np.sqrt(np.mean(np.square(vectors))) < 1e-4 * scale:
            new[row], what = 0, "zero"
        elif distance[nearest] < 1e-4 * scale:
            new[row], what = wpe[nearest], f"row {nearest}"
        else:
            return
        wrong.append(f"row {row} of wpe were {what}")
    if wrong:
        text = ", ".join(wrong[:3]) + (f" and further rows, {len(wrong)} in all, were others" if len(wrong) > 3 else "")
        yield table("position_rows", text, new)


def _rows_guessed(problem: Problem, wpe: Array, table: Callable[[str, str, Array], Guess]) -> Iterator[Guess]:
    """The rows of wpe where the first observed tap differs, taken for zero or for a neighbour."""
    first = next(tap for tap in problem.taps if tap in problem.observed)
    error = np.abs(problem.observed[first] - problem.values[first])
    by_position = np.moveaxis(np.nan_to_num(error), -2, 1).max(axis=tuple(range(2, error.ndim)))  # (B, T)
    wrong = np.unique(problem.call.position_ids[by_position > 1e-4 * max(float(by_position.max()), 1e-30)])
    if not 0 < len(wrong) < problem.call.input_ids.shape[1]:
        return
    said = f"row {wrong[0]}" if len(wrong) == 1 else f"rows {wrong[0]} to {wrong[-1]}"
    for which, words in ((wrong, said), (wrong[:1], f"row {wrong[0]}")):  # one row's error may show in all later ones
        for what, rows in (
            ("zero", None), ("the row before over again", which - 1), ("the row after", which + 1),
            ("row 0", 0 * which), (f"row {which[0] - 1}", 0 * which + which[0] - 1),
        ):  # fmt: skip
            new = wpe.astype(np.float64)
            new[which] = 0 if rows is None else wpe[np.clip(rows, 0, len(wpe) - 1)]
            yield table("position_rows", f"of wpe, {words} were {what}", new)


def _penalised(problem: Problem, observed: Array) -> Iterator[Guess]:
    """A repetition penalty (Keskar 2019): the prompt's tokens' logits divided by a number, negative ones multiplied."""
    ids, values = problem.call.input_ids, problem.values["logits"]
    (B, T), V = ids.shape, values.shape[-1]
    if problem.program.config.vocab_size != V:
        return
    seen = np.zeros((B, T, V), bool)
    for b, t in np.ndindex(B, T):
        seen[b, t, ids[b, : t + 1]] = True
    whole = np.broadcast_to(seen[:, -1:], seen.shape)
    for words, at in (("the prompt's tokens", whole), ("the tokens so far", seen)):
        with np.errstate(all="ignore"):
            ratios = np.where(values > 0, values / observed, observed / values)[at]
        factor = float(np.median(ratios))
        if math.isfinite(factor) and factor > 0 and abs(factor - 1) > 1e-4:

            def change(x: Array, at: Array = at, factor: float = factor) -> Array:
                return np.where(at, np.where(x > 0, x / factor, x * factor), x)

            text = f"the logits of {words} had a repetition penalty of {factor:.4g}"
            yield Guess("logits_form", "logits", text, runs=afterwards(problem, "logits", change), fitted=1)


def head(problem: Problem) -> Iterator[Guess]:
    """Guesses at the tap `logits`."""
    p = problem.program
    if not p.config.tied:
        wte = p.weights("wte.weight", F64)
        yield Guess("untied_head", "logits", "the head were wte itself", "a matrix of its own", weights={p.head: wte})
    observed = problem.observed.get("logits")

    def of_rows(change: Callable[[Array], Array]) -> dict[str, Run]:
        return afterwards(problem, "logits", change)

    def log_softmax(x: Array) -> Array:
        high = x - x.max(axis=-1, keepdims=True)
        return np.asarray(high - np.log(np.exp(high).sum(axis=-1, keepdims=True)))

    forms: list[tuple[str, Callable[[Array], Array]]] = [
        ("the logits were put through a softmax", lambda x: np.exp(log_softmax(x))),
        ("the logits were put through a log-softmax", log_softmax),
        (
            "each row of logits were centred (shifted by one constant, its mean; its softmax is the same)",
            lambda x: x - x.mean(axis=-1, keepdims=True),
        ),
        (
            "each row of logits had its largest taken off (its softmax is the same)",
            lambda x: x - x.max(axis=-1, keepdims=True),
        ),
        *(
            (f"the logits were capped: {c} tanh(logits / {c})", lambda x, c=c: c * np.tanh(x / c))
            for c in (10, 15, 20, 30, 50)
        ),
    ]
    for text, change in forms:
        yield Guess("logits_form", "logits", text, runs=of_rows(change))
    if observed is not None and np.isfinite(observed).all():
        shift = (observed - problem.values["logits"]).mean(axis=-1, keepdims=True)
        text = "one constant were added to each row of logits (its softmax is the same)"
        guess = Guess("logits_form", "logits", text, runs=of_rows(lambda x: x + shift))
        guess.fitted = shift.size
        yield guess
        yield from _penalised(problem, observed)
    for text, moved in (
        ("each row of logits were that of the position before", lambda x: np.roll(x, 1, -2)),
        ("each row of logits were that of the position before, the first one twice",
         lambda x: np.concatenate([x[..., :1, :], x[..., :-1, :]], axis=-2)),
        ("each row of logits were that of the position after", lambda x: np.roll(x, -1, -2)),
        ("each row of logits were that of the position after, the last one twice",
         lambda x: np.concatenate([x[..., 1:, :], x[..., -1:, :]], axis=-2)),
        ("the logits' positions came in reverse order", lambda x: x[..., ::-1, :]),
        ("each logit were that of the token before", lambda x: np.roll(x, 1, -1)),
        ("each logit were that of the token after", lambda x: np.roll(x, -1, -1)),
    ):  # fmt: skip
        if observed is not None:
            yield Guess("output_order", "logits", text, runs=of_rows(moved))
    weight = p.weights(p.head, F64)
    if weight.size <= 1 << 25:
        yield from misread(problem, "logits", p.head)
        yield Guess("quantised", "logits", f"{p.head} held int8 values with one scale",
                    weights={p.head: quantised(weight.astype(np.float64), False)})  # fmt: skip
