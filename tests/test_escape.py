"""Text from files has no power over a terminal, a report, or a reader's eye."""

from __future__ import annotations

import json
import subprocess
import sys
import unicodedata
from pathlib import Path
from xml.etree import ElementTree

import onnx
import pytest

from gpt2np.convert.writer import write_model
from gpt2np.errors import ModelFileError
from gpt2np.escape import escaped
from gpt2np.parity.report import Check, Report, junit_of
from tiny import tiny_config, tiny_sources

EVIL = "\x1b]0;owned\x07\x1b[31m\x9b2J\r\u202eabc\u2066\x00\x7f"


def test_no_control_character_is_left() -> None:
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    left = escaped(everything)
    assert not {unicodedata.category(c) for c in left} & {"Cc", "Cs", "Zl", "Zp"}
    turned = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    assert not {unicodedata.bidirectional(c) for c in left} & turned
    formats = {c for c in left if unicodedata.category(c) == "Cf"}
    assert {"\u200c", "\u200d"} <= formats  # joiners
    assert not formats & {chr(code) for code in (*range(0x2028, 0x2070), 0x61C, 0xAD, 0xFEFF, *range(0xE0000, 0xE0080))}


def test_text_that_is_harmless_stays() -> None:
    for text in ("wte.weight", "h.0/attn [3]", "Ärger, 日本語\u3000, עברית", "👩\u200d🚀 é"):
        assert escaped(text) == text
    assert escaped("a\n\tb", keep="\n\t") == "a\n\tb"
    assert escaped("\x1b[0m") == r"\u001b[0m"
    assert escaped("\U000e0041") == r"\udb40\udc41"


def test_json_means_the_same() -> None:
    assert json.loads(escaped(json.dumps(EVIL, ensure_ascii=False))) == EVIL


def test_errors_are_escaped_but_keep_what_they_were_given() -> None:
    error = ModelFileError(f"no node {EVIL}\n  of two lines")
    assert str(error) == f"no node {escaped(EVIL)}\n  of two lines"
    assert EVIL in error.args[0]


def test_junit_is_sound_xml() -> None:
    report = Report(EVIL, {EVIL: EVIL}, EVIL)
    report.checks.append(Check(EVIL, False, EVIL))
    text = junit_of(report)
    assert escaped(text, keep="\n") == text
    assert ElementTree.fromstring(text).find(".//testcase").get("name") == escaped(EVIL)


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound model in whose file every name is hostile."""
    path = tmp_path_factory.mktemp("evil") / "model.onnx"
    config = tiny_config()
    write_model(path, config, tiny_sources(config), opset=18, lm_head=True, with_past=False)
    model = onnx.load(path)
    text = EVIL.replace("\x00", "")
    model.producer_name = model.producer_version = model.doc_string = model.graph.name = text
    names = {t.name for t in model.graph.initializer} | {i.name for i in model.graph.input}
    names |= {o for n in model.graph.node for o in n.output}
    for node in model.graph.node:
        node.name = text + node.name
        node.input[:] = [text + i if i in names else i for i in node.input]
        node.output[:] = [text + o for o in node.output]
    for named in (*model.graph.initializer, *model.graph.input, *model.graph.output):
        named.name = text + named.name
    for port in (*model.graph.input, *model.graph.output):
        for dim in port.type.tensor_type.shape.dim:
            dim.dim_param = text if dim.dim_param else ""
    onnx.save(model, path)
    model.graph.node[-1].op_type = text
    onnx.save(model, path.with_name("broken.onnx"))
    return path.parent


@pytest.mark.parametrize(
    "arguments", [("info", "model.onnx"), ("info", "model.onnx", "--json"), ("info", "broken.onnx")]
)
def test_nothing_of_it_reaches_the_terminal(evil: Path, arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "gpt2np", *arguments]
    done = subprocess.run(command, capture_output=True, cwd=evil, check=False)
    seen = done.stdout.decode() + done.stderr.decode()
    assert "owned" in seen
    assert escaped(seen, keep="\n") == seen
    assert done.returncode == (2 if "broken.onnx" in arguments else 0)
