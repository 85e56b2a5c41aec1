"""The ledger for reading: each node with its role, its tap, and the line of reference.py that it is a part of."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from .. import reference
from ..parity.operations import OPERATIONS, split_tap

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
        where = "" if row["line"] is None else f"reference.py:{row['line']}"
        yield row["node"], operator_of(row), row["role"], row["tap"], where


def operator_of(row: dict[str, Any]) -> str:
    """The operator as the file has it, and what it was rewritten as."""
    return str(row["operator"] if row["operator"] == row["as"] else f"{row['operator']}: {row['as']}")


def line(entry: Entry) -> int | None:
    """The line of reference.py that a node is a part of; None for what all taps share."""
    return line_of_tap(split_tap(entry.tap)[1]) if entry.tap else None


def line_of_tap(part: str) -> int | None:
    """The line of reference.py that makes this part of a layer, "attn.probs"."""
    if part == "attn.c_attn":
        return _line_of(_C_ATTN)
    return _line_of(OPERATIONS[part].line) if part in OPERATIONS else None


def source_line(number: int | None) -> str:
    """The text of a line of reference.py."""
    return "" if number is None else _source()[number - 1].strip()


def nodes_of_taps(found: Recognised) -> dict[str, list[str]]:
    """The nodes that each tap is made of, as "MatMul_12 (MatMul)", in the file's order."""
    taps: dict[str, list[str]] = {}
    for row in rows(found):
        name = row["tap"]
        made = [name] if not name.endswith(".c_attn") else [name.replace(".c_attn", f".{part}") for part in "qkv"]
        for tap in made:
            taps.setdefault(tap, []).append(f"{row['node']} ({row['operator']})")
    return taps


@cache
def _line_of(text: str) -> int | None:
    return next((number for number, code in enumerate(_source(), 1) if text in code), None)


@cache
def _source() -> list[str]:
    return inspect.getsource(reference).splitlines()
