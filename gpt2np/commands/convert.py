"""`gpt2np convert`: any GPT-2 that gpt2np reads -> a folder with it as ONNX, Hugging Face checkpoint or GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="A Hugging Face folder, a .safetensors file beside its config.json, an ONNX file, or its name: mini."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write; it must not hold a model yet.")],
    to: Annotated[
        str, typer.Option(help="onnx; huggingface: model.safetensors and config.json; gguf: for llama.cpp.")
    ] = "onnx",
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
    """Write a GPT-2 as model.onnx, in the ONNX Model Zoo's form or a modern one, or as other programs read it.

    model.onnx comes with recorded sample data (test_data_set_0 ...), computed in float64 by the textbook; the
    other options are for it. Tokenizer files beside the source are copied, or written into the GGUF file. Weights
    become float32. Where a query sees padding alone the result is that of what is written, not of the source's
    graph: they differ there.
    """
    from ..convert.folder import check_output, choose, open_source, tokenizer_files, write_folder, write_for_others
    from ._model import named_party
    from ._terminal import note

    given = {
        "--lm-head": lm_head,
        "--with-past": with_past,
        "--external-data": external_data,
        "--max-file-size": max_file_size is not None,
        "--opset": opset is not None,
    }
    if to != "onnx" and any(given.values()):
        names = ", ".join(name for name, there in given.items() if there)
        raise InputError(f"{names}: only model.onnx is written in several forms, not --to {to}")
    options = choose(opset, lm_head, with_past, external_data, max_file_size)
    check_output(output, to)
    config, weights, folder = open_source(Path(named_party(source)))
    if to == "onnx":
        written = write_folder(output, config, weights, options, tokenizer_files(folder), note)
    else:
        written = write_for_others(output, to, config, weights, folder)
    show_written(output, written)


def show_written(output: Path, files: list[Path]) -> None:
    """List the files that were written, with their sizes, and say how to check them."""
    from ._terminal import console

    out = console()
    for path in files:
        if path.is_file():
            out.print(f"{path.stat().st_size:>14,}  {path}")
    if any(path.suffix == ".onnx" for path in files):
        out.print(f"Check it: gpt2np parity {output}")
