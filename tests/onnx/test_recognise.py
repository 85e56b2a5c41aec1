"""Recognising GPT-2 in graphs: every part, whatever its spelling, and a clear answer where there is none."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from gpt2np.config import GPT2Config
from gpt2np.convert.writer import write_model
from gpt2np.errors import Gpt2npError, UnsupportedModelError, WeightError
from gpt2np.masks import MaskRule
from gpt2np.model import GPT2
from gpt2np.onnx.read.reader import open_model
from gpt2np.onnx.recognise import Recognised, recognise
from runtime import DATA, DYNAMO_23, feeds_for, runtime
from tiny import tiny_config, tiny_model, tiny_sources

Edit = Callable[[onnx.ModelProto], None]
EXPORTS = sorted(p.stem for p in DATA.glob("*.onnx"))


def read(path: Path) -> Recognised:
    return recognise(open_model(path))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> Path:
    """A zoo file with a head, as PyTorch would export it."""
    folder = tmp_path_factory.mktemp("zoo")
    config = tiny_config()
    write_model(folder / "model.onnx", config, tiny_sources(config), lm_head=True)
    return folder / "model.onnx"


@pytest.fixture(scope="module")
def modern(tmp_path_factory) -> Path:
    """LayerNormalization, attention_mask, past inputs."""
    folder = tmp_path_factory.mktemp("modern")
    config = tiny_config(mask=MaskRule(value=float(np.finfo(np.float32).min)))
    write_model(folder / "model.onnx", config, tiny_sources(config), opset=17, lm_head=True, with_past=True)
    return folder / "model.onnx"


def edited(path: Path, folder: Path, edit: Edit) -> Path:
    model = onnx.load(path)
    edit(model)
    target = folder / "edited.onnx"
    onnx.save(model, target)
    return target


def initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(t for t in model.graph.initializer if t.name == name)


def node_with(model: onnx.ModelProto, value: str) -> onnx.NodeProto:
    """The node that reads a value."""
    return next(n for n in model.graph.node if value in n.input)


def ours(found: Recognised, feeds: dict[str, np.ndarray], B: int, T: int, P: int) -> dict[str, np.ndarray]:
    """Every tap of the textbook on the same inputs."""
    model = GPT2(found.config, found.sources, "numpy")
    cache = model.new_cache(B, P + T)
    for port in found.inputs:
        if port.role == "past":
            cache.layers[port.layer][..., :P, :] = feeds[port.name]
        elif port.role in ("past_key", "past_value"):
            cache.layers[port.layer][int(port.role == "past_value"), ..., :P, :] = feeds[port.name]
    cache.advance(P)
    ids = next(feeds[p.name] for p in found.inputs if p.role == "input_ids")
    taps: dict[str, np.ndarray] = {}
    model(ids, cache, lambda name, value: taps.__setitem__(name, np.array(value)))
    return taps


def check_taps(path: Path, scratch: Path, expected_missing: set[str]) -> None:
    """The graph's values at the taps are ours; only the expected taps are missing."""
    found = read(path)
    past = any(p.role.startswith("past") for p in found.inputs)
    B, T, P = 2, 5, 3 if past else 0
    feeds = feeds_for(found, B, T, P)
    names = sorted({tap.tensor for tap in found.taps.values()})
    given = dict(zip(names, runtime(path, names, scratch).run(names, feeds), strict=True))
    taps = ours(found, feeds, B, T, P)
    for name, value in taps.items():
        if name in found.taps:
            tap = found.taps[name]
            theirs = tap.to_tap(given[tap.tensor], found.config, B)
            assert theirs.shape == value.shape, name
            scale = max(1.0, float(np.abs(value).max()))
            assert np.abs(theirs - value).max() <= 2e-6 * scale * 8, name
    missing = {name.split(".", 2)[-1] if name.startswith("h.") else name for name in set(taps) - set(found.taps)}
    assert missing == expected_missing


# ------------------------------------------------------------------------------------------ what the writer makes
SIZES: list[dict[str, Any]] = [
    {},
    {"n_head": 1, "head_size": 12, "n_layer": 1, "attn_scale": 12**-0.5},
    {"n_head": 5, "head_size": 7, "n_embd": 35, "n_inner": 11, "attn_scale": 7**-0.5},
    {"layer_norm_epsilon": 1e-3},
    {"attn_scale": 1.0, "n_layer": 3},
    {"activation": "gelu_erf"},
    {"activation": "relu"},
    {"activation": "gelu_quick"},
    {"activation": "silu"},
    {"activation": "tanh"},
    {"tied": False},
    {"overrides": (("h.1.mlp.activation", "gelu_erf"), ("h.0.ln_2.epsilon", 0.01), ("h.1.attn.scale", 0.25))},
]


@pytest.mark.parametrize("opset", [10, 13, 18])
@pytest.mark.parametrize("changes", SIZES, ids=lambda c: ",".join(c) or "plain")
def test_config_and_weights_of_written_files_come_back(tmp_path, opset, changes):
    config = tiny_config(**changes)
    sources = tiny_sources(config, seed=3)
    try:
        write_model(tmp_path / "model.onnx", config, sources, opset=opset, lm_head=True)
    except UnsupportedModelError as error:
        pytest.skip(f"the writer cannot: {error}")
    found = read(tmp_path / "model.onnx")
    for name in GPT2Config.__dataclass_fields__:
        if name not in ("overrides", "attn_scale", "mask"):
            assert getattr(found.config, name) == getattr(config, name), name
    for i in range(config.n_layer):
        assert found.config.layer_activation(i) == config.layer_activation(i)
        assert math.isclose(found.config.layer_scale(i), config.layer_scale(i), rel_tol=1e-6)
        for norm in (f"h.{i}.ln_1", f"h.{i}.ln_2", "ln_f"):
            assert math.isclose(found.config.epsilon(norm), config.epsilon(norm), rel_tol=1e-6)
    assert set(found.sources) == set(sources)
    for name, source in found.sources.items():
        assert source.load().tobytes() == sources[name].load().tobytes(), name


def test_taps_of_a_zoo_file(zoo, tmp_path):
    check_taps(zoo, tmp_path, set())


def test_taps_of_a_modern_file(modern, tmp_path):
    check_taps(modern, tmp_path, set())


# ------------------------------------------------------------------------------------------------ real exporters
MISSING_TAPS = {
    "fused_past": {
        "attn.q",
        "attn.k",
        "attn.v",
        "attn.scores",
        "attn.probs",
        "attn.out",
        "mlp.c_fc",
        "mlp.out",
        "resid_post",
    },
    "dynamo_23": {"attn.scores", "attn.probs"},
}


# of int8 ONNX Runtime rounds the activations
WITH_TAPS = [*sorted(set(EXPORTS) - {"int8", "dynamo_23"}), DYNAMO_23]


@pytest.mark.parametrize("name", WITH_TAPS)
def test_taps_of_real_exports(name, tmp_path):
    check_taps(DATA / f"{name}.onnx", tmp_path, MISSING_TAPS.get(name, set()))


@pytest.mark.parametrize("name", ["zoo_base", "zoo_lm_head", "optimum_past", "dynamo", "external_data"])
def test_taps_of_the_shared_fixtures(name, fixtures, tmp_path):
    if name == "external_data":  # the copy with more outputs must find its data
        for file in (fixtures / name).glob("model.onnx*"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
        check_taps(tmp_path / "model.onnx", tmp_path, set())
    else:
        check_taps(fixtures / name / "model.onnx", tmp_path, {"logits"} if name == "zoo_base" else set())


@pytest.mark.parametrize("name", EXPORTS)
def test_all_exports_show_the_same_sizes(name):
    config = read(DATA / f"{name}.onnx").config
    sizes = (config.n_layer, config.n_head, config.head_size, config.n_embd, config.n_inner)
    assert sizes == (2, 2, 8, 16, 64)
    assert (config.vocab_size, config.n_ctx, config.activation) == (64, 16, "gelu_tanh")
    assert config.attn_scale == 8**-0.5
    assert config.layer_norm_epsilon == 1e-5
    assert config.mask.shift == 0


def test_masks_of_real_exports():
    old = read(DATA / "old_past.onnx").config.mask
    assert (old.kind, old.value, old.blind_rows) == ("replaced", -1e4, "masked")
    assert (old.padding, old.padding_later) == ((1.0, -1e4), (0.0, -2e4))
    new = read(DATA / "optimum_past.onnx").config.mask
    assert (new.value, new.blind_rows) == (-math.inf, "zeros")


def test_quantised_weights_are_seen_through():
    found = read(DATA / "q4.onnx")
    assert found.sources["h.0.attn.c_attn.weight"].through == ("com.microsoft.MatMulNBits",)
    assert found.sources["wte.weight"].through == ("com.microsoft.GatherBlockQuantized",)
    int8 = read(DATA / "int8.onnx")
    name = "h.0.attn.c_attn.weight"
    assert int8.sources[name].through[0] == "MatMulInteger"
    original = read(DATA / "optimum_past.onnx").sources[name].load()
    step = np.ptp(original, axis=0) / 255
    assert np.abs(int8.sources[name].load() - original).max() <= 0.51 * step.max()
    assert any("rounded" in note for note in int8.notes)


def test_scales_that_nodes_compute_are_refused_by_name(tmp_path):
    model = onnx.load(DATA / "q4.onnx")
    at, node = next((i, n) for i, n in enumerate(model.graph.node) if n.op_type == "MatMulNBits")
    model.graph.node.insert(at, helper.make_node("Cast", ["doubles"], ["computed"], to=onnx.TensorProto.FLOAT))
    model.graph.node.insert(at, helper.make_node("Cast", [node.input[2]], ["doubles"], to=onnx.TensorProto.DOUBLE))
    node.input[2] = "computed"
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(UnsupportedModelError, match="its scales 'computed' are computed by nodes"):
        read(tmp_path / "model.onnx")


# ------------------------------------------------------------------------------------------------- other spellings
def rename(model: onnx.ModelProto) -> None:
    """Initializers and values lose all names that mean something."""
    names: dict[str, str] = {}
    keep = {p.name for p in (*model.graph.input, *model.graph.output)}

    def new(name: str) -> str:
        return name if not name or name in keep else names.setdefault(name, f"val_{len(names)}")

    for tensor in model.graph.initializer:
        tensor.name = new(tensor.name)
    for n in model.graph.node:
        n.name = ""
        n.input[:] = [new(i) for i in n.input]
        n.output[:] = [new(o) for o in n.output]
    del model.graph.value_info[:]


def behind_identities(model: onnx.ModelProto) -> None:
    """Every weight behind two Identity nodes and a Dropout."""
    nodes = []
    for tensor in model.graph.initializer:
        name = tensor.name
        tensor.name = f"{name}.stored"
        nodes += [
            helper.make_node("Identity", [tensor.name], [f"{name}.1"]),
            helper.make_node("Identity", [f"{name}.1"], [name]),
        ]
    old = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(nodes + old)


def as_constant_nodes(model: onnx.ModelProto) -> None:
    """Every initializer as a Constant node."""
    nodes = [helper.make_node("Constant", [], [t.name], value=t) for t in model.graph.initializer]
    old = list(model.graph.node)
    del model.graph.initializer[:]
    del model.graph.node[:]
    model.graph.node.extend(nodes + old)


def transposed(model: onnx.ModelProto) -> None:
    """Gemm with transB, MatMul behind Transpose."""
    for n in list(model.graph.node):
        tensors = [t for t in model.graph.initializer if len(n.input) > 1 and t.name == n.input[1]]
        if n.op_type not in ("Gemm", "MatMul") or not tensors:
            continue
        turned = np.ascontiguousarray(numpy_helper.to_array(tensors[0]).T)
        tensors[0].CopyFrom(numpy_helper.from_array(turned, tensors[0].name))
        if n.op_type == "Gemm":
            n.attribute.append(helper.make_attribute("transB", 1))
        else:
            at = list(model.graph.node).index(n)
            turn = helper.make_node("Transpose", [n.input[1]], [f"{n.input[1]}.T"], perm=[1, 0])
            n.input[1] = f"{n.input[1]}.T"
            model.graph.node.insert(at, turn)


def swapped_operands(model: onnx.ModelProto) -> None:
    """a + b as b + a, a * b as b * a."""
    for n in model.graph.node:
        if n.op_type in ("Add", "Mul"):
            n.input[:] = list(n.input)[::-1]


def with_dead_nodes(model: onnx.ModelProto) -> None:
    """Nodes that nothing reads."""
    first = model.graph.node[0].output[0]
    model.graph.node.append(helper.make_node("Identity", [first], ["dead"]))
    model.graph.node.append(helper.make_node("Shape", ["dead"], ["deader"]))


def gemm_as_matmul(model: onnx.ModelProto) -> None:
    """Gemm as MatMul and Add, the bias first."""
    nodes = []
    for n in model.graph.node:
        if n.op_type == "Gemm":
            nodes.append(helper.make_node("MatMul", n.input[:2], [f"{n.output[0]}.product"]))
            nodes.append(helper.make_node("Add", [n.input[2], f"{n.output[0]}.product"], n.output))
        else:
            nodes.append(n)
    new = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del model.graph.node[:]
    model.graph.node.extend(new)


SPELLINGS = [
    rename,
    behind_identities,
    as_constant_nodes,
    transposed,
    swapped_operands,
    with_dead_nodes,
    gemm_as_matmul,
]


@pytest.mark.parametrize("edit", SPELLINGS, ids=lambda e: e.__name__)
@pytest.mark.parametrize("kind", ["zoo", "modern"])
def test_other_spellings_are_the_same_model(kind, edit, request, tmp_path):
    path = request.getfixturevalue(kind)
    before, after = read(path), read(edited(path, tmp_path, edit))
    assert after.config == before.config
    for name, source in before.sources.items():
        assert after.sources[name].load().tobytes() == source.load().tobytes(), name


def permuted_columns(model: onnx.ModelProto, layer: int, order: np.ndarray) -> None:
    for part in ("weight", "bias"):
        tensor = next(t for t in model.graph.initializer if t.name.endswith(f"h.{layer}.attn.c_attn.{part}"))
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[..., order].copy(), tensor.name))


def test_another_order_of_q_k_v_is_put_right(zoo, tmp_path):
    """Columns v, q, k, taken apart as v, q, k: the same model."""
    C = tiny_config().n_embd

    def edit(model: onnx.ModelProto) -> None:
        permuted_columns(model, 1, np.r_[2 * C : 3 * C, 0:C, C : 2 * C])
        split = next(n for n in model.graph.node if n.op_type == "Split" and "h.1" in n.output[0])
        q, k, v = split.output
        split.output[:] = [v, q, k]

    before, after = read(zoo), read(edited(zoo, tmp_path, edit))
    assert after.config == before.config
    name = "h.1.attn.c_attn.weight"
    assert after.sources[name].load().tobytes() == before.sources[name].load().tobytes()
    assert "columns reordered" in after.sources[name].through
    assert any("in this order" in note for note in after.notes)


def test_a_wrong_order_of_q_k_v_is_read_as_it_stands(zoo, tmp_path):
    """q and k exchanged in the graph alone: another model, and it is run as that."""

    def edit(model: onnx.ModelProto) -> None:
        split = next(n for n in model.graph.node if n.op_type == "Split" and "h.0" in n.output[0])
        q, k, v = split.output
        split.output[:] = [k, q, v]

    path = edited(zoo, tmp_path, edit)
    check_taps(path, tmp_path, set())
    assert any("k, q, v" in note for note in read(path).notes)


# ------------------------------------------------------------------------------------ what a debugger has to load
def set_scalar(model: onnx.ModelProto, scope: str, op: str, old: float, new: float) -> None:
    """Change the constant that nodes of a scope read."""
    made = {t.name: t for t in model.graph.initializer}
    made |= {n.output[0]: n.attribute[0].t for n in model.graph.node if n.op_type == "Constant"}
    count = 0
    for n in list(model.graph.node):
        if n.op_type != op or scope not in n.output[0]:
            continue
        for k, i in enumerate(n.input):
            if (
                i in made
                and math.prod(made[i].dims) == 1
                and math.isclose(numpy_helper.to_array(made[i]).item(), old, rel_tol=1e-6)
            ):
                name = f"{n.output[0]}.changed"
                model.graph.initializer.append(numpy_helper.from_array(np.float32(new).reshape(()), name))
                n.input[k] = name
                count += 1
    assert count, (scope, op, old)


def test_single_layers_that_differ_are_overrides(zoo, tmp_path):
    def edit(model: onnx.ModelProto) -> None:
        set_scalar(model, "h.1/ln_2", "Add", 1e-5, 1e-2)
        set_scalar(model, "h.0/attn", "Div", 2.0, 4.0)

    path = edited(zoo, tmp_path, edit)
    config = read(path).config
    assert dict(config.overrides) == {"h.1.ln_2.epsilon": 0.01, "h.0.attn.scale": 0.25}
    assert len([n for n in read(path).notes if "unlike" in n]) == 2
    check_taps(path, tmp_path, set())


@pytest.mark.parametrize("shift", [1, -1])
def test_a_shifted_mask_is_read_and_run(zoo, tmp_path, shift):
    def edit(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            value = numpy_helper.to_array(tensor)
            if value.ndim == 4 and value.shape[-1] == value.shape[-2]:
                tensor.CopyFrom(numpy_helper.from_array(np.tril(np.ones_like(value), shift), tensor.name))

    path = edited(zoo, tmp_path, edit)
    assert read(path).config.mask.shift == shift
    assert any("GPT-2 sees keys up to i" in note for note in read(path).notes)
    check_taps(path, tmp_path, set())


@pytest.mark.parametrize("value", [-2.0, -50.0, 3.0])
def test_another_mask_value_is_read_and_run(zoo, tmp_path, value):
    def edit(model: onnx.ModelProto) -> None:
        for layer in range(2):
            made = {n.output[0]: n for n in model.graph.node}
            old = next(
                abs(numpy_helper.to_array(t).item())
                for t in [
                    *model.graph.initializer,
                    *(n.attribute[0].t for n in made.values() if n.op_type == "Constant"),
                ]
                if math.prod(t.dims) == 1 and abs(float(numpy_helper.to_array(t).reshape(-1)[0])) == 1e4
            )
            for op, sign in (("Mul", -1), ("Where", 1)):
                try:
                    set_scalar(model, f"h.{layer}/attn", op, -sign * old if op == "Mul" else -old, sign * value)
                except AssertionError:
                    continue

    path = edited(zoo, tmp_path, edit)
    assert read(path).config.mask.value == value
    check_taps(path, tmp_path, set())


def test_a_position_offset_is_read_and_run(zoo, tmp_path):
    def edit(model: onnx.ModelProto) -> None:
        gather = next(n for n in model.graph.node if n.op_type == "Gather" and n.input[0].endswith("wpe.weight"))
        model.graph.initializer.append(numpy_helper.from_array(np.int64(2).reshape(()), "two"))
        at = list(model.graph.node).index(gather)
        model.graph.node.insert(at, helper.make_node("Add", [gather.input[1], "two"], ["moved"]))
        node = next(n for n in model.graph.node if n.op_type == "Gather" and n.input[0].endswith("wpe.weight"))
        node.input[1] = "moved"

    path = edited(zoo, tmp_path, edit)
    assert read(path).config.position_offset == 2
    check_taps(path, tmp_path, set())


def test_a_nan_in_a_weight_loads(zoo, tmp_path):
    def edit(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name.endswith("h.0.mlp.c_fc.weight"))
        value = np.array(numpy_helper.to_array(tensor))
        value[1, 2] = np.nan
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))

    found = read(edited(zoo, tmp_path, edit))
    assert np.isnan(found.sources["h.0.mlp.c_fc.weight"].load()).sum() == 1


def epsilon_outside(model: onnx.ModelProto) -> None:
    """sqrt(variance + epsilon) as sqrt(variance) + epsilon in one layer."""
    root = next(n for n in model.graph.node if n.op_type == "Sqrt" and "h.1/ln_1" in n.output[0])
    add = next(n for n in model.graph.node if n.output[0] == root.input[0])
    variance, epsilon = add.input
    total, after = add.output[0], root.output[0]
    add.op_type, root.op_type = "Sqrt", "Add"
    add.input[:], add.output[:] = [variance], [total]
    root.input[:], root.output[:] = [total, epsilon], [after]


def test_an_epsilon_outside_the_root_is_refused_by_name_or_collected(zoo, tmp_path):
    path = edited(zoo, tmp_path, epsilon_outside)
    with pytest.raises(UnsupportedModelError, match=r"h\.1/ln_1.*epsilon"):
        read(path)
    refusals: list[UnsupportedModelError] = []
    found = recognise(open_model(path), refusals)
    assert len(refusals) == 1
    assert "h.1.ln_1" in found.taps


# ------------------------------------------------------------------------------------------------ heads and biases
def test_a_head_with_the_bytes_of_wte_is_tied_and_kept_once(zoo):
    found = read(zoo)
    assert found.config.tied
    assert "lm_head.weight" not in found.sources
    model = GPT2(found.config, found.sources, "numpy")
    assert model.weights.lm_head is model.weights.wte


def test_a_head_that_differs_in_one_bit_is_separate(zoo, tmp_path):
    def edit(model: onnx.ModelProto) -> None:
        name = next(n for n in model.graph.node if model.graph.output[0].name in n.output).input[1]
        value = np.array(numpy_helper.to_array(initializer(model, name)))
        value.view(np.uint32)[3, 5] ^= 1
        initializer(model, name).CopyFrom(numpy_helper.from_array(value, name))

    assert not read(edited(zoo, tmp_path, edit)).config.tied


def test_missing_biases_are_zeros(zoo, tmp_path):
    def edit(model: onnx.ModelProto) -> None:
        for n in model.graph.node:
            if n.op_type == "Gemm":
                gone = n.input.pop()
                model.graph.initializer.remove(initializer(model, gone))
        model.opset_import[0].version = 11  # Gemm's bias is optional since then

    path = edited(zoo, tmp_path, edit)
    source = read(path).sources["h.0.mlp.c_fc.bias"]
    assert source.origin == ()
    assert not source.load().any()


def test_a_head_bias_is_found(zoo, tmp_path):
    def edit(model: onnx.ModelProto) -> None:
        out = model.graph.output[0].name
        last = next(n for n in model.graph.node if out in n.output)
        last.output[0] = "without_bias"
        bias = np.linspace(-1, 1, tiny_config().vocab_size, dtype=np.float32)
        model.graph.initializer.append(numpy_helper.from_array(bias, "head_bias"))
        model.graph.node.append(helper.make_node("Add", ["without_bias", "head_bias"], [out]))

    path = edited(zoo, tmp_path, edit)
    assert read(path).sources["lm_head.bias"].origin == ("head_bias",)
    check_taps(path, tmp_path, set())


# ---------------------------------------------------------------------------------------------------------- errors
def add_tensor(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.ones((3, 4), np.float32), "stranger"))


def wrong_shape(model: onnx.ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if t.name.endswith("h.1.mlp.c_proj.bias"))
    tensor.CopyFrom(numpy_helper.from_array(np.ones(5, np.float32), tensor.name))


def missing(model: onnx.ModelProto) -> None:
    model.graph.initializer.remove(next(t for t in model.graph.initializer if t.name.endswith("h.1.ln_2.weight")))


def other_activation(model: onnx.ModelProto) -> None:
    next(n for n in model.graph.node if n.op_type == "Tanh" and "h.1" in n.output[0]).op_type = "Sigmoid"


def other_output(model: onnx.ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("shape", onnx.TensorProto.INT64, [3]))
    model.graph.node.append(helper.make_node("Shape", [model.graph.input[0].name], ["shape"]))


def no_residual(model: onnx.ModelProto) -> None:
    """The addition behind the second attention leaves the stream out."""
    norms = [n for n in model.graph.node if n.op_type == "ReduceMean" and "h.1/ln_2" in n.output[0]]
    stream = next(n for n in model.graph.node if norms[0].input[0] in n.output)
    at = list(model.graph.node).index(stream)
    branch = next(i for i in stream.input if "h.1" in i)
    name = stream.output[0]
    del model.graph.node[at]
    model.graph.node.insert(at, helper.make_node("Identity", [branch], [name]))


def not_a_transformer(model: onnx.ModelProto) -> None:
    out = model.graph.output[0].name
    del model.graph.node[:]
    del model.graph.output[1:]
    model.graph.node.append(helper.make_node("Cast", [model.graph.input[0].name], [out], to=1))
    del model.graph.initializer[:]


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (add_tensor, WeightError, "'stranger'.*left over"),
        (wrong_shape, UnsupportedModelError, r"h\.1[./]mlp[./]c_proj"),
        (missing, UnsupportedModelError, r"h\.1[./]ln_2"),
        (other_activation, UnsupportedModelError, r"h\.1/.*activation.*gelu_tanh"),
        (other_output, UnsupportedModelError, "'shape'"),
        (no_residual, UnsupportedModelError, "residual"),
        (not_a_transformer, UnsupportedModelError, "output1"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_what_is_no_gpt2_is_named(zoo, tmp_path, edit, error, message):
    path = edited(zoo, tmp_path, edit)
    with pytest.raises(error, match=message):
        read(path)


def test_a_size_that_only_one_length_allows_is_refused(modern, tmp_path):
    """A negated length is -1, "what is left", for one token alone; ONNX Runtime refuses -2 and all below."""
    model = onnx.load(modern)
    nodes = list(model.graph.node)
    inner = next(
        n for n in nodes if n.op_type == "Reshape" and n.input[1] not in {i.name for i in model.graph.initializer}
    )
    at = nodes.index(inner)
    negated = helper.make_node("Neg", [inner.input[1]], ["negated"])
    inner.input[1] = "negated"
    nodes.insert(at, negated)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(UnsupportedModelError, match="sizes"):
        read(tmp_path / "model.onnx")


def test_a_small_file_of_many_positions_says_how_far_it_was_read(tmp_path):
    config = tiny_config(n_ctx=6000)
    write_model(tmp_path / "model.onnx", config, tiny_sources(config), opset=17, lm_head=True, with_past=True)
    found = read(tmp_path / "model.onnx")
    assert found.config.n_ctx == 6000
    assert [note for note in found.notes if "of 6,000 positions" in note]


def test_recognising_leaves_the_file_and_its_arrays_alone(zoo):
    file = open_model(zoo)
    before = file.proto.SerializeToString()
    first, second = recognise(file), recognise(file)
    assert file.proto.SerializeToString() == before
    assert first.config == second.config
    a, b = first.sources["wte.weight"].load(), first.sources["wte.weight"].load()
    a[:] = 0
    assert b.any()


def test_sources_are_aligned_and_contiguous():
    for name in EXPORTS:
        for source in read(DATA / f"{name}.onnx").sources.values():
            array = source.load()
            assert array.dtype == np.float32
            assert array.flags.c_contiguous
            assert array.flags.writeable


def test_the_model_without_a_file_is_the_model_from_it(zoo):
    found = read(zoo)
    ids = [[1, 2, 3, 4]]
    from_file = GPT2(found.config, found.sources, "numpy")(ids).logits
    assert np.array_equal(from_file, tiny_model("numpy")(ids).logits)


def test_the_decoder_inside_a_search_node_is_found(tmp_path):
    """ONNX Runtime's tools wrap GPT-2 into one BeamSearch node."""
    model = onnx.load(DATA / "fused_past.onnx")
    node = helper.make_node(
        "BeamSearch",
        ["input_ids", "length"],
        ["sequences"],
        domain="com.microsoft",
        decoder=model.graph,
        eos_token_id=0,
    )
    ports = [
        helper.make_tensor_value_info(n, onnx.TensorProto.INT32, None) for n in ("input_ids", "length", "sequences")
    ]
    graph = helper.make_graph([node], "search", ports[:2], ports[2:])
    onnx.save(helper.make_model(graph, opset_imports=model.opset_import), tmp_path / "model.onnx")
    found, plain = read(tmp_path / "model.onnx"), read(DATA / "fused_past.onnx")
    assert found.config == plain.config
    assert (
        found.sources["h.1.mlp.c_fc.weight"].load().tobytes() == plain.sources["h.1.mlp.c_fc.weight"].load().tobytes()
    )
    assert found.search.kind == "BeamSearch"


def scrambled(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """Nodes rewired, shortened, renamed, taken out."""
    graph = model.graph
    values = [o for n in graph.node for o in n.output]
    for _ in range(int(rng.integers(1, 4))):
        node = graph.node[int(rng.integers(len(graph.node)))]
        kind = int(rng.integers(6))
        if kind == 0 and node.input:
            node.input[int(rng.integers(len(node.input)))] = values[int(rng.integers(len(values)))]
        elif kind == 1 and node.input:
            node.input.pop()
        elif kind == 2:
            node.op_type = graph.node[int(rng.integers(len(graph.node)))].op_type
        elif kind == 3 and node.attribute:
            node.attribute.pop()
        elif kind == 4:
            graph.node.remove(node)
        elif graph.initializer:
            graph.initializer.pop(int(rng.integers(len(graph.initializer))))


@pytest.mark.parametrize("name", ["fused_past", "int8", "q4", "old_past"])
def test_scrambled_graphs_give_typed_errors(name, tmp_path):
    """Never another exception, and never a hang (a circle among the nodes)."""
    refused = 0
    for seed in range(12):
        try:
            read(edited(DATA / f"{name}.onnx", tmp_path, lambda m, s=seed: scrambled(m, np.random.default_rng(s))))
        except Gpt2npError:
            refused += 1
    assert refused >= 6
