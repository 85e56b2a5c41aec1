"""The table of operations: each row runs as the textbook does, its gradient and its graph agree with its run."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import gpt2np
from gpt2np.activations import ACTIVATIONS
from gpt2np.call import Call
from gpt2np.parity.operations import (
    LAYER_PARTS,
    OPERATIONS,
    split_tap,
    tap_inputs,
    tap_names,
    tap_shape,
    tap_weights,
)
from gpt2np.parity.program import Program
from tiny import random_ids, tiny_config, tiny_model, tiny_sources

ROOT = Path(__file__).parents[2]
PARTS = ["embed", *(f"h.1.{part}" for part in LAYER_PARTS), "ln_f", "logits"]
F64 = np.dtype(np.float64)


@pytest.fixture(scope="module")
def walked() -> tuple[Program, Call, dict[str, np.ndarray]]:
    config = tiny_config()
    ids = random_ids(config, 2, 7)
    past = [np.random.default_rng(i).standard_normal((2, 2, 3, 4, 4)) for i in range(config.n_layer)]
    call = Call(ids, np.broadcast_to(np.arange(4, 11), (2, 7)), past, start=4)
    program = Program.of(config, tiny_sources(config))
    return program, call, dict(program.walk(call))


def test_the_operations_are_the_textbook() -> None:
    model = tiny_model("numpy", "float64")
    ids = random_ids(model.config, 2, 7)
    program = Program.of(model.config, tiny_sources(model.config))
    walked = dict(program.walk(Call(ids, np.broadcast_to(np.arange(7), ids.shape))))
    traced = model.trace(ids)
    assert list(walked) == list(traced) == tap_names(model.config)
    for tap, value in traced.items():
        np.testing.assert_allclose(walked[tap], value, rtol=1e-12, atol=1e-14, err_msg=tap)


@pytest.mark.parametrize("tap", PARTS)
def test_a_shape_is_what_the_operation_makes(tap: str, walked: tuple[Program, Call, dict[str, np.ndarray]]) -> None:
    program, call, values = walked
    assert values[tap].shape == tap_shape(tap, program.config, call)


@pytest.mark.parametrize("tap", PARTS)
def test_a_gradient_is_the_slope_of_the_run(tap: str, walked: tuple[Program, Call, dict[str, np.ndarray]]) -> None:
    program, call, values = walked
    rng = np.random.default_rng(0)
    x = [values[name] for name in tap_inputs(tap, program.config)]
    g = rng.standard_normal(values[tap].shape)
    back = OPERATIONS[split_tap(tap)[1]].gradient(program, call, tap, g, x, values[tap])

    def slope(moved: Program, inputs: list[np.ndarray], h: float = 1e-6) -> float:
        return float((g * (moved.run(tap, call, inputs, F64) - values[tap])).sum() / h)

    for i, cotangent in enumerate(back.inputs):
        d = rng.standard_normal(x[i].shape)
        moved = [value + 1e-6 * d if j == i else value for j, value in enumerate(x)]
        np.testing.assert_allclose(slope(program, moved), (cotangent * d).sum(), rtol=1e-4, atol=1e-4)
    assert set(back.weights) == set(tap_weights(tap, program))
    for name, cotangent in back.weights.items():
        d = rng.standard_normal(cotangent.shape)
        moved_program = program.with_({name: program.weights(name, F64) + 1e-6 * d})
        np.testing.assert_allclose(slope(moved_program, x), (cotangent * d).sum(), rtol=1e-4, atol=1e-4)


def run_graph(program: Program, call: Call, tap: str, x: list[np.ndarray]) -> np.ndarray:
    import onnx
    from onnx.reference import ReferenceEvaluator

    names = [f"x{i}" for i in range(len(x))]
    piece = OPERATIONS[split_tap(tap)[1]].graph(program, call, tap, names, "y")
    given = {**dict(zip(names, x, strict=True)), **piece.feeds}
    feeds = {n: np.ascontiguousarray(v) for n, v in given.items()}  # onnx before 1.23 gathers from no other array
    info = [
        onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
        for n, v in feeds.items()
    ]
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    constants = [onnx.numpy_helper.from_array(np.ascontiguousarray(v), n) for n, v in piece.constants.items()]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(piece.nodes, "g", info, [out], constants),
        opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8,
    )  # fmt: skip
    return np.asarray(ReferenceEvaluator(model).run(None, feeds)[0])


@pytest.mark.parametrize("tap", PARTS)
def test_a_graph_computes_what_the_run_does(tap: str, walked: tuple[Program, Call, dict[str, np.ndarray]]) -> None:
    program, call, values = walked
    x = [values[name].astype(np.float32) for name in tap_inputs(tap, program.config)]
    np.testing.assert_allclose(run_graph(program, call, tap, x), values[tap], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ACTIVATIONS)
def test_every_activation_has_its_graph(form: str, walked: tuple[Program, Call, dict[str, np.ndarray]]) -> None:
    program, call, values = walked
    x = values["h.1.mlp.c_fc"].astype(np.float32)
    got = run_graph(program.with_(activation=form), call, "h.1.mlp.gelu", [x])
    np.testing.assert_allclose(got, ACTIVATIONS[form](x), rtol=1e-4, atol=1e-6)


def page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("taps_page", ROOT / "docs" / "taps.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_row_names_a_line_of_the_textbook_once() -> None:
    source = Path(gpt2np.reference.__file__).read_text(encoding="utf-8")
    for part, row in OPERATIONS.items():
        assert source.count(row.line) == 1, part


def test_the_page_of_taps_is_the_table() -> None:
    assert (ROOT / "docs" / "taps.md").read_text(encoding="utf-8") == page().page(), (
        "python docs/taps.py > docs/taps.md"
    )
