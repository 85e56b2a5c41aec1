"""`gpt2np convert`: any GPT-2 that gpt2np reads -> a folder with model.onnx and recorded sample data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[
        Path, typer.Argument(help="A Hugging Face folder, a .safetensors file beside its config.json, or an ONNX file.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write; it must not hold a model yet.")],
    lm_head: Annotated[bool, typer.Option("--lm-head", help="Put out logits, not the last hidden state.")] = False,
    with_past: Annotated[
        bool, typer.Option("--with-past", help="Take and return keys and values (implies --lm-head, opset 17).")
    ] = False,
    external_data: Annotated[
        bool, typer.Option("--external-data", help="Keep the weights in files beside model.onnx; chosen above 2 GB.")
    ] = False,
    max_file_size: Annotated[
        str | None, typer.Option(help="Spread external data over files of at most this size, such as 2GB.")
    ] = None,
    opset: Annotated[
        int | None, typer.Option(help="10 to 16: the zoo's graph (default 10); 17 and newer: a modern one.")
    ] = None,
) -> None:
    """Write a GPT-2 as model.onnx, in the ONNX Model Zoo's form or a modern one, with recorded sample data.

    The sample data (test_data_set_0 ...) is computed in float64 by the textbook. Tokenizer files beside the
    source are copied. Weights become float32. Where a query sees padding alone the result is that of the written
    graph, not of the source's: graphs differ there.
    """
    from ..convert.folder import TOKENIZER_FILES, check_output, choose, open_source, write_folder
    from ._terminal import note

    options = choose(opset, lm_head, with_past, external_data, max_file_size)
    check_output(output)
    config, weights, folder = open_source(source)
    tokenizer = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    show_written(output, write_folder(output, config, weights, options, tokenizer, note))


def show_written(output: Path, files: list[Path]) -> None:
    """List the files that were written, with their sizes, and say how to check them."""
    from ._terminal import console

    out = console()
    for path in files:
        if path.is_file():
            out.print(f"{path.stat().st_size:>14,}  {path}")
    out.print(f"Check it: gpt2np parity {output}")
