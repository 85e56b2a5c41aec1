"""Continue a text: the loop around a model that feeds each chosen token back in.

`generate` yields one `Step` for each new token and never prints. Many prompts run together, each as it would
alone; `num_beams` searches for the most probable continuation as a whole.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import sampling
from .cache import KVCache
from .errors import ContextOverflowError, InputError, TokenizerError, TokenRangeError
from .sampling import Sampling
from .tokenizer import HOW_TO_GET_ONE, StreamDecoder, encode_for
from .weights import Array

if TYPE_CHECKING:
    import tokenizers

    from .model import GPT2

NOTHING = np.zeros(0, np.int64)


class Step(NamedTuple):
    """One new token of one sequence."""

    row: int  # which prompt of a batch it belongs to
    token_id: int
    text: str  # what can be shown now that it was not before; "" without a tokenizer
    logprob: float  # natural log of the model's own probability of the token, before penalty, temperature and filters
    top: tuple[tuple[int, float], ...]  # the `logprobs` most probable tokens, (id, logprob)
    finish: str | None  # on the last step of a row: "length", "eos" or "stop"


@dataclass(frozen=True, slots=True)
class Beam:
    """One continuation that beam search found."""

    ids: tuple[int, ...]  # new tokens, with the end-of-sequence token if it ends with one
    logprobs: tuple[float, ...]  # of each of them
    score: float  # sum(logprobs) / len(ids) ** length_penalty
    finish: str  # "eos" or "length"


def generate(
    model: GPT2,
    prompt: Any,
    max_new_tokens: int | None = 64,
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    num_beams: int = 1,
    length_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    logprobs: int = 0,
    window: bool | int = False,
    cache: KVCache | None = None,
    tokenizer: tokenizers.Tokenizer | None = None,
) -> Iterator[Step]:
    """Continue one or many prompts.

    Parameters
    ----------
    model : GPT2
    prompt : str, ids (T,), or a sequence of either
        Several prompts of any lengths run together; each gets what it would get alone, bit for bit.
    max_new_tokens : int or None
        How many tokens to add to each prompt at most. None: until the context is full.
    temperature, top_k, top_p, min_p, repetition_penalty
        See `sampling.Sampling`. The default is greedy: always the most probable token.
    seed : int, optional
        The same seed gives the same tokens, whatever else is in the batch; equal prompts in one batch get
        different ones. None: other tokens every time.
    stop : str or sequence of str
        Strings that end a sequence; they and what follows are not part of its text.
    num_beams : int
        Above 1: beam search, see `beam_search`. The steps of the best beam come when the search has ended.
    length_penalty : float
        For beam search: a hypothesis of n tokens is judged by sum(logprobs) / n ** length_penalty.
    eos_token_id : int or sequence of int, optional
        Tokens that end a sequence (50256, "<|endoftext|>", in GPT-2). None: there is no such token.
    logprobs : int
        How many of the most probable tokens `Step.top` lists.
    window : bool or int
        What happens when all n_ctx positions are taken. False: asking for so many tokens is an error. A number:
        the last `window` tokens are run through the model anew, as if the text began with them, which costs a
        prefill; True: half of n_ctx. With window = n_ctx each token is predicted from the last n_ctx ones, at
        the price of a whole prefill for each.
    cache : KVCache, optional
        For one prompt: holds the first `cache.length` of its tokens already (the caller vouches for it), so that
        only the rest is computed. Afterwards it holds all tokens but the last.
    tokenizer : tokenizers.Tokenizer, optional
        Default: the one beside the model. Needed for text prompts and `stop`; without one `Step.text` is "".

    Yields
    ------
    Step
        In rounds: the next token of every sequence that has not ended, in the order of the prompts.

    Raises
    ------
    InputError, TokenRangeError, ContextOverflowError, TokenizerError
        Before any work is done: see the parameters.
    """
    sampler = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stops:
        raise InputError("a stop string must not be empty")
    if num_beams < 1:
        raise InputError(f"num_beams must be at least 1, got {num_beams}")
    _check_length_penalty(length_penalty)
    if logprobs < 0:
        raise InputError(f"logprobs must not be negative, got {logprobs}")
    if seed is not None and seed < 0:
        raise InputError(f"seed must not be negative, got {seed}")
    if tokenizer is None:
        tokenizer = model.tokenizer
    if stops and tokenizer is None:
        raise TokenizerError(f"stop strings need a tokenizer; {HOW_TO_GET_ONE}")
    kept = _window(window, model.config.n_ctx)
    ends = _end_tokens(eos_token_id, model.config.vocab_size)
    prompts = prompt_ids(prompt, model, tokenizer)
    for ids in prompts:
        _check_room(len(ids), max_new_tokens, model.config.n_ctx, sliding=kept is not None)
    if cache is not None:
        _check_cache(cache, prompts, max_new_tokens, num_beams, kept)

    if num_beams > 1:
        unused = {"temperature above 0": not sampler.greedy, "stop": stops, "logprobs": logprobs, "window": kept}
        for name, given in unused.items():
            if given:
                raise InputError(f"{name} cannot be combined with num_beams > 1")
        return _beam_steps(
            model, prompts, max_new_tokens, num_beams, length_penalty, ends, repetition_penalty, tokenizer
        )

    seed = secrets.randbits(64) if seed is None else seed
    sequences = []
    for row, ids in enumerate(prompts):
        limit = math.inf if max_new_tokens is None else max_new_tokens
        if kept is None:
            limit = min(limit, model.config.n_ctx - len(ids) + 1)
        rng = sampling.random_stream(seed, ids, copy=prompts[:row].count(ids))
        decoder = None if tokenizer is None else StreamDecoder(tokenizer)
        sequences.append(_Sequence(row, ids, limit, ends, sampler, rng, logprobs, decoder, _Stopper(stops)))
    # With the numpy engine a row's last bits depend on how many rows BLAS multiplies at once.
    together = len(prompts) > 1 and model.engine == "numba"
    contexts = _Together(model, sequences, kept) if together else _Apart(model, sequences, kept, cache)
    return _steps(sequences, contexts)


def prompt_ids(prompt: Any, model: GPT2, tokenizer: tokenizers.Tokenizer | None) -> list[list[int]]:
    """One or many prompts, text or ids, as checked lists of ids."""
    if isinstance(prompt, str):
        prompt = [prompt]
    elif not isinstance(prompt, Sequence) and np.ndim(prompt) == 0:
        raise InputError(f"prompt must be text, token ids, or a sequence of either, got {prompt!r}")
    elif len(prompt) and not isinstance(prompt[0], str) and np.ndim(prompt[0]) == 0:
        prompt = [prompt]
    if len(prompt) == 0:
        raise InputError("there is no prompt")
    checked = []
    for row, one in enumerate(prompt, 1):
        place = f"prompt {row} of {len(prompt)}"
        if isinstance(one, str):
            if tokenizer is None:
                raise TokenizerError(f"a text prompt needs a tokenizer; {HOW_TO_GET_ONE}")
            one = encode_for(model.config.vocab_size, tokenizer, one)
        ids = np.asarray(one)
        if ids.size == 0:
            raise InputError(f"{place} is empty: there is nothing to continue")
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise InputError(f"{place} must be text or integers (T,), got {ids.dtype} {ids.shape}")
        outside = ids[(ids < 0) | (ids >= model.config.vocab_size)]
        if outside.size:
            raise TokenRangeError(f"token id {outside[0]} in {place} is outside 0..{model.config.vocab_size - 1}")
        checked.append([int(i) for i in ids])
    return checked


def _window(window: bool | int, n_ctx: int) -> int | None:
    if window is False:
        return None
    kept = max(n_ctx // 2, 1) if window is True else window
    if not 1 <= kept <= n_ctx:
        raise InputError(f"window must be in 1..{n_ctx} (n_ctx), got {kept}")
    return kept


def _end_tokens(eos_token_id: int | Sequence[int] | None, vocab_size: int) -> frozenset[int]:
    ends = [] if eos_token_id is None else [int(i) for i in np.atleast_1d(eos_token_id)]
    for token_id in ends:
        if not 0 <= token_id < vocab_size:
            raise TokenRangeError(f"eos_token_id {token_id} is outside 0..{vocab_size - 1}")
    return frozenset(ends)


def _check_length_penalty(length_penalty: float) -> None:
    if not math.isfinite(length_penalty):
        raise InputError(f"length_penalty must be a number, got {length_penalty}")


def _check_room(prompt: int, new: int | None, n_ctx: int, sliding: bool) -> None:
    if new is not None and new < 1:
        raise InputError(f"max_new_tokens must be at least 1, got {new}")
    needed = prompt + (new or 1) - 1  # the last new token is not fed back
    if needed > n_ctx and not sliding:
        raise ContextOverflowError(
            f"a prompt of {prompt} tokens and {new or 1} new ones need {needed} positions, n_ctx is {n_ctx}; "
            "ask for fewer, or let the context slide with window=True (--window)"
        )


def _check_cache(cache: KVCache, prompts: list[list[int]], new: int | None, num_beams: int, window: int | None) -> None:
    if len(prompts) > 1 or num_beams > 1 or window is not None:
        raise InputError("a cache can be given for one prompt only, without num_beams or window")
    if cache.batch_size != 1:
        raise InputError(f"the cache must have batch_size 1, got {cache.batch_size}")
    if cache.length >= len(prompts[0]):
        raise InputError(
            f"the cache holds {cache.length} positions, the prompt has {len(prompts[0])} tokens: none would be new"
        )
    _check_room(len(prompts[0]), new, cache.max_length, sliding=False)


class _Stopper:
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
class _Sequence:
    """One prompt and what has been added to it."""

    row: int
    ids: list[int]
    limit: float  # new tokens at most
    ends: frozenset[int]
    sampler: Sampling
    rng: np.random.Generator
    logprobs: int
    decoder: StreamDecoder | None
    stopper: _Stopper
    new: int = 0
    seen: Array | None = None  # (V,) bool; for the repetition penalty only

    def take(self, logits: Array) -> Step:
        """Choose the next token from the logits (V,)."""
        ids = self._seen_ids(logits.size)
        token_id = self.sampler.choose(logits, ids, self.rng)
        self.ids.append(token_id)
        self.new += 1
        log_sum = sampling.log_sum_exp(logits)
        top: tuple[tuple[int, float], ...] = ()
        if self.logprobs:
            best = sampling.most_probable(logits, self.logprobs)
            top = tuple((int(i), float(logits[i]) - log_sum) for i in best)
        finish = "eos" if token_id in self.ends else "length" if self.new >= self.limit else None
        text = ""
        if self.decoder is not None:
            text, stopped = self.stopper.push("" if finish == "eos" else self.decoder.push(token_id))
            if not stopped and finish:
                rest, stopped = self.stopper.push(self.decoder.flush())
                text += rest if stopped else rest + self.stopper.flush()
            if stopped:
                finish = "stop"
        return Step(self.row, token_id, text, float(logits[token_id]) - log_sum, top, finish)

    def _seen_ids(self, vocab_size: int) -> Array:
        if self.sampler.repetition_penalty == 1:
            return NOTHING
        if self.seen is None:
            self.seen = np.zeros(vocab_size, bool)
            self.seen[self.ids] = True
        self.seen[self.ids[-1]] = True
        seen: Array = self.seen.nonzero()[0]
        return seen


def _steps(sequences: list[_Sequence], contexts: _Apart | _Together) -> Iterator[Step]:
    """The loop: choose a token for every sequence, drop those that have ended, feed the tokens back."""
    running = sequences
    logits = contexts.prefill()
    while running:
        going_on = []
        for sequence, scores in zip(running, logits, strict=True):
            step = sequence.take(scores)
            if step.finish is None:
                going_on.append(sequence)
            yield step
        running = going_on
        if running:
            logits = contexts.feed(running)


def _visible(ids: list[int], n_ctx: int, window: int | None) -> list[int]:
    """The tokens that a fresh context begins with: all, or where they are too many the last `window`."""
    return ids if window is None or len(ids) <= n_ctx else ids[-window:]


class _Apart:
    """Each sequence in a cache of its own."""

    def __init__(
        self, model: GPT2, sequences: list[_Sequence], window: int | None, cache: KVCache | None = None
    ) -> None:
        self._model = model
        self._window = window
        self._sequences = sequences
        self._caches = {s.row: cache if cache is not None else model.new_cache() for s in sequences}

    def prefill(self) -> list[Array]:
        """Logits (V,) after each prompt."""
        logits = []
        for s in self._sequences:
            held = self._caches[s.row].length
            logits.append(self._run(s, _visible(s.ids, self._model.config.n_ctx, self._window)[held:]))
        return logits

    def feed(self, running: list[_Sequence]) -> list[Array]:
        """Logits (V,) after the newest token of each of these sequences."""
        return [self._next(s) for s in running]

    def _next(self, sequence: _Sequence) -> Array:
        cache = self._caches[sequence.row]
        if cache.length < cache.max_length or self._window is None:
            logits: Array = self._model.next_logits(sequence.ids[-1:], cache)[0]
            return logits
        cache.crop(0)
        return self._run(sequence, sequence.ids[-self._window :])

    def _run(self, sequence: _Sequence, ids: list[int]) -> Array:
        logits = self._model(ids, cache=self._caches[sequence.row], logits="last").logits
        assert logits is not None
        scores: Array = logits[0, 0]
        return scores


class _Together:
    """All sequences as rows of one cache, so that the weights are read once for all of them.

    Every row ends at the cache's last position, `S`; what a shorter row leaves free on the left is masked:

        S - 5 ........ S
        [ a0 a1 a2 a3 a4 ]    positions 0..4
        [  -  - b0 b1 b2 ]    positions 0..2
    """

    def __init__(self, model: GPT2, sequences: list[_Sequence], window: int | None) -> None:
        self._model = model
        self._window = window
        self._rows = sequences
        self._lengths = np.zeros(len(sequences), np.int64)  # (B,) positions that each row has in the cache
        self._cache = model.new_cache(len(sequences))

    def prefill(self) -> list[Array]:
        """Logits (V,) after each prompt; the prompts run one by one, which wastes nothing on padding."""
        n_ctx = self._model.config.n_ctx
        prompts = [_visible(s.ids, n_ctx, self._window) for s in self._rows]
        self._cache.advance(max(map(len, prompts)))
        return [self._fill(row, ids) for row, ids in enumerate(prompts)]

    def feed(self, running: list[_Sequence]) -> list[Array]:
        """Logits (V,) after the newest token of each of these sequences."""
        full = self._model.config.n_ctx
        if len(running) < len(self._rows) or self._cache.length == full:
            self._pack(running)
        sliding = np.flatnonzero(self._lengths == full)  # to be filled anew; they go along below for nothing
        positions = np.where(self._lengths == full, 0, self._lengths)[:, None]  # (B, 1)
        S = self._cache.length + 1
        mask = np.arange(S) >= S - 1 - positions  # (B, S)
        out = self._model(
            [s.ids[-1:] for s in running],
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
            logits[row] = self._fill(row, running[row].ids[-self._window :])
        return logits

    def _fill(self, row: int, ids: list[int]) -> Array:
        """Run `ids` from position 0 and put their keys and values at the end of the row; logits (V,)."""
        alone = self._model.new_cache(1, len(ids))
        out = self._model(ids, cache=alone, logits="last")
        end = self._cache.length
        for ours, theirs in zip(self._cache.layers, alone.layers, strict=True):
            ours[:, row, :, end - len(ids) : end] = theirs[:, 0]  # (2, H, T, D)
        self._lengths[row] = len(ids)
        assert out.logits is not None
        scores: Array = out.logits[0, 0]
        return scores

    def _pack(self, running: list[_Sequence]) -> None:
        """Move the rows that go on to a cache that begins where the longest of them begins."""
        kept = [self._rows.index(s) for s in running]
        lengths, old = self._lengths[kept], self._cache
        full = self._model.config.n_ctx
        # A full row is about to be filled anew with `window` tokens, one of which is still to be counted.
        needed = np.where(lengths == full, (self._window or 1) - 1, lengths)
        self._cache = self._model.new_cache(len(kept))
        self._cache.advance(int(needed.max()))
        for new, source in enumerate(kept):
            n = 0 if lengths[new] == full else int(lengths[new])
            for ours, theirs in zip(self._cache.layers, old.layers, strict=True):
                ours[:, new, :, self._cache.length - n : self._cache.length] = theirs[
                    :, source, :, old.length - n : old.length
                ]
        self._rows, self._lengths = running, lengths


def beam_search(
    model: GPT2,
    ids: Sequence[int],
    max_new_tokens: int | None = 64,
    num_beams: int = 4,
    length_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    repetition_penalty: float = 1.0,
) -> list[Beam]:
    """The most probable continuations as a whole that a search of width `num_beams` finds, the best first.

    The conventions are those of Hugging Face's `generate` (version 4.50 and later, early_stopping=False):
    `max(2, 1 + number of end tokens) * num_beams` candidates are looked at in each round; of these, the first
    `num_beams` may end there and the best that do not end go on; a hypothesis of n new tokens (its end token
    counts) is judged by sum(logprobs) / n ** length_penalty; the search ends at max_new_tokens, or when
    `num_beams` hypotheses have ended and no running one, judged at its present length, is better than the worst
    of them. The repetition penalty applies to log-probabilities.

    Raises
    ------
    InputError, TokenRangeError, ContextOverflowError
        As `generate` does.
    """
    _check_length_penalty(length_penalty)
    (prompt,) = prompt_ids([ids], model, None)
    _check_room(len(prompt), max_new_tokens, model.config.n_ctx, sliding=False)
    ends = _end_tokens(eos_token_id, model.config.vocab_size)
    limit = max_new_tokens or model.config.n_ctx - len(prompt) + 1
    cache = model.new_cache(1, min(len(prompt) + limit, model.config.n_ctx))
    logits = model(prompt, cache=cache, logits="last").logits
    running = [Beam((), (), 0.0, "")]
    finished: list[Beam] = []
    for length in range(1, limit + 1):
        assert logits is not None
        scores = logits[:, 0].astype(np.float64)  # (B, V)
        scores -= [[sampling.log_sum_exp(row)] for row in logits[:, 0]]
        for row, beam in enumerate(running):
            if repetition_penalty != 1:
                seen = np.unique([*prompt, *beam.ids])
                scores[row] = sampling.penalise_repetition(scores[row], seen, repetition_penalty)
        totals = (scores + [[sum(beam.logprobs)] for beam in running]).reshape(-1)  # (B * V,)

        going_on: list[tuple[int, Beam]] = []  # (row of the beam it continues, beam)
        candidates = sampling.most_probable(totals, max(2, 1 + len(ends)) * num_beams)
        for rank, candidate in enumerate(candidates):
            row, token_id = divmod(int(candidate), model.config.vocab_size)
            beam = Beam(
                (*running[row].ids, token_id),
                (*running[row].logprobs, float(scores[row, token_id])),
                float(totals[candidate]) / length**length_penalty,
                "eos" if token_id in ends else "length",
            )
            if token_id not in ends and length < limit:
                going_on.append((row, beam))
            elif rank < num_beams:
                finished.append(beam)
        finished = sorted(finished, key=lambda beam: -beam.score)[:num_beams]
        going_on = going_on[:num_beams]
        if not going_on or (len(finished) == num_beams and going_on[0][1].score <= finished[-1].score):
            break
        cache = _gather(model, cache, [row for row, _ in going_on])
        running = [beam for _, beam in going_on]
        logits = model([beam.ids[-1:] for beam in running], cache=cache, logits="last").logits
    return finished


def _gather(model: GPT2, cache: KVCache, rows: list[int]) -> KVCache:
    """A cache whose row i is row rows[i] of this one; this one itself where its batch size fits."""
    n = cache.length
    if len(rows) == cache.batch_size:
        moved = [i for i, row in enumerate(rows) if row != i]
        for layer in cache.layers:
            layer[:, moved, :, :n] = layer[:, [rows[i] for i in moved], :, :n]
        return cache
    wider = model.new_cache(len(rows), cache.max_length)
    wider.advance(n)
    for ours, theirs in zip(wider.layers, cache.layers, strict=True):
        ours[:, :, :, :n] = theirs[:, rows, :, :n]
    return wider


def _beam_steps(
    model: GPT2,
    prompts: list[list[int]],
    max_new_tokens: int | None,
    num_beams: int,
    length_penalty: float,
    ends: frozenset[int],
    repetition_penalty: float,
    tokenizer: tokenizers.Tokenizer | None,
) -> Iterator[Step]:
    for row, ids in enumerate(prompts):
        best = beam_search(model, ids, max_new_tokens, num_beams, length_penalty, tuple(ends), repetition_penalty)[0]
        decoder = None if tokenizer is None else StreamDecoder(tokenizer)
        for i, (token_id, logprob) in enumerate(zip(best.ids, best.logprobs, strict=True)):
            finish = best.finish if i == len(best.ids) - 1 else None
            text = ""
            if decoder is not None:
                text = ("" if finish == "eos" else decoder.push(token_id)) + (decoder.flush() if finish else "")
            yield Step(row, token_id, text, logprob, (), finish)
