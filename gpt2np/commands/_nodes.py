"""The ledger for reading: each node with its role, its tap, and the line of reference.py that it is a part of."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..onnx.recognise import Recognised
    from ..onnx.recognise.recognised import Entry

# What the operations of the taps do not tell: c_attn makes q, k and v in one line.
_C_ATTN = "split_heads(linear(x, *w.c_attn)"


def rows(found: Recognised) -> list[dict[str, Any]]:
    """One row for each node that an output depends on, in the file's order."""
    return [
        {
            "node": entry.node.name or next(iter(entry.node.outputs), ""),
            "operator": entry.node.attributes.get("written_as", entry.node.op),
            "as": entry.node.op,
            "role": entry.role,
            "tap": entry.tap,
            "line": line(entry),
        }
        for entry in found.ledger
    ]


def table(found: Recognised) -> Iterator[tuple[str, ...]]:
    """The rows as text."""
    for row in rows(found):
        operator = row["operator"] if row["operator"] == row["as"] else f"{row['operator']}: {row['as']}"
        where = "" if row["line"] is None else f"reference.py:{row['line']}"
        yield row["node"], operator, row["role"], row["tap"], where


def line(entry: Entry) -> int | None:
    """The line of reference.py that a node is a part of; None for what all taps share."""
    from ..parity.operations import OPERATIONS, split_tap

    if not entry.tap:
        return None
    _, part = split_tap(entry.tap)
    if part == "attn.c_attn":
        return _line_of(_C_ATTN)
    return _line_of(OPERATIONS[part].line) if part in OPERATIONS else None


@cache
def _line_of(text: str) -> int | None:
    from .. import reference

    lines = inspect.getsource(reference).splitlines()
    return next((number for number, code in enumerate(lines, 1) if text in code), None)
