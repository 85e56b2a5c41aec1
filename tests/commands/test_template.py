"""`gpt2np template`: each starter computes the model's outputs and every tap, as `gpt2np diff` sees it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gpt2np.cli import app
from gpt2np.parity.subject import Subject
from runtime import DATA


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    error = result.exception
    return result.exit_code, result.output + ("" if error is None or isinstance(error, SystemExit) else str(error))


@pytest.fixture(scope="module", params=["synth", "past"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 in the zoo's form, and one with logits and past inputs."""
    if request.param == "past":
        return DATA / "optimum_past.onnx"
    folder = tmp_path_factory.mktemp("synth")
    assert run("synth", "--size", "2,3,12,20,37", "-o", folder)[0] == 0
    return folder


def passes(model: Path, port: object, folder: Path, *more: object) -> None:
    """The port agrees with the model in all taps and outputs."""
    code, out = run("diff", model, port, "--json", folder / "report.json", *more)
    assert code == 0, out
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    subject = Subject(model / "model.onnx" if model.is_dir() else model)
    taps = next(check["text"] for check in report["checks"] if check["name"] == "taps")
    assert taps.startswith(f"{len(subject.taps())} taps of")
    assert {c["output"] for c in report["comparisons"]} == set(subject.output_names)
    assert not report["findings"], "a starter's arrays fit as they are"


def test_numpy(model: Path, tmp_path: Path) -> None:
    code, out = run("template", "numpy", "-m", model, "-o", tmp_path)
    assert code == 0, out
    assert f"gpt2np diff {model} {tmp_path / 'port.py'}:forward" in out
    passes(model, f"{tmp_path / 'port.py'}:forward", tmp_path, "--ids", "3,1,4,1,5")


def test_pytorch(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    assert run("template", "pytorch", "-m", model, "-o", tmp_path)[0] == 0
    passes(model, f"{tmp_path / 'port.py'}:forward", tmp_path, "--ids", "3,1,4,1,5")


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler, cc")
def test_c(model: Path, tmp_path: Path) -> None:
    assert run("template", "c", "-m", model, "-o", tmp_path)[0] == 0
    build = ["cc", "-std=c99", "-Wall", "-Wextra", "-Werror", "-O2", "-o", "port", "port.c", "-lm"]
    subprocess.run(build, cwd=tmp_path, check=True)
    subprocess.run(["./port", "3", "1", "4", "1", "5"], cwd=tmp_path, check=True)
    code, out = run("diff", model, tmp_path / "port.json")
    assert code == 0, out
    assert "taps of port" in out
    for arguments in ([], ["-1"], ["99"], ["1"] * 40):
        assert subprocess.run(["./port", *arguments], cwd=tmp_path, capture_output=True, check=False).returncode == 2
    assert run("diff", model, tmp_path / "port.json", "--ids", "3,1,4,1,5")[0] == 0
    code, out = run("diff", model, tmp_path / "port.json", "--ids", "1,2,3")  # its own ids are others
    assert code == 1
    assert "was recorded on other inputs than ids_0" in out


def test_what_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "port.py").write_text("mine", encoding="utf-8")
    assert run("template", "fortran")[0] == 1  # an InputError, which main() turns into 2
    assert "--force" in run("template", "numpy", "-o", tmp_path)[1]
    assert (tmp_path / "port.py").read_text(encoding="utf-8") == "mine"
    assert run("template", "numpy", "-o", tmp_path, "--force")[0] == 0
    assert "def forward" in (tmp_path / "port.py").read_text(encoding="utf-8")
