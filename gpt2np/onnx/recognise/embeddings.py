"""The embeddings: every token's row of wte, and which rows of wpe positions take."""

from __future__ import annotations

import numpy as np

from ...errors import UnsupportedModelError
from .lookup import Lookup
from .probe import Probe
from .recognised import POSITIONS_FROM_MASK

Array = np.ndarray


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
    return np.broadcast_to(probe.rows(places, feeds).reshape(-1, probe.T), (probe.B, probe.T))
