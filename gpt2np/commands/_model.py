"""What the commands that work on text share: the model, its tokenizer, and reading input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import TokenizerError
from ..files import located, read_all
from ._terminal import note

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
WeightsOption = Annotated[
    str | None,
    typer.Option(
        metavar="FORM",
        help="Round the matrices to float32, bfloat16, float16, int8 or int4. [default: the file's numbers]",
    ),
]


def named_model(given: str | None) -> Path:
    """The path of a model option or argument: a path, a fetched model's name, "mini" or None for the embedded one."""
    from .. import zoo
    from ..paths import embedded_model_path, shown

    embedded = given is None or (given == "mini" and not Path(given).exists())
    return shown(embedded_model_path().parent if embedded else zoo.find(str(given)))


def named_party(given: str) -> str:
    """A party of a comparison, or a source of weights; a name of a model is replaced by its path."""
    from ..zoo.manifest import entries

    return str(named_model(given)) if given == "mini" or given in entries() or Path(given).exists() else given


def load_model(
    model: str | None, tokenizer: Path | None, engine: str, dtype: str = "float32", weights: str | None = None
) -> GPT2:
    """The model of the option --model with the tokenizer of --tokenizer, or the one beside it.

    Raises
    ------
    TokenizerError
        If there is no tokenizer, before the model is read.
    """
    from .. import tokenizer as tokenizers
    from ..model import load

    path = named_model(model)
    found = tokenizers.find_beside(path) if tokenizer is None else tokenizers.load(tokenizer)
    if found is None:
        raise TokenizerError(f"there is no tokenizer beside {path}; {tokenizers.HOW_TO_GET_ONE}")
    loaded = load(path, engine, dtype, weights)
    loaded.tokenizer = found
    if engine == "numba":
        from ..kernels import needs_compilation

        if needs_compilation():
            note("Compiling the kernels, which takes half a minute or so the first time.")
    return loaded


def read_text(path: Path) -> str:
    """A file's text, or standard input's for "-"; line ends stay as they are."""
    raw = sys.stdin.buffer.read() if str(path) == "-" else read_all(path)
    with located(path):
        return raw.decode()
