"""What explains the nearest wrong outputs, and whether the farther ones say the same.

The keys and values of one layer know nothing of what comes after them: the first ones that are wrong are a small
problem, which holds one mistake where the whole may hold several, or one that is made in some of the layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from ...weights import Array
from ..operations import split_tap
from .problem import CLOSE, Clock, Guess, Problem, one_thread
from .rank import catalogue, in_all, rank, until
from .rounding_mistakes import narrow_types

SHARE = 0.4  # of the time, for the nearest outputs


def explain(
    whole: Problem, nearest: Mapping[str, Array], spare: Mapping[str, Array] | None, recorded: bool
) -> list[Guess]:
    """The best explanations of a problem, best first, by its nearest observed taps where they explain all.

    Where nothing explains all of the whole, what explains the nearest ones goes first: it is one mistake of several.
    """
    first: list[Guess] = []
    if 0 < len(nearest) < len(whole.observed):
        clock = Clock(SHARE * (whole.clock.seconds - whole.clock.used), whole.clock.progress)
        near = Problem(whole.program, whole.call, whole.given, nearest, whole.suspects, clock)
        near.is_whole = False
        first = [g for g in rank(near, spare, recorded) if g.explains and not g.fitted]
        with one_thread(), until(whole.clock, 0.85):
            for guess in first:
                for wider in (replace(guess), *alike(whole, guess)):
                    if whole.judge(wider).explains or wider.removed >= CLOSE:
                        wider.likely = True
                        return [wider]
    ranked = rank(whole, spare, recorded)
    if first and not (ranked and ranked[0].explains):
        first[0].likely = first[0].likely and first[0].call is None  # another input would explain what follows, too
        first[0].evidence = f"all of {' and '.join(nearest)}; what comes later differs further"
        return [first[0], *(g for g in ranked if g.cause != first[0].cause)]
    return ranked


def alike(problem: Problem, guess: Guess) -> Iterator[Guess]:
    """The same mistake in other layers, too: in all of them, from its own on, in every second one."""
    layer, part = split_tap(guess.tap)
    if layer is None:
        return
    same: dict[int, Guess] = {}
    for tap in problem.taps:
        i, other = split_tap(tap)
        if i is None or i in same or not (other == part or {other, part} <= {"attn.q", "attn.k", "attn.v"}):
            continue
        made = next((g for g in catalogue(problem, tap, alone=True) if g.variant == guess.variant), None)
        made = made or next((g for g in narrow_types(problem, tap) if g.variant == guess.variant), None)
        same.update({i: made} if made is not None else {})
    later = [g for i, g in same.items() if i >= layer]
    for some in (list(same.values()), later, later[::2]):
        if len(some) > 1:
            yield in_all(some)
