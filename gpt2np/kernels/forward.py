"""The functions of `reference.py` under the same names and arguments, by the kernels of `loops.py`.

Python does what happens once a call: it makes and reshapes arrays, and estimates what work is worth several threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from ..arrays import Array, empty_aligned
from ..masks import Mask, SafeScores, ScoresReachMask
from ..quantised import GROUP, LEVELS, Quantised
from ..reference import Tap, no_tap, split_heads
from ..weights import MLP, Attention, BlockWeights, GPT2Weights, LayerNorm, Linear
from . import code
from .calls import run
from .layout import ACTIVATION_CODES, FORMS, LANES, TERMS, VisibleKeys
from .machine import DISABLE_JIT
from .panels import pack_levels, pack_matrix
from .programs import (
    ANY,
    append_work,
    attend_work,
    group_for,
    linear_work,
    look_at_hidden,
    program_for,
    row_work,
    scratch_for,
    visible_keys,
)
from .threads import get_num_threads, run_pieces, the_team

MODEL = "fused.run_steps"  # the kernel that runs a model


def needs_compilation() -> bool:
    """Whether the first call will take half a minute longer, because compiled kernels are not on disk yet."""
    return not (DISABLE_JIT or code.is_loaded(MODEL) or code.on_disk(MODEL))


def _rows(x: Array) -> Array:
    """(..., C) -> (R, C), contiguous and writable as the compiled kernels expect it (none of them writes to it)."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.flags.carray else np.require(x, requirements=["C", "A", "W"])  # which takes a while to see that


def _linear_into(out: Array, x: Array, weight: Any, bias: Array, scratch: Array, terms: int = TERMS) -> None:
    """out = x @ weight + bias: (R, K) @ (K, N) -> (R, N)."""
    group, work = group_for(len(x)), linear_work(len(x), len(weight.data), x.shape[1])
    arguments = x, weight.data, weight.scales, bias, ACTIVATION_CODES["none"], False, terms, group, out
    run_pieces("loops.linear_range", *work, scratch, *arguments)


def _layer_norm_into(out: Array, x: Array, weight: Array, bias: Array, epsilon: float, scratch: Array) -> None:
    """out = layer_norm(x): (R, C) -> (R, C)."""
    arguments = x, weight, bias, epsilon, out
    run_pieces("loops.layer_norm_range", *row_work(*x.shape), scratch, *arguments)


def _attend_into(
    heads: Array, probs: Array, qkv: Array, cache: Array, start: int, scale: float, visible: VisibleKeys,
    scratch: Array,
) -> None:  # fmt: skip
    """heads = softmax(q . k * scale, causal or + mask) @ v over the cache: (R, 3HD) -> (R, HD)."""
    _, B, H, _, D = cache.shape
    run_pieces("loops.append_range", *append_work(B, H, len(qkv), D), scratch, qkv, cache, start)
    look_at_hidden(qkv, cache, scale, visible)
    arguments = qkv, cache, cache.reshape(-1), scale, visible, heads, probs
    work = attend_work(B, H, len(qkv) // B, start, D)
    run_pieces("loops.attend_range", *work, scratch, *arguments)
    if visible.unsafe[0]:
        raise ScoresReachMask


def embed(input_ids: Array, position_ids: Array, wte: Any, wpe: Array) -> Array:
    """Token vector plus position vector: ids and positions (B, T) -> (B, T, C)."""
    out = empty_aligned((*input_ids.shape, wpe.shape[1]), wpe.dtype)
    rows = _rows(out)
    ids, positions = (np.require(i.reshape(-1), np.int64, ["C", "A", "W"]) for i in (input_ids, position_ids))
    scratch = scratch_for(get_num_threads(), out.dtype)
    run_pieces("loops.embed_range", *row_work(*rows.shape), scratch, ids, positions, wte.data, wte.scales, wpe, rows)
    return out


def layer_norm(x: Array, weight: Array, bias: Array, epsilon: float) -> Array:
    """Give each vector mean 0 and variance 1, then scale and shift: (..., C) -> (..., C)."""
    out = empty_aligned(x.shape, x.dtype)
    scratch = scratch_for(get_num_threads(), x.dtype, x.shape[-1])
    _layer_norm_into(_rows(out), _rows(x), weight, bias, epsilon, scratch)
    return out


def linear(x: Array, weight: Any, bias: Array) -> Array:
    """x @ weight + bias: (..., inputs) -> (..., outputs)."""
    out = empty_aligned((*x.shape[:-1], weight.columns), x.dtype)
    _linear_into(_rows(out), _rows(x), weight, bias, scratch_for(get_num_threads(), x.dtype))
    return out


def chained_product(x: Array, matrix: Array, bias: Array, terms: int) -> Array:
    """x @ matrix + bias with sums cut into chains of so many terms: (R, K) @ (K, N) -> (R, N); bias (N,) or empty.

    For those who compute what another program computes, to the bit; the chains of `linear` have TERMS terms.
    """
    out = empty_aligned((len(x), matrix.shape[1]), x.dtype)
    _linear_into(out, _rows(x), pack_matrix(matrix), bias, scratch_for(get_num_threads(), x.dtype), terms=terms)
    return out


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
    scratch = scratch_for(get_num_threads(), x.dtype, S=start + T, D=D)
    visible = visible_keys(mask, B, T, start, x.dtype, safe)
    _attend_into(_rows(heads), probs, _rows(qkv), cache, start, w.scale, visible, scratch)
    if tap is not no_tap:
        run("loops.all_scores", _rows(qkv), cache, start, T, w.scale, scores)
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
    run("vectors.activate_in_place", out.reshape(-1), ACTIVATION_CODES[activation])
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
    caches: Sequence[Array],
    start: int = 0,
    mask: Mask | None = None,
    tap: Tap = no_tap,
    safe: SafeScores = ANY,
) -> Array:
    """The whole stack: ids and positions (B, T) -> last_hidden_state (B, T, C).

    caches: L arrays (2, B, H, >= start + T, D), read up to `start` and written from there. mask, safe: see `attention`.
    Without a tap the residual additions and the activation happen inside the linear maps, with the same bits.
    """
    if tap is no_tap:
        hidden = empty_aligned((*input_ids.shape, w.wpe.shape[1]), w.wpe.dtype)
        program = program_for(w, caches, input_ids, get_num_threads())
        _rows(hidden)[:] = program.run(caches, input_ids, position_ids, start, mask, safe)
        return hidden
    x = embed(input_ids, position_ids, w.wte, w.wpe)  # (B, T) -> (B, T, C)
    tap("embed", x)
    for i, (block_weights, cache) in enumerate(zip(w.h, caches, strict=True)):
        x = block(x, block_weights, cache, start, mask, tap, f"h.{i}", safe)
    x = layer_norm(x, *w.ln_f)
    tap("ln_f", x)
    return x


def causal_logits(
    input_ids: Array, position_ids: Array, w: GPT2Weights, caches: Sequence[Array], start: int, safe: SafeScores = ANY
) -> Array:
    """`logits` of `transformer` by the causal mask, in one go: ids and positions (B, T) -> (B, T, V)."""
    scores = empty_aligned((*input_ids.shape, cast(Any, w.lm_head).columns), w.wpe.dtype)
    program = program_for(w, caches, input_ids, get_num_threads())
    program.run(caches, input_ids, position_ids, start, None, safe, _rows(scores))
    return scores


def logits(hidden: Array, lm_head: Any, lm_head_bias: Array, tap: Tap = no_tap) -> Array:
    """A score for every token of the vocabulary: (B, T, C) @ (C, V) -> (B, T, V)."""
    scores = linear(hidden, lm_head, lm_head_bias)
    tap("logits", scores)
    return scores


def log_probabilities(scores: Array, targets: Array) -> tuple[Array, Array]:
    """What scores (..., V) say of the tokens `targets` (..., n).

    Returns
    -------
    log-probabilities float64 (..., n), bool (..., n): whether no token has a higher score
    """
    rows = _rows(scores), _rows(np.require(targets, np.int64, ["C"]))
    logs, best = np.empty(targets.shape), np.empty(targets.shape, bool)
    run("vectors.log_probabilities", *rows, np.empty(LANES, scores.dtype), np.empty(LANES), _rows(logs), _rows(best))
    return logs, best


def warmup(dtype: Any = np.float32) -> None:
    """Compile every kernel for one dtype, or load it from disk, by running a model of zeros.

    Matrices in fewer bits have loops of their own.
    """
    if DISABLE_JIT:
        return
    the_team()
    C, V, H = 64, 64, 2

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
        ids, past = np.zeros((1, 1), np.int64), zeros(2, 1, H, 1, C // H)
        for mask in (None, Mask(zeros(1, 1, 1, 1))):
            for tap in (no_tap, lambda name, value: None):
                hidden = transformer(ids, ids, w, [past], 0, mask, tap)
                log_probabilities(logits(hidden, w.lm_head, w.lm_head_bias), ids[..., None])
