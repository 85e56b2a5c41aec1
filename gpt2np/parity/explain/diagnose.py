"""From outputs that differ to the operation that differs and the likely mistake.

Two questions, asked in this order:

1. Does a party's operation do something else than the program says? Its taps tell: the first local error
   beyond its budget names the operation, and the mistakes are tried on that operation alone.
2. If all parties agree with each other but not with the recorded data, then the file is not the one that made
   the data. Recorded outputs hold keys and values of every layer: the first of them that differs brackets the
   culprit, and mistakes are undone one by one, to see which makes the recorded data come out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...call import Call
from ...weights import Array
from ..compare import Comparison
from ..localise import F32, F64, LOCAL_FACTOR, TapRow
from ..metrics import difference, measure
from ..operations import split_tap, tap_inputs, tap_names
from ..program import Program
from .problem import Guess, Problem
from .rank import rank
from .solve import tap_of_element


@dataclass
class Diagnosis:
    """Where it starts and why, as far as can be told."""

    tap: str  # the first operation that differs, or the best guess at it
    who: str  # the party whose operation differs, or "the file"
    text: str
    suspects: list[str] = field(default_factory=list)  # operations that it may be
    guesses: list[Guess] = field(default_factory=list)
    case: str = ""  # the input that it was found on

    def as_dict(self) -> dict[str, Any]:
        return {
            "tap": self.tap, "who": self.who, "text": self.text, "suspects": self.suspects, "case": self.case,
            "guesses": [g.as_dict() for g in self.guesses],
        }  # fmt: skip


def from_taps(program: Program, call: Call, row: TapRow, party: str, given: Mapping[str, Array]) -> Diagnosis:
    """The cause at an operation whose local error is out of budget, from the party's own taps around it."""
    layer, part = split_tap(row.tap)
    group = [f"h.{layer}.attn.{x}" for x in "qkv"] if part in ("attn.q", "attn.k", "attn.v") else [row.tap]
    observed = {tap: given[tap] for tap in group if tap in given}
    inputs = {tap: value for tap, value in given.items() if tap not in observed}
    suspects = group + [t for t in missing_inputs(row.tap, program, inputs) if t not in group]
    names = tap_names(program.config)
    suspects.sort(key=names.index)
    problem = Problem(program, call, inputs, observed, suspects)
    guesses = rank(problem, forward=True)
    best = guesses[0] if guesses and guesses[0].removed > 0.9 else None
    tap = row.tap if best is None else best.named or best.tap
    return Diagnosis(tap, party, f"{party} computes {tap} differently", suspects, guesses)


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
                guesses.append(Guess("output_order", c.output, text, removed=1.0, explains=True))
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


def unplaced(message: str) -> Diagnosis:
    """A file in which no GPT-2 can be made out: the node that the error names is the first suspect."""
    place = re.search(r"h\.(\d+)[./](ln_1|ln_2|attn|mlp)", message)
    tap = f"h.{place[1]}.{place[2]}" if place else "ln_f" if "ln_f" in message else "unknown"
    return Diagnosis(tap, "the file", f"gpt2np cannot place it: {message}")


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
        guesses.append(Guess("nan_in_weight", tap, text, removed=1.0 if tap == first else 0.5, evidence="in the file"))
    if not guesses:
        guesses = [Guess("overflow", first, "finite weights and inputs, but not a finite result", removed=1.0)]
    guesses.sort(key=lambda g: -g.removed)
    return Diagnosis(first, "the file", f"{first} is the first tap that is not finite", [first], guesses)


def from_recorded(
    program: Program, call: Call, recorded: Mapping[str, Array], spare: Mapping[str, Array] | None = None
) -> Diagnosis | None:
    """Which operation of the file is not the one that made the recorded taps. `spare`: its unused weights."""
    names = tap_names(program.config)
    ordered = [tap for tap in names if tap in recorded]
    if not ordered:
        return None
    # 1. The first recorded tap that float32 noise does not explain.
    low = dict(_kept(program, call, F32, ordered))
    values = dict(_kept(program, call, F64, ordered + _boundaries(program)))
    errors: dict[str, float] = {}
    for tap in ordered:
        floor = _rms(difference(low[tap], values[tap]))
        scale = _rms(values[tap])
        errors[tap] = _rms(difference(recorded[tap], values[tap])) / max(floor, scale * 1e-7, 1e-300)
    wrong = [tap for tap in ordered if errors[tap] > LOCAL_FACTOR]
    if not wrong:
        return None
    first = wrong[0]
    layer, _ = split_tap(first)
    # 2. The operations that it may be: everything after the last layer whose keys and values are right.
    suspects, start = bracket(program, ordered, wrong, first)
    # 3. What to explain: this tap and what follows it, two layers deep.
    last = program.config.n_layer - 1 if layer is None else min(layer + 2, program.config.n_layer - 1)
    observed = {
        tap: recorded[tap]
        for tap in ordered
        if names.index(tap) >= names.index(suspects[0]) and (split_tap(tap)[0] or 0) <= last
        and not (split_tap(tap)[0] is None and last < program.config.n_layer - 1)
    }  # fmt: skip
    given = {start: values[start]} if start else {}
    problem = Problem(program, call, given, observed, suspects)
    guesses = rank(problem, forward=False, spare=spare)
    if guesses and guesses[0].removed >= 0.3:
        tap = guesses[0].tap
        text = f"the file's {tap} is not what made the recorded data"
    else:
        tap = suspects[0] if len(suspects) == 1 else first
        text = f"the file differs from what made the recorded data between {suspects[0]} and {suspects[-1]}"
    return Diagnosis(tap, "the file", text, suspects, guesses)


def _kept(program: Program, call: Call, dtype: Any, taps: Sequence[str]) -> list[tuple[str, Array]]:
    last = max(taps, key=tap_names(program.config).index)
    return [(tap, value) for tap, value in program.walk(call, dtype, until=last) if tap in set(taps)]


def _boundaries(program: Program) -> list[str]:
    return ["embed", *(f"h.{i}.resid_post" for i in range(program.config.n_layer))]


def bracket(program: Program, ordered: Sequence[str], wrong: Sequence[str], first: str) -> tuple[list[str], str | None]:
    """Suspected operations, and the tap before them that is known to be right (None: the token ids).

    Right keys and values of layer i vouch for its ln_1 and everything before. A layer with a wrong k and a
    right v (or the other way round) has a wrong c_attn: a wrong input would have changed both.
    """
    names = tap_names(program.config)
    layer, _ = split_tap(first)
    pair = {f"h.{layer}.attn.k", f"h.{layer}.attn.v"}
    if layer is not None and pair <= set(ordered) and len(pair & set(wrong)) == 1:
        # q is suspected with them: the three come from one matrix, and q comes first
        suspects = [f"h.{layer}.attn.q", *sorted(pair & set(wrong))]
        return suspects, f"h.{layer - 1}.resid_post" if layer else "embed"
    before = [tap for tap in ordered if names.index(tap) < names.index(first)]
    good = max((split_tap(tap)[0] for tap in before if split_tap(tap)[0] is not None), default=None)  # type: ignore[type-var]
    end = names.index(first)
    if layer is not None:
        end = names.index(f"h.{layer}.attn.v")
    if good is None:
        return names[: end + 1], None
    inside = names[names.index(f"h.{good}.attn.q") : end + 1]
    vouched = {f"h.{good}.attn.k", f"h.{good}.attn.v"}
    return [t for t in inside if t not in vouched], f"h.{good - 1}.resid_post" if good else "embed"


def _rms(x: Array) -> float:
    with np.errstate(over="ignore"):
        return math.sqrt(float(np.mean(np.square(np.asarray(x, np.float64))))) if x.size else 0.0
