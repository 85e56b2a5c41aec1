"""What the commands write as JSON: the schema that describes it, and what stands at the head of every record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1  # raised when a field changes its meaning or goes; new fields do not raise it
SCHEMA_FILE = Path(__file__).with_name("output.schema.json")


def stamped(kind: str, record: dict[str, Any]) -> dict[str, Any]:
    """A record with its kind (a definition of the schema), the schema's version and gpt2np's at its head."""
    from . import __version__

    return {"kind": kind, "schema_version": SCHEMA_VERSION, "gpt2np": __version__, **record}
