"""Which GPT-2 a graph is: hyper-parameters, weights, intermediate values, inputs and outputs.

The search runs from the outputs backwards: the head, the last layer norm, then the terms of the residual
stream, each of them an attention or an MLP behind a layer norm of its own, down to the embeddings. Structure
finds the borders of each part (blocks.py and py). What a part does inside its borders is found by
running it on inputs that tell (probe.py and evaluate.py): the columns of c_attn that become the query of head 3
are those whose numbers arrive there, whatever mixture of Split, Slice, Reshape and Transpose carries them; the
mask is what it does to scores; the activation is the function whose values come out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ...activations import ACTIVATIONS
from ...config import GPT2Config
from ...errors import UnsupportedModelError, WeightError
from ...files import allowance
from ...masks import CAUSAL, MaskRule
from ...weights import weight_shapes
from ..evaluate.evaluator import Evaluator
from ..evaluate.operators import is_float
from ..graph import VIEWS, Graph
from ..guard import typed_errors
from ..normalise.build import build_graph
from ..read.reader import ModelFile
from . import blocks
from .blocks import Branch, Roles
from .linear import Linear, nearest_linears
from .lookup import Lookup
from .masks import mask_shapes, read_mask
from .norm import LayerNorm
from .probe import Probe, declared_shape, element_type, unknown
from .products import AttentionCore
from .recognised import Port, Recognised, TapLocation
from .search import find_search
from .sources import Source, joined, ones, zeros

if TYPE_CHECKING:
    import onnx

Array = np.ndarray


@typed_errors()
def recognise(file: ModelFile, objections: list[UnsupportedModelError] | None = None) -> Recognised:
    """Find the GPT-2 in an ONNX file.

    Parameters
    ----------
    file : ModelFile
    objections : list, optional
        Collects errors after which a GPT-2 can still be made out: a layer norm, activation or mask of another
        kind (taken for GPT-2's own), an initializer left over. For tools that look for what is wrong with a file.

    Raises
    ------
    UnsupportedModelError
        If a part of the graph is no part of a GPT-2, or malformed; the message names the node. Also if the file
        asks for more memory than one of its size gets (see `budget`).
    WeightError
        If a floating-point initializer is left over, missing, or of a shape that does not fit.
    """
    found = _recognise(file, objections)
    nbytes = sum(4 * math.prod(source.shape) for source in found.sources.values())
    if nbytes > allowance(file.nbytes):
        raise WeightError(f"the weights would take {nbytes:,} bytes, which a file of {file.nbytes:,} cannot hold")
    return found


def _recognise(file: ModelFile, objections: list[UnsupportedModelError] | None) -> Recognised:
    search = find_search(file)
    if search is not None:
        inner = _recognise(search.decoder, objections)
        return replace(inner, taps={}, search=search.named(inner.inputs))
    condition = merged_condition(file)
    if not condition:
        return _Recogniser(build_graph(file, objections=objections)).run()
    # A merged decoder: one branch with past inputs, one without, over the same weights.
    branches = [_Recogniser(build_graph(file, b, objections), condition).run() for b in ("then", "else")]
    branches.sort(key=lambda r: not any(p.role.startswith("past") for p in r.inputs))
    found, other = branches
    if found.config != other.config or _origins(found) != _origins(other):
        raise UnsupportedModelError(f"the branches of the If on {condition!r} are two different models")
    return replace(found, taps={})  # what is inside a branch cannot be an output of the file


def merged_condition(file: ModelFile) -> str:
    """The input that an If of the main graph chooses its branch by, "" if there is none."""
    inputs = {i.name for i in file.proto.graph.input}
    return next((n.input[0] for n in file.proto.graph.node if n.op_type == "If" and n.input[0] in inputs), "")


def _origins(found: Recognised) -> dict[str, tuple[str, ...]]:
    return {name: source.origin for name, source in found.sources.items()}


class _Recogniser(Probe):
    def __init__(self, graph: Graph, condition: str = "") -> None:
        super().__init__(graph, condition)
        self.output_roles: Roles = {}
        self.sources: dict[str, Source] = {}
        self.taps: dict[str, TapLocation] = {}
        self.moved: set[int] = set()  # layers where a bias is added to q, k and v apart from their maps
        self.epsilons: dict[str, float] = {}
        self.activations: dict[int, str] = {}
        self.unmasked: dict[int, float] = {}  # what q·k is multiplied by before the product's output
        self.scales: dict[int, float] = {}
        self.masks: dict[int, MaskRule] = {}
        self.heads: dict[int, tuple[int, int]] = {}
        self.float16 = False
        self.mask_cut = False
        self.head_padding: Source | None = None

    def run(self) -> Recognised:
        graph = self.graph
        head, final, self.output_roles = blocks.find_top(graph)
        lookups, branches = blocks.find_branches(graph, final)
        layers = blocks.pair(graph, lookups, branches, final)
        words, places, types = blocks.tell_lookups(graph, lookups)
        self.find_inputs(words, places, types, layers)
        self.feed_inputs()
        self.check_ids(words)

        for lookup in lookups:
            self.know(lookup.out, unknown((*self.rows(lookup).shape, lookup.table.shape[1])))
        self.sources["wte.weight"], self.sources["wpe.weight"] = words.table, places.table
        self.float16 = any(t.dtype == np.float16 for t in graph.initializers.values())
        offset, positions = self.find_positions(places)
        self.embed_tap(layers[0][0] if layers else None, final)
        for i, (attention, mlp) in enumerate(layers):
            self.layer_norm(f"h.{i}.ln_1", attention.norm)
            self.attention(i, attention)
            self.layer_norm(f"h.{i}.ln_2", mlp.norm)
            self.mlp(i, mlp)
            after = layers[i + 1][0].norm if i + 1 < len(layers) else final
            for name, norm in ((f"h.{i}.resid_mid", mlp.norm), (f"h.{i}.resid_post", after)):
                self.taps[name] = self.stream(norm.x)
            self.forget()
        self.layer_norm("ln_f", final)
        self.read_masks([attention.core for attention, _ in layers if attention.core])
        tied, head_bias = self.head(head, words)
        config = self.make_config(len(layers), tied, offset)
        self.check_shapes(config)
        ignored = self.check_leftovers()
        self.find_presents(layers, config)
        inputs, outputs = self.ports(graph.inputs, self.roles), self.ports(graph.outputs, self.output_roles)
        order = list(weight_shapes(config)) + (["lm_head.bias"] if head_bias else [])
        graph.budget = None  # what is evaluated from now on has been looked at
        for op, count in graph.roundings.items():
            self.notes.append(f"activations are rounded as the file is run, by {op} ({count} nodes); here they are not")
        return Recognised(
            config,
            {name: self.sources[name] for name in order},
            {name: tap for name, tap in self.taps.items() if tap.tensor not in graph.invented},
            inputs,
            outputs,
            ignored,
            tuple(self.notes),
            positions,
            self.mask_cut,
            self.head_padding,
            self.lengths,
            graph if self.lengths else None,
        )

    # ------------------------------------------------------------------------------------ parts
    def stream(self, name: str) -> TapLocation:
        """A value (B, T, width), or with batch and time merged."""
        return TapLocation(name, lambda a, batch: a if a.ndim == 3 else a.reshape(batch, -1, a.shape[-1]))

    def widest(self, name: str) -> str:
        """Of the views of a value, one that has a batch and a time axis."""
        for view in [*self.graph.chain(name), *self.views_of(name)]:
            try:
                if self.evaluate(view).ndim == 3:
                    return view
            except UnsupportedModelError:
                continue
        return name

    def views_of(self, name: str) -> list[str]:
        """Outputs of nodes that only reshape a value."""
        return [n.outputs[0] for n in self.graph.consumers(name) if n.op in VIEWS and n.inputs[0] == name]

    def embed_tap(self, first: Branch | None, final: LayerNorm) -> None:
        self.taps["embed"] = self.stream((first.norm if first else final).x)

    def layer_norm(self, name: str, norm: LayerNorm) -> None:
        width = self.sources["wte.weight"].shape[1]
        self.sources[f"{name}.weight"] = norm.weight or ones((width,), "no gain in the file")
        self.sources[f"{name}.bias"] = norm.bias or zeros((width,), "no bias in the file")
        self.epsilons[name] = float(str(np.float32(norm.epsilon)))  # 1e-05, as float32 holds it
        shape = self.evaluate(norm.x).shape
        self.know(norm.x, unknown(shape))
        self.know(norm.out, unknown(shape))
        self.taps[name] = self.stream(norm.out)

    def linear(self, name: str, linear: Linear) -> None:
        self.sources[f"{name}.weight"] = linear.weight
        self.sources[f"{name}.bias"] = linear.bias or zeros(linear.weight.shape[1:], "no bias in the file")

    def mlp(self, i: int, branch: Branch) -> None:
        (fc,) = branch.maps
        name = f"h.{i}.mlp"
        shape = self.feed_linear(fc)
        self.linear(f"{name}.c_fc", fc)
        self.linear(f"{name}.c_proj", branch.out)
        self.activations[i] = self.activation(fc, branch.out, shape)
        self.feed_linear(branch.out)
        self.taps[f"{name}.c_fc"] = self.stream(self.widest(fc.out))
        self.taps[f"{name}.gelu"] = self.stream(self.widest(branch.out.x))
        if not branch.out.bias_later:
            self.taps[f"{name}.out"] = self.stream(self.widest(branch.out.out))

    def activation(self, fc: Linear, out: Linear, shape: tuple[int, ...]) -> str:
        """Which function lies between the two maps of an MLP: that whose values come out."""
        points = np.linspace(-8, 8, min(int(np.prod(shape)), 2047))
        (got,) = self.run_with({fc.out: np.resize(points, shape)}, out.x)
        got = got.ravel()[: len(points)]
        errors = {name: float(np.abs(got - f(points)).max()) for name, f in ACTIVATIONS.items()}
        best = min(errors, key=lambda n: errors[n])
        # GELU by erf and by tanh lie 4.7e-4 apart; its constants are off by up to 4e-4 in bfloat16
        rivals = sorted(errors.values())
        if not errors[best] < 2e-4 and not (errors[best] < 4e-4 and errors[best] < 0.75 * rivals[1]):
            node = self.graph.producer(self.graph.strip(out.x)) or out.node
            what = f"{node.describe()} ends an activation that is none of {', '.join(errors)}; "
            what += f"nearest is {best}, off by up to {errors[best]:.2g}"
            self.graph.object(UnsupportedModelError(what))
        if errors[best] > 1e-6:
            self.notes.append(f"{fc.node.describe()}: the {best} behind it is off by up to {errors[best]:.1e}")
        return best

    def attention(self, i: int, branch: Branch) -> None:
        core, name = branch.core, f"h.{i}.attn"
        assert core is not None
        B, T, P = self.B, self.T, self.P
        S = P + T
        # 1. Number every output of the maps and every cached element, and see which numbers arrive where.
        codes: dict[str, Array] = {}
        starts: dict[str, int] = {}
        start = 1
        values = (core.scores.a, core.scores.b, core.heads.b)
        pasts = {n for v in values for n in nearest_linears(self.graph, v)[1]} & set(self.roles)
        for value, shape in [(m.out, self.feed_linear(m)) for m in branch.maps] + [
            (p, self.known[p].shape) for p in sorted(pasts)
        ]:
            size = int(np.prod(shape))
            codes[value] = np.arange(start, start + size, dtype=np.float64).reshape(shape)
            starts[value] = start
            start += size
        numbered, unit = self.evaluator(codes), self.evaluator({n: np.ones_like(c) for n, c in codes.items()})
        flat, arrived = [unit(v) for v in values], [numbered(v) for v in values]
        moved: list[Array] = []  # what is added to q, k and v behind the maps, where that is anything
        read: set[str] = set()
        if any((f != f.flat[0]).any() for f in flat):
            nothing = Evaluator(self.graph, {**self.known, **{n: np.zeros_like(c) for n, c in codes.items()}}, read)
            moved = [nothing(v) for v in values]
            flat, arrived = ([a - m for a, m in zip(some, moved, strict=True)] for some in (flat, arrived))
        factors = [float(f.flat[0]) for f in flat]
        for what, value, ones_out, factor in zip("qkv", values, flat, factors, strict=True):
            if not np.allclose(ones_out, factor, rtol=1e-6) or factor == 0 or not np.isfinite(factor):
                self.fail(value, f"{what} of layer {i} is not its linear map's output times one number")
        if factors[2] != 1:
            self.fail(core.heads.b, f"v of layer {i} is scaled by {factors[2]:g}")

        def upright(q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
            k = k if core.scores.transposed else k.swapaxes(-1, -2)
            return q, k, v.swapaxes(-1, -2) if core.heads.transposed else v

        q, k, v = upright(*(a / f for a, f in zip(arrived, factors, strict=True)))
        D = q.shape[-1]
        if q.size % (B * T * D) or q.size == 0 or k.shape[-2] != S:
            self.fail(core.scores.out, f"q {q.shape} and k {k.shape} are not (batch, heads, time, head size)")
        H = q.size // (B * T * D)
        q, k, v = q.reshape(B, H, T, D), k.reshape(B, H, -1, D), v.reshape(B, H, -1, v.shape[-1])
        if v.shape != (B, H, S, D) or k.shape != (B, H, S, D):
            self.fail(core.heads.out, f"k {k.shape} and v {v.shape} are not {(B, H, S, D)}")
        self.heads[i] = H, D

        # 2. Columns of the maps, in our order: q, k, v; each head after head.
        numbers = [np.rint(a).astype(np.int64) for a in (q, k[:, :, P:], v[:, :, P:])]
        columns = [self.columns(i, branch.maps, starts, n, what) for n, what in zip(numbers, "qkv", strict=True)]
        added: list[Source | None] = [None] * 3
        if moved:
            self.moved.add(i)
            behind = upright(*(m / f for m, f in zip(moved, factors, strict=True)))
            added = [self.added_bias(m.reshape(B, H, -1, D), n, read) for m, n in zip(behind, numbers, strict=True)]
            self.touched |= read
        self.c_attn(i, columns, added)
        for what, array, index in (("past_key", k, 0), ("past_value", v, 1)):
            self.check_past(i, what, index, np.rint(array[:, :, :P]).astype(np.int64), codes)

        # 3. Rows of c_proj.
        shape = (*self.evaluate(core.heads.b).shape[:-2], T, D)
        order = np.arange(B * H * T * D, dtype=np.float64).reshape(B, H, T, D)
        self.know(core.heads.out, unknown(shape))
        (merged,) = self.run_with({core.heads.out: order.reshape(shape)}, branch.out.x)
        expected = order.transpose(0, 2, 1, 3).reshape(B * T, H * D)
        merged = merged.reshape(B * T, -1)
        row_order = np.argsort(merged[0])
        if merged.shape != expected.shape or (merged[:, row_order] != expected).any():
            self.fail(branch.out.x, f"the heads of layer {i} are merged in an unknown way")
        self.linear(f"{name}.c_proj", branch.out)
        self.sources[f"{name}.c_proj.weight"] = branch.out.weight.taken(row_order, 0, "rows reordered")
        if (row_order != np.arange(H * D)).any():
            self.notes.append(f"h.{i}: the heads are merged in another order; rows of c_proj are reordered")

        self.feed_linear(branch.out)
        self.know(core.scores.out, unknown((*self.evaluate(core.scores.a).shape[:-1], S)))

        # 4. Taps; the scale, the mask and the scores wait until all layers are known.
        self.attention_taps(name, branch, (numbered, unit), (q, k[:, :, P:], v[:, :, P:]), row_order)
        self.unmasked[i] = core.scores.alpha * factors[0] * factors[1]

    def fail(self, value: str, why: str) -> None:
        node = self.graph.producer(value)
        raise UnsupportedModelError(f"{node.describe() if node else repr(value)}: {why}")

    def columns(
        self, i: int, maps: tuple[Linear, ...], starts: dict[str, int], numbers: Array, what: str
    ) -> tuple[Linear, Array]:
        """Which columns of which map make q, k or v: numbers (B, H, T, D) -> (map, (HD,))."""
        B, _, T, _ = numbers.shape
        for linear in maps:
            width = linear.weight.shape[1]
            offset = numbers - starts[linear.out]
            if (offset < 0).any() or (offset >= B * T * width).any():
                continue
            row, column = offset // width, offset % width
            expected = np.arange(B * T).reshape(B, 1, T, 1)
            if (row != expected).any() or (column != column[:1, :, :1]).any():
                break
            return linear, column[0, :, 0].reshape(-1)
        raise UnsupportedModelError(
            f"{maps[0].node.describe()}: {what} of layer {i} mixes positions, maps, or the cache"
        )

    def added_bias(self, moved: Array, numbers: Array, read: set[str]) -> Source:
        """What is added to q, k or v behind its map, (B, H, S, D), as a bias (HD,)."""
        H, T, D = numbers.shape[1:]
        bias = np.ascontiguousarray(moved[0, :, -1].reshape(H * D), np.float32)
        if (moved[:, :, -T:] != moved[:1, :, -1:]).any() or moved[:, :, :-T].any():
            raise UnsupportedModelError("what is added to queries, keys or values differs between positions")
        constants = self.graph.constants
        large = {n for n in read if np.prod(self.graph.shape(n)) > 1 and constants[n].dtype.kind not in "iub"}
        return Source(bias.shape, tuple(sorted(large)), ("Add",), bias.copy)

    def c_attn(self, i: int, columns: list[tuple[Linear, Array]], added: list[Source | None]) -> None:
        name = f"h.{i}.attn.c_attn"
        step = "columns reordered"

        def bias(m: Linear, c: Array, more: Source | None) -> Source:
            own = (m.bias or zeros(m.weight.shape[1:], "no bias in the file")).taken(c, 0, step)
            if more is None:
                return own
            return more if m.bias is None else own.plus(more)

        biases = [bias(m, c, more) for (m, c), more in zip(columns, added, strict=True)]
        parts = columns
        if len({m.out for m, _ in columns}) == 1:
            linear = columns[0][0]
            index = np.concatenate([c for _, c in columns])
            parts = [(linear, index)]
            biases = biases if any(added) else [bias(linear, index, None)]
        weights = [m.weight.taken(c, 1, step) for m, c in parts]
        self.sources[f"{name}.weight"] = joined(weights, "Concat q, k, v")
        self.sources[f"{name}.bias"] = joined(biases, "Concat q, k, v")
        if step in self.sources[f"{name}.weight"].through:
            self.notes.append(
                f"{name}: {_order_in_words(columns, self.heads[i])}; columns are reordered to q, k, v by head"
            )

    def check_past(self, i: int, what: str, index: int, numbers: Array, codes: dict[str, Array]) -> None:
        """Cached keys and values must come first, in their own order."""
        if self.P == 0:
            return
        for name, (role, layer) in self.roles.items():
            if layer != i or role not in (what, "past"):
                continue
            given = (codes[name][index] if role == "past" else codes[name])[:, :, : self.P]
            if numbers.shape == given.shape and (numbers == given).all():
                return
        raise UnsupportedModelError(
            f"layer {i}: the {what.replace('_', ' ')} inputs do not come before the new positions"
        )

    def read_masks(self, cores: list[AttentionCore]) -> None:
        """What happens to scores before the softmax: a factor, and what is masked how."""
        name = self.mask
        B, T, S = self.B, self.T, self.P + self.T
        port = next((p for p in self.graph.inputs if p.name == name), None)
        dtype = np.dtype(np.int64) if port is None else element_type(port)
        floating = is_float(np.empty(0, dtype))
        rng = np.random.default_rng(0)
        shapes = {core.scores.out: self.known[core.scores.out].shape for core in cores}
        low = {name: rng.uniform(1, 2, shape) for name, shape in shapes.items()}
        high = {name: rng.uniform(-2, -1, shape) for name, shape in shapes.items()}
        probes: dict[Any, tuple[Evaluator, Evaluator]] = {}  # for each attention_mask; the layers share them

        def run(core: AttentionCore, attention_mask: Array | None) -> tuple[Array, Array]:
            key = None if attention_mask is None else (attention_mask.shape, attention_mask.tobytes())
            if key not in probes:
                feeds: dict[str, Array] = {}
                if attention_mask is not None:
                    feeds[name] = attention_mask if floating else attention_mask.astype(dtype)
                probes[key] = self.evaluator({**feeds, **low}), self.evaluator({**feeds, **high})
            one, two = (probe(core.masked).reshape(B, -1, T, S) for probe in probes[key])
            first, second = (scores[core.scores.out].reshape(B, -1, T, S) for scores in (low, high))
            with np.errstate(invalid="ignore"):
                factor = np.where(one == two, 0.0, (one - two) / (first - second))
                added = np.where(np.isinf(one), one, one - factor * first)
            added = np.where(np.abs(added) < 1e-8, 0.0, added)  # TensorFlow adds 1e-9 to every score
            if self.float16:
                added = np.where(added < np.finfo(np.float16).min, -np.inf, added)
            return factor, added

        given: list[tuple[tuple[int, ...] | None, bool]] = [(None, False)]
        if port is not None:
            given = list(mask_shapes(declared_shape(port), B, T, S))
        for i, core in enumerate(cores):
            H, D = self.heads[i]
            after, mask, error = 1.0, CAUSAL, None
            for shape, cut in given:
                try:
                    after, mask = read_mask(partial(run, core), T, S, shape, cut, floating, core.guarded)
                except (ValueError, UnsupportedModelError) as why:
                    error = error or why
                else:
                    given, self.mask_cut, error = [(shape, cut)], cut, None
                    break
            if error is not None:
                node = self.graph.producer(core.masked)
                where = node.describe() if node else repr(core.masked)
                self.graph.object(UnsupportedModelError(f"{where}: the mask of layer {i}: {error}"))
            scale = self.unmasked[i] * after
            # rounded to float32 on the way
            self.scales[i] = D**-0.5 if np.isclose(scale, D**-0.5, rtol=1e-6) else scale
            self.masks[i] = mask
            self.scores_tap(i, core, H)
        if any(mask.adds for mask in self.masks.values()):
            self.roles[name] = "attention_bias", None

    def scores_tap(self, i: int, core: AttentionCore, H: int) -> None:
        """Scores are tapped behind the last factor, before anything is masked."""
        graph = self.graph
        value, factor = core.scores.out, self.unmasked[i]
        while True:
            following = None
            for node in graph.consumers(value):
                if node.op in ("Mul", "Div") and len(node.inputs) == 2:
                    other = node.inputs[1] if node.inputs[0] == value else node.inputs[0]
                    number = self.number(other)
                    if number is not None and (node.op == "Mul" or node.inputs[0] == value):
                        following = node.outputs[0], number if node.op == "Mul" else 1 / number
            if following is None or value == core.masked:
                break
            value, factor = following[0], factor * following[1]
        self.taps[f"h.{i}.attn.scores"] = TapLocation(value, _by_head(H, self.scales[i] / factor))

    def attention_taps(
        self,
        name: str,
        branch: Branch,
        probes: tuple[Evaluator, Evaluator],
        expected: tuple[Array, Array, Array],
        row_order: Array,
    ) -> None:
        core = branch.core
        assert core is not None
        for what, value, numbers in zip("qkv", (core.scores.a, core.scores.b, core.heads.b), expected, strict=True):
            location = self.find_heads(value, numbers, probes)
            if location is not None:
                self.taps[f"{name}.{what}"] = location
        H = expected[0].shape[1]

        self.taps[f"{name}.probs"] = TapLocation(core.probs, _by_head(H, 1.0))
        merged = self.widest(branch.out.x)
        if (row_order == np.arange(len(row_order))).all():
            self.taps[f"{name}.heads"] = self.stream(merged)
        else:
            self.taps[f"{name}.heads"] = TapLocation(
                merged, lambda a, batch: a.reshape(batch, -1, a.shape[-1])[..., row_order]
            )
        if not branch.out.bias_later:
            self.taps[f"{name}.out"] = self.stream(self.widest(branch.out.out))

    def number(self, name: str) -> float | None:
        """A value that is one number, constant or computed from sizes."""
        try:
            value = self.evaluate(name)
        except UnsupportedModelError:
            return None
        if value.size != 1 or not is_float(value) or not np.isfinite(value).all():
            return None
        return float(value.reshape(-1)[0])

    def find_heads(self, value: str, numbers: Array, probes: tuple[Evaluator, Evaluator]) -> TapLocation | None:
        """On the way from the map to the product: a value that holds all new positions, split into heads."""
        for candidate in self.graph.ancestors(value):
            if candidate in self.graph.invented:
                continue
            try:
                array, unit = (probe(candidate) for probe in probes)
            except UnsupportedModelError:
                continue
            if array.size != numbers.size or not is_float(array):
                continue
            factor = float(unit.flat[0])
            for axes in ((0, 1, 2, 3), (0, 2, 1, 3), (0, 1, 3, 2), (0, 3, 1, 2)):
                if array.ndim == 4 and factor:
                    moved = array.transpose(axes)
                    if moved.shape == numbers.shape and np.allclose(moved / factor, numbers, rtol=1e-9):
                        return TapLocation(candidate, _moved(axes, factor))
        return None

    def head(self, head: Linear | None, words: Lookup) -> tuple[bool, bool]:
        """The head's weights; tied if they are wte's own bytes."""
        if head is None:
            return True, False
        columns, weight = head.weight, head.weight.transposed("Transpose")
        if head.bias is not None:
            self.sources["lm_head.bias"] = head.bias
        self.taps["logits"] = TapLocation(
            head.out,
            lambda a, batch: a.reshape(-1, *a.shape[-2:]) if a.ndim != 2 else a.reshape(batch, -1, a.shape[-1]),
        )
        self.head_source = weight
        V, C = words.table.shape
        if weight.shape[0] < V:
            raise WeightError(
                f"{head.node.describe()} gives {weight.shape[0]} numbers, not one for each of {V} tokens: "
                "the head of a classifier, not of a language model"
            )
        if weight.shape[0] > V and weight.shape[1:] == (C,) and head.bias is None:
            more = weight.shape[0] - V
            self.notes.append(f"the head has {more} more rows than wte: logits of no token")
            self.head_padding = weight.taken(np.arange(V, V + more), 0, "rows without a token")
            columns, weight = (m.taken(np.arange(V), axis, "rows of tokens") for axis, m in ((1, columns), (0, weight)))
            self.taps["logits"] = TapLocation(head.out, lambda a, batch: a.reshape(-1, *a.shape[-2:])[..., :V])
        tied = _same_tensor(head, words) or (weight.shape == words.table.shape and _equal(columns, words.table))
        if not tied:
            self.sources["lm_head.weight"] = weight
        return tied, head.bias is not None

    # ------------------------------------------------------------------------------------ summary
    def make_config(self, L: int, tied: bool, offset: int) -> GPT2Config:
        V, C = self.sources["wte.weight"].shape
        (H, D), *others = self.heads.values()
        if any(o != (H, D) for o in others):
            raise UnsupportedModelError(f"the layers have different heads: {sorted(set(self.heads.values()))}")
        mask = Counter(self.masks.values()).most_common(1)[0][0]
        for i, other in self.masks.items():
            if other != mask:
                usual = next(j for j, m in self.masks.items() if m == mask)
                what = f"layer {i} is masked otherwise ({other.describe()}) than layer {usual} ({mask.describe()})"
                self.graph.object(UnsupportedModelError(what))
        epsilon = _usual(self.epsilons, 1e-5)
        activation = _usual(self.activations, "gelu_tanh")
        scale = _usual(self.scales, D**-0.5)
        overrides: list[tuple[str, float | str]] = []
        overrides += [(f"{n}.epsilon", e) for n, e in self.epsilons.items() if e != epsilon]
        overrides += [(f"h.{i}.mlp.activation", a) for i, a in self.activations.items() if a != activation]
        overrides += [(f"h.{i}.attn.scale", s) for i, s in self.scales.items() if s != scale]
        self.notes += [f"{n} is {v}, unlike in the other layers" for n, v in overrides]
        if mask.shift:
            self.notes.append(f"query i sees keys up to i{mask.shift:+d}: GPT-2 sees keys up to i")
        if not np.isclose(scale, D**-0.5, rtol=1e-3):
            self.notes.append(f"scores are scaled by {scale:g}; GPT-2 scales by 1/sqrt({D}) = {D**-0.5:g}")
        return GPT2Config(
            n_layer=L,
            n_head=H,
            n_embd=C,
            n_ctx=self.sources["wpe.weight"].shape[0],
            vocab_size=V,
            n_inner=self.sources["h.0.mlp.c_fc.weight"].shape[1],
            head_size=D,
            layer_norm_epsilon=epsilon,
            activation=activation,
            attn_scale=scale,
            tied=tied,
            mask=mask,
            position_offset=offset,
            overrides=tuple(overrides),
        )

    def check_shapes(self, config: GPT2Config) -> None:
        for name, shape in weight_shapes(config).items():
            source = self.sources[name]
            if source.shape != shape:
                raise WeightError(f"{name} from {source.describe()} has shape {source.shape}, expected {shape}")
        if "lm_head.bias" in self.sources and self.sources["lm_head.bias"].shape != (config.vocab_size,):
            source = self.sources["lm_head.bias"]
            raise WeightError(
                f"lm_head.bias from {source.describe()} has shape {source.shape}, expected ({config.vocab_size},)"
            )

    def check_leftovers(self) -> tuple[tuple[str, str], ...]:
        """Every floating-point initializer is a weight, or its part is known."""
        used = {name for source in self.sources.values() for name in source.origin}
        head = getattr(self, "head_source", None)
        ignored: list[tuple[str, str]] = []
        for name, tensor in self.graph.initializers.items():
            if name in used:
                continue
            floating = is_float(np.empty(0, tensor.dtype)) if tensor.dtype.kind != "O" else False
            if head is not None and name in head.origin:
                ignored.append((name, "the head: the same bytes as wte"))
            elif name in self.touched:
                size = int(np.prod(tensor.shape))
                ignored.append(
                    (
                        name,
                        "mask buffer"
                        if size > 4096 or (size > 1 and len(tensor.shape) > 1)
                        else "constant of the graph",
                    )
                )
            elif floating and int(np.prod(tensor.shape)) > 1:
                what = f"initializer {name!r} {tensor.shape} is left over: it is no weight of this GPT-2"
                self.graph.object(WeightError(what))
                ignored.append((name, "left over"))
            else:
                ignored.append((name, "constant of the graph"))
        return tuple(ignored)

    def find_presents(self, layers: list[tuple[Branch, Branch]], config: GPT2Config) -> None:
        """Outputs that hold keys and values."""
        graph = self.graph
        for output in graph.outputs:
            if output.name in self.output_roles:
                continue
            found = self.present(output.name, layers) or self.tapped(output.name)
            if found is None:
                node = graph.producer(output.name)
                where = f" ({node.describe()})" if node else ""
                raise UnsupportedModelError(
                    f"output {output.name!r}{where} is neither hidden states, logits, nor keys and values"
                )
            self.output_roles[output.name] = found

    def tapped(self, output: str) -> tuple[str, None] | None:
        """An output that is one of the taps as it stands, such as the hidden states of each layer."""
        views = set(self.graph.chain(output))
        for name, tap in self.taps.items():
            if views & set(self.graph.chain(tap.tensor)):
                ids = next(self.known[n] for n, (role, _) in self.roles.items() if role == "input_ids")
                shape = self.evaluate(output).shape
                if len(shape) == 4 or shape[:-1] == ids.shape:
                    return name, None
        return None

    def present(self, output: str, layers: list[tuple[Branch, Branch]]) -> tuple[str, int] | None:
        graph = self.graph
        linears, pasts = nearest_linears(graph, output)
        for i, (branch, _) in enumerate(layers):
            core = branch.core
            assert core is not None
            # a fused attention may leave a second copy of c_attn for its present output
            twins = {
                linear: m
                for linear in linears
                for m in branch.maps
                if linear.weight.origin == m.weight.origin and graph.strip(linear.x) == graph.strip(m.x)
            }
            if not twins:
                continue
            codes: dict[str, Array] = {}
            start = 1
            for name in [m.out for m in branch.maps] + sorted(set(pasts)):
                size = self.known[name].size
                codes[name] = np.arange(start, start + size, dtype=np.float64).reshape(self.known[name].shape)
                start += size
            for linear, m in twins.items():
                codes[linear.out] = codes[m.out].reshape(self.feed_linear(linear))
            asked = output, core.scores.b, core.heads.b
            got, k, v = self.run_with(codes, *asked)
            k_unit, *_ = units = self.run_with({n: np.ones_like(c) for n, c in codes.items()}, *asked[1:])
            if i in self.moved:
                nothing = self.run_with({n: np.zeros_like(c) for n, c in codes.items()}, *asked)
                got, k, v = (a - m for a, m in zip((got, k, v), nothing, strict=True))
                k_unit = units[0] - nothing[1]
            k = np.rint(k / k_unit.flat[0])
            k = k if core.scores.transposed else k.swapaxes(-1, -2)
            H, D = self.heads[i]
            k, v = (a.reshape(self.B, H, -1, D) for a in (k, v))
            for role, expected in (("present_key", k), ("present_value", v), ("present", np.stack([k, v]))):
                if got.ndim == expected.ndim and self.lengths:
                    got = got[..., : expected.shape[-2], :]
                if got.shape == expected.shape and (got == expected).all():
                    return role, i
        return None

    def ports(self, protos: Iterable[onnx.ValueInfoProto], roles: Roles) -> tuple[Port, ...]:
        return tuple(Port(p.name, element_type(p), declared_shape(p), *roles[p.name]) for p in protos)


# -------------------------------------------------------------------------------------------------- helpers
def _usual(found: Mapping[Any, Any], gpt2: Any) -> Any:
    """What most layers have; GPT-2's own where two are equally frequent."""
    counts = Counter(found.values())
    return max(counts, key=lambda value: (counts[value], value == gpt2))


def _moved(axes: tuple[int, ...], factor: float) -> Callable[[Array, int], Array]:
    return lambda a, batch: a.transpose(axes) if factor == 1 else (a.transpose(axes) / factor).astype(a.dtype)


def _by_head(H: int, factor: float) -> Callable[[Array, int], Array]:
    def convert(a: Array, batch: int) -> Array:
        a = a if a.ndim == 4 else a.reshape(-1, H, *a.shape[-2:])
        return a if np.isclose(factor, 1, rtol=1e-6) else (a * factor).astype(a.dtype)

    return convert


def _order_in_words(columns: list[tuple[Linear, Array]], heads: tuple[int, int]) -> str:
    H, D = heads
    firsts = [int(c[0]) for _, c in columns]
    runs = all((c == c[0] + np.arange(H * D)).all() for _, c in columns)
    if runs:
        return "the graph takes " + ", ".join(w for _, w in sorted(zip(firsts, "qkv", strict=True))) + " in this order"
    if sorted(firsts) == [0, D, 2 * D]:
        return "q, k and v lie side by side within each head"
    return "the graph takes q, k and v in an order of its own"


def _same_tensor(head: Linear, words: Lookup) -> bool:
    return (
        head.weight.origin == words.table.origin
        and head.weight.shape == words.table.shape[::-1]
        and set(head.weight.through) <= {"Transpose", "Gemm transB", "MatMul transB", *words.table.through}
    )


def _equal(head: Source, table: Source) -> bool:
    """Whether a map (C, V) has the bits of a table (V, C), transposed; a NaN equals the same NaN."""
    columns = _bits(table.read())
    at, step = 0, 1024  # rows of the table at once, so that what is compared stays in the caches
    for block in head.blocks(32):
        part, rows = columns[:, at : at + len(block)], _bits(block).T
        at += len(block)
        if part.dtype != rows.dtype:
            return False
        if not all(np.array_equal(part[v : v + step], rows[v : v + step]) for v in range(0, len(part), step)):
            return False
    return True


def _bits(a: Array) -> Array:
    """The same matrix as integers, without a copy where it or its transpose is contiguous."""
    kind = f"u{a.dtype.itemsize}"
    return a.T.view(kind).T if a.flags.f_contiguous else np.ascontiguousarray(a).view(kind)
