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

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..errors import ModelFileError

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
    place = path or files(__package__).joinpath("../facts.json")
    try:
        facts = tuple(_parse(model) for model in json.loads(place.read_text(encoding="utf-8"))["models"])
    except OSError as error:
        raise ModelFileError(f"cannot read {place}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFileError(f"{place} is no file of facts: {type(error).__name__}: {error}") from error
    if not facts:
        raise ModelFileError(f"{place} has facts about no model")
    return facts


def _parse(raw: dict[str, Any]) -> Facts:
    weights = raw.get("weights", {})
    for name, fingerprint in weights.get("fingerprints", {}).items():
        if "shape" not in fingerprint or not set(fingerprint) <= {"shape", "l2", "max_abs", "first", "sha256"}:
            raise ValueError(f"the fingerprint of {name}")
    for fact in raw.get("facts", []):
        if not NEEDED[fact["kind"]] <= set(fact):
            raise ValueError(f"a fact of kind {fact['kind']} needs {', '.join(sorted(NEEDED[fact['kind']]))}")
    return Facts(
        model=raw["model"],
        config=dict(raw["config"]),
        parameters=raw.get("parameters"),
        files=tuple(KnownFile(file["name"], file["bytes"], file["sha256"]) for file in raw.get("files", [])),
        weights=weights,
        facts=tuple(raw.get("facts", [])),
    )
