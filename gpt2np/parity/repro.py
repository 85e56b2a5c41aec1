"""One divergent operation as a model of its own: model.onnx, test_data_set_0 and a script that replays it.

The inputs are the float32 values that the operation was given, the expected output is what it gives in float64,
so ONNX Runtime, onnx's own test runner, or the port under test can be pointed at it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..activations import ACTIVATIONS
from ..call import Call
from ..errors import UnsupportedModelError
from ..masks import Mask, mask_for
from ..onnx.read.datasets import save_set
from ..reference import causal_mask
from ..weights import Array
from .operations import Program, split_tap, tap_inputs

OPSET = 17  # the first with LayerNormalization

REPLAY = '''"""Run this one operation in ONNX Runtime, or with --onnx in onnx's reference. Needs numpy and onnx."""
import pathlib, sys
import numpy as np, onnx
from onnx import numpy_helper

here = pathlib.Path(__file__).parent
def read(kind):
    files = sorted((here / "test_data_set_0").glob(kind + "_*.pb"), key=lambda p: int(p.stem.split("_")[1]))
    return {t.name: numpy_helper.to_array(t) for t in (onnx.load_tensor(str(f)) for f in files)}
inputs, expected = read("input"), read("output")
if "--onnx" in sys.argv:
    from onnx.reference import ReferenceEvaluator
    got = ReferenceEvaluator(str(here / "model.onnx")).run(list(expected), inputs)
else:
    import onnxruntime
    session = onnxruntime.InferenceSession(str(here / "model.onnx"), providers=["CPUExecutionProvider"])
    got = session.run(list(expected), inputs)
failed = False
for (name, want), value in zip(expected.items(), got):
    bad = np.abs(value - want) > 1e-5 + 1e-3 * np.abs(want)
    failed |= bool(bad.any())
    print(f"{name}: max abs error {np.abs(value - want).max():.3e}, {bad.sum()} of {bad.size} out of tolerance")
seen = here / "seen.npy"
if seen.exists():
    value, want = np.load(seen), next(iter(expected.values()))
    print(f"what the party under test gave: max abs error {np.abs(value - want).max():.3e}")
sys.exit(failed)
'''


def dump(folder: Path, program: Program, call: Call, tap: str, inputs: list[Array], seen: Array | None) -> None:
    """Write the operation of one tap with these inputs; `seen` is what the party under test gave for it."""
    import onnx

    names = [n.replace(".", "_") for n in tap_inputs(tap, program.config)]
    feeds = {n: np.ascontiguousarray(x, np.float32) for n, x in zip(names, inputs, strict=True)}
    expected = program.run(tap, call, list(feeds.values()), np.dtype(np.float64)).astype(np.float32)
    output = tap.replace(".", "_")
    nodes, constants, extra = _graph(program, call, tap, names, output)
    feeds |= extra
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            nodes,
            output,
            [
                onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
                for n, v in feeds.items()
            ],
            [onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, expected.shape)],
            [onnx.numpy_helper.from_array(np.ascontiguousarray(v), n) for n, v in constants.items()],
        ),
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        producer_name="gpt2np",
        doc_string=f"the operation of {tap} alone",
    )
    model.ir_version = 8
    onnx.checker.check_model(model)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    save_set(folder / "test_data_set_0", feeds, {output: expected})
    (folder / "replay.py").write_text(REPLAY, encoding="utf-8")
    if seen is not None:
        np.save(folder / "seen.npy", seen)


def _graph(
    p: Program, call: Call, tap: str, x: list[str], y: str
) -> tuple[list[Any], dict[str, Array], dict[str, Array]]:
    """Nodes, constants and further inputs of one operation."""
    from onnx.helper import make_node as node

    layer, part = split_tap(tap)
    c = p.config
    f32 = np.dtype(np.float32)
    B, T = call.input_ids.shape

    def linear(name: str, columns: slice = slice(None)) -> tuple[list[Any], dict[str, Array]]:
        w, b = p.weights(f"{name}.weight", f32)[:, columns], p.weights(f"{name}.bias", f32)[columns]
        return [node("MatMul", [x[0], "weight"], ["product"]), node("Add", ["product", "bias"], [y])], {
            "weight": w,
            "bias": b,
        }

    if part == "embed":
        nodes = [
            node("Gather", ["wte", "input_ids"], ["tokens"]), node("Gather", ["wpe", "position_ids"], ["positions"]),
            node("Add", ["tokens", "positions"], [y]),
        ]  # fmt: skip
        feeds = {"input_ids": call.input_ids, "position_ids": call.position_ids}
        if call.token_type_ids is not None:
            nodes[-1].output[0] = "sum"
            nodes += [node("Gather", ["wte", "token_type_ids"], ["types"]), node("Add", ["sum", "types"], [y])]
            feeds["token_type_ids"] = call.token_type_ids
        tables = {"wte": p.weights("wte.weight", f32).astype(f32), "wpe": p.weights("wpe.weight", f32)}
        return nodes, tables, feeds
    if part in ("ln_1", "ln_2", "ln_f"):
        w, b, eps = p.norm(tap, f32)
        return (
            [node("LayerNormalization", [x[0], "weight", "bias"], [y], axis=-1, epsilon=eps)],
            {"weight": w, "bias": b},
            {},
        )
    if part in ("attn.q", "attn.k", "attn.v"):
        width = c.n_head * c.head_size
        which = "qkv".index(part[-1])
        nodes, constants = linear(f"{tap[:-2]}.c_attn", slice(which * width, (which + 1) * width))
        nodes[-1].output[0] = "flat"
        nodes += [node("Reshape", ["flat", "shape"], ["split"]), node("Transpose", ["split"], [y], perm=[0, 2, 1, 3])]
        return nodes, {**constants, "shape": np.array([B, T, c.n_head, c.head_size])}, {}
    if part in ("attn.out", "mlp.out", "mlp.c_fc"):
        nodes, constants = linear(tap.replace(".out", ".c_proj"))
        return nodes, constants, {}
    if part in ("resid_mid", "resid_post"):
        return [node("Add", x, [y])], {}, {}
    if part == "attn.scores":
        assert layer is not None
        nodes, keys, past = _with_past(call, layer, 0, x[1])
        nodes += [
            node("Transpose", [keys], ["columns"], perm=[0, 1, 3, 2]), node("MatMul", [x[0], "columns"], ["product"]),
            node("Mul", ["product", "scale"], [y]),
        ]  # fmt: skip
        return nodes, {"scale": np.array(c.layer_scale(layer), f32)}, past
    if part == "attn.probs":
        S = call.start + T
        mask = mask_for(c.mask, call.attention_mask, B, T, S, f32) or Mask(causal_mask(np.zeros((1, 1, T, S), f32)))
        nodes = [node("Add", ["kept", "mask"], ["masked"]), node("Softmax", ["masked"], [y], axis=-1)]
        if mask.keep is not None:
            hide = node("Where", ["keep", x[0], "zero"], ["kept"])
            return [hide, *nodes], {"keep": mask.keep, "zero": np.zeros((), f32), "mask": mask.added}, {}
        nodes[0].input[0] = x[0]
        return nodes, {"mask": mask.added}, {}
    if part == "attn.heads":
        assert layer is not None
        nodes, values, past = _with_past(call, layer, 1, x[1])
        nodes += [
            node("MatMul", [x[0], values], ["mixed"]), node("Transpose", ["mixed"], ["moved"], perm=[0, 2, 1, 3]),
            node("Reshape", ["moved", "shape"], [y]),
        ]  # fmt: skip
        return nodes, {"shape": np.array([B, T, c.n_head * c.head_size])}, past
    if part == "mlp.gelu":
        assert layer is not None
        return _activation(c.layer_activation(layer), x[0], y)
    if part == "logits":
        head = p.weights(p.head, f32).astype(f32)
        return [node("MatMul", [x[0], "head"], [y])], {"head": head.T}, {}
    raise UnsupportedModelError(f"no graph for the operation of {tap}")


def _with_past(call: Call, layer: int, which: int, new: str) -> tuple[list[Any], str, dict[str, Array]]:
    from onnx.helper import make_node

    if call.past is None:
        return [], new, {}
    past = np.ascontiguousarray(call.past[layer][which], np.float32)
    return [make_node("Concat", ["past", new], ["all"], axis=2)], "all", {"past": past}


def _activation(form: str, x: str, y: str) -> tuple[list[Any], dict[str, Array], dict[str, Array]]:
    from onnx.helper import make_node as node

    nodes: list[Any] = []
    constants: dict[str, Array] = {}

    def op(op_type: str, *inputs: str | float) -> str:
        names = [i if isinstance(i, str) else f"constant_{len(constants) + n}" for n, i in enumerate(inputs)]
        constants.update({n: np.array(i, np.float32) for n, i in zip(names, inputs, strict=True) if n != i})
        nodes.append(node(op_type, names, [f"{op_type}_{len(nodes)}"]))
        return str(nodes[-1].output[0])

    ACTIVATIONS[form].onnx(op, x)
    nodes[-1].output[0] = y
    return nodes, constants, {}
