"""A model file as a page: blocks, the operations in them, and for each its nodes, its formula and its line of code."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING, Any

from ..html import page
from ..parity.operations import OPERATIONS, split_tap, tap_inputs, tap_names
from .nodes import line_of_tap, operator_of, rows, source_line

if TYPE_CHECKING:
    from ..onnx.recognise import Recognised

Rows = list[dict[str, Any]]


def graph_page(path: str, found: Recognised) -> str:
    """The page; it holds no pictures, so that it needs nothing but a browser."""
    by_tap: dict[str, Rows] = {}
    for row in rows(found):
        by_tap.setdefault(row["tap"], []).append(row)
    c, names = found.config, tap_names(found.config)
    blocks: dict[str, list[str]] = {}
    for tap in names if "logits" in by_tap else names[:-1]:
        layer = split_tap(tap)[0]
        blocks.setdefault(f"h.{layer}" if layer is not None else tap, []).append(tap)
    parts = [
        f"<h1>{escape(path)}</h1><p>A GPT-2 of {c.n_layer} layers, {c.n_head} heads and width {c.n_embd}: "
        f"{sum(map(len, by_tap.values())):,} nodes on which an output depends, each under the operation that it is a "
        "part of. Computation runs down this page; open a block to see its nodes.</p>",
        f'<nav aria-label="blocks">{" → ".join(f"<a href=#{name}>{name}</a>" for name in blocks)}</nav>',
    ]
    for name, taps in blocks.items():
        held = sum(len(by_tap.get(tap, [])) for tap in [*taps, f"{name}.attn.c_attn"])
        inside = "".join(operation(tap, by_tap, tap_inputs(tap, c)) for tap in taps)
        opened = " open" if name in ("embed", "h.0") else ""
        parts.append(
            f"<details id={name}{opened}><summary><h2>{name}</h2> {many(len(taps), 'operation')}, "
            f"{many(held, 'node')}</summary>{inside}</details>"
        )
    if by_tap.get(""):
        parts.append(
            f"<details id=shared><summary><h2>shared</h2> {len(by_tap[''])} nodes that belong to no operation: sizes, "
            f"positions and masks that all layers read</summary>{node_table(by_tap[''], 'all layers')}</details>"
        )
    return page(f"{path}: what its nodes are", parts, STYLE, OPEN)


def many(count: int, what: str) -> str:
    """ "1 node", "3 nodes"."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def operation(tap: str, by_tap: dict[str, Rows], reads: Iterable[str]) -> str:
    """One operation: what it reads, its formula, its line of reference.py, and its nodes."""
    part = split_tap(tap)[1]
    row, line = OPERATIONS[part], line_of_tap(part)
    nodes = by_tap.get(tap, [])
    also = ""
    if part in ("attn.q", "attn.k", "attn.v"):
        shared = f"{tap[:-2]}.c_attn"
        names = ", ".join(escape(node["node"]) for node in by_tap.get(shared, []))
        also = f"<p>c_attn, the linear map of q, k and v together: <code>{names}</code></p>" if names else ""
    code = f"<p>reference.py, line {line}: <code>{escape(source_line(line))}</code></p>" if line is not None else ""
    inputs = f"; it reads {', '.join(f'<code>{name}</code>' for name in reads)}" if reads else ""
    return (
        f"<section><h3>{tap} <small>({', '.join(row.shape.split())})</small></h3><p>{escape(row.formula)}{inputs}</p>"
        f"{code}{also}{node_table(nodes, tap)}</section>"
    )


def node_table(nodes: Rows, of: str) -> str:
    """Nodes with their operators and roles."""
    if not nodes:
        return "<p>No node of its own: the file has it in its neighbours.</p>"
    lines = "".join(
        f"<tr><td>{escape(row['node'])}</td><td>{escape(operator_of(row))}</td><td>{escape(row['role'])}</td></tr>"
        for row in nodes
    )
    head = "<tr><th scope=col>node</th><th scope=col>operator</th><th scope=col>role</th></tr>"
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="nodes of {of}"><table>'
        f"<thead>{head}</thead><tbody>{lines}</tbody></table></div>"
    )


STYLE = """
nav { line-height: 2; } summary { cursor: pointer; }
summary h2, h3 { display: inline-block; margin: .6rem .5rem .2rem 0; }
h3 small { font-weight: normal; } section { border-left: 3px solid; padding-left: .8rem; margin: .8rem 0; }
section p { margin: .2rem 0; } .wide { overflow-x: auto; }
.wide table { border-collapse: collapse; font-size: .85rem; }
.wide td, .wide th { text-align: left; padding: .1rem .8rem .1rem 0; white-space: nowrap; }
"""

# A link to a block opens it; so does printing, for all of them.
OPEN = """
"use strict";
function gpt2npOpen() {
  const block = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (block instanceof HTMLDetailsElement) block.open = true;
}
window.addEventListener("hashchange", gpt2npOpen);
window.addEventListener("beforeprint", () => { for (const d of document.querySelectorAll("details")) d.open = true; });
gpt2npOpen();
"""
