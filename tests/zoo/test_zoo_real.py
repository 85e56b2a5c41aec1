"""The real GPT-2, where it has been fetched: what is published about it, and parity with ONNX Runtime."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gpt2np import zoo
from gpt2np.zoo import manifest
from gpt2np.zoo.facts import load_facts
from gpt2np.zoo.verify import verify

pytestmark = [pytest.mark.zoo, pytest.mark.jit]

# Those of 124M parameters, which facts are published about, and the larger ones.
SMALL = ("gpt2-10", "gpt2-lm-head-10", "gpt2")
MODELS = (*SMALL, "gpt2-medium", "gpt2-large", "gpt2-xl")


def fetched(name: str) -> Path:
    folder = zoo.default_folder() / name
    if not (folder / manifest.MODEL).is_file():
        pytest.skip(f"needs the real file: gpt2np fetch {name}")
    return folder


@pytest.mark.parametrize("name", SMALL)
def test_it_is_gpt2_and_computes_what_is_published(name: str) -> None:
    folder = fetched(name)
    checks = list(verify(folder, load_facts(), zoo.known_files(), zoo.verified_checkpoint(folder)))
    assert [check for check in checks if check.result == "FAIL"] == []
    passed = [check.group for check in checks if check.result == "pass"]
    assert passed.count("facts") >= 15
    assert {"config", "weights", "ONNX Runtime"} <= set(passed)
    if name != "gpt2":
        assert "file" in passed


@pytest.mark.parametrize("name", MODELS)
def test_its_files_are_the_published_ones(name: str) -> None:
    folder, entry = fetched(name), manifest.entries()[name]
    states = {file.path: zoo.state(folder / file.path, file) for file in entry.files + entry.extras}
    assert "wrong" not in states.values(), states
    if entry.files[0].sha256:
        assert states[entry.files[0].path] == "verified"


@pytest.mark.parametrize("name", MODELS)
def test_parity_with_onnx_runtime(name: str) -> None:
    command = [sys.executable, "-m", "gpt2np", "parity", str(fetched(name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_larger_models_have_the_weights_of_their_checkpoints() -> None:
    checked = 0
    for name in ("gpt2-medium", "gpt2-xl"):
        folder = zoo.default_folder() / name
        checkpoint = zoo.verified_checkpoint(folder)
        if (folder / manifest.MODEL).is_file() and checkpoint is not None:
            checks = list(verify(folder, load_facts(), zoo.known_files(), checkpoint))
            assert [check for check in checks if check.result == "FAIL"] == []
            assert any(check.what == "bit by bit" and check.result == "pass" for check in checks)
            checked += 1
    if not checked:
        pytest.skip("needs a real file: gpt2np fetch gpt2-medium")
