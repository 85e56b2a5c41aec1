"""Checks of single arguments, for functions that take numbers from a caller."""

from __future__ import annotations

import math
import os
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


def as_path(value: Any) -> Path:
    """`value` as a Path; InputError unless it is a path, or the text of one: an empty one would mean this folder."""
    try:
        text = os.fspath(value)
    except TypeError:
        text = ""
    if not text or not isinstance(text, str):
        raise InputError(f"expected a path, got {value!r:.60}")
    return Path(text)
