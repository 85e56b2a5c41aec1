"""Files that the writer makes: accepted by onnx.checker, run by ONNX Runtime, equal to the textbook."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from gpt2np.config import GPT2Config
from gpt2np.convert.sample_data import Sample, run_textbook
from gpt2np.convert.synthetic import make_config, random_weights
from gpt2np.convert.writer import MAX_SINGLE_FILE, build_graph, graph_nbytes, write_model
from gpt2np.errors import InputError, UnsupportedModelError, WeightError
from gpt2np.masks import MaskRule
from gpt2np.onnx.read.reader import open_model
from gpt2np.onnx.recognise import recognise
from tiny import ArraySource, tiny_config, tiny_sources

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"tied": False},
    "erf": {"activation": "gelu_erf"},
    "quick": {"activation": "gelu_quick", "n_inner": 31},
    "relu": {"activation": "relu", "layer_norm_epsilon": 1e-3},
    "silu": {"activation": "silu"},
    "tanh": {"activation": "tanh"},
    "head size": {"head_size": 5, "attn_scale": 5**-0.5},
    "no scale": {"attn_scale": 1.0},
    "odd scale": {"attn_scale": 0.3, "vocab_size": 12},  # V = C: the head's matrix is square
    "by layer": {
        "overrides": (("h.1.attn.scale", 0.25), ("h.1.mlp.activation", "relu"), ("h.0.ln_2.epsilon", 1e-2)),
    },
    "shifted": {"mask": MaskRule(shift=1), "position_offset": 2},
}
# opset, lm_head, with_past
KINDS = [
    (10, False, False),
    (10, True, False),
    (13, True, False),
    (17, False, False),
    (18, True, True),
    (20, True, True),
]
WRITTEN = ["n_layer", "n_head", "n_embd", "n_ctx", "vocab_size", "n_inner", "head_size", "activation", "tied"]
WRITTEN += ["layer_norm_epsilon", "position_offset"]
MODERN_MASK = float(np.finfo(np.float32).min)


def run(path: Path, config: GPT2Config, sample: Sample) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """ONNX Runtime's (output, presents...) of a file for a sample without past, and the textbook's."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    ids = sample.input_ids
    B, T = ids.shape
    feeds = {"input1": ids[None]}
    if session.get_inputs()[0].name == "input_ids":
        feeds = {"input_ids": ids, "attention_mask": sample.real, "position_ids": np.arange(T) + np.zeros((B, 1), int)}
    for port in session.get_inputs():
        if port.name.startswith("past"):
            feeds[port.name] = np.zeros((B, config.n_head, 0, config.head_size), np.float32)
    outputs: list[np.ndarray] = session.run(None, feeds)
    if "input1" in feeds:
        outputs[0] = outputs[0][0]
    return outputs, feeds  # type: ignore[return-value]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_runs_and_is_read_back(tmp_path: Path, variant: str, kind: tuple[int, bool, bool]) -> None:
    opset, lm_head, with_past = kind
    changes: dict[str, Any] = {"mask": MaskRule(), **VARIANTS[variant]}
    rule = replace(changes["mask"], value=MODERN_MASK if opset >= 17 else -1e4)
    config = tiny_config(**{**changes, "mask": rule})
    weights = tiny_sources(config)
    path = tmp_path / "model.onnx"
    assert write_model(path, config, weights, opset=opset, lm_head=lm_head, with_past=with_past) == (path,)
    onnx.checker.check_model(path, full_check=True)
    assert onnx.load(path).opset_import[0].version == opset

    ids = np.random.default_rng(3).integers(0, config.vocab_size, (2, 9))
    sample = Sample(ids, np.ones((2, 9), np.int64), 0)
    [(expected, caches)] = run_textbook(config, weights, [sample], lm_head)
    outputs, _ = run(path, config, sample)
    np.testing.assert_allclose(outputs[0], expected, rtol=1e-4, atol=2e-6)
    if opset < 17:
        presents = outputs[1:]
    else:
        presents = [np.stack(pair) for pair in zip(outputs[1::2], outputs[2::2], strict=True)]
    assert len(presents) == (config.n_layer if opset < 17 or with_past else 0)
    for present, cache in zip(presents, caches, strict=False):
        np.testing.assert_allclose(present, cache, rtol=1e-4, atol=2e-6)

    found = recognise(open_model(path))
    wanted = config if lm_head else replace(config, tied=True)
    for field in WRITTEN:
        assert getattr(found.config, field) == getattr(wanted, field), field
    assert (found.config.mask.value, found.config.mask.shift) == (rule.value, rule.shift)
    for i in range(config.n_layer):
        assert found.config.layer_scale(i) == pytest.approx(config.layer_scale(i), rel=1e-6)
        assert found.config.layer_activation(i) == config.layer_activation(i)
        assert found.config.epsilon(f"h.{i}.ln_2") == pytest.approx(config.epsilon(f"h.{i}.ln_2"), rel=1e-6)
    for name, source in weights.items():
        if name in found.sources or lm_head:
            assert np.array_equal(found.sources[name].load(), source.array)


@pytest.mark.parametrize("opset", [11, 12, 14, 16, 19, 21])
def test_further_opsets(tmp_path: Path, opset: int) -> None:
    config = tiny_config()
    weights = tiny_sources(config)
    write_model(tmp_path / "model.onnx", config, weights, opset=opset, lm_head=True)
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    sample = Sample(np.arange(8)[None], np.ones((1, 8), np.int64), 0)
    [(expected, _)] = run_textbook(config, weights, [sample], lm_head=True)
    np.testing.assert_allclose(run(tmp_path / "model.onnx", config, sample)[0][0], expected, rtol=1e-4, atol=2e-6)


def test_head_bias_and_other_dtypes(tmp_path: Path) -> None:
    config = tiny_config()
    bias = np.linspace(-1, 1, config.vocab_size, dtype=np.float16)
    for opset in (10, 17):
        weights = {**tiny_sources(config), "lm_head.bias": ArraySource(bias), "ln_f.bias": np.ones(12, np.float16)}
        write_model(tmp_path / "model.onnx", config, weights, opset=opset, lm_head=True)
        file = open_model(tmp_path)
        assert file.tensors["lm_head.bias"].dtype == np.float32
        assert np.array_equal(file.tensors["lm_head.bias"].load(), bias.astype(np.float32))
        assert np.array_equal(file.tensors["transformer.ln_f.bias"].load(), np.ones(12, np.float32))
        assert np.array_equal(recognise(file).sources["lm_head.bias"].load(), bias.astype(np.float32))


@pytest.mark.parametrize("max_file_size", [None, 1, 9_000, 20_000])
def test_external_data_in_one_file_or_many(tmp_path: Path, max_file_size: int | None) -> None:
    config = tiny_config()
    weights = tiny_sources(config)
    path = tmp_path / "model.onnx"
    inside = write_model(tmp_path / "single.onnx", config, weights)[0]
    files = write_model(path, config, weights, external_data=True, max_file_size=max_file_size)
    assert files[0] == path
    assert sorted(tmp_path.iterdir()) == sorted([*files, inside])
    tensors = open_model(path).tensors
    if max_file_size is None:
        assert [f.name for f in files] == ["model.onnx", "model.onnx_data"]
    else:
        assert [f.name for f in files[:3]] == ["model.onnx", "model.onnx_data", "model.onnx_data_1"]
        largest = max(tensor.nbytes for tensor in tensors.values())
        assert all(f.stat().st_size <= max(max_file_size, largest) for f in files[1:])
    for name, tensor in open_model(inside).tensors.items():
        assert np.array_equal(tensors[name].load(), tensor.load())
        assert int(tensors[name].origin.split("@")[1]) % 4096 == 0
    onnx.checker.check_model(path, full_check=True)
    onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("name", "lm_head"), [("zoo_base", False), ("zoo_lm_head", True)])
def test_writes_the_exporters_own_graph(fixtures: Path, tmp_path: Path, name: str, lm_head: bool) -> None:
    """Node for node as PyTorch exported it, but for its Identity nodes between equal mask buffers."""
    found = recognise(open_model(fixtures / name))
    write_model(tmp_path / "model.onnx", found.config, found.sources, lm_head=lm_head)
    ours, theirs = (open_model(p).proto.graph for p in (tmp_path, fixtures / name))
    skipped = {"Identity"} if not lm_head else {"Identity", "Constant"}  # they share the -1e4 of Where
    kinds = [Counter(n.op_type for n in g.node if n.op_type not in skipped) for g in (ours, theirs)]
    assert kinds[0] == kinds[1]
    names = [{n.name for n in g.node if n.op_type not in skipped} for g in (ours, theirs)]
    assert names[0] == names[1]
    assert [(p.name, p.type.tensor_type.elem_type) for p in (*ours.input, *ours.output)] == [
        (p.name, p.type.tensor_type.elem_type) for p in (*theirs.input, *theirs.output)
    ]
    for tensor in theirs.initializer:  # all but the two whose names PyTorch's exporter made up
        assert tensor.name.startswith("onnx::") or tensor.name in {t.name for t in ours.initializer}


def test_a_model_is_complete_or_not_there(tmp_path: Path) -> None:
    class Broken(ArraySource):
        def load(self) -> np.ndarray:
            raise OSError("the disk is gone")

    config = tiny_config()
    weights = tiny_sources(config)
    broken = {**weights, "ln_f.weight": Broken(weights["ln_f.weight"].array)}
    for external_data in (False, True):
        files = write_model(tmp_path / "model.onnx", config, weights, external_data=external_data)
        before = {path: path.read_bytes() for path in files}
        with pytest.raises(OSError, match="the disk is gone"):
            write_model(tmp_path / "model.onnx", config, broken, external_data=external_data)
        assert {path: path.read_bytes() for path in files} == before
    assert sorted(tmp_path.iterdir()) == sorted(before)


def test_weights_are_checked_before_any_work(tmp_path: Path) -> None:
    config = tiny_config()
    weights = tiny_sources(config)
    with pytest.raises(WeightError, match=r"h\.1\.ln_2\.bias \(12,\) is missing"):
        write_model(tmp_path / "m.onnx", config, {n: w for n, w in weights.items() if n != "h.1.ln_2.bias"})
    with pytest.raises(WeightError, match=r"wpe.weight has shape \(20, 12\), expected \(21, 12\)"):
        write_model(tmp_path / "m.onnx", replace(config, n_ctx=21), weights)
    with pytest.raises(WeightError, match="lm_head.weight .* is left over"):
        write_model(tmp_path / "m.onnx", config, {**weights, "lm_head.weight": weights["wte.weight"]})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 9}, "opset 9 is not between 10 and"),
        ({"opset": 1000}, "opset 1000"),
        ({"opset": "10"}, "opset must be a whole number"),
        ({"opset": 10, "lm_head": True, "with_past": True}, "past inputs need opset 17"),
        ({"opset": 17, "with_past": True}, "and the LM head"),
    ],
)
def test_options_that_contradict_each_other(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        write_model(tmp_path / "m.onnx", tiny_config(), tiny_sources(tiny_config()), **options)


def test_the_zoos_graph_needs_a_finite_mask(tmp_path: Path) -> None:
    config = tiny_config(mask=MaskRule(value=-np.inf))
    with pytest.raises(UnsupportedModelError, match="finite"):
        write_model(tmp_path / "m.onnx", config, tiny_sources(config))


def test_more_than_2_gb_need_external_data(tmp_path: Path) -> None:
    config = make_config(48, 25, 1600)
    weights = random_weights(config, 0)
    assert graph_nbytes(build_graph(config, weights)) > 2 * MAX_SINGLE_FILE
    with pytest.raises(InputError, match=r"6\.4 GB, but a single ONNX file holds 2\.1 GB"):
        write_model(tmp_path / "m.onnx", config, weights)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("external_data", [False, True])
def test_writing_holds_one_weight_at_a_time(tmp_path: Path, external_data: bool) -> None:
    config = make_config(24, 4, 256, 64, 1000)
    weights = random_weights(config, 0)
    write_model(tmp_path / "m.onnx", config, weights, lm_head=True, external_data=external_data)  # imports
    tracemalloc.start()
    try:
        write_model(tmp_path / "m.onnx", config, weights, lm_head=True, external_data=external_data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    largest = 4 * config.vocab_size * config.n_embd
    total = sum(4 * np.prod(w.shape) for w in weights.values())
    assert peak < 3 * largest + (4 << 20) < total / 8
