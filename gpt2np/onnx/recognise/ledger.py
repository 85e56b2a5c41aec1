"""The ledger: every node that an output depends on, each under one role; a role admits a closed list of operators.

Structure and probes find where GPT-2's parts are; they do not admit a node, because what a probe did not try passes
unseen. Here the values between the borders of the parts are walked once more, and each node on the way must be one
that its role allows: what only moves elements between c_attn and the product with the keys, what a layer norm's
formula holds inside a layer norm. Any other node is an error that names it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ...errors import UnsupportedModelError
from ..graph import Graph, Node
from .forms import Likeness
from .probe import Probe
from .recognised import LENGTHS, Entry
from .roles import LENGTH, ROUNDS, SELECTING, SIZES, STRAIGHT, NodeCheck, adds_nothing, any_, bends, rounds

Array = np.ndarray


class Ledger:
    """The roles of a graph's nodes.

    Parameters
    ----------
    graph : Graph
    probes : sequence of Probe
        The graph at several sizes, the usual ones first.
    """

    def __init__(self, graph: Graph, probes: Sequence[Probe]) -> None:
        self.graph, self.probes = graph, probes
        self.entries: dict[int, Entry] = {}  # by the node's id
        self.half = probes[0].half
        # What follows from sizes and from the file alone, but for rows of wpe that sizes choose: these are data.
        rows = graph.dependants(lookup.out for lookup in probes[0].borders.lookups)
        self.sizes, self.fixed = probes[0].size_values - rows, graph.fixed - rows
        self._fixed: dict[str, bool] = {}
        self._lengths: set[str] = set()  # values that say how many positions of a buffer count
        self._seen: set[str] = set()  # sizes and constants that have been entered

    def is_data(self, name: str) -> bool:
        """Whether a value depends on more than sizes and constants."""
        return bool(name) and name not in self.sizes and name not in self.fixed

    def refuse(self, node: Node, role: str, tap: str, why: str) -> UnsupportedModelError:
        """The error for a node that its role does not allow."""
        where = f"{role} of {tap}" if tap else role
        return UnsupportedModelError(f"{node.describe()}, in the {where}: {why}")

    def inherit(self, like: Likeness) -> None:
        """Enter a layer's nodes as those in their places in the layer that it is written like."""
        entries, producers = self.entries, self.graph.producers
        taps: dict[str, str] = {}
        for first, here in like.names.items():
            entry, node = entries.get(id(producers[first])), producers[here]
            if entry is not None and id(node) not in entries:
                tap = entry.tap
                if tap not in taps:
                    taps[tap] = like.tap(tap)
                entries[id(node)] = Entry(node, entry.role, taps[tap])

    def region(
        self, role: str, tap: str, ends: Iterable[str], starts: Iterable[str], allowed: Mapping[str, NodeCheck]
    ) -> None:
        """Enter all nodes between some values and those that they are made of.

        Raises
        ------
        UnsupportedModelError
            If a node is none that `allowed` admits, or something else than `starts` takes part.
        """
        seen, pending = set(starts), list(ends)
        sizes, fixed, producers = self.sizes, self.fixed, self.graph.producers
        while pending:
            value = pending.pop()
            if not value or value in seen or value in self._lengths:
                continue
            seen.add(value)
            if value in sizes or value in fixed:
                self.enter_sizes(value, tap)
                continue
            node = producers.get(value)
            if node is None:
                what = f"the {role} of {tap}" if tap else f"the {role}"
                raise UnsupportedModelError(f"the input {value!r} takes part in {what}: it has no part there in GPT-2")
            check = allowed.get(node.op, adds_nothing)
            if check is not any_ and (why := check(self, node)):
                raise self.refuse(node, role, tap, why)
            if value != node.outputs[0] and node.op not in ("Split", "SplitToSequence"):
                raise self.refuse(node, role, tap, f"output {self.graph.output_index(value) + 1} has no part there")
            if id(node) not in self.entries:  # the first role stays
                self.entries[id(node)] = Entry(node, "rounding" if node.op in ROUNDS and rounds(node) else role, tap)
            pending.extend(node.inputs)

    def enter_sizes(self, value: str, tap: str = "") -> None:
        """Enter the nodes that compute a constant, or a value from sizes."""
        pending = [value]
        while pending:
            current = pending.pop()
            if not current or current in self._seen:
                continue
            self._seen.add(current)
            node = self.graph.producers.get(current)
            if node is None or current in self.graph.constants:
                continue
            constant = current in self.graph.fixed
            check = SIZES.get(node.op)
            if check is None and not constant:
                raise self.refuse(node, "arithmetic of sizes", tap, f"{node.op} has no part there")
            if check is not None and check is not any_ and (why := check(self, node)):
                raise self.refuse(node, "constant" if constant else "arithmetic of sizes", tap, why)
            if not constant and node.op not in STRAIGHT and (why := bends(self, node)):
                raise self.refuse(node, "arithmetic of sizes", tap, why)
            if id(node) not in self.entries:
                self.entries[id(node)] = Entry(node, "constant" if constant else "sizes", "")
            if node.op not in ("Shape", "Size"):
                pending.extend(node.inputs)

    def enter_length(self, name: str) -> bool:
        """Enter the nodes that compute how many positions of a buffer count; False if the file has no such buffers."""
        inputs = self.probes[0].inputs
        if not inputs.lengths:
            return False
        given = [n for n, (role, _) in inputs.roles.items() if role in LENGTHS or role == "attention_mask"]
        self.region("length of the past", "", [name], given, LENGTH)
        self._lengths.add(name)
        return True

    def rank(self, name: str) -> int:
        """How many axes a value has."""
        return int(self.probes[0].evaluate(name).ndim)

    def fixed_operand(self, node: Node, name: str, numbers_only: bool = True) -> str:
        """Why a value that data are multiplied by, or that is added to them, is no number of its own; "" if it is one.

        Other values than numbers are masks, which are read whole; `numbers_only` refuses them.
        """
        if (not numbers_only and self.probes[0].evaluate(name).size > 1) or self.is_fixed(name):
            return ""
        return f"its input {name!r} changes with the number of positions or sequences"

    def is_fixed(self, name: str) -> bool:
        """Whether a value depends on no size that differs between calls."""
        if name in self.graph.fixed:
            return True
        if name not in self._fixed:
            self._fixed[name] = self._find_fixed(name)
        return self._fixed[name]

    def _find_fixed(self, name: str) -> bool:
        here = self.probes[0].evaluate(name)
        for probe in self.probes[1:]:
            other = probe.evaluate(name)
            if here.shape != other.shape or (here != other).any():
                return False
        node = self.graph.producers.get(name)
        if node is None:
            return False
        first = 1 if node.op in SELECTING else 0  # what is left of a vector of sizes may be fixed where others are not
        return node.op == "Shape" or all(self.is_fixed(i) for i in node.inputs[first:] if i)

    def close(self) -> list[Entry]:
        """All entries in the file's order.

        Raises
        ------
        UnsupportedModelError
            If an output depends on a node that has not been entered.
        """
        pending, seen = [o.name for o in self.graph.outputs], set[str]()
        while pending:
            value = pending.pop()
            node = self.graph.producers.get(value)
            if not value or value in seen or node is None or value in self.graph.constants:  # the node was replaced
                continue
            seen.add(value)
            if id(node) not in self.entries:
                if self.is_data(value):
                    raise UnsupportedModelError(f"{node.describe()} has a part in the outputs, but none in a GPT-2")
                self.enter_sizes(value)
            if node.op not in ("Shape", "Size"):
                pending.extend(node.inputs)
        return [self.entries[id(n)] for n in self.graph.nodes if id(n) in self.entries]
