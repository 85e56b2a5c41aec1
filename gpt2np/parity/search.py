"""From outputs that differ to the place and the cause: which questions are asked, in which order."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..call import Call
from ..errors import Gpt2npError
from ..weights import Array
from .capture import around, taps_from
from .cases import Case
from .checks import past_kept
from .compare import Comparison
from .explain.diagnose import Diagnosis, from_outputs, from_taps, misplaced, nonfinite
from .explain.problem import Clock, Guess
from .localise import TapRow, Taps, agreeing, compare_taps, first_divergence, only_noise
from .operations import tap_names
from .places import interval, interval_words, next_tap
from .program import Program
from .report import Check, Pair, Place, Report, Table, add_once, number
from .subject import Subject, taps_of

SHOWN_ROWS = 16  # of the tap table; JSON has them all
LEGEND = {
    "total": "total: rms of A - B.",
    "local A": "local: what the operation itself adds, each party's own inputs given.",
    "inherited": "inherited: what came in with them.",
    "gain": "gain: relative error out / in.",
    "R": "R: rms(A - float64) / rms(B - float64); below 1 A is closer.",
}


class Oracle(NamedTuple):
    """Who decides, if not the program in float64."""

    program: Program | None = None
    taps: Taps | None = None


def investigate(
    report: Report, model: Subject, pair: Pair, comparisons: Sequence[Comparison],
    outputs: Sequence[Mapping[str, Array]],
    asked: bool = False, every: bool = False, oracle: Oracle | None = None, clock: Clock | None = None,
) -> tuple[TapRow | None, dict[str, Array]]:  # fmt: skip
    """Place and cause of what the comparisons of one pair say, into the report.

    Parameters
    ----------
    comparisons : those of this pair on this case
    outputs : what A and B gave
    asked : whether the taps are compared, and judged, though nothing failed
    every : whether the table shows all taps
    clock : the processor time that the search for a cause may take; 60 s where none is given

    Returns
    -------
    the row of the first divergence, and the arrays of the diverging party around it; (None, {}) if there is none
    """
    case, call, a, b = pair
    clock, began = clock or Clock(), time.process_time()
    failing = {c.output: c for c in comparisons if not c.ok}
    given = moved_axes(failing.values(), outputs, b.name, call) if failing else None
    if failing:
        past = past_kept(model, call, outputs[1], comparisons, b.name)
        report.checks += [past] if past is not None else []
    if report.watch is not None:
        report.watch.begin(a.name, b.name, outputs[0], model, case)
    apart: set[str] = set()
    taps_a, taps_b = (
        _watched(taps_from(runner, case), model.outputs_as_taps(made, call), apart)
        for runner, made in zip((a, b), outputs, strict=True)
    )
    try:
        rows = list(compare_taps(
            model.program, call, taps_a, taps_b, model.taps(),
            oracle=oracle.program if oracle else None, oracle_taps=oracle.taps if oracle else None,
            eps=float(np.finfo(np.float16 if model.is_float16 else np.float32).eps),
            watch=report.watch.see if report.watch is not None else None,
        ))  # fmt: skip
    except Gpt2npError as error:
        add_once(report.not_compared, f"taps of {b.name}: {error}")
        rows = []
    clock.spend(time.process_time() - began)  # comparing the taps is part of the search
    rows = [r for r in rows if r.local_b is not None]
    row = first_divergence(rows)
    judged = asked or report.exit_code == 1  # what was not asked for changes no verdict
    inside = show_taps(report, model, rows, (case.name, a.name, b.name), every, judged, asked, apart)
    if isinstance(given, Diagnosis):
        settle(report, given, case.name)
        return None, {}
    if row is None or not (failing or inside):
        if failing:
            report.headline = report.headline or only_noise(model, failing, rows)
        return None, {}
    if not judged:  # they are shown on a page
        add_once(report.findings, f"{row.tap} differs by itself, though all outputs agree: --checks taps judges that")
        return None, {}
    locate(report, model, rows, row)
    say_who(report, row, a.name, b.name)
    party = a if row.over_a > 1 and row.over_a > row.over_b else b
    arrays = around(model, party, case, call, row.tap)
    settle(report, from_taps(model.program, call, row, party.name, arrays, clock), case.name)
    report.details["divergent"] = {"tap": row.tap, "party": party.name, "case": case.name}
    return row, arrays


def _watched(
    give: Callable[[Sequence[str]], dict[str, Array]], own: Mapping[str, Array], apart: set[str]
) -> Callable[[Sequence[str]], dict[str, Array]]:
    """A party's taps; `apart` collects those that are not what its outputs hold of them: `own`."""

    def taps(names: Sequence[str]) -> dict[str, Array]:
        given = give(names)
        apart.update(t for t, v in given.items() if t in own and not np.array_equal(v, own[t], equal_nan=True))
        return given

    return taps


def show_taps(
    report: Report, model: Subject, rows: Sequence[TapRow], names: tuple[str, str, str], every: bool, counts: bool,
    asked: bool, apart: Collection[str] = (),
) -> set[str]:  # fmt: skip
    """The taps as a table and as data, and what was not given; returns those that are no outputs.

    names: the case, A, B; counts: whether a divergence fails, as it does where something failed or taps were asked for;
    apart: taps that were given besides the outputs that hold them, with other numbers.
    """
    case, a, b = names
    held = {r.tap for r in rows}
    missing = [t for t in model.taps() if t not in held]
    inside = held - ({t for p in model.recognised.outputs for t in taps_of(p)} - set(apart))
    if missing and not inside:
        add_once(report.not_compared, f"the operations one by one: {b} gives outputs alone")
    elif missing:
        few = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        add_once(report.not_compared, f"taps that {b} does not give: {few}")
    if rows:
        report.rows[f"{a} - {b}"] = list(rows)
        report.details.setdefault("taps", {})[f"{a} - {b}"] = [r.as_dict() for r in rows]
        if inside:
            report.tables.append(tap_table(rows, case, a, b, every))
            judge(report, rows, first_divergence(rows) if counts else None, b, asked)
    return inside


def judge(report: Report, rows: Sequence[TapRow], row: TapRow | None, party: str, asked: bool) -> None:
    """The taps as a check of their own, where they were asked for or one diverges."""
    worst = max(rows, key=lambda r: max(r.over_a, r.over_b))
    times = number(max(worst.over_a, worst.over_b))
    text = f"{len(rows)} taps of {party}; largest local error {times} times its budget, at {worst.tap}"
    if asked or row is not None:
        text += "" if row is None else f"; first at {row.tap}"
        report.checks.append(Check("taps", row is None, text, party=party, worst=max(worst.over_a, worst.over_b)))


def moved_axes(
    failing: Iterable[Comparison], outputs: Sequence[Mapping[str, Array]], party: str, call: Call
) -> Diagnosis | None:
    """Right numbers in a wrong shape or place, where that explains every failing output."""
    failing = list(failing)
    shaped = [c for c in failing if c.problem and c.metrics is not None and c.metrics.ok]
    rest = [c for c in failing if c not in shaped]
    right, given = outputs
    found = misplaced(rest, right, given, party, call) if rest else None
    if (rest and found is None) or not failing:
        return None
    readings: dict[str, list[str]] = {}
    for c in shaped:
        readings.setdefault(c.problem.partition(": ")[2], []).append(c.output)
    guesses = [
        Guess("output_order", names[0], axes_in_words(names, how), removed=1.0, explains=True, stated=True)
        for how, names in readings.items()
    ] + (found.guesses if found is not None else [])
    text = f"{party} computes it rightly and puts it in the wrong place or shape"
    return Diagnosis(guesses[0].tap, party, text, [], guesses)


def axes_in_words(names: Sequence[str], how: str) -> str:
    return f"the order of axes of {' and '.join(names)}: {how}"


def locate(report: Report, model: Subject, rows: Sequence[TapRow], row: TapRow) -> None:
    """The place of a divergence: one tap where all that it reads was seen, else the interval before it."""
    names = tap_names(model.config)
    good = [r.tap for r in rows if names.index(r.tap) < names.index(row.tap)]
    set_place(report, model, good, [row.tap])


def set_place(report: Report, model: Subject, good: Sequence[str], bad: Sequence[str]) -> None:
    suspects = interval(model.config, good, bad)
    if not suspects:
        return
    text = (
        interval_words(suspects, good, model.config)
        if len(suspects) > 1
        else f"{suspects[0]}: all that it reads agrees"
    )
    following = next_tap(suspects, model.config)
    report.place = Place(suspects[0], suspects[-1], text, suspects, following)
    if following is not None:
        report.next = f"return {following}, too: it halves what is left"


def say_who(report: Report, row: TapRow, a: str, b: str) -> None:
    """Who is closer to float64 at the first divergence."""
    if row.r is None or row.closer == "tie":
        return
    near, far = (a, b) if row.closer == "a" else (b, a)
    times = row.r if row.r > 1 else 1 / row.r if row.r else math.inf
    how = f"{float(f'{times:.2g}'):,.{0 if times >= 10 else 1}f} times nearer to it than to {far}"
    report.who = f"{near} is right at {row.tap}: the float64 run is {how if times < math.inf else 'equal to it'}"


def settle(report: Report, diagnosis: Diagnosis, case: str) -> None:
    """The diagnosis as the report's headline; its place, where no tap showed one."""
    diagnosis.case = diagnosis.case or case
    report.diagnosis = diagnosis
    report.details["diagnosis"] = diagnosis.as_dict()
    best = diagnosis.guesses[0] if diagnosis.guesses else None
    place = report.place
    named = best is not None and (best.explains or best.likely)
    seen = place is None or len(place.suspects) < 2 or named
    where = diagnosis.tap if seen or place is None else f"between {place.first} and {place.last}"
    report.headline = f"first divergence {where}"
    if best is not None and best.cause in ("one_part", "one_number"):
        report.headline += f"; {best.cause}: {best.text}; none of the usual mistakes explains it"
    elif best is not None and best.stated and best.explains:
        report.headline += f"; {best.cause}: {best.text}"
    elif best is not None and best.evidence and not best.explains and not best.likely:
        report.headline += f"; {best.cause} shows: {best.sentence(diagnosis.who)} ({best.evidence})"
    elif best is not None and best.likely:
        report.headline += f"; most likely {best.cause}: {best.sentence(diagnosis.who)}"
    elif best is not None:
        part = f"explains part of it ({best.removed:.0%})"
        report.headline += f"; {best.cause} {part}: {best.sentence(diagnosis.who)}"
    else:
        report.headline += "; none of the usual mistakes explains it"
    if named and report.next.startswith("return "):
        report.next = f"put that right in {diagnosis.who}, and compare again"


def from_the_record(
    report: Report, model: Subject, case: Case, call: Call, clock: Clock | None = None
) -> Diagnosis | None:
    """The file's own operations against the recorded outputs."""
    assert case.data is not None
    recorded = model.outputs_as_taps(case.data.outputs, call)
    clock, began = clock or Clock(), time.process_time()
    good, bad = agreeing(model, call, recorded)
    clock.spend(time.process_time() - began)
    found = from_outputs(model.program, call, recorded, "the file", spare_weights(model), clock)
    if bad:
        set_place(report, model, good, bad)
        report.next = "with the original at hand, gpt2np diff ORIGINAL.onnx THIS.onnx reads what differs from both"
    return found


def where_not_finite(model: Subject, call: Call, comparisons: Sequence[Comparison]) -> Diagnosis | None:
    """Where the first NaN or infinity comes from, if a failing output holds one."""
    broken = [c for c in comparisons if c.metrics is not None and not c.ok and c.metrics.nonfinite[0]]
    return nonfinite(model.program, call, model.taps()) if broken else None


def spare_weights(model: Subject) -> dict[str, Array]:
    """Floating-point initializers that the graph does not use."""
    names = [name for name, why in model.recognised.ignored if why == "left over"]
    return {name: model.file.tensors[name].load() for name in names}


# ------------------------------------------------------------------------------------------------ tables


def ratio(value: float) -> str:
    """A number without a unit: "1.02", "6.2e-7"."""
    return f"{value:.3g}" if 1e-3 <= value < 1e4 else number(value)


def tap_table(rows: Sequence[TapRow], case: str, a: str, b: str, every: bool = False) -> Table:
    """The taps: all, or those around the first divergence, or those with most local error."""
    first = first_divergence(rows)
    if every or len(rows) <= SHOWN_ROWS:
        shown = set(range(len(rows)))
    elif first is not None:
        at = list(rows).index(first)
        shown = set(range(max(0, at - SHOWN_ROWS // 2), at + SHOWN_ROWS // 2))
    else:
        order = sorted(range(len(rows)), key=lambda i: -max(rows[i].over_a, rows[i].over_b))
        shown = set(order[: SHOWN_ROWS - 1]) | {len(rows) - 1}

    def cell(value: float | None, form: Callable[[float], str] = number) -> str:
        return "" if value is None else form(value)

    lines, styles = [], []
    for i, row in enumerate(rows):
        if i not in shown or i >= len(rows):
            continue
        closer = "" if row.r is None else {"a": "A", "b": "B", "tie": "tie"}[row.closer]
        mark = "FIRST" if row is first else "over" if row.diverges else ""
        lines.append((
            row.tap, cell(row.total), cell(row.local_a), cell(row.local_b), cell(row.inherited),
            cell(row.gain, ratio), cell(row.r, ratio), closer, mark,
        ))  # fmt: skip
        styles.append("red" if row.diverges else "")
    head = ("tap", ">total", ">local A", ">local B", ">inherited", ">gain", ">R", "closer", "")
    left = len(rows) - len(shown)
    notes = [f"{left} more taps in --json, and with diff --local"] if left else []
    title = f"taps on {case}, rms errors; A is {a}, B is {b}"
    return Table(title, head, lines, styles, notes, ("closer", "gain"), LEGEND)
