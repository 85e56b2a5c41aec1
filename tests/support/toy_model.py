"""A tiny random model with a toy tokenizer, in memory or as a folder with both files."""

from __future__ import annotations

from pathlib import Path

from gpt2np.convert.writer import write_model
from gpt2np.model import GPT2
from tiny import tiny_config, tiny_sources
from toy_tokenizer import train

TOY = train()


def toy_model(engine: str = "numpy", dtype: str = "float32", n_ctx: int = 60) -> GPT2:
    config = tiny_config(vocab_size=TOY.get_vocab_size(), n_ctx=n_ctx)
    made = GPT2(config, tiny_sources(config), engine, dtype)
    made.tokenizer = TOY
    return made


def write_toy(folder: Path, tokenizer: bool = True, n_ctx: int = 60) -> Path:
    """The same model as a folder with model.onnx and tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(vocab_size=TOY.get_vocab_size(), n_ctx=n_ctx)
    write_model(folder / "model.onnx", config, tiny_sources(config), lm_head=True)
    if tokenizer:
        TOY.save(str(folder / "tokenizer.json"))
    return folder
