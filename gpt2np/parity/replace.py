"""One party run on with the other's values from some taps: is everything right behind them, or is there more?"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

import numpy as np

from ..call import Call
from ..errors import InputError
from ..weights import Array
from .budgets import EQUALLY_NEAR
from .capture import taps_from
from .forms import named, nearest
from .localise import TapRow, compare_taps
from .operations import tap_inputs, tap_names
from .parties import Function, Ort, Ours, Runner, sorted_out
from .places import ancestors
from .program import Program
from .report import Pair, Report
from .search import tap_table
from .subject import Subject


def run_on(program: Program, call: Call, replace: Mapping[str, Array], names: Sequence[str]) -> dict[str, Array]:
    """These taps of a program in float32 in which some taps have the values given instead of their own."""
    known: dict[str, Array] = {}
    for tap in tap_names(program.config)[: max(map(tap_names(program.config).index, names)) + 1]:
        inputs = [known[i] for i in tap_inputs(tap, program.config)]
        own = replace[tap] if tap in replace else program.run(tap, call, inputs, np.dtype(np.float32))
        known[tap] = np.asarray(own, np.float32)
    return {tap: known[tap] for tap in names}


def can_run_on(b: Runner) -> bool:
    """Whether a party is a model whose operations can be run one by one."""
    return isinstance(b, (Ort, Ours)) and b.model.found is not None


def check_replace(taps: Sequence[str], model: Subject, b: Runner) -> None:
    """Refuse taps that the file does not have, and a port that cannot go on from one.

    Raises
    ------
    InputError
        With the names that it may have meant, or what the port needs.
    """
    if taps and isinstance(b, Function) and "replace" not in inspect.signature(b.function).parameters:
        raise InputError(f"{b.name} has no parameter `replace`: it is given {{tap: array}}, to go on from there")
    if taps and not isinstance(b, Function) and not can_run_on(b):
        raise InputError(f"{b.name} cannot be run on from a tap: give a model.onnx, or a function with `replace`")
    for tap in taps:
        if tap not in model.taps():
            raise InputError(f"--replace {tap}: no such tap; there is {nearest(tap, model.taps())}")


def put_right(report: Report, model: Subject, pair: Pair, replace: Sequence[str]) -> None:
    """Run B on with A's values of these taps, and say what is still wrong behind them."""
    case, call, a, b = pair
    values = a.run(case.feeds, False, replace).taps
    missing = [tap for tap in replace if tap not in values]
    if missing:
        raise InputError(f"{a.name} does not give {', '.join(missing)}, which is to take B's place")
    names = model.taps()
    if isinstance(b, Function):
        given = named(b.call(case.feeds, replace=values), model.output_names, b.name)
        taps = sorted_out(model, case.feeds, given, f"{b.name} returned", False, names).taps
    else:
        assert isinstance(b, (Ort, Ours))  # as `check_replace` has seen
        taps = run_on(b.model.program, call, values, names)
    rows = list(compare_taps(model.program, call, taps_from(a, case), lambda wanted: _some(taps, wanted), names))
    rows = [r for r in rows if r.local_b is not None]
    behind = [r for r in rows if r.over_b > 1 and r.tap not in replace]
    put = " and ".join(replace)
    if behind:
        text = f"with {put} put right, {behind[0].tap} is the next that differs by itself"
    else:
        text = f"with {put} put right, everything after agrees"
    report.findings.append(text)
    report.details["replaced"] = {"taps": list(replace), "text": text, "rows": [r.as_dict() for r in rows]}
    if behind:
        report.tables.append(tap_table(rows, f"{case.name} with {put} put right", a.name, b.name))


def _some(taps: Mapping[str, Array], wanted: Sequence[str]) -> dict[str, Array]:
    return {tap: taps[tap] for tap in wanted if tap in taps}


def _few(taps: Sequence[str]) -> str:
    return ", ".join(taps[:3]) + (f" and {len(taps) - 3} more" if len(taps) > 3 else "")


def say_whether_cured(report: Report, rows: Sequence[TapRow], row: TapRow, model: Subject, party: str) -> None:
    """Whether the first divergence is the only one: told by the local errors, each with the party's own inputs."""
    names, config = model.taps(), model.config
    given = {r.tap for r in rows}
    after = [tap for tap in names if names.index(tap) > names.index(row.tap)]
    twins = {f"{row.tap[:-1]}{x}" for x in "qkv"} if row.tap.endswith((".q", ".k", ".v")) else set()
    more = [r for r in rows if r.diverges and r.tap != row.tap and r.tap not in twins]
    # what is right behind a wrong tap was computed from something else than that
    near = [r.tap for r in more if r.r is not None and 1 / EQUALLY_NEAR <= r.r <= EQUALLY_NEAR]
    right = [tap for tap in near if row.tap in ancestors([tap], config)]
    more_taps = [r.tap for r in more if r.tap not in right]
    if right:
        how = "agree" if len(right) > 1 else "agrees"
        report.findings.append(
            f"{_few(right)} {how} all the same: {party} does not go on with what it returned as {row.tap}"
        )
    if more_taps:
        how = "differ by themselves" if len(more_taps) > 1 else "differs by itself"
        report.findings.append(f"{row.tap} is not all: {_few(more_taps)} of {party} {how}, too")
    elif not right and after and all(tap in given for tap in after):
        report.findings.append(f"with {row.tap} put right, everything after agrees: nothing else differs by itself")
