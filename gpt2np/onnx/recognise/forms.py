"""Layers that are written alike: what has been found of one of them, and proved, holds for the others.

Two layers are alike if their nodes correspond one to one, from the stream behind the layer and its cache outputs back
to the stream before it: the same operators with the same attributes, wired in the same way. What they have in common
(sizes, the attention mask) is one value for both; each constant has the same bits in both, unless it is a weight, of
the same type and shape. Weights are the only difference, and each layer's own are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from ..graph import VIEWS, Graph, Node
from ..read.tensors import Tensor
from .blocks import Borders, Branch, Roles
from .linear import nearest_linears
from .recognised import TapLocation
from .sources import Source

Taps = Mapping[str, TapLocation]


@dataclass(frozen=True)
class Likeness:
    """A layer that is written like an earlier one."""

    layer: int
    first: int  # the earlier one
    names: Mapping[str, str]  # its values, and those in their places here
    constants: frozenset[tuple[str, str]]  # the same of constants
    weights: frozenset[tuple[str, str]]  # those among them that need not be equal

    def tap(self, name: str) -> str:
        """The name of a tap of the earlier layer, here."""
        before = f"h.{self.first}."
        return f"h.{self.layer}.{name[len(before) :]}" if name.startswith(before) else name

    def has(self, taps: Taps) -> bool:
        """Whether taps of the earlier layer lie at values that have one in their place here."""
        return all(tap.tensor in self.names for tap in taps.values())

    def taps(self, taps: Taps) -> dict[str, TapLocation]:
        """Taps of the earlier layer, here."""
        return {self.tap(name): replace(tap, tensor=self.names[tap.tensor]) for name, tap in taps.items()}

    def touch(self, touched: set[str]) -> None:
        """Add the constants in the places of those that were read in the earlier layer."""
        touched.update(here for first, here in self.constants if first in touched)


def cache_outputs(graph: Graph, borders: Borders) -> dict[str, int]:
    """Outputs that are made of an attention's maps, and of which layer's."""
    layers = {graph.strip(m.x): i for i, (attention, _) in enumerate(borders.layers) for m in attention.maps}
    found: dict[str, int] = {}
    for output in graph.outputs:
        if output.name not in borders.output_roles:
            behind = {layers.get(graph.strip(linear.x)) for linear in nearest_linears(graph, output.name)[0]}
            own = [layer for layer in behind if layer is not None]
            if own:
                found[output.name] = own[0]
    return found


def find_alike(graph: Graph, borders: Borders, roles: Roles, outputs: Mapping[str, int]) -> list[Likeness | None]:
    """For each layer the first one that is written like it; None for those that come first.

    `roles` tells the caches' layers, `outputs` is what `cache_outputs` gives. Where refusals are collected, every layer
    is looked at for itself.
    """
    if graph.refusals is not None:
        return [None] * len(borders.layers)
    streams = borders.streams
    # what comes through the residual stream or a cache belongs to one layer; all else may be shared
    caches = [name for name, (_, layer) in roles.items() if layer is not None]
    inner = graph.dependants([*caches, *(lookup.out for lookup in borders.lookups)])
    layers = []
    for i, (attention, mlp) in enumerate(borders.layers):
        own = {role: name for name, (role, layer) in roles.items() if layer == i}
        ends = [streams[i + 1], *(name for name, layer in outputs.items() if layer == i)]
        layers.append(_Layer((attention, mlp), streams[i], own, ends))
    found: list[Likeness | None] = []
    for i, layer in enumerate(layers):
        firsts = [k for k, like in enumerate(found) if like is None]
        found.append(next((like for k in firsts if (like := _likeness(graph, layers[k], layer, inner, k, i))), None))
    return found


@dataclass
class _Layer:
    branches: tuple[Branch, Branch]
    stream: str  # before the layer
    caches: dict[str, str]  # input for each role
    ends: list[str]  # the stream behind the layer, and outputs

    def weights(self, graph: Graph) -> set[str]:
        """The constants that its weights are made of, as far as nothing else in the graph reads them."""
        sources: list[Source | None] = []
        ways = [(self.ends[0], [self.stream, *(b.addend.value for b in self.branches)])]
        for branch in self.branches:
            sources += [branch.norm.weight, branch.norm.bias]
            ways.append((branch.norm.out, [branch.norm.x]))
            for m in (*branch.maps, branch.out):
                sources += [m.weight, m.bias]
                ways.append((m.out, [m.x]))
        readers = {id(node) for end, starts in ways for node in _between(graph, end, starts)}
        names = {name for source in sources if source is not None for name in source.origin}
        return {name for name in names if _read_by(graph, name, readers)}

    def borders(self) -> list[str]:
        """The values by which the parts are told."""
        found: list[str] = []
        for branch in self.branches:
            found += branch.borders
            found += [branch.addend.value, branch.out.x, *(m.x for m in branch.maps)]
            if (core := branch.core) is not None:
                found += [core.scores.a, core.scores.b, core.masked, core.heads.a, core.heads.b, *core.node.outputs]
        return found

    def shapes(self) -> list[object]:
        """What else is told of the parts."""
        maps = [m for branch in self.branches for m in (*branch.maps, branch.out)]
        norms = [(b.norm.weight is None, b.norm.bias is None) for b in self.branches]
        maps_have = [(m.weight.shape, m.bias is None, m.bias_later == "", m.summed, m.sizes, m.low_rank) for m in maps]
        return [[len(b.maps) for b in self.branches], norms, maps_have, sorted(self.caches), len(self.ends)]


def _likeness(graph: Graph, one: _Layer, other: _Layer, inner: set[str], first: int, layer: int) -> Likeness | None:
    """How the nodes of one layer correspond to those of another; None if they do not."""
    if one.shapes() != other.shapes():
        return None
    seeds = {one.stream: other.stream} | {name: other.caches[role] for role, name in one.caches.items()}
    pairs = _pairs(graph, zip(one.ends, other.ends, strict=True), seeds, inner)
    if pairs is None:
        return None
    names, constants = pairs
    for a, b in zip(one.borders(), other.borders(), strict=True):
        if names.get(a, a) != b:
            return None
    ours, theirs = one.weights(graph), other.weights(graph)
    weights = frozenset((a, b) for a, b in constants if a in ours and b in theirs and _fit(graph, a, b))
    if not all(_equal(graph, a, b) for a, b in constants - weights):
        return None
    own = {a: b for a, b in names.items() if a not in seeds}
    return Likeness(layer, first, own, frozenset(constants), weights)


def _pairs(
    graph: Graph, ends: Iterable[tuple[str, str]], seeds: Mapping[str, str], inner: set[str]
) -> tuple[dict[str, str], set[tuple[str, str]]] | None:
    """The values behind some values of one layer, each with that in its place behind those of another, and constants.

    None where their nodes differ. The walks end at `seeds` and at what both have in common.
    """
    producers, known = graph.producers, graph.constants
    names, taken = dict(seeds), set(seeds.values())
    constants: set[tuple[str, str]] = set()
    pending = list(ends)
    while pending:
        a, b = pending.pop()
        if a in names:
            if names[a] != b:
                return None
        elif a == b and a not in inner:
            continue
        elif a in known and b in known:
            constants.add((a, b))
        else:
            node, like = producers.get(a), producers.get(b)
            if node is None or like is None or a in known or b in known or b in taken or not _same(node, like):
                return None
            if node.outputs.index(a) != like.outputs.index(b):
                return None
            names[a] = b
            taken.add(b)
            pending.extend(zip(node.inputs, like.inputs, strict=True))
    return names, constants


def _same(node: Node, like: Node) -> bool:
    """Whether two nodes have the same operator and attributes, and as many inputs and outputs."""
    if node.op != like.op or len(node.inputs) != len(like.inputs) or len(node.outputs) != len(like.outputs):
        return False
    if node.attributes.keys() != like.attributes.keys():
        return False
    for name, value in node.attributes.items():
        other = like.attributes[name]
        if type(value) is not type(other):
            return False
        if isinstance(value, np.ndarray):
            if (value.dtype, value.shape, value.tobytes()) != (other.dtype, other.shape, other.tobytes()):
                return False
        elif value != other:
            return False
    return True


def _between(graph: Graph, end: str, starts: Iterable[str]) -> list[Node]:
    """The nodes that take some values to another, but for those that only change the view, and what tells sizes."""
    found: list[Node] = []
    seen, pending = set(starts), [end]
    while pending:
        value = pending.pop()
        node = graph.producers.get(value)
        if value in seen or node is None or node.op in ("Shape", "Size") or value in graph.fixed:
            continue
        seen.add(value)
        if node.op in VIEWS:
            pending.append(node.inputs[0])
        else:
            pending.extend(node.inputs)
            found.append(node)
    return found


def _read_by(graph: Graph, name: str, readers: set[int]) -> bool:
    """Whether only these nodes read a constant, or what nodes make of it alone."""
    seen, pending = {name}, [name]
    while pending:
        for node in graph.consumers(pending.pop()):
            made = [o for o in node.outputs if o in graph.fixed]
            if not made and id(node) not in readers:
                return False
            pending.extend(o for o in made if o not in seen)
            seen.update(made)
    return True


def _fit(graph: Graph, a: str, b: str) -> bool:
    """Whether two constants have the same type and shape."""
    one, other = graph.constants[a], graph.constants[b]
    return one.dtype == other.dtype and tuple(one.shape) == tuple(other.shape)


def _equal(graph: Graph, a: str, b: str) -> bool:
    """Whether two constants have the same type, shape and bits."""
    if a == b or not _fit(graph, a, b):
        return a == b
    held = graph.constants[b]
    # the earlier layer's is kept, as it is read again and again
    other = held.load() if isinstance(held, Tensor) else held
    return graph.constant(a).tobytes() == other.tobytes()
