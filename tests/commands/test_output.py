"""What commands write for machines: JSON by the schema in the package, JUnit, Markdown, GitHub's annotations."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest
from conftest import ROOT
from typer.testing import CliRunner

import gpt2np
from gpt2np import github
from gpt2np.cli import app
from gpt2np.commands import _terminal
from records import SCHEMA, validate
from runtime import DATA

PORT = '''"""A port with the wrong GELU."""
import math
import numpy as np
import gpt2np
from gpt2np import activations, reference

model = gpt2np.load(MODEL, engine="numpy")


def forward(feeds, replace=None):
    taps = {}
    blocks = tuple(h._replace(mlp=h.mlp._replace(activation="relu")) for h in model.weights.h)
    weights = model.weights._replace(h=blocks)
    ids = feeds["input1"].reshape(-1, feeds["input1"].shape[-1])
    caches = [np.empty((2, len(ids), model.config.n_head, ids.shape[1], model.config.head_size), np.float32)
              for _ in weights.h]
    positions = np.arange(ids.shape[1])[None].repeat(len(ids), axis=0)
    hidden = reference.transformer(ids, positions, weights, caches, tap=taps.__setitem__)
    return {"last_hidden_state": hidden.reshape(*feeds["input1"].shape, -1), **taps}
'''


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    return result.exit_code, result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 in small/ and a wrong port of it, port.py, whose function is in line 10."""
    place = tmp_path_factory.mktemp("output")
    assert run("synth", "--size", "2,3,12,20,37", "-o", place / "small")[0] == 0
    (place / "port.py").write_text(PORT.replace("MODEL", repr(str(place / "small"))), encoding="utf-8")
    return place


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(folder)
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY", "GITHUB_WORKSPACE"):
        monkeypatch.delenv(name, raising=False)
    yield folder
    for path in folder.iterdir():
        if path.is_file() and path.name != "port.py":
            path.unlink()


def test_the_schema_is_one_and_describes_every_field() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    kinds = {definition["$ref"].rpartition("/")[2] for definition in SCHEMA["oneOf"]}
    sources = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "gpt2np").rglob("*.py"))
    assert kinds == set(re.findall(r'(?:print_json|stamped)\(\s*"(\w+)"', sources))

    def undescribed(value: Any, name: str) -> Iterator[str]:
        if isinstance(value, dict):
            for field, held in value.get("properties", {}).items():
                if not (isinstance(held, dict) and held.get("description")):
                    yield f"{name}.{field}"
            for key, held in value.items():
                yield from undescribed(held, f"{name}.{key}")

    assert not list(undescribed(SCHEMA["$defs"], ""))


def test_info_score_and_generate(here: Path, mini: Path) -> None:
    paths = [here / "small", DATA / "optimum_past.onnx"]
    for path in paths:
        validate(run("info", path, "--json", "--nodes")[1], "info")
    assert validate(run("info", "small", "--json")[1], "info")["path"] == "small/model.onnx"
    (here / "text.txt").write_text("Once upon a time", encoding="utf-8")
    (here / "text.jsonl").write_text('{"text": "Once upon a time"}\n', encoding="utf-8")
    code, out = run("score", "text.txt", "text.jsonl", "--json", "--engine", "numpy")
    assert code == 0
    assert [validate(line, "score")["file"] for line in out.splitlines()] == ["text.txt", "text.jsonl"]
    code, out = run("generate", "Once", "A", "-n", "2", "--json", "--logprobs", "2", "--engine", "numpy")
    assert [validate(line, "generate")["prompt"] for line in out.splitlines()] == ["Once", "A"]


def test_parity(here: Path) -> None:
    code, out = run("parity", "small", "--json", "-", "--noise-floor", "--checks", "all", "--engine", "numpy")
    record = validate(out, "report")
    assert (code, record["verdict"], record["title"]) == (0, "pass", "small/model.onnx")
    assert str(here) not in out
    code, out = run("parity", DATA / "int8.onnx", "--random", "1", "--json", "-", "--engine", "numpy")
    validate(out, "report")


def test_diff_in_every_form(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = here / "summary.md"
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_WORKSPACE", str(here.parent))
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    files = ["--json", "a.json", "--junit", "a.xml", "--markdown", "a.md"]
    wrong = ["diff", "small", "port.py:forward", "--ids", "3,1,4,1,5", *files]
    code, out = run(*wrong, "--quiet", "--replace", "h.0.mlp.gelu", "--digits")
    assert code == 1
    record = validate((here / "a.json").read_text(encoding="utf-8"), "report")
    assert record["place"]["first"] == "h.0.mlp.gelu"
    assert record["port"] == {"file": "port.py", "line": 10}
    assert re.fullmatch(
        rf"::error file={here.name}/port.py,line=10,title=gpt2np%3A A small%2C B port.py%3Aforward::[^\n]*"
        r"h\.0\.mlp\.gelu[^\n]*\n",
        out,
    )
    text = (here / "a.md").read_text(encoding="utf-8")
    assert summary.read_text(encoding="utf-8") == text
    assert text.startswith("## ❌ FAIL in output1")
    assert "- **where**: first divergence h.0.mlp.gelu" in text
    assert "| output | parties |" in text
    assert str(here) not in text

    first = ElementTree.parse(here / "a.xml").getroot()[0]
    run(*wrong, "--quiet")
    second = ElementTree.parse(here / "a.xml").getroot()[0]
    cases = [(c.attrib["classname"], c.attrib["name"], c.attrib["file"]) for c in second.iter("testcase")]
    assert cases == [(c.attrib["classname"], c.attrib["name"], c.attrib["file"]) for c in first.iter("testcase")]
    assert all(float(c.attrib["time"]) >= 0 for c in second.iter("testcase"))
    assert float(second.attrib["time"]) > 0
    found = {p.attrib["name"]: p.attrib["value"] for p in second.iter("property")}
    assert found["verdict"] == "fail"
    assert found["gpt2np"] == gpt2np.__version__
    assert str(here) not in (here / "a.xml").read_text(encoding="utf-8")


def test_two_files_and_two_traces(here: Path) -> None:
    assert run("synth", "--size", "2,3,12,20,37", "--seed", "2", "-o", "other")[0] == 0
    code, out = run("diff", "small", "other", "--ids", "3,1,4,1,5", "--json", "-")
    record = validate(out, "report")
    assert code == 1
    assert record["facts"]
    assert run("trace", "small", "--ids", "1,2,3", "-o", "a.npz", "--engine", "numpy")[0] == 0
    validate(run("diff", "a.npz", "a.npz", "--json", "-")[1], "report")
    shutil.rmtree("other")


def test_without_github_nothing_is_annotated(here: Path) -> None:
    code, out = run("diff", "small", "port.py:forward", "--ids", "3,1,4,1,5")
    assert code == 1
    assert "::error" not in out
    assert not list(here.glob("*.md"))


def test_an_annotation_is_one_line_whatever_is_in_it() -> None:
    assert github.error("50% off\nnext", "a:b,c") == "::error title=a%3Ab%2Cc::50%25 off%0Anext"


def test_progress_in_a_file_is_a_line_each_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its rate is that of this run, whatever was there before."""
    monkeypatch.setattr(_terminal, "MINUTE", 0.05)
    with _terminal.progress("reading", 1000, "bytes", 500) as advance:
        for _ in range(3):
            time.sleep(0.06)
            advance(100)
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == "reading: 60%, -:--:-- left"
    rate = float(re.fullmatch(r"reading: 70%, ([\d,]+) bytes/s, 0:00:\d\d left", second)[1].replace(",", ""))
    assert 0 < rate < 100 / 0.06
    assert third.startswith("reading: 80%, ")
