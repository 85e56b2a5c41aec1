"""`gpt2np info --graph`: every node of the ledger stands once, under its operation and line of code."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import pytest
from conftest import ROOT
from typer.testing import CliRunner

from browser import chromium, needs_chromium
from gpt2np import reference
from gpt2np.cli import app
from gpt2np.onnx.read.reader import open_model
from gpt2np.onnx.recognise import recognise
from gpt2np.pages import nodes

MODEL = ROOT / "weights" / "mini" / "model.onnx"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graph") / "graph.html"
    done = CliRunner().invoke(app, ["info", str(MODEL), "--graph", str(path)])
    assert done.exit_code == 0, done.output
    return path


def test_every_node_stands_once_and_every_line_is_the_one_of_reference_py(page: Path):
    text = page.read_text("utf-8")
    ledger = nodes.rows(recognise(open_model(MODEL)))
    shown = [unescape(name) for name in re.findall("<tr><td>(.*?)</td>", text)]
    joint = [unescape(n) for line in re.findall("together: <code>(.*?)</code>", text) for n in line.split(", ")]
    assert sorted([*shown, *set(joint)]) == sorted(row["node"] for row in ledger)
    code = Path(reference.__file__).read_text("utf-8").splitlines()
    lines = re.findall(r"reference.py, line (\d+): <code>(.*?)</code>", text)
    assert len(lines) == 1 + 6 * 14 + 1
    assert all(code[int(number) - 1].strip() == unescape(shown) for number, shown in lines)


def test_it_is_small_and_fetches_nothing(page: Path):
    text = page.read_text("utf-8")
    assert len(text) < 200_000
    assert not re.search("https?:", text)


@needs_chromium
def test_a_link_opens_its_block(page: Path):
    with chromium() as tab:
        tab.open(page, 400)
        assert not tab.run("return document.getElementById('h.3').open")
        tab.click("nav a[href='#h.3']")
        assert tab.run("return document.getElementById('h.3').open")
        assert tab.run("return document.documentElement.scrollWidth") <= 400
