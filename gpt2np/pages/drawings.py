"""The pictures of a report: errors from tap to tap, the heat map and the histogram of one tap, tokens, checks.

Those of one tap begin empty: report.js fills them with the tap that is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from ..html import Picture
from ..optional import ALL_FOR_PAGES, needs
from ..parity.compare import Comparison
from ..parity.localise import LOCAL_FACTOR, TapRow
from ..parity.metrics import Budget
from ..parity.report import Check
from .evidence import Token

with needs("altair", "a report with pictures", ALL_FOR_PAGES):
    import altair as alt

ROWS = alt.NamedData(name="rows")
BLUE, ORANGE = "#2a7ae2", "#d1690a"
COLOURS = BLUE, "#3c9a5f", ORANGE, "#8a8a8a", "#a05bc4"
SHAPES = "circle", "square", "cross", "triangle-down", "diamond"
FLIPS = "same", "within the budget", "B flips", "A flips", "both flip"
FLOOR = "float32's own error, up to the budget"


def rounded(value: float) -> float | str:
    """Three significant digits; in words what JSON has no number for, and a logarithmic axis no place."""
    return float(f"{value:.2e}") if math.isfinite(value) else "not finite"


def drift_rows(rows: Sequence[TapRow], a: str, b: str) -> list[dict[str, Any]]:
    """An error for each tap and kind that is known; `to` is the other edge of the band."""
    kinds: list[tuple[str, Callable[[TapRow], float | None]]] = [
        (f"{b} - {a}", lambda r: r.total), (f"{a} - float64", lambda r: r.float64_a),
        (f"{b} - float64", lambda r: r.float64_b), (f"local {a}", lambda r: r.local_a),
        (f"local {b}", lambda r: r.local_b), (FLOOR, lambda r: r.floor),
    ]  # fmt: skip
    return [
        {"tap": row.tap, "error": what, "rms": rounded(value),
         "to": rounded(value * (LOCAL_FACTOR if what == FLOOR else 1))}
        for row in rows for what, get in kinds if (value := get(row)) is not None
    ]  # fmt: skip


def compared_rows(comparisons: Sequence[Comparison], a: str, b: str) -> list[dict[str, Any]]:
    """The same of two traces, where nothing was run: their distance alone."""
    return [
        {"tap": c.output, "error": f"{b} - {a}", "rms": rounded(c.metrics.rms), "to": rounded(c.metrics.rms)}
        for c in comparisons if c.metrics is not None
    ]  # fmt: skip


def has_mark(row: dict[str, Any]) -> bool:
    """Whether a logarithmic axis has a place for it."""
    return isinstance(row["rms"], float) and row["rms"] > 0


def drift(rows: list[dict[str, Any]], first: str | None) -> Picture:
    """Every kind of error from tap to tap in the order of computation; the first divergence is marked."""
    taps = list(dict.fromkeys(row["tap"] for row in rows))
    kinds = [kind for kind in dict.fromkeys(row["error"] for row in rows) if kind != FLOOR]
    ticks = [tap for tap in taps if tap.endswith(".ln_1") or tap in ("embed", "ln_f", "logits")] or taps
    x = alt.X("tap:N", sort=taps, title="tap, in the order of computation",
              axis=alt.Axis(values=ticks, labelAngle=-45, labelOverlap=True))  # fmt: skip
    y = alt.Y("rms:Q", scale=alt.Scale(type="log"), title="rms error", axis=alt.Axis(format=".0e", labelOverlap=True))
    base = alt.Chart(ROWS).transform_filter("datum.rms > 0").encode(x=x, y=y, tooltip=["tap:N", "error:N", "rms:Q"])
    band = base.transform_filter(alt.datum.error == FLOOR).mark_bar(opacity=0.18, color="gray").encode(y2="to:Q")
    legend = alt.Legend(orient="top", columns=2, labelLimit=300)
    colours, shapes = (alt.Scale(domain=kinds, range=list(values[: len(kinds)])) for values in (COLOURS, SHAPES))
    lines = base.transform_filter(alt.datum.error != FLOOR).encode(
        color=alt.Color("error:N", title=None, legend=legend, scale=colours)
    )
    shaped = alt.Shape("error:N", title=None, legend=legend, scale=shapes)
    layers = [
        *([band] if any(row["error"] == FLOOR and has_mark(row) for row in rows) else []),
        lines.mark_line(strokeWidth=1, opacity=0.6),
        lines.mark_point(size=26, opacity=0.9).encode(shape=shaped),
        alt.Chart(ROWS).transform_filter("datum.tap == tap").mark_rule(strokeDash=[2, 3], opacity=0.5).encode(x=x),
        *(marked(first, x, right=taps.index(first) > len(taps) / 2) if first is not None else []),
    ]
    caption = (
        f"Grey: {FLOOR}, {LOCAL_FACTOR:g} times as much. A local error is what an operation itself adds, each party's "
        "own inputs given; the others hold what came in, too. An error that is 0 or not finite has no mark. "
        "Click a mark, or choose a tap below, to look into it."
    )
    chosen = alt.param(name="tap", value=first or taps[0])
    chart = alt.layer(*layers).add_params(chosen).properties(width="container", height=300)
    return Picture("drift", "Errors from tap to tap", caption, rows, chart)


def marked(tap: str, x: alt.X, right: bool) -> list[alt.Chart]:
    """A line at one tap, with its name on the side where there is room."""
    one = alt.Chart(ROWS).transform_filter(alt.datum.tap == tap).transform_window(n="row_number()")
    one = one.transform_filter("datum.n == 1").encode(x=x)
    name = one.mark_text(align="right" if right else "left", dx=-6 if right else 6, baseline="top")
    return [one.mark_rule(color=ORANGE, strokeWidth=2), name.encode(y=alt.value(2), text=alt.value(tap))]


def heat() -> Picture:
    """The error of one tap by position and head, or by position and block of channels."""
    base = alt.Chart(ROWS).encode(
        alt.X("column:N", sort=None, title=None, axis=alt.Axis(orient="top", labelAngle=-90)),
        alt.Y("position:N", sort=None, title="position"),
        tooltip=["position:N", "column:N", "error:N"],
    )
    shade = alt.Opacity("relative:Q", legend=None,
                        scale=alt.Scale(type="log", domain=[1e-8, 1], range=[0.05, 0.7], clamp=True))  # fmt: skip
    cells = base.mark_rect(color=BLUE).encode(shade)
    words = base.mark_text(fontSize=11).encode(text="exponent:N")
    caption = (
        "rms error of each cell; the number in it is the power of ten (-6: between 1e-6 and 1e-5; ∞: not finite; 0: "
        "no error), the colour its share of the tap's own size."
    )
    chart = (cells + words).properties(width="container", height=350)
    return Picture("heat", "Where in the tap", caption, [], chart)


def ulps() -> Picture:
    """How many numbers of one tap are how far apart."""
    base = alt.Chart(ROWS).encode(
        alt.X("numbers:Q", scale=alt.Scale(type="log", domainMin=0.7), title="numbers"),
        alt.Y("ulps:N", sort=None, title="ulps"),
        tooltip=["ulps:N", "numbers:Q"],
    )
    words = base.mark_text(align="left", dx=4).encode(text=alt.Text("numbers:Q", format=","))
    caption = "The error of each number in float32 ulps of the largest number of its row."
    bars = base.mark_bar(color=BLUE).encode(x2=alt.datum(0.7))
    chart = (bars + words).properties(width="container", height=240)
    return Picture("ulps", "How far apart", caption, [], chart)


def token_rows(found: Sequence[Token], text: Callable[[int], str], ids: Any, budget: Budget) -> list[dict[str, Any]]:
    """A row for each position. A flip within the budget has a margin below twice what a score may be off by; of the
    others, the party flips that does not say what float64 says."""
    many = len({t.batch for t in found}) > 1

    def word(t: Token) -> str:
        if t.a == t.b or t.margin <= 2 * (budget.atol + budget.rtol * t.size):
            return FLIPS[t.a != t.b]
        return FLIPS[3 if t.b == t.exact else 2 if t.a == t.exact or t.exact is None else 4]

    return [
        {
            "position": f"{t.batch}:{t.position}" if many else str(t.position),
            "token": text(int(ids[t.batch, t.position])), "A says": text(t.a), "B says": text(t.b),
            "float64 says": "" if t.exact is None else text(t.exact), "margin": rounded(t.margin),
            "largest difference": rounded(t.apart), "KL in nats": rounded(t.kl), "top-1": word(t),
        }
        for t in found
    ]  # fmt: skip


def tokens(rows: list[dict[str, Any]], a: str, b: str, note: str) -> Picture:
    """What both would say next at each position, by what margin, and where they differ."""
    words = [word for word in FLIPS if any(row["top-1"] == word for row in rows)]
    shapes, colours = (alt.Scale(domain=words, range=[r[FLIPS.index(w)] for w in words]) for r in (SHAPES, COLOURS))
    legend = alt.Legend(orient="top", labelLimit=300)
    base = alt.Chart(ROWS).encode(
        alt.X("position:N", sort=None, axis=alt.Axis(labelOverlap=True)),
        tooltip=[
            "position:N",
            "token:N",
            "A says:N",
            "B says:N",
            "float64 says:N",
            "margin:Q",
            "largest difference:Q",
            "top-1:N",
        ],
    )
    margin = base.mark_point(filled=True, size=50, opacity=0.9).encode(
        alt.Y("margin:Q", title="margin, largest difference"),
        alt.Shape("top-1:N", scale=shapes, title=None, legend=legend),
        alt.Color("top-1:N", scale=colours, title=None, legend=legend),
    )
    apart = base.mark_tick(thickness=2).encode(alt.Y("largest difference:Q"))
    label = base.transform_calculate(says="datum['top-1'] == 'same' ? '' : datum['B says']")
    label = label.mark_text(dy=-10, fontSize=11).encode(alt.Y("margin:Q"), text="says:N")
    caption = (
        f"A is {a}, B is {b}. A mark is the margin of A's most probable token over its second, the line the largest "
        f"difference of a score: a token can flip only where the line is above half of the mark.{note}"
    )
    chart = (margin + apart + label).properties(width="container", height=240)
    return Picture("tokens", "What comes next", caption, rows, chart)


def matrix(checks: Sequence[Check]) -> Picture:
    """Checks that need no reference: each party against itself."""
    rows: list[dict[str, Any]] = []
    for check in checks:
        name, party = check.name.split(" ")[0] if check.party else check.name, check.party or "ours"
        if any((row["check"], row["party"]) == (name, party) for row in rows):
            name += f": {check.text.partition(':')[0]}"
        result = {True: "ok", False: "FAIL", None: "not made"}[check.ok]
        worst = "" if check.worst is None else f" {check.worst:.2g}"
        rows.append({"check": name, "party": party, "result": result, "shown": result + worst,
                     "what": check.text})  # fmt: skip
    results = ["ok", "FAIL", "not made"]
    base = alt.Chart(ROWS).encode(
        alt.Y("check:N", sort=None, title=None), alt.X("party:N", sort=None, title=None, axis=alt.Axis(orient="top")),
        tooltip=["check:N", "party:N", "shown:N", "what:N"],
    )  # fmt: skip
    cells = base.mark_rect(opacity=0.3, stroke="currentColor", strokeWidth=0.5).encode(
        alt.Color("result:N", legend=None, scale=alt.Scale(domain=results, range=[BLUE, ORANGE, "gray"]))
    )
    words = base.mark_text().encode(text="shown:N")
    caption = "Each party against itself, with the largest difference that was found."
    chart = (cells + words).properties(width=alt.Step(150), height=alt.Step(24))
    return Picture("matrix", "Checks", caption, rows, chart)
