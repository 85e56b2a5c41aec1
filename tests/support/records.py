"""Records of the commands, held against the JSON Schema in the package."""

from __future__ import annotations

import json
from typing import Any

import jsonschema

import gpt2np
from gpt2np.schema import SCHEMA_FILE


def closed(value: Any) -> Any:
    """The schema with no room for a field that it does not describe."""
    if isinstance(value, list):
        return [closed(v) for v in value]
    if isinstance(value, dict):
        own = {"additionalProperties": False} if "properties" in value and isinstance(value["properties"], dict) else {}
        return {name: closed(v) for name, v in value.items()} | own
    return value


SCHEMA = closed(json.loads(SCHEMA_FILE.read_text(encoding="utf-8")))


def validate(text: str, kind: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(text)
    jsonschema.validate(record, {"$ref": f"#/$defs/{kind}", "$defs": SCHEMA["$defs"]})
    assert record["gpt2np"] == gpt2np.__version__
    return record
