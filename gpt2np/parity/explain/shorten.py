"""The same difference on fewer tokens and fewer columns of logits, where the whole would take too long to search."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...call import Call
from ...weights import Array
from ..operations import OPERATIONS, split_tap, tap_names
from ..program import Program
from .gradients import F64

ENOUGH = 8  # positions to keep of one sequence
COLUMNS = 2048  # of logits
LARGE = 1 << 26  # multiplications of a forward pass from which on a search works on less


def shortened(program: Program, call: Call, held: Mapping[str, Array]) -> tuple[Program, Call, dict[str, Array]]:
    """Program, call and arrays as they are, or for large models the first positions of one sequence.

    Later positions never reach earlier ones in a causal model, so that the first ones are a whole problem. Which
    sequence, and how many positions, is told by where the arrays differ most from the float32 run.
    """
    c = program.config
    arrays = dict(held)
    B, T = call.input_ids.shape
    size = c.n_layer * (4 * c.n_embd**2 + 2 * c.n_embd * c.n_inner) * B * T
    if size > LARGE and call.past is None and c.mask.is_causal and call.attention_mask is None:
        row, length = _where(program, call, arrays)
        if length < T or B > 1:
            types = None if call.token_type_ids is None else call.token_type_ids[row : row + 1, :length]
            call = call._replace(
                input_ids=call.input_ids[row : row + 1, :length],
                position_ids=call.position_ids[row : row + 1, :length], token_type_ids=types,
            )  # fmt: skip
            arrays = {tap: _cut(value, tap, row, length) for tap, value in arrays.items()}
    if "logits" in arrays and c.vocab_size * c.n_embd * call.input_ids.size > LARGE:
        columns = np.sort(np.random.default_rng(0).permutation(c.vocab_size)[:COLUMNS])
        weights = {"lm_head.weight": program.weights(program.head, F64)[columns]}
        if "lm_head.bias" in program.weights:
            weights["lm_head.bias"] = program.weights("lm_head.bias", F64)[columns]
        program = program.with_(weights, tied=False)
        arrays["logits"] = arrays["logits"][..., columns]
    return program, call, arrays


def _cut(value: Array, tap: str, row: int, length: int) -> Array:
    value = value[row : row + 1]
    if value.ndim == 4:  # (B, H, T, D) or (B, H, T, S)
        return (
            value[:, :, :length, :length] if OPERATIONS[split_tap(tap)[1]].shape == "B H T S" else value[:, :, :length]
        )
    return value[:, :length]


def _where(program: Program, call: Call, arrays: Mapping[str, Array]) -> tuple[int, int]:
    """The sequence with the largest error, and a length that holds its first clear error and as much again."""
    last = max(arrays, key=tap_names(program.config).index)
    value = next(v for tap, v in program.walk(call, np.float32, until=last) if tap == last)
    error = np.abs(np.nan_to_num(np.asarray(arrays[last], np.float64) - value, nan=1e30))
    by_position = np.moveaxis(error, -2, 1).reshape(*error.shape[:1], error.shape[-2], -1).max(axis=-1)  # (B, T)
    row = int(by_position.max(axis=1).argmax())
    first = int((by_position[row] > 0.1 * by_position[row].max()).argmax())
    return row, max(ENOUGH, min(2 * (first + 1), by_position.shape[1]))
