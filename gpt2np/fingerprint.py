"""SHA-256 of what a model computes, for each way of computing it: they must all be one and the same.

The results of three fixed texts, and what they say of each next token, are computed by one call each, in chunks, token
by token, in batches, after a cache was cut back, with drafts, with the weights kept in each number of bits that holds
them, and on every number of threads. For one text, all of these have the same bits; in float32 other machines with
fused multiply-add do the same operations in the same order (docs/scale.md says where the result was seen). Two things
are the machine's own: in float64 exp, erf and tanh come from the system's mathematical library, and where nothing is
fused, sums round twice.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from .arrays import Array, narrow_form
from .cache import KVCache
from .drafts import Drafter, DraftingCache
from .model import GPT2

LONGEST = 64  # tokens of a text: more than one chain of every kernel, and few enough for a second


class Fingerprint(NamedTuple):
    """One way of computing the texts, and the hash of what came out."""

    way: str
    sha256: str


class Result(NamedTuple):
    """What is hashed of one text of T tokens."""

    hidden: Array  # (T, C)
    logits: Array  # (T, V)
    past: Array  # (L, 2, H, T, D)
    logs: Array  # (T - 1,), log-probabilities of all tokens but the first, float64


Way = Callable[[GPT2, list[Array]], list[Result]]


def texts(model: GPT2) -> list[Array]:
    """Three lists of token ids, of different lengths, that depend on nothing but the sizes of the model."""
    longest = min(LONGEST, model.config.n_ctx)
    lengths = longest, max(1, 3 * longest // 4), max(1, longest // 3)
    return [np.arange(T) * (31 * np.arange(T) + 7 + 12 * i) % model.config.vocab_size for i, T in enumerate(lengths)]


def _result(model: GPT2, ids: Array, hidden: Array, logits: Array, past: Array) -> Result:
    logs, _ = model.log_probabilities(logits[:-1], ids[1:, None])
    return Result(hidden, logits, past, logs[:, 0])


def _in_pieces(model: GPT2, ids: Array, ends: list[int], cache: KVCache | None = None) -> tuple[Array, Array, Array]:
    """One text in calls that end before these positions; of those that a given cache holds already, only the past."""
    start = 0 if cache is None else cache.length
    cache = model.new_cache() if cache is None else cache
    parts = []
    for end in ends:
        parts.append(model(ids[None, start:end], cache=cache))
        start = end
    logits = [part.logits[0] for part in parts if part.logits is not None]
    past = np.stack([layer[:, 0] for layer in parts[-1].past])
    return np.concatenate([part.last_hidden_state[0] for part in parts]), np.concatenate(logits), past


def _in_calls(model: GPT2, given: list[Array], ends: Callable[[int], list[int]]) -> list[Result]:
    """Each text of T tokens in calls that end before ends(T)."""
    return [_result(model, ids, *_in_pieces(model, ids, ends(len(ids)))) for ids in given]


def _whole(model: GPT2, given: list[Array]) -> list[Result]:
    return _in_calls(model, given, lambda T: [T])


def _chunks(model: GPT2, given: list[Array]) -> list[Result]:
    return _in_calls(model, given, lambda T: sorted({1, 1 + T // 7, T // 2 + 1, T}))


def _single(model: GPT2, given: list[Array]) -> list[Result]:
    return _in_calls(model, given, lambda T: list(range(1, T + 1)))


def _batch(model: GPT2, given: list[Array]) -> list[Result]:
    """Each text beside two others of its length."""
    found = []
    for ids in given:
        others = [ids, (ids + 1) % model.config.vocab_size, ids[::-1]]
        out = model(np.stack([others[1], ids, others[2]]))
        assert out.logits is not None
        past = np.stack([layer[:, 1] for layer in out.past])
        found.append(_result(model, ids, out.last_hidden_state[1], out.logits[1], past))
    return found


def _ragged(model: GPT2, given: list[Array]) -> list[Result]:
    """All texts in one batch, padded on the left."""
    S = max(map(len, given))
    ids, mask = (np.zeros((len(given), S), np.int64) for _ in range(2))
    for row, text in enumerate(given):
        ids[row, S - len(text) :], mask[row, S - len(text) :] = text, 1
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    out = model(ids, attention_mask=mask, position_ids=positions)
    assert out.logits is not None
    found = []
    for b, text in enumerate(given):
        at = slice(S - len(text), S)
        past = np.stack([layer[:, b, :, at] for layer in out.past])
        found.append(_result(model, text, out.last_hidden_state[b, at], out.logits[b, at], past))
    return found


def _prefix(model: GPT2, given: list[Array]) -> list[Result]:
    """The first half is kept from a text that goes on in another way."""
    found = []
    for ids in given:
        half = len(ids) // 2
        other = np.concatenate([ids[:half], (ids[half:] + 1) % model.config.vocab_size])
        cache = model.new_cache()
        begun = model(other[None], cache=cache)
        cache.crop(half)
        *rest, past = _in_pieces(model, ids, [len(ids)], cache)
        assert begun.logits is not None
        first = begun.last_hidden_state[0, :half], begun.logits[0, :half]
        hidden, logits = (np.concatenate(pair) for pair in zip(first, rest, strict=True))
        found.append(_result(model, ids, hidden, logits, past))
    return found


class _Guesses(Drafter):
    """The next tokens of a known text, of which the last ones are wrong: none right, one, two ..., all but one."""

    def __init__(self, ids: Array, count: int) -> None:
        super().__init__((count,))
        self._ids = ids

    def draft(self, text: list[int], most: int) -> list[int]:
        count = min(most, *self._lengths)
        right = len(text) % max(count, 1)
        guessed = self._ids[len(text) :][:count].tolist()
        return guessed[:right] + [token - 1 if token else 1 for token in guessed[right:]]


def _drafts(model: GPT2, given: list[Array]) -> list[Result]:
    """Token by token, with drafts run along; as these have no hidden states, those of one call stand for them."""
    from .kernels import ROWS

    found = []
    for ids, whole in zip(given, _whole(model, given), strict=True):
        cache, text = model.new_cache(), ids.tolist()
        decoder = DraftingCache(model, None, cache, _Guesses(ids, ROWS - 1))
        scores = decoder.prefill([text[:1]])
        for end in range(2, len(text) + 1):
            scores += decoder.feed([0], [text[:end]])
        past = np.stack([layer[:, 0] for layer in cache.views()])
        found.append(_result(model, ids, whole.hidden, np.stack(scores), past))
    return found


WAYS: dict[str, Way] = {
    "prompt": _whole,
    "chunks": _chunks,
    "single tokens": _single,
    "batch": _batch,
    "ragged batch": _ragged,
    "prefix reuse": _prefix,
    "drafts": _drafts,
}


def _kept_in(form: str, part: Any, used: set[str]) -> Any:
    """Weights, or a part of them, each matrix in this form if that holds it, else in float32; `used`: all forms met."""
    from .kernels import Panels, pack_matrix, unpack

    if isinstance(part, Panels):
        matrix = unpack(part)
        panels = pack_matrix(matrix, form=None if form == "float32" else narrow_form([matrix], [form]))
        used |= {panels.form, part.form}
        return panels
    if isinstance(part, tuple):
        parts = [_kept_in(form, each, used) for each in part]
        return type(part)(*parts) if hasattr(part, "_fields") else tuple(parts)
    return part


def digest(results: list[Result]) -> str:
    """SHA-256 of the numbers, least significant byte first."""
    total = hashlib.sha256()
    for array in (array for result in results for array in result):
        total.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())
    return total.hexdigest()


def fingerprints(model: GPT2) -> Iterator[Fingerprint]:
    """Compute the texts in every way; the engine must be the kernels."""
    from .kernels import get_num_threads, set_num_threads
    from .kernels.layout import FORMS

    given = texts(model)
    for name, way in WAYS.items():
        yield Fingerprint(name, digest(way(model, given)))
    used: set[str] = set()
    for form in (*FORMS, "float32") if model.dtype == np.float32 else ():
        other = copy.copy(model)
        other._weights = _kept_in(form, model._weights, used)
        if form in used and used != {"float32"}:  # for float32: where some matrices are in fewer bits otherwise
            yield Fingerprint(f"weights in {form}", digest(_whole(other, given)))
    threads = get_num_threads()
    try:
        for count in range(1, threads + 1):
            set_num_threads(count)
            yield Fingerprint(f"{count} thread{'s' * (count > 1)}", digest(_whole(model, given)))
    finally:
        set_num_threads(threads)
