"""The search around a GPT-2: a node that runs the model again and again, cut apart from the model that it runs.

Two kinds of file hold one. ONNX Runtime's tools write BeamSearch, GreedySearch and Sampling nodes, whose `decoder`
is the GPT-2 as a graph of its own. The ONNX Model Zoo's gpt2-lm-head-bs-12 is one Loop of plain operators: its body
takes a step of a beam search, with the GPT-2 in the middle. There the values that go into the GPT-2 and those that
come out of it are found, and the body is cut there into two graphs, of which the one is an ordinary GPT-2 with past.
Its `step`, all the rest, is not recognised but run as it stands (gpt2np/search.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from ...errors import UnsupportedModelError
from ..read.reader import ModelFile
from .inputs import declared_shape, element_type
from .recognised import Port

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

# The inputs of ONNX Runtime's search nodes, by position.
_MASKS = ("repetition_penalty", "vocab_mask", "prefix_vocab_mask", "attention_mask")
_BEAM = ("input_ids", "max_length", "min_length", "num_beams", "num_return_sequences", "length_penalty", *_MASKS)
_GREEDY = ("input_ids", "max_length", "min_length", *_MASKS)
SEARCH_INPUTS: dict[str, tuple[str, ...]] = {
    "BeamSearch": _BEAM,
    "GreedySearch": _GREEDY,
    "Sampling": (*_GREEDY, "presence_mask", "seed"),
}
SEARCH_OUTPUTS: dict[str, tuple[str, ...]] = {
    "BeamSearch": ("sequences", "sequences_scores", "scores"),
    "GreedySearch": ("sequences",),
    "Sampling": ("sequences", "filtered_logits"),
}
# What leaves the logits of a position as they are on their way to the search.
_VIEWS = {"Identity", "Reshape", "Squeeze", "Unsqueeze", "Gather", "Slice", "Cast"}


@dataclass(frozen=True)
class Body:
    """A Loop's body, cut in two; the names of values are the body's own."""

    step: ModelFile  # all but the GPT-2: from the carried values, logits and presents to the next carried values
    carried: tuple[str, ...]  # what the body takes from one turn to the next, without the turn's number and condition
    given: tuple[str, ...]  # what it gives for them, in their order
    condition: tuple[str, str]  # whether this turn runs, and the next
    number: str  # of the turn, from 0
    fed: tuple[str, ...]  # the values that the decoder takes
    width: int  # beams
    eos: int | None


@dataclass(frozen=True)
class Search:
    """A file that searches: its own inputs and outputs, the node that searches, and the GPT-2 that it runs."""

    kind: str  # the node's operator
    node: NodeProto
    file: ModelFile  # the file itself
    around: ModelFile  # its graph without the node, whose outputs are inputs there
    decoder: ModelFile
    inputs: tuple[Port, ...]  # roles are those of SEARCH_INPUTS; of a Loop "input_ids", "attention_mask", "new_tokens"
    outputs: tuple[Port, ...]
    body: Body | None = None  # of a Loop

    def named(self, decoder: Sequence[Port]) -> Search:
        """The same with the roles of a Loop's inputs, which are those of the values that the decoder takes."""
        roles = {f"body:{port.name}": port.role for port in decoder}
        return replace(self, inputs=tuple(replace(p, role=roles.get(p.role, p.role)) for p in self.inputs))

    def attribute(self, name: str, default: float) -> float:
        """A number among the node's attributes."""
        found = next((a for a in self.node.attribute if a.name == name), None)
        return default if found is None else found.f if found.type == found.FLOAT else found.i

    def describe(self) -> str:
        """The search in a few words, as `info` shows it."""
        if self.body is not None:
            end = "no end-of-text token" if self.body.eos is None else f"end-of-text token {self.body.eos}"
            return f"beam search, width {self.body.width}, {end}; a Loop of plain operators"
        names = {"BeamSearch": "beam search", "GreedySearch": "greedy search", "Sampling": "sampling"}
        width = next((p.name for p in self.inputs if p.role == "num_beams"), "")
        told = f", width: input {width!r}" if width else ""
        eos = int(self.attribute("eos_token_id", -1))
        return f"{names[self.kind]}{told}, end-of-text token {eos}; a {self.kind} node"


def find_search(file: ModelFile) -> Search | None:
    """The search of a file, or None where its graph is a GPT-2 itself.

    Raises
    ------
    UnsupportedModelError
        If there is a search that cannot be cut apart from what it runs.
    """
    graph = file.proto.graph
    for node in graph.node:
        if node.domain == "com.microsoft" and node.op_type in SEARCH_INPUTS:
            return _of_node(file, node)
    loops = [n for n in graph.node if n.op_type == "Loop" and n.domain in ("", "ai.onnx")]
    return _of_loop(file, loops[0]) if len(loops) == 1 else None


class _Whole:
    """A model in memory, cut as a file is."""

    def __init__(self, proto: ModelProto) -> None:
        self.proto = proto

    def with_graph(self, graph: GraphProto) -> _Whole:
        from onnx import ModelProto

        made = ModelProto()
        made.CopyFrom(self.proto)
        made.graph.CopyFrom(graph)
        return _Whole(made)


def decoder_model(path: str | Path) -> bytes:
    """The GPT-2 inside a file that searches, as a model.onnx of its own, its weights included."""
    import onnx

    search = find_search(cast(ModelFile, _Whole(onnx.load(path))))
    if search is None:
        raise UnsupportedModelError(f"{path} holds no search")
    return bytes(search.decoder.proto.SerializeToString())


def _of_node(file: ModelFile, node: NodeProto) -> Search:
    graph = file.proto.graph
    decoder = next((a.g for a in node.attribute if a.name == "decoder"), None)
    if decoder is None:
        raise UnsupportedModelError(f"{node.op_type} node {node.name!r} has no decoder")
    asked, given = SEARCH_INPUTS[node.op_type], SEARCH_OUTPUTS[node.op_type]
    roles = dict(zip(node.input, asked, strict=False)) | dict(zip(node.output, given, strict=False))
    return Search(
        node.op_type,
        node,
        file,
        _around(file, node),
        file.with_graph(_with_outer_constants(decoder, graph)),
        _ports(graph.input, graph, _through(graph, roles)),
        _ports(graph.output, graph, _through(graph, roles)),
    )


def _through(graph: GraphProto, roles: Mapping[str, str]) -> dict[str, str]:
    """Roles of values, and of what is the same behind or before a Cast or Identity."""
    found = dict(roles)
    for node in graph.node:
        if node.op_type in ("Cast", "Identity"):
            for a, b in ((node.input[0], node.output[0]), (node.output[0], node.input[0])):
                if a in found:
                    found.setdefault(b, found[a])
    return found


def _ports(protos: Iterable[ValueInfoProto], graph: GraphProto, roles: Mapping[str, str]) -> tuple[Port, ...]:
    constants = {t.name for t in graph.initializer}
    return tuple(
        Port(p.name, element_type(p), declared_shape(p), roles.get(p.name, "other"))
        for p in protos
        if p.name not in constants
    )


def _around(file: ModelFile, node: NodeProto) -> ModelFile:
    """The file without its search node: what is computed for it, and from it."""
    from onnx import GraphProto, helper

    graph = GraphProto()
    graph.CopyFrom(file.proto.graph)
    graph.node.remove(node)
    graph.input.extend(helper.make_empty_tensor_value_info(o) for o in node.output if o)
    return file.with_graph(graph)


def _with_outer_constants(body: GraphProto, outer: GraphProto) -> GraphProto:
    """A body with the initializers and constants around it that it reads.

    Raises
    ------
    UnsupportedModelError
        If it reads what the nodes around it compute from inputs: such a body is no model of its own.
    """
    from onnx import GraphProto

    graph = GraphProto()
    graph.CopyFrom(body)
    own = {i.name for i in body.input} | {t.name for t in body.initializer} | {o for n in body.node for o in n.output}
    own |= {t.values.name for t in body.sparse_initializer} | {""}
    makers = {o: n for n in outer.node for o in n.output}
    tensors: dict[str, TensorProto] = {t.name: t for t in outer.initializer}
    sparse = {t.values.name: t for t in outer.sparse_initializer}
    wanted = [i for n in body.node for i in n.input] + [o.name for o in body.output]
    before: list[NodeProto] = []
    while wanted:
        name = wanted.pop()
        if name in own:
            continue
        own.add(name)
        if name in tensors:
            graph.initializer.append(tensors[name])
        elif name in sparse:
            graph.sparse_initializer.append(sparse[name])
        elif name in makers:
            if makers[name] not in before:
                before.append(makers[name])
            wanted.extend(makers[name].input)
        else:
            raise UnsupportedModelError(f"the body of the search reads {name!r}, which the file's caller feeds")
    order = [n for n in outer.node if n in before]
    for k, node in enumerate(order):
        graph.node.insert(k, node)
    return graph


# ------------------------------------------------------------------------------------------------------------- Loop
class _Values:
    """Who computes which value of a body."""

    def __init__(self, graph: GraphProto) -> None:
        self.graph = graph
        self.makers = {o: n for n in graph.node for o in n.output if o}

    def strip(self, name: str, through: Iterable[str] = ("Identity",)) -> str:
        """The value behind nodes that hand it on."""
        while name in self.makers and self.makers[name].op_type in through:
            name = self.makers[name].input[0]
        return name

    def needed(self, names: Iterable[str], stop: Iterable[str] = ()) -> tuple[set[str], set[str]]:
        """The values computed for some values, and those that they start from; both end at `stop`."""
        computed: set[str] = set()
        leaves: set[str] = set()
        waiting, halt = list(names), set(stop)
        while waiting:
            name = waiting.pop()
            if not name or name in computed or name in leaves:
                continue
            if name in halt or name not in self.makers:
                leaves.add(name)
            else:
                computed.add(name)
                waiting.extend(self.makers[name].input)
        return computed, leaves

    def nodes(self, computed: set[str]) -> list[NodeProto]:
        return [n for n in self.graph.node if computed & set(n.output)]


def _no_search(node: NodeProto, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"Loop node {node.name or node.output[0]!r}: {why}: no search around a GPT-2")


def _logits_and_pasts(
    node: NodeProto, values: _Values, kinds: Mapping[str, ValueInfoProto], carried: Sequence[str]
) -> tuple[str, dict[str, str]]:
    """The logits in a Loop's body, which its only LogSoftmax takes, and the pasts, which are gathered by beam.

    Of each past: its name as the GPT-2 takes it, and the carried value that it is taken from.
    """
    soft = [n for n in values.graph.node if n.op_type == "LogSoftmax"]
    if len(soft) != 1:
        raise _no_search(node, f"its body has {len(soft)} LogSoftmax nodes")
    logits = values.strip(soft[0].input[0], _VIEWS)
    above, _ = values.needed([logits])
    pasts: dict[str, str] = {}
    for maker in values.nodes(above):
        axis = next((a.i for a in maker.attribute if a.name == "axis"), 0)
        source = values.strip(maker.input[0]) if maker.op_type == "Gather" else ""
        if axis == 1 and source in carried and len(kinds[source].type.tensor_type.shape.dim) == 5:
            pasts[maker.output[0]] = source
    if not pasts:
        raise _no_search(node, "its body gathers no past by beam")
    return logits, pasts


def _step_around(
    node: NodeProto, nodes: Sequence[NodeProto], body: GraphProto, model: GraphProto, pasts: Sequence[ValueInfoProto]
) -> GraphProto:
    """One step of the search: some nodes of a Loop's body, which take the GPT-2's outputs and give it its pasts."""
    from onnx import GraphProto

    step = GraphProto(name="step", initializer=body.initializer)
    step.node.extend(nodes)
    step.input.extend([*body.input, *model.output])
    step.output.extend([*body.output, *pasts])
    _keep_initializers(step, {i for n in step.node for i in n.input})
    if any(np.prod(t.dims) > 4096 for t in step.initializer):
        raise _no_search(node, "what surrounds its body's GPT-2 reads weights")
    return step


def _of_loop(file: ModelFile, node: NodeProto) -> Search:
    from onnx import GraphProto, helper

    outer = file.proto.graph
    body = next((a.g for a in node.attribute if a.name == "body"), GraphProto())
    names, ends = [i.name for i in body.input], [o.name for o in body.output]
    if len(names) < 3 or len(ends) != len(names) - 1 or len(node.input) != len(names):
        raise _no_search(node, f"its body has {len(names)} inputs and {len(ends)} outputs")
    values = _Values(body)
    kinds = dict(zip(names, body.input, strict=True)) | dict(zip(ends, body.output, strict=True))
    carried, given = names[2:], ends[1:]

    # 1. Where the GPT-2 begins and ends
    logits, pasts = _logits_and_pasts(node, values, kinds, carried)
    presents = [values.strip(given[carried.index(source)]) for source in pasts.values()]

    # 2. The GPT-2 is what lies between them.
    inside, leaves = values.needed([logits, *presents], pasts)
    fed = [name for name in names if name in leaves] + [name for name in pasts if name in leaves]
    if not set(fed[: -len(pasts)]) & set(carried) or logits not in inside or not set(presents) <= inside:
        raise _no_search(node, "its body's GPT-2 has no inputs or outputs of its own")
    model = GraphProto(name="decoder", initializer=body.initializer, sparse_initializer=body.sparse_initializer)
    model.node.extend(values.nodes(inside))
    model.input.extend(_renamed(kinds[pasts.get(name, name)], name) for name in fed)
    model.output.append(helper.make_tensor_value_info(logits, 1, [None, None, None]))
    for source, present in zip(pasts.values(), presents, strict=True):
        model.output.append(_renamed(kinds[given[carried.index(source)]], present))
    _keep_initializers(model, {i for n in model.node for i in n.input})

    # 3. All the rest is the step of the search.
    computed, _ = values.needed([*ends, *pasts], [logits, *presents])
    step = _step_around(node, values.nodes(computed), body, model, [_renamed(kinds[s], p) for p, s in pasts.items()])
    above, _ = values.needed([ends[0]], [logits, *presents])
    width, eos = _width(values, values.nodes(computed), values.nodes(above))
    cut = Body(
        step=file.with_graph(_with_outer_constants(step, outer)),
        carried=tuple(carried),
        given=tuple(given),
        condition=(names[1], ends[0]),
        number=names[0],
        fed=tuple(fed),
        width=width,
        eos=eos,
    )
    around = _Values(outer)
    starts = zip(node.input[2:], carried, strict=True)
    told = {around.strip(value): f"body:{inner}" for value, inner in starts if inner in fed}
    told[around.strip(node.input[0])] = "new_tokens"
    return Search(
        "Loop",
        node,
        file,
        _around(file, node),
        file.with_graph(_with_outer_constants(model, outer)),
        _ports(outer.input, outer, told),
        _ports(outer.output, outer, _through(outer, dict.fromkeys(node.output, "sequences"))),
        cut,
    )


def _renamed(info: ValueInfoProto, name: str) -> ValueInfoProto:
    from onnx import ValueInfoProto

    made = ValueInfoProto()
    made.CopyFrom(info)
    made.name = name
    return made


def _keep_initializers(graph: GraphProto, names: set[str]) -> None:
    for held in (graph.initializer, graph.sparse_initializer):
        for tensor in list(held):
            if (tensor.name if held is graph.initializer else tensor.values.name) not in names:
                held.remove(tensor)


def _width(values: _Values, step: list[NodeProto], condition: list[NodeProto]) -> tuple[int, int | None]:
    """How many beams the last choice of a step keeps, and the token that ends one, as the body's constants say."""
    from onnx import numpy_helper

    constants = {t.name: t for t in values.graph.initializer}
    constants |= {n.output[0]: a.t for n in values.graph.node for a in n.attribute if a.name == "value" and n.output}

    def number(name: str) -> int | None:
        tensor = constants.get(values.strip(name))
        value = None if tensor is None else numpy_helper.to_array(tensor)
        return int(value.reshape(-1)[0]) if value is not None and value.size == 1 else None

    chosen = [n for n in step if n.op_type == "TopK"]
    width = number(chosen[-1].input[1]) if chosen else None
    if width is None:
        raise UnsupportedModelError("the Loop's body keeps no fixed number of beams: no search around a GPT-2")
    ends: int | None = None
    for node in condition:
        if node.op_type == "Equal":
            ends = next((n for n in map(number, node.input) if n is not None), ends)
    return width, ends
