"""One step of generating: the texts as rows inside a model, and the choice of each row's next token.

`LanguageModel` and `Decoder` are all that the loop (`generate.py`) and beam search (`beams.py`) know of a model: GPT2
keeps caches, one for each row or one for all, and a model without a cache reads each text anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from . import sampling
from .cache import KVCache
from .sampling import Sampling
from .tokenizer import StreamDecoder
from .weights import Array

if TYPE_CHECKING:
    import tokenizers

    from .model import GPT2

NO_IDS = np.zeros(0, np.int64)


class Decoder(Protocol):
    """Several texts, one a row, inside a model."""

    def prefill(self, texts: Sequence[list[int]]) -> Sequence[Array]:
        """Read these texts; the logits (V,) of what follows each."""
        ...

    def feed(self, rows: Sequence[int], texts: Sequence[list[int]]) -> Sequence[Array]:
        """Go on with row rows[i] as row i, which has become texts[i] by one more token; the logits (V,) of each."""
        ...


class Sizes(Protocol):
    """What generating needs of a configuration."""

    @property
    def n_ctx(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...


class LanguageModel(Protocol):
    """What generating needs of a model."""

    @property
    def config(self) -> Sizes: ...
    @property
    def tokenizer(self) -> tokenizers.Tokenizer | None: ...
    def decoder(
        self, rows: int, window: int | None = None, cache: KVCache | None = None, lookup: bool = False
    ) -> Decoder:
        """A decoder of up to `rows` rows.

        window: the tokens that a full context begins anew with, or None where no text becomes so long.
        cache: what it has read of its one row already. lookup: whether to guess tokens ahead, see `drafts`.
        """
        ...

    def log_probabilities(self, scores: Array, targets: Array) -> tuple[Array, Array]:
        """The log-softmax of scores (..., V) at tokens (..., n), float64, and more; `reference` has one for any."""
        ...


class Step(NamedTuple):
    """One new token of one sequence."""

    row: int  # which prompt of a batch it belongs to
    token_id: int
    text: str  # what can be shown now that it was not before; "" without a tokenizer
    logprob: float  # natural log of the model's own probability of the token, before penalty, temperature and filters
    top: tuple[tuple[int, float], ...]  # the `logprobs` most probable tokens, (id, logprob)
    finish: str | None  # on the last step of a row: "length", "eos" or "stop"


class Stopper:
    """Finds strings in a text that arrives in pieces, and holds back what may be the beginning of one.

    The string that is complete first counts, whatever the cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """The text that can be shown now, and whether a stop string was found right after it."""
        if not self._stops:
            return piece, False
        text = self._held + piece
        found = [(start + len(s), start) for s in self._stops if (start := text.find(s)) >= 0]
        if found:
            return text[: min(found)[1]], True
        longest = max(map(len, self._stops)) - 1
        held = next(
            (n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in self._stops)), 0
        )
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def flush(self) -> str:
        """What was held back and has not become a stop string."""
        return self._held


@dataclass(slots=True)
class Row:
    """One prompt and what has been added to it."""

    row: int
    ids: list[int]
    limit: float  # new tokens at most
    ends: frozenset[int]
    sampler: Sampling
    rng: np.random.Generator
    logprobs: int
    log_probabilities: Callable[[Array, Array], tuple[Array, Array]]
    decoder: StreamDecoder | None
    stopper: Stopper
    new: int = 0
    seen: Array | None = None  # (V,) bool; for the repetition penalty only

    def take(self, logits: Array) -> Step:
        """Choose the next token from the logits (V,)."""
        ids = self._seen_ids(logits.size)
        token_id = self.sampler.choose(logits, ids, self.rng)
        self.ids.append(token_id)
        self.new += 1
        wanted = [token_id]
        if self.logprobs:
            wanted += sampling.most_probable(logits, self.logprobs).tolist()
        logprob, *others = self.log_probabilities(logits, np.array(wanted))[0].tolist()
        finish = "eos" if token_id in self.ends else "length" if self.new >= self.limit else None
        text = ""
        if self.decoder is not None:
            text, stopped = self.stopper.push("" if finish == "eos" else self.decoder.push(token_id))
            if not stopped and finish:
                rest, stopped = self.stopper.push(self.decoder.flush())
                text += rest if stopped else rest + self.stopper.flush()
            if stopped:
                finish = "stop"
        return Step(self.row, token_id, text, logprob, tuple(zip(wanted[1:], others, strict=True)), finish)

    def _seen_ids(self, vocab_size: int) -> Array:
        if self.sampler.repetition_penalty == 1:
            return NO_IDS
        if self.seen is None:
            self.seen = np.zeros(vocab_size, bool)
            self.seen[self.ids] = True
        self.seen[self.ids[-1]] = True
        seen: Array = self.seen.nonzero()[0]
        return seen


def visible(ids: list[int], n_ctx: int, window: int | None) -> list[int]:
    """The tokens that a fresh context begins with: all, or where they are too many the last `window`."""
    return ids if window is None or len(ids) <= n_ctx else ids[-window:]


class SeparateCaches:
    """A Decoder with a cache for each row."""

    def __init__(self, model: GPT2, window: int | None, cache: KVCache | None = None) -> None:
        self._model = model
        self._window = window
        self._caches = [] if cache is None else [cache]

    def prefill(self, texts: Sequence[list[int]]) -> list[Array]:
        """Logits (V,) after each text."""
        self._caches = self._caches or [self._model.new_cache() for _ in texts]
        n_ctx = self._model.config.n_ctx
        return [
            self._read(cache, visible(ids, n_ctx, self._window)[cache.length :])
            for cache, ids in zip(self._caches, texts, strict=True)
        ]

    def feed(self, rows: Sequence[int], texts: Sequence[list[int]]) -> list[Array]:
        """Logits (V,) after the newest token of each text."""
        self._caches = [
            self._caches[row].copy() if row in rows[:i] else self._caches[row] for i, row in enumerate(rows)
        ]
        return [self._next(cache, ids) for cache, ids in zip(self._caches, texts, strict=True)]

    def _next(self, cache: KVCache, ids: list[int]) -> Array:
        if cache.length < cache.max_length or self._window is None:
            logits: Array = self._model.next_logits(ids[-1:], cache)[0]
            return logits
        cache.crop(0)
        return self._read(cache, ids[-self._window :])

    def _read(self, cache: KVCache, ids: list[int]) -> Array:
        logits = self._model(ids, cache=cache, logits="last").logits
        assert logits is not None
        scores: Array = logits[0, 0]
        return scores


class SharedCache:
    """A Decoder with one cache for all rows, so that the weights are read once for all of them.

    Every row ends at the cache's last position, `S`; what a shorter row leaves free on the left is masked:

        S - 5 ........ S
        [ a0 a1 a2 a3 a4 ]    positions 0..4
        [  -  - b0 b1 b2 ]    positions 0..2
    """

    def __init__(self, model: GPT2, window: int | None) -> None:
        self._model = model
        self._window = window

    def prefill(self, texts: Sequence[list[int]]) -> list[Array]:
        """Logits (V,) after each text; the texts run one by one, which wastes nothing on padding.

        A text goes on from the tokens that it shares with the one before it in alphabetical order.
        """
        n_ctx = self._model.config.n_ctx
        prompts = [visible(ids, n_ctx, self._window) for ids in texts]
        self._lengths = np.zeros(len(prompts), np.int64)  # (B,) positions that each row has in the cache
        self._cache = self._model.new_cache(len(prompts))
        self._cache.advance(max(map(len, prompts)))
        alone, before = self._model.new_cache(1), list[int]()
        logits: list[Array] = [np.empty(0)] * len(prompts)
        for row in sorted(range(len(prompts)), key=prompts.__getitem__):
            ids = prompts[row]
            new = zip(ids[:-1], before, strict=False)  # the last one is run in any case, for its logits
            shared = next((i for i, (a, b) in enumerate(new) if a != b), min(len(ids) - 1, len(before)))
            alone.crop(shared if self._model.exact_in_parts else 0)
            logits[row] = self._fill(row, ids, alone)
            before = ids
        return logits

    def feed(self, rows: Sequence[int], texts: Sequence[list[int]]) -> list[Array]:
        """Logits (V,) after the newest token of each text."""
        full = self._model.config.n_ctx
        self._keep(rows)
        sliding = np.flatnonzero(self._lengths == full)  # to be filled anew; they go along below for nothing
        positions = np.where(self._lengths == full, 0, self._lengths)[:, None]  # (B, 1)
        S = self._cache.length + 1
        mask = np.arange(S) >= S - 1 - positions  # (B, S)
        out = self._model(
            [ids[-1:] for ids in texts],
            cache=self._cache,
            logits="last",
            attention_mask=None if mask.all() else mask,
            position_ids=positions,
        )
        assert out.logits is not None
        self._lengths += 1
        logits = list(out.logits[:, 0])  # (B, 1, V) -> B x (V,)
        for row in map(int, sliding):
            assert self._window is not None
            logits[row] = self._fill(row, texts[row][-self._window :], self._model.new_cache(1, self._window))
        return logits

    def _fill(self, row: int, ids: list[int], alone: KVCache) -> Array:
        """Run `ids` after those that `alone` holds; its keys and values go to the end of the row; logits (V,)."""
        out = self._model(ids[alone.length :], cache=alone, logits="last")
        end = self._cache.length
        for ours, theirs in zip(self._cache.layers, alone.views(), strict=True):
            ours[:, row, :, end - len(ids) : end] = theirs[:, 0]  # (2, H, T, D)
        self._lengths[row] = len(ids)
        assert out.logits is not None
        scores: Array = out.logits[0, 0]
        return scores

    def _keep(self, rows: Sequence[int]) -> None:
        """Make row i what row rows[i] was, in a cache that begins where the longest of them begins."""
        kept = list(rows)
        lengths, old, n = self._lengths[kept], self._cache, self._cache.length
        full = self._model.config.n_ctx
        if len(kept) == old.batch_size and n < full:  # in place
            moved = [i for i, row in enumerate(kept) if row != i]
            if moved:
                for layer in old.layers:
                    layer[:, moved, :, :n] = layer[:, [kept[i] for i in moved], :, :n]
            self._lengths = lengths
            return
        # A full row is about to be filled anew with `window` tokens, one of which is still to be counted.
        needed = np.where(lengths == full, (self._window or 1) - 1, lengths)
        self._cache = self._model.new_cache(len(kept))
        self._cache.advance(int(needed.max()))
        end = self._cache.length
        for new, source in enumerate(kept):
            count = 0 if lengths[new] == full else int(lengths[new])
            for ours, theirs in zip(self._cache.layers, old.layers, strict=True):
                ours[:, new, :, end - count : end] = theirs[:, source, :, n - count : n]
        self._lengths = lengths
