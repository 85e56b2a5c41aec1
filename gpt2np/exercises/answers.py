"""Solutions that the textbook does not hold, and usual mistakes that the debugger has no words for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from .. import reference
from ..arrays import Array
from ..reference import softmax

Mistakes = dict[str, Callable[..., Any]]


def head(q: Array, k: Array, v: Array, scale: float) -> tuple[Array, Array]:
    """One call of attention's middle: probabilities (B, H, T, S) and the mix of values (B, H, T, D)."""
    probs = softmax(reference.causal_mask(q @ k.swapaxes(-1, -2) * scale))
    return probs, probs @ v


def merge_heads(mixed: Array) -> Array:
    """(B, H, T, D) -> (B, T, HD)."""
    B, _, T, _ = mixed.shape
    return mixed.transpose(0, 2, 1, 3).reshape(B, T, -1)


def logits(hidden: Array, lm_head: Array) -> Array:
    """(B, T, C) @ (C, V) -> (B, T, V)."""
    return hidden @ lm_head.T


def cross_entropy(scores: Array, targets: Array) -> Array:
    """-log p(target), by the logarithm of the softmax's sum: (B, T, V) and (B, T) -> (B, T)."""
    shifted = scores - scores.max(axis=-1, keepdims=True)
    log_sum = np.log(np.exp(shifted).sum(axis=-1))
    return log_sum - np.take_along_axis(shifted, targets[..., None], axis=-1)[..., 0]


def distribution(scores: Array, temperature: float, k: int, p: float) -> Array:
    """Temperature, then top-k, then top-p: (V,) -> (V,)."""
    probs = softmax(scores / temperature)
    order = np.argsort(-probs, kind="stable")[:k]
    kept = probs[order] / probs[order].sum()
    order = order[np.cumsum(kept) - kept < p]
    out = np.zeros_like(probs)
    out[order] = probs[order] / probs[order].sum()
    return out


def quantise(weight: Array) -> tuple[Array, Array]:
    """Each column by a scale of its own: integers (inputs, outputs) and scales (outputs,)."""
    scales = np.abs(weight).max(axis=0) / 127
    return np.rint(weight / scales), scales


def matmul_tiles(a: Array, b: Array, tile: int) -> Array:
    """a @ b by blocks of `tile` rows and `tile` columns."""
    out = np.empty((len(a), b.shape[1]), a.dtype)
    for i in range(0, len(a), tile):
        for j in range(0, b.shape[1], tile):
            out[i : i + tile, j : j + tile] = a[i : i + tile] @ b[:, j : j + tile]
    return out


def _exp(x: Array) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        return np.exp(x)


def _ratio(a: Array, b: Array) -> Array:
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        return a / b


SOFTMAX: Mistakes = {
    "the maximum is not taken off: exp of a large score is infinite": lambda s: _ratio(
        _exp(s), _exp(s).sum(axis=-1, keepdims=True)
    ),
    "the sum runs over the queries (axis -2), not over the keys": lambda s: (
        softmax(s.swapaxes(-1, -2)).swapaxes(-1, -2)
    ),
    "the sum runs over the heads": lambda s: np.moveaxis(softmax(np.moveaxis(s, 1, -1)), -1, 1),
    "exp without the division by the sum": lambda s: _exp(s - s.max(axis=-1, keepdims=True)),
    "one sum for the whole array": lambda s: _exp(s - s.max()) / _exp(s - s.max()).sum(),
    "the logarithm of the probabilities": lambda s: s - s.max(-1, keepdims=True) - np.log(
        _exp(s - s.max(-1, keepdims=True)).sum(-1, keepdims=True)
    ),
    "2 ** x in place of exp(x)": lambda s: softmax(s * np.log(2).astype(s.dtype)),
}  # fmt: skip


def _masked(scores: Array, seen: Callable[[Array, Array, int, int], Array], hidden: float = -np.inf) -> Array:
    T, S = scores.shape[-2:]
    return np.where(seen(np.arange(T)[:, None], np.arange(S), T, S), scores, np.asarray(hidden, scores.dtype))


MASK: Mistakes = {
    "the queries count as the first T positions: the cached keys are left out of the count": lambda s: _masked(
        s, lambda i, j, T, S: j <= i
    ),
    "mask off by 1: query i sees key i + 1, which it should predict": lambda s: _masked(
        s, lambda i, j, T, S: j <= i + S - T + 1
    ),
    "mask off by 1: a query does not see its own key": lambda s: _masked(s, lambda i, j, T, S: j < i + S - T),
    "upside down: it hides what came before": lambda s: _masked(s, lambda i, j, T, S: j >= i + S - T),
    "no causal mask at all": lambda s: s,
    "0 in place of -inf: exp(0) is 1, so hidden keys still count": lambda s: _masked(
        s, lambda i, j, T, S: j <= i + S - T, 0
    ),
    "1 and 0 in place of scores and -inf": lambda s: _masked(np.ones_like(s), lambda i, j, T, S: j <= i + S - T, 0),
    "a large negative number in place of -inf: a probability remains where all scores are lower": lambda s: _masked(
        s, lambda i, j, T, S: j <= i + S - T, -1e4
    ),
    "a large negative number (-1e9) in place of -inf": lambda s: _masked(s, lambda i, j, T, S: j <= i + S - T, -1e9),
}

HEAD: Mistakes = {
    "the scale divides: scores / scale": lambda q, k, v, scale: head(q, k, v, 1 / scale),
    "the scale is applied after the softmax": lambda q, k, v, scale: (
        head(q, k, v, 1)[0] * scale, head(q, k, v, 1)[1] * scale
    ),
    "the keys are mixed, not the values": lambda q, k, v, scale: (head(q, k, v, scale)[0], head(q, k, v, scale)[0] @ k),
}  # fmt: skip

EMBED: Mistakes = {
    "positions start again at 0, whatever is cached: position_ids is not used": lambda ids, positions, wte, wpe: (
        wte[ids] + wpe[np.arange(ids.shape[1])]
    ),
    "the position embedding is not added": lambda ids, positions, wte, wpe: wte[ids],
    "the token embedding is not added": lambda ids, positions, wte, wpe: wpe[positions],
    "the two vectors are multiplied, not added": lambda ids, positions, wte, wpe: wte[ids] * wpe[positions],
    "ids and positions change places": lambda ids, positions, wte, wpe: wte[positions] + wpe[ids % len(wpe)],
    "positions are off by 1": lambda ids, positions, wte, wpe: wte[ids] + wpe[positions + 1],
    "wte is scaled by sqrt(C), as in the paper of 2017": lambda ids, positions, wte, wpe: (
        wte[ids] * np.sqrt(wte.shape[1]).astype(wte.dtype) + wpe[positions]
    ),
}

_K = float(np.sqrt(2 / np.pi))
GELU: Mistakes = {
    "the factor 0.5 is missing": lambda x: 2 * _gelu(x),
    "x * x in place of x * x * x in the tanh": lambda x: 0.5 * x * (1 + np.tanh(_K * (x + 0.044715 * x * x))),
    "the factor x is missing: this is only the gate": lambda x: 0.5 * (1 + np.tanh(_K * (x + 0.044715 * x**3))),
    "sqrt(2 / pi) is missing": lambda x: 0.5 * x * (1 + np.tanh(x + 0.044715 * x**3)),
    "2 / pi without its root": lambda x: 0.5 * x * (1 + np.tanh(2 / np.pi * (x + 0.044715 * x**3))),
    "sqrt(2 * pi) in place of sqrt(2 / pi)": lambda x: (
        0.5 * x * (1 + np.tanh(np.sqrt(2 * np.pi) * (x + 0.044715 * x**3)))
    ),
}


def _gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(_K * (x + 0.044715 * x * x * x)))


def _elsewhere(x: Array, w: Any, cache: Array, start: int, mask: Any, tap: Any, name: str) -> Array:
    """Attention that writes its keys and values to the front of the cache, over the cached ones."""
    other = cache.copy()
    out = reference.attention(x, w, other, start, mask, tap, name)
    T = x.shape[1]
    cache[:, :, :, :T] = other[:, :, :, start : start + T]
    return out


def _unwritten(x: Array, w: Any, cache: Array, start: int, mask: Any, tap: Any, name: str) -> Array:
    return reference.attention(x, w, cache.copy(), start, mask, tap, name)


def _forgetful(x: Array, w: Any, cache: Array, start: int, mask: Any, tap: Any, name: str) -> Array:
    """Attention over the new positions alone."""
    T = x.shape[1]
    reference.attention(x, w, cache, start, mask, reference.no_tap, name)
    new = np.zeros_like(cache[:, :, :, :T])
    return reference.attention(x, w, new, 0, reference.causal_mask, reference.no_tap, name)


def _swapped(x: Array, w: Any, cache: Array, start: int, mask: Any, tap: Any, name: str) -> Array:
    out = reference.attention(x, w, cache, start, mask, tap, name)
    T = x.shape[1]
    cache[:, :, :, start : start + T] = cache[::-1, :, :, start : start + T].copy()
    return out


def _with_softmax(probabilities: Callable[[Array], Array]) -> Callable[..., Array]:
    """Attention with another softmax."""

    def attention(x: Array, w: Any, cache: Array, start: int, mask: Any, tap: Any, name: str) -> Array:
        S = start + x.shape[1]
        q, k, v = reference.split_heads(reference.linear(x, *w.c_attn), w.n_head)
        cache[0, :, :, start:S], cache[1, :, :, start:S] = k, v
        probs = probabilities(mask(q @ cache[0, :, :, :S].swapaxes(-1, -2) * w.scale))
        return reference.linear(merge_heads(probs @ cache[1, :, :, :S]), *w.c_proj)

    return attention


ATTENTION: Mistakes = {
    "exp without the division by the sum": _with_softmax(lambda s: _exp(s - s.max(axis=-1, keepdims=True))),
    "softmax over the queries, not over the keys": _with_softmax(
        lambda s: _ratio(_exp(s), _exp(s).sum(axis=-2, keepdims=True))
    ),
    "no softmax: the scores themselves mix the values": _with_softmax(lambda s: np.where(np.isfinite(s), s, 0)),
    "the new keys and values are written to the front of the cache, over the old ones": _elsewhere,
    "the new keys and values are not written to the cache": _unwritten,
    "the cached keys and values are not read": _forgetful,
    "values are written in place of keys and keys in place of values": _swapped,
    "the result of c_proj is missing: the heads are returned": lambda *arguments: _heads(*arguments),
}


def _heads(x: Array, w: Any, cache: Array, start: int, mask: Any, tap: Any, name: str) -> Array:
    found: dict[str, Array] = {}
    reference.attention(x, w, cache, start, mask, found.__setitem__, name)
    return found[f"{name}.heads"]


def _post_norm(x: Array, w: Any, cache: Array, start: int, mask: Any, tap: Any, name: str) -> Array:
    """Layer norm after each addition, as the transformer of 2017 and GPT-1 have it."""
    x = reference.layer_norm(x + reference.attention(x, w.attn, cache, start, mask, tap, f"{name}.attn"), *w.ln_1)
    return reference.layer_norm(x + reference.mlp(x, w.mlp, tap, f"{name}.mlp"), *w.ln_2)


def _parallel(x: Array, w: Any, cache: Array, start: int, mask: Any, tap: Any, name: str) -> Array:
    """Both halves read the stream that came in, as GPT-J has it."""
    attended = reference.attention(reference.layer_norm(x, *w.ln_1), w.attn, cache, start, mask, tap, f"{name}.attn")
    return x + attended + reference.mlp(reference.layer_norm(x, *w.ln_2), w.mlp, tap, f"{name}.mlp")


def _no_mlp(x: Array, w: Any, cache: Array, start: int, mask: Any, tap: Any, name: str) -> Array:
    return x + reference.attention(reference.layer_norm(x, *w.ln_1), w.attn, cache, start, mask, tap, f"{name}.attn")


BLOCK: Mistakes = {
    "layer norm comes after each addition, as in GPT-1; GPT-2 has it before each half": _post_norm,
    "attention and MLP both read the stream that came in (GPT-J); GPT-2's MLP reads it after the attention": _parallel,
    "the MLP is left out": _no_mlp,
}

LOGITS: Mistakes = {
    "probabilities in place of scores: the softmax belongs to the loss": lambda x, head: softmax(x @ head.T),
    "the last position alone": lambda x, head: x[:, -1:] @ head.T,
    "scaled by 1/sqrt(C)": lambda x, head: x @ head.T / np.sqrt(x.shape[-1]).astype(x.dtype),
}


def _log(x: Array) -> Array:
    with np.errstate(divide="ignore"):
        return np.log(x)


def _picked(values: Array, targets: Array) -> Array:
    return np.take_along_axis(values, targets[..., None], axis=-1)[..., 0]


LOSS: Mistakes = {
    "the sign: the loss is minus the logarithm": lambda s, t: -cross_entropy(s, t),
    "the logarithm of a probability that has become 0 is -inf: take the logarithm before rounding to 0": lambda s, t: (
        -_log(_picked(softmax(s), t))
    ),
    "the logarithm is missing: 1 - p is no cross-entropy": lambda s, t: 1 - _picked(softmax(s), t),
    "the probability of the target, without the logarithm": lambda s, t: _picked(softmax(s), t),
    "log2 in place of log: bits, not nats": lambda s, t: cross_entropy(s, t) / np.log(2).astype(s.dtype),
    "the score of the target, without the softmax": lambda s, t: -_picked(s, t),
    "the mean over all positions, where each position's own is asked for": lambda s, t: np.asarray(
        cross_entropy(s, t).mean()
    ),
    "the sum over all positions, where each position's own is asked for": lambda s, t: np.asarray(
        cross_entropy(s, t).sum()
    ),
    "targets are shifted by one position: this has been done by whoever made them": lambda s, t: cross_entropy(
        s, np.roll(t, -1, axis=1)
    ),
    "without the maximum taken off: exp of a large score is infinite": lambda s, t: (
        _log(_exp(s).sum(axis=-1)) - _picked(s, t)
    ),
}


def _merge_leftmost(word: str, ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Joins the leftmost pair that is in the list, whatever its rank."""
    parts = list(word)
    while True:
        found = [i for i, pair in enumerate(pairwise(parts)) if pair in ranks]
        if not found:
            return parts
        parts[found[0] : found[0] + 2] = [parts[found[0]] + parts[found[0] + 1]]


def _merge_once(word: str, ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Joins one pair and stops."""
    parts = list(word)
    pairs = [(ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in ranks]
    if pairs:
        i = min(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _merge_by(word: str, ranks: Mapping[tuple[str, str], int], last: bool, right: bool) -> list[str]:
    parts = list(word)
    while True:
        pairs = [
            (-ranks[pair] if last else ranks[pair], -i if right else i)
            for i, pair in enumerate(pairwise(parts)) if pair in ranks
        ]  # fmt: skip
        if not pairs:
            return parts
        i = abs(min(pairs)[1])
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def _merge_in_one_pass(word: str, ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Goes through the list of merges once, and joins every occurrence of each."""
    parts = list(word)
    for a, b in sorted(ranks, key=lambda pair: -ranks[pair]):
        i = 0
        while i < len(parts) - 1:
            if (parts[i], parts[i + 1]) == (a, b):
                parts[i : i + 2] = [a + b]
            i += 1
    return parts


def _longest(word: str, ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """The longest token that fits, from the left: no merges at all."""
    tokens = {a + b for a, b in ranks}
    parts = []
    while word:
        n = max((n for n in range(1, len(word) + 1) if word[:n] in tokens), default=1)
        parts.append(word[:n])
        word = word[n:]
    return parts


MERGE: Mistakes = {
    "the leftmost pair is joined, not the one of the lowest rank": _merge_leftmost,
    "one pair is joined and then it stops: go on until no pair is left": _merge_once,
    "the highest rank first: the lowest was learned first": lambda word, ranks: _merge_by(word, ranks, True, False),
    "of equal pairs the rightmost first": lambda word, ranks: _merge_by(word, ranks, False, True),
    "the list of merges is gone through once, from its end": _merge_in_one_pass,
    "the longest token that fits is taken from the left: BPE has no such rule": _longest,
    "nothing is joined: these are the letters": lambda word, ranks: list(word),
    "the word is returned as one string": lambda word, ranks: word,
}


def _greedy(ids: Array, w: Any, steps: int, pick: Callable[[Array], Array], offset: int = 0) -> Array:
    """Without a cache: the whole text through the model for each token."""
    for _ in range(steps):
        B, T = ids.shape
        H, D = w.h[0].attn.n_head, len(w.h[0].attn.c_proj.weight) // w.h[0].attn.n_head
        caches = [np.empty((2, B, H, T, D), w.wte.dtype) for _ in w.h]
        positions = (np.arange(T)[None].repeat(B, axis=0) + offset) % len(w.wpe)
        scores = reference.transformer(ids, positions, w, caches) @ w.lm_head.T  # (B, T, V)
        ids = np.concatenate([ids, pick(scores)[:, None]], axis=1)
    return ids


def _stale(ids: Array, w: Any, steps: int) -> Array:
    """With a cache, and every new token at position 0."""
    B, T = ids.shape
    H, D = w.h[0].attn.n_head, len(w.h[0].attn.c_proj.weight) // w.h[0].attn.n_head
    caches = [np.empty((2, B, H, T + steps, D), w.wte.dtype) for _ in w.h]
    out, start, new = ids, 0, ids
    for _ in range(steps):
        positions = np.arange(new.shape[1])[None].repeat(B, axis=0)
        hidden = reference.transformer(new, positions, w, caches, start)
        start += new.shape[1]
        new = (hidden[:, -1:] @ w.lm_head.T).argmax(axis=-1)
        out = np.concatenate([out, new], axis=1)
    return out


GREEDY: Mistakes = {
    "positions start again at 0 after the cached ones": _stale,
    "the scores of the first position are used, not those of the last": lambda ids, w, n: _greedy(
        ids, w, n, lambda s: s[:, 0].argmax(axis=-1)
    ),
    "the least probable token is taken": lambda ids, w, n: _greedy(ids, w, n, lambda s: s[:, -1].argmin(axis=-1)),
    "only the new tokens are returned, without the prompt": lambda ids, w, n: reference.greedy(ids, w, n)[
        :, ids.shape[1] :
    ],
    "one token too few": lambda ids, w, n: reference.greedy(ids, w, n - 1),
    "one token too many": lambda ids, w, n: reference.greedy(ids, w, n + 1),
    "positions are off by 1": lambda ids, w, n: _greedy(ids, w, n, lambda s: s[:, -1].argmax(axis=-1), 1),
    "the earlier tokens are forgotten: each is predicted from the one before alone": lambda ids, w, n: _memoryless(
        ids, w, n
    ),
}


def _memoryless(ids: Array, w: Any, steps: int) -> Array:
    for _ in range(steps):
        new = _greedy(ids[:, -1:], w, 1, lambda s: s[:, -1].argmax(axis=-1))[:, -1:]
        ids = np.concatenate([ids, new], axis=1)
    return ids


def _without(scores: Array, keep: Array) -> Array:
    return softmax(np.where(keep, scores, np.asarray(-np.inf, scores.dtype)))


def _nucleus(scores: Array, t: float, k: int, p: float, inside: Callable[[Array, float], Array]) -> Array:
    probs = softmax(scores / t)
    order = np.argsort(-probs, kind="stable")[:k]
    kept = probs[order] / probs[order].sum()
    keep = np.zeros(len(probs), bool)
    keep[order[inside(kept, p)]] = True
    return np.where(keep, probs, 0) / max(probs[keep].sum(), np.finfo(probs.dtype).tiny)


SAMPLE: Mistakes = {
    "the logits are multiplied by the temperature, not divided": lambda s, t, k, p: distribution(s * t * t, t, k, p),
    "the temperature is not used": lambda s, t, k, p: distribution(s, 1.0, k, p),
    "the probabilities are divided by the temperature, not the logits": lambda s, t, k, p: (
        distribution(s, 1.0, k, p) / t
    ),
    "top-k is not used": lambda s, t, k, p: distribution(s, t, len(s), p),
    "top-k keeps one too many": lambda s, t, k, p: distribution(s, t, k + 1, p),
    "top-p is not used": lambda s, t, k, p: distribution(s, t, k, 1.0),
    "what is left does not add up to 1: divide by its sum": lambda s, t, k, p: np.where(
        distribution(s, t, k, p) > 0, softmax(s / t), 0
    ),
    "top-p leaves out the token that brings the sum to p": lambda s, t, k, p: _nucleus(
        s, t, k, p, lambda kept, p: np.cumsum(kept) <= p + 1e-12
    ),
    "top-p takes its p before the temperature": lambda s, t, k, p: _without(s / t, distribution(s, 1.0, k, p) > 0),
    "top-p takes p of all the probability, where it is p of what top-k has left": lambda s, t, k, p: _without(
        s / t, (distribution(s, t, k, 1.0) > 0) & (distribution(s, t, len(s), p) > 0)
    ),
    "the k least probable are kept": lambda s, t, k, p: _without(s / t, np.argsort(np.argsort(s)) < k),
}

TILES: Mistakes = {
    "what is left over at the edge is never computed": lambda a, b, t: _edges(a, b, t),
    "a @ b.T in place of a @ b": lambda a, b, t: a @ b.reshape(b.shape[1], b.shape[0]).T,
    "the sum over the inner dimension stops after the first tile": lambda a, b, t: a[:, :t] @ b[:t],
}


def _edges(a: Array, b: Array, tile: int) -> Array:
    out = np.zeros((len(a), b.shape[1]), a.dtype)
    m, n = len(a) // tile * tile, b.shape[1] // tile * tile
    out[:m, :n] = (a @ b)[:m, :n]
    return out


def _quantised(weight: Array, scales: Array, round_: Callable[[Array], Array] = np.rint) -> tuple[Array, Array]:
    return round_(weight / scales), np.broadcast_to(scales, weight.shape[1:])


QUANTISE: Mistakes = {
    "one scale for the whole weight": lambda w: _quantised(w, np.abs(w).max(keepdims=True)[0] / 127),
    "a scale for each row, where each column is to have one": lambda w: (
        np.rint(w / (np.abs(w).max(axis=1, keepdims=True) / 127)), np.abs(w).max(axis=1) / 127
    ),
    "the largest number becomes 128, which int8 does not have": lambda w: _quantised(w, np.abs(w).max(axis=0) / 128),
    "the largest number becomes 255: that is uint8": lambda w: _quantised(w, np.abs(w).max(axis=0) / 255),
    "the numbers are cut off, not rounded": lambda w: _quantised(w, np.abs(w).max(axis=0) / 127, np.trunc),
    "the numbers are rounded down, not to the nearest": lambda w: _quantised(w, np.abs(w).max(axis=0) / 127, np.floor),
    "the largest number is taken, not the largest absolute one: negative ones pass -127": lambda w: (
        _quantised(w, w.max(axis=0) / 127)
    ),
    "the scale is the other way round: 127 / max": lambda w: (quantise(w)[0], 1 / quantise(w)[1]),
    "nothing is rounded": lambda w: _quantised(w, np.abs(w).max(axis=0) / 127, lambda x: x),
}  # fmt: skip
