"""The benchmarks that reach into the package run: what they wrap is what a token still calls."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


def run(script, *arguments):
    done = subprocess.run([sys.executable, str(FOLDER / script), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.jit
@pytest.mark.skipif(not FOLDER.exists(), reason="the benchmarks are in the repository alone")
def test_they_measure_what_runs(tmp_path):
    drafts = run("drafts.py", "--tokens", "40", "--runs", "1").splitlines()
    passes = {line[:26].strip(): float(line[26:].split()[0]) for line in drafts[2:]}
    assert passes["text that never repeats"] == 1
    assert passes["text that repeats"] > 1

    for line in run("generate.py", "--tokens", "6", "--runs", "1").splitlines()[2:]:
        assert all(float(ms) > 0 for ms in line[30:].split()[:3])  # whole, kernels, model

    (tmp_path / "text").write_text("Once upon a time there was a little girl. " * 8)
    table = run("precision.py", str(tmp_path / "text"), "--tokens", "64", "--rounds", "1")
    assert [line.split()[0] for line in table.splitlines()[2:]] == ["float32", "bfloat16", "float16", "int8", "int4"]

    shares = run("readloop.py", "--cached", "8", "20", "--pairs", "3").splitlines()[2:]
    assert [line.split()[0] for line in shares] == ["8", "20"]
