"""One divergent operation as a model of its own: model.onnx, test_data_set_0 and a script that replays it.

The inputs are the float32 values that the operation was given, the expected output is what it gives in float64,
so ONNX Runtime, onnx's own test runner, or the port under test can be pointed at it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..call import Call
from ..files import replacing_folder
from ..onnx.read.datasets import save_set
from ..weights import Array
from .operations import OPERATIONS, split_tap, tap_inputs
from .program import Program

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
    nodes, constants, extra = OPERATIONS[split_tap(tap)[1]].graph(program, call, tap, names, output)
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
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing_folder(folder) as draft:
        (draft / "model.onnx").write_bytes(model.SerializeToString())
        save_set(draft / "test_data_set_0", feeds, {output: expected})
        (draft / "replay.py").write_text(REPLAY, encoding="utf-8")
        if seen is not None:
            np.save(draft / "seen.npy", seen)
