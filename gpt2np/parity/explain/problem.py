"""What is to be explained, and one possible explanation of it.

A `Problem` holds a program, values that are trusted (`given`) and values that came out elsewhere (`observed`): of a
port, of another runtime, or recorded. A `Guess` changes the program, so that it computes what was observed; how much
of the error the change removes says how well it explains it. It reads the same in both directions: "what was observed
behaves as if X; the model has Y", whichever of the two is the one at fault.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...call import Call
from ...weights import Array
from ..metrics import difference
from ..operations import Run, split_tap, tap_inputs, tap_names, tap_weights
from ..places import kept
from ..program import Changes, Program
from .gradients import F32, F64, Gradients
from .rounding import BITS, kind_of, rounded

NOISE_FACTOR = 10.0  # a guess explains an error if it leaves no more than so many times float32's own error
CERTAIN = 0.96  # rank of what the file itself shows (two layers with one weight) though it cannot be undone
CLOSE = 0.9  # a guess that leaves more than noise is most likely from here on, if it has no rival
LARGE = 1 << 20  # weights
RIVAL = 3.0  # what leaves at most so many times as much as the best guess is its rival

Progress = Callable[[float, str], None]  # share of the time that is used up, what is being tried


class TimeUp(Exception):
    """A search has used up its time: it ends with what it knows."""


class Clock:
    """Processor time that a search may take."""

    def __init__(self, seconds: float = 60.0, progress: Progress | None = None) -> None:
        self.start: float | None = None  # it runs from its first use on
        self.seconds, self.progress = seconds, progress
        self.limit = math.inf  # the share of the time after which `check` ends what is being done

    @property
    def used(self) -> float:
        if self.start is None:
            self.start = time.process_time()
        return time.process_time() - self.start

    def spend(self, seconds: float) -> None:
        """Leave less time, but at least half of it, before it begins to run."""
        self.seconds = max(self.seconds - seconds, self.seconds / 2)

    def out(self, doing: str = "", share: float = 1.0) -> bool:
        """Whether that share of the time is used up; tells how far it is."""
        if self.progress is not None and doing:
            self.progress(min(1.0, self.used / max(self.seconds, 1e-9)), doing)
        return self.used > share * self.seconds

    def check(self) -> None:
        """End what is being done when its time is over; operations ask this, each of which is short."""
        if self.used > self.limit * self.seconds:
            raise TimeUp


@contextmanager
def one_thread() -> Iterator[None]:
    """NumPy's products on one thread: those of a search are small, and threads that wait use up its time.

    Where threadpoolctl is not installed, NumPy keeps its threads.
    """
    try:
        from threadpoolctl import threadpool_limits
    except ModuleNotFoundError:
        yield
        return
    with threadpool_limits(1, user_api="blas"):
        yield


@dataclass
class Guess:
    """One possible mistake, as a change to a program."""

    cause: str  # a stable identifier, for tools
    tap: str  # the first tap that it changes
    text: str  # a clause: what was observed behaves as if "the bias were missing"
    now: str = ""  # what the model has, where that is not said already
    weights: Changes = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)
    call: Call | None = None  # another call: another past, mask or positions
    fitted: int = 0  # numbers that were fitted to the error; what is exact goes before what is fitted
    removed: float = -math.inf  # share of the error that it removes: 1 explains all of it
    explains: bool = False  # what remains is float32 noise
    likely: bool = False  # it may be called the cause: see `name_likely`
    evidence: str = ""  # what the file or the arrays themselves show for it
    element: tuple[str, tuple[int, ...], float] = ("", (), 0.0)  # a wrong element: weight, index, correction
    stated: bool = False  # the text is a sentence of its own, no clause after "as if"
    more: Callable[[], Iterable[Guess]] | None = None  # the same mistake with one step more of its kind
    named: str = ""  # the tap to name, where it is an input of `tap` that arrives changed

    @property
    def merit(self) -> tuple[bool, bool, float]:
        """What guesses are ranked by: those that leave noise alone, first the ones that fit nothing to it."""
        return self.explains, not (self.explains and self.fitted), self.removed

    @property
    def variant(self) -> str:
        """Its text without the layer: the same mistake made in another layer has the same."""
        return re.sub(r"\bh\.\d+\.", "h.*.", self.text)

    @property
    def share(self) -> str:
        """How well it explains, in words."""
        if self.evidence and not self.explains:
            return "shown"
        return "explains all of it" if self.explains else f"explains part ({self.removed:.0%})"

    def sentence(self, who: str, model: str = "the model") -> str:
        """ "WHO behaves as if ...; the model has ...": in the same words whichever of the two is at fault."""
        if self.stated:
            return self.text
        who, model = ("what was recorded", "the file") if who == "the file" else (who, model)
        return f"{who} behaves as if {self.text}" + (f"; {model} has {self.now}" if self.now else "")

    def applied(self, program: Program) -> Program:
        return program.with_(self.weights, self.runs)

    def as_dict(self, who: str) -> dict[str, Any]:
        """Plain data; `who` is the party that the sentence is about."""
        names = ("cause", "tap", "text", "now", "removed", "explains", "likely", "evidence")
        return {**{name: getattr(self, name) for name in names}, "sentence": self.sentence(who)}


class Problem:
    """Operations whose inputs are known and some of whose results are."""

    def __init__(
        self,
        program: Program,
        call: Call,
        given: Mapping[str, Array],
        observed: Mapping[str, Array],
        suspects: Sequence[str],
        clock: Clock | None = None,
    ) -> None:
        self.program, self.call, self.clock = program, call, clock or Clock()
        self.given = {tap: value.astype(np.float64) for tap, value in given.items()}
        self.stored = {tap: kind_of(value) for tap, value in observed.items()}  # the 16-bit type that holds it, or ""
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
        self.kept = {tap: kept(tap, call) for tap in observed}  # rows behind the mask are nobody's business
        self.values = self.run(program)
        self.before = self.error(self.values)
        low = self.run(program, dtype=F32)
        squares = 0.0
        with np.errstate(all="ignore"):
            for tap in self.observed:
                error = np.abs(low[tap] - self.values[tap])
                if self.stored[tap]:  # an error may carry a number over to the next that the type holds
                    step = 2.0 ** (1 - BITS[self.stored[tap]]) * np.abs(self.values[tap])
                    error = np.sqrt(np.minimum(error, step) * step)
                squares += float(np.square(self.defined(tap, error) * self.weights[tap]).sum())
        self.noise = math.sqrt(squares)
        self.is_whole = True  # or the nearest wrong outputs alone, for which no layer is like the others
        self.only: dict[str, Array] = {}  # where alone guesses are made, as masks; see `confined`

    @property
    def local(self) -> bool:
        """Whether what is observed is the suspected operation itself, its inputs given."""
        return set(self.suspects) == set(self.observed)

    @property
    def is_large(self) -> bool:
        """Whether the weights between what is given and what is observed are too many to be copied at will."""
        c = self.program.config
        layers = len({split_tap(tap)[0] for tap in self.taps})
        return layers * (4 * c.n_embd**2 + 2 * c.n_embd * c.n_inner) > LARGE

    @property
    def is_wide(self) -> bool:
        """Whether the mistake may lie in many layers of a large model."""
        return self.is_large and len(self.suspects) > 20

    def run(
        self, program: Program, first: str | None = None, dtype: Any = F64, call: Call | None = None,
        least: float = math.inf,
    ) -> dict[str, Array]:  # fmt: skip
        """All values of another program; operations before `first` keep the base program's.

        It ends where the observed taps so far are farther than `least` from what was observed: no later one can
        make up for that, and the taps that are missing then say so.
        """
        start = self.taps.index(first) if first in self.taps else 0
        known = {**{t: self.values[t] for t in self.taps[:start]}, **self.given} if start else dict(self.given)
        squares = 0.0
        for tap in self.taps[start:]:
            self.clock.check()
            inputs = [self.given.get(i, known.get(i)) for i in tap_inputs(tap, program.config)]
            known[tap] = program.run(tap, call or self.call, inputs, dtype)  # type: ignore[arg-type]
            if tap in self.observed and least < math.inf:
                squares += self.error(known, [tap]) ** 2
                if not squares <= least**2:
                    break
        return known

    def gradients(self, program: Program | None = None, values: dict[str, Array] | None = None) -> Gradients:
        """Reverse mode through this problem's operations; of the program under test, or of a changed one."""
        return Gradients(program or self.program, self.call, values or self.values, self.taps, self.clock.check)

    def input(self, tap: str, which: int = 0) -> Array | None:
        """An input of an operation, as the program under test gives it to it."""
        name = tap_inputs(tap, self.program.config)[which]
        return self.given.get(name, self.values.get(name))

    def weighted(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Arrays of the observed taps, scaled so that the sum of all squares is the relative squared error."""
        return {tap: value * self.weights[tap] for tap, value in arrays.items()}

    def residuals(self, values: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """observed - computed, weighted."""
        values = self.values if values is None else values
        return self.weighted({
            tap: self.defined(tap, target - self.as_stored(tap, values[tap])) for tap, target in self.observed.items()
        })  # fmt: skip

    def as_stored(self, tap: str, value: Array) -> Array:
        """A computed value in the type that the observed one was stored in: its rounding is no error."""
        return rounded(value, self.stored[tap]) if self.stored[tap] else value

    def defined(self, tap: str, error: Array) -> Array:
        """An error with 0 where the contract defines nothing."""
        mask = self.kept[tap]
        return error if mask is None else np.where(mask, error, 0)

    def error(self, values: Mapping[str, Array], taps: Iterable[str] | None = None) -> float:
        """Relative rms error over all observed taps, or these; infinite where one is missing or not finite."""
        total = 0.0
        for tap in self.observed if taps is None else taps:
            target = self.observed[tap]
            if tap not in values or values[tap].shape != target.shape:
                return math.inf
            with np.errstate(over="ignore", invalid="ignore"):
                error = self.defined(tap, difference(self.as_stored(tap, values[tap]), target))
                total += float(np.square(error * self.weights[tap]).sum())
        return math.sqrt(total)

    def judge(self, guess: Guess) -> Guess:
        """Fill in how much of the error the guess removes.

        What remains is held against what was observed, too: numbers that are near nothing explain nothing, however
        much smaller than the error the observed values are.
        """
        whole = min(self.before, 1.0)
        least = math.inf if self.only else whole  # what leaves more explains nothing, and is not run to its end
        values = self.run(guess.applied(self.program), guess.tap, call=guess.call, least=least)
        for tap, mask in self.only.items():
            values[tap] = np.where(mask, values[tap], self.values[tap])
        after = self.error(values)
        guess.removed = 1 - after / whole if whole > 0 and math.isfinite(after) else -math.inf
        guess.explains = after <= NOISE_FACTOR * self.noise and after < 0.5 * whole
        return guess


def name_likely(ranked: Sequence[Guess]) -> None:
    """Say of the best guess whether it may be called the cause.

    It may if what it leaves is noise, or if it removes nine tenths, fits nothing to the error, and no other cause
    comes near it.
    """
    if not ranked:
        return
    best, others = ranked[0], [g for g in ranked[1:] if g.cause != ranked[0].cause]
    rivals = [g for g in others if g.explains or 1 - g.removed <= RIVAL * max(1 - best.removed, 1e-6)]
    best.likely = best.likely or best.explains or (best.removed >= CLOSE and not best.fitted and not rivals)


def remade(problem: Problem, change: Callable[[Array], Array], *names: str) -> dict[str, Callable[[], Array]]:
    """Weights as a mistake makes them of the program's own, when they are read: a guess at all layers holds none."""
    return {name: lambda name=name: change(problem.program.weights(name, F64)) for name in names}  # type: ignore[misc]


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


def afterwards(problem: Problem, tap: str, change: Callable[[Array], Array]) -> dict[str, Run]:
    """The operation as it is, its result changed."""
    return {tap: lambda p, call, name, x, dtype: change(problem.program.run(name, call, x, dtype))}


def fit(problem: Problem, make: Callable[[float], Guess], start: float, rounds: int = 12) -> Guess:
    """The guess of a family with one positive number that removes most of the error: Gauss-Newton on its logarithm."""

    def residual(log: float) -> Array:
        guess = make(math.exp(log))
        values = problem.run(guess.applied(problem.program), guess.tap)
        with np.errstate(all="ignore"):
            return np.concatenate([r.ravel() for r in problem.residuals(values).values()])

    log = best = math.log(start)
    least = math.inf
    for _ in range(rounds):
        e = residual(log)
        size = float(np.square(e).sum())
        if not math.isfinite(size):
            break
        if size < least:
            least, best = size, log
        slope = (residual(log + 1e-4) - e) / 1e-4
        bottom = float(np.square(slope).sum())
        if not bottom > 0 or not math.isfinite(bottom) or problem.clock.out():
            break
        step = -float((slope * e).sum()) / bottom
        log += min(max(step, -2.0), 2.0)
        if abs(step) < 1e-9:
            break
    guess = make(math.exp(best))
    guess.fitted = 1
    return problem.judge(guess)
