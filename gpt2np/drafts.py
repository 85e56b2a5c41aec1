"""Drafts: the next tokens guessed from the text so far, and checked by the model in one pass.

A pass over a few tokens takes hardly longer than a pass over one, since both read all weights once. So where the last
words of a text stood in it before, what followed them there is run along with the newest token. As long as the tokens
that are then chosen are those of the draft, their scores are there already; the rest of the draft is forgotten.

The kernels compute the scores of a position by the same operations in either case, so whoever chooses tokens by them,
greedily or by chance, chooses the same ones: drafts change how long a text takes, never the text. The idea is that of
Saxena 2023, "Prompt Lookup Decoding".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .cache import KVCache
from .decoding import SeparateCaches
from .weights import Array

if TYPE_CHECKING:
    from .model import GPT2

LONGEST = 3  # tokens that a text must end with as it did before, at most; longer matches are found by their ends
# Drafts are paid for: each costs a part of a pass, each token of it that is chosen saves a pass, and who has nothing
# left drafts no more than the allowance pays for. So a text that never repeats takes hardly longer than without.
COST = 0.2  # passes that a draft takes longer than a single token; measured: 0.1 to 0.2
START, MOST = 1.0, 3.0  # passes that each text begins with, and that can be saved up
ALLOWANCE = 0.01  # passes, added for each pass without a draft


class Phrases:
    """Where the last tokens of a growing text stood in it before."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}  # up to LONGEST tokens -> the index after their last occurrence
        self._known = 0  # tokens of the text at whose ends phrases have been noted

    def after(self, text: list[int], count: int) -> list[int]:
        """`count` tokens that may follow the text: what followed where it last ended so; [] if it never did.

        What was asked about before must be the beginning of this text.
        """
        for end in range(self._known + 1, len(text)):  # all but the end of the text itself
            for length in range(1, min(LONGEST, end) + 1):
                self._ends[tuple(text[end - length : end])] = end
        self._known = max(self._known, len(text) - 1)
        for length in range(min(LONGEST, len(text)), 0, -1):
            start = self._ends.get(tuple(text[-length:]))
            if start is not None:  # where the copy reaches the end of the text, it goes on with itself
                return [text[start + i % (len(text) - start)] for i in range(count)]
        return []


class DraftingCache(SeparateCaches):
    """A Decoder of one row that runs drafts of up to `most` tokens, from `phrases`, along with the newest one."""

    def __init__(
        self, model: GPT2, window: int | None, cache: KVCache | None, most: int, phrases: Phrases | None = None
    ) -> None:
        super().__init__(model, window, cache)
        self._most = most
        self._phrases = phrases or Phrases()
        self._draft: list[int] = []  # tokens that have been run after those that the cache counts
        self._scores: list[Array] = []  # (V,) after each of them
        self._credit = START

    def _next(self, cache: KVCache, ids: list[int]) -> Array:
        if self._draft and ids[-1] == self._draft.pop(0):
            cache.advance(1)
            self._credit = min(self._credit + 1, MOST)
            return self._scores.pop(0)
        self._draft = []
        room = min(self._most, cache.max_length - cache.length - 1)
        if self._credit < 0 or room < 1:
            self._credit += ALLOWANCE
        elif draft := self._phrases.after(ids, room):
            scores = self._model.logits_of_each([ids[-1], *draft], cache)
            if scores is not None:
                cache.crop(cache.length - len(draft))
                self._draft, self._scores = draft, list(scores[1:])
                self._credit -= COST
                first: Array = scores[0]
                return first
        return super()._next(cache, ids)
