"""Files that round: their weights exactly, and ONNX Runtime's rounding imitated to the last bit."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.transformers.float16 import convert_float_to_float16
from test_session import merged_decoder

from gpt2np.convert.writer import write_model
from gpt2np.onnx.emulate import integers, mlas
from gpt2np.onnx.emulate.literal import Emulation, Literally
from gpt2np.onnx.read.reader import open_model
from gpt2np.parity.capture import Options
from gpt2np.parity.parties import Captured, Ours
from gpt2np.parity.report import Report
from gpt2np.parity.rounding import saturates
from gpt2np.parity.run import parity
from gpt2np.parity.text import lines_of
from gpt2np.session import InferenceSession
from runtime import DATA, HALF, Array, assert_close, feeds_for, runtime, since
from tiny import tiny_config, tiny_sources

x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="these are the formulas for x86")


def outside(got: list[Array], expected: list[Array]) -> float:
    """Share of the elements outside the zoo's tolerance."""
    wrong = [np.abs(a.astype(np.float64) - b) > 1e-5 + 1e-3 * np.abs(b) for a, b in zip(got, expected, strict=True)]
    return float(np.concatenate([w.ravel() for w in wrong]).mean())


def written(folder: Path, opset: int, **changes: Any) -> Path:
    """A tiny float32 file: the zoo's graph, or a modern one with past inputs."""
    path = folder / "float32.onnx"
    config = tiny_config(**changes)
    modern = opset >= 17
    write_model(path, config, tiny_sources(config), opset=opset, lm_head=True, with_past=modern)
    return path


def three_runs(path: Path, way: Literally = True) -> tuple[list[Array], list[Array], list[Array]]:
    """With exact weights, with the rounding imitated, and by ONNX Runtime without optimisations."""
    exact = InferenceSession(path, engine="numpy")
    imitated = InferenceSession(path, engine="numpy", emulate_rounding=way)
    feeds = feeds_for(exact.model.recognised, 2, 6, 3 if exact.get_inputs()[-1].name.startswith("past") else 0)
    return exact.run(None, feeds), imitated.run(None, feeds), runtime(path).run(None, feeds)


def of_this_cpu() -> Literally:
    """How products of uint8 with int8 that do not keep to 7 bits round on this machine."""
    return "saturating" if saturates() else True


def half_runs(path: Path) -> tuple[float, float]:
    """Shares outside of ONNX Runtime's outputs: with the rounding imitated, with exact weights.

    Softmax adds 8 or 16 numbers at once, according to the CPU's registers; both are tried.
    """
    runs = [three_runs(path, way) for way in (True, "saturating")]
    return min(outside(imitated, expected) for _, imitated, expected in runs), outside(runs[0][0], runs[0][2])


# ----------------------------------------------------------------------------------------------- ONNX Runtime's bits
def one_node(op: str, x: Array, *constants: Array, opset: int = 13, computed: bool = False, **attributes: Any) -> Array:
    """ONNX Runtime's result, on one thread; computed: the constants are inputs, so that nothing is prepared."""
    names = [f"c{i}" for i in range(len(constants))]
    given = dict(zip(names, constants, strict=True))
    feeds = {"x": x, **(given if computed else {})}
    graph = helper.make_graph(
        [helper.make_node(op, ["x", *names], ["y"], **attributes)],
        op,
        [helper.make_tensor_value_info(n, 1, v.shape) for n, v in feeds.items()],
        [helper.make_tensor_value_info("y", 1, None)],
        [numpy_helper.from_array(c, n) for n, c in given.items() if n not in feeds],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])


def spread_out(*shape: int) -> Array:
    return (3 * np.random.default_rng(1).standard_normal(shape)).astype(np.float32)


@x86
def test_tanh_and_powers_have_onnx_runtimes_bits():
    x = np.concatenate([spread_out(5000), np.float32([0, -0.0, 9, -9, 50, -50, np.inf, -np.inf, np.nan, 1e-30])])
    np.testing.assert_array_equal(mlas.tanh(x), one_node("Tanh", x))
    for exponent in (np.float32(2), np.float32(3)):
        np.testing.assert_array_equal(mlas.power(x, np.asarray(exponent)), one_node("Pow", x, np.asarray(exponent)))


@pytest.mark.parametrize("constant", [True, False], ids=["packed", "computed"])
@pytest.mark.parametrize("K", [1, 3, 7, 64, 130, 600])
@pytest.mark.parametrize("N", [5, 16, 64, 200, 700])
@pytest.mark.parametrize("M", [1, 3, 17])
def test_products_have_onnx_runtimes_bits(M, N, K, constant):
    x, matrix, bias = spread_out(M, K), spread_out(K, N), spread_out(N)
    expected = one_node("MatMul", x, matrix, computed=not constant)
    np.testing.assert_array_equal(mlas.matmul(x, matrix, constant), expected)
    expected = one_node("Gemm", x, matrix, bias, computed=not constant)
    np.testing.assert_array_equal(mlas.gemm(x, matrix, bias, constant), expected)


@x86
@pytest.mark.parametrize("size", [1, 3, 4, 7, 8, 12, 15, 16, 17, 48, 64, 100])
def test_sums_have_onnx_runtimes_order(size):
    x = spread_out(100, size)
    assert_one_of([one_node("Softmax", x)], [mlas.softmax(x, lanes) for lanes in (8, 16)])
    if size % 4 == 0:  # else each row begins at another alignment
        np.testing.assert_array_equal(mlas.mean(x), one_node("ReduceMean", x, axes=[-1]))
    np.testing.assert_allclose(mlas.mean(x), x.mean(-1, keepdims=True), 1e-5, 1e-6)


def assert_one_of(expected: list[Array], found: list[Array]) -> None:
    assert any(np.array_equal(e, f) for e in expected for f in found)


@pytest.mark.parametrize("terms", [1, 2, 5, 8])
def test_pairs_of_products_saturate(terms):
    rng = np.random.default_rng(terms)
    a, b = rng.integers(0, 256, (2, 3, terms), np.uint8), rng.integers(-128, 128, (terms, 4), np.int8)
    a_zero, b_zero = np.uint8(100), np.int8([3, -2, 0, 1])
    expected = np.zeros((2, 3, 4))
    for index in np.ndindex(expected.shape):
        x, y = a[index[0], index[1]].astype(int), b[:, index[2]].astype(int)
        z = int(b_zero[index[2]])
        sums = [int(x[k : k + 2] @ y[k : k + 2]) for k in range(0, terms, 2)]
        corrected = sum(max(-(2**15), min(2**15 - 1, s)) for s in sums)
        expected[index] = corrected - 100 * y.sum() - z * x.sum() + terms * 100 * z
    given = a, b, np.asarray(a_zero), b_zero
    np.testing.assert_array_equal(integers.saturating_product(*given), expected)
    small = a >> 2, b, np.asarray(a_zero), b_zero
    np.testing.assert_array_equal(integers.saturating_product(*small), integers.integer_product(*small))


# ------------------------------------------------------------------------------------------------- float16 files
@pytest.mark.parametrize("keep", [True, False], ids=["float32 inputs and outputs", "float16 inputs and outputs"])
@pytest.mark.parametrize("blocked", [[], ["LayerNormalization", "Softmax"], ["Tanh", "MatMul"]], ids=str)
@pytest.mark.parametrize("opset", [10, 18])
def test_float16_files_round_as_onnx_runtime_does(tmp_path, opset, blocked, keep):
    model = onnx.load(written(tmp_path, opset))
    half = convert_float_to_float16(model, keep_io_types=keep, op_block_list=blocked)
    onnx.save(half, tmp_path / "half.onnx")
    imitated, exact = half_runs(tmp_path / "half.onnx")
    # versions of ONNX Runtime add up LayerNormalization's sums in other orders: a last bit may round to the other side
    assert imitated < 0.01 if opset == 18 and "LayerNormalization" in blocked else imitated == 0
    assert exact > 0.05


DYNAMO_23 = pytest.param("dynamo_23", marks=since("1.25", "Attention that rounds each step"))
FUSED_PAST = pytest.param("fused_past", marks=since("1.22", "SkipLayerNormalization of float16 with a bias"))


@pytest.mark.parametrize(
    "name", ["dynamo_20", DYNAMO_23, FUSED_PAST, "old_past", pytest.param("optimum_past", marks=HALF)]
)
def test_float16_versions_of_real_exports_round_as_onnx_runtime_does(tmp_path, name):
    """Among them the fused operators, which round once for all that they do, and Attention, which rounds each step."""
    path = tmp_path / "half.onnx"
    onnx.save(convert_float_to_float16(onnx.load(DATA / f"{name}.onnx")), path)
    imitated, exact = half_runs(path)
    assert imitated == 0
    assert exact > 0.05


@pytest.mark.parametrize("opset", [10, 18])
def test_float16_weights_are_read_exactly(tmp_path, opset):
    original = open_weights(path := written(tmp_path, opset))
    onnx.save(convert_float_to_float16(onnx.load(path)), path)
    for name, weight in open_weights(path).items():
        np.testing.assert_array_equal(weight, original[name].astype(np.float16).astype(np.float32), name)


def open_weights(path: Path) -> dict[str, Array]:
    sources = InferenceSession(path, engine="numpy").model.recognised.sources
    return {name: source.load() for name, source in sources.items()}


# ------------------------------------------------------------------------------------------------- int8 files
class Samples(CalibrationDataReader):
    """Random inputs for calibration."""

    def __init__(self, path: Path) -> None:
        found = InferenceSession(path, engine="numpy").model.recognised
        past = 3 * any(p.role.startswith("past") for p in found.inputs)
        self.feeds: Iterator[dict[str, Array]] = iter([feeds_for(found, 2, 6, past, seed=s) for s in range(3)])

    def get_next(self) -> dict[str, Array] | None:
        return next(self.feeds, None)


@pytest.mark.parametrize("opset", [10, 11, 18])
@pytest.mark.parametrize("weights", [QuantType.QInt8, QuantType.QUInt8], ids=str)
@pytest.mark.parametrize("per_channel", [False, True], ids=["per tensor", "per channel"])
def test_dynamic_quantisation(tmp_path, opset, weights, per_channel):
    path = tmp_path / "int8.onnx"
    quantize_dynamic(written(tmp_path, opset), path, weight_type=weights, per_channel=per_channel, reduce_range=True)
    exact, imitated, expected = three_runs(path)
    assert outside(imitated, expected) == 0
    assert outside(exact, expected) > 0.5
    saturating = three_runs(path, "saturating")[1]
    assert outside(saturating, expected) == 0  # that is what reduce_range is for


def test_dynamic_quantisation_of_fused_operators(tmp_path):
    path = tmp_path / "int8.onnx"
    quantize_dynamic(DATA / "fused_past.onnx", path, extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT})
    assert "QAttention" in {node.op_type for node in onnx.load(path).graph.node}
    exact, imitated, expected = three_runs(path, of_this_cpu())
    assert outside(imitated, expected) == 0
    assert outside(exact, expected) > 0.5


@pytest.mark.parametrize(
    ("form", "activations", "weights", "per_channel"),
    [
        (QuantFormat.QDQ, QuantType.QInt8, QuantType.QInt8, True),
        (QuantFormat.QDQ, QuantType.QUInt8, QuantType.QUInt8, False),
        (QuantFormat.QDQ, QuantType.QInt16, QuantType.QInt8, False),
        pytest.param(
            QuantFormat.QDQ, QuantType.QUInt8, QuantType.QInt4, True, marks=since("1.24", "a quantiser of int4 weights")
        ),
        (QuantFormat.QOperator, QuantType.QUInt8, QuantType.QInt8, False),
        (QuantFormat.QOperator, QuantType.QUInt8, QuantType.QUInt8, True),
    ],
    ids=str,
)
def test_static_quantisation(tmp_path, form, activations, weights, per_channel):
    source, path = written(tmp_path, 13), tmp_path / "static.onnx"
    quantize_static(
        source,
        path,
        Samples(source),
        quant_format=form,
        activation_type=activations,
        weight_type=weights,
        per_channel=per_channel,
    )
    exact, imitated, expected = three_runs(path, of_this_cpu())
    assert outside(imitated, expected) == 0
    assert outside(exact, expected) > 0.5


def test_infinite_scales_round_as_onnx_runtime_does():
    """Calibration of a masked score finds an infinite range."""
    x = np.float32([[-np.inf, -1, 0, 2, np.inf, 5, 6, 7]])
    scale, zero = np.float32(np.inf), np.int8(0)
    node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])
    graph = helper.make_graph(
        [node],
        "q",
        [helper.make_tensor_value_info("x", 1, x.shape)],
        [helper.make_tensor_value_info("q", 3, None)],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in (("s", scale), ("z", zero))],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    with np.errstate(all="ignore"):
        got = integers.quantize(x, np.asarray(scale), np.asarray(zero))
    np.testing.assert_array_equal(got, session.run(None, {"x": x})[0])


# --------------------------------------------------------------------------------------------- what parity makes of it
def dequantised(folder: Path, opset: int = 21) -> Path:
    """A float file whose matrices are stored as int8, behind DequantizeLinear."""
    path = written(folder, opset)
    model = onnx.load(path)
    products = {node.input[1] for node in model.graph.node if node.op_type == "MatMul"}
    made = []
    for tensor in list(model.graph.initializer):
        if tensor.name not in products:
            continue
        matrix = numpy_helper.to_array(tensor)
        scale = np.abs(matrix).max(0) / np.float32(127)
        model.graph.initializer.remove(tensor)
        model.graph.initializer.append(
            numpy_helper.from_array(np.rint(matrix / scale).astype(np.int8), tensor.name + "q")
        )
        model.graph.initializer.append(numpy_helper.from_array(scale, tensor.name + "s"))
        made.append(helper.make_node("DequantizeLinear", [tensor.name + "q", tensor.name + "s"], [tensor.name], axis=1))
    nodes = [*made, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, path)
    return path


def rounding_of(path: Path) -> tuple[Report, dict[str, Any]]:
    report = parity(Options(path, random=2, engine="numpy"))
    return report, report.details["rounding"]["logits"]


def test_parity_tells_rounding_from_error():
    report, found = rounding_of(DATA / "int8.onnx")
    assert report.exit_code == 0
    assert found["changes"] > 1e-3
    assert found["left"]["ort"] < 1e-5
    assert found["left"]["ort-off"] < 1e-5


def test_parity_tells_what_onnx_runtimes_optimisations_round(tmp_path):
    report, found = rounding_of(dequantised(tmp_path))
    assert report.exit_code == 0
    assert found["changes"] > 1e-3
    assert found["left"]["ort"] < 1e-4
    assert found["left"]["ort-off"] < 1e-5
    assert any("by ONNX Runtime's optimisations" in table.title for table in report.tables)


def test_a_wide_rounding_hides_no_error_of_ours(monkeypatch):
    """Ours is also compared with the file's nodes run without rounding, under the plain budget."""
    right = Ours.run

    def wrong(*arguments: Any) -> Captured:
        found = right(*arguments)
        return Captured({name: value * np.float32(1.005) for name, value in found.outputs.items()}, found.taps)

    monkeypatch.setattr(Ours, "run", wrong)
    report, _ = rounding_of(DATA / "int8.onnx")
    failed = {(c.actual, c.expected) for c in report.comparisons if not c.ok}
    assert failed == {("ours", "unrounded")}
    assert report.exit_code == 1


def test_merged_decoders_that_round(tmp_path):
    onnx.save(merged_decoder(DATA / "int8.onnx"), tmp_path / "model.onnx")
    for P in (0, 4):
        session = InferenceSession(tmp_path, engine="numpy", emulate_rounding=True)
        feeds = feeds_for(session.model.recognised, 2, 3, P)
        assert outside(session.run(None, feeds), runtime(tmp_path / "model.onnx").run(None, feeds)) == 0
    report, found = rounding_of(tmp_path / "model.onnx")
    assert report.exit_code == 0
    assert found["left"]["ort"] < 1e-5


def test_parity_of_a_float_file_measures_no_rounding():
    report = parity(Options(DATA / "optimum_past.onnx", random=1, engine="numpy"))
    assert "rounding" not in report.details
    assert report.exit_code == 0


def test_parity_finds_the_kind_of_cpu_that_recorded(fixtures):
    report = parity(Options(fixtures / "int8_dynamic" / "model.onnx"))
    assert report.details["rounding"]["logits"]["left"]["recorded"] < 1e-5
    text = " ".join(line for line, _ in lines_of(report))
    assert re.search(r"recorded[a-z, -]*: imitated as on a CPU without VNNI", text)
    assert f"products by ONNX Runtime on this CPU: {'saturate' if saturates() else 'exact'}" in text


def test_parity_imitates_this_cpu_alone_where_nothing_was_recorded_on_another(fixtures):
    report = parity(Options(fixtures / "int8_dynamic" / "model.onnx", random=1))
    assert report.details["rounding"]["logits"]["left"]["ort"] < 1e-5


# ------------------------------------------------------------------------------------------------- recorded outputs
@pytest.mark.parametrize(("name", "how"), [("fp16", True), ("fp16", "saturating"), ("int8_dynamic", "saturating")])
def test_recorded_outputs_of_files_that_round(name, how, fixtures):
    """int8_dynamic was recorded on a CPU without VNNI."""
    session = InferenceSession(fixtures / name, engine="numpy", emulate_rounding=how)
    for folder in sorted((fixtures / name).glob("test_data_set_*")):
        feeds, expected = (
            {(t := onnx.load_tensor(p)).name: numpy_helper.to_array(t) for p in folder.glob(f"{kind}_*.pb")}
            for kind in ("input", "output")
        )
        for output, got in zip(expected, session.run(list(expected), feeds), strict=True):
            assert_close(got, expected[output], f"{folder.name} {output}")


def test_float16_is_kept_between_nodes_that_take_it(tmp_path):
    """What has no float16 kernel runs in float32, and so does what stands alone among such."""
    path = written(tmp_path, 18)
    onnx.save(convert_float_to_float16(onnx.load(path)), path)
    emulation = Emulation(open_model(path))
    kinds = {node.op for node in emulation.graph.nodes if id(node) in emulation.nodes}
    assert {"Split", "Reshape", "Transpose"} <= kinds
    assert not kinds & {"MatMul", "Gemm", "Add", "Tanh", "Softmax", "Div", "Where"}
