"""What the kernels need of Python: memory, pieces of work, which keys are seen, and the steps of a whole model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..arrays import Array, empty_aligned
from ..masks import Mask, SafeScores, ScoresReachMask
from ..weights import Blocks, GPT2Weights, LayerNorm, Linear
from . import threads
from .calls import Call, run
from .layout import (
    ACTIVATION,
    ACTIVATION_CODES,
    ADDED,
    APPEND,
    ATTEND,
    BIAS,
    CACHE,
    COLUMNS,
    EMBED,
    FLAT,
    GAIN,
    INPUT,
    KIND,
    LANES,
    LINEAR,
    NORM,
    OUTPUT,
    PANEL,
    PIECE_PANELS,
    PIECE_QUERIES,
    PIECE_ROWS,
    PIECES,
    ROWS,
    SCALES,
    SMALLEST,
    STREAMS,
    TERMS,
    WEIGHT,
    VisibleKeys,
)

ANY = SafeScores()
READ_COST = 8  # multiply-adds that take as long as to read one number from memory
NUMBER_COST = 24  # those that take as long as a number of a layer norm, of an embedding, of a key or a value to be kept


def scratch_for(count: int, dtype: Any, C: int = 0, S: int = 0, D: int = 0) -> Array:
    """Memory for `count` threads: for linear maps, layer norms of C numbers, and attention over S keys of size D."""
    length, width = -(-S // PANEL) * PANEL, -(-D // PANEL) * PANEL
    linear = (PIECE_ROWS * PIECE_PANELS + TERMS) * PANEL
    size = max(linear, LANES + C, length * (D + width + ROWS) + ROWS * (width + 1) + LANES)
    return empty_aligned((count, -(-size // 16) * 16), dtype)


# ------------------------------------------------------------------------------------------------ pieces of work
# Each of these gives the number of pieces, and what they cost in multiply-adds.


def group_for(rows: int) -> int:
    """How many panels share one pass over so many rows."""
    return STREAMS[rows] if rows < len(STREAMS) else PIECE_PANELS if rows > PIECE_ROWS else 1


def linear_work(rows: int, panels: int, K: int) -> tuple[int, int]:
    return -(-panels // group_for(rows)) * -(-rows // PIECE_ROWS), (READ_COST + rows) * panels * K * PANEL


def row_work(rows: int, C: int) -> tuple[int, int]:
    return rows, NUMBER_COST * rows * C


def append_work(B: int, H: int, R: int, D: int) -> tuple[int, int]:
    return B * H, NUMBER_COST * R * H * D


def attend_work(B: int, H: int, T: int, start: int, D: int) -> tuple[int, int]:
    return B * H * -(-T // PIECE_QUERIES), 2 * (READ_COST + T) * B * (start + T) * H * D


# -------------------------------------------------------------------------------------------------- visible keys


def visible_keys(mask: Mask | None, B: int, T: int, start: int, dtype: Any, safe: SafeScores = ANY) -> VisibleKeys:
    """Which keys T new positions from `start` on may see; mask: None for the causal mask."""
    S = start + T
    if mask is None:
        added, kept = np.empty((0, 0, 0, 0), dtype), np.empty((0, 0), dtype)
        keys, limits = (np.tile(np.arange(i, S), (B, 1)) for i in (0, start))
        limits += 1
    else:
        added, kept = (np.require(a, dtype, ["C", "A", "W"]) for a in (mask.added, mask.kept_queries))
        keys, limits = np.empty((B, S), np.int64), np.empty((B, T), np.int64)
        run("loops.find_visible_keys", added, keys, limits)
    hidden = np.zeros((B, S), bool)
    if safe.added > -math.inf:  # their scores matter
        hidden[:] = np.arange(S) > start if mask is None else np.isneginf(mask.added).any(axis=(1, 2))
    hidden = hidden if hidden.any() else hidden[:0]
    bounds = np.array([safe.lowest, safe.highest])
    return VisibleKeys(added, kept, keys, limits, bounds, np.zeros(1, np.int64), hidden, safe.lowest, safe.added)


def look_at_hidden(qkv: Array, cache: Array, scale: float, visible: VisibleKeys) -> None:
    """Say in `visible` how high scores must be for those of hidden keys, if these matter, to leave no weight."""
    if visible.hidden.size:
        reach = _reach_of_hidden(qkv, cache, scale, visible.hidden) + visible.added
        if not reach < math.inf:
            raise ScoresReachMask
        visible.safe[0] = max(visible.lowest, reach)


def _reach_of_hidden(qkv: Array, cache: Array, scale: float, hidden: Array) -> float:
    """A bound of the scores of hidden keys, (B, S) bools: |q . k| is at most the product of the vectors' lengths."""
    _, B, H, _, D = cache.shape
    some = np.flatnonzero(hidden.any(axis=0))
    span = slice(some[0], some[-1] + 1)
    queries, keys = qkv.reshape(B, -1, 3, H, D)[:, :, 0], cache[0, :, :, span]
    with np.errstate(over="ignore", invalid="ignore"):
        longest = np.einsum("bthd,bthd->bth", queries, queries).max(axis=1)  # (B, H), squares
        lengths = np.where(hidden[:, None, span], np.einsum("bhsd,bhsd->bhs", keys, keys), 0)
        return 1.001 * abs(scale) * math.sqrt(float((longest * lengths.max(axis=2)).max()))  # sums are rounded


# ------------------------------------------------------------------------------------------------------ programs

BLOCK = (  # kind of step, what it reads and writes
    (NORM, "stream", "normed"),
    (LINEAR, "normed", "qkv"),
    (APPEND, "qkv", "qkv"),
    (ATTEND, "qkv", "heads"),
    (LINEAR, "heads", "stream"),
    (NORM, "stream", "normed"),
    (LINEAR, "normed", "hidden"),
    (LINEAR, "hidden", "stream"),
)


class Table(NamedTuple):
    """The weights of all steps of a model: EMBED, those of BLOCK for each block, then ln_f and lm_head."""

    steps: Array  # (steps, COLUMNS) int64
    factors: Array  # (steps,) float64
    forms: list[tuple[Array, Array]]  # a matrix and its scales, of the types that each step needs; it may need none
    changes: list[int]  # steps that need others than the step before
    kept: list[Array]  # what is at the addresses
    made_of: tuple[Any, ...]


def put(steps: Array, column: int, array: Array) -> None:
    """Write the address and the shape of an array into one or more steps (..., COLUMNS)."""
    steps[..., column : column + 1 + array.ndim] = array.__array_interface__["data"][0], *array.shape


def tabulate(w: GPT2Weights) -> Table:
    """The Table of a model, which is kept with its blocks if they are Blocks."""
    table: Table | None = getattr(w.h, "table", None)
    made_of = w.wte, w.ln_f, w.lm_head, w.lm_head_bias
    if table is not None and all(one is other for one, other in zip(table.made_of, made_of, strict=True)):
        return table
    none = np.empty(0, w.wpe.dtype)
    parts: list[Any] = [Linear(w.wte, none)]
    for b in w.h:
        parts += b.ln_1, b.attn.c_attn, None, b.attn.scale, b.attn.c_proj, b.ln_2, b.mlp.c_fc, b.mlp.c_proj
    parts += w.ln_f, Linear(w.lm_head, w.lm_head_bias)
    kinds = [EMBED, *[kind for kind, *_ in BLOCK] * len(w.h), NORM, LINEAR]
    table = Table(np.zeros((len(parts), COLUMNS), np.int64), np.zeros(len(parts)), [], [], [], made_of)
    table.steps[:, KIND] = kinds
    table.steps[1 + BLOCK.index((LINEAR, "normed", "hidden")) : -2 : len(BLOCK), ACTIVATION] = [
        ACTIVATION_CODES[b.mlp.activation] for b in w.h
    ]
    for i, part in enumerate(parts):
        arrays: dict[int, Array] = {}
        if isinstance(part, LayerNorm):
            arrays, table.factors[i] = {GAIN: part.weight, BIAS: part.bias}, part.epsilon
        elif isinstance(part, Linear):
            matrix: Any = part.weight
            arrays = {WEIGHT: matrix.data, SCALES: matrix.scales, BIAS: part.bias}
        elif part is not None:
            table.factors[i] = part
        arrays = {column: np.require(array, requirements=["C", "A"]) for column, array in arrays.items()}
        for column, array in arrays.items():
            put(table.steps[i], column, array)
        table.kept.extend(arrays.values())
        form = (arrays[WEIGHT], arrays[SCALES]) if WEIGHT in arrays else table.forms[-1]
        if not table.forms or _types(form) != _types(table.forms[-1]):
            table.changes.append(i)
        table.forms.append(form)
    if isinstance(w.h, Blocks):
        w.h.table = table
    return table


def _types(form: tuple[Array, Array]) -> tuple[Any, int]:
    return form[0].dtype, form[1].ndim


class Program:
    """The steps of a whole model for T new positions of B sequences, with the memory that they need.

    Caches may keep it (see `program_for`), so it does not keep them, but only their addresses.
    """

    def __init__(self, w: GPT2Weights, caches: Sequence[Array], B: int, T: int, count: int) -> None:
        _, _, H, room, D = caches[0].shape
        R, C, HD, F, dtype = B * T, w.wpe.shape[1], H * D, w.h[0].mlp.c_fc.bias.size, w.wpe.dtype
        self.w, self.count, self.shape, self.long = w, count, (B, H, T, D), R > PIECE_ROWS
        self.wpe = np.require(w.wpe, requirements=["C", "A"])
        self.scratch, shared = scratch_for(count, dtype, C, room, D), empty_aligned((R * max(4 * HD, F),), dtype)
        self.memory = {
            "stream": empty_aligned((R, C), dtype),
            "normed": empty_aligned((R, C), dtype),
            "qkv": shared[: R * 3 * HD].reshape(R, 3 * HD),
            "heads": shared[R * 3 * HD : R * 4 * HD].reshape(R, HD),
            "hidden": shared[: R * F].reshape(R, F),  # made when qkv and heads are done with
        }
        self.ids = np.empty((2, R), np.int64)
        self.causal = visible_keys(None, B, room, 0, dtype)._replace(limits=np.empty((B, T), np.int64))
        self.no_probs, self.cache_like = np.empty((0, 0, 0, 0), dtype), np.empty((0, 0, 0, 0, 0), dtype)
        self._write(tabulate(w), caches)
        self.calls = list(self._calls(self.causal, False))

    def _write(self, table: Table, caches: Sequence[Array]) -> None:
        self.table, self.steps = table, table.steps.copy()
        first, blocks, ends = self.steps[:1], self.steps[1:-2].reshape(-1, len(BLOCK), COLUMNS), self.steps[-2:]
        self.counters = np.zeros((len(self.steps), 2, 8), np.int64)
        self.attends = slice(1 + [kind for kind, *_ in BLOCK].index(ATTEND), -2, len(BLOCK))
        put(first, INPUT, self.wpe)
        put(first, OUTPUT, self.memory["stream"])
        put(blocks, CACHE, caches[0])
        put(blocks, FLAT, caches[0].reshape(-1))
        blocks[..., CACHE] = blocks[..., FLAT] = [[cache.__array_interface__["data"][0]] for cache in caches]
        for i, (kind, reads, writes) in enumerate(BLOCK):
            put(blocks[:, i], INPUT, self.memory[reads])
            put(blocks[:, i], OUTPUT, self.memory[writes])
            blocks[:, i, ADDED] = kind == LINEAR and writes == "stream"
        put(ends, INPUT, self.memory["stream"])
        put(ends, OUTPUT, self.memory["normed"])
        put(ends[1:], INPUT, self.memory["normed"])

        self.worth = 1  # threads
        for steps in (first, *(blocks[:, i] for i in range(len(BLOCK))), ends[:1], ends[1:]):
            pieces, work = self._work(steps[0].tolist())
            steps[:, PIECES], steps[:, SMALLEST] = pieces, threads.smallest_chunk(pieces, work)
            self.worth = max(self.worth, min(pieces, work // threads.GRAIN))

    def _work(self, step: list[int]) -> tuple[int, int]:
        (B, H, T, D), (R, C) = self.shape, self.memory["stream"].shape
        if step[KIND] == LINEAR:
            return linear_work(R, step[WEIGHT + 1], step[INPUT + 2])
        if step[KIND] == ATTEND:
            return attend_work(B, H, T, 0, D)
        return {EMBED: row_work(R, C), NORM: row_work(R, C), APPEND: append_work(B, H, R, D)}[step[KIND]]

    def _calls(self, visible: VisibleKeys, watched: bool) -> Iterator[tuple[int, int, Call]]:
        """Steps first..last-1 of each compiled call, and the call.

        watched: whether what ATTEND is to see must be looked at before. A long call can be stopped between blocks.
        """
        count, block = len(self.steps), len(BLOCK)
        cuts = range(count)[self.attends] if watched else range(1 + block, count, block) if self.long else ()
        begins, calls = sorted({*self.table.changes, *cuts}), {}
        for first, last in zip(begins, [*begins[1:], count], strict=True):
            form = self.table.forms[first]
            if _types(form) not in calls:
                calls[_types(form)] = Call(
                    "fused.run_steps", first, last, 0, 1, self.counters, self.scratch, self.steps, self.table.factors,
                    group_for(len(self.memory["stream"])), self.memory["stream"], *form, self.cache_like, self.ids,
                    visible, self.no_probs,
                )  # fmt: skip
            yield first, last, calls[_types(form)]

    def _visible(self, start: int, mask: Mask | None, safe: SafeScores) -> VisibleKeys:
        (B, _, T, _), usual = self.shape, self.causal
        if mask is not None or (T > 1 and safe.added > -math.inf):
            return visible_keys(mask, B, T, start, usual.mask.dtype, safe)
        usual.limits[:] = np.arange(start + 1, start + T + 1)
        usual.safe[:] = safe.lowest, safe.highest
        usual.unsafe[0] = 0
        return VisibleKeys(*usual[:-2], safe.lowest, safe.added)

    def run(
        self, caches: Sequence[Array], ids: Array, positions: Array, start: int, mask: Mask | None, safe: SafeScores,
        scores: Array | None = None,
    ) -> Array:  # fmt: skip
        """Run the model, with lm_head if there are `scores` (R, V) to write to; last_hidden_state (R, C).

        caches: those that it was made for. The result is overwritten by the next run.

        Raises
        ------
        ScoresReachMask
            See `SafeScores`.
        """
        (B, H, T, D), steps, memory = self.shape, self.steps, self.memory
        visible, last = self._visible(start, mask, safe), len(steps) - 1
        pieces, work = attend_work(B, H, T, start, D)
        workers = min(self.count, max(self.worth, min(pieces, work // threads.GRAIN)))
        steps[self.attends, SMALLEST] = threads.smallest_chunk(pieces, work)
        if scores is not None:
            put(steps[last], OUTPUT, scores)
            last += 1
        self.ids[0], self.ids[1] = ids.reshape(-1), positions.reshape(-1)
        self.counters.fill(0)
        watched = visible.hidden.size > 0
        usual = visible.limits is self.causal.limits
        for first, end, call in self.calls if usual else self._calls(visible, watched):
            if first == last:
                break
            if watched and steps[first, KIND] == ATTEND:
                look_at_hidden(memory["qkv"], caches[first // len(BLOCK)], self.table.factors[first], visible)
            threads.run(call, workers, first, min(end, last), start, workers)
        if visible.unsafe[0]:
            raise ScoresReachMask
        return memory["normed"]


def program_for(w: GPT2Weights, caches: Sequence[Array], ids: Array, count: int) -> Program:
    """A Program for ids (B, T) and so many threads; Layers keep it for other calls of this size, if it is small."""
    B, T = ids.shape
    kept: dict[tuple[int, int], Program] = getattr(caches, "programs", {})
    program = kept.get((B, T))
    if program is None or program.w is not w or len(program.scratch) < count:
        program = Program(w, caches, B, T, count)
        if not program.long:
            kept[B, T] = program
    program.count = count
    return program
