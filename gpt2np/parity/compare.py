"""Outputs of several parties on the same inputs, pair by pair."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import ComparisonError, Gpt2npError, InputError
from ..onnx.read.datasets import DataSet
from ..onnx.recognise.recognised import LENGTHS
from ..weights import Array
from .metrics import Budget, Metrics, TopK, measure, top_k
from .runners import Model, Recorded, Runner

if TYPE_CHECKING:
    from ..onnx.recognise import Port


class Case(NamedTuple):
    """One call that every party makes, and the recorded result of it if there is one."""

    name: str
    feeds: dict[str, Array]
    data: DataSet | None


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


@dataclass
class Budgets:
    """The budget of each output: one for all, and the ones that the user gave for some."""

    default: Budget
    rtol: dict[str, float] = field(default_factory=dict)
    atol: dict[str, float] = field(default_factory=dict)
    measured: dict[str, Budget] = field(default_factory=dict)  # from a noise floor

    def __call__(self, output: str) -> Budget:
        base = self.measured.get(output, self.default)
        if output not in self.rtol and output not in self.atol:
            return base
        return Budget(self.rtol.get(output, base.rtol), self.atol.get(output, base.atol), "given")


def cases_from_data(sets: Sequence[DataSet]) -> list[Case]:
    return [Case(s.name, s.inputs, s) for s in sets]


def case_from_ids(model: Model, name: str, ids: Array) -> Case:
    """A call on token ids (B, T), as the file declares its inputs: without a past, or with zeros if it needs one."""
    B, T = ids.shape
    config, lengths = model.config, model.recognised.lengths
    pasts = [port for port in model.recognised.inputs if port.role in ("past_key", "past_value", "past")]
    held = next((length for port in pasts if isinstance(length := port.shape[-2], int)), 0)
    P = 0 if lengths else held  # a buffer may be empty, a past of fixed length may not
    feeds: dict[str, Array] = {}
    for port in model.recognised.inputs:
        if port.role == "input_ids":
            leading = {1: (), 2: (B,), 3: (1, B)}[len(port.shape)]
            if len(port.shape) == 1 and B != 1:
                raise InputError(f"{model.path} takes one sequence at a time, not {B}")
            feeds[port.name] = ids.reshape(*leading, T).astype(port.dtype)
        elif port.role == "position_ids":
            rows = np.broadcast_to(np.arange(P, P + T), (B, T))
            feeds[port.name] = (rows if len(port.shape) == 2 else rows[0]).astype(port.dtype)
        elif port.role in ("attention_mask", "attention_bias"):
            feeds[port.name] = _mask(port, B, T, P + T)
        elif port.role == "token_type_ids":
            feeds[port.name] = np.zeros((B, T), port.dtype)
        elif port.role in ("past_key", "past_value", "past"):
            shape = (B, config.n_head, held, config.head_size)
            feeds[port.name] = np.zeros((2, *shape) if port.role == "past" else shape, port.dtype)
        elif port.role == "use_cache_branch":
            feeds[port.name] = np.zeros(1, bool)
        elif port.role in LENGTHS:
            one = B if port.role == "seqlens_k" else 1
            feeds[port.name] = np.full([one] * len(port.shape), -LENGTHS[port.role](T), port.dtype)
        elif port.role == "beam_width":
            feeds[port.name] = np.ones(1, port.dtype)
        elif port.role == "cache_indirection":
            feeds[port.name] = np.zeros((B, 1, held), port.dtype)
        else:
            raise InputError(f"do not know what to give the input {port.name!r} ({port.role}) of {model.path}")
    return Case(name, feeds, None)


def _mask(port: Port, B: int, T: int, S: int) -> Array:
    """Attention to all keys or, where the file takes a mask for each query, to those up to its own."""
    rank = len(port.shape)
    if rank == 2:
        seen: Array = np.ones((B, S), bool)
    else:
        sizes = (d if isinstance(d, int) else n for d, n in zip(port.shape[-2:], (T, S), strict=True))
        rows, columns = sizes
        seen = np.tri(T, S, S - T, dtype=bool) if rows > 1 else np.ones((1, S), bool)
        seen = np.broadcast_to(seen, (B, 1, *seen.shape))
        seen = np.pad(seen, [(0, 0), (0, 0), (0, rows - seen.shape[2]), (0, columns - S)])
        seen = seen[:, 0] if rank == 3 else seen
    if port.role == "attention_bias":
        return np.where(seen, 0, np.finfo(port.dtype).min).astype(port.dtype)
    return seen.astype(port.dtype)


def random_cases(model: Model, count: int, seed: int, longest: int = 48) -> list[Case]:
    """`count` prompts of random tokens, of random lengths and one or two sequences each."""
    rng = np.random.default_rng(seed)
    config = model.config
    declared = next(p.shape for p in model.recognised.inputs if p.role == "input_ids")
    fixed = [size if isinstance(size, int) else 0 for size in declared]
    buffers = [p.shape[-2] for p in model.recognised.inputs if p.role.startswith("past") and model.recognised.lengths]
    rows = [size for size in buffers if isinstance(size, int)]
    room = min([longest, config.n_ctx - config.position_offset, *rows])
    cases = []
    for i in range(count):
        B = math.prod(fixed[:-1]) if all(fixed[:-1]) else int(rng.integers(1, 3))
        T = fixed[-1] or int(rng.integers(1, room + 1))
        cases.append(case_from_ids(model, f"random_{i}", rng.integers(0, config.vocab_size, (B, T))))
    return cases


def pairs_of(runners: Sequence[Runner], recorded: bool) -> list[tuple[str, str]]:
    """(actual, expected) names: each party against the recorded data, and the first against each other one."""
    names = [r.name for r in runners]
    first, others = names[0], names[1:]
    against = [(name, Recorded.name) for name in [*others, first]] if recorded else []
    return against + [(first, other) for other in others]


def compare_case(
    case: Case,
    model: Model,
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


def run_case(case: Case, runners: Sequence[Runner]) -> dict[str, Mapping[str, Array] | Gpt2npError]:
    """Outputs of every party, or the error that kept it from giving any."""
    results: dict[str, Mapping[str, Array] | Gpt2npError] = {}
    for runner in runners:
        try:
            results[runner.name] = runner.run(case.feeds).outputs
        except Gpt2npError as error:
            results[runner.name] = error
    return results


def versions() -> dict[str, str]:
    """What a comparison ran on: approximations inside the runtimes change from release to release."""
    from importlib.metadata import version

    found = {name: version(name) for name in ("numpy", "onnx", "onnxruntime", "numba")}
    return {"python": platform.python_version(), **found, "machine": platform.machine(), "cpu": _cpu()}


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()
