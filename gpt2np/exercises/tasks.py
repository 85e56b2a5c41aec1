"""What each exercise asks, on which inputs it is tried, and the mistakes that the debugger does not know."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from .. import bpe, reference
from ..activations import ACTIVATIONS
from ..arrays import Array
from ..convert.synthetic import make_config, random_weights
from ..model import GPT2
from . import answers

Function = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """One input: the arguments, and what they are in the words of the debugger."""

    words: str  # as "B = 2, T = 5, 3 cached"
    arguments: tuple[Any, ...]
    given: dict[str, Array] = field(default_factory=dict)  # taps that the arguments are
    past: tuple[Array, ...] | None = None  # (2, B, H, P, D) for each layer


@dataclass(frozen=True)
class Exercise:
    """One function to write.

    right : the textbook's, or the solution
    cases : dtype -> the inputs
    results : what the function gives, in order; the debugger knows those that are names of taps
    inside : whether the function calls `tap` on its way
    mistakes : usual mistakes by their description, each as a whole function
    """

    name: str
    chapter: int
    signature: str
    task: str
    right: Function
    cases: Callable[[Any], Iterator[Case]]
    results: tuple[str, ...] = ("the result",)
    inside: tuple[str, ...] = ()
    mistakes: dict[str, Function] = field(default_factory=dict)
    mutates: int | None = None  # the argument that the function writes to
    floats: bool = True  # whether it is tried in float32, too
    arrays: bool = True  # whether the results are arrays

    @property
    def taps(self) -> tuple[str, ...]:
        return tuple(name for name in self.results if name.startswith(("h.", "ln_f", "logits")))


SIZES = ((1, 1, 0), (1, 6, 0), (2, 5, 0), (2, 4, 3), (1, 1, 5))  # B, T and the cached positions of each try


# A GPT-2 with random weights, small enough to answer at once: D = 8
CONFIG = make_config(n_layer=2, n_head=3, n_embd=24, n_ctx=32, vocab_size=61)
SOURCES = random_weights(CONFIG, seed=7)


@cache
def subject(dtype: str) -> GPT2:
    """The model that the exercises are about."""
    return GPT2(CONFIG, SOURCES, "numpy", dtype)


def draw(dtype: Any, *shape: int, seed: int = 0, size: float = 1.0) -> Array:
    return (size * np.random.default_rng((seed, *shape)).standard_normal(shape)).astype(dtype)


def sizes(P: int, B: int, T: int) -> str:
    return f"B = {B}, T = {T}" + (f", {P} cached" if P else "")


def embed_cases(dtype: Any) -> Iterator[Case]:
    w = subject(np.dtype(dtype).name).weights
    for B, T, P in SIZES:
        ids = np.random.default_rng(B + T).integers(0, len(w.wte), (B, T))
        positions = np.arange(P, P + T)[None].repeat(B, axis=0)
        yield Case(sizes(P, B, T), (ids, positions, w.wte, w.wpe))


def layer_norm_cases(dtype: Any) -> Iterator[Case]:
    norm = subject(np.dtype(dtype).name).weights.h[0].ln_1
    for (B, T, _), size in zip(SIZES, (1.0, 0.01, 1.0, 0.003, 30.0), strict=True):  # epsilon shows where x is small
        x = draw(dtype, B, T, 24, size=size) + np.asarray(size / 2, dtype)
        yield Case(f"B = {B}, T = {T}, numbers of about {size:g}", (x, *norm), {"embed": x})


def softmax_cases(dtype: Any) -> Iterator[Case]:
    for (B, T, P), size in zip(SIZES, (1.0, 3.0, 1.0, 1000.0, 1.0), strict=True):
        x = draw(dtype, B, 3, T, P + T, size=size)
        yield Case(f"scores ({B}, 3, {T}, {P + T}) of about {size:g}", (x,))


def mask_cases(dtype: Any) -> Iterator[Case]:
    for B, T, P in SIZES:
        yield Case(sizes(P, B, T), (draw(dtype, B, 3, T, P + T),))


def head_cases(dtype: Any) -> Iterator[Case]:
    for B, T, P in SIZES:
        q, k, v = (draw(dtype, B, 3, n, 8, seed=s) for s, n in enumerate((T, P + T, P + T)))
        past = tuple(np.stack([k[:, :, :P], v[:, :, :P]]) for _ in range(2)) if P else None
        given = {"h.0.attn.q": q, "h.0.attn.k": k[:, :, P:], "h.0.attn.v": v[:, :, P:]}
        yield Case(sizes(P, B, T), (q, k, v, 1 / math.sqrt(8)), given, past)


def split_cases(dtype: Any) -> Iterator[Case]:
    w = subject(np.dtype(dtype).name).weights.h[0].attn
    for B, T, _ in SIZES:
        x = draw(dtype, B, T, 24)
        yield Case(sizes(0, B, T), (reference.linear(x, *w.c_attn), 3), {"h.0.ln_1": x})


def merge_cases(dtype: Any) -> Iterator[Case]:
    for B, T, _ in SIZES:
        probs = reference.softmax(reference.causal_mask(draw(dtype, B, 3, T, T)))
        v = draw(dtype, B, 3, T, 8)
        yield Case(sizes(0, B, T), (probs @ v,), {"h.0.attn.probs": probs, "h.0.attn.v": v})


def attention_cases(dtype: Any) -> Iterator[Case]:
    yield from _with_cache(dtype, "h.0.ln_1", lambda w: w.h[0].attn, "h.0.attn")


def block_cases(dtype: Any) -> Iterator[Case]:
    yield from _with_cache(dtype, "embed", lambda w: w.h[0], "h.0")


def _with_cache(dtype: Any, tap: str, part: Callable[[Any], Any], name: str) -> Iterator[Case]:
    w = part(subject(np.dtype(dtype).name).weights)
    for B, T, P in SIZES:
        x = draw(dtype, B, T, 24)
        cache = np.zeros((2, B, 3, P + T + 2, 8), dtype)
        cache[:, :, :, :P] = draw(dtype, 2, B, 3, P, 8)
        past = tuple(cache[:, :, :, :P].copy() for _ in range(2)) if P else None
        arguments = (x, w, cache, P, reference.causal_mask, reference.no_tap, name)
        yield Case(sizes(P, B, T), arguments, {tap: x}, past)


def gelu_cases(dtype: Any) -> Iterator[Case]:
    for words, x in (
        ("numbers from -6 to 6", np.linspace(-6, 6, 480, dtype=dtype).reshape(1, 5, 96)),
        ("B = 2, T = 3", draw(dtype, 2, 3, 96, size=2.0)),
    ):
        yield Case(words, (x,), {"h.0.mlp.c_fc": x})


def mlp_cases(dtype: Any) -> Iterator[Case]:
    w = subject(np.dtype(dtype).name).weights.h[0].mlp
    for B, T, _ in SIZES[:3]:
        x = draw(dtype, B, T, 24, size=2.0)
        yield Case(sizes(0, B, T), (x, w, reference.no_tap, "h.0.mlp"), {"h.0.ln_2": x})


def logits_cases(dtype: Any) -> Iterator[Case]:
    w = subject(np.dtype(dtype).name).weights
    for B, T, _ in SIZES[:3]:
        x = draw(dtype, B, T, 24)
        yield Case(sizes(0, B, T), (x, w.lm_head), {"ln_f": x})


def loss_cases(dtype: Any) -> Iterator[Case]:
    for B, T, size in ((1, 4, 1.0), (2, 5, 3.0), (1, 3, 800.0)):
        targets = np.random.default_rng(T).integers(0, 61, (B, T))
        scores = draw(dtype, B, T, 61, size=size)
        targets[0, 0] = scores[0, 0].argmax()
        yield Case(f"B = {B}, T = {T}, scores of about {size:g}", (scores, targets))


def word_cases(dtype: Any) -> Iterator[Case]:
    learned = ("h e", "l l", "he ll", "hell o", "b c", "a b", "a a", "c d", "a bc")
    ranks = {(left, right): rank for rank, (left, right) in enumerate(pair.split() for pair in learned)}
    for word in ("hello", "abc", "bcd", "aab", "aaaaa", "abcab", "x", "helloabhello"):
        yield Case(repr(word), (word, ranks))


def greedy_cases(dtype: Any) -> Iterator[Case]:
    w = subject(np.dtype(dtype).name).weights
    for B, T, steps in ((1, 3, 4), (2, 5, 6), (1, 1, 8), (2, 2, 1)):
        ids = np.random.default_rng(T).integers(0, 61, (B, T))
        yield Case(f"B = {B}, T = {T}, {steps} steps", (ids, w, steps))


def sample_cases(dtype: Any) -> Iterator[Case]:
    logits = draw(dtype, 12, size=1.5)
    for temperature, k, p in (
        (1.0, 12, 1.0),
        (0.5, 12, 1.0),
        (2.0, 12, 1.0),
        (1.0, 3, 1.0),
        (1.0, 12, 0.6),
        (1.5, 5, 0.8),
    ):
        words = f"temperature {temperature}, top-k {k}, top-p {p}"
        yield Case(words, (logits, temperature, k, p))


def quantise_cases(dtype: Any) -> Iterator[Case]:
    for seed, shape in enumerate(((4, 6), (24, 72), (7, 3))):
        scales = np.geomspace(0.05, 4, shape[1]).astype(dtype)  # columns of different size
        yield Case(f"a weight {shape}", (draw(dtype, *shape, seed=seed) * scales,))


def tile_cases(dtype: Any) -> Iterator[Case]:
    for m, k, n, tile in ((4, 8, 4, 4), (6, 10, 7, 4), (5, 3, 9, 2)):
        a, b = draw(dtype, m, k), draw(dtype, k, n, seed=1)
        yield Case(f"({m}, {k}) @ ({k}, {n}), tiles of {tile}", (a, b, tile))


_TASKS = (
    Exercise(
        "merge", 1, "merge(word, ranks)",
        "Join neighbours of the string `word` until no pair is in `ranks`, always the pair of the lowest rank first "
        "(of equal ones the leftmost). Return the list of parts.",
        bpe.merge, word_cases, mistakes=answers.MERGE, floats=False, arrays=False,
    ),
    Exercise(
        "embed", 2, "embed(input_ids, position_ids, wte, wpe)",
        "Token vector plus position vector: ids and positions (B, T) -> (B, T, C).",
        reference.embed, embed_cases, mistakes=answers.EMBED,
    ),
    Exercise(
        "layer_norm", 3, "layer_norm(x, weight, bias, epsilon)",
        "Give each vector mean 0 and variance 1, then scale and shift: (..., C) -> (..., C).",
        reference.layer_norm, layer_norm_cases, ("h.0.ln_1",),
    ),
    Exercise(
        "softmax", 4, "softmax(scores)",
        "Scores to probabilities along the last axis, for scores of any size.",
        reference.softmax, softmax_cases, mistakes=answers.SOFTMAX,
    ),
    Exercise(
        "causal_mask", 4, "causal_mask(scores)",
        "Scores (B, H, T, S) -> the same with -inf wherever a key lies after the query. The T queries are the last T "
        "of the S positions.",
        reference.causal_mask, mask_cases, mistakes=answers.MASK,
    ),
    Exercise(
        "head", 4, "head(q, k, v, scale)",
        "q (B, H, T, D), k and v (B, H, S, D) -> the probabilities (B, H, T, S) and the mix of values (B, H, T, D), "
        "with the causal mask.",
        answers.head, head_cases, ("h.0.attn.probs", "the mix of values"), mistakes=answers.HEAD,
    ),
    Exercise(
        "split_heads", 5, "split_heads(qkv, n_head)",
        "Cut (B, T, 3HD) into queries, keys and values of each head: 3 x (B, H, T, D).",
        reference.split_heads, split_cases, ("h.0.attn.q", "h.0.attn.k", "h.0.attn.v"),
    ),
    Exercise(
        "merge_heads", 5, "merge_heads(mixed)",
        "Put the heads side by side again: (B, H, T, D) -> (B, T, HD).",
        answers.merge_heads, merge_cases, ("h.0.attn.heads",),
    ),
    Exercise(
        "attention", 5, "attention(x, w, cache, start, mask, tap, name)",
        "The whole attention, (B, T, C) -> (B, T, C). Write the new keys and values into `cache` (2, B, H, >= S, D) at "
        "start..S-1. If you call `tap(f\"{name}.q\", q)` and so on as the textbook does, the answer can say more.",
        reference.attention, attention_cases, ("h.0.attn.out",),
        tuple(f"h.0.attn.{x}" for x in ("q", "k", "v", "scores", "probs", "heads", "out")), answers.ATTENTION, 2,
    ),
    Exercise(
        "gelu", 6, "gelu(x)", "GELU by tanh, as GPT-2 computes it.",
        ACTIVATIONS["gelu_tanh"], gelu_cases, ("h.0.mlp.gelu",), mistakes=answers.GELU,
    ),
    Exercise(
        "mlp", 6, "mlp(x, w, tap, name)",
        "Two linear maps with a GELU between: (B, T, C) -> (B, T, C). `w` has c_fc, c_proj and the activation's name.",
        reference.mlp, mlp_cases, ("h.0.mlp.out",), ("h.0.mlp.c_fc", "h.0.mlp.gelu", "h.0.mlp.out"),
    ),
    Exercise(
        "block", 7, "block(x, w, cache, start, mask, tap, name)",
        "One block: both halves read a normalised copy and add to the stream. You may call reference.attention and "
        "reference.mlp.",
        reference.block, block_cases, ("h.0.resid_post",),
        tuple(f"h.0.{x}" for x in (
            "ln_1", "attn.q", "attn.k", "attn.v", "attn.scores", "attn.probs", "attn.heads", "attn.out", "resid_mid",
            "ln_2", "mlp.c_fc", "mlp.gelu", "mlp.out", "resid_post",
        )), answers.BLOCK, 2,
    ),
    Exercise(
        "logits", 8, "logits(hidden, lm_head)",
        "A score for every token: (B, T, C) and lm_head (V, C) -> (B, T, V).",
        answers.logits, logits_cases, ("logits",), mistakes=answers.LOGITS,
    ),
    Exercise(
        "cross_entropy", 8, "cross_entropy(logits, targets)",
        "The loss at each position, -log of the probability of its target: (B, T, V) and (B, T) -> (B, T).",
        answers.cross_entropy, loss_cases, mistakes=answers.LOSS,
    ),
    Exercise(
        "greedy", 10, "greedy(input_ids, w, steps)",
        "Add the most probable token `steps` times: ids (B, T) -> (B, T + steps).",
        reference.greedy, greedy_cases, mistakes=answers.GREEDY, floats=False,
    ),
    Exercise(
        "distribution", 11, "distribution(logits, temperature, k, p)",
        "The probabilities (V,) that the next token is drawn from: temperature, then the k best, then the fewest of "
        "these that have at least p of their probability together.",
        answers.distribution, sample_cases, mistakes=answers.SAMPLE,
    ),
    Exercise(
        "matmul_tiles", 14, "matmul_tiles(a, b, tile)",
        "a @ b, computed tile by tile: no product of more than `tile` rows by `tile` columns at a time; the sizes need "
        "not be multiples of `tile`.",
        answers.matmul_tiles, tile_cases, mistakes=answers.TILES,
    ),
    Exercise(
        "quantise", 15, "quantise(weight)",
        "A weight (inputs, outputs) as int8 and one scale for each column, the largest number of each column becoming "
        "127: (integers as a float array, scales (outputs,)).",
        answers.quantise, quantise_cases, ("the array of integers", "the array of scales"), mistakes=answers.QUANTISE,
    ),
)  # fmt: skip
EXERCISES = {exercise.name: exercise for exercise in _TASKS}
