"""Export a checkpoint as the ONNX Model Zoo's gpt2-10 was, by PyTorch's exporter, with PyTorch's own sample data.

    python export.py CHECKPOINT DATA OUT

OUT receives model.onnx (opset 10; input1 (d1, d2, T) int64; output1 the last hidden state (d1, d2, T, C); output2...
each layer's past (2, B, H, T, D)), tokenizer.json and test_data_set_0...3. Prints the loss of the exported weights:
they are rounded so that each is a bfloat16, half of each float is zero, and the file compresses to less than half.
"""

import math
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from model import GPT2
from onnx import numpy_helper
from prepare import END
from sample import continued, load
from tokenizers import Tokenizer


def evaluate(model: GPT2, data: Path, tokenizer: Tokenizer) -> None:
    """Mean loss over every held-out token, in windows of n_ctx, in float32; per token and per byte of the text."""
    for name in ("stories", "tales"):
        ids = torch.from_numpy(np.load(data / f"{name}_val.npy").astype(np.int64))
        nats = 0.0
        with torch.no_grad():
            for i in range(0, len(ids) - 1, model.config.n_ctx):
                window = ids[i : i + model.config.n_ctx + 1]
                nats += model.loss(window[None, :-1], window[None, 1:]).item() * (len(window) - 1)
        size = len((data / f"{name}_val.txt").read_text("utf-8").replace(END, "").encode())
        token, byte = nats / (len(ids) - 1), nats / size
        print(
            f"{name}: {len(ids)} tokens, {size} bytes; per token {token:.4f} nats, perplexity {math.exp(token):.3f}; "
            f"per byte {byte:.4f} nats, {byte / math.log(2):.4f} bits, perplexity {math.exp(byte):.4f}"
        )


def export(model: GPT2, path: Path) -> list[str]:
    outputs = [f"output{i + 1}" for i in range(1 + model.config.n_layer)]
    torch.onnx.export(
        model,
        (torch.zeros(1, 1, 8, dtype=torch.long),),
        str(path),
        opset_version=10,
        dynamo=False,
        input_names=["input1"],
        output_names=outputs,
        dynamic_axes={
            "input1": {0: "d1", 1: "d2", 2: "T"},
            "output1": {0: "d1", 1: "d2", 2: "T"},
            **{name: {1: "B", 3: "T"} for name in outputs[1:]},
        },
    )
    onnx.checker.check_model(str(path), full_check=True)
    return outputs


def record(model: GPT2, tokenizer: Tokenizer, out: Path, outputs: list[str]) -> None:
    def ids(text: str) -> list[int]:
        return tokenizer.encode(text).ids

    openings = ("The little cat was sad.", "There was once a king who had", "One day, Tom found a big red")
    rows = [ids(opening) for opening in openings]
    inputs = [
        [ids("The little girl had a red ball.")],
        [row[: min(map(len, rows))] for row in rows],
        [continued(model, ids("Once upon a time"), model.config.n_ctx, temperature=0.7)],
        [ids("Once")],
    ]
    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    for k, batch in enumerate(inputs):
        folder = out / f"test_data_set_{k}"
        folder.mkdir(exist_ok=True)
        x = np.array([batch], np.int64)  # (1, B, T)
        with torch.no_grad():
            expected = [y.numpy() for y in model(torch.from_numpy(x))]
        for kind, items in (("input", [("input1", x)]), ("output", list(zip(outputs, expected, strict=True)))):
            for i, (name, array) in enumerate(items):
                tensor = numpy_helper.from_array(np.ascontiguousarray(array), name)
                (folder / f"{kind}_{i}.pb").write_bytes(tensor.SerializeToString())
        worst = 0.0
        for ours, theirs in zip(session.run(outputs, {"input1": x}), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)
            worst = max(worst, float(np.abs(ours - theirs).max()))
        print(f"test_data_set_{k}: {x.shape}, ONNX Runtime against PyTorch: {worst:.2e} at most")


def main(checkpoint: Path, data: Path, out: Path) -> None:
    model, tokenizer = load(checkpoint), Tokenizer.from_file(str(data / "tokenizer.json"))
    print(f"{sum(p.numel() for p in model.parameters())} parameters")
    outputs = export(model, out / "model.onnx")
    shutil.copy(data / "tokenizer.json", out)
    record(model, tokenizer, out, outputs)
    files = [out / "model.onnx", out / "tokenizer.json", *out.glob("test_data_set_*/*.pb")]
    packed = {f: len(zlib.compress(f.read_bytes())) for f in files}
    print(f"model.onnx: {files[0].stat().st_size} bytes, {packed[files[0]]} compressed; all: {sum(packed.values())}")
    evaluate(model, data, tokenizer)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
