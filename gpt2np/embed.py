"""Texts to hidden states: what the base GPT-2 file of the ONNX Model Zoo is for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .arguments import one_of, strings, whole_number
from .errors import ContextOverflowError, InputError
from .prompts import prompt_ids
from .tokenizer import chosen_tokenizer
from .weights import Array

if TYPE_CHECKING:
    import tokenizers

    from .model import GPT2

LAST_HIDDEN_STATE = "last_hidden_state"  # the zoo's name of the tap "ln_f"


def embed(
    model: GPT2,
    texts: Any,
    taps: Sequence[str] = (LAST_HIDDEN_STATE,),
    pool: str | None = None,
    batch_size: int = 8,
    tokenizer: tokenizers.Tokenizer | None = None,
) -> Iterator[dict[str, Array]]:
    """The model's hidden states for each of some texts, in their order.

    Parameters
    ----------
    model : GPT2
    texts : str, ids (T,), or a sequence of either
        Several run together; padding goes to the right, where the causal mask hides it.
    taps : sequence of str
        "last_hidden_state", or any tap name: "h.0.attn.probs", "h.5.resid_post", "logits", ...
    pool : "last", "mean" or None
        What becomes of the T positions: the last one's vector, which has seen the whole text; the mean; or all.
    batch_size : int
        Texts that are run together.
    tokenizer : tokenizers.Tokenizer, optional
        Default: the one beside the model.

    Yields
    ------
    dict
        For each text {tap: array}: (T, X), of attention q, k, v (H, T, D), scores and probs (H, T, T); or (X,)
        with `pool`. "last_hidden_state" is (T, C). Further "input_ids" (T,).

    Raises
    ------
    InputError, TokenizerError, TokenRangeError, ContextOverflowError
        Before any work is done.

    Examples
    --------
    >>> import gpt2np
    >>> from gpt2np.embed import embed
    >>> model = gpt2np.load()
    >>> (states,) = embed(model, "Once upon a time")
    >>> states["last_hidden_state"].shape == (len(states["input_ids"]), model.config.n_embd)
    True
    """
    taps = strings("taps", taps)
    check_taps(model, taps, pool, batch_size)
    rows = prompt_ids(texts, model.config.vocab_size, chosen_tokenizer(tokenizer, model.tokenizer))
    for i, ids in enumerate(rows, 1):
        if len(ids) > model.config.n_ctx:
            raise ContextOverflowError(f"text {i} of {len(rows)} has {len(ids)} tokens, n_ctx is {model.config.n_ctx}")
    return _batches(model, rows, taps, pool, batch_size)


def check_taps(model: GPT2, taps: Sequence[str], pool: str | None, batch_size: int) -> None:
    """InputError if the options of `embed` are not what it takes."""
    one_of("pool", pool, (None, "last", "mean"))
    whole_number("batch_size", batch_size, 1)
    shapes = {name: value.shape for name, value in model.trace([0]).items()}
    shapes[LAST_HIDDEN_STATE] = shapes["ln_f"]
    for tap in taps:
        if tap not in shapes:
            raise InputError(f"there is no tap {tap!r}; there are {', '.join(shapes)}")
        if pool and len(shapes[tap]) != 3:
            raise InputError(f"{tap} has no vector for each position, so it cannot be pooled")


def read_lines(text: str) -> list[str]:
    """The lines of a text, of which each has tokens: InputError for one that is empty."""
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    if "" in lines:
        raise InputError(f"line {lines.index('') + 1} is empty: it has no tokens")
    return lines


def _batches(
    model: GPT2, rows: list[list[int]], taps: tuple[str, ...], pool: str | None, batch_size: int
) -> Iterator[dict[str, Array]]:
    for start in range(0, len(rows), batch_size):
        group = rows[start : start + batch_size]
        inputs = np.zeros((len(group), max(map(len, group))), np.int64)
        for i, ids in enumerate(group):
            inputs[i, : len(ids)] = ids
        if taps == (LAST_HIDDEN_STATE,):  # the fast path
            values = {LAST_HIDDEN_STATE: model(inputs, logits=False).last_hidden_state}
        else:
            values = _tapped(model, inputs, taps)
        for i, ids in enumerate(group):
            found = {"input_ids": np.array(ids)}
            for tap, value in values.items():
                found[tap] = _pool(_cut(tap, value[i], len(ids)), pool)
            yield found


def _tapped(model: GPT2, inputs: Array, taps: Sequence[str]) -> dict[str, Array]:
    kept: dict[str, Array] = {}

    def keep(name: str, value: Array) -> None:
        for tap in taps:
            if name == ("ln_f" if tap == LAST_HIDDEN_STATE else tap):
                kept[tap] = np.array(value)

    model(inputs, tap=keep, logits="logits" in taps)
    return kept


def _cut(tap: str, value: Array, T: int) -> Array:
    """Without the padding."""
    if value.ndim == 2:
        return value[:T].copy()  # (T, X)
    square = tap.endswith((".scores", ".probs"))
    return (value[:, :T, :T] if square else value[:, :T]).copy()  # (H, T, S) or (H, T, D)


def _pool(value: Array, pool: str | None) -> Array:
    if pool is None:
        return value
    pooled: Array = value[-1].copy() if pool == "last" else value.mean(axis=0)
    return pooled
