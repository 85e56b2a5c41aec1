"""What recognising a file finds: weights, taps, inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ...config import GPT2Config
from ...errors import InputError
from ..evaluate.evaluator import Evaluator
from ..graph import Graph, Node
from .sources import Source

if TYPE_CHECKING:
    from .search import Search

Array = np.ndarray


@dataclass(frozen=True)
class Port:
    """One input or output of the file."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]  # as declared: a size, a symbol, or unknown
    # "input_ids", "attention_mask", "attention_bias" (added to the scores), "position_ids", "token_type_ids", "past",
    # "past_key", ..., lengths of the past (see `past_length`), "beam_width", "cache_indirection"; "logits",
    # "last_hidden_state", "present", ..., or for any other output the name of its tap
    role: str
    layer: int | None = None


@dataclass(frozen=True)
class Entry:
    """One node of the ledger."""

    node: Node
    role: str
    tap: str  # the value that the node works for, such as "h.0.attn.q"; "" for what all share


@dataclass(frozen=True)
class TapLocation:
    """Where a tap lives in the graph, and how its array becomes ours."""

    tensor: str
    convert: Callable[[Array, int], Array] = field(repr=False)

    def to_tap(self, array: Array, config: GPT2Config, batch: int = 1) -> Array:
        """The graph's array in the tap's own shape; `batch` is B, for graphs that merge batch and time."""
        return self.convert(array, batch)


# What graphs make of the positions of padding: mask (B, S) of bools -> (B, S).
POSITIONS_FROM_MASK: dict[str, Callable[[Array], Array]] = {
    "mask": lambda keep: np.maximum(np.cumsum(keep, axis=-1) - 1, 0),
    "mask, padding at 1": lambda keep: np.where(keep, np.cumsum(keep, axis=-1) - 1, 1),
    "mask, padding at 0": lambda keep: np.where(keep, np.cumsum(keep, axis=-1) - 1, 0),
}


@dataclass(frozen=True)
class Recognised:
    """What `recognise` found."""

    config: GPT2Config
    sources: dict[str, Source]  # under the names of weights.weight_shapes, plus "lm_head.bias" if there is one
    taps: dict[str, TapLocation]  # absent where the graph does not hold the value
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    ignored: tuple[tuple[str, str], ...]  # (initializer, why it is no weight)
    notes: tuple[str, ...]  # anything odd
    # How rows of wpe are chosen where the caller does not: "range", or counted in attention_mask ("mask...").
    positions: str = "range"
    mask_cut: bool = False  # attention_mask has a row for every key, and the graph takes those of the new positions
    head_padding: Source | None = None  # rows of the head beyond the vocabulary, (E, C): logits (B, T, V + E)
    # How many positions of the past inputs count, and which values of the graph tell; none: all of them.
    lengths: Mapping[str, str] = field(default_factory=dict)
    graph: Graph | None = field(default=None, repr=False, compare=False)  # kept where `lengths` need it
    # The search whose decoder this is: inputs and outputs above are the decoder's then, the file's own are in it.
    search: Search | None = field(default=None, repr=False, compare=False)
    # Roles of the inputs whose negative numbers are rows counted from a table's end, as ONNX's Gather takes them.
    from_the_end: frozenset[str] = frozenset()
    ledger: tuple[Entry, ...] = field(default=(), repr=False, compare=False)  # every node that an output depends on

    def positions_from_mask(self, attention_mask: Array) -> Array:
        """Position of every key, (B, S), as graphs count them that do not take position_ids."""
        return POSITIONS_FROM_MASK[self.positions](attention_mask != 0)

    def past_length(self, feeds: Mapping[str, Array], T: int) -> int | None:
        """P, where the past inputs are buffers of which so many positions count; None where all of them do.

        Raises
        ------
        InputError
            If the inputs tell several lengths: sequences of different lengths are not served.
        """
        if self.graph is None or not self.lengths:
            return None
        values = Evaluator(self.graph, feeds)
        found = {int(n) + LENGTHS[role](T) for value, role in self.lengths.items() for n in values(value).ravel()}
        if len(found) != 1 or min(found) < 0:
            given = ", ".join(f"{value!r}: {values(value).ravel().tolist()}" for value in self.lengths)
            raise InputError(f"for {T} new positions these are lengths of no one past: {given}")
        return found.pop()


# What takes the values to the length of the past, for T new positions.
LENGTHS: dict[str, Callable[[int], int]] = {
    "cached_length": lambda T: 0,
    "total_sequence_length": lambda T: -T,
    "seqlens_k": lambda T: 1 - T,  # the index of the last key
}
