"""GPT-2s written for other programs: as a Hugging Face checkpoint, or as llama.cpp's GGUF."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .. import tokenizer
from ..activations import ACTIVATIONS
from ..config import GPT2Config
from ..errors import UnsupportedModelError
from ..optional import needs
from ..weights import Array, WeightSource, is_matrix, weight_shapes
from .huggingface import parse_config

# llama.cpp's names of the weights (gguf-py/gguf/constants.py, MODEL_ARCH.GPT2), those of layer i behind "blk.i.".
GGUF_NAMES = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "lm_head": "output",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def write_checkpoint(folder: Path, config: GPT2Config, weights: Mapping[str, WeightSource]) -> None:
    """Write model.safetensors (float32) and config.json, which `huggingface.read_checkpoint` reads back.

    Raises
    ------
    UnsupportedModelError
        If config.json cannot say what the configuration asks for.
    """
    (folder / "config.json").write_text(json.dumps(config_json(config, weights), indent=2) + "\n")
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in weight_shapes(config).items():
        begin, end = end, end + 4 * math.prod(shape)
        stored = name if name.startswith("lm_head") else f"transformer.{name}"
        header[stored] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in weight_shapes(config):
            file.write(_float32(weights[name]).data)


def config_json(config: GPT2Config, weights: Mapping[str, WeightSource]) -> dict[str, Any]:
    """What Hugging Face's config.json says about a GPT-2; masks are left out, as every program has its own."""
    inverse = any(key.endswith(".attn.scale") for key, _ in config.overrides)
    described = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_positions": config.n_ctx,
        "n_inner": config.n_inner,
        "vocab_size": config.vocab_size,
        "activation_function": ACTIVATIONS[config.activation].checkpoint_names[0],
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "scale_attn_weights": config.head_size == 1 or not math.isclose(config.attn_scale, 1, rel_tol=1e-6),
        "scale_attn_by_inverse_layer_idx": inverse,
        "tie_word_embeddings": config.tied,
        "torch_dtype": "float32",
    }
    if config.n_embd % config.n_head:
        raise UnsupportedModelError(f"config.json has no word for heads of {config.head_size} in {config.n_embd}")
    ours, theirs = _behaviour(config), _behaviour(parse_config(described, Path("config.json")))
    if config.mask.kind == "none" or config.mask.value > -1e3:
        raise UnsupportedModelError(f"{config.mask.describe()}, which does not hide them as other programs do")
    if "lm_head.bias" in weights:
        raise UnsupportedModelError("its head has a bias, for which config.json has no word")
    for what, value in ours.items():
        same = math.isclose(value, theirs[what], rel_tol=1e-6) if isinstance(value, float) else value == theirs[what]
        if not same:
            raise UnsupportedModelError(f"config.json has no word for {what} {value} (it would be {theirs[what]})")
    return described


def _behaviour(config: GPT2Config) -> dict[str, Any]:
    """Everything that results depend on besides the weights and the mask, layer by layer."""
    layers = range(config.n_layer)
    norms = [f"h.{i}.{norm}" for i in layers for norm in ("ln_1", "ln_2")] + ["ln_f"]
    return {
        "head_size": config.head_size,
        "position_offset": config.position_offset,
        **{f"h.{i}.attn.scale": config.layer_scale(i) for i in layers},
        **{f"h.{i}.mlp.activation": config.layer_activation(i) for i in layers},
        **{f"{name}.epsilon": config.epsilon(name) for name in norms},
    }


def write_gguf(folder: Path, config: GPT2Config, weights: Mapping[str, WeightSource], vocabulary: Path) -> None:
    """Write model.gguf, float32, with the tokenizer that lies in the folder `vocabulary` (without one: none).

    The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. llama.cpp can then make smaller types.

    Raises
    ------
    UnsupportedModelError
        If llama.cpp's GPT-2 computes something else than the configuration asks for.
    MissingPackageError
        If the package gguf is not installed.
    """
    with needs("gguf", "writing GGUF"):
        import gguf
    described = config_json(config, weights)
    for key, value in (
        ("activation_function", "gelu_new"),
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
    ):
        if described[key] != value:
            raise UnsupportedModelError(f"llama.cpp's GPT-2 has {key} {value}, not {described[key]}")
    writer = gguf.GGUFWriter(folder / "model.gguf", "gpt2")
    writer.add_context_length(config.n_ctx)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    _add_tokenizer(writer, vocabulary, config.vocab_size)
    shapes = {name: shape[::-1] if _turned(name) else shape for name, shape in weight_shapes(config).items()}
    for name, shape in shapes.items():
        writer.add_tensor_info(_gguf_name(name), shape, np.dtype(np.float32), 4 * math.prod(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in shapes:
        array = _float32(weights[name])
        writer.write_tensor_data(np.ascontiguousarray(array.T) if _turned(name) else array)
    writer.close()


def _add_tokenizer(writer: Any, vocabulary: Path, size: int) -> None:
    found = tokenizer.find_beside(vocabulary)
    if found is None:
        writer.add_tokenizer_model("no_vocab")
        return
    model = json.loads(found.to_str())["model"]
    tokens = {i: token for token, i in found.get_vocab(with_added_tokens=True).items()}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([tokens.get(i, f"[PAD{i}]") for i in range(size)])
    special = found.token_to_id(tokenizer.END_OF_TEXT)
    normal, control, unused = 1, 3, 5  # gguf.TokenType
    writer.add_token_types([control if i == special else normal if i in tokens else unused for i in range(size)])
    writer.add_token_merges(merges)
    if special is not None:
        writer.add_bos_token_id(special)
        writer.add_eos_token_id(special)
    writer.add_add_bos_token(False)


def _gguf_name(name: str) -> str:
    """llama.cpp's name of a weight: "h.3.attn.c_attn.bias" is "blk.3.attn_qkv.bias"."""
    place, _, kind = name.rpartition(".")
    if place.startswith("h."):
        _, layer, place = place.split(".", 2)
        return f"blk.{layer}.{GGUF_NAMES[place]}.{kind}"
    return f"{GGUF_NAMES[place]}.{kind}"


def _turned(name: str) -> bool:
    """Whether llama.cpp keeps a matrix as (outputs, inputs) where GPT-2's checkpoints have (inputs, outputs)."""
    return is_matrix(name) and name.startswith("h.")


def _float32(source: WeightSource) -> Array:
    return np.ascontiguousarray(source.load(), np.dtype("<f4"))
