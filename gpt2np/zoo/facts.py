"""Published facts about models, as a file: gpt2np/facts.json for OpenAI's GPT-2s, or one of your own.

The file is {"models": [...]}, with one object for each model:

    {"model": name, "config": {field of GPT2Config: value}, "parameters": count without a separate head,
     "files": [{"name": ..., "bytes": ..., "sha256": ...}],
     "weights": {"source": ..., "l2" | "max_abs" | "first": {"rtol": ..., "atol": ...},
                 "fingerprints": {weight: {"shape": [...], "l2": ..., "max_abs": ..., "first": [...], "sha256": ...}}},
     "facts": [{"kind": ..., "ids": [...], "source": ..., ...}]}

Every key of a fingerprint but "shape" may be left out; "sha256" is that of the float32 bytes, little-endian,
row by row, in the checkpoint's layout. Kinds of facts, all about the run over "ids" (and nothing else):

    greedy         "next": the most likely tokens, one after the other; or "text", which they begin with
    logits         "values" at "tokens" of the last position; with "top": true, no other token's is larger
    hidden         "values": the first of last_hidden_state's last position (mean error at most "mean_abs"), "l2"
    cross_entropy  "value": mean over the tokens after the first, in nats
    beam_search    "first": the best of the sequences, prompt included, that a file which holds a beam search of this
                   "width" finds with this many "new_tokens"; of no other file
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..errors import ModelFileError
from ..files import File, json_object

NEEDED = {
    "greedy": {"ids", "source", "atol"},
    "logits": {"ids", "source", "tokens", "values"},
    "hidden": {"ids", "source", "values", "mean_abs"},
    "cross_entropy": {"ids", "source", "value", "atol"},
    "beam_search": {"ids", "source", "width", "new_tokens", "first"},
}


@dataclass(frozen=True)
class KnownFile:
    """A published file of the model."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Facts:
    """What is published about one model."""

    model: str
    config: dict[str, Any]
    parameters: int | None
    files: tuple[KnownFile, ...]
    weights: dict[str, Any]  # as in the file
    facts: tuple[dict[str, Any], ...]  # as in the file


def load_facts(path: Path | None = None) -> tuple[Facts, ...]:
    """Read a file of facts; without a path, those of OpenAI's four GPT-2s.

    Raises
    ------
    ModelFileError
        If the file cannot be read, holds no model, or is not of the form above.
    """
    place = path or Path(str(files(__package__).joinpath("../facts.json")))
    text = File(place).read()
    try:
        facts = tuple(_parse(model) for model in json_object(text, str(place))["models"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFileError(f"{place} is no file of facts: {type(error).__name__}: {error}") from error
    if not facts:
        raise ModelFileError(f"{place} has facts about no model")
    return facts


def _parse(raw: dict[str, Any]) -> Facts:
    weights = dict(raw.get("weights", {}))
    _check({key: value for key, value in weights.items() if key in ("source", "tied")}, "weights")
    for key in ("l2", "max_abs", "first"):
        tolerance = _check(weights.get(key, {}), f"the tolerance of {key}")
        if not set(tolerance) <= {"rtol", "atol"}:
            raise ValueError(f"the tolerance of {key} has {', '.join(sorted(tolerance))}")
    for name, fingerprint in weights.get("fingerprints", {}).items():
        _check(fingerprint, f"the fingerprint of {name}")
        if "shape" not in fingerprint or not set(fingerprint) <= {"shape", "l2", "max_abs", "first", "sha256"}:
            raise ValueError(f"the fingerprint of {name}")
    for fact in raw.get("facts", []):
        needed = NEEDED[_check(fact, "a fact")["kind"]]
        needed = needed | ({"l2_atol"} if fact["kind"] == "hidden" and "l2" in fact else set())
        needed = needed | ({"next"} if fact["kind"] == "greedy" and "text" not in fact else set())
        if not needed <= set(fact) or not fact["ids"]:
            raise ValueError(f"a fact of kind {fact['kind']} needs {', '.join(sorted(needed))}")
    count = raw.get("parameters")
    if not isinstance(raw["model"], str) or not (count is None or _is_whole(count)):
        raise ValueError(f"the model {raw['model']!r} of {count!r} parameters")
    known = [_check(file, "a file") for file in raw.get("files", [])]
    return Facts(
        model=raw["model"],
        config=dict(raw["config"]),
        parameters=count,
        files=tuple(KnownFile(file["name"], file["bytes"], file["sha256"]) for file in known),
        weights=weights,
        facts=tuple(raw.get("facts", [])),
    )


def _is_whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_list(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(of, value))


# What the fields of a file of facts must be.
TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("kind", "source", "prompt", "text", "name", "sha256"), ("text", lambda v: isinstance(v, str))),
    **dict.fromkeys(("top", "tied"), ("true or false", lambda v: isinstance(v, bool))),
    **dict.fromkeys(("width", "new_tokens", "bytes"), ("a whole number", _is_whole)),
    **dict.fromkeys(("atol", "rtol", "mean_abs", "l2", "l2_atol", "value", "max_abs"), ("a number", _is_number)),
    **dict.fromkeys(("ids", "next", "tokens", "shape"), ("a list of whole numbers", _is_list(_is_whole))),
    **dict.fromkeys(("values", "first"), ("a list of numbers", _is_list(_is_number))),
}


def _check(record: dict[str, Any], what: str) -> dict[str, Any]:
    """The record, if its fields are of the right types; else ValueError."""
    for key, value in record.items():
        if key in TYPES and not TYPES[key][1](value):
            raise ValueError(f"{key} of {what} must be {TYPES[key][0]}, not {str(value)[:80]!r}")
    return record
