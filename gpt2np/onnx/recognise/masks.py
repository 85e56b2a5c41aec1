"""Reading a mask from what it does to scores, however a graph spells it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal

import numpy as np

from ...arrays import Array
from ...masks import Effect, MaskRule

MaskRun = Callable[[Array | None], tuple[Array, Array]]


def mask_shapes(
    declared: tuple[int | str | None, ...], B: int, T: int, S: int
) -> Iterator[tuple[tuple[int, ...], bool]]:
    """Shapes that an attention_mask of B sequences may have, and whether the graph cuts queries and keys out of it."""
    names: dict[int, tuple[str | int, ...]] = {2: ("B", S), 3: ("B", T, S), 4: ("B", 1, T, S)}
    if len(declared) not in names:
        raise ValueError(f"attention_mask has {len(declared)} axes, not (B, S), (B, T, S) or (B, 1, T, S)")

    def fixed(*sizes: int | str) -> tuple[int, ...]:
        sizes = tuple(B if s == "B" else s for s in sizes)
        return tuple(d if isinstance(d, int) and d > 0 else int(s) for d, s in zip(declared, sizes, strict=True))

    rows = ([1, *declared])[-2]
    usual = fixed(*names[len(declared)])
    if len(declared) == 2 or rows == 1 or usual[-2:] == (T, S):
        yield usual, False
    if len(declared) > 2 and rows != 1:
        yield fixed(*usual[:-2], S, S), True


def per_query(mask: Array, T: int, S: int, cut: bool) -> Array:
    """Any attention_mask as (B, 1 or H, T or 1, S)."""
    if mask.ndim == 2:
        return mask[:, None, None, :]
    mask = mask[:, None] if mask.ndim == 3 else mask
    return mask[:, :, S - T : S, :S] if cut else mask


def read_mask(
    run: MaskRun, T: int, S: int, shape: tuple[int, ...] | None, cut: bool, floating: bool, guarded: bool
) -> tuple[float, MaskRule]:
    """Read the factor and the mask from what happens to scores.

    `run(attention_mask)` gives (factor, added), (B, H, T, S) each: a score s becomes factor * s + added.
    `shape` is that of attention_mask, None if there is none; `cut`: see `mask_shapes`.
    """
    adds = shape is not None and floating and _is_added(run, shape)
    full = None if shape is None else np.full(shape, 0.0 if adds else 1.0)
    usual = run(full)
    scale = _scale(*usual)
    mask, later = _read_later(*usual, scale, T, S, shape)
    if full is None:
        return scale, replace(mask, blind_rows="zeros" if guarded and mask.blind_rows == "nan" else mask.blind_rows)
    if adds:
        _check_added(run, full, T, S, cut, *usual, later)
        return scale, replace(mask, blind_rows="zeros" if guarded else "nan", adds=True)
    patterns = _paddings(full.shape, T, S)
    results = [(per_query(p, T, S, cut), *run(np.where(p, 0.0, full))) for p in patterns]
    if all(((f == usual[0]) & (a == usual[1])).all() for _, f, a in results):
        unseen = float(mask.kind == "added"), mask.value
        return scale, replace(mask, padding=(1.0, 0.0), padding_later=unseen, blind_rows="zeros")
    return scale, _read_padding(results, mask, later, scale, guarded)


def _scale(factor: Array, added: Array) -> float:
    """The one number that scores are multiplied by where nothing hides them."""
    seen = (added == 0) & (factor != 0)
    if not seen.any():
        raise ValueError("no query sees any key")
    # For np.median, as for np.unique, NumPy loads masked arrays, 20 ms; numba does so later, the textbook never.
    factors = np.sort(factor[seen])
    scale = float(factors[len(factors) // 2])
    if not np.allclose(factors, scale, rtol=1e-6):
        raise ValueError("scores are not multiplied by one number")
    return scale


def _read_later(
    factor: Array, added: Array, scale: float, T: int, S: int, shape: tuple[int, ...] | None
) -> tuple[MaskRule, Array]:
    """What happens to keys after a query's own, and which are hidden so, (T, S)."""
    seen = (added == 0) & (factor != 0)
    query, key = np.arange(S - T, S)[:, None], np.arange(S)
    shift = next((s for s in (0, *range(-S, S + 1)) if (seen == (key <= query + s)).all()), None)
    if shift is None:
        b, h, t, _ = np.argwhere(seen != (key <= query))[0]
        raise ValueError(f"query {S - T + t} sees {keys_in_words(np.flatnonzero(seen[b, h, t]), S - T + t)}")
    later = key > query + shift
    if seen.all():
        mask = MaskRule("none", 0.0, S, blind_rows="masked")
        if T == 1:  # one new position sees all keys in any GPT-2
            mask = MaskRule("replaced", -math.inf, 0, blind_rows="masked")
        elif shape is not None and len(shape) > 2:
            mask = MaskRule("given", -math.inf, 0, blind_rows="masked")
        return mask, np.zeros_like(later)
    f, value = one_effect(factor, added, later & ~later.all(axis=-1)[:, None], scale, "keys after a query's own")
    return MaskRule(
        "added" if f else "replaced", value, shift, blind_rows="nan" if value == -math.inf else "masked"
    ), later


def keys_in_words(sees: Array, query: int) -> str:
    """Which keys a query sees that does not see all up to its own."""
    if 0 < len(sees) <= query and sees[-1] == query and (np.diff(sees) == 1).all():
        return f"only the last {len(sees)} keys (local attention, as in GPT-Neo): GPT-2's sees all"
    return f"keys {sees.tolist()}, not all up to its own"


def _paddings(shape: tuple[int, ...], T: int, S: int) -> list[Array]:
    """Padding on the left (with queries that see nothing), on the right, a hole, and for each query by chance."""
    patterns = [np.full(shape, False) for _ in range(3 + (len(shape) > 2))]
    for pattern, hidden in zip(patterns, (slice(0, S - T + 2), slice(S - 1, S), slice(1, 2)), strict=False):
        pattern[0, ..., hidden] = True
    if len(shape) > 2:
        patterns[3][:] = np.random.default_rng(0).random(shape) < 0.4
    return patterns


def _read_padding(
    results: list[tuple[Array, Array, Array]], mask: MaskRule, later: Array, scale: float, guarded: bool
) -> MaskRule:
    """What happens to padded keys; results: which keys are padded, factors and addends of the scores."""
    effects: dict[str, set[Effect]] = {"padding": set(), "padding_later": set()}
    blind_rows: Literal["zeros", "nan", "masked", "unmasked"] = "masked"
    for hidden_keys, factors, addends in results:
        gone = np.broadcast_to(hidden_keys, factors.shape)
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
    return replace(mask, padding=padding, padding_later=padding_later, blind_rows=blind_rows)


def _is_added(run: MaskRun, shape: tuple[int, ...]) -> bool:
    """Whether a mask's numbers are added to the scores."""
    factor, added = run(np.zeros(shape))
    seen = (added == 0) & (factor != 0)
    return bool(seen.any() and np.allclose(run(np.full(shape, -2.5))[1][seen], -2.5))


def _check_added(
    run: MaskRun, full: Array, T: int, S: int, cut: bool, factor: Array, added: Array, later: Array
) -> None:
    """Raise unless every score has its own element added, but for those that are hidden in any case."""
    given = np.random.default_rng(0).standard_normal(full.shape)
    factors, addends = run(given)
    right = np.isclose(factors, factor, rtol=1e-6) & np.isclose(addends, added + per_query(given, T, S, cut), rtol=1e-6)
    if not (right | later).all():
        raise ValueError("scores are not given the element of attention_mask at their query and key")


def one_effect(factor: Array, added: Array, where: Array, scale: float, what: str) -> Effect:
    """The one thing that happens to all these scores."""
    where = np.broadcast_to(where, factor.shape)
    f, a = np.round(factor[where] / scale, 6), added[where]
    if len(set(f.tolist())) != 1 or len(set(a.tolist())) != 1 or f[0] not in (0, 1):
        raise ValueError(f"{what} are treated in several ways")
    return float(f[0]), float(a[0])
