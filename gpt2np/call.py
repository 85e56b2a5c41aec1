"""What one call of a GPT-2 is given, checked once, for the model, the session and the debugger alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .arrays import Array
from .config import GPT2Config
from .errors import ContextOverflowError, InputError, TokenRangeError

Past = Sequence[tuple[Array, Array] | Array]  # L x (keys, values), (B, H, P, D) each; or (2, B, H, P, D) for both


class Call(NamedTuple):
    """T new positions of B sequences, after `start` earlier ones. `checked_call` makes it."""

    input_ids: Array  # (B, T) int64
    position_ids: Array  # (B, T) int64, rows of wpe
    past: Past | None = None  # keys and values of the earlier positions, unless a KVCache holds them
    attention_mask: Array | None = None  # (B, S), or (B or 1, 1, T or 1, S), numbers: see GPT2.__call__
    token_type_ids: Array | None = None  # (B, T) int64, rows of wte that are added
    start: int = 0  # P, the number of earlier positions


def checked_call(
    config: GPT2Config,
    input_ids: Any,
    *,
    start: int = 0,
    past: Past | None = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    token_type_ids: Any = None,
) -> Call:
    """A Call from what a caller gave; the parameters are those of `GPT2.__call__`.

    Parameters
    ----------
    start : int
        How many earlier positions there are, in `past` or in a cache.

    Raises
    ------
    InputError, TokenRangeError, ContextOverflowError
        An input has the wrong type or shape, an id or a position is out of range, or the new positions do not fit
        into the context.
    """
    ids = check_ids(input_ids, config)
    B, T = ids.shape
    if start + T > config.n_ctx:
        raise ContextOverflowError(
            f"{T} new positions after {start} cached ones exceed the model's n_ctx of {config.n_ctx}"
        )
    positions = check_positions(position_ids, config, B, T, start)
    mask = None if attention_mask is None else check_attention_mask(attention_mask, B, T, start + T)
    types = None if token_type_ids is None else check_ids(token_type_ids, config, "token_type_ids")
    if types is not None and types.shape != (B, T):
        raise InputError(f"token_type_ids must have the shape of input_ids, ({B}, {T}), got {types.shape}")
    return Call(ids, positions, past if start else None, mask, types, start)


def check_ids(input_ids: Any, config: GPT2Config, name: str = "input_ids") -> Array:
    """Token ids of any accepted rank as a checked int64 array (B, T)."""
    ids = check_tokens(input_ids, config, name, {1: "(T,)", 2: "(B, T)", 3: "(d1, d2, T)"})
    if ids.shape[-1] > config.n_ctx:
        raise ContextOverflowError(f"{ids.shape[-1]} positions exceed the model's n_ctx of {config.n_ctx}")
    return ids.reshape(-1, ids.shape[-1])


def check_tokens(tokens: Any, config: GPT2Config, name: str, ranks: Mapping[int, str]) -> Array:
    """Token ids of one of these ranks, each with its shape in words, as a checked int64 array, C-contiguous."""
    if isinstance(tokens, str):
        raise InputError(f"{name} must be integers, got text; model.encode(text) gives its token ids")
    ids = as_rectangle(name, tokens)
    if ids.ndim not in ranks:
        raise InputError(f"{name} must have shape {' or '.join(ranks.values())}, got {ids.shape}")
    if ids.size == 0:
        raise InputError(f"{name} must hold at least one token, got shape {ids.shape}")
    if ids.dtype.kind not in "iu":
        raise InputError(f"{name} must be integers, got dtype {ids.dtype}")
    values = ids.ravel().tolist() if ids.size < 16 else (ids.min(), ids.max())  # of a few, lists are faster
    if min(values) < 0 or max(values) >= config.vocab_size:
        where = np.argwhere((ids < 0) | (ids >= config.vocab_size))[0]
        raise TokenRangeError(
            f"token id {int(ids[tuple(where)])} at {tuple(map(int, where))} of {name} is outside "
            f"0..{config.vocab_size - 1}"
        )
    return np.asarray(ids, np.int64, order="C")


def check_scores(scores: Any, targets: Any, config: GPT2Config, dtype: Any) -> tuple[Array, Array]:
    """Scores (..., V) of this dtype, and token ids (..., n) as checked int64, both as arrays."""
    scores = np.asarray(scores)
    *outer, V = scores.shape or (0,)
    if V != config.vocab_size or scores.dtype != dtype:
        raise InputError(f"scores must be {dtype} (..., {config.vocab_size}), got {scores.dtype} {scores.shape}")
    shape = f"({', '.join([*map(str, outer), 'n'])})"
    ids = check_tokens(targets, config, "targets", {scores.ndim: shape})
    if ids.shape[:-1] != scores.shape[:-1]:
        raise InputError(f"targets must have shape {shape}, got {ids.shape}")
    return scores, ids


def as_rectangle(name: str, given: Any) -> Array:
    """An array of what a caller gave; InputError for rows of different lengths."""
    try:
        return np.asarray(given)
    except ValueError:
        raise InputError(
            f"{name} must be rows of one length, got rows of different lengths; run them one by one, or fill them up "
            "and say in attention_mask which positions are padding"
        ) from None


def check_positions(position_ids: Any, config: GPT2Config, B: int, T: int, start: int) -> Array:
    """Rows of wpe for each new position, int64 (B, T); by default those after `start`."""
    if position_ids is None:
        low = start + config.position_offset
        high = low + T - 1
        rows = np.arange(low, high + 1)[None].repeat(B, axis=0)
    else:
        rows = as_rectangle("position_ids", position_ids)
        if rows.dtype.kind not in "iu" or rows.size not in (T, B * T) or rows.shape[-1:] != (T,):
            raise InputError(f"position_ids must be integers ({B}, {T}), got {rows.dtype} {rows.shape}")
        low, high = (int(end) + config.position_offset for end in (rows.min(), rows.max()))
        rows = np.broadcast_to(rows.reshape(-1, T), (B, T)).astype(np.int64) + config.position_offset
    if low < 0 or high >= config.n_ctx:
        raise ContextOverflowError(f"positions {low}..{high} outside 0..{config.n_ctx - 1}")
    return rows


def check_attention_mask(attention_mask: Any, B: int, T: int, S: int) -> Array:
    """The mask as an array of numbers, (B, S) or (B or 1, 1, T or 1, S): 0 and 1, or floats of four axes."""
    given = as_rectangle("attention_mask", attention_mask)
    shapes = [(B, S)] + [(b, 1, t, S) for b in (1, B) for t in (1, T)]
    if given.dtype.kind not in "iufb" or given.shape not in shapes:
        raise InputError(
            f"attention_mask must be numbers ({B}, {S}) or ({B}, 1, {T}, {S}), got {given.dtype} {given.shape}"
        )
    added = given.ndim == 4 and given.dtype.kind == "f"
    if not added and (other := given[(given != 0) & (given != 1)]).size:
        raise InputError(f"attention_mask must be 1 for keys that may be attended to and 0 for padding, got {other[0]}")
    return given
