"""Files that nobody's exporter writes end in an error that names the node, in time and in bounded memory.

The cases here are of known kinds; `tests/support/hostile_campaign.py` makes others at random.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

import hostile_campaign
from gpt2np.convert.writer import write_model
from gpt2np.errors import Gpt2npError, ModelFileError, UnsupportedModelError
from gpt2np.files import allowance
from gpt2np.onnx.budget import Budget
from gpt2np.onnx.evaluate import growth
from gpt2np.onnx.evaluate.evaluator import Evaluator
from gpt2np.onnx.graph import Node
from gpt2np.onnx.guard import typed_errors
from gpt2np.onnx.normalise.build import build_graph
from gpt2np.onnx.read.reader import open_model
from gpt2np.onnx.recognise import recognise
from runtime import DATA
from tiny import tiny_config, tiny_sources

SECONDS, ROOM = 5.0, 1 << 30  # what any small file may take


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A sound file of 40 KB, which takes a past and a mask."""
    path = tmp_path_factory.mktemp("hostile") / "model.onnx"
    config = tiny_config()
    write_model(path, config, tiny_sources(config), opset=18, lm_head=True, with_past=True)
    return path.read_bytes()


def look(folder: Path, model: ModelProto) -> None:
    """Recognise a file and read its weights, within bounds."""
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    began = time.process_time()
    tracemalloc.start()
    try:
        for source in recognise(open_model(path)).sources.values():
            source.load()
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < ROOM
        assert time.process_time() - began < 4 * SECONDS  # tracing memory takes most of it


def ints(name: str, *values: int) -> TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def added(model: ModelProto, *nodes: NodeProto, tensors: tuple[TensorProto, ...] = ()) -> None:
    """Nodes whose last one's value is added to the mask of the scores: zero times it, so that it must be computed."""
    graph = model.graph
    graph.initializer.extend([*tensors, numpy_helper.from_array(np.zeros(1, np.float32), "nought")])
    softmax = next(i for i, n in enumerate(graph.node) if n.op_type == "Softmax")
    last = nodes[-1].output[0]
    more = [
        *nodes,
        helper.make_node("ReduceMax", [last], ["largest"], keepdims=0),
        helper.make_node("Cast", ["largest"], ["as float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["as float", "nought"], ["nothing"]),
        helper.make_node("Add", [graph.node[softmax].input[0], "nothing"], ["with nothing"]),
    ]
    graph.node[softmax].input[0] = "with nothing"
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*rest[:softmax], *more, *rest[softmax:]])


def doubled(op: str, times: int, **attributes: int) -> list[NodeProto]:
    names = ["start", *(f"d{i}" for i in range(times))]
    return [helper.make_node(op, [a, a], [b], **attributes) for a, b in pairwise(names)]


# What a few nodes can ask for: (nodes, tensors). Each is far beyond what 40 KB may have.
GROWING: dict[str, tuple[list[NodeProto], tuple[TensorProto, ...]]] = {
    "ConstantOfShape": ([helper.make_node("ConstantOfShape", ["n"], ["big"])], (ints("n", 100_000, 100_000),)),
    "Range": (
        [helper.make_node("Range", ["from", "to", "by"], ["big"])],
        tuple(numpy_helper.from_array(np.array(v, np.int64), n) for n, v in (("from", 0), ("to", 1 << 40), ("by", 1))),
    ),
    "Tile": ([helper.make_node("Tile", ["start", "n"], ["big"])], (ints("start", 1, 2), ints("n", 1 << 35))),
    "Expand": (
        [helper.make_node("Expand", ["start", "n"], ["wide"]), helper.make_node("Add", ["wide", "wide"], ["big"])],
        (ints("start", 1), ints("n", 1 << 20, 1 << 14)),
    ),
    "Concat": (doubled("Concat", 34, axis=0), (ints("start", 1),)),
    "broadcast": (
        [
            helper.make_node("ConstantOfShape", ["n"], ["row"]),
            helper.make_node("Reshape", ["row", "m"], ["column"]),
            helper.make_node("Add", ["row", "column"], ["big"]),
        ],
        (ints("n", 200_000), ints("m", -1, 1)),
    ),
    "MatMul": (
        [
            helper.make_node("ConstantOfShape", ["n"], ["row"]),
            helper.make_node("ConstantOfShape", ["m"], ["column"]),
            helper.make_node("MatMul", ["column", "row"], ["big"]),
        ],
        (ints("n", 1, 300_000), ints("m", 300_000, 1)),
    ),
    "Einsum": (
        [
            helper.make_node("ConstantOfShape", ["n"], ["row"]),
            helper.make_node("Einsum", ["row", "row", "row"], ["big"], equation="i,j,k->ijk"),
        ],
        (ints("n", 30_000),),
    ),
    "Gather": (
        [
            helper.make_node("ConstantOfShape", ["n"], ["table"]),
            helper.make_node("ConstantOfShape", ["m"], ["rows"], value=ints("", 0)),
            helper.make_node("Gather", ["table", "rows"], ["big"]),
        ],
        (ints("n", 1, 100_000), ints("m", 1_000_000)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", GROWING)
def test_what_nodes_make_has_a_limit(small: bytes, kind: str, tmp_path: Path) -> None:
    model = ModelProto.FromString(small)
    added(model, *GROWING[kind][0], tensors=GROWING[kind][1])
    with pytest.raises(Gpt2npError):
        look(tmp_path, model)


@pytest.mark.parametrize("kind", GROWING)
def test_and_none_of_it_is_made(small: bytes, kind: str, tmp_path: Path) -> None:
    """Looked at alone, whatever else would refuse the file before."""
    model = ModelProto.FromString(small)
    added(model, *GROWING[kind][0], tensors=GROWING[kind][1])
    onnx.save(model, tmp_path / "model.onnx")
    graph = build_graph(open_model(tmp_path / "model.onnx"))
    tracemalloc.start()
    with pytest.raises(UnsupportedModelError, match=r"node .* asks for .* bytes"):
        Evaluator(graph, {})("as float")
    assert tracemalloc.get_traced_memory()[1] < ROOM / 2
    tracemalloc.stop()


@pytest.mark.parametrize("size", [(100_000, "T"), ("B", 100_000), (3_000_000, 4), (1 << 31, 1), ((1 << 63) - 1,) * 2])
@pytest.mark.parametrize("port", [0, 1, 2, 3])
def test_declared_sizes_have_a_limit(small: bytes, size: tuple[int | str, ...], port: int, tmp_path: Path) -> None:
    """Of ids, mask, positions, and a past."""
    model = ModelProto.FromString(small)
    for dim, value in zip(model.graph.input[port].type.tensor_type.shape.dim, size, strict=False):
        dim.Clear()
        setattr(dim, "dim_value" if isinstance(value, int) else "dim_param", value)
    with suppress(Gpt2npError):
        look(tmp_path, model)


@pytest.mark.parametrize(("op", "times"), [("Add", 26), ("Add", 3000), ("Mul", 3000), ("Add a constant", 3000)])
@pytest.mark.parametrize("place", ["before a norm", "behind a map"])
def test_long_chains(small: bytes, op: str, times: int, place: str, tmp_path: Path) -> None:
    """Of x + x, x * x or x + 1 in a row."""
    model = ModelProto.FromString(small)
    nodes = list(model.graph.node)
    chain = doubled(op.split()[0], times)
    if op == "Add a constant":
        model.graph.initializer.append(numpy_helper.from_array(np.ones(1, np.float32), "one"))
        for node in chain:
            node.input[1] = "one"
    reader = next(n for n in nodes[len(nodes) // 2 :] if n.op_type == "LayerNormalization")
    if place == "behind a map":
        reader = next(n for n in nodes if n.op_type == "Add" and any("MatMul" in i for i in n.input))
    at, which = nodes.index(reader), next(k for k, i in enumerate(reader.input) if "/" in i)
    chain[0].input[:] = [reader.input[which] if i == "start" else i for i in chain[0].input]
    reader.input[which] = chain[-1].output[0]
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:at], *chain, *nodes[at:]])
    with pytest.raises(Gpt2npError):
        look(tmp_path, model)


def with_functions(small: bytes, *bodies: list[NodeProto]) -> ModelProto:
    """F0 calls F1 and so on, as its nodes say; the first node's input goes through F0."""
    model = ModelProto.FromString(small)
    opsets = [*model.opset_import, helper.make_opsetid("f", 1)]
    model.opset_import.append(opsets[-1])
    for i, nodes in enumerate(bodies):
        model.functions.append(helper.make_function("f", f"F{i}", ["x"], ["y"], nodes, opsets))
    reader = next(n for n in model.graph.node if n.op_type == "Gather")
    model.graph.node.insert(0, helper.make_node("F0", [reader.input[1]], ["called"], "call", domain="f"))
    reader.input[1] = "called"
    return model


def twice(callee: str) -> list[NodeProto]:
    return [helper.make_node(callee, ["x"], ["t"], domain="f"), helper.make_node(callee, ["t"], ["y"], domain="f")]


def test_functions(small: bytes, tmp_path: Path) -> None:
    plain = [helper.make_node("Identity", ["x"], ["y"])]
    look(tmp_path, with_functions(small, twice("F1"), twice("F2"), plain))
    with pytest.raises(UnsupportedModelError, match="calls itself"):
        look(tmp_path, with_functions(small, twice("F0")))
    with pytest.raises(UnsupportedModelError, match="calls itself"):
        look(tmp_path, with_functions(small, twice("F1"), twice("F0")))
    for depth in (21, 60):
        with pytest.raises(UnsupportedModelError, match="nodes; a file of this size gets"):
            look(tmp_path, with_functions(small, *(twice(f"F{i + 1}") for i in range(depth)), plain))
    refers = [helper.make_node("LeakyRelu", ["x"], ["y"])]
    refers[0].attribute.append(AttributeProto(name="alpha", type=AttributeProto.FLOAT, ref_attr_name="nowhere"))
    with pytest.raises(Gpt2npError):
        look(tmp_path, with_functions(small, refers))


def attribute(op: str, name: str, **fields: object) -> Callable[[ModelProto], None]:
    def change(model: ModelProto) -> None:
        node = next(n for n in model.graph.node if n.op_type == op)
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, AttributeProto(name=name, **fields)])

    return change


def opset(version: int) -> Callable[[ModelProto], None]:
    return lambda model: setattr(model.opset_import[0], "version", version)


KINDS = AttributeProto
MALFORMED: dict[str, tuple[Callable[[ModelProto], None], str]] = {
    "epsilon is text": (
        attribute("LayerNormalization", "epsilon", type=KINDS.STRING, s=b"x"),
        "its epsilon is of type",
    ),
    "perm is text": (attribute("Transpose", "perm", type=KINDS.STRING, s=b"x"), "Transpose node .*its perm is of type"),
    "no type": (attribute("Transpose", "perm", ints=[1]), "its perm is of type UNDEFINED"),
    "a function's": (attribute("Transpose", "perm", type=KINDS.INTS, ref_attr_name="p"), "stands in none"),
    "out of range": (attribute("Transpose", "perm", type=KINDS.INTS, ints=[9, 0, 1, 1 << 40]), "Transpose node"),
    "opset 2 to the 62": (opset(1 << 62), "asks for opset"),
    "opset 0": (opset(0), "asks for opset"),
    "opset -1": (opset(-1), "asks for opset"),
    "opset 999": (opset(999), "asks for opset"),
    "opset 1": (opset(1), "node"),
    "ids are text": (lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 8), "declared as STRING"),
    "ids have no type": (lambda m: m.graph.input[0].type.Clear(), "has 0 axes"),
    "no inputs": (lambda m: m.graph.ClearField("input"), "neither computed by a node nor given|ids of an input"),
    "no outputs": (lambda m: m.graph.ClearField("output"), "none of the outputs"),
    "If without anything": (lambda m: m.graph.node.add(op_type="If", output=["z"]).Clear(), "node"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_nodes(small: bytes, case: str, tmp_path: Path) -> None:
    change, message = MALFORMED[case]
    model = ModelProto.FromString(small)
    change(model)
    with pytest.raises(Gpt2npError, match=message):
        look(tmp_path, model)


def test_values_that_depend_on_each_other(tmp_path: Path) -> None:
    """In a circle that rules look into while the graph is still read; found by 3:342 of the campaign."""
    nodes = [
        helper.make_node("Add", [a, b], [c], c) for a, b, c in (("z", "one", "x"), ("x", "one", "y"), ("y", "x", "z"))
    ]
    model = helper.make_model(helper.make_graph(nodes, "g", [], [helper.make_empty_tensor_value_info("z")]))
    model.graph.initializer.append(numpy_helper.from_array(np.ones(1, np.float32), "one"))
    with pytest.raises(UnsupportedModelError, match="depends on its own output"):
        look(tmp_path, model)


def test_the_error_names_the_node_that_was_looked_at() -> None:
    def deeper(node: Node) -> None:
        raise ZeroDivisionError("division by zero")

    def outer(node: Node) -> None:
        deeper(Node("Relu", "", "inner", (), ("y",), {}))

    inner = r"Relu node 'inner' is not .*\(ZeroDivisionError: division by zero\)"
    with pytest.raises(UnsupportedModelError, match=inner), typed_errors():
        outer(Node("Add", "", "outer", (), ("x",), {}))
    with pytest.raises(UnsupportedModelError, match="here is nested too deeply"), typed_errors("here"):
        raise RecursionError
    with pytest.raises(UnsupportedModelError, match="more memory than there is"), typed_errors():
        raise MemoryError
    with pytest.raises(ModelFileError, match="^its own$"), typed_errors():
        raise ModelFileError("its own")


def test_a_budget_is_spent_once() -> None:
    budget = Budget(1000)
    budget.spend(budget.total - 10, lambda: "one")
    budget.check(10, lambda: "two")
    with pytest.raises(UnsupportedModelError, match="three asks for 11 bytes"):
        budget.spend(11, lambda: "three")
    assert budget.left == 10


@pytest.mark.parametrize("name", sorted(p.stem for p in DATA.glob("*.onnx")))
def test_no_node_makes_more_than_was_foreseen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound holds for each node that recognising evaluates; and a sound file needs a small part of its budget."""
    foreseen: list[int] = []
    honest = growth.most_bytes

    def noted(node: Node, inputs: list[object]) -> int:
        foreseen.append(honest(node, inputs))
        return foreseen[-1]

    def spend(self: Budget, nbytes: int, what: str) -> None:
        assert nbytes <= max(foreseen[-1], 8), what
        self.left -= nbytes

    monkeypatch.setattr("gpt2np.onnx.evaluate.evaluator.most_bytes", noted)
    monkeypatch.setattr(Budget, "spend", spend)
    budgets: list[Budget] = []
    monkeypatch.setattr("gpt2np.onnx.normalise.build.Budget", lambda n: budgets.append(Budget(n)) or budgets[-1])
    recognise(open_model(DATA / f"{name}.onnx"))
    assert foreseen
    assert all(b.total - b.left < 0.1 * b.total for b in budgets)


def test_a_short_campaign_of_structural_mutants(tmp_path: Path) -> None:
    files = hostile_campaign.bases(tmp_path)
    found = list(hostile_campaign.run(files, 2026, range(40)))
    assert len(found) == 40
    assert not [f for f in found if f[2].word.isupper()]
    assert {"loaded", "refused"} <= {verdict.word for _, _, verdict in found}
    assert max(verdict.peak for _, _, verdict in found) < allowance(1 << 20)


def test_the_campaign_notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of Python's own, a process that dies, and memory out of proportion."""
    files = {"any": b"x"}
    monkeypatch.setattr(hostile_campaign, "make", lambda *_: ("", b"x"))
    monkeypatch.setattr(hostile_campaign, "allowance", lambda nbytes: 1 << 22)

    def untyped(path: Path) -> None:
        raise KeyError("k")

    def hungry(path: Path) -> None:
        np.ones(1 << 24).sum()  # so much that what the system takes from the process meanwhile does not hide it

    for look_at, word in ((untyped, "UNTYPED"), (hungry, "LARGE"), (lambda path: hostile_campaign.os._exit(9), "DIED")):
        monkeypatch.setattr(hostile_campaign, "look", look_at)
        assert [v.word for _, _, v in hostile_campaign.run(files, 0, range(2))] == [word] * 2


def test_a_small_file_with_many_positions_is_read_whole(tmp_path: Path) -> None:
    """A wrong bit far behind is found, in 0.2 MB that tell of 4,096 positions."""
    config = tiny_config(n_ctx=4096, n_layer=1)
    write_model(tmp_path / "sound.onnx", config, tiny_sources(config), opset=18, lm_head=True)
    assert not recognise(open_model(tmp_path / "sound.onnx")).notes
    model = onnx.load(tmp_path / "sound.onnx")
    compare = next(n for n in model.graph.node if n.op_type == "LessOrEqual")
    at = list(model.graph.node).index(compare)
    keys = compare.input[0]
    far = numpy_helper.from_array(np.int64(3000), "far")
    model.graph.initializer.append(far)
    model.graph.node.insert(at, helper.make_node("Equal", [keys, "far"], ["is far"]))
    model.graph.node.insert(at + 1, helper.make_node("Not", ["is far"], ["is near"]))
    compare.output[0], made = "compared", compare.output[0]
    compare = next(n for n in model.graph.node if n.output[0] == "compared")
    model.graph.node.insert(at + 3, helper.make_node("And", ["compared", "is near"], [made]))
    onnx.save(model, tmp_path / "wrong.onnx")
    with pytest.raises(UnsupportedModelError, match="query 3000"):
        recognise(open_model(tmp_path / "wrong.onnx"))
