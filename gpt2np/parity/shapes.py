"""An array of another shape than expected: what fits, in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import permutations
from typing import NamedTuple

import numpy as np

from ..weights import Array
from .metrics import Budget, measure

SIMILAR = 0.9  # cosine from which two arrays are taken for the same thing with errors
MOST_AXES = 8  # of arrays whose axes are tried in every order: 40,320 orders


class Fit(NamedTuple):
    """How an array can be compared with one of another shape."""

    actual: Array
    cut: Callable[[Array], Array]  # what of the expected array (and of its mask) it is compared with
    text: str
    accepted: bool  # whether the shape is a matter of convention, no error
    part: str = ""  # what of the expected array is not compared then


def whole(array: Array) -> Array:
    return array


def fit(actual: Array, expected: Array, role: str, budget: Budget, keep: Array | None = None) -> Fit | None:
    """The reading of `actual` that agrees with `expected`, or else the likeliest one; None where nothing fits."""
    mask = None if keep is None else np.broadcast_to(keep, expected.shape)
    likely: Fit | None = None
    for found in _readings(actual, expected, role):
        m = measure(found.actual, found.cut(expected), budget, None if mask is None else found.cut(mask))
        if m.ok and m.elements:
            return found
        if likely is None and found.accepted:
            likely = found
        elif likely is None and m.cosine > SIMILAR:
            likely = found._replace(text=f"{found.text}; even so {m.failing:,} of {m.elements:,} numbers differ")
    return likely


def _readings(a: Array, e: Array, role: str) -> Iterator[Fit]:
    ones = [n for n in a.shape if n != 1], [n for n in e.shape if n != 1]
    if ones[0] == ones[1]:
        yield Fit(a.reshape(e.shape), whole, "the same but for axes of size 1", True)
    elif a.size == e.size and 1 < min(a.ndim, e.ndim) and a.shape[-2:] == e.shape[-2:]:
        yield Fit(a.reshape(e.shape), whole, "the same but for how the batch is divided into axes", True)
    if role in ("logits", "last_hidden_state") and e.ndim > 1 and e.shape[-2] > 1:
        yield from _one_position(a, e)
    if a.ndim == e.ndim <= MOST_AXES and sorted(a.shape) == sorted(e.shape):
        orders = [o for o in permutations(range(a.ndim)) if a.transpose(o).shape == e.shape]
        for order in sorted(orders, key=lambda o: sum(i != j for i, j in enumerate(o)))[:24]:
            yield Fit(a.transpose(order), whole, _exchange(order, role), False)
    if a.size == e.size:
        yield Fit(a.reshape(e.shape), whole, "the same numbers in the same order, in another shape", False)
    if a.ndim == e.ndim:
        differing = [i for i in range(a.ndim) if a.shape[i] != e.shape[i]]
        if len(differing) == 1 and min(a.shape[differing[0]], e.shape[differing[0]]) > 0:
            yield from _one_axis(a, e, differing[0], role)


def _one_position(a: Array, e: Array) -> Iterator[Fit]:
    """Logits of one position, as text generation wants them: of the last one, or by mistake of another."""
    T, rest = e.shape[-2], math.prod(e.shape[:-2])
    if a.shape[-1:] != e.shape[-1:] or a.size != rest * e.shape[-1]:
        return
    for t in (T - 1, *range(T - 1)):
        shape = (*e.shape[:-2], 1, e.shape[-1])
        which = "the last position alone" if t == T - 1 else f"position {t} alone, not the last one"
        part = f"{T - 1} of {T} positions: it holds the last one alone"
        yield Fit(a.reshape(shape), lambda x, t=t: x[..., t : t + 1, :], which, t == T - 1, part)  # type: ignore[misc]


def _exchange(order: tuple[int, ...], role: str) -> str:
    """In words, for a.transpose(order) = e."""
    moved = [i for i, j in enumerate(order) if i != j]
    n = len(order)
    if len(moved) == 2:
        axes = "the last two axes" if moved == [n - 2, n - 1] else f"axes {moved[0]} and {moved[1]}"
        words = f"equal after exchanging {axes}"
    else:
        words = f"equal after transposing by {tuple(order)}"
    if role.startswith("present") and n >= 4 and moved[0] >= n - 4:
        letters = dict(zip(order[-4:], "BHTD", strict=True))  # what each axis of the actual array holds
        held = ", ".join(letters[i] for i in range(n - 4, n))
        words += f": keys and values are ({held}), where (B, H, T, D) is expected"
    return words


def _one_axis(a: Array, e: Array, axis: int, role: str) -> Iterator[Fit]:
    """One axis is longer or shorter: the first part, or the last, may agree."""
    n, wanted = a.shape[axis], e.shape[axis]
    common = min(n, wanted)
    last = axis == a.ndim - 1
    kind, letter = ("columns", "V" if role == "logits" else "C") if last else ("positions", "T")
    if not last and axis != a.ndim - 2:
        kind, letter = f"entries along axis {axis}", "n"

    def cut(x: Array, part: slice) -> Array:
        return x[(*(slice(None),) * axis, part)]

    for which, mine, theirs in (
        ("first", slice(0, common), slice(0, common)),
        ("last", slice(n - common, n), slice(wanted - common, wanted)),
    ):
        text = f"{n} {kind} for {letter} = {wanted}: the {which} {common} agree"
        yield Fit(cut(a, mine), lambda x, part=theirs: cut(x, part), text, False)  # type: ignore[misc]
