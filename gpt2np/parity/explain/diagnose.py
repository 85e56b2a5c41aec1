"""From a difference that was located to its cause.

Two kinds of evidence are told apart:

1. A party gave what the first differing operation reads: the mistakes are tried on that operation alone, fed with
   the party's own inputs.
2. It gave outputs alone, or only some taps (recorded data, a port that returns its outputs): each tap that agrees
   vouches for all that it was computed from. What is left is an interval, and the mistakes are tried through it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...call import Call
from ...weights import Array
from ..compare import Comparison
from ..localise import F32, F64, LOCAL_FACTOR, TapRow
from ..metrics import difference, measure
from ..operations import OPERATIONS, split_tap, tap_inputs, tap_names
from ..places import ancestors, interval, kept
from ..program import Program
from .cache_mistakes import written_elsewhere
from .problem import Clock, Guess, Problem, together
from .rank import rank
from .rounding import bits_of, kind_of
from .shorten import shortened
from .solve import tap_of_element
from .where import describe
from .widen import explain


@dataclass
class Diagnosis:
    """Where it starts and why, as far as can be told."""

    tap: str  # the first operation that differs, or the best guess at it
    who: str  # the party whose operation differs, or "the file"
    text: str
    suspects: list[str] = field(default_factory=list)  # operations that it may be
    guesses: list[Guess] = field(default_factory=list)
    case: str = ""  # the input that it was found on
    where: str = ""  # "h.0.attn.out is wrong in position 5 alone"; "" where it is wrong everywhere

    def as_dict(self) -> dict[str, Any]:
        return {
            "tap": self.tap, "who": self.who, "text": self.text, "suspects": self.suspects, "case": self.case,
            "where": self.where, "guesses": [g.as_dict(self.who) for g in self.guesses],
        }  # fmt: skip


def from_taps(
    program: Program, call: Call, row: TapRow, party: str, given: Mapping[str, Array],
    clock: Clock | None = None,
) -> Diagnosis:  # fmt: skip
    """The cause at the first operation that differs; `given`: every tap that the party gave."""
    layer, part = split_tap(row.tap)
    group = [f"h.{layer}.attn.{x}" for x in "qkv"] if part in ("attn.q", "attn.k", "attn.v") else [row.tap]
    if not set(tap_inputs(row.tap, program.config)) <= set(given):
        found = from_outputs(program, call, given, party, clock=clock)
        if found is not None:
            return found
    observed = {tap: given[tap] for tap in group if tap in given}
    inputs = {tap: value for tap, value in given.items() if tap not in observed}
    suspects = group + [t for t in missing_inputs(row.tap, program, inputs) if t not in group]
    suspects.sort(key=tap_names(program.config).index)
    problem = Problem(program, call, inputs, observed, suspects, clock)
    guesses = rank(problem)
    best = guesses[0] if guesses and (guesses[0].likely or guesses[0].removed > 0.9) else None
    named = "" if best is None or problem.stored.get(row.tap) else best.named  # all was narrow then, not what it read
    tap = row.tap if best is None else named or best.tap
    where = place_in(problem, row.tap)
    return Diagnosis(tap, party, f"{party} computes {tap} differently", suspects, guesses, where=where)


def place_in(problem: Problem, tap: str) -> str:
    """Where inside an observed array the error is, in words."""
    value, expected = problem.observed[tap], problem.values[tap]
    floor = 1e-5 * max(_rms(expected), 1e-30)
    axes = OPERATIONS[split_tap(tap)[1]].shape
    words = describe(problem.defined(tap, value - expected), floor, axes, problem.call.start)
    if words.startswith("only "):
        words = f"{words.removeprefix('only ')} alone"
    return f"{tap} is wrong in {words}" if words else ""


def misplaced(
    failing: Iterable[Comparison], right: Mapping[str, Array], given: Mapping[str, Array], party: str, call: Call
) -> Diagnosis | None:
    """Outputs that hold right numbers in the wrong place; None unless that explains every failing one."""
    guesses = []
    for c in failing:
        if c.metrics is None:
            return None
        for text, value in placements(c.output, right, call):
            if value.shape == given[c.output].shape and measure(given[c.output], value, c.budget).ok:
                text = f"{c.output} holds {text}"
                guesses.append(
                    Guess("output_order", c.output, text, removed=1.0, explains=True, likely=True, stated=True)
                )
                break
        else:
            return None
    if not guesses:
        return None
    return Diagnosis(guesses[0].tap, party, f"{party} computes it rightly and puts it in the wrong place", [], guesses)


def placements(name: str, right: Mapping[str, Array], call: Call) -> Iterator[tuple[str, Array]]:
    """What an output may hold by mistake, in words and numbers."""
    value = right[name]
    for other in right:
        if other != name:
            yield f"what belongs into {other}", right[other]
    if value.ndim == 5:  # (2, B, H, S, D)
        yield "values in place of keys and keys in place of values", value[::-1]
    if value.ndim >= 4 and call.start:
        old, new = value[..., : call.start, :], value[..., call.start :, :]
        for text, both in (
            ("the past alone: the new positions were never written", (old, 0 * new)),
            ("the new positions alone: the past is zeros", (0 * old, new)),
            ("the cached positions in reverse order", (old[..., ::-1, :], new)),
            ("the past of the batch's sequences in reverse order", (np.flip(old, -4), new)),
            ("the new positions in reverse order", (old, new[..., ::-1, :])),
            ("the last new position over again", (old, np.broadcast_to(new[..., -1:, :], new.shape))),
        ):
            yield text, np.concatenate(both, axis=-2)
    if value.ndim >= 4:
        for text, moved in (
            ("its positions in reverse order", np.flip(value, -2)),
            ("the new positions before the cached ones", np.roll(value, call.input_ids.shape[1], -2)),
            ("(B, S, H, D) read as (B, H, S, D)", value.swapaxes(-2, -3).reshape(value.shape)),
        ):
            yield text, moved
            if value.ndim == 5:
                yield f"{text}, of the keys", np.stack([moved[0], value[1]])
                yield f"{text}, of the values", np.stack([value[0], moved[1]])
    yield "zeros: it was never written", np.zeros_like(value)


def missing_inputs(tap: str, program: Program, given: Mapping[str, Array]) -> list[str]:
    """Operations between what is given and a tap, which may as well be the culprit."""
    found: list[str] = []
    pending = list(tap_inputs(tap, program.config))
    while pending:
        name = pending.pop()
        if name not in given and name not in found:
            found.append(name)
            pending += tap_inputs(name, program.config)
    return found


def nonfinite_weights(program: Program, suspects: Sequence[str]) -> list[tuple[str, tuple[int, ...], float]]:
    """Weights with a NaN or an infinity: name, first place, value there."""
    found = []
    for name in program.weights.sources:
        value = program.weights(name, F32)
        bad = ~np.isfinite(value)
        if bad.any():
            where = tuple(int(i) for i in np.unravel_index(int(bad.argmax()), value.shape))
            found.append((name, where, float(value[where])))
    return found


def nonfinite(program: Program, call: Call, names: Sequence[str]) -> Diagnosis | None:
    """Where the first NaN or infinity comes from: a weight, or an overflow."""
    first = None
    for tap, value in program.walk(call, F32, until=names[-1]):
        if not np.isfinite(value).all():
            first = tap
            break
    if first is None:
        return None
    guesses = []
    for name, where, number in nonfinite_weights(program, names):
        tap = tap_of_element(program, call, name, where)
        text = f"{name}{list(where)} is {number}"
        removed = 1.0 if tap == first else 0.5
        guesses.append(Guess("nan_in_weight", tap, text, removed=removed, evidence="in the file", stated=True))
    if not guesses:
        text = "finite weights and inputs, but not a finite result"
        guesses = [Guess("overflow", first, text, removed=1.0, stated=True)]
    guesses.sort(key=lambda g: -g.removed)
    guesses[0].likely = guesses[0].removed == 1.0
    return Diagnosis(first, "the file", f"{first} is the first tap that is not finite", [first], guesses)


def from_outputs(
    program: Program, call: Call, held: Mapping[str, Array], who: str, spare: Mapping[str, Array] | None = None,
    clock: Clock | None = None,
) -> Diagnosis | None:  # fmt: skip
    """The cause where only outputs, or some taps, are known; None where float32 noise explains them all.

    who: whose arrays they are; "the file" where they are recorded data, which the file does not reproduce.
    spare: initializers of the file that nothing uses.
    """
    clock = clock or Clock()
    clock.out()
    names = tap_names(program.config)
    ordered = [tap for tap in names if tap in held]
    if not ordered:
        return None
    program, call, held = shortened(program, call, held)
    low = {t: v for t, v in program.walk(call, F32, until=ordered[-1]) if t in held}
    right = dict(program.walk(call, F64, until=ordered[-1]))
    errors: dict[str, float] = {}
    for tap in ordered:
        scale = _rms(right[tap])
        floor = _rms(difference(low[tap], right[tap])) + (scale * 2.0 ** -bits_of(held[tap]) / 3)
        error, mask = difference(held[tap], right[tap]), kept(tap, call)
        error = error if mask is None else np.where(mask, error, 0)
        errors[tap] = _rms(error) / max(floor, scale * 1e-7, 1e-300)
    wrong = [tap for tap in ordered if not errors[tap] <= LOCAL_FACTOR]
    if not wrong:
        return None
    if call.start:
        written = written_elsewhere(program, call, held)
        if written is not None:
            return Diagnosis(written.tap, who, f"{who} puts new keys and values in the wrong place", [], [written])
    narrow = [tap for tap in ordered if kind_of(held[tap])]  # of a computation in which others are not, they may be it
    agree = [tap for tap in ordered if tap not in wrong and (tap not in narrow or len(narrow) == len(ordered))]
    suspects, vouched = suspected(program, wrong[0], agree)
    given = {tap: right[tap] for tap in vouched}
    after = names.index(suspects[0])
    observed = {tap: held[tap] for tap in ordered if names.index(tap) >= after and tap not in vouched}
    problem = Problem(program, call, given, observed, suspects, clock)
    tap = wrong[0]
    nearest = {t: observed[t] for t in together(problem, tap) if t in observed}
    guesses = explain(problem, nearest, spare, recorded=who == "the file")
    if guesses and (guesses[0].likely or guesses[0].removed >= 0.3):
        tap = guesses[0].tap
    elif len(suspects) == 1:
        tap = suspects[0]
    text = f"{who} differs from {'what made the recorded data' if who == 'the file' else 'the model'}"
    text += f" between {suspects[0]} and {suspects[-1]}" if len(suspects) > 1 else f" at {suspects[0]}"
    where = place_in(problem, wrong[0])
    return Diagnosis(tap, who, text, suspects, guesses, where=where)


def suspected(program: Program, first: str, agree: Iterable[str]) -> tuple[list[str], set[str]]:
    """The operations that a first wrong tap may come from, in order, and the taps that are vouched for.

    Queries, keys and values come from one matrix: where one is suspected, so are the others that are not vouched for.
    Nothing vouches for the wrong tap itself: where all that is computed from it agrees, another array was used.
    """
    config = program.config
    names = tap_names(config)
    layer, part = split_tap(first)
    good = [t for t in agree if names.index(t) < names.index(first) or split_tap(t)[0] == layer]
    vouched = ancestors(good, config) - {first}
    suspects = {first, *interval(config, good, [first])}
    if part in ("attn.q", "attn.k", "attn.v"):
        suspects |= {f"h.{layer}.attn.{x}" for x in "qkv"} - vouched
    return sorted(suspects, key=names.index), vouched


def _rms(x: Array) -> float:
    with np.errstate(over="ignore"):
        return math.sqrt(float(np.mean(np.square(np.asarray(x, np.float64))))) if x.size else 0.0
