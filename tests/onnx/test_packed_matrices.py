"""Matrices that a file stores packed or quantised: read exactly as ONNX Runtime reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from gpt2np.errors import UnsupportedModelError
from gpt2np.onnx.emulate import integers
from gpt2np.onnx.emulate.literal import Emulation
from gpt2np.onnx.evaluate.evaluator import Evaluator
from gpt2np.onnx.normalise.build import build_graph
from gpt2np.onnx.read.reader import open_model
from gpt2np.onnx.recognise.sources import constant_source
from runtime import Array, runtime, since


def weight_of(path: Path) -> Array:
    """The matrix that a file of one node multiplies by, as the node is seen through."""
    graph = build_graph(open_model(path))
    product = next(n for n in graph.nodes if n.op == "MatMul")
    return Evaluator(graph, {})(product.inputs[1])


def save_product(path: Path, K: int, op: str, constants: list[Array | None], **attributes: Any) -> Array:
    """A file that multiplies by a packed matrix, and ONNX Runtime's product of the identity with it: the matrix."""
    names = ["" if c is None else f"c{i}" for i, c in enumerate(constants)]
    graph = helper.make_graph(
        [helper.make_node(op, ["x", *names], ["y"], domain="com.microsoft", K=K, **attributes)],
        "product",
        [helper.make_tensor_value_info("x", 1, [None, K])],
        [helper.make_tensor_value_info("y", 1, None)],
        [numpy_helper.from_array(c, n) for n, c in zip(names, constants, strict=True) if c is not None],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return np.asarray(runtime(path).run(None, {"x": np.eye(K, dtype=np.float32)})[0])


@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize(
    ("bits", "zeros"),
    [
        *((4, zeros) for zeros in ("none", "packed", "float")),
        *(pytest.param(8, zeros, marks=since("1.23", "8-bit MatMulNBits")) for zeros in ("none", "packed")),
        *(pytest.param(2, zeros, marks=since("1.24", "2-bit MatMulNBits")) for zeros in ("none", "packed")),
    ],
)
@pytest.mark.parametrize("K", [32, 42, 150])
def test_packed_matrices_are_read_exactly(tmp_path, K, bits, block, zeros):
    rng = np.random.default_rng(K)
    N, blocks = 5, -(-K // block)
    packed = rng.integers(0, 256, (N, blocks, block * bits // 8), np.uint8)
    scales = rng.standard_normal((N, blocks)).astype(np.float32)
    zero: Array | None = None
    if zeros == "packed":
        zero = rng.integers(0, 256, (N, -(-blocks * bits // 8)), np.uint8)
    elif zeros == "float":
        zero = rng.uniform(0, 15, (N, blocks)).astype(np.float32)
    expected = save_product(
        tmp_path / "p.onnx", K, "MatMulNBits", [packed, scales, zero], N=N, bits=bits, block_size=block
    )
    got = weight_of(tmp_path / "p.onnx")
    if zeros == "float":  # multiplied out in another order
        np.testing.assert_allclose(got, expected, 1e-6, 1e-6)
    else:
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("kind", [0, 1], ids=["FP4", "NF4"])
@pytest.mark.parametrize(("K", "N"), [(32, 6), (42, 5)])
def test_four_bit_floats_are_read_exactly(tmp_path, K, N, kind, block):
    rng = np.random.default_rng(K)
    packed = rng.integers(0, 256, -(-K * N // 2), np.uint8)
    largest = rng.uniform(0.5, 2, -(-K * N // block)).astype(np.float32)
    expected = save_product(
        tmp_path / "p.onnx", K, "MatMulBnb4", [packed, largest], N=N, quant_type=kind, block_size=block
    )
    np.testing.assert_array_equal(weight_of(tmp_path / "p.onnx"), expected)


@pytest.mark.parametrize("scales", ["float32", "float16"])
@pytest.mark.parametrize("shape", ["tensor", "axis 0", "axis -1", "blocks of 5"])
@pytest.mark.parametrize("dtype", ["int4", "uint4", "int8", "uint8", "int16", "int32", "float8_e4m3fn", "float8_e5m2"])
def test_dequantised_matrices_are_read_exactly(tmp_path, dtype, shape, scales):
    """In the scales' own type, which is the type of the result."""
    rng = np.random.default_rng(0)
    K, N = 13, 6
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    low, high = (-8, 16) if "int4" in dtype else (-99, 100)
    values = rng.integers(max(low, 0) if "u" in dtype else low, min(high, 8 if dtype == "int4" else high), (K, N))
    sizes, how = {
        "tensor": ((), {}),
        "axis 0": ((K,), {"axis": 0}),
        "axis -1": ((N,), {"axis": -1}),
        "blocks of 5": ((3, N), {"axis": 0, "block_size": 5}),
    }[shape]
    scale = np.asarray(rng.uniform(0.01, 0.1, sizes), scales)
    inputs = [np.maximum(values, 0 if "u" in dtype else low).astype(kind), scale]
    if "float" not in dtype and dtype != "int32":
        inputs.append(np.full(sizes, 3).astype(kind))
    graph = helper.make_graph(
        [helper.make_node("DequantizeLinear", [f"c{i}" for i in range(len(inputs))], ["y"], **how)],
        "weight",
        [],
        [helper.make_tensor_value_info("y", helper.np_dtype_to_tensor_dtype(scale.dtype), None)],
        [numpy_helper.from_array(c, f"c{i}") for i, c in enumerate(inputs)],
    )
    path = tmp_path / "w.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    got = constant_source(build_graph(open_model(path)), "y").load()
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, runtime(path).run(None, {})[0].astype(np.float32))


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=since("1.23", "8-bit MatMulNBits"))])
def test_activations_of_accuracy_level_4_are_rounded_in_blocks(tmp_path, bits):
    rng = np.random.default_rng(bits)
    K, N, block = 42, 5, 16
    packed = rng.integers(0, 256, (N, 3, block * bits // 8), np.uint8)
    scales = rng.standard_normal((N, 3)).astype(np.float32)
    how = {"N": N, "bits": bits, "block_size": block, "accuracy_level": 4}
    save_product(tmp_path / "p.onnx", K, "MatMulNBits", [packed, scales], **how)
    x = np.vstack([3 * rng.standard_normal((3, K)), np.zeros((1, K))]).astype(np.float32)
    expected = runtime(tmp_path / "p.onnx").run(None, {"x": x})[0]
    got = Emulation(open_model(tmp_path / "p.onnx")).evaluator({"x": x})("y")
    np.testing.assert_allclose(got, expected, 1e-5, 1e-4 * np.abs(expected).max())
    assert np.abs(x @ weight_of(tmp_path / "p.onnx") - expected).max() > 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("op", "changes"),
    [
        ("MatMulNBits", {"K": 2**40}),
        ("MatMulNBits", {"N": 2**31}),
        ("MatMulNBits", {"block_size": 2}),
        ("MatMulNBits", {"block_size": 0}),
        ("MatMulNBits", {"bits": 3}),
        ("MatMulNBits", {"bits": -4}),
        ("MatMulBnb4", {"K": 2**40}),
        ("MatMulBnb4", {"block_size": -1}),
        ("MatMulBnb4", {"N": 7}),
    ],
    ids=str,
)
def test_packed_matrices_of_other_sizes_are_an_error_before_any_work(tmp_path, op, changes):
    packed = np.zeros((5, 2, 8) if op == "MatMulNBits" else 80, np.uint8)
    how: dict[str, Any] = {
        "K": 32,
        "N": 5,
        "block_size": 16,
        **({"bits": 4} if op == "MatMulNBits" else {"quant_type": 1}),
    }
    node = helper.make_node(op, ["x", "b", "s"], ["y"], domain="com.microsoft", **{**how, **changes})
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", 1, None)],
        [helper.make_tensor_value_info("y", 1, None)],
        [numpy_helper.from_array(packed, "b"), numpy_helper.from_array(np.ones(10, np.float32), "s")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("com.microsoft", 1)]), tmp_path / "p.onnx")
    with pytest.raises(UnsupportedModelError, match=f"{op}.*'b' holds|{op}.*'s' holds"):
        build_graph(open_model(tmp_path / "p.onnx"))


def test_blocks_of_any_size_take_no_memory():
    scale = np.ones((1, 4), np.float32)
    assert integers.spread(scale, (6, 4), 0, 2**40).shape == (6, 4)
    with pytest.raises(ValueError, match="blocks of -1"):
        integers.spread(scale, (6, 4), 0, -1)
