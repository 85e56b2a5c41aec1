"""Mistakes that newcomers make: each ends with one clear line and exit code 2, and nothing half written."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from typer.testing import CliRunner

from gpt2np import cli
from gpt2np.errors import InputError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 of 20 positions and 37 tokens, without tokenizer and data."""
    folder = tmp_path_factory.mktemp("misuse") / "small"
    result = CliRunner().invoke(cli.app, ["synth", "--size", "2,3,12,20,37", "-o", str(folder)])
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def here(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").symlink_to(model, target_is_directory=True)
    return tmp_path


def npz(**arrays: np.ndarray) -> None:
    np.savez("port.npz", **arrays)  # type: ignore[arg-type]


HIDDEN = np.zeros((1, 1, 3, 12), np.float32)
DIFF = ["diff", "small", "port.npz", "--ids", "1,2,3"]


def nothing() -> None:
    """Nothing is to be arranged."""


def file(name: str, text: str) -> None:
    Path(name).write_text(text, encoding="utf-8")


def port(body: str) -> None:
    file("port.py", body)


# name -> what arranges it, the command, and words of the one line that it ends with
MISUSES: dict[str, tuple[Callable[[], object], str, tuple[str, ...]]] = {
    "no such model": (nothing, "parity nowhere.onnx", ("nowhere.onnx", "no such file")),
    "a folder without a model": (lambda: Path("empty").mkdir(), "info empty", ("empty", ".onnx")),
    "a model that is no ONNX": (lambda: file("a.onnx", "hello"), "info a.onnx", ("a.onnx",)),
    "a truncated model": (
        lambda: Path("a.onnx").write_bytes(Path("small/model.onnx").read_bytes()[:3000]),
        "info a.onnx",
        ("a.onnx",),
    ),
    "no such arrays": (nothing, "diff small port.npz", ("port.npz", "No such file")),
    "arrays that are no .npz": (
        lambda: Path("port.npz").write_text("x"),
        "diff small port.npz",
        ("port.npz", "no .npz"),
    ),
    "pickled objects": (
        lambda: npz(output1=np.array([{"a": 1}], dtype=object)),
        "diff small port.npz",
        ("port.npz", "not of numbers"),
    ),
    "another compression": (
        lambda: _compressed("port.npz", zipfile.ZIP_LZMA),
        "diff small port.npz",
        ("compressed in another way",),
    ),
    "a truncated .bin": (
        lambda: (
            file("output1.bin", "12"),
            file("port.json", '{"output1": {"shape": [3]}}'),
        ),
        "diff small port.json",
        ("port.json", "2 bytes", "12"),
    ),
    "a pickle for a trace": (
        lambda: Path("port.npz").write_bytes(pickle.dumps({"output1": [1]})),
        "diff small port.npz",
        ("port.npz",),
    ),
    "no such function": (lambda: port("def step(feeds): ..."), "diff small port.py:steps", ("steps", "step")),
    "no such module": (nothing, "diff small prot:forward", ("prot",)),
    "no such file of a function": (nothing, "diff small port.py:forward", ("port.py", "no such file")),
    "a file with a mistake": (
        lambda: port("def forward(feeds:\n"),
        "diff small port.py:forward",
        ("port.py", "SyntaxError"),
    ),
    "no function at all": (lambda: port("forward = 3"), "diff small port.py:forward", ("no function", "int")),
    "an empty path": (nothing, "score small/model.onnx --results ", ("--results", "empty")),
    "an empty path behind =": (nothing, "embed x.txt --output=", ("--output", "empty")),
    "an empty path among several": (nothing, "parity small --data small --data ", ("--data", "empty")),
    "an empty path beside this folder": (nothing, "score . --results ", ("--results", "empty")),
    "an empty path beside a model in this folder": (nothing, "embed x.txt -m . --output=", ("--output", "empty")),
    "an empty argument beside this folder": (nothing, "score . ", ("files", "empty")),
    "a report over the model": (nothing, "parity small/model.onnx --json small/model.onnx", ("--json", "another")),
    "a report over the model of a folder": (nothing, "parity small --html small/model.onnx", ("--html", "another")),
    "a graph over its model": (nothing, "info small --graph ./small/model.onnx", ("--graph", "another")),
    "vectors over their texts": (lambda: file("x", "hi"), "embed x -m small -o x", ("--output", "another")),
    "two reports in one file": (nothing, "parity small --json x --junit ./x", ("--json", "another")),
    "this folder for a folder of results": (nothing, "score missing.txt --results .", ("missing.txt", "cannot read")),
    "no workers at all": (nothing, "score x.txt --workers 0", ("--workers", "1")),
    "an empty path of an argument": (nothing, "exercises ", ("folder", "empty")),
    "an empty name of a model": (nothing, "info ", ("''", "no such file")),
    "an empty address": (nothing, "score small/model.onnx --engine numpy --cluster ", ("no Dask scheduler",)),
    "a misspelt option": (nothing, "diff small small --prompts x", ("--prompts", "--prompt")),
    "a misspelt command": (nothing, "pariti", ("pariti",)),
    "a missing argument": (nothing, "diff small", ("Missing argument",)),
    "a word for a number": (nothing, "parity small --random many", ("--random", "integer")),
    "a misspelt output of a threshold": (nothing, "parity small --rtol outptu1:1e-3", ("outptu1", "output1")),
    "a misspelt preset": (nothing, "parity small --preset zoe", ("zoe", "zoo")),
    "a misspelt engine": (nothing, "parity small --engine numpi", ("numpi", "numpy")),
    "a misspelt check": (nothing, "parity small --checks cached", ("cached", "cache")),
    "a negative seed": (nothing, "parity small --seed -1", ("seed", "-1")),
    "negative ids": (nothing, "diff small small --ids 1,-2", ("-2",)),
    "ids beyond the vocabulary": (nothing, "diff small small --ids 1,99", ("99", "36")),
    "ids that are no numbers": (nothing, "diff small small --ids one", ("one", "whole numbers")),
    "too many ids": (nothing, f"trace small --ids {','.join(['1'] * 21)}", ("21", "20")),
    "an empty prompt": (nothing, "trace --prompt= -o t.npz", ("empty",)),
    "a prompt that is too long": (nothing, f"trace -o t.npz --prompt {'one_two_' * 200}", ("256",)),
    "a prompt without a tokenizer": (nothing, "diff small small --prompt hello", ("tokenizer",)),
    "another model's tokenizer": (
        nothing,
        f"generate -m small --tokenizer {ROOT / 'weights' / 'mini'} hello",
        ("tokenizer", "36"),
    ),
    "no input for a trace": (nothing, "trace small", ("--prompt", "--ids")),
    "a misspelt tap": (nothing, "trace small --ids 1 --taps h.9.*", ("h.9.*", "embed")),
    "a tap that is not there": (
        nothing,
        "diff small small --replace h.0.mlp.gleu",
        ("h.0.mlp.gleu", "h.0.mlp.gelu"),
    ),
    "a port that cannot be run on": (
        lambda: port("def forward(feeds): return 1"),
        "diff small port.py:forward --replace h.0.mlp.gelu",
        ("replace",),
    ),
    "arrays that cannot be run on": (
        lambda: np.savez("port.npz", embed=np.zeros((1, 4, 12), np.float32)),
        "diff small port.npz --replace h.0.mlp.gelu",
        ("port", "replace"),
    ),
    "no folder for the report": (nothing, "parity small --json no/such/report.json", ("report.json", "no folder")),
    "a folder for the report": (lambda: Path("out").mkdir(), "parity small --junit out", ("out", "folder")),
    "a folder that holds other things": (
        lambda: (Path("out").mkdir(), file("out/mine", "")),
        "diff small small --dump-repro out",
        ("out", "other files"),
    ),
    "a full disk": (nothing, "trace small --ids 1 -o /dev/full", ("No space left",)),
    "a full disk for JSON": (nothing, "parity small --random 1 --json /dev/full", ("No space left",)),
    "a model that is there already": (nothing, "synth --size 2,3,12 -o small", ("small",)),
    "a template that is there already": (lambda: port("mine"), "template numpy", ("port.py", "--force")),
    "a language without a template": (nothing, "template fortran", ("fortran", "numpy")),
}


def _compressed(path: str, how: int) -> None:
    np.savez(path, output1=HIDDEN)
    with zipfile.ZipFile(path) as old:
        content = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", how) as new:
        for name, data in content.items():
            new.writestr(name, data)


def ends(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str, str]:
    """Exit code, standard output and error of the command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["gpt2np", *command])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


@pytest.mark.parametrize("name", MISUSES)
def test_each_is_one_line_and_exit_code_2(
    name: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arrange, command, words = MISUSES[name]
    arrange()
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}
    code, out, err = ends(command.split(" "), capsys, monkeypatch)
    lines = [line for line in err.splitlines() if not line.startswith("Compiling")]
    assert (code, len(lines)) == (2, 1), (out, err)
    assert lines[0].startswith("gpt2np: ")
    assert all(word in lines[0] for word in words), lines[0]
    after = {path: path.stat().st_mtime_ns for path in here.rglob("*") if "__pycache__" not in path.parts}
    assert {path for path in after if path not in before} <= {here / "__pycache__"}


# A port that runs and gives something wrong is compared: exit code 1, and the verdict says what is wrong.
WRONG: dict[str, tuple[Callable[[], object], tuple[str, ...]]] = {
    "a wrong shape": (lambda: npz(output1=HIDDEN[..., :5]), ("shape (1, 1, 3, 5)", "(1, 1, 3, 12)")),
    "a wrong name": (lambda: npz(last_hiden_state=HIDDEN), ("last_hiden_state", "last_hidden_state")),
    "a wrong dtype": (lambda: npz(output1=np.array([["a", "b"]])), ("not of numbers",)),
    "complex numbers": (lambda: npz(output1=HIDDEN.astype(complex)), ("complex128", "float32")),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_array_is_named(
    name: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arrange, words = WRONG[name]
    arrange()
    code, out, err = ends(DIFF, capsys, monkeypatch)
    text = " ".join((out + err).split())
    assert code in (1, 2)
    assert all(word in text for word in words), text


@pytest.mark.parametrize("what", ["return None", "raise ValueError('oh no')", "return {'nobody': feeds['input1']}"])
def test_a_port_that_fails_is_the_ports_failure(
    what: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    port(f"def forward(feeds):\n    {what}\n")
    code, out, err = ends(["diff", "small", "port.py:forward", "--ids", "1,2,3"], capsys, monkeypatch)
    assert (code, err) == (1, "")
    said = {"return None": "returned None", "raise ValueError('oh no')": "port.py, line 2"}.get(what, "'nobody'")
    assert said in " ".join(out.split())


# ------------------------------------------------------------------------------------- surroundings


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with no environment but this."""
    own = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environment}
    words = [sys.executable, "-m", "gpt2np", *arguments]
    return subprocess.run(words, capture_output=True, text=True, check=False, env=own, errors="replace")


def test_a_locale_without_the_characters_and_a_narrow_terminal(here: Path) -> None:
    for environment in ({"LC_ALL": "C", "PYTHONUTF8": "0", "COLUMNS": "20"}, {"PYTHONIOENCODING": "latin-1"}):
        done = run("info", "small", **environment)
        assert (done.returncode, done.stderr) == (0, "")
        assert "model.onnx" in done.stdout
    done = run("info", "nowhere-é.onnx", LC_ALL="C", PYTHONUTF8="0")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
def test_ctrl_c_ends_quietly(here: Path) -> None:
    port("import pathlib, time\ndef forward(feeds):\n    pathlib.Path('at_work').touch()\n    time.sleep(600)\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "gpt2np", "diff", "small", "port.py:forward", "--ids", "1,2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    while not Path("at_work").exists():
        assert process.poll() is None, process.stderr
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert (process.returncode, err) == (130, "")


def test_a_trace_is_written_to_a_device(here: Path) -> None:
    result = CliRunner().invoke(cli.app, ["trace", "small", "--ids", "1,2", "-o", os.devnull])
    assert result.exit_code == 0, result.output


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("arguments", [["score"], ["embed", "-o", "x.npy"], ["generate", "-f"]], ids=str)
def test_a_device_that_never_ends_is_no_text(here: Path, arguments: list[str]) -> None:
    result = CliRunner().invoke(cli.app, [*arguments, "/dev/full"])
    assert isinstance(result.exception, InputError)
    assert str(result.exception) == "/dev/full is neither a file nor a pipe"
    Path("text.txt").write_text("Once upon a time", encoding="utf-8")
    result = CliRunner().invoke(cli.app, ["score", "text.txt", "--resume", "/dev/full"])
    assert str(result.exception) == "cannot keep progress in /dev/full: /dev/full is neither a file nor a pipe"
