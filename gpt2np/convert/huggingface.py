"""Read a GPT-2 as Hugging Face keeps it: model.safetensors (in one file or in shards) and config.json.

The format, https://huggingface.co/docs/safetensors: eight bytes with the length of a JSON header, the header
with each tensor's type, shape and place, then the bytes of all tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from ..activations import ACTIVATIONS
from ..config import GPT2Config
from ..errors import ModelFileError, UnsupportedModelError, WeightError
from ..files import MAX_JSON, File, json_object
from ..onnx.read.tensors import Tensor
from ..weights import Array, WeightSource, weight_shapes

# Types that a weight may have. ml_dtypes' bfloat16 is float32 without its lower half.
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "bfloat16"}
OTHERS = {"I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}  # buffers, such as the causal mask
CHECKPOINT_ACTIVATIONS = {name: ours for ours, row in ACTIVATIONS.items() for name in row.checkpoint_names}


@dataclass(frozen=True)
class Float32:
    """A tensor of another float type, read as float32 (exact, but for float64)."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    def load(self) -> Array:
        return self.tensor.load().astype(np.float32, copy=False)


def read_header(path: Path) -> dict[str, Tensor]:
    """Every float tensor of one .safetensors file, checked but not yet read.

    Raises
    ------
    ModelFileError
        If the file is not safetensors, is truncated, or a tensor's type, shape and place contradict each other.
    """
    import ml_dtypes

    file = File(path)
    with file.open() as opened:
        length = int.from_bytes(opened.read(8), "little")
        if file.size < 10 or length > min(MAX_JSON, file.size - 8):
            raise ModelFileError(f"{path} is no safetensors file: a header of {length} bytes in {file.size}")
        text = opened.read(length)
    start = 8 + length
    tensors: dict[str, Tensor] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in json_object(text, f"the header of {path}").items():
        if name == "__metadata__":
            continue
        try:
            kind, shape, place = _checked_entry(entry, file.size - start)
        except ValueError as error:
            raise ModelFileError(f"{path}: tensor {name!r}: {error}") from None
        spans.append((place[0], place[1], name))
        if kind in DTYPES:
            dtype = np.dtype(ml_dtypes.bfloat16 if kind == "BF16" else DTYPES[kind])
            pieces = ((start + place[0], place[1] - place[0]),)
            tensors[name] = Tensor(name, dtype, shape, pieces[0][1], path.name, _file=file, _pieces=pieces)
    spans.sort()
    for (_, end, name), (begin, _, other) in pairwise(spans):
        if begin < end:  # a small file could name a large one's worth of weights
            raise ModelFileError(f"{path}: tensors {name!r} and {other!r} share bytes")
    return tensors


def _checked_entry(entry: Any, available: int) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """Type, shape and place of one entry of the header; a ValueError says what is wrong with it."""
    if not isinstance(entry, dict):
        raise ValueError("its entry is no object")
    kind, shape, place = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not _sizes(shape) or not _sizes(place) or len(place) != 2 or len(shape) > 32:
        raise ValueError(f"shape {str(shape)[:80]} or data_offsets {str(place)[:80]} are not lists of sizes")
    begin, end = place
    if not begin <= end <= available:
        raise ValueError(f"bytes {begin} to {end} of the {available} that the file has")
    if not isinstance(kind, str) or kind not in DTYPES.keys() | OTHERS:
        raise ValueError(f"its type {str(kind)[:40]!r} is none that a weight can have ({', '.join(DTYPES)})")
    if kind in DTYPES:
        nbytes = math.prod(shape) * (2 if kind == "BF16" else np.dtype(DTYPES[kind]).itemsize)
        if nbytes != end - begin:
            raise ValueError(f"{kind} {shape} takes {nbytes} bytes, not {end - begin}")
    return kind, tuple(shape), (begin, end)


def read_checkpoint(path: Path) -> tuple[GPT2Config, dict[str, WeightSource]]:
    """The configuration and the weights of a Hugging Face GPT-2.

    Parameters
    ----------
    path : Path
        A folder with config.json and either model.safetensors or model.safetensors.index.json with its shards;
        or one of the two latter files.

    Raises
    ------
    ModelFileError
        If a file is missing or malformed.
    UnsupportedModelError
        If config.json describes another model than GPT-2, or something of it that gpt2np cannot run.
    WeightError
        If a weight is missing, left over, or of another shape than config.json says.
    """
    tensors: dict[str, Tensor] = {}
    for file in _files(path):
        tensors |= read_header(file)
    folder = path if path.is_dir() else path.parent
    raw = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    if len(raw) != len(tensors):
        raise WeightError(f"{path}: a weight is there twice, with and without 'transformer.' before its name")
    config = read_config(folder / "config.json")
    expected = weight_shapes(config)
    sources: dict[str, WeightSource] = {}
    for name, tensor in raw.items():
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # mask buffers of older releases
        if name == "lm_head.weight" and config.tied:
            continue  # the checkpoint repeats wte, which is what Hugging Face then uses
        if name not in expected and name != "lm_head.bias":
            raise WeightError(f"{path}: {name} is no weight of a GPT-2 language model with this config.json")
        sources[name] = Float32(tensor)
    for name, shape in expected.items():
        if name not in sources:
            raise WeightError(f"{path}: weight {name} {shape} is missing")
        if sources[name].shape != shape:
            raise WeightError(f"{path}: weight {name} has shape {sources[name].shape}, but config.json says {shape}")
    return config, sources


def read_config(path: Path) -> GPT2Config:
    """GPT2Config from Hugging Face's config.json."""
    return parse_config(json_object(File(path).read(), str(path)), path)


def parse_config(config: dict[str, Any], path: Path) -> GPT2Config:
    """GPT2Config from the content of Hugging Face's config.json; path: where it is from, for messages."""
    if config.get("model_type", "gpt2") != "gpt2":
        raise UnsupportedModelError(f"{path} describes a model of type {str(config['model_type'])[:80]!r}, not gpt2")
    if config.get("add_cross_attention"):
        raise UnsupportedModelError(f"{path}: add_cross_attention is not part of GPT-2")

    def size(key: str, default: int | None = None, limit: int = 1 << 31) -> int:
        value = config.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 < value < limit:
            raise ModelFileError(f"{path}: {key} must be a number from 1 to {limit - 1}, got {str(value)[:80]}")
        return value

    C, H = size("n_embd"), size("n_head")
    if C % H:
        raise ModelFileError(f"{path}: n_embd {C} is not divisible by n_head {H}")
    activation = config.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in CHECKPOINT_ACTIVATIONS:
        raise UnsupportedModelError(
            f"{path}: activation_function {str(activation)[:80]!r} is none of {', '.join(CHECKPOINT_ACTIVATIONS)}"
        )
    epsilon = config.get("layer_norm_epsilon", 1e-5)
    if not isinstance(epsilon, int | float) or not 0 <= epsilon < 1:
        raise ModelFileError(f"{path}: layer_norm_epsilon must be a small positive number, got {str(epsilon)[:80]}")
    scale = 1 / math.sqrt(C // H) if config.get("scale_attn_weights", True) else 1.0
    L = size("n_layer", limit=10_000)
    overrides: tuple[tuple[str, float | str], ...] = ()
    if config.get("scale_attn_by_inverse_layer_idx", False):
        overrides = tuple((f"h.{i}.attn.scale", scale / (i + 1)) for i in range(1, L))
    return GPT2Config(
        n_layer=L,
        n_head=H,
        n_embd=C,
        n_ctx=size("n_positions", config.get("n_ctx")),
        vocab_size=size("vocab_size"),
        n_inner=size("n_inner", 4 * C),
        head_size=C // H,
        layer_norm_epsilon=float(epsilon),
        activation=CHECKPOINT_ACTIVATIONS[activation],
        attn_scale=scale,
        tied=bool(config.get("tie_word_embeddings", True)),
        overrides=overrides,
    )


def _files(path: Path) -> list[Path]:
    """The .safetensors files that a path means."""
    index = path
    if path.is_dir():
        if (path / "model.safetensors").exists():
            return [path / "model.safetensors"]
        index = path / "model.safetensors.index.json"
        if not index.exists():
            pickled = next((p.name for p in path.glob("*.bin")), None)
            found = (
                f"{pickled}, a PyTorch pickle (save it again with safe_serialization=True)" if pickled else "neither"
            )
            raise ModelFileError(f"{path} has {found} instead of model.safetensors or an ONNX file")
    if index.suffix != ".json":
        return [path]
    names = json_object(File(index).read(), str(index)).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(n, str) for n in names.values()):
        raise ModelFileError(f"{index} has no weight_map from weights to files")
    for name in names.values():
        if Path(name).name != name:
            raise ModelFileError(f"{index}: {name!r} is not the name of a file in the same folder")
    return [index.parent / name for name in dict.fromkeys(names.values())]


def _sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 48 for v in value)
