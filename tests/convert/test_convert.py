"""`gpt2np convert` and `gpt2np synth`: any checkpoint to model.onnx, bit for bit, with true sample data."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from gpt2np.commands.convert import convert
from gpt2np.commands.synth import parse_config, synth
from gpt2np.convert.folder import choose, open_source, parse_size, write_folder
from gpt2np.convert.huggingface import read_checkpoint
from gpt2np.convert.sample_data import samples
from gpt2np.convert.synthetic import make_config, random_weights
from gpt2np.convert.writer import write_model
from gpt2np.errors import Gpt2npError, InputError, ModelFileError, UnsupportedModelError, WeightError
from gpt2np.masks import MaskRule
from gpt2np.onnx.read.reader import open_model
from gpt2np.onnx.recognise import recognise
from tiny import tiny_config, tiny_sources

NAMES = {"<f8": "F64", "<f4": "F32", "<f2": "F16", "bfloat16": "BF16", "int64": "I64"}
HF = {"model_type": "gpt2", "n_layer": 2, "n_head": 3, "n_embd": 12, "n_positions": 20, "vocab_size": 37}
# Each way to write the model: options of `convert`.
WAYS: dict[str, dict[str, Any]] = {
    "zoo": {},
    "zoo, head": {"lm_head": True},
    "external": {"lm_head": True, "external_data": True},
    "modern": {"opset": 17},
    "past": {"with_past": True},
    "past, many files": {"with_past": True, "opset": 20, "max_file_size": "9KB"},
}


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, array in tensors.items():
        kind = "BF16" if array.dtype == ml_dtypes.bfloat16 else NAMES.get(array.dtype.str, array.dtype.name)
        kind = {"int64": "I64", "uint8": "U8", "bool": "BOOL"}.get(kind, kind)
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(a.tobytes() for a in tensors.values()))


def checkpoint(
    folder: Path, config: dict[str, Any] | None = None, prefix: str = "transformer.", dtype: Any = np.float32
) -> dict[str, np.ndarray]:
    """Write a Hugging Face folder; the arrays by their names without prefix."""
    folder.mkdir(parents=True, exist_ok=True)
    config = HF | (config or {})
    (folder / "config.json").write_text(json.dumps(config))
    ours = tiny_config(tied=config.get("tie_word_embeddings", True), n_inner=config.get("n_inner", 48))
    arrays = {name: source.array.astype(dtype) for name, source in tiny_sources(ours).items()}
    stored = {name if name.startswith("lm_head") else prefix + name: a for name, a in arrays.items()}
    for i in range(2):  # what older releases save as well
        stored[f"{prefix}h.{i}.attn.bias"] = np.tri(20, dtype=np.float32)[None, None]
        stored[f"{prefix}h.{i}.attn.masked_bias"] = np.array(-1e4, np.float32)
    write_safetensors(folder / "model.safetensors", stored)
    return arrays


def run_samples(folder: Path) -> float:
    """Largest difference of ONNX Runtime's outputs from the recorded ones; all sets, by name."""
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_outputs()]
    worst = 0.0
    sets = sorted(folder.glob("test_data_set_*"))
    assert len(sets) >= 3
    for path in sets:
        read = {
            kind: {t.name: numpy_helper.to_array(t) for t in map(onnx.load_tensor, path.glob(f"{kind}_*.pb"))}
            for kind in ("input", "output")
        }
        assert set(read["output"]) == set(names)
        assert set(read["input"]) == {port.name for port in session.get_inputs()}
        for name, output in zip(names, session.run(names, read["input"]), strict=True):
            expected = read["output"][name]
            assert output.dtype == expected.dtype
            assert output.shape == expected.shape
            worst = max(worst, float(np.abs(output - expected).max(initial=0)))
    return worst


def loaded(folder: Path) -> dict[str, np.ndarray]:
    return {name: source.load() for name, source in recognise(open_model(folder)).sources.items()}


@pytest.mark.parametrize("way", WAYS)
def test_safetensors_to_onnx_bit_for_bit(tmp_path: Path, way: str) -> None:
    arrays = checkpoint(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "out", **WAYS[way])
    onnx.checker.check_model(tmp_path / "out" / "model.onnx", full_check=True)
    found = loaded(tmp_path / "out")
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == np.float32
        assert found[name].tobytes() == array.tobytes()
    assert run_samples(tmp_path / "out") < 1e-5


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"activation_function": "gelu"}, {"activation": "gelu_erf"}),
        ({"activation_function": "gelu_pytorch_tanh"}, {"activation": "gelu_tanh"}),
        ({"activation_function": "quick_gelu"}, {"activation": "gelu_quick"}),
        ({"activation_function": "relu", "n_inner": None}, {"activation": "relu"}),
        ({"activation_function": "silu"}, {"activation": "silu"}),
        ({"activation_function": "tanh"}, {"activation": "tanh"}),
        ({"n_inner": 31}, {"n_inner": 31}),
        ({"layer_norm_epsilon": 1e-3}, {"layer_norm_epsilon": 1e-3}),
        ({"scale_attn_weights": False}, {"attn_scale": 1.0}),
        ({"scale_attn_by_inverse_layer_idx": True}, {"overrides": (("h.1.attn.scale", 0.25),)}),
        ({"tie_word_embeddings": False}, {"tied": False}),
    ],
    ids=str,
)
def test_what_config_json_can_say(tmp_path: Path, config: dict[str, Any], expected: dict[str, Any]) -> None:
    if config.get("n_inner", 0) is None:
        config = {k: v for k, v in config.items() if v is not None}  # null is the same as absent
    arrays = checkpoint(tmp_path / "hf", config)
    found, _ = read_checkpoint(tmp_path / "hf")
    assert found == replace(tiny_config(), **expected)
    convert(tmp_path / "hf", tmp_path / "out", lm_head=True)
    assert run_samples(tmp_path / "out") < 1e-5
    again = recognise(open_model(tmp_path / "out"))
    for key, value in expected.items():
        if key != "overrides":
            assert getattr(again.config, key) == pytest.approx(value)
    assert again.config.layer_scale(1) == pytest.approx(found.layer_scale(1))
    for name, array in arrays.items():
        assert np.array_equal(again.sources[name].load(), array)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64], ids=str)
def test_other_float_types(tmp_path: Path, dtype: Any) -> None:
    arrays = checkpoint(tmp_path / "hf", dtype=dtype, prefix="")
    convert(tmp_path / "hf" / "model.safetensors", tmp_path / "out")
    for name, array in loaded(tmp_path / "out").items():
        assert np.array_equal(array, arrays[name].astype(np.float32))


def test_shards_and_a_repeated_head(tmp_path: Path) -> None:
    arrays = checkpoint(tmp_path / "hf")
    stored = {"transformer." + name: array for name, array in arrays.items()}
    stored["lm_head.weight"] = arrays["wte.weight"]  # tied: some checkpoints store it twice
    names = list(stored)
    (tmp_path / "hf" / "model.safetensors").unlink()
    files = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, part in files.items():
        write_safetensors(tmp_path / "hf" / file, {name: stored[name] for name in part})
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    for i, source in enumerate(("hf", "hf/model.safetensors.index.json")):
        convert(tmp_path / source, tmp_path / f"out{i}")
        for name, array in loaded(tmp_path / f"out{i}").items():
            assert np.array_equal(array, arrays[name])


@pytest.mark.parametrize("way", WAYS)
def test_onnx_to_onnx_and_back(tmp_path: Path, way: str) -> None:
    config = tiny_config(tied=False, activation="gelu_erf", n_inner=31)
    weights = tiny_sources(config)
    (tmp_path / "a").mkdir()
    write_model(tmp_path / "a" / "model.onnx", config, weights, opset=18, lm_head=True, with_past=True)
    convert(tmp_path / "a", tmp_path / "b", **WAYS[way] | {"lm_head": True})
    assert run_samples(tmp_path / "b") < 1e-5
    convert(tmp_path / "b" / "model.onnx", tmp_path / "c", with_past=True)
    found = loaded(tmp_path / "c")
    for name, source in weights.items():
        assert np.array_equal(found[name], source.array)


# Fixtures whose expected outputs come from PyTorch, and which of their outputs and sets an LM-head zoo file gives.
FIXTURES = ["zoo_base", "zoo_lm_head", "optimum_past", "dynamo", "ort_fused", "external_data"]


@pytest.mark.parametrize("way", ["zoo", "modern", "external"])
@pytest.mark.parametrize("name", FIXTURES)
def test_converted_files_agree_with_pytorch(fixtures: Path, tmp_path: Path, name: str, way: str) -> None:
    lm_head = name != "zoo_base"
    convert(fixtures / name, tmp_path / "out", **WAYS[way] | {"lm_head": lm_head})
    assert run_samples(tmp_path / "out") < 2e-5
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    before, after = loaded(fixtures / name), loaded(tmp_path / "out")
    assert set(before) == set(after)
    for key, array in before.items():
        assert np.array_equal(array, after[key])
    compared = 0
    for path in sorted((fixtures / name).glob("test_data_set_*")):
        ids, *past = (numpy_helper.to_array(onnx.load_tensor(p)) for p in sorted(path.glob("input_*.pb")))
        if any(array.ndim == 4 and array.shape[2] for array in past):
            continue  # starts from a past, which these files do not take
        ids = ids.reshape(-1, ids.shape[-1])
        ones, positions = np.ones_like(ids), np.arange(ids.shape[1]) + 0 * ids
        feeds = {"input_ids": ids, "attention_mask": ones, "position_ids": positions}
        feeds = feeds if way == "modern" else {"input1": ids[None]}
        expected = numpy_helper.to_array(onnx.load_tensor(path / "output_0.pb"))
        output = session.run(None, feeds)[0]
        np.testing.assert_allclose(output.reshape(expected.shape), expected, rtol=1e-3, atol=1e-5)
        compared += expected.size
    assert compared > 1000


def test_tokenizer_files_come_along(tmp_path: Path) -> None:
    checkpoint(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    (tmp_path / "hf" / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "hf" / "secret.txt").write_text("stays")
    convert(tmp_path / "hf", tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"model.onnx", "tokenizer.json", "merges.txt", *(f"test_data_set_{i}" for i in range(4))}


def test_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "out", external_data=True)
    out = capsys.readouterr().out
    assert re.search(r"^ +[\d,]+ +.*model.onnx$", out, re.MULTILINE)
    assert re.search(r"^ +[\d,]+ +.*model.onnx_data$", out, re.MULTILINE)
    assert f"gpt2np parity {tmp_path / 'out'}" in out


def test_never_overwrites_and_leaves_nothing_half_done(tmp_path: Path) -> None:
    checkpoint(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "out")
    with pytest.raises(InputError, match="already holds"):
        convert(tmp_path / "hf", tmp_path / "out")
    with pytest.raises(InputError, match="already holds model.onnx"):
        convert(tmp_path / "out", tmp_path / "out")
    with pytest.raises(InputError, match="is not a folder"):
        convert(tmp_path / "hf", tmp_path / "hf" / "config.json")
    with pytest.raises(InputError, match="past inputs need opset 17"):
        convert(tmp_path / "hf", tmp_path / "fresh", opset=12, with_past=True)
    data = (tmp_path / "hf" / "model.safetensors").read_bytes()
    (tmp_path / "hf" / "model.safetensors").write_bytes(data[:-4])
    with pytest.raises(ModelFileError):
        convert(tmp_path / "hf", tmp_path / "fresh")
    assert not (tmp_path / "fresh").exists()


def test_a_failure_in_the_middle_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path / "hf")
    monkeypatch.setattr("gpt2np.convert.sample_data.save_set", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        convert(tmp_path / "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


BROKEN: list[tuple[dict[str, Any], type[Gpt2npError], str]] = [
    ({"model_type": "llama"}, UnsupportedModelError, "'llama', not gpt2"),
    ({"activation_function": "mish"}, UnsupportedModelError, "'mish' is none of"),
    ({"add_cross_attention": True}, UnsupportedModelError, "add_cross_attention"),
    ({"n_head": 5}, ModelFileError, "n_embd 12 is not divisible by n_head 5"),
    ({"n_layer": 3}, WeightError, r"h\.2\.ln_1\.weight .* is missing"),
    ({"n_layer": 1}, WeightError, r"h\.1\.\S+ is no weight"),
    ({"n_layer": "2"}, ModelFileError, "n_layer must be a number"),
    ({"vocab_size": None}, ModelFileError, "vocab_size must be a number"),
    ({"vocab_size": 38}, WeightError, r"wte.weight has shape \(37, 12\), but config.json says \(38, 12\)"),
    ({"layer_norm_epsilon": "small"}, ModelFileError, "layer_norm_epsilon"),
    ({"tie_word_embeddings": False}, WeightError, r"lm_head.weight \(37, 12\) is missing"),
]


@pytest.mark.parametrize(("config", "kind", "message"), BROKEN, ids=str)
def test_a_config_that_does_not_fit(
    tmp_path: Path, config: dict[str, Any], kind: type[Gpt2npError], message: str
) -> None:
    checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(HF | config))
    with pytest.raises(kind, match=message):
        read_checkpoint(tmp_path)


def header(**changes: Any) -> bytes:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    text = json.dumps({"wte.weight": entry | changes}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no safetensors file"),
        (b"\xff" * 30, "no safetensors file"),
        (struct.pack("<Q", 5) + b"[1,2]" + bytes(9), "no JSON object"),
        (struct.pack("<Q", 5) + b"{abc}" + bytes(9), "is not JSON"),
        (struct.pack("<Q", 2) + b"\xff\xfe" + bytes(9), "is not JSON"),
        (header(shape=[3]), r"F32 \[3\] takes 12 bytes, not 8"),
        (header(shape=[-2]), "not lists of sizes"),
        (header(data_offsets=[0, 9]), "bytes 0 to 9 of the 8"),
        (header(data_offsets=[8, 0]), "bytes 8 to 0 of the 8"),
        (header(data_offsets=[0]), "not lists of sizes"),
        (header(dtype="F128"), "type 'F128'"),
    ],
)
def test_a_safetensors_file_that_is_broken(tmp_path: Path, content: bytes, message: str) -> None:
    checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelFileError, match=message):
        read_checkpoint(tmp_path)


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="No such file"):
        open_source(tmp_path / "none.onnx")
    with pytest.raises(ModelFileError, match="No such file"):
        open_source(tmp_path / "none")
    with pytest.raises(ModelFileError, match="neither instead of model.safetensors or an ONNX file"):
        open_source(tmp_path)
    checkpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelFileError, match="config.json"):
        open_source(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelFileError, match="pytorch_model.bin, a PyTorch pickle"):
        open_source(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(ModelFileError, match="not the name of a file in the same folder"):
        open_source(tmp_path)
    index.write_text("{}")
    with pytest.raises(ModelFileError, match="no weight_map"):
        open_source(tmp_path)


def test_padding_is_recorded_where_the_file_knows_it() -> None:
    assert all(s.real.all() for s in samples(50, 20, modern=False, with_past=False))
    assert not all(s.real.all() for s in samples(50, 20, modern=True, with_past=False))
    past = samples(50, 20, modern=True, with_past=True)
    assert {s.past for s in past} == {0, 3, 4}
    assert not past[-1].real.all()
    for n_ctx in (1, 2, 3):  # shorter than every sample
        assert all(s.past < s.input_ids.shape[1] <= n_ctx for s in samples(50, n_ctx, modern=True, with_past=True))


@pytest.mark.parametrize(
    ("text", "size"), [("2GB", 2 * 10**9), ("500 mb", 5 * 10**8), ("1.5K", 1500), ("1000", 1000), ("7B", 7)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "0", "2TB", "1e9"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="a size such as 2GB"):
        parse_size(text)


# --- synth -------------------------------------------------------------------------------------------------------


def test_synth_is_the_same_everywhere(tmp_path: Path) -> None:
    synth("2,3,12,20,37", 5, tmp_path / "a")
    synth("2,3,12,20,37", 5, tmp_path / "b", with_past=True)
    synth("2,3,12,20,37", 6, tmp_path / "c")
    a, b, c = (loaded(tmp_path / name) for name in "abc")
    assert all(np.array_equal(a[name], b[name]) for name in a)
    assert not any(np.array_equal(a[name], c[name]) for name in a)
    assert run_samples(tmp_path / "a") < 1e-5
    assert run_samples(tmp_path / "b") < 1e-5
    digest = hashlib.sha256(b"".join(a[name].tobytes() for name in sorted(a))).hexdigest()
    assert digest == "75898b00cb0b4cc54c669bf8dd703cc7ee253af95a28d056f8905a2139cee06a"


def test_synthetic_weights_have_a_trained_models_spread() -> None:
    weights = random_weights(make_config(1, 4, 256, 64, 2000), 0)
    for name, (mean, deviation) in {
        "wte.weight": (0, 0.14),
        "wpe.weight": (0, 0.12),
        "h.0.attn.c_attn.weight": (0, 1 / 16),
        "h.0.mlp.c_proj.weight": (0, 1 / 32),
        "h.0.mlp.c_fc.bias": (0, 0.1),
        "h.0.ln_1.weight": (1, 0.2),
    }.items():
        array = weights[name].load()
        assert array.dtype == np.float32
        assert weights[name].spread == pytest.approx((mean, deviation))
        assert abs(array.mean() - mean) < 5 * deviation / array.size**0.5
        assert array.std() == pytest.approx(deviation, rel=5 / array.size**0.5)
        assert len(np.unique(array)) > 0.5 * array.size or array.size > 1 << 17
    assert not np.array_equal(weights["h.0.ln_1.bias"].load(), weights["h.0.ln_2.bias"].load())


def test_synth_sizes() -> None:
    assert (parse_config("xl").n_layer, parse_config("xl").n_head, parse_config("xl").n_embd) == (48, 25, 1600)
    assert parse_config("gpt2") == make_config(12, 12, 768)
    assert parse_config(" 2, 3,12,20") == make_config(2, 3, 12, 20)
    for text in ("", "huge", "1,2", "1,2,3,4,5,6", "0,1,2", "1,1,99999999", "1,1,-4"):
        with pytest.raises(InputError, match="size must be gpt2, medium"):
            parse_config(text)
    with pytest.raises(InputError, match="not divisible"):
        parse_config("2,5,12")


def test_synth_names_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    synth("1,1,4,4,7", 3)
    assert (tmp_path / "gpt2np-synth-1-1-4-4-7-3" / "model.onnx").exists()
    shutil.rmtree(tmp_path / "gpt2np-synth-1-1-4-4-7-3")


@pytest.mark.parametrize("mask", [{"kind": "none"}, {"value": -2.0}], ids=str)
def test_a_graph_that_hides_nothing_is_not_converted(tmp_path: Path, mask: dict[str, Any]) -> None:
    """The written graphs would give other numbers."""
    config = tiny_config(mask=MaskRule(**mask))
    with pytest.raises(UnsupportedModelError, match="later keys"):
        write_folder(tmp_path / "out", config, tiny_sources(config), choose(None, False, False, False, None), [])
    assert not (tmp_path / "out").exists()
