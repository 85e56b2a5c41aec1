"""What a caller asks to be continued, and the limits that it sets, checked before any work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .arguments import whole_number
from .cache import KVCache, as_cache
from .errors import ContextOverflowError, InputError, TokenizerError, TokenRangeError
from .tokenizer import HOW_TO_GET_ONE, encode_for

if TYPE_CHECKING:
    import tokenizers


def prompt_ids(prompt: Any, vocab_size: int, tokenizer: tokenizers.Tokenizer | None) -> list[list[int]]:
    """One or many prompts, text or ids, as checked lists of ids."""
    if isinstance(prompt, str):
        prompt = [prompt]
    elif not isinstance(prompt, Sequence) and np.ndim(prompt) == 0:
        raise InputError(f"prompt must be text, token ids, or a sequence of either, got {prompt!r}")
    elif len(prompt) and not isinstance(prompt[0], Sequence) and np.ndim(prompt[0]) == 0:
        prompt = [prompt]
    if len(prompt) == 0:
        raise InputError("there is no prompt")
    checked = []
    for row, one in enumerate(prompt, 1):
        place = f"prompt {row} of {len(prompt)}"
        if isinstance(one, str):
            if tokenizer is None:
                raise TokenizerError(f"a text prompt needs a tokenizer; {HOW_TO_GET_ONE}")
            one = encode_for(vocab_size, tokenizer, one)
        try:
            ids = np.asarray(one)
        except ValueError:
            raise InputError(f"{place} must be text or integers (T,), got rows of different lengths") from None
        if ids.size == 0:
            raise InputError(f"{place} is empty: there is nothing to continue")
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise InputError(f"{place} must be text or integers (T,), got {ids.dtype} {ids.shape}")
        outside = ids[(ids < 0) | (ids >= vocab_size)]
        if outside.size:
            raise TokenRangeError(f"token id {outside[0]} in {place} is outside 0..{vocab_size - 1}")
        checked.append([int(i) for i in ids])
    return checked


def stop_strings(stop: Any, tokenizer: tokenizers.Tokenizer | None) -> tuple[str, ...]:
    """The strings that end a sequence."""
    if not isinstance(stop, str | Sequence) or not all(isinstance(s, str) for s in stop):
        raise InputError(f"stop must be a string or a sequence of strings, got {stop!r}")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stops:
        raise InputError("a stop string must not be empty")
    if stops and tokenizer is None:
        raise TokenizerError(f"stop strings need a tokenizer; {HOW_TO_GET_ONE}")
    return stops


def window_length(window: bool | int, n_ctx: int) -> int | None:
    """How many tokens a context that is full begins anew with; None: it must not become full."""
    if window is False:
        return None
    kept = max(n_ctx // 2, 1) if window is True else whole_number("window", window, 1)
    if kept > n_ctx:
        raise InputError(f"window must be in 1..{n_ctx} (n_ctx), got {kept}")
    return kept


def end_tokens(eos_token_id: int | Sequence[int] | None, vocab_size: int) -> frozenset[int]:
    """The tokens that end a sequence."""
    given = [] if eos_token_id is None else list(np.atleast_1d(np.asarray(eos_token_id, dtype=object)))
    ends = frozenset(whole_number("eos_token_id", token_id, 0) for token_id in given)
    for token_id in ends:
        if token_id >= vocab_size:
            raise TokenRangeError(f"eos_token_id {token_id} is outside 0..{vocab_size - 1}")
    return ends


def check_room(prompt: int, new: int | None, n_ctx: int, sliding: bool) -> None:
    """Raise unless a prompt of so many tokens and the new ones fit into the context, or it slides."""
    new = 1 if new is None else whole_number("max_new_tokens", new, 1)
    needed = prompt + new - 1  # the last new token is not fed back
    if needed > n_ctx and not sliding:
        raise ContextOverflowError(
            f"a prompt of {prompt} tokens and {new} new ones need {needed} positions, n_ctx is {n_ctx}; "
            "ask for fewer, or let the context slide with window=True (--window)"
        )


def check_cache(cache: KVCache, prompts: list[list[int]], new: int | None, num_beams: int, window: int | None) -> None:
    """Raise unless the cache can hold the first tokens of the one prompt, and the new ones."""
    if len(prompts) > 1 or num_beams > 1 or window is not None:
        raise InputError("a cache can be given for one prompt only, without num_beams or window")
    if as_cache(cache).batch_size != 1:
        raise InputError(f"the cache must have batch_size 1, got {cache.batch_size}")
    if cache.length >= len(prompts[0]):
        raise InputError(
            f"the cache holds {cache.length} positions, the prompt has {len(prompts[0])} tokens: none would be new"
        )
    check_room(len(prompts[0]), new, cache.max_length, sliding=False)
