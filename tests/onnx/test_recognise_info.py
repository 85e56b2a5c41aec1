"""gpt2np info: the same facts for people and for programs."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from gpt2np.cli import app
from runtime import DATA

NAMES = sorted(p.stem for p in DATA.glob("*.onnx"))


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["info", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("name", NAMES)
def test_json_tells_everything(name):
    path = str(DATA / f"{name}.onnx")
    facts = json.loads(run(path, "--json"))
    assert facts["config"]["n_layer"] == 2
    assert set(facts["weights"]) >= {"wte.weight", "wpe.weight", "h.1.mlp.c_proj.bias", "ln_f.weight"}
    assert facts["weights"]["h.0.attn.c_attn.weight"]["from"]
    assert facts["opset"]["ai.onnx"] >= 10
    assert {p["role"] for p in facts["inputs"]} >= {"input_ids"}
    assert sum(facts["bytes_by_dtype"].values()) > 5_000
    # wte, wpe, two layers, ln_f
    C, F = 16, 64
    layer = 4 * C + 3 * C * C + 3 * C + C * C + C + 2 * C * F + F + C
    expected = 64 * C + 16 * C + 2 * layer + 2 * C
    separate = 0 if facts["config"]["tied"] else 64 * C
    assert facts["parameters"] == expected + separate


def test_text_names_what_matters():
    text = run(str(DATA / "int8.onnx"))
    for words in (
        "2 layers, 2 heads of 8",
        "past_key_values.0.key",
        "MatMulInteger",
        "rounded",
        "h.0-1.attn.c_attn.weight",
    ):
        assert words in text
    assert "EmbedLayerNormalization x1" in run(str(DATA / "fused_past.onnx"))


def test_no_argument_means_the_embedded_model(mini):
    if not (mini / "model.onnx").exists():
        pytest.skip("no embedded model yet")
    assert "GPT-2 with" in run()


def test_unreadable_input_is_an_error(tmp_path):
    (tmp_path / "model.onnx").write_text("hello")
    result = CliRunner().invoke(app, ["info", str(tmp_path)])
    assert result.exit_code != 0
