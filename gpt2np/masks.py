"""What hides a key from a query: the rule that a file's graph follows, and the mask that one call makes of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from .arrays import Array

Effect = tuple[float, float]  # (factor, addend): a hidden score s becomes factor * s + addend

NO_WEIGHT = {"float32": 105.0, "float64": 746.0}  # exp of minus that is 0
NEGLIGIBLE = -9000.0  # a score that much below others has probability exp(-9000) = 0, in float64 too
FAR = -1e30  # scores do not come near lower numbers


class SafeScores(NamedTuple):
    """What the highest score that a query sees must be, so that the keys hidden from it have no weight."""

    lowest: float = -math.inf  # not below this
    highest: float = math.inf  # and not above
    added: float = -math.inf  # nor below any hidden score, with this added to it


@dataclass(frozen=True)
class MaskRule:
    """What a graph does to the scores of hidden keys before the softmax.

    Every GPT-2 hides keys that come later than the query. Files differ in how, and in what they do about padding;
    recorded outputs show these differences in the rows of padded positions.
    """

    # The score of a later key becomes `value`, has that added, stays as it is, or ("given") the caller's
    # attention_mask (B, 1, T, S) tells; where the caller has none, queries see no later key.
    kind: Literal["replaced", "added", "none", "given"] = "replaced"
    value: float = -1e4
    shift: int = 0  # query i sees keys j <= i + shift; 0 in any sound GPT-2
    # What a score becomes where attention_mask is 0, and where besides the key lies later.
    padding: Effect = (0.0, -math.inf)
    padding_later: Effect = (0.0, -math.inf)
    # What a query that may see no key (padding on the left) gets: zeros in place of values, NaN, what the masked
    # scores give, or what the scores give without a mask.
    blind_rows: Literal["zeros", "nan", "masked", "unmasked"] = "zeros"
    adds: bool = False  # attention_mask is added to the scores: it does not say 1 or 0
    # What other layers have in the place of `value`: it does not matter as long as scores stay away from all of them.
    others: tuple[float, ...] = ()
    # Probabilities of hidden keys are set to 0 behind the softmax, doing nothing while scores are far from `value`.
    zeroed: bool = False

    def describe(self) -> str:
        """One phrase about later keys, as `gpt2np info` prints it."""
        text = {
            "replaced": f"scores of later keys become {self.value:g}",
            "added": f"scores of later keys have {self.value:g} added",
            "none": "later keys are not masked",
            "given": "attention_mask says which keys each query sees",
        }[self.kind]
        text += "".join(f", in some layers {value:g}" for value in self.others)
        text += ", and their probabilities 0" if self.zeroed else ""
        return f"{text}, where query i sees keys up to i{self.shift:+d}" if self.shift else text

    @property
    def is_causal(self) -> bool:
        """Whether without padding this is the causal mask: keys up to the query's own, no weight on later ones."""
        return self.kind != "none" and self.value < NEGLIGIBLE and self.shift == 0

    @property
    def must_be_safe(self) -> bool:
        """Whether scores that come near the numbers of hidden ones would give what is not computed here."""
        return bool(self.others) or self.zeroed

    def effects(self, attention_mask: Array | None) -> list[Effect]:
        """What may happen to hidden scores in a call."""
        later = () if self.kind == "none" else (self.value, *self.others)
        effects = [(float(self.kind == "added"), value) for value in later]
        if attention_mask is not None:
            effects += [self.padding, self.padding_later]
            if attention_mask.ndim == 4 and attention_mask.dtype.kind == "f":
                effects.append((1.0, NEGLIGIBLE))
        return effects

    def can_be_noticed(self, attention_mask: Array | None) -> bool:
        """Whether hidden scores become numbers that scores can come near."""
        return any(addend > FAR for _, addend in self.effects(attention_mask))

    def safe_scores(self, attention_mask: Array | None, dtype: np.dtype[Any]) -> SafeScores:
        """What leaves hidden keys without any weight."""
        lowest, highest, added = SafeScores()
        for factor, addend in self.effects(attention_mask):
            if addend == -math.inf:
                continue
            if not factor:
                lowest = max(lowest, addend + NO_WEIGHT[dtype.name])
            elif addend > FAR:
                added = max(added, addend + NO_WEIGHT[dtype.name])
            else:  # a hidden score so large would be of the size of the largest float
                lowest, highest = max(lowest, addend / 8), min(highest, -addend / 8)
        return SafeScores(lowest, highest, added)


class ScoresReachMask(Exception):
    """Some query's scores are so low, or so high, that keys which the file hides have weight there."""


CAUSAL = MaskRule()  # that of GPT-2's own code


@dataclass(frozen=True, eq=False)
class Mask:
    """The mask of one call, a function of the scores (B, H, T, S).

    `added` is added to the scores. Where `keep` is False it takes their place: this is for graphs whose replaced
    scores can be noticed in the result.
    """

    added: Array  # (B, 1, T, S)
    keep: Array | None = None  # (B, 1, T, S) bool
    safe: SafeScores | None = None  # scores must be so

    def __call__(self, scores: Array) -> Array:
        """Masked scores, (B, H, T, S); raises ScoresReachMask where they are not `safe`."""
        if self.safe is not None:
            seen = ~np.isneginf(self.added)
            highest = np.where(seen, scores, -np.inf).max(axis=-1)
            hidden = np.where(seen, -np.inf, scores).max(axis=-1) + self.safe.added
            wrong = (highest < self.safe.lowest) | (highest > self.safe.highest) | (highest < hidden)
            if (wrong & seen.any(axis=-1)).any():
                raise ScoresReachMask
        kept = scores if self.keep is None else np.where(self.keep, scores, 0)
        return np.asarray(kept + self.added)

    @property
    def kept_queries(self) -> Array:
        """(B, T), dtype of `added`: 1 where a query's scores count, 0 where others take the place of them all."""
        B, _, T, _ = self.added.shape
        if self.keep is None:
            return np.ones((B, T), self.added.dtype)
        kept = np.asarray(self.keep & ~np.isneginf(self.added)).any(axis=-1)
        return np.asarray(kept).reshape(B, T).astype(self.added.dtype)

    @property
    def is_additive(self) -> bool:
        """Whether it can be told by adding numbers to the scores that are looked at, as the kernels do.

        For each query, these are its own scores or all 0. The kernels leave hidden keys out, whose NaN would reach
        the result here.
        """
        if self.keep is None or np.isnan(self.added).any():
            return self.keep is None and not np.isnan(self.added).any()
        B, _, T, _ = self.added.shape
        wanted = np.asarray(self.kept_queries == 1).reshape(B, 1, T, 1)
        return bool(((self.keep == wanted) | np.isneginf(self.added)).all())


def mask_for(
    rule: MaskRule, attention_mask: Array | None, B: int, T: int, S: int, dtype: np.dtype[Any], whole: bool = False
) -> Mask | None:
    """The mask of T new positions over S keys, or None where that is the causal mask alone.

    It is what the file's graph does, as the rule describes it, with -inf for every hidden score that cannot be
    noticed in the result while scores are safe (`MaskRule.safe_scores`); `whole`: without this shortcut, or, where
    the rule must be safe, with a check that scores are. A row of -inf alone gives zeros. `attention_mask`: as
    `call.checked_call` returns it.
    """
    if rule.is_causal and attention_mask is None and not whole:
        return None
    padded = np.zeros((B, 1, 1, S), bool)
    bias: Array | None = None  # numbers that the caller adds to the scores
    for_each_query = attention_mask is not None and attention_mask.ndim == 4
    if attention_mask is not None:
        if for_each_query and attention_mask.dtype.kind == "f":
            bias = attention_mask
        else:
            padded = attention_mask == 0 if for_each_query else (attention_mask == 0)[:, None, None, :]
    if rule.is_causal and not for_each_query and not padded.any() and not whole:
        return None

    # 1. What the graph makes of each score: factor * s + mask.
    later = np.arange(S) > np.arange(S - T, S)[:, None] + rule.shift  # (T, S)
    if rule.kind == "none" or (rule.kind == "given" and for_each_query):
        later = np.zeros_like(later)
    factor, mask = np.ones((B, 1, T, S)), np.zeros((B, 1, T, S))
    for where, (f, added) in (
        (later & ~padded, (float(rule.kind == "added"), rule.value)),
        (padded & ~later, rule.padding),
        (padded & later, rule.padding_later),
    ):
        where = np.broadcast_to(where, mask.shape)
        factor[where], mask[where] = f, added
    if bias is not None:
        mask += bias

    # 2. Queries that see no key.
    hidden = (later | padded | (mask < NEGLIGIBLE)) & np.ones_like(mask, bool)
    blind = hidden.all(axis=-1, keepdims=True) & np.ones_like(hidden)
    unseen = blind if bias is None else blind & np.isneginf(mask).all(axis=-1, keepdims=True)
    if rule.blind_rows == "zeros":
        mask[unseen] = -np.inf
    elif rule.blind_rows == "nan":
        mask[unseen] = np.nan
    elif rule.blind_rows == "unmasked":
        factor[unseen], mask[unseen] = 1, 0

    # 3. The same in numbers of `dtype`, with -inf where no one can tell.
    if not whole or rule.must_be_safe:
        mask[~blind & (mask < NEGLIGIBLE)] = -np.inf
    mask[np.isfinite(mask) & (mask < -1e300)] = np.finfo(dtype).min  # the lowest number in a float64 file
    with np.errstate(over="ignore"):  # twice float32's lowest number is -inf, in the graph too
        mask = mask.astype(dtype)
    keep = (factor == 1) | np.isinf(mask) | (mask < FAR)  # a score vanishes beside such a number
    safe = rule.safe_scores(attention_mask, dtype) if whole and rule.must_be_safe else None
    return Mask(mask, None if keep.all() else keep, safe)
