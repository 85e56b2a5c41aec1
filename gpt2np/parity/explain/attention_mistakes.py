"""The usual mistakes inside the attention: c_attn and its heads, the scale, the mask, the softmax, the merge."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations, permutations
from typing import Any

import numpy as np

from ...call import Call
from ...weights import Array
from ..operations import Run, masked_softmax, split_tap, tap_inputs, with_past
from ..program import Program
from .gradients import F64
from .mistakes import misread, own_weights
from .problem import Guess, Problem, afterwards, fit, remade

LARGEST = 32  # heads, of models of which every way to share them is tried


def c_attn(problem: Problem, layer: int) -> Iterator[Guess]:
    """Guesses at the map that makes q, k and v: the order of its columns, its heads, its weights."""
    p = problem.program
    name = f"h.{layer}.attn.c_attn"
    taps = [f"h.{layer}.attn.{x}" for x in "qkv"]

    def columns(order: Array) -> dict[str, Callable[[], Array]]:
        return remade(problem, lambda w: w[..., order], f"{name}.weight", f"{name}.bias")

    yield from _column_orders(problem, taps, columns)
    yield from _transposed_parts(problem, taps, f"{name}.weight")
    yield from _heads_and_positions(problem, taps)

    def unmoved(q: Program, call: Call, tap: str, x: list[Array], dtype: Any) -> Array:
        value = p.run(tap, call, x, dtype)  # (B, H, T, D)
        return value.transpose(0, 2, 1, 3).reshape(value.shape)

    if problem.call.input_ids.shape[1] > 1:
        text = "(B, T, HD) were reshaped to (B, H, T, D) without transposing"
        yield Guess("head_split", taps[0], text, runs=dict.fromkeys(taps, unmoved))
    grid = np.arange(3 * p.config.n_head * p.config.head_size).reshape(3, p.config.n_head, -1)
    for heads, which, first in _head_orders(problem, layer):
        swapped = grid.copy()
        for w in which:
            swapped[w] = grid[w][heads]
        moved = " and ".join(str(i) for i, head in enumerate(heads) if i != head)
        text = f"heads {moved} of {', '.join('qkv'[w] for w in which)} were swapped"
        yield Guess("swapped_heads", taps[first], text, weights=columns(swapped.ravel()))
    yield from own_weights(problem, next((t for t in taps if t in problem.suspects), taps[0]), name)
    yield from _parts_missing(problem, taps, name)


def _column_orders(
    problem: Problem, taps: list[str], columns: Callable[[Array], dict[str, Callable[[], Array]]]
) -> Iterator[Guess]:
    """c_attn's thirds, heads and numbers in another order."""
    H, D = problem.program.config.n_head, problem.program.config.head_size
    grid = np.arange(3 * H * D).reshape(3, H, D)
    for order in permutations(range(3)):
        if order != (0, 1, 2):
            first = next(i for i in range(3) if order[i] != i)
            text = f"c_attn's thirds were in the order {', '.join('qkv'[i] for i in order)}"
            yield Guess("qkv_order", taps[first], text, weights=columns(grid[list(order)].ravel()))
    index = grid.ravel()
    for text, order_in in (
        ("(H, 3, D)", index.reshape(H, 3, D).transpose(1, 0, 2)),
        ("(H, D, 3)", index.reshape(H, D, 3).transpose(2, 0, 1)),
        ("(3, D, H)", index.reshape(3, D, H).transpose(0, 2, 1)),
        ("(D, 3, H)", index.reshape(D, 3, H).transpose(1, 2, 0)),
        ("(D, H, 3)", index.reshape(D, H, 3).transpose(2, 1, 0)),
    ):
        there = order_in.ravel()
        back = np.argsort(there)
        for order_of, words in ((there, f"{text} read as (3, H, D)"), (back, f"(3, H, D) read as {text}")):
            yield Guess("head_split", taps[0], f"c_attn's columns were {words}", weights=columns(order_of))


def _transposed_parts(problem: Problem, taps: list[str], key: str) -> Iterator[Guess]:
    """c_attn's weight, or a third of it, transposed."""
    C, width = problem.program.weights.shape(key)[0], problem.program.weights.shape(key)[1] // 3
    for which in [(0,), (1,), (2,), (0, 1, 2)] if C == width else []:

        def flipped(weight: Array, which: tuple[int, ...] = which) -> Array:
            new = weight.copy()
            for w in which:
                new[:, w * C : (w + 1) * C] = weight[:, w * C : (w + 1) * C].T
            return new

        text = f"the {''.join('qkv'[w] for w in which)} part of {key} were transposed"
        yield Guess("transposed", taps[which[0]], text, weights=remade(problem, flipped, key))
    yield from misread(problem, taps[0], key)


def _parts_missing(problem: Problem, taps: list[str], name: str) -> Iterator[Guess]:
    """The bias, or the weight, of q, k or v alone is missing."""
    bias = problem.program.weights(f"{name}.bias", F64)
    for w, tap in enumerate(taps):
        gone = np.arange(bias.size) * 3 // bias.size == w
        if bias[gone].any():
            text = f"the {'qkv'[w]} part of {name}.bias were missing"
            yield Guess("missing_bias", tap, text, weights={f"{name}.bias": np.where(gone, 0, bias)})
        text = f"the {'qkv'[w]} part of {name}.weight were zeros"
        zeroed = remade(problem, lambda x, gone=gone: np.where(gone, 0, x), f"{name}.weight")  # type: ignore[misc]
        yield Guess("missing_weight", tap, text, weights=zeroed)


def _heads_and_positions(problem: Problem, taps: list[str]) -> Iterator[Guess]:
    """What other transformers do with q, k and v: rotary positions, keys and values that all heads share."""
    p, D = problem.program, problem.program.config.head_size

    def run(change: Callable[[Array, Call], Array]) -> Run:
        return lambda q, call, tap, x, dtype: change(p.run(tap, call, x, dtype), call)

    def rotated(x: Array, call: Call, pairs: bool) -> Array:
        angles = call.position_ids[:, None, :, None] / 10000.0 ** (np.arange(D // 2) * 2 / D)
        first, second = (x[..., ::2], x[..., 1::2]) if pairs else (x[..., : D // 2], x[..., D // 2 :])
        sine, cosine = np.sin(angles).astype(x.dtype), np.cos(angles).astype(x.dtype)
        turned = first * cosine - second * sine, first * sine + second * cosine
        return np.stack(turned, axis=-1).reshape(x.shape) if pairs else np.concatenate(turned, axis=-1)

    if D % 2 == 0 and problem.call.input_ids.shape[1] > 1:
        for pairs, words in ((False, "halves"), (True, "neighbours")):
            turn = run(lambda x, call, pairs=pairs: rotated(x, call, pairs))  # type: ignore[misc]
            text = f"q and k were rotated by their positions (rotary embedding, of {words})"
            yield Guess("rotary", taps[0], text, runs=dict.fromkeys(taps[:2], turn))
    yield from _normalised(taps, run)
    yield from _other_head_count(problem, taps)
    yield from _shared(problem, taps, run)


def _shared(
    problem: Problem, taps: list[str], run: Callable[[Callable[[Array, Call], Array]], Run]
) -> Iterator[Guess]:  # fmt: skip
    """Keys and values that heads share, as in newer models, or sequences; and such whose memory is misread."""
    B, H = problem.call.input_ids.shape[0], problem.program.config.n_head
    for n in range(2, H + 1) if H <= LARGEST else (H,):
        if H % n == 0:
            first = f"heads {n} by {n} had the keys and values of the first of them"
            text = "all heads had the keys and values of head 0" if n == H else first
            share = run(lambda x, call, n=n: x[:, ::n].repeat(n, axis=1))  # type: ignore[misc]
            yield Guess("shared_heads", taps[1], text, runs=dict.fromkeys(taps[1:], share))
            if n < H:
                text = f"the keys and values of the first {H // n} heads served all heads in turn"
                share = run(lambda x, call, n=n: np.tile(x[:, : x.shape[1] // n], (1, n, 1, 1)))  # type: ignore[misc]
                yield Guess("shared_heads", taps[1], text, runs=dict.fromkeys(taps[1:], share))
    if B > 1:
        share = run(lambda x, call: np.broadcast_to(x[:1], x.shape))
        text = "every sequence had the keys and values of the first one"
        yield Guess("shared_batch", taps[1], text, runs=dict.fromkeys(taps[1:], share))
    for some, words in ((taps[1:2], "keys'"), (taps[2:], "values'"), (taps[1:], "keys' and values'")):
        flip = run(lambda x, call: x.swapaxes(-1, -2).reshape(x.shape))
        text = f"the {words} (D, T) were read as (T, D)"
        yield Guess("head_split", some[0], text, runs=dict.fromkeys(some, flip))


def _normalised(taps: list[str], run: Callable[[Callable[[Array, Call], Array]], Run]) -> Iterator[Guess]:
    """Queries and keys normalised, head by head, as some newer models have them."""

    def over(centre: bool, mean: bool) -> Run:
        def change(x: Array, call: Call) -> Array:
            x = x - x.mean(axis=-1, keepdims=True) if centre else x
            square = (x * x).mean(axis=-1, keepdims=True) if mean else (x * x).sum(axis=-1, keepdims=True)
            return np.asarray(x / np.sqrt(square + 1e-5))

        return run(change)

    for words, centre, mean in (("layer norm", True, True), ("RMS norm", False, True), ("length 1", False, False)):
        text = f"each head's q and k were normalised ({words})"
        yield Guess("qk_norm", taps[0], text, runs=dict.fromkeys(taps[:2], over(centre, mean)))


def _other_head_count(problem: Problem, taps: list[str]) -> Iterator[Guess]:
    """The same q, k and v cut into another number of heads, their scores scaled by these heads' size."""
    p, layer = problem.program, split_tap(taps[0])[0]
    H, D = p.config.n_head, p.config.head_size
    scores, heads = f"h.{layer}.attn.scores", f"h.{layer}.attn.heads"

    def cut(x: Array, n: int) -> Array:  # (B, H, T, D) -> (B, n, T, HD / n)
        flat = x.swapaxes(1, 2)
        return flat.reshape(*flat.shape[:2], n, -1).swapaxes(1, 2)

    def run(n: int) -> Run:
        def of(q: Program, call: Call, tap: str, x: list[Array], dtype: Any) -> Array:
            if tap == scores:
                keys, factor = cut(with_past(call, layer or 0, 0, x[1]), n), math.sqrt(n / H)
                return np.asarray(cut(x[0], n) @ keys.swapaxes(-1, -2) * (p.config.layer_scale(layer or 0) * factor))
            if x[0].shape[1] != n:  # the probabilities were given, of our heads
                return p.run(tap, call, x, dtype)
            mixed = (x[0] @ cut(with_past(call, layer or 0, 1, x[1]), n)).swapaxes(1, 2)
            return mixed.reshape(*mixed.shape[:2], H * D)

        return of

    for n in dict.fromkeys((H // 2, 2 * H, 1, 4, 8, 12, 16, 20, 25, 32)):
        if n and n != H and H * D % n == 0:
            text, now = f"there were {n} heads of {H * D // n} numbers", f"{H} of {D}"
            yield Guess("head_count", taps[0], text, now, runs={scores: run(n), heads: run(n)})


def _head_orders(problem: Problem, layer: int) -> Iterator[tuple[list[int], tuple[int, ...], int]]:
    """Orders of heads that q, k, v may have been swapped into: (order, which of q, k, v, first of them).

    Where k, v (or q) are observed, their heads are matched directly; q alone is tried pair by pair.
    """
    H = problem.program.config.n_head
    same = list(range(H))
    found: dict[int, list[int]] = {}
    for w, letter in enumerate("qkv"):
        tap = f"h.{layer}.attn.{letter}"
        if tap in problem.observed:
            target, value = problem.observed[tap], problem.values[tap]  # (B, H, T, D)
            if not (np.isfinite(target).all() and np.isfinite(value).all()):
                return
            cost = np.array([[float(np.square(target[:, a] - value[:, b]).mean()) for b in same] for a in same])
            order = [int(i) for i in cost.argmin(axis=1)]
            if sorted(order) == same and order != same:
                found[w] = order
    for w, order in found.items():
        yield order, (w,), w
    for orders in {tuple(o) for o in found.values()}:
        fitting = tuple(w for w in found if found[w] == list(orders))
        yield list(orders), fitting, fitting[0]
        if 0 not in found:
            yield list(orders), (0, *fitting), 0
    if not found:
        for a, b in combinations(same, 2):
            order = same.copy()
            order[a], order[b] = b, a
            for which in ((0,), (0, 1, 2), (1, 2), (1,), (2,), (0, 1)):
                taps = [f"h.{layer}.attn.{'qkv'[w]}" for w in which]
                if not any(tap in problem.observed or tap in problem.given for tap in taps):
                    yield order, which, which[0]


def scale(problem: Problem, tap: str) -> Iterator[Guess]:
    """Guesses at the scale of the scores."""
    p = problem.program
    layer = split_tap(tap)[0]
    assert layer is not None
    now, D = p.config.layer_scale(layer), p.config.head_size
    right = 1 / math.sqrt(D)
    candidates = {
        "1/sqrt(D)": right, "there is none": 1.0, "applied twice, 1/D": right * right, "2/sqrt(D)": 2 * right,
        "0.5/sqrt(D)": right / 2, "1/sqrt(C)": 1 / math.sqrt(p.config.n_embd), "sqrt(D)": math.sqrt(D),
        "1/D^0.25": D**-0.25, "1/sqrt(D) divided by the layer's number": right / (layer + 1),
        "4/sqrt(D)": 4 * right, "0.25/sqrt(D)": right / 4, "that of most layers": p.config.attn_scale or right,
    }  # fmt: skip
    for words, value in candidates.items():
        if not math.isclose(value, now, rel_tol=1e-4):
            by_layer = "by the layer" in words
            text = f"the scores were scaled by {words if by_layer else f'{value:.5g} ({words})'}"
            yield Guess("scale", tap, text, f"{now:.5g}", runs=scaled(problem, tap, value / now))


def other_scores(problem: Problem, tap: str) -> Iterator[Guess]:
    """What other transformers do with scores: cap them, or lower them with the distance between query and key."""
    for c in (50, 30, 20, 10, 5, 2, 1):
        capped = afterwards(problem, tap, lambda x, c=c: c * np.tanh(x / c))  # type: ignore[misc]
        yield Guess("scores_form", tap, f"the scores were capped: {c} tanh(scores / {c})", runs=capped)
    H = problem.program.config.n_head
    slopes = 2.0 ** (-8.0 * (np.arange(H) + 1) / H)[:, None, None]

    def biased(x: Array, relative: bool) -> Array:
        T, S = x.shape[-2:]
        distance = np.arange(S)[None] - (np.arange(S - T, S)[:, None] if relative else 0)
        return np.asarray(x + (slopes * distance).astype(x.dtype))

    for relative in (True, False) if tap in problem.observed else (True,):  # a softmax sees no difference
        runs = afterwards(problem, tap, lambda x, relative=relative: biased(x, relative))  # type: ignore[misc]
        yield Guess("alibi", tap, "the scores were lowered with distance, by another slope for each head (ALiBi)",
                    runs=runs)  # fmt: skip


def scaled(problem: Problem, tap: str, factor: float) -> dict[str, Run]:
    return afterwards(problem, tap, lambda x: x * factor)


def fitted_scale(problem: Problem, tap: str) -> Guess:
    """The scale of the scores of one layer that removes most of the error."""
    now = problem.program.config.layer_scale(split_tap(tap)[0] or 0)

    def make(value: float) -> Guess:
        text = f"the scores were scaled by {value:.6g}"
        return Guess("scale", tap, text, f"{now:.5g}", runs=scaled(problem, tap, value / now))

    return fit(problem, make, now)


def mask(problem: Problem, tap: str) -> Iterator[Guess]:
    """Masks: by what MaskRule can say of them, by which keys each query sees, and without the caller's mask."""
    config = problem.program.config
    now, call = config.mask, problem.call

    def masked(**change: Any) -> dict[str, Run]:
        other = replace(config, mask=replace(now, **change))
        return {tap: lambda p, call, name, x, dtype: masked_softmax(x[0], other, call.attention_mask)}

    def keys(shift: int) -> str:
        return "up to i" + (f" {'+-'[shift < 0]} {abs(shift)}" if shift else "")

    T = call.input_ids.shape[1]
    S = call.start + T
    if call.attention_mask is not None and (call.attention_mask == 0).any():
        unused = {tap: lambda p, call, name, x, dtype: masked_softmax(x[0], config, None)}
        yield Guess("mask_unused", tap, "attention_mask were not used", runs=unused)
    for shift in dict.fromkeys((0, 1, -1, 2, -2, -call.start)):
        if shift != now.shift or now.kind == "none":
            cause = "mask_missing" if now.kind == "none" else "mask_shift"
            words = "; the mask were not moved on by the past" if shift and shift == -call.start else ""
            text = f"query i saw keys {keys(shift)}{words}"
            change = {"kind": "replaced", "value": -1e4} if now.kind == "none" else {}
            yield Guess(cause, tap, text, f"keys {keys(now.shift)}", runs=masked(shift=shift, **change))
    yield Guess("mask_missing", tap, "there were no causal mask at all", runs=masked(kind="none", shift=S))
    query, key = np.arange(S - T, S)[:, None], np.arange(S)
    shapes = [(f"the mask were block-wise, in blocks of {n}", key // n <= query // n) for n in (2, 4, 8, 16) if n < S]
    shapes += [
        (f"each query saw only its last {n} keys", (key <= query) & (key > query - n))
        for n in (*range(1, 17), 32, 64, 128, 256)
        if n < S
    ]
    shapes += [("the mask were upside down: queries saw later keys only", key >= query)]
    for text, seen in shapes:
        yield Guess("mask_shape", tap, text, runs={tap: seeing(seen)})
    values: list[tuple[float, str]] = [
        (v, k) for v in (-1e4, -1.0, -2.0, -5.0, -10.0, -20.0, -50.0, -100.0, -1e3) for k in ("replaced", "added")
    ]
    fitted = _fitted_mask(problem, tap)
    for value, kind in [*values, (0.0, "replaced"), *fitted]:
        if (value, kind) != (now.value, now.kind):
            verb = "became" if kind == "replaced" else "had added"
            text, have = f"masked scores {verb} {value:.5g}", f"{now.value:.5g} ({now.kind})"
            yield Guess("mask_value", tap, text, have, runs=masked(value=value, kind=kind),
                        fitted=int((value, kind) in fitted))  # fmt: skip


def seeing(seen: Array) -> Run:
    return lambda p, call, tap, x, dtype: softmax_of(x[0], seen)


def softmax_of(scores: Array, seen: Array, axis: int = -1, base: float = math.e, more: float = 0.0) -> Array:
    """Softmax over the keys that are seen, or what mistakes make of it."""
    scores = np.where(seen, scores, -np.inf)
    high = np.maximum(scores.max(axis=axis, keepdims=True), np.finfo(np.float64).min)
    exps = np.power(base, scores - high) if base != math.e else np.exp(scores - high)
    return np.asarray(exps / np.maximum(exps.sum(axis=axis, keepdims=True) + more * np.exp(-high), 1e-300))


def other_softmax(problem: Problem, tap: str) -> Iterator[Guess]:
    """Softmaxes that are none, and masks that MaskRule has no words for: the probabilities show both."""
    call = problem.call
    T = call.input_ids.shape[1]
    S = call.start + T
    causal = np.arange(S) <= np.arange(S - T, S)[:, None]
    if call.attention_mask is not None and call.attention_mask.ndim == 2:
        causal = causal & (call.attention_mask != 0)[:, None, None, :]

    def form(f: Callable[[Array], Array]) -> dict[str, Run]:
        return {tap: lambda p, call, name, x, dtype: f(x[0])}

    def undivided(x: Array) -> Array:
        x = np.where(causal, x, -np.inf)
        return np.asarray(np.exp(x - np.maximum(x.max(axis=-1, keepdims=True), -1e300)))

    def late(x: Array, again: bool) -> Array:
        probs = np.where(causal, softmax_of(x, np.ones_like(causal)), 0)
        return probs / np.maximum(probs.sum(axis=-1, keepdims=True), 1e-300) if again else probs

    for text, f in (
        ("exp were not divided by the sum", undivided),
        ("softmax ran over the queries, not over the keys", lambda x: softmax_of(x, causal, axis=-2)),
        (
            "softmax ran over the heads, not over the keys",
            lambda x: np.where(causal, softmax_of(x, causal, axis=-3), 0),
        ),
        ("the softmax had base 2", lambda x: softmax_of(x, causal, base=2.0)),
        ("1 were added to the softmax's denominator", lambda x: softmax_of(x, causal, more=1.0)),
        ("the mask came after the softmax: the rows do not sum to 1", lambda x: late(x, False)),
        ("masked scores were 0 before the softmax", lambda x: softmax_of(np.where(causal, x, 0), np.ones_like(causal))),
        ("there were no softmax at all", lambda x: np.where(causal, x, 0)),
        ("the softmax were a sigmoid", lambda x: np.where(causal, 1 / (1 + np.exp(-x)), 0)),
        ("softmax were applied twice", lambda x: softmax_of(softmax_of(x, causal), causal)),
    ):
        yield Guess("softmax_form", tap, text, runs=form(f))
    probs, scores = problem.observed.get(tap), problem.input(tap)
    if probs is None or scores is None or not np.isfinite(scores).all() or not np.isfinite(probs).all():
        return
    seen = np.asarray(np.greater(probs, 0).any(axis=(0, 1)))  # (T, S): keys that some head looks at
    allowed = causal if causal.ndim == 2 else causal.any(axis=(0, 1))
    different = np.flatnonzero(np.not_equal(seen, allowed).any(axis=-1))
    if len(different) and seen.any(axis=-1).all():
        rows = []
        for row in sorted({int(different[0]), int(different[-1])}):
            keys = np.flatnonzero(seen[row])
            some = "some of " if len(keys) <= keys[-1] - keys[0] else ""
            rows.append(f"query {row} saw {some}keys {keys[0]} to {keys[-1]}, not 0 to {row + S - T}")
        guess = Guess(
            "mask_shape", tap, f"the mask were another: {'; '.join(rows)}", runs=form(lambda x: softmax_of(x, seen))
        )
        guess.fitted = len(different)
        yield guess


def _fitted_mask(problem: Problem, tap: str) -> list[tuple[float, str]]:
    """The mask value that observed probabilities imply: log p - score is one constant per row, up to it."""
    if tap not in problem.observed:
        return []
    probs, scores = problem.observed[tap], problem.values[tap_inputs(tap, problem.program.config)[0]]
    T, S = scores.shape[-2:]
    forbidden = np.arange(S) > np.arange(S - T, S)[:, None]
    forbidden = np.broadcast_to(forbidden, probs.shape) & (probs > 1e-30)
    if not forbidden.any():
        return []
    with np.errstate(divide="ignore"):
        log = np.log(probs)
    diagonal = np.arange(S - T, S)[None, None, :, None]
    own = np.take_along_axis(log - scores, np.broadcast_to(diagonal, (*probs.shape[:3], 1)), axis=-1)
    with np.errstate(invalid="ignore"):
        effective = (log - own)[forbidden]
    added = effective - scores[forbidden]
    fitted = [(float(np.median(effective)), "replaced"), (float(np.median(added)), "added")]
    return [(value, kind) for value, kind in fitted if abs(value) > 1e-3]


def merge(problem: Problem, tap: str) -> Iterator[Guess]:
    """Guesses at how the heads were put side by side."""
    H, D = problem.program.config.n_head, problem.program.config.head_size

    def unmoved(p: Program, call: Call, name: str, x: list[Array], dtype: Any) -> Array:
        merged = problem.program.run(name, call, x, dtype)  # (B, T, HD)
        B, T, _ = merged.shape
        return merged.reshape(B, T, H, D).transpose(0, 2, 1, 3).reshape(B, T, H * D)

    yield Guess("head_split", tap, "(B, H, T, D) were reshaped to (B, T, HD) without transposing", runs={tap: unmoved})

    def ordered(order: Array) -> Run:
        return lambda p, call, name, x, dtype: problem.program.run(name, call, x, dtype)[..., order]

    grid = np.arange(H * D).reshape(H, D)
    yield Guess("head_split", tap, "heads were merged as (D, H)", runs={tap: ordered(grid.T.ravel())})
    yield Guess("head_split", tap, "heads were merged from (D, H)", runs={tap: ordered(np.argsort(grid.T.ravel()))})
    for a, b in combinations(range(H), 2) if tap in problem.observed else ():  # else they are c_proj's rows
        order = grid.copy()
        order[[a, b]] = order[[b, a]]
        yield Guess("swapped_heads", tap, f"heads {a} and {b} were swapped", runs={tap: ordered(order.ravel())})
    seen = problem.observed.get(tap)
    still = [] if seen is None else np.flatnonzero(~seen.reshape(-1, H, D).any(axis=(0, 2))).tolist()
    for dead in [still] if seen is not None else [[h] for h in range(H)]:
        if dead and len(dead) < H:
            yield _dead_heads(problem, tap, dead)


def _dead_heads(problem: Problem, tap: str, dead: list[int]) -> Guess:
    """Heads whose results are zeros, and as its next steps one more of them."""
    H, D = problem.program.config.n_head, problem.program.config.head_size
    alive = np.repeat(~np.isin(np.arange(H), dead), D)
    text = f"head{'s' if len(dead) > 1 else ''} {', '.join(map(str, sorted(dead)))} gave zeros"
    rest = [h for h in range(H) if h not in dead] if len(dead) < H - 1 else []
    return Guess("dead_head", tap, text, runs=afterwards(problem, tap, lambda x: x * alive),
                 more=lambda: (_dead_heads(problem, tap, [*dead, h]) for h in rest))  # fmt: skip
