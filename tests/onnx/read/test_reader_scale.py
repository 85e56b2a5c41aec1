"""GPT-2 XL, 1.5 billion parameters in float32, from external data: one copy in memory, and no more."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2np.convert.synthetic import SIZES, make_config, random_weights
from gpt2np.convert.writer import write_model
from gpt2np.weights import weight_shapes

# In a process of its own: what is held at most while loading, beyond the interpreter with its imports.
LOAD = """
import json, sys
from pathlib import Path
import onnx
import gpt2np.convert.synthetic
from gpt2np.onnx.read.reader import open_model
from gpt2np.onnx.recognise import recognise

def held(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))

before = held("VmRSS")
file = open_model(sys.argv[1])
sources = recognise(file).sources
weights = {name: source.load() for name, source in sources.items()}
peak = held("VmHWM") - before
expected = gpt2np.convert.synthetic.RandomWeight("h.31.mlp.c_fc.weight", (1600, 6400), 0).load()
same = bool((weights["h.31.mlp.c_fc.weight"] == expected).all())
print(json.dumps({"bytes": sum(w.nbytes for w in weights.values()), "peak": peak, "same": same,
                  "files": len(file.files)}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts memory in /proc")
@pytest.mark.parametrize("max_file_size", [None, 1 << 30], ids=["one file", "many files"])
def test_xl_loads_in_one_copy(tmp_path: Path, max_file_size: int | None) -> None:
    free = shutil.disk_usage(tmp_path).free
    available = next(
        int(line.split()[1]) << 10
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable")
    )
    if min(free, available) < 9 << 30:
        pytest.skip(f"needs 9 GiB of memory and of disk, has {available >> 30} and {free >> 30}")
    config = make_config(*SIZES["xl"])
    parameters = sum(math.prod(shape) for shape in weight_shapes(config).values())
    assert parameters == 1_557_611_200
    folder = tmp_path / "xl"
    folder.mkdir()
    try:
        files = write_model(
            folder / "model.onnx",
            config,
            random_weights(config, 0),
            opset=18 if max_file_size else 10,
            lm_head=bool(max_file_size),
            external_data=True,
            max_file_size=max_file_size,
        )
        assert len(files) == (7 if max_file_size else 2)
        command = [sys.executable, "-c", LOAD, str(folder)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    finally:
        shutil.rmtree(folder)
    print(found | {"ratio": found["peak"] / found["bytes"]})
    assert found["bytes"] == 4 * parameters
    assert found["files"] == len(files)
    assert found["same"]
    assert found["peak"] < 1.15 * found["bytes"]
