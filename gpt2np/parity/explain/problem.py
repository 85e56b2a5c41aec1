"""What is to be explained, and one possible explanation of it.

A `Problem` holds values that are trusted (`given`), values that should come out (`observed`), and the
operations between them. A `Guess` changes the program at one of these operations; how much of the error it
removes says how well it explains it. The same machinery serves both questions:

- the program under test is wrong and good outputs were recorded: which change makes it right?
- the program is right and another party's operation differs: which mistake reproduces what that party did?
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...call import Call
from ...weights import Array
from ..metrics import difference
from ..operations import Run, split_tap, tap_inputs, tap_names, tap_weights
from ..program import Program
from .gradients import F32, F64

NOISE_FACTOR = 10.0  # a guess explains an error if it leaves no more than so many times float32's own error


CERTAIN = 0.96  # rank of what the file itself shows (two layers with one weight) though it cannot be undone


@dataclass
class Guess:
    """One possible mistake, as a change to a program."""

    cause: str  # a stable identifier, for tools
    tap: str  # the first tap that it changes
    text: str  # for people
    weights: dict[str, Array] = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    removed: float = -math.inf  # share of the error that it removes: 1 explains all of it
    explains: bool = False  # what remains is float32 noise
    evidence: str = ""  # what the file itself shows for it
    element: tuple[str, tuple[int, ...], float] = ("", (), 0.0)  # a wrong element: weight, index, correction
    named: str = ""  # the tap to name, where it is an input of `tap` that arrives changed

    @property
    def merit(self) -> tuple[bool, float]:
        """What guesses are ranked by."""
        return self.explains, self.removed

    @property
    def likely(self) -> bool:
        """Whether to name it as the cause: it explains at least half of the error, or the file shows it."""
        return self.explains or self.removed >= 0.5 or bool(self.evidence)

    def applied(self, program: Program) -> Program:
        return program.with_(self.weights, self.runs, **self.config)

    def as_dict(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in ("cause", "tap", "text", "removed", "explains", "evidence")}


class Problem:
    """Operations whose inputs are known and some of whose results are."""

    def __init__(
        self,
        program: Program,
        call: Call,
        given: Mapping[str, Array],
        observed: Mapping[str, Array],
        suspects: Sequence[str],
    ) -> None:
        self.program, self.call = program, call
        self.given = {tap: value.astype(np.float64) for tap, value in given.items()}
        self.observed = {tap: value.astype(np.float64) for tap, value in observed.items()}
        self.suspects = list(suspects)
        names = tap_names(program.config)
        last = max(names.index(tap) for tap in observed)
        needed: set[str] = set()
        pending = list(observed)
        while pending:
            tap = pending.pop()
            if tap not in needed:
                needed.add(tap)
                pending += [i for i in tap_inputs(tap, program.config) if i not in self.given]
        self.taps = [tap for tap in names[: last + 1] if tap in needed]
        finite = {tap: np.nan_to_num(value, posinf=0, neginf=0) for tap, value in self.observed.items()}
        self.weights = {
            tap: 1 / (math.sqrt(float(np.square(value).sum()) * len(observed)) or 1.0) for tap, value in finite.items()
        }
        self.values = self.run(program)
        self.before = self.error(self.values)
        low = self.run(program, dtype=F32)
        noise = self.weighted({tap: low[tap] - self.values[tap] for tap in observed})
        with np.errstate(over="ignore"):
            self.noise = math.sqrt(sum(float(np.square(v).sum()) for v in noise.values()))

    def run(self, program: Program, first: str | None = None, dtype: Any = F64) -> dict[str, Array]:
        """All values of another program; operations before `first` keep the base program's."""
        start = self.taps.index(first) if first in self.taps else 0
        known = {**{t: self.values[t] for t in self.taps[:start]}, **self.given} if start else dict(self.given)
        for tap in self.taps[start:]:
            inputs = [self.given.get(i, known.get(i)) for i in tap_inputs(tap, program.config)]
            known[tap] = program.run(tap, self.call, inputs, dtype)  # type: ignore[arg-type]
        return known

    def weighted(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Arrays of the observed taps, scaled so that the sum of all squares is the relative squared error."""
        return {tap: value * self.weights[tap] for tap, value in arrays.items()}

    def residuals(self, values: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """observed - computed, weighted."""
        values = self.values if values is None else values
        return self.weighted({tap: target - values[tap] for tap, target in self.observed.items()})

    def error(self, values: Mapping[str, Array]) -> float:
        """Relative rms error over all observed taps; infinite where one is not finite."""
        total = 0.0
        for tap, target in self.observed.items():
            with np.errstate(over="ignore"):
                total += float(np.square(difference(values[tap], target) * self.weights[tap]).sum())
        return math.sqrt(total)

    def judge(self, guess: Guess) -> Guess:
        """Fill in how much of the error the guess removes."""
        after = self.error(self.run(guess.applied(self.program), guess.tap))
        guess.removed = 1 - after / self.before if self.before > 0 and math.isfinite(after) else -math.inf
        guess.explains = after <= NOISE_FACTOR * self.noise
        return guess


def together(problem: Problem, tap: str) -> list[str]:
    """The taps that one matrix makes: q, k and v, or the tap alone."""
    if split_tap(tap)[1] not in ("attn.q", "attn.k", "attn.v"):
        return [tap]
    return [f"{tap[:-1]}{x}" for x in "qkv" if f"{tap[:-1]}{x}" in problem.taps]


def weight_names(problem: Problem) -> Iterator[tuple[str, str]]:
    """Every weight of the suspected operations with its tap, once each."""
    seen = set()
    for tap in problem.suspects:
        for name in tap_weights(tap, problem.program):
            if name not in seen:
                seen.add(name)
                yield name, tap


def norm_names(p: Program) -> list[str]:
    """Every layer norm of the model."""
    return [f"h.{i}.{n}" for i in range(p.config.n_layer) for n in ("ln_1", "ln_2")] + ["ln_f"]


def other_weights(problem: Problem, tap: str, name: str, others: list[str], forward: bool) -> Iterator[Guess]:
    """Missing bias, another layer's weights, rounding: what can happen to the weight and bias of any map."""
    w = problem.program.weights
    for other in others:
        both = {f"{name}.{kind}": w(f"{other}.{kind}", F64) for kind in ("weight", "bias")}
        yield Guess("other_layer", tap, f"weight and bias of {other} in place of {name}'s", weights=both)
        for kind in ("weight", "bias"):
            one = {f"{name}.{kind}": both[f"{name}.{kind}"]}
            yield Guess("other_layer", tap, f"{other}.{kind} in place of {name}.{kind}", weights=one)
    bias = w(f"{name}.bias", F64)
    if bias.any():
        yield Guess("missing_bias", tap, f"{name}.bias is missing", weights={f"{name}.bias": np.zeros_like(bias)})
        yield Guess("bias_twice", tap, f"{name}.bias is added twice", weights={f"{name}.bias": 2 * bias})


def swap_text(other: object, now: object, forward: bool) -> str:
    wrong, right = (other, now) if forward else (now, other)
    return f"{wrong} instead of {right}"
