"""`gpt2np parity`: are the outputs right, and if not, which operation is it?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer


def parity(
    model: Annotated[
        Optional[Path], typer.Argument(help="model.onnx or its folder; default: the embedded model")
    ] = None,  # noqa: UP045
    data: Annotated[Optional[list[Path]], typer.Option(help="test_data_set folder, or a folder of them")] = None,  # noqa: UP045
    engine: Annotated[str, typer.Option(help="ours: numba or numpy")] = "numba",
    rtol: Annotated[Optional[list[str]], typer.Option(help="V, or NAME:V for one output")] = None,  # noqa: UP045
    atol: Annotated[Optional[list[str]], typer.Option(help="V, or NAME:V for one output")] = None,  # noqa: UP045
    json: Annotated[Optional[Path], typer.Option(help="write the report as JSON")] = None,  # noqa: UP045
) -> None:
    """Compare ours, ONNX Runtime and the recorded outputs of a model, output by output."""
    from ..parity.debugger import Options, model_path
    from ..parity.debugger import parity as compare
    from ..parity.report import lines_of, write_json
    from ._terminal import console

    report = compare(Options(model_path(model), data=data or [], engine=engine, rtol=rtol or [], atol=atol or []))
    out = console()
    for text, style in lines_of(report):
        out.print(text, style=style or None)
    if json is not None:
        write_json(report, json)
    raise typer.Exit(report.exit_code)
