"""Where our run and ONNX Runtime's agree and the recorded outputs do not: what may be wrong with the record."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from ..weights import Array
from .cases import Case
from .compare import Comparison
from .explain.diagnose import Diagnosis, misplaced
from .explain.embedding_mistakes import other_tokens, tokens_in_words
from .explain.problem import Guess
from .explain.rounding import BITS, kind_of
from .metrics import measure
from .places import ancestors
from .subject import taps_of

if TYPE_CHECKING:
    from ..call import Call
    from .subject import Subject

Outputs = Mapping[str, Array]
RECORD = "recorded"
FEW = 4  # numbers that somebody may have edited


def suspect_record(
    model: Subject, case: Case, failing: Mapping[str, Comparison], outputs: Mapping[str, Outputs]
) -> Diagnosis | None:
    """What makes the recorded outputs of one case come out of right ones; None where nothing does.

    Parameters
    ----------
    failing : the comparisons of ours with the record that fail, by output
    outputs : what ours gave, by case and output
    """
    if case.data is None or not failing:
        return None
    call, right, record = model.call(case.feeds), outputs[case.name], case.data.outputs
    if any(n not in right or n not in record or right[n].shape != record[n].shape for n in failing):
        return None
    found = misplaced(failing.values(), right, record, RECORD, call)
    for cause, tap, text in (
        *_few_numbers(failing, right, record),
        *_other_case(case, failing, outputs, record),
        *_order(model, failing, right, record),
        *_token(model, call, record),
        *_narrow(failing, right, record),
        *(_inconsistent(model, failing, record) if found is None else ()),
    ):
        guess = Guess(cause, tap, text, removed=1.0, explains=True, stated=True)
        return Diagnosis(tap, RECORD, f"the recorded data of {case.name} is suspect: {text}", [], [guess], case.name)
    if found is not None:
        found.case = case.name
    return found


def _names(failing: Iterable[str], record: Outputs) -> str:
    """ "its outputs", or the names of those that fail."""
    failing = list(failing)
    return "its outputs" if len(failing) == len(record) else " and ".join(failing)


def _few_numbers(failing: Mapping[str, Comparison], right: Outputs, record: Outputs) -> Iterator[tuple[str, str, str]]:
    """A few edited numbers, which no computation would change alone."""
    count = sum(c.metrics.failing for c in failing.values() if c.metrics)
    if count > FEW or any(c.metrics is None or c.metrics.elements <= 8 for c in failing.values()):
        return
    name, c = next(iter(failing.items()))
    assert c.metrics is not None
    m = c.metrics
    value, own = record[name][m.at], right[name][m.at]
    what = "one number" if count == 1 else f"{count} numbers"
    text = f"{what} of {m.elements:,} in {' and '.join(failing)}: {name}{list(m.at)} holds {value:.7g}, "
    yield "record_edited", name, f"{text}where both programs give {own:.7g}"


def _other_case(
    case: Case, failing: Mapping[str, Comparison], outputs: Mapping[str, Outputs], record: Outputs
) -> Iterator[tuple[str, str, str]]:
    """Outputs of the inputs of another data set."""
    for other, made in outputs.items():
        if other != case.name and all(
            n in made and made[n].shape == record[n].shape and measure(record[n], made[n], c.budget).ok
            for n, c in failing.items()
        ):
            who = _names(failing, record)
            text = f"{who} are those" if who == "its outputs" or len(failing) > 1 else f"{who} is that"
            yield "record_other_inputs", next(iter(failing)), f"{text} of the inputs of {other}"


def _order(
    model: Subject, failing: Mapping[str, Comparison], right: Outputs, record: Outputs
) -> Iterator[tuple[str, str, str]]:
    """The sequences of the batch, or the positions, in another order than the inputs, or some of them repeated."""
    roles = {p.name: p.role for p in model.recognised.outputs}
    for what in ("sequences", "positions"):
        axes = {n: right[n].ndim - 2 if what == "positions" else _batch_axis(right[n], roles[n]) for n in failing}
        if min(right[n].ndim for n in failing) < 2 or len({right[n].shape[a] for n, a in axes.items()}) > 1:
            continue
        size = next(right[n].shape[a] for n, a in axes.items())
        order = [next((i for i in range(size) if _alike(failing, right, record, axes, i, j)), -1) for j in range(size)]
        if -1 in order or order == list(range(size)):
            continue
        rolls = [k for k in range(1, size) if order == [(i - k) % size for i in range(size)]]
        words = f"in the order {', '.join(map(str, order[:12]))}{' ...' if size > 12 else ''}"
        words = "reversed" if order == list(range(size))[::-1] else f"rolled by {rolls[0]}" if rolls else words
        cause = "record_batch" if what == "sequences" else "record_positions"
        yield cause, next(iter(failing)), f"the {what} of {_names(failing, record)} are {words}"


def _alike(
    failing: Mapping[str, Comparison], right: Outputs, record: Outputs, axes: Mapping[str, int], i: int, j: int
) -> bool:
    """Whether entry j of what is recorded is entry i of what is right, in every output that fails."""
    return all(measure(record[n].take(j, axes[n]), right[n].take(i, axes[n]), c.budget).ok for n, c in failing.items())


def _batch_axis(value: Array, role: str) -> int:
    """The axis of the sequences; the zoo's hidden states (1, B, T, C) have theirs on axis 1."""
    axis = {"present": 1, "present_key": 0, "present_value": 0}.get(role, max(value.ndim - 3, 0))
    return axis if value.ndim > axis else 0


def _token(model: Subject, call: Call, record: Outputs) -> Iterator[tuple[str, str, str]]:
    """Other tokens than the stored ones: layer 0's keys and values, which depend on each alone, say which."""
    ids = other_tokens(model.program, call, model.outputs_as_taps(record, call))
    if ids is not None:
        yield "record_token", "embed", f"it was recorded with {tokens_in_words(ids, call.input_ids)}"


def _narrow(failing: Mapping[str, Comparison], right: Outputs, record: Outputs) -> Iterator[tuple[str, str, str]]:
    """Right numbers in a 16-bit type."""
    kinds = {kind_of(record[n]) for n in failing}
    kind = kinds.pop()
    if kinds or not kind:
        return
    step = 2.0 ** (1 - BITS[kind])
    if all((np.abs(record[n] - right[n]) <= step * np.abs(right[n]) + 1e-6).all() for n in failing):
        yield "rounding", next(iter(failing)), f"{_names(failing, record)} are rounded to {kind}"


def _inconsistent(model: Subject, failing: Mapping[str, Comparison], record: Outputs) -> Iterator[tuple[str, str, str]]:
    """Wrong keys or values, of which later outputs that agree are computed: no one pass gives that."""
    ports = {p.name: taps_of(p) for p in model.recognised.outputs if p.name in record}
    good = [tap for name, taps in ports.items() if name not in failing for tap in taps]
    needed = ancestors(good, model.config) - set(good)
    if all(set(ports.get(name, ())) & needed for name in failing):
        after = [n for n, taps in ports.items() if n not in failing and ancestors(taps, model.config) & needed]
        text = f"{' and '.join(failing)} alone: {after[-1]}, which is computed from it, agrees, so no one run gave both"
        yield "record_inconsistent", next(iter(failing)), text
