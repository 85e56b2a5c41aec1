"""Outputs of several parties on the same inputs, pair by pair."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ComparisonError, Gpt2npError
from ..weights import Array
from .cases import Case
from .metrics import Budget, Metrics, TopK, measure, top_k
from .parties import OnnxRef, Ort, Ours, Recorded, Runner, TraceRunner
from .subject import Subject
from .trace import versions

if TYPE_CHECKING:
    from .budgets import Budgets


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
    problem: str = ""  # why there is nothing to measure; a failure

    @property
    def ok(self) -> bool:
        return not self.problem and self.metrics is not None and self.metrics.ok

    def as_dict(self) -> dict[str, Any]:
        return {
            "case": self.case, "output": self.output, "actual": self.actual, "expected": self.expected,
            "rtol": self.budget.rtol, "atol": self.budget.atol, "budget": self.budget.source, "ok": self.ok,
            "problem": self.problem or None, "metrics": self.metrics.as_dict() if self.metrics else None,
            "top": self.top.as_dict() if self.top else None,
        }  # fmt: skip


def pairs_of(runners: Sequence[Runner], recorded: bool) -> list[tuple[str, str]]:
    """(actual, expected) names: each party against the recorded data, and the first against each other one."""
    names = [r.name for r in runners]
    first, others = names[0], names[1:]
    against = [(name, Recorded.name) for name in [*others, first]] if recorded else []
    return against + [(first, other) for other in others]


def compare_case(
    case: Case,
    model: Subject,
    runners: Sequence[Runner],
    budgets: Budgets,
    outputs: Mapping[str, Mapping[str, Array] | Gpt2npError],
) -> Iterator[Comparison]:
    """All pairs, output by output. `outputs`: what each party gave, or why it gave nothing."""
    roles = {p.name: p.role for p in model.found.outputs} if model.found is not None else {}
    given: dict[str, Mapping[str, Array] | Gpt2npError] = dict(outputs)
    if case.data is not None:
        given[Recorded.name] = case.data.outputs
    failed: set[str] = set()
    for actual, expected in pairs_of(runners, case.data is not None):
        a, b = given[actual], given[expected]
        broken = False
        for party, value in ((actual, a), (expected, b)):
            if isinstance(value, Gpt2npError):
                broken = True
                if party not in failed:
                    failed.add(party)
                    yield Comparison(case.name, "(run)", party, expected, budgets.default, problem=str(value))
        if broken:
            continue
        assert not isinstance(a, Gpt2npError)
        assert not isinstance(b, Gpt2npError)
        for name in dict.fromkeys([*b, *a]):
            result = Comparison(case.name, name, actual, expected, budgets(name))
            if name not in a or name not in b:
                result.problem = f"{actual if name not in a else expected} has no such output"
            else:
                try:
                    result.metrics = measure(a[name], b[name], result.budget)
                    if roles.get(name) == "logits":
                        result.top = top_k(a[name], b[name], result.budget)
                except ComparisonError as error:
                    result.problem = str(error)
            yield result


def compared(case: str, name: str, a: str, b: str, x: Array, y: Array, budgets: Budgets) -> Comparison:
    result = Comparison(case, name, a, b, budgets(name))
    try:
        result.metrics = measure(x, y, result.budget)
    except ComparisonError as error:
        result.problem = str(error)
    return result


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
            found[r.name] = f"a trace of {r.trace.runner} in {r.path}"
        else:
            found[r.name] = "a callable"
    sets = [c.data for c in cases if c.data is not None]
    if sets:
        found[Recorded.name] = f"outputs stored in {len(sets)} data sets of {sets[0].path.parent}"
    return found
