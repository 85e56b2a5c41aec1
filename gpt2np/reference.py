"""GPT-2 in plain NumPy: the textbook that the kernels are checked against.

Read from top to bottom: tokens become vectors (`embed`); every block lets positions exchange information
(`attention`) and then thinks about each position alone (`mlp`), both behind a `layer_norm` and both added to
the residual stream; the last vectors become scores for the next token (`logits`).

    B batch   T new positions   S cached + new positions   C width (n_embd)   H heads   D head size
    F MLP width   V vocabulary   N context length

Every function works in the dtype of its arrays: float32 in, float32 out; float64 makes it the oracle.
Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; Vaswani et al. 2017, "Attention Is
All You Need".
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from .activations import ACTIVATIONS
from .weights import MLP, Array, Attention, BlockWeights, GPT2Weights

Mask = Callable[[Array], Array]  # hides keys: scores (B, H, T, S) -> scores
Tap = Callable[[str, Array], None]


def no_tap(name: str, value: Array) -> None:
    """The default `tap`: look at nothing."""


def embed(input_ids: Array, position_ids: Array, wte: Array, wpe: Array) -> Array:
    """Token vector plus position vector: ids and positions (B, T) -> (B, T, C)."""
    return wte[input_ids] + wpe[position_ids]


def layer_norm(x: Array, weight: Array, bias: Array, epsilon: float) -> Array:
    """Give each vector mean 0 and variance 1, then scale and shift: (..., C) -> (..., C). Ba et al. 2016."""
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred * centred).mean(axis=-1, keepdims=True)  # divided by C, not by C - 1
    return centred / np.sqrt(variance + epsilon) * weight + bias


def linear(x: Array, weight: Array, bias: Array) -> Array:
    """x @ weight + bias: (..., inputs) -> (..., outputs)."""
    return x @ weight + bias


def split_heads(qkv: Array, n_head: int) -> tuple[Array, Array, Array]:
    """Cut c_attn's output into queries, keys and values of each head: (B, T, 3HD) -> 3 x (B, H, T, D)."""
    B, T, width = qkv.shape
    q, k, v = qkv.reshape(B, T, 3, n_head, width // (3 * n_head)).transpose(2, 0, 3, 1, 4)
    return q, k, v


def softmax(scores: Array) -> Array:
    """Scores to probabilities along the last axis; the maximum is taken off so that exp cannot overflow.

    A row of -inf alone, a query that may see no key, gives zeros. In any other the sum is at least exp(0).
    """
    highest = np.maximum(scores.max(axis=-1, keepdims=True), np.finfo(scores.dtype).min)
    exps = np.exp(scores - highest)
    return exps / np.maximum(exps.sum(axis=-1, keepdims=True), 1)


def causal_mask(scores: Array) -> Array:
    """Hide the keys after each query's own, by scores of -inf: (B, H, T, S) -> (B, H, T, S)."""
    T, S = scores.shape[-2:]
    query, key = np.arange(S - T, S)[:, None], np.arange(S)
    return np.where(key <= query, scores, -math.inf)


def attention(x: Array, w: Attention, cache: Array, start: int, mask: Mask, tap: Tap, name: str) -> Array:
    """Causal self-attention of T new positions over all S = start + T: (B, T, C) -> (B, T, C).

    cache: (2, B, H, >= S, D), the keys and values; positions 0..start-1 are read, start..S-1 written.
    mask: `causal_mask`, or another where a file's padding asks for it.
    """
    B, T, _ = x.shape
    S = start + T
    q, k, v = split_heads(linear(x, *w.c_attn), w.n_head)  # (B, T, 3HD) -> 3 x (B, H, T, D)
    tap(f"{name}.q", q)
    tap(f"{name}.k", k)
    tap(f"{name}.v", v)
    cache[0, :, :, start:S] = k
    cache[1, :, :, start:S] = v
    keys, values = cache[0, :, :, :S], cache[1, :, :, :S]  # (B, H, S, D)

    scores = q @ keys.swapaxes(-1, -2) * w.scale  # (B, H, T, D) @ (B, H, D, S) -> (B, H, T, S)
    tap(f"{name}.scores", scores)
    probs = softmax(mask(scores))
    tap(f"{name}.probs", probs)
    heads = (probs @ values).transpose(0, 2, 1, 3).reshape(B, T, -1)  # (B, H, T, D) -> (B, T, HD)
    tap(f"{name}.heads", heads)
    out = linear(heads, *w.c_proj)  # (B, T, HD) -> (B, T, C)
    tap(f"{name}.out", out)
    return out


def mlp(x: Array, w: MLP, tap: Tap, name: str) -> Array:
    """Two linear maps with a GELU between, each position by itself: (B, T, C) -> (B, T, C)."""
    hidden = linear(x, *w.c_fc)  # (B, T, C) -> (B, T, F)
    tap(f"{name}.c_fc", hidden)
    hidden = ACTIVATIONS[w.activation](hidden)
    tap(f"{name}.gelu", hidden)
    out = linear(hidden, *w.c_proj)  # (B, T, F) -> (B, T, C)
    tap(f"{name}.out", out)
    return out


def block(x: Array, w: BlockWeights, cache: Array, start: int, mask: Mask, tap: Tap, name: str) -> Array:
    """One transformer block; each half reads a normalised copy and adds to the stream: (B, T, C) -> (B, T, C)."""
    normed = layer_norm(x, *w.ln_1)
    tap(f"{name}.ln_1", normed)
    x = x + attention(normed, w.attn, cache, start, mask, tap, f"{name}.attn")
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
    mask: Mask = causal_mask,
    tap: Tap = no_tap,
) -> Array:
    """The whole stack: ids and positions (B, T) -> last_hidden_state (B, T, C).

    caches: L arrays (2, B, H, >= start + T, D), read up to `start` and written from there, see `attention`.
    """
    x = embed(input_ids, position_ids, w.wte, w.wpe)  # (B, T) -> (B, T, C)
    tap("embed", x)
    for i, (block_weights, cache) in enumerate(zip(w.h, caches, strict=True)):
        x = block(x, block_weights, cache, start, mask, tap, f"h.{i}")
    x = layer_norm(x, *w.ln_f)
    tap("ln_f", x)
    return x


def logits(hidden: Array, lm_head: Array, lm_head_bias: Array, tap: Tap = no_tap) -> Array:
    """A score for every token of the vocabulary: (B, T, C) @ (C, V) -> (B, T, V)."""
    scores = hidden @ lm_head.T
    if lm_head_bias.size:  # GPT-2 has none
        scores = scores + lm_head_bias
    tap("logits", scores)
    return scores


def log_probabilities(scores: Array, targets: Array) -> tuple[Array, Array]:
    """The log-softmax of scores (..., V) at tokens (..., n), float64, and whether no token has a higher score."""
    highest = scores.max(axis=-1, keepdims=True)
    chosen = np.take_along_axis(scores, targets, axis=-1)
    sums = np.exp(scores - highest).sum(axis=-1, keepdims=True, dtype=np.float64)
    return chosen.astype(np.float64) - highest - np.log(sums), chosen == highest


def greedy(input_ids: Array, w: GPT2Weights, steps: int) -> Array:
    """Add the most probable next token, `steps` times: ids (B, T) -> (B, T + steps).

    Only the new token runs through the model: the caches keep what the later ones need of those before.
    """
    B, T = input_ids.shape
    caches = [
        np.empty((2, B, h.attn.n_head, T + steps, len(h.attn.c_proj.weight) // h.attn.n_head), w.wte.dtype) for h in w.h
    ]
    ids, start = input_ids, 0
    for _ in range(steps):
        positions = np.arange(start, ids.shape[1])[None].repeat(B, axis=0)
        hidden = transformer(ids[:, start:], positions, w, caches, start)
        start = ids.shape[1]
        best = logits(hidden[:, -1:], w.lm_head, w.lm_head_bias).argmax(axis=-1)  # (B, 1)
        ids = np.concatenate([ids, best], axis=1)
    return ids
