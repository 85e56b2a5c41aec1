"""Where inside an array the error is, found by statistics and said in words."""

from __future__ import annotations

import numpy as np

from ...weights import Array

# What an index along each axis of a tap's shape is called; see `operations.OPERATIONS`.
AXES = {"B": "batch row", "T": "position", "H": "head", "S": "key", "D": "column", "C": "column", "HD": "column",
        "F": "column", "V": "token", "2": "half", "L": "layer"}  # fmt: skip


def parts(error: Array, floor: float) -> list[Array]:
    """For each axis the indices where the error is; all of them where it is everywhere.

    error: observed - expected; floor: what float32 noise alone makes, absolute. An index counts if the largest error
    along it exceeds the floor and is not a thousandth of what the worst index has.
    """
    size = np.abs(np.nan_to_num(error, nan=np.inf, posinf=np.inf, neginf=np.inf))
    found = []
    for axis in range(error.ndim):
        worst = size.max(axis=tuple(i for i in range(error.ndim) if i != axis))
        finite = worst[np.isfinite(worst)]
        top = np.inf if len(finite) < len(worst) else float(finite.max(initial=0.0))
        bar = max(floor, 1e-3 * top if np.isfinite(top) else floor)
        found.append(np.flatnonzero(worst > bar))
    return found


def inside(error: Array, floor: float) -> Array | None:
    """The part of the array that the error keeps to, as a mask; None where that is all of it, or none."""
    found = parts(error, floor)
    if any(len(f) == 0 for f in found) or all(len(f) == n for f, n in zip(found, error.shape, strict=True)):
        return None
    mask = np.zeros(error.shape, bool)
    mask[np.ix_(*found)] = True
    return mask


def describe(error: Array, floor: float, axes: str, past: int = 0) -> str:
    """One phrase, such as "only head 2, from position 3 on" or "one number of 480"; "" where it is everywhere.

    axes: the letters of the shape, as in `Operation.shape` ("B H T D"); past: cached positions before the new ones.
    """
    found = parts(error, floor)
    letters = axes.split()
    if any(len(f) == 0 for f in found):
        return ""
    if all(len(f) == 1 for f in found) and error.size > 1:
        at = ", ".join(str(int(f[0])) for f in found)
        return f"one number of {error.size}: [{at}]"
    phrases = []
    for letter, indices, n in zip(letters, found, error.shape, strict=True):
        if len(indices) < n and not _scattered(indices):
            phrases.append(_said(AXES[letter], indices, n, past if letter == "S" else 0))
    return "only " + ", ".join(phrases) if phrases else ""


def _scattered(indices: Array) -> bool:
    """Whether they are many and in no order: that says nothing."""
    return len(indices) > 8 and len(np.unique(np.diff(indices))) > 1


def _said(name: str, indices: Array, n: int, past: int) -> str:
    first, last = int(indices[0]), int(indices[-1])
    if len(indices) == 1:
        return f"{name} {first}"
    if past and last == past - 1 and len(indices) == past:
        return "the keys of the past"
    if past and first == past and len(indices) == n - past:
        return "the keys after the past"
    if len(indices) == last - first + 1:
        if last == n - 1:
            return f"{name}s from {first} on"
        return f"{name}s up to {last}" if first == 0 else f"{name}s {first} to {last}"
    step = np.diff(indices)
    if len(indices) > 2 and (step == step[0]).all():
        return f"every {_ordinal(int(step[0]))} {name} from {first} on"
    shown = ", ".join(str(int(i)) for i in indices[:4])
    return f"{name}s {shown}" + (f" and {len(indices) - 4} more" if len(indices) > 4 else "")


def _ordinal(n: int) -> str:
    return f"{n}{'th' if 10 <= n % 100 <= 20 else {1: 'st', 2: 'nd', 3: 'rd'}.get(n % 10, 'th')}"
