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

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .cache import KVCache
from .decoding import SeparateCaches
from .weights import Array

if TYPE_CHECKING:
    from .model import GPT2

LONGEST = 3  # tokens that a text must end with as it did before, at most; longer matches are found by their ends
FURTHER = 0.25  # passes over one position that each further one is taken to add until that is measured
SHARE = 0.2  # of a new measurement in the mean
GAIN = 1.2  # tokens in the time of one that a draft must promise: guessing, and preparing longer passes, take time, too
PAUSE = 8  # tokens after which a text is looked at again where no draft would be worth it: that takes time, too
RISK, RISKED = 3.0, 0.01  # passes that drafts may lose in all: at first, and more for each token


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


class Costs:
    """How long passes over further positions take, in passes over one; measured while a text is written.

    It depends on the model, on how its weights are kept, and on the machine: on a Zen 3 with AVX2 a further position
    adds from 0.06 passes, where the memory sets the time, to 0.3, where numbers are made of 4 bits.
    """

    def __init__(self) -> None:
        self._seconds = 0.0  # of a pass over one position
        self._costs: dict[int, float] = {}

    def of(self, further: int) -> float:
        """What a pass over one position and so many further ones is taken to cost."""
        return self._costs.get(further) or 1 + FURTHER * further

    def took(self, further: int, seconds: float) -> None:
        """Count a pass over one position and so many further ones.

        The first one of a size prepares memory and is left out; one that was held up counts as twice the mean.
        """
        if further not in self._costs:
            self._costs[further] = self.of(further)
        elif not further:
            self._seconds += SHARE * (min(seconds, 2 * self._seconds) - self._seconds) if self._seconds else seconds
        elif self._seconds:
            cost = self._costs[further]
            self._costs[further] += SHARE * (min(seconds / self._seconds, 2 * cost) - cost)


class Drafter:
    """Drafts for a growing text, as long as they are worth their time.

    What followed a phrase is compared with what follows now all along the text, also where no draft was run. So it is
    known how often such guesses are right, and a text that never repeats costs no passes. What wrong drafts cost is
    counted, too, and never becomes much more than what the right ones brought: a text may stop repeating.

    Parameters
    ----------
    lengths : sequence of int
        Tokens that a draft may have.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.costs = Costs()
        self._lengths = lengths
        self._phrases = Phrases()
        self._left = RISK  # passes that may be lost
        self._pause = 0  # length of the text up to which none is worth it

    def draft(self, text: list[int], most: int) -> list[int]:
        """Up to `most` tokens to run after the text, of which the text of the last call is the beginning.

        The number of them for which a token is expected to take the least time.
        """
        self._left += RISKED
        if len(text) < self._pause:
            return []
        start, length = self._phrases.after(text)
        count = self._worth(length, most) if length else 0
        if not count and not self._worth(LONGEST, most):
            self._pause = len(text) + PAUSE
        self._left -= self.costs.of(count) - 1
        # where the copy reaches the end of the text, it goes on with itself
        return [text[start + i % (len(text) - start)] for i in range(count)]

    def was_right(self) -> None:
        """Count a token of a draft that saved a pass."""
        self._left += 1

    def _worth(self, length: int, most: int) -> int:
        """The best number of tokens after a phrase of this length."""
        worth, best, expected, chance = 0, GAIN, 1.0, 1.0
        for count in range(1, 1 + min(most, max(self._lengths))):
            chance *= self._phrases.chance(length)
            expected += chance
            length = min(length + 1, LONGEST)  # a token that was right makes its phrase longer
            if count in self._lengths:
                cost = self.costs.of(count)
                if expected / cost > best and cost - 1 < self._left:
                    worth, best = count, expected / cost
        return worth


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
            self._drafter.was_right()
            return self._scores.pop(0)
        draft, self._draft = self._drafter.draft(ids, cache.max_length - cache.length - 1), []
        began = time.perf_counter()
        if draft and (scores := self._model.logits_of_each([ids[-1], *draft], cache)) is not None:
            cache.crop(cache.length - len(draft))
            self._draft, self._scores = draft, list(scores[1:])
            first: Array = scores[0]
        else:
            first = super()._next(cache, ids)
        self._drafter.costs.took(len(self._draft), time.perf_counter() - began)
        return first
