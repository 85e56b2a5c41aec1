"""A graph with values at the borders of its parts, to be run inside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import UnsupportedModelError
from ..evaluate.evaluator import Evaluator
from ..graph import Graph, Node
from .blocks import Borders
from .forms import Likeness
from .inputs import Inputs, declared_shape, element_type
from .linear import GEMMS, LinearFound
from .lookup import Lookup
from .masks import mask_shapes
from .products import AttentionCore, Product
from .recognised import LENGTHS

Array = np.ndarray


@dataclass(frozen=True)
class Sizes:
    """What a probe runs on: B sequences of T new positions behind P cached ones."""

    B: int
    T: int
    P: int

    @property
    def S(self) -> int:
        """All positions."""
        return self.P + self.T


# Of a budget, for each pair of a query and a key whose mask is read: what most graphs make do with, and enough for any.
BYTES_OF_A_PAIR = (16, 60)
MANY = 19  # sequences; more than a graph's arithmetic is likely to count up to
USUAL = Sizes(2, 4, 3)  # no two sizes equal, so that an axis is known by its size


def sizes_allowed(graph: Graph, inputs: Inputs, wanted: Sizes) -> tuple[Sizes, list[int]]:
    """The sizes nearest to those wanted that the file declares, and the shape of its token ids."""
    declared = {p.name: declared_shape(p) for p in graph.inputs}
    (ids,) = inputs.named("input_ids")
    shape = declared[ids]
    if len(shape) not in (1, 2, 3):
        raise UnsupportedModelError(f"input {ids!r} has {len(shape)} axes; token ids have 1 to 3")
    free = [1] * (len(shape) - 2) + [wanted.B, wanted.T][-len(shape) :]
    sizes = [s if isinstance(s, int) and s > 0 else size for s, size in zip(shape, free, strict=True)]
    if graph.one_token:
        sizes[-1] = 1
    pasts = [declared[name] for name, (role, _) in inputs.roles.items() if role.startswith("past")]
    length = pasts[0][-2] if pasts and len(pasts[0]) > 1 else None
    P = (length if isinstance(length, int) and not inputs.lengths else wanted.P) if pasts else 0
    return Sizes(math.prod(sizes[:-1]), sizes[-1], P), sizes


class Probe:
    """The values that are known, and what follows from them; float values are mostly NaN, only their shapes count.

    Parameters
    ----------
    graph : Graph
    borders, inputs
        What has been found of it.
    alike : list of Likeness or None
        For each layer the first one that is written like it.
    wanted : Sizes
        To be run on, where the file does not declare others.
    """

    def __init__(
        self, graph: Graph, borders: Borders, inputs: Inputs, alike: list[Likeness | None], wanted: Sizes = USUAL
    ) -> None:
        self.graph, self.borders, self.inputs, self.alike = graph, borders, inputs, alike
        self.roles, self.mask, self.lengths = inputs.roles, inputs.mask, inputs.lengths
        self.size_values = inputs.size_values
        self.known: dict[str, Array] = {}  # values of the probe at the borders of parts
        self.touched: set[str] = set()  # constants that were read
        self.base = _Shapes(graph, {}, self.touched)  # what follows from them, kept
        self.sizes, ids_shape = sizes_allowed(graph, inputs, wanted)
        self.B, self.T, self.P = self.sizes.B, self.sizes.T, self.sizes.P
        self.half = inputs.half
        self._computed: dict[str, Array] = {}  # sizes, and what follows from them
        self._feed_inputs(ids_shape)

    def _feed_inputs(self, sizes: list[int]) -> None:
        width = self.borders.width
        (ids,) = self.inputs.named("input_ids")
        self._check_room(ids, (self.B, self.sizes.S, width))
        for port in self.graph.inputs:
            role, shape = self.roles[port.name][0], declared_shape(port)
            dtype = element_type(port)
            if role == "input_ids":
                self.know(port.name, np.arange(math.prod(sizes)).reshape(sizes).astype(dtype))
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
            self.graph.budget.check(
                32 * math.prod(sizes), lambda: f"input {name!r}, for which the probe is {list(sizes)},"
            )

    def place(self) -> None:
        """Give the probe values at all borders.

        A layer that is written like one before it gets values of that one's shapes, if the stream before both has one.
        """
        borders = self.borders
        for lookup in borders.lookups:
            self.know(lookup.out, unknown((*self.rows(lookup).shape, lookup.table.shape[1])))
        for i, layer in enumerate(borders.layers):
            shape = self.evaluate(layer[0].norm.x).shape
            like = self.alike[i]
            if like is not None and shape == self.known[borders.layers[like.first][0].norm.x].shape:
                for branch, first in zip(layer, borders.layers[like.first], strict=True):
                    for value, placed in zip(branch.borders, first.borders, strict=True):
                        self.known[value] = self.base.values[value] = self.known[placed]
                continue
            self.alike[i] = None
            for branch in layer:
                shape = self.evaluate(branch.norm.x).shape
                self.know(branch.norm.x, unknown(shape))
                self.know(branch.norm.out, unknown(shape))
                for linear in branch.maps:
                    self.feed_linear(linear)
                if branch.core is not None:
                    self._place_core(branch.core)
                self.feed_linear(branch.out)
        shape = self.evaluate(borders.final.x).shape
        self.know(borders.final.x, unknown(shape))
        self.know(borders.final.out, unknown(shape))
        if borders.head is not None:
            self.feed_linear(borders.head)
        self._computed = {name: value for name, value in self.base.values.items() if name in self.size_values}

    def _place_core(self, core: AttentionCore) -> None:
        queries = self.evaluate(core.scores.a).shape
        self._feed_product(core.scores, queries)
        self._feed_product(core.heads, (*queries[:-1], self.sizes.S))

    def _feed_product(self, product: Product, a: tuple[int, ...]) -> None:
        """Let the probe know the shape of a product's output, given that of its first operand."""
        b = self.evaluate(product.b).shape
        if min(len(a), len(b)) < 2 or not _fits(b[:-2], a[:-2]):  # the other axes are counted when what they hold is
            raise UnsupportedModelError(f"{product.node.describe()} cannot multiply {a} by {b}")
        self.know(product.out, unknown((*a[:-1], b[-2 if product.transposed else -1])))

    def know(self, name: str, value: Array) -> None:
        """Give the probe the value at a border."""
        self.known[name] = self.base.values[name] = value

    def evaluate(self, name: str) -> Array:
        """A value of the probe; activations are NaN, only their shape counts."""
        return self.base.value(name)

    def run_with(self, feeds: dict[str, Array], *names: str) -> list[Array]:
        """Values of the probe, with some values replaced."""
        evaluator = self.evaluator(feeds)
        return list(map(evaluator.value, names))

    def evaluator(self, feeds: dict[str, Array]) -> Evaluator:
        """The probe, with some values replaced."""
        return Evaluator(self.graph, {**self._computed, **self.known, **feeds}, self.touched)

    def feed_linear(self, linear: LinearFound) -> tuple[int, ...]:
        """Let the probe know the shape of a linear map's output."""
        given = self.evaluate(linear.x).shape
        rows, inputs = given[: -linear.summed], math.prod(given[-linear.summed :])
        if inputs != linear.weight.shape[0] or (linear.node.op in GEMMS and len(given) != 2):
            raise UnsupportedModelError(f"{linear.node.describe()} cannot multiply {given} by {linear.weight.shape}")
        shape = rows + (linear.sizes or linear.weight.shape[1:])
        self.know(linear.out, unknown(shape))
        return shape

    def rows(self, lookup: Lookup, feeds: dict[str, Array] | None = None) -> Array:
        """Which rows of its table a lookup takes."""
        if lookup.rows and not lookup.repeated:
            return Evaluator(self.graph, {**self.known, **(feeds or {})}, self.touched).value(lookup.rows)
        numbered = np.arange(lookup.table.shape[0], dtype=np.float64)[:, None]
        known = {n: v for n, v in self.known.items() if n != lookup.out}
        evaluator = Evaluator(self.graph, {**known, **(feeds or {}), lookup.node.inputs[0]: numbered})
        taken = evaluator(lookup.out if lookup.repeated else lookup.node.outputs[0])
        return taken[..., 0].astype(np.int64)


ELEMENTWISE = frozenset(
    {
        "Add", "Sub", "Mul", "Div", "Pow", "Sum", "Sqrt", "Neg", "Exp", "Tanh", "Erf", "Sigmoid", "Relu", "Gelu",
        "com.microsoft.Gelu", "com.microsoft.FastGelu", "com.microsoft.QuickGelu",
    }
)  # fmt: skip


class _Shapes(Evaluator):
    """An evaluator that makes no array of what is unknown anyway."""

    short = ELEMENTWISE | {"Concat"}

    def shorten(self, node: Node) -> bool:
        inputs, known = [], 0
        for i in node.inputs:
            if i:
                array = self.values[i]
                inputs.append(array)
                known += not (array.dtype == np.float64 and array.ndim and not any(array.strides))  # see `unknown`
        if node.op == "Concat":
            if known or len({a.ndim for a in inputs}) != 1:
                return False
            sizes, axis = list(inputs[0].shape), node.attributes["axis"]
            sizes[axis] = sum(a.shape[axis] for a in inputs)
            shape = tuple(sizes)
        elif known == len(inputs):
            return False
        else:
            shape = inputs[0].shape
            for a in inputs[1:]:
                if a.shape != shape and (a.size != 1 or a.ndim > len(shape)):
                    shape = _broadcast(node, [a.shape for a in inputs])
                    break
        self.values[node.outputs[0]] = unknown(shape)
        return True


def _fits(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether one shape is broadcast to the other."""
    ends = zip(shape[::-1], target[::-1], strict=False)
    return len(shape) <= len(target) and all(one in (1, size) for one, size in ends)


def _broadcast(node: Node, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    try:
        return np.broadcast_shapes(*shapes)
    except ValueError as error:
        raise UnsupportedModelError(f"{node.describe()} cannot be evaluated on {shapes}: {error}") from error


def unknown(shape: Sequence[int]) -> Array:
    """An activation of the probe: NaN in any shape, without memory for each."""
    return np.ndarray(tuple(shape), np.float64, _NAN, 0, (0,) * len(shape))


_NAN = np.float64(np.nan).tobytes()


def longest_tried(graph: Graph, n_ctx: int) -> list[int]:
    """How many positions are tried at once: all, unless a small file claims so many that their square is too much.

    The second number is for graphs to which the first one is too much.
    """
    if graph.budget is None:
        return [n_ctx]
    return [min(n_ctx, math.isqrt(graph.budget.left // nbytes)) for nbytes in BYTES_OF_A_PAIR]


def probes_of(usual: Probe, n_ctx: int) -> list[Probe]:
    """The usual probe, and the same graph at other sizes, as far as the file declares none of its own."""
    probes, seen = [usual], {usual.sizes}
    half = n_ctx // 2
    # at the ends of what each size can be, where arithmetic of sizes shows (see `roles.bends`)
    tried = [Sizes(MANY, 5, 4), Sizes(1, n_ctx, 0), Sizes(1, 1, n_ctx - 1)]
    if usual.P:
        tried += [Sizes(1, 1, 0), Sizes(1, half, n_ctx - half), Sizes(2, 2, 1)]
    for wanted in tried:
        sizes, _ = sizes_allowed(usual.graph, usual.inputs, wanted)
        if sizes.S > n_ctx:  # one of the lengths is the file's own
            wanted = Sizes(wanted.B, max(1, n_ctx - sizes.P), max(0, n_ctx - sizes.T))
            sizes, _ = sizes_allowed(usual.graph, usual.inputs, wanted)
        if sizes not in seen and sizes.S <= n_ctx:
            probe = Probe(usual.graph, usual.borders, usual.inputs, usual.alike, wanted)
            probe.place()
            probes.append(probe)
            seen.add(sizes)
    return probes
