"""Places: which operations an error may come from, and which rows a mask leaves undefined."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..config import GPT2Config
from ..weights import Array
from .operations import OPERATIONS, split_tap, tap_inputs, tap_names

if TYPE_CHECKING:
    from ..call import Call

HIDDEN = -1e3  # what a mask adds to a score that is to be hidden lies below this


# ---------------------------------------------------------------------------------------------- padding


def seen_keys(call: Call) -> Array | None:
    """(B, S) of bools: which positions the mask lets at least one query see; None where it hides none of them."""
    mask = call.attention_mask
    if mask is None:
        return None
    mask = np.asarray(mask)
    seen = mask > HIDDEN if mask.ndim == 4 and mask.dtype.kind == "f" else mask != 0
    if seen.ndim == 4:  # (B, 1, T, S) -> (B, S)
        seen = seen.any(axis=(1, 2))
    B, S = call.input_ids.shape[0], call.start + call.input_ids.shape[1]
    seen = np.broadcast_to(seen, (B, S))
    return None if seen.all() else seen


def seen_rows(call: Call) -> Array | None:
    """(B, T) of bools: which of the new positions are no padding; None where all are."""
    seen = seen_keys(call)
    if seen is None or seen[:, call.start :].all():
        return None
    return seen[:, call.start :]


def kept(tap: str, call: Call) -> Array | None:
    """Which elements of a tap are defined, as bools that broadcast to its shape; None: all of them.

    A row of padding sees no key, so every runtime makes something else of it; rows of real tokens never look at it.
    """
    rows, axes = seen_rows(call), OPERATIONS[split_tap(tap)[1]].shape
    if axes == "B H T S":
        keys = seen_keys(call)
        if keys is None:
            return None
        queries = keys[:, call.start :]
        return (queries[:, :, None] & keys[:, None, :])[:, None]
    if rows is None:
        return None
    return rows[:, None, :, None] if axes == "B H T D" else rows[:, :, None]


def kept_output(role: str, shape: tuple[int, ...], call: Call) -> Array | None:
    """The same for an output of the file, by its role."""
    B, T = call.input_ids.shape
    if role in ("logits", "last_hidden_state"):
        rows = seen_rows(call)
        fits = rows is not None and int(np.prod(shape[:-1])) == B * T
        return rows.reshape(*shape[:-1], 1) if rows is not None and fits else None
    if role in ("present", "present_key", "present_value"):  # (.., B, H, S, D)
        keys = seen_keys(call)
        fits = keys is not None and len(shape) >= 4 and (shape[-4], shape[-2]) == keys.shape
        return keys[:, None, :, None] if keys is not None and fits else None
    return None


# --------------------------------------------------------------------------------------------- intervals


def ancestors(taps: Iterable[str], config: GPT2Config) -> set[str]:
    """These taps and everything that they are computed from."""
    found: set[str] = set()
    pending = list(taps)
    while pending:
        tap = pending.pop()
        if tap not in found:
            found.add(tap)
            pending += tap_inputs(tap, config)
    return found


def interval(config: GPT2Config, good: Iterable[str], bad: Iterable[str]) -> list[str]:
    """The operations that one mistake may lie in, in order: what the first bad tap needs and no good one vouches for.

    Right keys vouch for the layer norm before them and for all that came before: a wrong input would show in them.
    """
    names = tap_names(config)
    first = min(bad, key=names.index)
    suspects = ancestors([first], config) - ancestors(good, config)
    return sorted(suspects, key=names.index)


def interval_words(suspects: Sequence[str], good: Iterable[str], config: GPT2Config) -> str:
    """ "between h.0.attn.q and h.1.ln_1: h.0's keys and values agree"."""
    names = tap_names(config)
    right = [tap for tap in sorted(set(good), key=names.index) if names.index(tap) < names.index(suspects[-1])]
    where = f"between {suspects[0]} and {suspects[-1]}" if len(suspects) > 1 else suspects[0]
    if not right:
        return f"{where}: nothing before it was given"
    layer, part = split_tap(right[-1])
    pair = {f"h.{layer}.attn.k", f"h.{layer}.attn.v"}
    if layer is not None and part in ("attn.k", "attn.v") and pair <= set(right):
        return f"{where}: h.{layer}'s keys and values agree"
    return f"{where}: {right[-1]} agrees"


def next_tap(suspects: Sequence[str], config: GPT2Config) -> str | None:
    """The array that, once given, halves the suspects; None where one of them alone is left."""
    inside = list(suspects[:-1])
    if not inside:
        return None
    known = set(suspects)

    def larger_half(tap: str) -> tuple[int, bool]:
        before = len(ancestors([tap], config) & known)
        return max(before, len(suspects) - before), not tap.endswith(("resid_mid", "resid_post"))

    return min(inside, key=larger_half)
