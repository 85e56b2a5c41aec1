"""What the commands that work on text share: the model, its tokenizer, and reading input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError

if TYPE_CHECKING:
    from ..model import GPT2

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", metavar="PATH", help="model.onnx, its folder, or a fetched model's name. [default: embedded]"
    ),
]
TokenizerOption = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        help="tokenizer.json, or a folder with it or with vocab.json or encoder.json and merges.txt or vocab.bpe. "
        "[default: beside the model]",
    ),
]
EngineOption = Annotated[str, typer.Option(help="numba: compiled kernels; numpy: the textbook.")]


def load_model(model: str | None, tokenizer: Path | None, engine: str, dtype: str = "float32") -> GPT2:
    """The model of the option --model with the tokenizer of --tokenizer."""
    from .. import tokenizer as tokenizers
    from .. import zoo
    from ..model import load

    given = None if tokenizer is None else tokenizers.load(tokenizer)
    loaded = load(None if model is None else zoo.find(model), engine, dtype)
    if given is not None:
        loaded.tokenizer = given
    return loaded


def read_text(path: Path) -> str:
    """A file's text, or standard input's for "-"; line ends stay as they are."""
    try:
        raw = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        return raw.decode()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}") from None
