"""Beam search: the most probable continuation as a whole, not token by token."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Context, Decimal
from typing import TYPE_CHECKING

import numpy as np

from . import sampling
from .arguments import real_number, whole_number
from .decoding import LanguageModel, Step
from .errors import InputError
from .prompts import check_room, end_tokens, prompt_ids
from .tokenizer import StreamDecoder

if TYPE_CHECKING:
    import tokenizers


@dataclass(frozen=True, slots=True)
class Beam:
    """One continuation that beam search found."""

    ids: tuple[int, ...]  # new tokens, with the end-of-sequence token if it ends with one
    logprobs: tuple[float, ...]  # of each of them
    score: float  # sum(logprobs) / len(ids) ** length_penalty
    finish: str  # "eos" or "length"


def beam_search(
    model: LanguageModel,
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
    length_penalty = check_length_penalty(length_penalty, model.config.n_ctx)
    num_beams = whole_number("num_beams", num_beams, 1)
    sampling.Sampling(repetition_penalty=repetition_penalty)  # raises if that is out of range
    config = model.config
    (prompt,) = prompt_ids([ids], config.vocab_size, None)
    check_room(len(prompt), max_new_tokens, config.n_ctx, sliding=False)
    ends = end_tokens(eos_token_id, config.vocab_size)
    limit = max_new_tokens or config.n_ctx - len(prompt) + 1
    decoder = model.decoder(num_beams)
    logits = np.stack(decoder.prefill([prompt]))  # (B, V)
    running = [Beam((), (), 0.0, "")]
    finished: list[Beam] = []
    for length in range(1, limit + 1):
        for each in logits:
            sampling.most_probable_token(each)  # raises where there is none
        scores = model.log_probabilities(logits, np.tile(np.arange(config.vocab_size), (len(logits), 1)))[0]
        for row, beam in enumerate(running):
            if repetition_penalty != 1:
                seen = np.unique([*prompt, *beam.ids])
                scores[row] = sampling.penalise_repetition(scores[row], seen, repetition_penalty)
        norm = _norm(length, length_penalty)
        totals = (scores + [[math.fsum(beam.logprobs)] for beam in running]).reshape(-1)  # (B * V,)

        going_on: list[tuple[int, Beam]] = []  # (row of the beam it continues, beam)
        candidates = sampling.most_probable(totals, max(2, 1 + len(ends)) * num_beams)
        for rank, candidate in enumerate(candidates):
            row, token_id = divmod(int(candidate), config.vocab_size)
            beam = Beam(
                (*running[row].ids, token_id),
                (*running[row].logprobs, float(scores[row, token_id])),
                float(totals[candidate]) / norm,
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
        running = [beam for _, beam in going_on]
        logits = np.stack(decoder.feed([row for row, _ in going_on], [[*prompt, *beam.ids] for beam in running]))
    return finished


def check_length_penalty(penalty: float, n_ctx: int) -> float:
    """The penalty as a float; InputError unless it is a number that some length can be raised to."""
    number = real_number("length_penalty", penalty)
    if not 0 < _norm(n_ctx, number) < math.inf:
        raise InputError(f"length_penalty is out of range: {n_ctx} (n_ctx) ** {penalty} is no float64")
    return number


def _norm(length: int, penalty: float) -> float:
    """length ** penalty: the same on every machine, which a system's pow need not be."""
    digits = Context(prec=20, traps=[])  # more than a float64 has; what is out of range gives infinity or 0
    return float(digits.power(length, Decimal(penalty)))


def beam_steps(
    model: LanguageModel,
    prompts: list[list[int]],
    max_new_tokens: int | None,
    num_beams: int,
    length_penalty: float,
    ends: frozenset[int],
    repetition_penalty: float,
    tokenizer: tokenizers.Tokenizer | None,
) -> Iterator[Step]:
    """The steps of each prompt's best beam, one prompt after the other."""
    for row, ids in enumerate(prompts):
        best = beam_search(model, ids, max_new_tokens, num_beams, length_penalty, tuple(ends), repetition_penalty)[0]
        decoder = None if tokenizer is None else StreamDecoder(tokenizer)
        for i, (token_id, logprob) in enumerate(zip(best.ids, best.logprobs, strict=True)):
            finish = best.finish if i == len(best.ids) - 1 else None
            text = ""
            if decoder is not None:
                text = ("" if finish == "eos" else decoder.push(token_id)) + (decoder.flush() if finish else "")
            yield Step(row, token_id, text, logprob, (), finish)
