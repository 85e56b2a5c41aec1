"""`gpt2np convert --to huggingface` and `--to gguf`: the same weights, bit for bit, or a refusal."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpt2np
from gpt2np.commands.convert import convert
from gpt2np.convert.checkpoint import config_json
from gpt2np.convert.folder import open_source, write_for_others
from gpt2np.convert.huggingface import read_checkpoint
from gpt2np.errors import InputError, UnsupportedModelError
from gpt2np.masks import MaskRule
from gpt2np.weights import weight_shapes
from tiny import tiny_config, tiny_sources

MINI = Path(gpt2np.__file__).parents[1] / "weights" / "mini"
SAID: dict[str, dict[str, Any]] = {
    "plain": {},
    "own head": {"tied": False, "n_inner": 31, "layer_norm_epsilon": 1e-3},
    "activation": {"activation": "gelu_erf"},
    "no scale": {"attn_scale": 1.0},
    "layers": {"overrides": (("h.1.attn.scale", 0.25),)},
}


@pytest.mark.parametrize("way", SAID)
def test_a_checkpoint_read_back(tmp_path: Path, way: str) -> None:
    config = replace(tiny_config(), **SAID[way])
    weights = tiny_sources(config)
    write_for_others(tmp_path / "out", "huggingface", config, weights, tmp_path)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    found, sources = read_checkpoint(tmp_path / "out")
    assert found == replace(config, mask=found.mask)
    assert set(sources) == set(weights)
    for name, source in weights.items():
        assert sources[name].load().tobytes() == source.array.tobytes()


@pytest.mark.parametrize(
    "departure",
    [
        {"attn_scale": 0.3},
        {"position_offset": 1},
        {"mask": MaskRule(kind="none")},
        {"overrides": (("h.1.mlp.activation", "relu"),)},
        {"overrides": (("ln_f.epsilon", 1e-3),)},
        {"overrides": (("h.1.attn.scale", 0.3),)},
    ],
    ids=str,
)
@pytest.mark.parametrize("to", ["huggingface", "gguf"])
def test_what_a_checkpoint_cannot_say(tmp_path: Path, to: str, departure: dict[str, Any]) -> None:
    config = replace(tiny_config(), **departure)
    with pytest.raises(UnsupportedModelError):
        write_for_others(tmp_path / "out", to, config, tiny_sources(config), tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_bias_of_the_head_is_refused() -> None:
    config = tiny_config()
    weights = tiny_sources(config)
    with pytest.raises(UnsupportedModelError, match="head has a bias"):
        config_json(config, {**weights, "lm_head.bias": weights["ln_f.bias"]})


@pytest.mark.parametrize("way", ["activation", "no scale", "layers"])
def test_what_llama_cpp_cannot_compute(tmp_path: Path, way: str) -> None:
    config = replace(tiny_config(), **SAID[way])
    with pytest.raises(UnsupportedModelError, match=r"llama\.cpp's GPT-2 has"):
        write_for_others(tmp_path / "out", "gguf", config, tiny_sources(config), tmp_path)
    assert not (tmp_path / "out").exists()


def test_gguf_has_the_weights_and_the_tokenizer(tmp_path: Path) -> None:
    import gguf

    convert(MINI, tmp_path / "out", to="gguf")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.gguf"]
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    config, sources, _ = open_source(MINI)
    said = {key: field.contents() for key, field in reader.fields.items()}
    assert said["general.architecture"] == "gpt2"
    assert said["gpt2.block_count"] == config.n_layer
    assert said["gpt2.attention.head_count"] == config.n_head
    assert said["gpt2.attention.layer_norm_epsilon"] == pytest.approx(config.layer_norm_epsilon)
    tokenizer = gpt2np.load(MINI / "model.onnx").tokenizer
    assert said["tokenizer.ggml.tokens"] == [tokenizer.id_to_token(i) for i in range(config.vocab_size)]
    assert said["tokenizer.ggml.tokens"][said["tokenizer.ggml.eos_token_id"]] == "<|endoftext|>"
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(tensors) == len(weight_shapes(config))
    for theirs, ours in (
        ("token_embd.weight", "wte.weight"),
        ("position_embd.weight", "wpe.weight"),
        ("output_norm.bias", "ln_f.bias"),
        ("blk.5.attn_norm.weight", "h.5.ln_1.weight"),
        ("blk.0.ffn_norm.bias", "h.0.ln_2.bias"),
    ):
        assert np.array_equal(tensors[theirs], sources[ours].load())
    for theirs, ours in (
        ("attn_qkv", "attn.c_attn"),
        ("attn_output", "attn.c_proj"),
        ("ffn_up", "mlp.c_fc"),
        ("ffn_down", "mlp.c_proj"),
    ):
        assert np.array_equal(tensors[f"blk.3.{theirs}.weight"], sources[f"h.3.{ours}.weight"].load().T)
        assert np.array_equal(tensors[f"blk.3.{theirs}.bias"], sources[f"h.3.{ours}.bias"].load())


def test_misuse_and_what_is_there_already(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--with-past, --opset: only model\.onnx"):
        convert(MINI, tmp_path / "out", to="gguf", with_past=True, opset=17)
    with pytest.raises(InputError, match="written as one of onnx, huggingface, gguf, got 'torch'"):
        convert(MINI, tmp_path / "out", to="torch")
    assert not (tmp_path / "out").exists()
    convert("mini", tmp_path / "out", to="huggingface")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["n_layer"] == 6
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    with pytest.raises(InputError, match="already holds"):
        convert(MINI, tmp_path / "out", to="huggingface")
    convert(tmp_path / "out", tmp_path / "out")  # beside it, and from it
    assert np.array_equal(gpt2np.load(tmp_path / "out")([1, 2]).logits, gpt2np.load(MINI)([1, 2]).logits)
