"""benchmarks/peers.py: gpt2np and ONNX Runtime on a tiny model; parties that are not installed are left out by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpt2np.commands.synth import synth

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "peers.py"


@pytest.mark.jit
@pytest.mark.skipif(not SCRIPT.exists(), reason="the benchmarks are in the repository alone")
def test_a_round_of_what_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("gguf")  # the files are made for all parties
    synth("1,2,16,48,50", 0, tmp_path / "model", with_past=True)
    nobody = tmp_path / "python"  # an interpreter without any packages
    nobody.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    nobody.chmod(0o755)
    command = [sys.executable, SCRIPT, "--model", tmp_path / "model", "--work", tmp_path / "work", "--bits", "32"]
    command += ["--rounds", "1", "--python", nobody]

    def run() -> tuple[dict[str, Any], str, str]:
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
        return json.loads((tmp_path / "work" / "peers.json").read_text()), done.stdout, done.stderr

    results, out, errors = run()
    assert set(results["errors"]) == {"gpt2np/32", "ONNX Runtime/32"}
    assert all(0 < error < 2e-6 for error in results["errors"].values())
    assert "OpenVINO in 32 bits is left out" in errors
    (measured,) = results["rounds"]["32"]
    assert set(measured) == {"limits", "1", "8", "32", "after 32"}  # what 48 positions have room for
    assert all(set(measured[work]) == {"gpt2np", "ONNX Runtime"} for work in ("1", "8", "32", "after 32"))
    assert "| 32 | ONNX Runtime | " in out
    again, _, _ = run()
    assert again["rounds"] == results["rounds"]  # all that was asked for is there
