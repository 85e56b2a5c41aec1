"""Whether two layers are written alike, so that what has been tried in one holds in the other."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping

import numpy as np

from ..graph import Graph, Node
from .attention import AttentionFound
from .blocks import Roles
from .probe import Probe
from .scores import MaskFound

SMALL = 64  # elements; constants up to this size are part of a form, larger ones are compared


class Forms:
    """The attentions met so far, each by its form."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.met: dict[Hashable, list[tuple[int, tuple[str, ...]]]] = {}

    def first_like(self, i: int, found: AttentionFound, mask: MaskFound, output_roles: Roles) -> int:
        """The first layer that has the same nodes, constants, shapes and findings between its borders: i if none."""
        branch, mlp = self.probe.borders.layers[i]
        assert branch.core is not None
        core = branch.core
        tags: dict[str, Hashable] = {m.out: ("map", n) for n, m in enumerate(branch.maps)}
        tags |= {core.scores.out: "scores", core.heads.out: "heads"}
        tags |= {name: role for name, (role, layer) in self.probe.roles.items() if layer == i}
        tags |= dict.fromkeys(core.node.outputs, "probs")
        presents = {output: role for output, (role, layer) in output_roles.items() if layer == i}
        ends = [core.scores.a, core.scores.b, core.heads.b, core.masked, core.heads.a, branch.out.x, *presents]
        form, large = _form(self.probe, ends, tags)
        columns = tuple((branch.maps.index(m), c.tobytes()) for m, c in found.columns)
        shapes = tuple(self.probe.known[value].shape for value in (*branch.borders(), *mlp.borders()))
        findings = (columns, found.heads, found.factors, found.row_order.tobytes(), mask, tuple(presents.values()))
        others = self.met.setdefault((form, shapes, findings), [])
        for first, other in others:
            if all(_equal(self.probe.graph, a, b) for a, b in zip(large, other, strict=True)):
                return first
        others.append((i, large))
        return i


def _equal(graph: Graph, a: str, b: str) -> bool:
    return a == b or np.array_equal(graph.constant(a), graph.constant(b))


def _form(probe: Probe, ends: Iterable[str], tags: Mapping[str, Hashable]) -> tuple[Hashable, tuple[str, ...]]:
    """The nodes behind some values, by number, and the large constants among them, in the order in which they come."""
    graph, known, producers, constants = probe.graph, probe.known, probe.graph.producers, probe.graph.constants
    numbers: dict[str, int] = {}
    steps: list[Hashable] = []
    large: list[str] = []
    wanted = list(ends)
    pending = wanted[::-1]
    while pending:
        value = pending[-1]
        if value in numbers or not value:
            pending.pop()
            continue
        step: Hashable
        node = producers.get(value)
        if value in tags:
            step = tags[value]
        elif value in constants:
            tensor = constants[value]
            step = str(tensor.dtype), tuple(tensor.shape)
            if math.prod(tensor.shape) <= SMALL:
                step = *step, graph.constant(value).tobytes()
            else:
                large.append(value)
        elif value in known:
            step = value if graph.is_input(value) else known[value].shape
        elif node is None:
            step = value
        else:
            height = len(pending)
            for i in node.inputs:
                if i and i not in numbers:
                    pending.append(i)
            if len(pending) > height:
                continue
            attributes = _attributes(node) if node.attributes else ()
            step = node.op, tuple(map(numbers.get, node.inputs)), node.outputs.index(value), attributes
        numbers[value] = len(steps)
        steps.append(step)
        pending.pop()
    return (tuple(steps), tuple(map(numbers.get, wanted))), tuple(large)


def _attributes(node: Node) -> Hashable:
    return tuple(
        (name, (value.shape, value.tobytes()) if isinstance(value, np.ndarray) else repr(value))
        for name, value in sorted(node.attributes.items())
    )
