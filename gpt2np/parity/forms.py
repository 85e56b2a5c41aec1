"""Arrays in whatever form a port gives them: NumPy, lists, torch tensors, bfloat16, tuples, dictionaries, `Output`."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import ComparisonError
from ..weights import Array

NARROW_TORCH = ("torch.bfloat16", "torch.float8_e4m3fn", "torch.float8_e5m2")  # NumPy has no such types


def as_array(value: Any, who: str) -> Array:
    """An array of real numbers; bfloat16 and 8-bit floats come as float32, which holds them exactly.

    Raises
    ------
    ComparisonError
        If it is none; `who` begins the message ("port.npz holds 'logits'").
    """
    if hasattr(value, "detach"):  # a torch tensor, known without importing torch
        value = value.detach().cpu()
        value = (value.float() if str(value.dtype) in NARROW_TORCH else value).resolve_conj().numpy()
    if value is None:
        raise ComparisonError(f"{who} as None, which is no array")
    if hasattr(value, "harden_mask") and np.any(value.mask):  # known without importing NumPy's masked arrays
        raise ComparisonError(f"{who} as a masked array: what its mask hides is no number; fill it before")
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise ComparisonError(f"{who} as {type(value).__name__}, which is no array: {error}") from None
    kind = array.dtype.kind
    if kind == "V" and array.dtype.names is None and array.dtype.name != f"void{8 * array.dtype.itemsize}":
        return array.astype(np.float32)  # a float type of ml_dtypes
    if kind == "V" and array.dtype.names is None and array.dtype.itemsize == 2:
        bits = np.ascontiguousarray(array).view(np.uint16).astype(np.uint32) << 16  # np.savez wrote bfloat16 so
        return bits.view(np.float32)
    if kind == "O":
        raise ComparisonError(f"{who} as an array of Python objects: give numbers, np.asarray(x, np.float32)")
    if kind not in "biuf":
        raise ComparisonError(
            f"{who} as {array.dtype}, which is no array of real numbers: save it as float32, x.astype(np.float32)"
        )
    return array


def form_of(value: Any) -> str:
    """The type that a value's numbers have for its owner, as "bfloat16"; "" where NumPy's dtype says it all."""
    name = str(getattr(value, "dtype", "")).removeprefix("torch.")
    return "bfloat16" if name in ("|V2", "void16") else name if name.startswith(("bfloat", "float8")) else ""


def named(given: Any, outputs: Sequence[str], who: str) -> dict[str, Any]:
    """What a function returned as {name: value}: a mapping, an `Output`, a tuple in the outputs' order, one array.

    Raises
    ------
    ComparisonError
        If it is none of these, holds another number of arrays than there are outputs, or two under one name.
    """
    if given is None:
        raise ComparisonError(f"{who} returned None: return an array, a tuple in the order of the outputs, or a dict")
    fields = getattr(given, "_fields", None)
    if fields is not None and isinstance(given, tuple):  # a named tuple, as gpt2np's Output
        given = dict(zip(fields, given, strict=True))
    if isinstance(given, Mapping):
        found: dict[str, Any] = {}
        for key, value in (pair for name, held in given.items() if held is not None for pair in _past(str(name), held)):
            if key in found:  # as 1 and "1", or in past_key_values and by itself
                raise ComparisonError(f"{who}: {key!r} is there twice, and one alone would be compared")
            found[key] = value
        return found
    if isinstance(given, (tuple, list)) and any(hasattr(v, "shape") or isinstance(v, (tuple, list)) for v in given):
        flat = list(_flat(given))
        if all(hasattr(v, "shape") for v in flat):
            if len(flat) > len(outputs):
                raise ComparisonError(f"{who} returned {len(flat)} arrays; the outputs are {', '.join(outputs)}")
            return dict(zip(outputs, flat, strict=False))
    return {outputs[0]: given}


def _flat(given: Any) -> Iterator[Any]:
    for value in given:
        if isinstance(value, (tuple, list)):
            yield from _flat(value)
        elif value is not None:
            yield value


def _past(name: str, held: Any) -> Iterator[tuple[str, Any]]:
    """Keys and values of the layers, however they are nested, as present.i, or present.i.key and present.i.value."""
    if name in ("past_key_values", "past", "presents") and not hasattr(held, "shape"):
        for layer, pair in enumerate(held):
            if isinstance(pair, (tuple, list)) and len(pair) >= 2:
                yield f"present.{layer}.key", pair[0]
                yield f"present.{layer}.value", pair[1]
            else:
                yield f"present.{layer}", pair
    else:
        yield name, held


def nearest(name: str, valid: Sequence[str], count: int = 4) -> str:
    """The valid names that a misspelt one may mean, for an error message."""
    close = difflib.get_close_matches(name, valid, count, 0.5)
    shown = close or list(valid[:count])
    return ", ".join(shown) + (", ..." if len(valid) > len(shown) and not close else "")
