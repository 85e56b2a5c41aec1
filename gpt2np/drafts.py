"""Drafts: the next tokens guessed from the text so far, and checked by the model in one pass.

A pass over a few tokens takes hardly longer than a pass over one if the time is that of reading the weights, which both
do once. So where the last words of a text stood in it before, what followed them there is run along with the newest
token. As long as the tokens that are then chosen are those of the draft, their scores are there already; the rest of
the draft is forgotten.

The kernels compute the scores of a position by the same operations in either case, so whoever chooses tokens by them,
greedily or by chance, chooses the same ones: drafts change how long a text takes, never the text. The idea is that of
Saxena 2023, "Prompt Lookup Decoding".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from .cache import KVCache
from .decoding import SeparateCaches
from .weights import Array

if TYPE_CHECKING:
    from .model import GPT2

LONGEST = 3  # tokens that a text must end with as it did before, at most; longer matches are found by their ends
# Passes over one position that each further one adds, where the weights are read once; measured on a Zen 3 with AVX2:
LARGE = 0.1  # where the time is that of the memory; 0.05 to 0.1, and 0.2 for the second one in 16 bits
SMALL = 0.4  # where the caches hold the weights, and multiply-adds and Python set it; 0.1 to 0.4
LEVELS = 0.5  # where numbers are made of levels; 0.4 to 0.6, and 0.1 to 0.4 for the second one
CACHES = 1 << 25  # bytes of weights
GAIN = 1.1  # tokens in the time of one that a draft must promise: guessing, and preparing longer passes, take time, too


class Phrases:
    """Where the last tokens of a growing text stood in it before, and how often what followed them came again."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}  # up to LONGEST tokens -> the index after their last occurrence
        self._known = 0  # tokens of the text at whose ends phrases have been noted
        # Guesses by phrases of each length that were right, and all of them, as if one of three had been: half of each
        self._right, self._made = [0.5] * (LONGEST + 1), [1.5] * (LONGEST + 1)

    def after(self, text: list[int]) -> tuple[int, int]:
        """Where in the text its last tokens were followed by another one, and how many of them; or 0, 0.

        What was asked about before must be the beginning of this text.
        """
        for end in range(self._known + 1, len(text)):  # all but the end of the text itself
            guessed = False
            for length in range(min(LONGEST, end), 0, -1):
                phrase = tuple(text[end - length : end])
                start = self._ends.get(phrase)
                if start is not None and not guessed:
                    guessed = True
                    self._made[length] += 1
                    self._right[length] += text[start] == text[end]
                self._ends[phrase] = end
        self._known = max(self._known, len(text) - 1)
        for length in range(min(LONGEST, len(text)), 0, -1):
            start = self._ends.get(tuple(text[-length:]))
            if start is not None:
                return start, length
        return 0, 0

    def chance(self, length: int) -> float:
        """The share of right ones among the tokens that phrases of this length led to."""
        return self._right[length] / self._made[length]


class Drafter:
    """Drafts for a growing text, as long as they are worth their time.

    What followed a phrase is compared with what follows now all along the text, also where no draft was run. So it is
    known how often such guesses are right, and a text that never repeats costs no passes.

    Parameters
    ----------
    more : float
        Passes over one position that each further one adds.
    lengths : sequence of int
        Tokens that a draft may have.
    """

    def __init__(self, more: float, lengths: Sequence[int]) -> None:
        self._more = more
        self._lengths = lengths
        self._phrases = Phrases()

    def draft(self, text: list[int], most: int) -> list[int]:
        """Up to `most` tokens to run after the text, of which the text of the last call is the beginning.

        The number of them for which a token is expected to take the least time.
        """
        start, length = self._phrases.after(text)
        if not length or self._phrases.chance(length) <= self._more:  # not even the first one is worth it
            return []
        worth, best, expected, chance = 0, GAIN, 1.0, 1.0
        for count in range(1, 1 + min(most, max(self._lengths))):
            chance *= self._phrases.chance(length)
            expected += chance
            length = min(length + 1, LONGEST)  # a token that was right makes its phrase longer
            if count in self._lengths and (value := expected / (1 + self._more * count)) > best:
                worth, best = count, value
        # where the copy reaches the end of the text, it goes on with itself
        return [text[start + i % (len(text) - start)] for i in range(worth)]


def drafter_for(model: GPT2) -> Drafter:
    """A Drafter whose drafts fill a tile of the kernels, for the times of this model's passes."""
    from .kernels import ROWS, Panels

    matrices = cast(list[Panels], model._weights.block_matrices)
    size = sum(matrix.data.nbytes for matrix in matrices)
    more = SMALL if size <= CACHES else LARGE
    return Drafter(max(more, LEVELS) if matrices[0].form in ("int8", "int4") else more, (1, 3, ROWS - 1))


class DraftingCache(SeparateCaches):
    """A Decoder of one row that runs drafts along with the newest token."""

    def __init__(self, model: GPT2, window: int | None, cache: KVCache | None, drafter: Drafter) -> None:
        super().__init__(model, window, cache)
        self._drafter = drafter
        self._draft: list[int] = []  # tokens that have been run after those that the cache counts
        self._scores: list[Array] = []  # (V,) after each of them

    def _next(self, cache: KVCache, ids: list[int]) -> Array:
        if self._draft and ids[-1] == self._draft.pop(0):
            cache.advance(1)
            return self._scores.pop(0)
        draft, self._draft = self._drafter.draft(ids, cache.max_length - cache.length - 1), []
        if draft and (scores := self._model.logits_of_each([ids[-1], *draft], cache)) is not None:
            cache.crop(cache.length - len(draft))
            self._draft, self._scores = draft, list(scores[1:])
            first: Array = scores[0]
            return first
        return super()._next(cache, ids)
