"""`gpt2np synth`: a GPT-2 of any size with random weights, for tests of speed, memory and scale."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError

if TYPE_CHECKING:
    from ..config import GPT2Config


def synth(
    size: Annotated[
        str, typer.Option(help="gpt2, medium, large or xl; or L,H,C with optional N and V: layers, heads, width, ...")
    ] = "gpt2",
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same bits on every machine.")] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The folder to write; default gpt2np-synth-SIZE-SEED.")
    ] = None,
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
    """Write a GPT-2 with random weights of a trained model's spread, with recorded sample data."""
    from ..convert.folder import check_output, choose, write_folder
    from ..convert.synthetic import random_weights
    from ._terminal import note
    from .convert import show_written

    config = parse_config(size)
    options = choose(opset, lm_head, with_past, external_data, max_file_size)
    output = Path(f"gpt2np-synth-{size.replace(',', '-')}-{seed}") if output is None else output
    check_output(output)
    show_written(output, write_folder(output, config, random_weights(config, seed), options, [], note))


def parse_config(size: str) -> GPT2Config:
    """The configuration of "gpt2", "medium", "large", "xl", "L,H,C", "L,H,C,N" or "L,H,C,N,V"."""
    from ..convert.synthetic import SIZES, make_config

    if size in SIZES:
        return make_config(*SIZES[size])
    numbers = size.split(",")
    if not 3 <= len(numbers) <= 5 or not all(n.strip().isdecimal() and 0 < int(n) < 1 << 24 for n in numbers):
        raise InputError(f"size must be {', '.join(SIZES)} or L,H,C[,N[,V]] such as 6,8,512, got {size!r}")
    values = [int(n) for n in numbers]
    if values[2] % values[1]:
        raise InputError(f"the width C = {values[2]} is not divisible by the number of heads H = {values[1]}")
    return make_config(*values)
