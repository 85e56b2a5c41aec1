"""The embeddings: every token's row of wte, and which rows of wpe positions take."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ...errors import UnsupportedModelError
from .inputs import declared_shape
from .lookup import Lookup
from .probe import Probe
from .recognised import POSITIONS_FROM_MASK

Array = np.ndarray

AT_ONCE = 1 << 20  # token ids that are tried in one run


def check_ids(probe: Probe) -> None:
    """Each token's row of wte must be looked up, in the order given."""
    words = probe.borders.words
    (name,) = probe.inputs.named("input_ids")
    given = probe.known[name]
    rows = probe.rows(words)
    if rows.size != given.size or (rows.ravel() != given.ravel()).any():
        raise UnsupportedModelError(
            f"{words.node.describe()} looks up the tokens {rows.ravel().tolist()} where {given.ravel().tolist()} "
            "are given"
        )


def find_positions(probe: Probe) -> tuple[int, str]:
    """The offset of the first row of wpe, and how rows are chosen."""
    places = probe.borders.places
    T, P = probe.T, probe.P
    rows = position_rows(probe, places)
    given = probe.inputs.named("position_ids")
    expected = probe.known[given[0]].reshape(-1, T) if given else np.arange(P, P + T)
    offset = rows - expected
    if (offset != offset.flat[0]).any():
        raise UnsupportedModelError(
            f"{places.node.describe()} takes the rows {rows[0].tolist()} of wpe for positions {P}..{P + T - 1}"
        )
    how = "input" if given else "range"
    masks = [name for name in probe.inputs.named("attention_mask") if probe.known[name].ndim == 2]
    if how == "range" and masks:
        mask = np.ones_like(probe.known[masks[0]])
        mask[0, : P + 2] = mask[-1, P + 1] = mask[-1, 0] = 0  # padding on the left, and holes
        moved = position_rows(probe, places, {masks[0]: mask}) - offset
        counts = {name: count(mask != 0)[:, P:] for name, count in POSITIONS_FROM_MASK.items()}
        if (moved != expected).any():
            how = next((name for name, count in counts.items() if (moved == count).all()), "")
            if not how:
                raise UnsupportedModelError(
                    f"{places.node.describe()} derives positions from {masks[0]!r} in an unknown way"
                )
    return int(offset.flat[0]), how


def position_rows(probe: Probe, places: Lookup, feeds: dict[str, Array] | None = None) -> Array:
    """The row of wpe that each new position takes, (B, T)."""
    B, T, rows = probe.B, probe.T, probe.rows(places, feeds)
    if rows.size not in (T, B * T):
        raise UnsupportedModelError(
            f"{places.node.describe()} takes {rows.size} rows of wpe for {B} sequences of {T} new positions behind "
            f"{probe.P}"
        )
    return np.broadcast_to(rows.reshape(-1, T), (B, T))


# ------------------------------------------------------------------------------------------------ at all sizes
def prove_ids(probe: Probe, words: Lookup, role: str) -> bool:
    """Every token id, or type, must look up its own row of wte; whether negative ones count rows from the end."""
    V = words.table.shape[0]
    (name,) = probe.inputs.named(role)
    dtype, shape = probe.known[name].dtype, probe.known[name].shape
    port = next(p for p in probe.graph.inputs if p.name == name)
    free = [i for i, size in enumerate(declared_shape(port)) if not (isinstance(size, int) and size > 0)]
    others = math.prod(shape) // (shape[free[-1]] if free else 1)
    length = min(-(-V // others), AT_ONCE) if free else 1
    sizes = [length if free and i == free[-1] else size for i, size in enumerate(shape)]
    step, negative = math.prod(sizes), True
    for start in range(0, V, step):
        numbers = (np.arange(start, start + step) % V).reshape(sizes)
        ids = numbers.astype(dtype)
        rows = probe.rows(words, {name: ids})
        if rows.size != ids.size or (rows.ravel() != ids.ravel()).any():
            wrong = ids.ravel()[rows.ravel() != ids.ravel()] if rows.size == ids.size else ids.ravel()
            raise UnsupportedModelError(
                f"{words.node.describe()} does not look up the row of wte of token {int(wrong[0])} where it is given"
            )
        negative = negative and _from_the_end(probe.rows(words, {name: (numbers - V).astype(dtype)}), ids, V)
    return negative


def _from_the_end(rows: Array, expected: Array, size: int) -> bool:
    """Whether these are the rows of a table of that size, or the same counted from its end."""
    held = rows.size == expected.size and bool(((rows >= -size) & (rows < size)).all())
    return held and bool((rows.ravel() % size == expected.ravel() % size).all())


def prove_positions(probe: Probe, offset: int, how: str) -> None:
    """Every new position must take its own row of wpe, where the caller does not choose it."""
    if probe.inputs.named("position_ids"):
        return
    P, S = probe.P, probe.sizes.S
    _check_rows(probe, np.arange(P, S) + offset, {}, "the position")
    rng = np.random.default_rng(0)
    for name in probe.inputs.named("attention_mask"):
        full = probe.known[name]
        if full.ndim != 2:
            continue
        for share in (0.2, 0.7):
            mask = np.where(rng.random(full.shape) < share, 0, full)
            mask[0] = np.arange(S) >= S // 2  # padding on the left
            mask[:, -1] = 1
            counted = POSITIONS_FROM_MASK[how](mask != 0)[:, P:] if how in POSITIONS_FROM_MASK else np.arange(P, S)
            _check_rows(probe, counted + offset, {name: mask.astype(full.dtype)}, f"the position by {name!r}")


def prove_given_positions(probes: Sequence[Probe], offset: int) -> bool:
    """Every position that is given must take its own row of wpe; whether negative ones count rows from the end."""
    most = max(probes, key=lambda probe: probe.B * probe.T)  # it tries all of them, others the first and the last
    negative = [_given_positions(probe, offset, probe is most) for probe in probes]
    return all(negative)


def _given_positions(probe: Probe, offset: int, whole: bool) -> bool:
    places, (name,) = probe.borders.places, probe.inputs.named("position_ids")
    known, N = probe.known[name], probe.borders.places.table.shape[0]
    negative = True
    for start in range(0, max(N - offset, 1), known.size) if whole else (0, max(N - offset - known.size, 0)):
        numbers = (np.arange(start, start + known.size)[::-1] % max(N - offset, 1)).reshape(known.shape)
        ids = numbers.astype(known.dtype)
        _check_rows(probe, ids.reshape(-1, probe.T) + offset, {name: ids}, "the position that is given")
        rows = position_rows(probe, places, {name: (numbers - N).astype(known.dtype)})
        negative = negative and _from_the_end(rows, np.broadcast_to(ids.reshape(-1, probe.T) + offset, rows.shape), N)
    return negative


def _check_rows(probe: Probe, expected: Array, feeds: dict[str, Array], what: str) -> None:
    """Raise unless these rows of wpe are taken."""
    places = probe.borders.places
    rows = position_rows(probe, places, feeds)
    expected = np.broadcast_to(expected, rows.shape)
    if (rows != expected).any():
        at = tuple(np.argwhere(rows != expected)[0])
        raise UnsupportedModelError(
            f"{places.node.describe()} takes row {rows[at]} of wpe where row {expected[at]} is that of {what}"
        )
