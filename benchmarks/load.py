"""How long loading takes, and how much memory at most: gpt2np beside ONNX Runtime and onnx.

    python benchmarks/load.py MODEL [--rounds 5] [--ways reader,numba,...]

Every measurement is a fresh process, the ways take turns, and imports are not counted: neither their time nor
their memory. "peak" is the most memory that was held while loading, in bytes of the model's weights.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt2np.commands._terminal import print_table

WAYS = {
    "reader": "gpt2np.onnx.read.reader: open, read every initializer",
    "recognise": "gpt2np.onnx: open, recognise, read every weight",
    "numpy": 'gpt2np.load(engine="numpy")',
    "numba": 'gpt2np.load(engine="numba"): packed for the kernels',
    "onnxruntime": "onnxruntime.InferenceSession",
    "onnx": "onnx.load",
}


def loader(way: str, path: str) -> Callable[[], Any]:
    """Import what a way needs, and return what is to be measured."""
    if way in ("reader", "recognise"):
        from gpt2np.onnx.read.reader import open_model
        from gpt2np.onnx.recognise import recognise
        from gpt2np.paths import embedded_model_path

        recognise(open_model(embedded_model_path()))  # imports
        if way == "reader":
            return lambda: [tensor.load() for tensor in open_model(path).tensors.values()]
        return lambda: [source.load() for source in recognise(open_model(path)).sources.values()]
    if way in ("numpy", "numba"):
        import onnx

        import gpt2np
        import gpt2np.onnx.recognise

        gpt2np.load(engine=way)  # the embedded model: imports and compiles
        return lambda: gpt2np.load(path, engine=way).weights if way == "numpy" else gpt2np.load(path, engine=way)
    if way == "onnxruntime":
        import onnxruntime

        return lambda: onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    import onnx

    return lambda: onnx.load(path)


def status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    text = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in text.splitlines() if line.startswith(key))


def measure(way: str, path: str) -> None:
    load = loader(way, path)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    began = time.perf_counter()
    kept = load()
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "bytes": status("VmHWM") - before}))
    del kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    path = arguments.model / "model.onnx" if arguments.model.is_dir() else arguments.model
    if arguments.measure:
        measure(arguments.measure, str(path))
        return

    from gpt2np.onnx.read.reader import open_model
    from gpt2np.onnx.recognise import recognise
    from gpt2np.weights import weight_shapes

    file = open_model(path)
    shapes = weight_shapes(recognise(file).config).values()
    weights = sum(4 * math.prod(shape) for shape in shapes)
    ways = arguments.ways.split(",")
    results: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(arguments.rounds + 1):  # the first round warms the page cache, and is dropped
        for way in ways:
            command = [sys.executable, __file__, str(path), "--measure", way]
            results[way].append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    print(f"{path}: {file.nbytes / 1e6:,.0f} MB, weights {weights / 1e6:,.0f} MB as float32")
    seconds = {way: statistics.median(r["seconds"] for r in results[way][1:]) for way in ways}
    rows = [
        (
            WAYS[way],
            f"{seconds[way]:.2f}",
            f"{seconds[way] / seconds['onnxruntime']:.2f}" if "onnxruntime" in ways else "",
            f"{max(r['bytes'] for r in results[way][1:]) / weights:.2f}",
        )
        for way in ways
    ]
    print_table(("way", ">seconds", ">of ONNX Runtime's", ">peak / weights"), rows)


if __name__ == "__main__":
    main()
