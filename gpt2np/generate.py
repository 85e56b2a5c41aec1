"""Continue a text: the loop around a model that feeds each chosen token back in.

`generate` yields one `Step` for each new token and never prints. Many prompts run together, each as it would
alone; `num_beams` searches for the most probable continuation as a whole.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from . import sampling
from .arguments import flag, whole_number
from .beams import beam_steps, check_length_penalty
from .cache import KVCache
from .decoding import Decoder, LanguageModel, Row, Step, Stopper
from .errors import InputError
from .prompts import check_cache, check_room, end_tokens, prompt_ids, stop_strings, window_length
from .sampling import Sampling
from .tokenizer import StreamDecoder, chosen_tokenizer

if TYPE_CHECKING:
    import tokenizers


class GenerateOptions(TypedDict, total=False):
    """The options of `generate` by name, for `GPT2.generate`, so that a type checker knows a misspelt one."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    seed: int | None
    stop: str | Sequence[str]
    num_beams: int
    length_penalty: float
    eos_token_id: int | Sequence[int] | None
    logprobs: int
    window: bool | int
    lookup: bool
    cache: KVCache | None
    tokenizer: tokenizers.Tokenizer | None


def generate(
    model: LanguageModel,
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
    lookup: bool = False,
    cache: KVCache | None = None,
    tokenizer: tokenizers.Tokenizer | None = None,
) -> Iterator[Step]:
    """Continue one or many prompts.

    Parameters
    ----------
    model : GPT2, or any other LanguageModel
    prompt : str, ids (T,), or a sequence of either
        Several prompts of any lengths run together; each gets what it would get alone, bit for bit.
    max_new_tokens : int or None
        How many tokens to add to each prompt at most. None: until the context is full.
    temperature, top_k, top_p, min_p, repetition_penalty
        See `sampling.Sampling`. The default, without a filter, is greedy: always the most probable token.
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
    lookup : bool
        Whether to guess the next tokens from the text so far and check several in one pass, see `drafts`: the same
        steps, bit for bit, sooner where the text repeats itself. For one prompt and the numba engine; several prompts
        share their passes anyway, and run as without.
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
    num_beams = whole_number("num_beams", num_beams, 1)
    length_penalty = check_length_penalty(length_penalty, model.config.n_ctx)
    logprobs = whole_number("logprobs", logprobs, 0)
    lookup = flag("lookup", lookup)
    if seed is not None:
        seed = whole_number("seed", seed, 0)
    tokenizer = chosen_tokenizer(tokenizer, model.tokenizer)
    stops = stop_strings(stop, tokenizer)
    n_ctx, vocab_size = model.config.n_ctx, model.config.vocab_size
    kept = window_length(window, n_ctx)
    ends = end_tokens(eos_token_id, vocab_size)
    prompts = prompt_ids(prompt, vocab_size, tokenizer)
    for ids in prompts:
        check_room(len(ids), max_new_tokens, n_ctx, sliding=kept is not None)
    if cache is not None:
        check_cache(cache, prompts, max_new_tokens, num_beams, kept)

    if num_beams > 1:
        unused = {"temperature above 0": not sampler.greedy, "stop": stops, "logprobs": logprobs}
        unused |= {"window": kept, "lookup": lookup}
        for name, given in unused.items():
            if given:
                raise InputError(f"{name} cannot be combined with num_beams > 1")
        return beam_steps(
            model, prompts, max_new_tokens, num_beams, length_penalty, ends, repetition_penalty, tokenizer
        )

    seed = secrets.randbits(64) if seed is None else seed
    rows = []
    for row, ids in enumerate(prompts):
        limit = math.inf if max_new_tokens is None else max_new_tokens
        if kept is None:
            limit = min(limit, n_ctx - len(ids) + 1)
        rng = sampling.random_stream(seed, ids, copy=prompts[:row].count(ids))
        stream = None if tokenizer is None else StreamDecoder(tokenizer)
        rows.append(Row(row, ids, limit, ends, sampler, rng, logprobs, model.log_probabilities, stream, Stopper(stops)))
    return _steps(rows, model.decoder(len(rows), kept, cache, lookup))


def _steps(running: list[Row], decoder: Decoder) -> Iterator[Step]:
    """The loop: choose a token for every row, drop the rows that have ended, feed the tokens back."""
    logits = decoder.prefill([row.ids for row in running])
    while running:
        going_on = []
        for i, (row, scores) in enumerate(zip(running, logits, strict=True)):
            step = row.take(scores)
            if step.finish is None:
                going_on.append(i)
            yield step
        running = [running[i] for i in going_on]
        if running:
            logits = decoder.feed(going_on, [row.ids for row in running])
