"""Compare a reader's function with the textbook's, and say what is wrong with it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays import Array
from ..call import Call
from ..errors import InputError
from ..parity.explain.problem import Guess, Problem
from ..parity.explain.rank import rank
from ..parity.operations import tap_inputs, tap_names
from ..parity.program import Program
from .tasks import CONFIG, EXERCISES, SOURCES, Case, Exercise

EXACT = 1e-9  # of the largest number of a result: float64 sums in any order agree to about 1e-14
ROUNDED = 1e-4  # the same for float32, where this is checked besides
Results = dict[str, Any]  # what a function gave, by the names of the exercise


@dataclass(frozen=True)
class Answer:
    """What `check` says: true if the function is right; printed, it says what is wrong, and why it may be."""

    exercise: str
    ok: bool
    text: str
    place: str = ""  # the tap, or the result, that differs first
    cause: str = ""  # the mistake that explains it; "" where none is known

    def __bool__(self) -> bool:
        return self.ok

    def __repr__(self) -> str:
        return self.text


class Wrong(Exception):
    """A result that is no result; the message says why."""


def check(name: str, function: Callable[..., Any]) -> Answer:
    """Is `function` right? It is run on several inputs beside the textbook's function.

    Parameters
    ----------
    name : str
        An exercise of the book, one of `exercises.EXERCISES`.
    function : callable
        Takes the arguments that the exercise names, in their order.

    Raises
    ------
    InputError
        If there is no such exercise, or `function` cannot be called.
    """
    if name not in EXERCISES:
        raise InputError(f"there is no exercise {name!r}; there are {', '.join(EXERCISES)}")
    if not callable(function):
        raise InputError(f"check takes a function, got {type(function).__name__}")
    exercise = EXERCISES[name]
    tried = 0
    for dtype in (np.float64, np.float32) if exercise.floats else (np.float64,):
        for case in exercise.cases(dtype):
            tried += 1
            right, _ = _results(exercise, case, exercise.right)
            try:
                given, taps = _results(exercise, case, function)
                if dtype is np.float32:
                    _check_float32(given, right)
            except Wrong as wrong:
                cause = _known_mistake(exercise, function)
                return _no(exercise, case, str(wrong), cause=cause)
            found = _first_difference(given, right, EXACT if dtype is np.float64 else ROUNDED)
            if found:
                return _explained(exercise, case, function, given, taps, found)
    return Answer(name, True, f"{name}: right, on all {tried} inputs.")


def _results(exercise: Exercise, case: Case, function: Callable[..., Any]) -> tuple[Results, dict[str, Array]]:
    """What a function gives for a copy of the arguments, by name, and the taps that it calls.

    Raises Wrong for an exception, for a result that is no array of numbers, and where an argument was changed.
    """
    arguments = [copy.deepcopy(a) if isinstance(a, np.ndarray) else a for a in case.arguments]
    taps: dict[str, Array] = {}
    if exercise.inside:  # the argument before the name
        arguments[-2] = lambda tap, value: taps.__setitem__(str(tap), np.array(value))
    try:
        with np.errstate(all="ignore"):
            made = function(*arguments)
    except Exception as error:
        raise Wrong(f"your function raises {type(error).__name__}: {error}") from None
    for i, (before, after) in enumerate(zip(case.arguments, arguments, strict=True)):
        changed = isinstance(before, np.ndarray) and not np.array_equal(
            before, after, equal_nan=before.dtype.kind == "f"
        )
        if changed and i != exercise.mutates:
            raise Wrong(f"your function changes its argument number {i + 1}, which belongs to the caller")
    names = exercise.results
    values = list(made) if len(names) > 1 and isinstance(made, (tuple, list, np.ndarray)) else [made]
    if len(values) != len(names):
        raise Wrong(f"your function gives {len(values)} results, where {len(names)} belong: {', '.join(names)}")
    results: Results = dict(zip(names, values, strict=True))
    if exercise.mutates is not None:
        results["the cache"] = arguments[exercise.mutates]
    if not exercise.arrays:
        return results, taps
    for key, value in results.items():
        if value is None:
            raise Wrong(f"{key} is None: does your function return it?")
        try:
            results[key] = np.asarray(value)
        except ValueError:
            raise Wrong(f"{key} is no array: its rows have different lengths") from None
        if results[key].dtype.kind not in "iuf":
            raise Wrong(f"{key} is no array of numbers, but {type(value).__name__} of {results[key].dtype}")
    return results, taps


def _check_float32(given: Results, right: Results) -> None:
    for key, value in given.items():
        if right[key].dtype == np.float32 and value.dtype != np.float32:
            raise Wrong(
                f"{key} is {value.dtype} for inputs of float32: some number of yours is a float64 (np.sqrt of a Python "
                "number, say; math.sqrt gives one that adapts)"
            )


def _first_difference(given: Results, right: Results, tolerance: float) -> tuple[str, str] | None:
    """Name and words of the first result that differs."""
    for key, expected in right.items():
        value = given[key]
        if not isinstance(expected, np.ndarray):
            if value != expected:
                return key, f"gives {value!r}, where {expected!r} belongs"
            continue
        words = difference(value, expected, tolerance)
        if words:
            return key, words
    return None


def difference(value: Array, expected: Array, tolerance: float) -> str:
    """Where two arrays differ most, in words; "" where they do not."""
    if value.shape != expected.shape:
        return f"has shape {value.shape}, where {expected.shape} belongs"
    with np.errstate(all="ignore"):
        error = np.abs(value.astype(np.float64) - expected)
        same = (value == expected) | (np.isnan(value) & np.isnan(expected))  # inf where inf belongs is right
        error = np.where(same, 0, np.nan_to_num(error, nan=np.inf))
        finite = np.abs(expected[np.isfinite(expected)])
        allowed = tolerance * max(float(finite.max(initial=0)), 1e-30)
    if not (error > allowed).any():
        return ""
    at = tuple(int(i) for i in np.unravel_index(int(error.argmax()), error.shape))
    share = f"{int((error > allowed).sum())} of {error.size} numbers"
    return f"differs in {share}, most at {list(at)}: {value[at]:.6g}, where {expected[at]:.6g} belongs"


def _no(exercise: Exercise, case: Case, words: str, place: str = "", cause: str = "") -> Answer:
    end = f" It looks like this: {cause}." if cause else ""
    return Answer(exercise.name, False, f"{exercise.name}: not yet. On {case.words}: {words}.{end}", place, cause)


def _explained(
    exercise: Exercise, case: Case, function: Callable[..., Any], given: Results, taps: Mapping[str, Array],
    found: tuple[str, str],
) -> Answer:  # fmt: skip
    place, words = found
    cause = _known_mistake(exercise, function)
    guess = None
    if exercise.taps and not cause:
        where, guess = _debugged(exercise, case, given, taps)
        if guess is None:  # one token alone hides much: its softmax is 1
            others = [other for other in exercise.cases(np.float64) if other.words != case.words]
            guess = next(filter(None, (_debugged_quietly(exercise, other, function) for other in others)), None)
        if where and where != place:
            place = where
            words = f"{where} is the first to differ; what comes before agrees. {exercise.taps[-1]} {words}"
            return _no(exercise, case, words, place, _as_if(guess))
    text = f"{place} {words}"
    if not cause and guess is None:
        text += ". None of the usual mistakes explains it"
    return _no(exercise, case, text, place, cause or _as_if(guess))


def _as_if(guess: Guess | None) -> str:
    """The debugger's words for a cause, "as if epsilon were 0"; "" where there is none."""
    return f"as if {guess.text}" if guess else ""


def _known_mistake(exercise: Exercise, function: Callable[..., Any]) -> str:
    """The mistake of the exercise's own list that gives the same numbers on every input; "" if none does."""
    for text, wrong in exercise.mistakes.items():
        differs = False
        for case in exercise.cases(np.float64):
            theirs, mine, right = (_quietly(exercise, case, f) for f in (function, wrong, exercise.right))
            if theirs is None or mine is None or right is None or _first_difference(theirs, mine, EXACT):
                if theirs is mine is None:
                    continue
                break
            differs = differs or _first_difference(mine, right, EXACT) is not None
        else:
            if differs:
                return text
    return ""


def _quietly(exercise: Exercise, case: Case, function: Callable[..., Any]) -> Results | None:
    try:
        return _results(exercise, case, function)[0]
    except Wrong:
        return None


def _debugged(exercise: Exercise, case: Case, given: Results, taps: Mapping[str, Array]) -> tuple[str, Guess | None]:
    """The first operation of the reader's that differs, and the debugger's guess at the reason."""
    program = Program.of(CONFIG, SOURCES)
    values = {tap: np.asarray(given[tap], np.float64) for tap in exercise.taps}
    call, names = _call(case), tap_names(CONFIG)
    if exercise.mutates is not None:  # keys and values show in the cache, even to whom calls no tap
        P, T = call.start, call.input_ids.shape[1]
        values["h.0.attn.k"], values["h.0.attn.v"] = np.asarray(given["the cache"], np.float64)[:, :, :, P : P + T]
    values |= {tap: np.asarray(taps[tap], np.float64) for tap in exercise.inside if tap in taps}
    known: dict[str, Array] = dict(case.given)
    group = ("h.0.attn.q", "h.0.attn.k", "h.0.attn.v")
    for tap in sorted(values, key=names.index):
        inputs = {k: v for k, v in known.items() if k != tap}
        expected = program.from_given(tap, call, inputs, np.dtype(np.float64))
        if difference(values[tap], expected, EXACT):
            if values[tap].shape != expected.shape:
                return tap, None
            observed = {t: values[t] for t in (group if tap in group else (tap,)) if t in values}
            between = [t for t in names if _within(t, tap, inputs, program)]
            problem = Problem(program, call, {k: v for k, v in inputs.items() if k not in observed}, observed, between)
            likely = [guess for guess in rank(problem) if guess.explains or guess.removed > 0.9]
            return tap, likely[0] if likely else None
        known[tap] = values[tap]
    return "", None


def _debugged_quietly(exercise: Exercise, case: Case, function: Callable[..., Any]) -> Guess | None:
    try:
        return _debugged(exercise, case, *_results(exercise, case, function))[1]
    except Wrong:
        return None


def _within(name: str, tap: str, known: Mapping[str, Array], program: Program) -> bool:
    """Whether an operation lies between what is known and a tap."""
    pending, seen = [tap], set()
    while pending:
        one = pending.pop()
        if one not in seen:
            seen.add(one)
            pending += [i for i in tap_inputs(one, program.config) if i not in known]
    group = {"h.0.attn.q", "h.0.attn.k", "h.0.attn.v"}
    return name in seen or (tap in group and name in group)


def _call(case: Case) -> Call:
    shape = next(iter(case.given.values())).shape  # (B, T, C) or (B, H, T, D)
    B, T = shape[0], shape[-2]
    start = 0 if case.past is None else case.past[0].shape[3]
    return Call(np.zeros((B, T), np.int64), np.arange(start, start + T)[None].repeat(B, axis=0), case.past, start=start)
