"""Checks of single arguments, for functions that take numbers from a caller."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from .errors import InputError


def whole_number(name: str, value: Any, least: int) -> int:
    """`value` as an int; InputError unless it is a whole number (no bool) of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise InputError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return int(value)


def flag(name: str, value: Any) -> bool:
    """`value`, which must be True or False, else InputError."""
    if not isinstance(value, bool):
        raise InputError(f"{name} must be True or False, got {value!r}")
    return value


def real_number(name: str, value: Any, meaning: str = "a number") -> float:
    """`value` as a float; InputError unless it is a finite number (no bool). `meaning`: what it should be."""
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an int beyond all floats
        number = math.inf
    if not math.isfinite(number):
        raise InputError(f"{name} must be {meaning}, got {value!r:.60}")
    return number


def one_of(name: str, value: Any, options: Sequence[Any]) -> Any:
    """`value`, which must be one of the options, else InputError."""
    try:
        known = value in options
    except (ValueError, TypeError):  # an array, which compares element by element
        known = False
    if not known:
        raise InputError(f"{name} must be one of {', '.join(map(str, options))}, got {value!r:.60}")
    return value


def strings(name: str, value: Any) -> tuple[str, ...]:
    """`value` as a tuple; InputError unless it is several strings: one alone would be taken for its letters."""
    try:
        given = (None,) if isinstance(value, str) else tuple(value)
    except TypeError:
        given = (None,)
    if not all(isinstance(one, str) for one in given):
        raise InputError(f"{name} must be a sequence of strings, got {value!r:.60}")
    return given


def as_path(value: Any) -> Path:
    """`value` as a Path; InputError unless it is a path, or the text of one: an empty one would mean this folder."""
    try:
        text = os.fspath(value)
    except TypeError:
        text = ""
    if not text or not isinstance(text, str) or "\0" in text:  # no system has names with a NUL
        raise InputError(f"expected a path, got {value!r:.60}")
    return Path(text)
