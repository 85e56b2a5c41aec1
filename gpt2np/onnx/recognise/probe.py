"""A graph with values at the borders of its parts, to be run inside them: what its inputs are, and their sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import UnsupportedModelError
from ..evaluate.evaluator import Evaluator
from ..graph import Graph
from .blocks import Branch, Roles, inputs_behind
from .linear import Linear, nearest_linears
from .lookup import Lookup
from .masks import mask_shapes
from .recognised import LENGTHS, POSITIONS_FROM_MASK

if TYPE_CHECKING:
    import onnx

Array = np.ndarray

# What a probe runs on: no two sizes equal, so that an axis is known by its size.
BATCH, NEW, PAST = 2, 4, 3


class Probe:
    """The values that are known, and what follows from them; float values are mostly NaN, only their shapes count."""

    def __init__(self, graph: Graph, condition: str = "") -> None:
        self.graph = graph
        self.condition = condition
        self.notes: list[str] = []
        self.roles: Roles = {}
        self.width = 0  # of the widest linear map
        self.mask = ""  # the input that masks scores
        self.known: dict[str, Array] = {}  # values of the probe at the borders of parts
        self.touched: set[str] = set()  # constants that were read
        self.base = Evaluator(graph, {}, self.touched)  # what follows from them, kept
        self.lengths = {value: role for value, role in graph.lengths.items() if role in LENGTHS}

    def find_inputs(
        self, words: Lookup, places: Lookup, types: Lookup | None, layers: list[tuple[Branch, Branch]]
    ) -> None:
        graph = self.graph
        self.width = max(m.weight.shape[-1] for layer in layers for branch in layer for m in (*branch.maps, branch.out))
        self.roles[inputs_behind(self.graph, words)[0]] = "input_ids", None
        if types is not None:
            self.roles[graph.strip(types.rows)] = "token_type_ids", None
        if places.rows and graph.is_input(place := graph.strip(places.rows)):
            self.roles[place] = "position_ids", None
        for i, (branch, _) in enumerate(layers):
            core = branch.core
            assert core is not None
            for value, kind in ((core.scores.b, "past_key"), (core.heads.b, "past_value")):
                for name in nearest_linears(graph, value)[1]:
                    if name not in self.roles:
                        self.roles[name] = kind, i
                    elif self.roles[name] == ("past_key", i):
                        self.roles[name] = "past", i  # one tensor with both
            stop = {core.scores.out, *self.roles}
            for value in graph.ancestors(core.masked, stop):
                if graph.is_input(value) and value not in self.roles:
                    self.roles[value] = "attention_mask", None
        for value in graph.ancestors(places.rows, set(self.roles)) if places.rows else ():
            if graph.is_input(value) and value not in self.roles:
                masked = ("attention_mask", None) in self.roles.values() or "position" in value
                self.roles[value] = "position_ids" if masked else "attention_mask", None
        if not any(role.startswith("past") for role, _ in self.roles.values()):
            self.lengths = {}
        masks = [name for name, (role, _) in self.roles.items() if role == "attention_mask"]
        self.mask = masks[0] if masks else ""
        for length, role in graph.lengths.items():
            if graph.is_input(source := graph.strip(length)):
                self.roles[source] = role, None
            for value in graph.ancestors(length, set(self.roles)):
                if graph.is_input(value) and value not in self.roles:
                    self.roles[value] = "attention_mask", None  # whose sum is the length
        if len(masks) > 1:
            raise UnsupportedModelError(f"the scores are masked by several inputs: {', '.join(masks)}")
        for port in graph.inputs:
            if port.name == self.condition:
                self.roles[port.name] = "use_cache_branch", None
            if port.name not in self.roles:
                self.roles[port.name] = "unused", None
                if any(True for _ in graph.consumers(port.name)):
                    self.notes.append(f"input {port.name!r} has no part in what the outputs are")

    def feed_inputs(self) -> None:
        """The probe's inputs, of the sizes that the file declares where it declares any."""
        declared = {p.name: declared_shape(p) for p in self.graph.inputs}
        ids = next(n for n, (role, _) in self.roles.items() if role == "input_ids")
        shape = declared[ids]
        if len(shape) not in (1, 2, 3):
            raise UnsupportedModelError(f"input {ids!r} has {len(shape)} axes; token ids have 1 to 3")
        sizes = [1] * (len(shape) - 2) + [BATCH, NEW][-len(shape) :]
        sizes = [s if isinstance(s, int) and s > 0 else size for s, size in zip(shape, sizes, strict=True)]
        self.B, self.T = math.prod(sizes[:-1]), sizes[-1]
        pasts = [declared[name] for name, (role, _) in self.roles.items() if role.startswith("past")]
        length = pasts[0][-2] if pasts and len(pasts[0]) > 1 else None
        self.P = (length if isinstance(length, int) and not self.lengths else PAST) if pasts else 0
        if self.graph.one_token:
            self.T = 1
            sizes = [*sizes[:-1], 1]
        S = self.P + self.T
        self._check_room(ids, (self.B, S, max(S, self.width)))
        for port in self.graph.inputs:
            role, shape = self.roles[port.name][0], declared[port.name]
            dtype = element_type(port)
            if role == "input_ids":
                self.know(port.name, np.arange(np.prod(sizes)).reshape(sizes).astype(dtype))
            elif role == "token_type_ids":
                self.know(port.name, np.zeros(sizes, dtype))
            elif role == "position_ids":
                steps = np.arange(self.B * self.T)[::-1] % 7  # no run of positions
                self.know(port.name, steps.reshape([-1, self.T][-len(shape) :]).astype(dtype))
            elif role == "attention_mask":
                try:
                    size, _ = next(mask_shapes(shape, self.B, self.T, self.P + self.T))
                except ValueError as error:
                    raise UnsupportedModelError(f"input {port.name!r}: {error}") from error
                self._check_room(port.name, size)
                self.know(port.name, np.ones(size, dtype))
            elif role.startswith("past"):
                sizes_past = [s if isinstance(s, int) and s > 0 else 0 for s in shape]
                if len(shape) not in (4, 5) or not sizes_past[-1] or not sizes_past[-3]:
                    raise UnsupportedModelError(
                        f"input {port.name!r} is a cache of shape {shape}, "
                        f"expected ([2,] batch, heads, past, head size)"
                    )
                sizes_past[-4] = self.B
                sizes_past[-2] = max(sizes_past[-2], self.P) if self.lengths else self.P
                if len(shape) == 5:
                    sizes_past[0] = 2
                self._check_room(port.name, sizes_past)
                self.know(port.name, unknown(sizes_past))
            elif role in (*LENGTHS, "beam_width", "cache_indirection"):
                number = 1 if role == "beam_width" else 0
                if role in LENGTHS:
                    number = self.P - LENGTHS[role](self.T)
                free = [self.B, 1, self.P + self.T] if role == "cache_indirection" else [self.B]
                sizes_here = [s if isinstance(s, int) and s > 0 else n for s, n in zip(shape, free, strict=False)]
                self._check_room(port.name, sizes_here)
                self.know(port.name, np.full(sizes_here, number, dtype))

    def _check_room(self, name: str, sizes: Sequence[int]) -> None:
        """Raise if the sizes that an input declares make a probe that is out of proportion to the file."""
        if self.graph.budget is not None:  # as float64, a few times over
            self.graph.budget.check(32 * math.prod(sizes), f"input {name!r}, for which the probe is {list(sizes)},")

    def check_ids(self, words: Lookup) -> None:
        """Each token's row of wte must be looked up, in the order given."""
        given = self.known[next(n for n, (role, _) in self.roles.items() if role == "input_ids")]
        rows = self.rows(words)
        if rows.size != given.size or (rows.ravel() != given.ravel()).any():
            raise UnsupportedModelError(
                f"{words.node.describe()} looks up the tokens {rows.ravel().tolist()} where {given.ravel().tolist()} "
                "are given"
            )

    def know(self, name: str, value: Array) -> None:
        """Give the probe the value at a border."""
        self.known[name] = self.base.values[name] = value

    def forget(self) -> None:
        """Drop what was computed inside a layer, apart from sizes, positions and masks, which all layers share."""
        self.base.values = {n: v for n, v in self.base.values.items() if n in self.known or np.size(v) <= 1024}

    def evaluate(self, name: str) -> Array:
        """A value of the probe; activations are NaN, only their shape counts."""
        return self.base(name)

    def run_with(self, feeds: dict[str, Array], *names: str) -> list[Array]:
        """Values of the probe, with some values replaced."""
        evaluator = self.evaluator(feeds)
        return [evaluator(name) for name in names]

    def evaluator(self, feeds: dict[str, Array]) -> Evaluator:
        """The probe, with some values replaced."""
        return Evaluator(self.graph, {**self.known, **feeds}, self.touched)

    def feed_linear(self, linear: Linear) -> tuple[int, ...]:
        """Let the probe know the shape of a linear map's output."""
        shape = self.evaluate(linear.x).shape[: -linear.summed] + (linear.sizes or linear.weight.shape[1:])
        self.know(linear.out, unknown(shape))
        return shape

    def rows(self, lookup: Lookup, feeds: dict[str, Array] | None = None) -> Array:
        """Which rows of its table a lookup takes."""
        if lookup.rows:
            return self.run_with(feeds or {}, lookup.rows)[0]
        numbered = np.arange(lookup.table.shape[0], dtype=np.float64)[:, None]
        known = {n: v for n, v in self.known.items() if n != lookup.out}
        evaluator = Evaluator(self.graph, {**known, **(feeds or {}), lookup.node.inputs[0]: numbered})
        taken = evaluator(lookup.node.outputs[0])
        return taken[..., 0].astype(np.int64)

    def find_positions(self, places: Lookup) -> tuple[int, str]:
        """The offset of the first row of wpe, and how rows are chosen."""
        B, T, P = self.B, self.T, self.P
        rows = np.broadcast_to(self.rows(places).reshape(-1, T), (B, T))
        given = [n for n, (role, _) in self.roles.items() if role == "position_ids"]
        expected = self.known[given[0]].reshape(-1, T) if given else np.arange(P, P + T)
        offset = rows - expected
        if (offset != offset.flat[0]).any():
            raise UnsupportedModelError(
                f"{places.node.describe()} takes the rows {rows[0].tolist()} of wpe for positions {P}..{P + T - 1}"
            )
        how = "input" if given else "range"
        masks = [n for n, (role, _) in self.roles.items() if role == "attention_mask" and self.known[n].ndim == 2]
        if how == "range" and masks:
            mask = np.ones_like(self.known[masks[0]])
            mask[0, : P + 2] = mask[-1, P + 1] = mask[-1, 0] = 0  # padding on the left, and holes
            moved = np.broadcast_to(self.rows(places, {masks[0]: mask}).reshape(-1, T), (B, T)) - offset
            counts = {name: count(mask != 0)[:, P:] for name, count in POSITIONS_FROM_MASK.items()}
            if (moved != expected).any():
                how = next((name for name, count in counts.items() if (moved == count).all()), "")
                if not how:
                    raise UnsupportedModelError(
                        f"{places.node.describe()} derives positions from {masks[0]!r} in an unknown way"
                    )
        if offset.flat[0]:
            self.notes.append(f"the first token takes row {int(offset.flat[0])} of wpe")
        return int(offset.flat[0]), how


def unknown(shape: Sequence[int]) -> Array:
    """An activation of the probe: NaN in any shape, without memory for each."""
    return np.broadcast_to(np.float64(np.nan), tuple(shape))


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
