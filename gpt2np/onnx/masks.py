"""Reading a mask from what it does to scores, however a graph spells it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

Array = np.ndarray
Effect = tuple[float, float]  # (factor, addend): a hidden score s becomes factor * s + addend


@dataclass(frozen=True)
class Mask:
    """What a graph does to scores before the softmax; see GPT2Config for the fields."""

    kind: Literal["replaced", "added", "none"]
    value: float
    shift: int
    padding: Effect = (0.0, -math.inf)
    padding_later: Effect = (0.0, -math.inf)
    blind_rows: Literal["zeros", "nan", "masked", "unmasked"] = "zeros"

    def __str__(self) -> str:
        how = {"replaced": "becomes", "added": "is lowered by", "none": "is left as it is:"}[self.kind]
        return f"a later score {how} {self.value:g}, query i sees keys up to i{self.shift:+d}"


def read_mask(
    run: Callable[[Array | None], tuple[Array, Array]], B: int, T: int, S: int, padded: bool, guarded: bool
) -> tuple[float, Mask]:
    """Read the factor and the mask from what happens to scores.

    `run(attention_mask)` gives (factor, added), (B, H, T, S) each: a score s becomes factor * s + added.
    """
    full = np.ones((B, S))
    factor, added = run(full if padded else None)
    seen = (added == 0) & (factor != 0)
    if not seen.any():
        raise ValueError("no query sees any key")
    scale = float(np.median(factor[seen]))
    if not np.allclose(factor[seen], scale, rtol=1e-6):
        raise ValueError("scores are not multiplied by one number")
    query, key = np.arange(S - T, S)[:, None], np.arange(S)
    shift = next((s for s in (0, *range(-S, S + 1)) if (seen == (key <= query + s)).all()), None)
    if shift is None:
        raise ValueError(f"query {S - T} sees keys {np.flatnonzero(seen[0, 0, 0]).tolist()}, not all up to its own")
    later = key > query + shift
    blind = later.all(axis=-1)
    unguarded: Literal["nan", "masked"] = "masked"
    if seen.all():
        mask = Mask("none", 0.0, S)
        later = np.zeros_like(later)
    else:
        f, value = one_effect(factor, added, later & ~blind[:, None], scale, "keys after a query's own")
        kind: Literal["replaced", "added"] = "added" if f else "replaced"
        mask = Mask(kind, value, shift)
        unguarded = "nan" if value == -math.inf else "masked"
    if not padded:
        return scale, replace(mask, blind_rows="zeros" if guarded and unguarded == "nan" else unguarded)

    # padding: on the left (with queries that see nothing), on the right, and a hole
    results = []
    for hidden in (slice(0, S - T + 2), slice(S - 1, S), slice(1, 2)):
        attention_mask = full.copy()
        attention_mask[0, hidden] = 0
        results.append((attention_mask == 0, *run(attention_mask)))
    if all(((f == factor) & (a == added)).all() for _, f, a in results):
        return scale, replace(mask, padding=(1.0, 0.0), padding_later=(float(mask.kind == "added"), mask.value))
    effects: dict[str, set[Effect]] = {"padding": set(), "padding_later": set()}
    blind_rows: Literal["zeros", "nan", "masked", "unmasked"] = "masked"
    for hidden_keys, factors, addends in results:
        gone = np.broadcast_to(hidden_keys[:, None, None], factors.shape)
        blind_row = (gone | later).all(axis=-1, keepdims=True)
        if (blind_row & (addends == 0) & (factors != 0)).sum() == (blind_row & np.ones_like(gone)).sum() > 0:
            blind_rows = "unmasked"
        count = blind_row if blind_rows == "unmasked" else np.zeros_like(blind_row)
        for name, where in (("padding", gone & ~later), ("padding_later", gone & later)):
            if (where & ~count).any():
                effects[name].add(one_effect(factors, addends, where & ~count, scale, "padded keys"))
        if (addends[~gone & ~later] != 0).any():
            raise ValueError("attention_mask hides keys where it is 1")
    if any(len(e) > 1 for e in effects.values()):
        raise ValueError("padded keys are treated in several ways")
    (padding,) = effects["padding"]
    padding_later = next(iter(effects["padding_later"]), (0.0, -math.inf))
    if blind_rows == "masked" and padding[1] == -math.inf:
        blind_rows = "zeros" if guarded else "nan"
    return scale, replace(mask, padding=padding, padding_later=padding_later, blind_rows=blind_rows)


def one_effect(factor: Array, added: Array, where: Array, scale: float, what: str) -> Effect:
    """The one thing that happens to all these scores."""
    where = np.broadcast_to(where, factor.shape)
    f, a = np.round(factor[where] / scale, 6), added[where]
    if len(np.unique(f)) != 1 or len(np.unique(a)) != 1 or f[0] not in (0, 1):
        raise ValueError(f"{what} are treated in several ways")
    return float(f[0]), float(a[0])
