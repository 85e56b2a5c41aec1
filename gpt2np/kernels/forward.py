"""The functions of `reference.py` under the same names and arguments, by the kernels of `loops.py`.

Python does what happens once a call: it makes and reshapes arrays, and estimates what work is worth several threads.
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
from numba.core.registry import cpu_target

from ..arrays import Array, empty_aligned
from ..masks import Mask, SafeScores, ScoresReachMask
from ..quantised import GROUP, LEVELS, Quantised
from ..reference import Tap, no_tap, split_heads
from ..weights import MLP, Attention, BlockWeights, GPT2Weights, LayerNorm, Linear
from . import fused, loops, threads, vectors
from .jit import DiskCache, config
from .loops import PIECE_PANELS, PIECE_QUERIES, PIECE_ROWS, VisibleKeys
from .panels import pack_levels, pack_matrix
from .products import TERMS
from .threads import pool, run_pieces, run_steps
from .tile import FORMS, PANEL, ROWS, STREAMS
from .vectors import ACTIVATION_CODES, LANES, activate_in_place

ANY = SafeScores()
READ_COST = 8  # multiply-adds that take as long as to read one number from memory


def needs_compilation() -> bool:
    """Whether the first call will take some seconds longer, because compiled kernels are not on disk yet."""
    kernel = fused.block_steps  # the last one of a first call, however many threads there are
    if config.DISABLE_JIT or kernel.signatures:
        return False
    machine = cpu_target.target_context.codegen().magic_tuple()
    return not (isinstance(kernel._cache, DiskCache) and kernel._cache.holds(machine))


def scratch_for(count: int, dtype: Any, C: int = 0, S: int = 0, D: int = 0) -> Array:
    """Memory for `count` threads: for linear maps, layer norms of C numbers, and attention over S keys of size D."""
    length, width = -(-S // PANEL) * PANEL, -(-D // PANEL) * PANEL
    linear = (PIECE_ROWS * PIECE_PANELS + TERMS) * PANEL
    size = max(linear, LANES + C, length * (D + width + ROWS) + ROWS * (width + 1) + LANES)
    return empty_aligned((count, -(-size // 16) * 16), dtype)


def _rows(x: Array) -> Array:
    """(..., C) -> (R, C), contiguous and writable as the compiled kernels expect it (none of them writes to it)."""
    return np.require(x.reshape(-1, x.shape[-1]), requirements=["C", "A", "W"])


def _linear_into(
    out: Array, x: Array, weight: Any, bias: Array, scratch: Array, activation: str = "none", added: bool = False,
    terms: int = TERMS,
) -> None:  # fmt: skip
    """out = activation(x @ weight + bias), or out += that: (R, K) @ (K, N) -> (R, N)."""
    arguments = x, weight.data, weight.scales, bias, ACTIVATION_CODES[activation], added, terms, _group(len(x)), out
    run_pieces(*_linear_work(x, weight), loops.linear_range, loops.linear_parallel, scratch, *arguments)


def _group(rows: int) -> int:
    """How many panels share one pass over so many rows."""
    return STREAMS[rows] if rows < len(STREAMS) else PIECE_PANELS if rows > PIECE_ROWS else 1


def _linear_work(x: Array, weight: Any) -> tuple[int, int]:
    """Pieces of a linear map, and what they cost in multiply-adds."""
    pieces = -(-len(weight.data) // _group(len(x))) * -(-len(x) // PIECE_ROWS)
    return pieces, (READ_COST + len(x)) * len(weight.data) * x.shape[1] * PANEL


def _layer_norm_into(out: Array, x: Array, weight: Array, bias: Array, epsilon: float, scratch: Array) -> None:
    """out = layer_norm(x): (R, C) -> (R, C)."""
    arguments = x, weight, bias, epsilon, out
    run_pieces(len(x), 4 * x.size, loops.layer_norm_range, loops.layer_norm_parallel, scratch, *arguments)


def _attend_into(
    heads: Array, probs: Array, qkv: Array, cache: Array, start: int, scale: float, visible: VisibleKeys,
    scratch: Array,
) -> None:  # fmt: skip
    """heads = softmax(q . k * scale, causal or + mask) @ v over the cache: (R, 3HD) -> (R, HD)."""
    _, B, H, _, D = cache.shape
    loops.append_range(0, B * H, qkv, cache, start)
    _look_at_hidden(qkv, cache, scale, visible)
    arguments = qkv, cache, cache.reshape(-1), scale, visible, heads, probs
    work = _attend_work(B, H, len(qkv) // B, start, D)
    run_pieces(*work, loops.attend_range, loops.attend_parallel, scratch, *arguments)
    if visible.unsafe[0]:
        raise ScoresReachMask


def _attend_work(B: int, H: int, T: int, start: int, D: int) -> tuple[int, int]:
    """Pieces of attention, and what they cost in multiply-adds."""
    return B * H * -(-T // PIECE_QUERIES), 2 * (READ_COST + T) * B * (start + T) * H * D


def _look_at_hidden(qkv: Array, cache: Array, scale: float, visible: VisibleKeys) -> None:
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


def embed(input_ids: Array, position_ids: Array, wte: Any, wpe: Array) -> Array:
    """Token vector plus position vector: ids and positions (B, T) -> (B, T, C)."""
    out = empty_aligned((*input_ids.shape, wpe.shape[1]), wpe.dtype)
    rows = _rows(out)
    ids, positions = (np.require(i.reshape(-1), np.int64, ["C", "A", "W"]) for i in (input_ids, position_ids))
    with pool() as count:
        scratch = scratch_for(count, out.dtype)
        arguments = ids, positions, wte.data, wte.scales, wpe, rows
        run_pieces(len(rows), out.size, loops.embed_range, loops.embed_parallel, scratch, *arguments)
    return out


def layer_norm(x: Array, weight: Array, bias: Array, epsilon: float) -> Array:
    """Give each vector mean 0 and variance 1, then scale and shift: (..., C) -> (..., C)."""
    out = empty_aligned(x.shape, x.dtype)
    with pool() as count:
        _layer_norm_into(_rows(out), _rows(x), weight, bias, epsilon, scratch_for(count, x.dtype, x.shape[-1]))
    return out


def linear(x: Array, weight: Any, bias: Array) -> Array:
    """x @ weight + bias: (..., inputs) -> (..., outputs)."""
    out = empty_aligned((*x.shape[:-1], weight.columns), x.dtype)
    with pool() as count:
        _linear_into(_rows(out), _rows(x), weight, bias, scratch_for(count, x.dtype))
    return out


def chained_product(x: Array, matrix: Array, bias: Array, terms: int) -> Array:
    """x @ matrix + bias with sums cut into chains of so many terms: (R, K) @ (K, N) -> (R, N); bias (N,) or empty.

    For those who compute what another program computes, to the bit; the chains of `linear` have TERMS terms.
    """
    out = empty_aligned((len(x), matrix.shape[1]), x.dtype)
    with pool() as count:
        scratch = scratch_for(count, x.dtype)
        _linear_into(out, _rows(x), pack_matrix(matrix), bias, scratch, terms=terms)
    return out


def visible_keys(mask: Mask | None, B: int, T: int, start: int, dtype: Any, safe: SafeScores = ANY) -> VisibleKeys:
    """Which keys T new positions from `start` on may see; mask: None for the causal mask."""
    if mask is None:
        added, kept = np.empty((0, 0, 0, 0), dtype), np.empty((0, 0), dtype)
    else:
        added, kept = (np.require(a, dtype, ["C", "A", "W"]) for a in (mask.added, mask.kept_queries))
    keys, limits = np.empty((B, start + T), np.int64), np.empty((B, T), np.int64)
    loops.find_visible_keys(added, start, keys, limits)
    hidden = np.zeros((B, start + T), bool)
    if safe.added > -math.inf:  # their scores matter
        hidden[:] = np.arange(start + T) > start if mask is None else np.isneginf(mask.added).any(axis=(1, 2))
    hidden = hidden if hidden.any() else hidden[:0]
    bounds = np.array([safe.lowest, safe.highest])
    return VisibleKeys(added, kept, keys, limits, bounds, np.zeros(1, np.int64), hidden, safe.lowest, safe.added)


def attention(
    x: Array, w: Attention, cache: Array, start: int, mask: Mask | None, tap: Tap, name: str, safe: SafeScores = ANY
) -> Array:
    """Causal self-attention of T new positions over all S = start + T: (B, T, C) -> (B, T, C).

    cache: (2, B, H, >= S, D), the keys and values; positions 0..start-1 are read, start..S-1 written.
    mask: in the place of the causal mask where a file's padding asks for it; it must be additive.
    safe: what the highest score of each query must be, see `SafeScores`; else ScoresReachMask.
    """
    B, T, _ = x.shape
    H, D = cache.shape[2], cache.shape[4]
    qkv = linear(x, *w.c_attn)  # (B, T, C) -> (B, T, 3HD)
    heads = empty_aligned((B, T, H * D), x.dtype)
    shape = (B, H, T, start + T) if tap is not no_tap else (0, 0, 0, 0)
    scores, probs = np.zeros(shape, x.dtype), np.zeros(shape, x.dtype)
    with pool() as count:
        scratch = scratch_for(count, x.dtype, S=start + T, D=D)
        visible = visible_keys(mask, B, T, start, x.dtype, safe)
        _attend_into(_rows(heads), probs, _rows(qkv), cache, start, w.scale, visible, scratch)
        if tap is not no_tap:
            loops.all_scores(_rows(qkv), cache, start, T, w.scale, scores)
    for part, value in zip("qkv", split_heads(qkv, w.n_head), strict=True):
        tap(f"{name}.{part}", value)
    tap(f"{name}.scores", scores)
    tap(f"{name}.probs", probs)
    tap(f"{name}.heads", heads)
    out = linear(heads, *w.c_proj)  # (B, T, HD) -> (B, T, C)
    tap(f"{name}.out", out)
    return out


def activate(x: Array, activation: str) -> Array:
    """One of ACTIVATIONS, element by element."""
    out = x.copy()
    with pool():
        activate_in_place(out.reshape(-1), ACTIVATION_CODES[activation])
    return out


def mlp(x: Array, w: MLP, tap: Tap, name: str) -> Array:
    """Two linear maps with a GELU between, each position by itself: (B, T, C) -> (B, T, C)."""
    hidden = linear(x, *w.c_fc)  # (B, T, C) -> (B, T, F)
    tap(f"{name}.c_fc", hidden)
    hidden = activate(hidden, w.activation)
    tap(f"{name}.gelu", hidden)
    out = linear(hidden, *w.c_proj)  # (B, T, F) -> (B, T, C)
    tap(f"{name}.out", out)
    return out


def block(
    x: Array, w: BlockWeights, cache: Array, start: int, mask: Mask | None, tap: Tap, name: str, safe: SafeScores = ANY
) -> Array:
    """One transformer block; each half reads a normalised copy and adds to the stream: (B, T, C) -> (B, T, C)."""
    normed = layer_norm(x, *w.ln_1)
    tap(f"{name}.ln_1", normed)
    x = x + attention(normed, w.attn, cache, start, mask, tap, f"{name}.attn", safe)
    tap(f"{name}.resid_mid", x)
    normed = layer_norm(x, *w.ln_2)
    tap(f"{name}.ln_2", normed)
    x = x + mlp(normed, w.mlp, tap, f"{name}.mlp")
    tap(f"{name}.resid_post", x)
    return x


def transformer(
    input_ids: Array,
    position_ids: Array,
    w: GPT2Weights,
    caches: list[Array],
    start: int = 0,
    mask: Mask | None = None,
    tap: Tap = no_tap,
    safe: SafeScores = ANY,
) -> Array:
    """The whole stack: ids and positions (B, T) -> last_hidden_state (B, T, C).

    caches: L arrays (2, B, H, >= start + T, D), read up to `start` and written from there. mask, safe: see `attention`.
    Without a tap the residual additions and the activation happen inside the linear maps, with the same bits.
    """
    x = embed(input_ids, position_ids, w.wte, w.wpe)  # (B, T) -> (B, T, C)
    tap("embed", x)
    if tap is no_tap:
        _blocks(x, w, caches, start, mask, safe)
    else:
        for i, (block_weights, cache) in enumerate(zip(w.h, caches, strict=True)):
            x = block(x, block_weights, cache, start, mask, tap, f"h.{i}", safe)
    x = layer_norm(x, *w.ln_f)
    tap("ln_f", x)
    return x


def _blocks(
    x: Array, w: GPT2Weights, caches: list[Array], start: int, mask: Mask | None, safe: SafeScores,
    scores: Array | None = None,
) -> bool:  # fmt: skip
    """All blocks on the residual stream x (B, T, C), in place; they share their buffers.

    scores: (R, V), for ln_f and lm_head in the same call. Returns whether that could be done.
    """
    B, T, C = x.shape
    H, D = caches[0].shape[2], caches[0].shape[4]
    R, HD, F, dtype = B * T, H * D, w.h[0].mlp.c_fc.bias.size, x.dtype
    normed, shared = empty_aligned((R, C), dtype), empty_aligned((R * max(4 * HD, F),), dtype)
    qkv, heads = shared[: R * 3 * HD].reshape(R, 3 * HD), shared[R * 3 * HD : R * 4 * HD].reshape(R, HD)
    hidden = shared[: R * F].reshape(R, F)  # made when qkv and heads are done with
    rows, no_probs = _rows(x), np.empty((0, 0, 0, 0), dtype)
    inputs = normed, heads, normed, hidden, normed
    with pool() as count:
        visible = visible_keys(mask, B, T, start, dtype, safe)
        scratch = scratch_for(count, dtype, C, start + T, D)
        table = fused.tabulate(w)
        at_once = table.alike and not visible.hidden.size and R <= PIECE_ROWS
        whole = at_once and table.head_alike and scores is not None
        outputs = qkv, rows, hidden, rows, scores if scores is not None and whole else rows[:0]
        to_qkv, to_stream, *to_mlp = (
            _linear_work(x, weight) for x, (weight, _) in zip(inputs, fused.linear_maps(w.h[0]), strict=False)
        )
        norm, append, attend = (R, 4 * x.size), (B * H, 2 * R * HD), _attend_work(B, H, T, start, D)
        to_scores = (norm, _linear_work(rows, w.lm_head)) if whole else ()
        works = norm, to_qkv, append, attend, to_stream, norm, *to_mlp, *to_scores
        cached = np.array([cache.ctypes.data for cache in caches], np.int64)

        def run(first: int, last: int, steps: tuple[int, int, int], only: int | None = None) -> None:
            """Some steps of blocks first..last-1; the matrices are of one form, or all have that of the only one."""
            arrays, head = table.arrays[first], table.arrays[-1] if whole else table.arrays[first]
            weights, scales = (
                (*arrays[i : i + 4], head[i]) if only is None else (arrays[i + only],) * 5 for i in (4, 8)
            )
            kinds = dtype, *(array.dtype for array in weights), *(array.ndim for array in scales)
            run_steps(
                works, (first, last), steps, fused.block_steps, fused.block_parallel, kinds, scratch,
                *table[:4], arrays[0], weights, scales, (*arrays[12:], head[12]), rows, inputs, outputs, _group(R),
                caches[0], cached, start, visible, no_probs,
            )  # fmt: skip

        if at_once:
            run(0, len(w.h), (0, fused.HEAD, len(works) if whole else fused.HEAD))
        else:  # a long call ends between blocks where Ctrl-C asks for it
            for i, b in enumerate(w.h):
                parts = [(0, fused.HEAD)] if table.alike and not visible.hidden.size else fused.PARTS
                for only, (begin, end) in enumerate(parts):
                    if begin == fused.ATTEND:
                        _look_at_hidden(qkv, caches[i], b.attn.scale, visible)
                    run(i, i + 1, (begin, end, end), only if len(parts) > 1 else None)
        if visible.unsafe[0]:
            raise ScoresReachMask
    return whole


def causal_logits(
    input_ids: Array, position_ids: Array, w: GPT2Weights, caches: list[Array], start: int, safe: SafeScores = ANY
) -> Array:
    """`logits` of `transformer` by the causal mask, for few positions in fewer calls: ids (B, T) -> (B, T, V)."""
    x, lm_head = embed(input_ids, position_ids, w.wte, w.wpe), cast(Any, w.lm_head)
    scores = empty_aligned((input_ids.size, lm_head.columns), x.dtype)
    if _blocks(x, w, caches, start, None, safe, scores):
        return scores.reshape(*input_ids.shape, -1)
    return logits(layer_norm(x, *w.ln_f), lm_head, w.lm_head_bias)


def logits(hidden: Array, lm_head: Any, lm_head_bias: Array, tap: Tap = no_tap) -> Array:
    """A score for every token of the vocabulary: (B, T, C) @ (C, V) -> (B, T, V)."""
    scores = linear(hidden, lm_head, lm_head_bias)
    tap("logits", scores)
    return scores


def log_probabilities(scores: Array, targets: Array) -> tuple[Array, Array]:
    """What scores (B, T, V) say of the tokens `targets` (B, T).

    Returns
    -------
    log-probabilities float64 (B, T), bool (B, T): whether no token has a higher score
    """
    logs, best = np.empty(targets.size), np.empty(targets.size, bool)
    with pool():
        lanes = np.empty(LANES, scores.dtype), np.empty(LANES)
        vectors.log_probabilities(_rows(scores), np.require(targets.reshape(-1), np.int64), *lanes, logs, best)
    return logs.reshape(targets.shape), best.reshape(targets.shape)


def warmup(dtype: Any = np.float32) -> None:
    """Compile every kernel for one dtype, or load it from disk, by running a model of zeros.

    It is just large enough that each kernel deals work out to threads for many tokens, and does not for one. Matrices
    in fewer bits have loops of their own.
    """
    if config.DISABLE_JIT:
        return
    C, V, H = 64, 4096, 2
    T = 2 * threads.GRAIN // C  # tokens of which the embedding, the lightest kernel, is worth two threads

    def zeros(*shape: int) -> Array:
        return np.zeros(shape, dtype)

    def packed(N: int, form: str | None, offsets: bool) -> Any:
        """A matrix (C, N)."""
        if form not in LEVELS:
            return pack_matrix(zeros(C, N), form=form)
        scales = zeros(C // GROUP if form == "int4" or offsets else 1, N)
        return pack_levels(Quantised(form, np.zeros((C, N), np.int8), scales, scales if offsets else None))

    norm = LayerNorm(zeros(C), zeros(C), 1e-5)
    fewer_bits = [(form, False) for form in FORMS] + [(form, offsets) for form in LEVELS for offsets in (False, True)]
    for kept in [(None, False), *(fewer_bits if np.dtype(dtype) == np.float32 else [])]:
        wide, narrow = Linear(packed(3 * C, *kept), zeros(3 * C)), Linear(packed(C, *kept), zeros(C))
        block_weights = BlockWeights(norm, Attention(wide, narrow, H, 1.0), norm, MLP(narrow, narrow, "gelu_tanh"))
        wte = packed(V, *kept)
        w = GPT2Weights(wte, zeros(1, C), (block_weights,), norm, wte, zeros(0))
        for tokens in (1, T):
            ids, past = np.zeros((1, tokens), np.int64), zeros(2, 1, H, tokens, C // H)
            for tap in (no_tap, lambda name, value: None):
                hidden = transformer(ids, ids, w, [past], 0, None, tap)
                log_probabilities(logits(hidden[:, -1:], w.lm_head, w.lm_head_bias), ids[:, -1:])
