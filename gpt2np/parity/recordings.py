"""Where our run and ONNX Runtime's agree and the recorded outputs do not: what may be wrong with the record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..weights import Array
from .cases import Case
from .compare import Comparison
from .explain.diagnose import Diagnosis, misplaced
from .explain.problem import Guess
from .metrics import difference, measure

if TYPE_CHECKING:
    from ..call import Call
    from .subject import Subject

Outputs = Mapping[str, Array]
RECORD = "recorded"


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
    for cause, tap, text in (
        *_few_numbers(failing, right, record),
        *_other_case(case, failing, outputs, record),
        *_batch(model, failing, right, record, call),
        *_token(model, call, record),
    ):
        guess = Guess(cause, tap, text, removed=1.0, explains=True, stated=True)
        return Diagnosis(tap, RECORD, f"the recorded data of {case.name} is suspect: {text}", [], [guess], case.name)
    found = misplaced(failing.values(), right, record, RECORD, call)
    if found is not None:
        found.case = case.name
    return found


def _few_numbers(failing: Mapping[str, Comparison], right: Outputs, record: Outputs) -> Iterator[tuple[str, str, str]]:
    """One or two edited numbers, which no computation would change alone."""
    if sum(c.metrics.failing for c in failing.values() if c.metrics) > 2:
        return
    for name, c in failing.items():
        m = c.metrics
        if m is not None and m.elements > 8:
            at = list(m.at)
            value, own = record[name][m.at], right[name][m.at]
            what = "one number" if m.failing == 1 else "two numbers"
            text = f"{what} of {m.elements:,} in {name}: {at} holds {value:.7g}, where both programs give {own:.7g}"
            yield "record_edited", name, text


def _other_case(
    case: Case, failing: Mapping[str, Comparison], outputs: Mapping[str, Outputs], record: Outputs
) -> Iterator[tuple[str, str, str]]:
    """Outputs of the inputs of another data set."""
    for other, made in outputs.items():
        if other != case.name and all(
            n in made and made[n].shape == record[n].shape and measure(record[n], made[n], c.budget).ok
            for n, c in failing.items()
        ):
            name = next(iter(failing))
            yield "record_other_inputs", name, f"its outputs are those of the inputs of {other}"


def _batch(
    model: Subject, failing: Mapping[str, Comparison], right: Outputs, record: Outputs, call: Call
) -> Iterator[tuple[str, str, str]]:
    """The sequences of the batch in another order than the inputs."""
    B = len(call.input_ids)
    roles = {p.name: p.role for p in model.recognised.outputs}
    orders = [(list(range(B))[::-1], "reversed")] if B > 1 else []
    orders += [([(i - k) % B for i in range(B)], f"rolled by {k}") for k in range(1, B)]
    for order, words in orders:
        if all(measure(record[n], _by_sequence(right[n], roles[n], order), c.budget).ok for n, c in failing.items()):
            yield "record_batch", next(iter(failing)), f"the sequences of its outputs are {words}"
            return


def _by_sequence(value: Array, role: str, order: Sequence[int]) -> Array:
    """An output with its sequences in another order; the zoo's has its batch on axis 1."""
    axis = {"present": 1, "present_key": 0, "present_value": 0}.get(role, max(value.ndim - 3, 0))
    if value.shape[axis] != len(order):
        axis = 0
    return value.take(order, axis) if value.shape[axis] == len(order) else value


def _token(model: Subject, call: Call, record: Outputs) -> Iterator[tuple[str, str, str]]:
    """Another token at one place: layer 0's keys and values, which depend on it alone, say which one."""
    taps = model.outputs_as_taps(record, call)
    names = [n for n in ("h.0.attn.k", "h.0.attn.v") if n in taps]
    if not names:
        return
    exact = dict(model.program.walk(call, np.float64, until="h.0.attn.v"))
    apart = sum(difference(taps[n], exact[n]).max(axis=(1, 3)) for n in names)  # (B, T)
    scale = max(float(np.abs(exact[n]).max()) for n in names)
    wrong = np.argwhere(apart > 1e-3 * scale)
    if len(wrong) != 1:
        return
    b, t = (int(i) for i in wrong[0])
    V, position = model.config.vocab_size, call.position_ids[b, t]
    every = call._replace(
        input_ids=np.arange(V)[:, None], position_ids=np.full((V, 1), position), past=None, attention_mask=None,
        token_type_ids=None, start=0,
    )  # fmt: skip
    made = dict(model.program.walk(every, np.float32, until="h.0.attn.v"))
    distance = sum(np.abs(made[n][:, :, 0] - taps[n][b, :, t]).max(axis=(1, 2)) for n in names)
    best = int(np.argmin(distance))
    place, now = f"input_ids[{b},{t}]", int(call.input_ids[b, t])
    if distance[best] < 1e-3 * scale and best != now:
        yield "record_token", "embed", f"it was recorded with token {best} at {place}, where the input holds {now}"
