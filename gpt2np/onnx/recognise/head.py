"""The head: from the last layer norm to logits."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ...errors import WeightError
from .linear import LinearFound
from .lookup import Lookup
from .probe import Probe
from .recognised import TapLocation
from .sources import Source

Array = np.ndarray


@dataclass(frozen=True)
class HeadFound:
    """What was found of the head."""

    tied: bool  # its weights are wte's own bytes
    weight: Source | None  # as it is in the file, (V, C); None where the file has no head
    padding: Source | None = None  # rows beyond the vocabulary
    sources: dict[str, Source] = field(default_factory=dict)
    taps: dict[str, TapLocation] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


TURNS = frozenset({"Transpose", "Gemm transB", "MatMul transB"})  # steps that exchange the axes of a matrix


def read_head(probe: Probe) -> HeadFound:
    """The head's weights; tied if they are wte's own bytes."""
    head, words = probe.borders.head, probe.borders.words
    if head is None:
        return HeadFound(True, None)
    columns, weight = head.weight, head.weight.transposed("Transpose")
    whole = weight
    padding: Source | None = None
    notes: tuple[str, ...] = ()
    sources = {} if head.bias is None else {"lm_head.bias": head.bias}
    V, C = words.table.shape
    if weight.shape[0] < V:
        raise WeightError(
            f"{head.node.describe()} gives {weight.shape[0]} numbers, not one for each of {V} tokens: "
            "the head of a classifier, not of a language model"
        )
    tap = TapLocation(
        head.out, lambda a, batch: a.reshape(-1, *a.shape[-2:]) if a.ndim != 2 else a.reshape(batch, -1, a.shape[-1])
    )
    if weight.shape[0] > V and weight.shape[1:] == (C,) and head.bias is None:
        more = weight.shape[0] - V
        notes = (f"the head has {more} more rows than wte: logits of no token",)
        padding = weight.taken(np.arange(V, V + more), 0, "rows without a token")
        columns, weight = (m.taken(np.arange(V), axis, "rows of tokens") for axis, m in ((1, columns), (0, weight)))
        tap = TapLocation(head.out, lambda a, batch: a.reshape(-1, *a.shape[-2:])[..., :V])
    tied = _same_tensor(head, words) or (weight.shape == words.table.shape and _equal(columns, words.table))
    if not tied:
        sources["lm_head.weight"] = weight
    return HeadFound(tied, whole, padding, sources, {"logits": tap}, notes)


def _same_tensor(head: LinearFound, words: Lookup) -> bool:
    weight, table = head.weight, words.table
    turns = sum(step in TURNS for step in (*weight.through, *table.through))
    steps = [[step for step in source.through if step not in TURNS] for source in (weight, table)]
    return (
        weight.origin == table.origin and weight.shape == table.shape[::-1] and steps[0] == steps[1] and turns % 2 == 1
    )


def _equal(head: Source, table: Source) -> bool:
    """Whether a map (C, V) has the bits of a table (V, C), transposed; a NaN equals the same NaN."""
    columns = _bits(table.read())
    at, step = 0, 1024  # rows of the table at once, so that what is compared stays in the caches
    for block in head.blocks(32):
        part, rows = columns[:, at : at + len(block)], _bits(block).T
        at += len(block)
        if part.dtype != rows.dtype:
            return False
        if not all(np.array_equal(part[v : v + step], rows[v : v + step]) for v in range(0, len(part), step)):
            return False
    return True


def _bits(a: Array) -> Array:
    """The same matrix as integers, without a copy where it or its transpose is contiguous."""
    kind = f"u{a.dtype.itemsize}"
    return a.T.view(kind).T if a.flags.f_contiguous else np.ascontiguousarray(a).view(kind)
