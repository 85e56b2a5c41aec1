"""Outputs of several parties on the same inputs, pair by pair."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ComparisonError, Gpt2npError, InputError
from ..weights import Array
from .cases import Case
from .metrics import Budget, Metrics, TopK, measure, top_k
from .parties import OnnxRef, Ort, Ours, Recorded, Runner, TraceRunner
from .places import kept_output, seen_rows
from .report import Report, add_once, number
from .shapes import Fit, fit
from .subject import Subject
from .trace import versions

if TYPE_CHECKING:
    from .budgets import Budgets

FLOATS = {"float64": 64, "float32": 32, "float16": 16}  # bits of each
FEW = 6  # names that are told one by one


@dataclass
class Comparison:
    """One array of one party against another's."""

    case: str
    output: str  # an output's name or a tap's
    actual: str  # names of the parties
    expected: str
    budget: Budget
    metrics: Metrics | None = None
    top: TopK | None = None  # for logits
    problem: str = ""  # why it fails whatever the numbers are: no such array, a wrong shape
    notes: list[str] = field(default_factory=list)  # how it was compared, and what is odd about the arrays
    left_out: str = ""  # what of the array was not compared
    noise: int = 0  # numbers beyond the budget that float64 shows to be rounding of both parties
    seconds: float = 0.0  # how long comparing took
    aligned: Array | None = None  # the actual array in the expected one's shape, where it had another

    @property
    def ok(self) -> bool:
        return not self.problem and self.metrics is not None and self.metrics.failing <= self.noise

    @property
    def wide(self) -> bool:
        """Whether the budget lets noise of the signal's own size pass: nothing is compared then."""
        m, budget = self.metrics, self.budget
        return m is not None and 0 < (m.spread or m.rms_expected) <= budget.atol + budget.rtol * m.rms_expected

    @property
    def idle(self) -> str:
        """Why it compares nothing, as tables say it; "" where wrong numbers would be seen.

        NaN is what many mistakes give, so that NaN in both parties says nothing.
        """
        m = self.metrics
        if m is None or not m.elements:
            return "empty"
        return "not finite" if m.elements == max(m.nonfinite) else "too wide" if self.wide else ""

    def as_dict(self) -> dict[str, Any]:
        return {
            "case": self.case, "output": self.output, "actual": self.actual, "expected": self.expected,
            "rtol": self.budget.rtol, "atol": self.budget.atol, "budget": self.budget.source, "ok": self.ok,
            "problem": self.problem or None, "notes": self.notes, "left_out": self.left_out or None,
            "noise_by_float64": self.noise, "budget_as_wide_as_the_signal": self.wide,
            "metrics": self.metrics.as_dict() if self.metrics else None,
            "top": self.top.as_dict() if self.top else None,
        }  # fmt: skip


def pairs_of(runners: Sequence[Runner], recorded: bool) -> list[tuple[str, str]]:
    """(actual, expected) names: each party against the recorded data, and the first against each other one."""
    names = [r.name for r in runners]
    first, others = names[0], names[1:]
    against = [(name, Recorded.name) for name in [*others, first]] if recorded else []
    return against + [(first, other) for other in others]


def by_one_alone(names: Sequence[str], who: str) -> list[str]:
    """What one of two parties alone gives, in words, so that it is told as not compared; none where that is nothing."""
    told = ", ".join(names) if len(names) <= FEW else f"{names[0]} ... {names[-1]}, {len(names)} arrays"
    return [f"{told} ({who} alone gives {'it' if len(names) == 1 else 'them'})"] if names else []


def _other_files(model: Subject, runners: Sequence[Runner]) -> list[Ort]:
    """Those parties that are model files of their own."""
    return [runner for runner in runners if isinstance(runner, Ort) and runner.model is not model]


def tell_outputs_of_one_file(report: Report, model: Subject, runners: Sequence[Runner]) -> None:
    """What only one of the model and another file puts out goes into the report: it cannot be compared.

    Raises
    ------
    InputError
        If they have no output in common.
    """
    mine = model.output_names
    for other in _other_files(model, runners):
        its = [other.shown(name) for name in other.model.output_names]
        if not set(mine) & set(its):
            raise InputError(
                f"{model.path} gives {', '.join(mine[:FEW])}, and {other.model.path} gives {', '.join(its[:FEW])}:"
                " there is no output in both; gpt2np diff, or --checks taps, compares what is inside"
            )
        add_once(report.not_compared, *by_one_alone([name for name in mine if name not in its], "the model"))
        add_once(report.not_compared, *by_one_alone([name for name in its if name not in mine], other.name))


def compare_case(
    case: Case,
    model: Subject,
    runners: Sequence[Runner],
    budgets: Budgets,
    outputs: Mapping[str, Mapping[str, Array] | Gpt2npError],
    padding: bool = False,
) -> Iterator[Comparison]:
    """All pairs, output by output. `outputs`: what each party gave, or why it gave nothing.

    Another model file may have other outputs (see `tell_outputs_of_one_file`); any other party must give all.
    Rows of padding are compared only if `padding` says so: what they hold is not defined.
    """
    given: dict[str, Mapping[str, Array] | Gpt2npError] = dict(outputs)
    if case.data is not None:
        given[Recorded.name] = case.data.outputs
    failed: set[str] = set()
    elsewhere = {runner.name for runner in _other_files(model, runners)}
    for actual, expected in pairs_of(runners, case.data is not None):
        a, b = given[actual], given[expected]
        for party, value in ((actual, a), (expected, b)):
            if isinstance(value, Gpt2npError) and party not in failed:
                failed.add(party)
                yield Comparison(case.name, "(run)", party, expected, budgets.default, problem=str(value))
        if isinstance(a, Gpt2npError) or isinstance(b, Gpt2npError):
            continue
        for name in dict.fromkeys([*b, *a]):
            if (name not in a or name not in b) and elsewhere & {actual, expected}:
                continue
            result = Comparison(case.name, name, actual, expected, budgets(name))
            if name not in a or name not in b:
                result.problem = f"{actual if name not in a else expected} has no such output"
            else:
                compare_arrays(result, a[name], b[name], model, case, budgets, padding)
            yield result


def compare_arrays(
    result: Comparison, a: Array, b: Array, model: Subject | None, case: Case | None, budgets: Budgets,
    padding: bool = False,
) -> None:  # fmt: skip
    """Measure one array against another: shape, rows of padding, the budget, and float64 where the budget is "auto"."""
    began = time.perf_counter()
    _compare_arrays(result, a, b, model, case, budgets, padding)
    result.seconds = time.perf_counter() - began


def _compare_arrays(
    result: Comparison, a: Array, b: Array, model: Subject | None, case: Case | None, budgets: Budgets, padding: bool
) -> None:
    role, call = result.output, None
    if model is not None and model.found is not None and case is not None:
        role = next((p.role for p in model.found.outputs if p.name == result.output), role)
        try:
            call = model.call(case.feeds)
        except Gpt2npError:  # the feeds say what no call of ours can be; the arrays can be compared all the same
            call = None
    keep = kept_output(role, b.shape, call) if call is not None and not padding else None
    try:
        a, b, keep = _in_one_shape(result, a, b, role, keep)
        if result.problem and result.metrics is None and a.shape != b.shape:
            return
        result.metrics = measure(a, b, result.budget, keep)
        rows = seen_rows(call) if call is not None and keep is not None else None
        if role == "logits" and a.ndim and a.size and (rows is None or a.size == rows.size * a.shape[-1]):
            seen = slice(None) if rows is None else rows.reshape(-1)
            result.top = top_k(a.reshape(-1, a.shape[-1])[seen], b.reshape(-1, b.shape[-1])[seen], result.budget)
    except ComparisonError as error:
        result.problem = str(error)
        return
    if result.metrics.left_out:
        rows_out = result.metrics.left_out // max(a.shape[-1], 1)
        result.left_out = result.left_out or f"{rows_out:,} rows of padding, which no real token sees (--padding)"
        _note_padding(result, a, b, keep)
    if budgets.arbiter is not None and case is not None and result.metrics.failing and budgets.is_auto(result.output):
        result.noise = budgets.arbiter.noise(result, case, a, b)
    for array, who in ((a, result.actual), (b, result.expected)):
        other = b if array is a else a
        if FLOATS.get(array.dtype.name, 0) < FLOATS.get(other.dtype.name, 0) and FLOATS.get(array.dtype.name, 64) < 32:
            result.notes.append(f"{result.output} of {who} is {array.dtype}, the other one {other.dtype}")
        elif array.dtype.kind in "iub" and other.dtype.kind == "f":
            result.notes.append(f"{result.output} of {who} holds integers ({array.dtype})")


def _note_padding(result: Comparison, a: Array, b: Array, keep: Array | None) -> None:
    """Say that rows which are not compared differ: a port's owner may be looking at them."""
    behind = None if keep is None else measure(a, b, result.budget, ~np.broadcast_to(keep, a.shape))
    if behind is not None and behind.failing:
        where = f"in its rows of padding, by up to {number(behind.max_abs)}, where nothing is defined"
        result.notes.append(f"{result.output} of {result.actual} differs from {result.expected} {where}")


def _in_one_shape(
    result: Comparison, a: Array, b: Array, role: str, keep: Array | None
) -> tuple[Array, Array, Array | None]:
    """Both arrays in one shape where some reading of the actual one fits, with what was done in words."""
    a, b = np.asarray(a), np.asarray(b)
    if a.shape == b.shape:
        return a, b, keep
    both = f"shape {a.shape}, expected {b.shape}"
    if a.dtype.kind not in "biuf" or b.dtype.kind not in "biuf":
        raise ComparisonError(both)
    found: Fit | None = fit(a, b, role, result.budget, keep)
    if found is None:
        raise ComparisonError(f"{both}: nothing of it could be compared; no exchange of axes, no part of it fits")
    if found.accepted:
        result.notes.append(f"{result.output} of {result.actual} has {both}: {found.text}")
        result.left_out = found.part
    else:
        result.problem = f"{both}: {found.text}"
    mask = None if keep is None else found.cut(np.broadcast_to(keep, b.shape))
    result.aligned = found.actual
    return found.actual, found.cut(b), mask


def parties(runners: Sequence[Runner], cases: Sequence[Case]) -> dict[str, str]:
    """What each party is, for the report's head."""
    found: dict[str, str] = {}
    known = versions()
    for r in runners:
        if isinstance(r, Ours):
            found[r.name] = f"gpt2np, engine {r.engine}, {r.dtype}"
        elif isinstance(r, Ort):
            threads = f", {r.threads} threads" if r.threads is not None else ""
            found[r.name] = (
                f"ONNX Runtime {known['onnxruntime']}, optimisations {'on' if r.optimise else 'off'}{threads}"
                + ("" if r.name.startswith("ort") else f", on {r.model.path}")
            )
        elif isinstance(r, OnnxRef):
            found[r.name] = f"onnx.reference {known['onnx']}"
        elif isinstance(r, TraceRunner):
            what = "arrays in" if r.trace.plain else f"a trace of {r.trace.runner} in"
            found[r.name] = f"{what} {r.path}"
        else:
            found[r.name] = "a function"
    sets = [c.data for c in cases if c.data is not None]
    if sets:
        many = f"{len(sets)} data sets" if len(sets) > 1 else sets[0].path.name
        found[Recorded.name] = f"outputs stored in {many} of {sets[0].path.parent}"
    return found
