"""Which input of a graph is which: token ids, positions, masks, caches, lengths."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import UnsupportedModelError
from ..graph import Graph
from .blocks import Borders, Roles, inputs_behind
from .linear import nearest_linears
from .products import AttentionCore
from .recognised import LENGTHS
from .roles import SHAPED_BY_INPUTS, SHAPED_BY_VALUE

if TYPE_CHECKING:
    import onnx


@dataclass
class Inputs:
    """The inputs' roles, and what depends on them."""

    condition: str  # the input that chooses the branch of a merged decoder, "" if there is none
    roles: Roles = field(default_factory=dict)
    mask: str = ""  # the input that masks scores
    lengths: dict[str, str] = field(default_factory=dict)  # values that are lengths of the past: their roles
    notes: list[str] = field(default_factory=list)
    size_values: set[str] = field(default_factory=set)  # values that depend on sizes and constants alone
    half: bool = False  # the file holds floats of 16 bits: rounding to them is its own

    def named(self, role: str) -> list[str]:
        """The inputs of a role."""
        return [name for name, (r, _) in self.roles.items() if r == role]


def find_inputs(graph: Graph, borders: Borders, condition: str = "") -> Inputs:
    """Tell the inputs by what reads them."""
    found = Inputs(condition, lengths={value: role for value, role in graph.lengths.items() if role in LENGTHS})
    found.roles[inputs_behind(graph, borders.words)[0]] = "input_ids", None
    if borders.types is not None:
        found.roles[graph.strip(borders.types.rows)] = "token_type_ids", None
    rows = borders.places.rows
    if rows and (place := graph.strip(rows)) in graph.input_names:
        found.roles[place] = "position_ids", None
    for i, core in enumerate(borders.cores):
        _caches(graph, found, i, core)
        for value in _unknown(graph, found, core.masked, core.scores.out):
            found.roles[value] = "attention_mask", None
    for value in _unknown(graph, found, rows) if rows else ():
        masked = ("attention_mask", None) in found.roles.values() or "position" in value
        found.roles[value] = "position_ids" if masked else "attention_mask", None
    masks = found.named("attention_mask")
    found.mask = masks[0] if masks else ""
    _lengths(graph, found)
    if len(masks) > 1:
        raise UnsupportedModelError(f"the scores are masked by several inputs: {', '.join(masks)}")
    for port in graph.inputs:
        if port.name == found.condition:
            found.roles[port.name] = "use_cache_branch", None
        if port.name not in found.roles:
            found.roles[port.name] = "unused", None
            if graph.consumers(port.name):
                found.notes.append(f"input {port.name!r} has no part in what the outputs are")
    found.size_values = _size_values(graph)
    found.half = any(t.dtype.itemsize == 2 and t.dtype.kind not in "iub" for t in graph.initializers.values())
    return found


def _size_values(graph: Graph) -> set[str]:
    """Values that depend on sizes of inputs and on constants alone."""
    found: set[str] = set()
    lengths = bool(graph.lengths)  # of buffers, which the caller gives as numbers
    shaped: set[str] = {i.name for i in graph.inputs}  # values whose sizes depend on no value of the caller's
    fixed = graph.fixed
    for node in graph.order:
        sizes_from = SHAPED_BY_INPUTS.get(node.op, len(node.inputs))
        all_known, is_shaped = True, node.op not in SHAPED_BY_VALUE
        for index, i in enumerate(node.inputs):
            if i and i not in found and i not in fixed:
                all_known = False
                if index >= sizes_from or i not in shaped:
                    is_shaped = False
        if node.inputs and (all_known or (node.op in ("Shape", "Size") and (lengths or node.inputs[0] in shaped))):
            found.update(node.outputs)
        if is_shaped:
            shaped.update(node.outputs)
    return found


def _unknown(graph: Graph, found: Inputs, value: str, stop: str = "") -> list[str]:
    """The inputs behind a value that have no role yet."""
    behind = graph.ancestors(value, {stop, *found.roles})
    return [name for name in behind if name in graph.input_names and name not in found.roles]


def _caches(graph: Graph, found: Inputs, i: int, core: AttentionCore) -> None:
    """Past keys and values of a layer."""
    for value, kind in ((core.scores.b, "past_key"), (core.heads.b, "past_value")):
        for name in nearest_linears(graph, value)[1]:
            if name not in found.roles:
                found.roles[name] = kind, i
            elif found.roles[name] == ("past_key", i):
                found.roles[name] = "past", i  # one tensor with both


def _lengths(graph: Graph, found: Inputs) -> None:
    """What says how many positions of the past count."""
    if not any(role.startswith("past") for role, _ in found.roles.values()):
        found.lengths.clear()
    for length, role in graph.lengths.items():
        if (source := graph.strip(length)) in graph.input_names:
            found.roles[source] = role, None
        for value in _unknown(graph, found, length):
            found.roles[value] = "attention_mask", None  # whose sum is the length


def declared_shape(port: onnx.ValueInfoProto) -> tuple[int | str | None, ...]:
    dims = port.type.tensor_type.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in dims)


def element_type(port: onnx.ValueInfoProto) -> np.dtype[Any]:
    """The type of an input's or output's elements; UnsupportedModelError if these are no real numbers."""
    from onnx import TensorProto, helper

    kind = port.type.tensor_type.elem_type
    names = TensorProto.DataType
    if kind not in names.values() or names.Name(kind) in ("UNDEFINED", "STRING", "COMPLEX64", "COMPLEX128"):
        what = names.Name(kind) if kind in names.values() else f"type {kind}"
        raise UnsupportedModelError(f"{port.name!r} is declared as {what}: a GPT-2 takes and gives real numbers")
    return np.dtype(helper.tensor_dtype_to_np_dtype(kind))
