"""`gpt2np parity`: are the outputs right, and if not, which operation is it and why?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def parity(
    model: Annotated[Path | None, typer.Argument(help="model.onnx or its folder; default: the embedded model")] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PARTY",
            help="ort (default), ort-off, ort-1t, onnxref, numpy, numba, float64, another model.onnx, a trace.npz, "
            "or package.module:function; repeat for several",
        ),
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="a test_data_set folder or a folder of them; default: beside MODEL")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="run on this text (needs a tokenizer)")] = None,
    ids: Annotated[
        list[str] | None, typer.Option(metavar="1,2,3|FILE", help="run on these token ids (.npy, .npz or text)")
    ] = None,
    random: Annotated[int, typer.Option(min=0, help="run on that many random prompts")] = 0,
    seed: Annotated[int, typer.Option(help="of the random prompts")] = 0,
    engine: Annotated[str, typer.Option(help="ours: numba or numpy")] = "numba",
    preset: Annotated[
        str, typer.Option(help="budget: zoo, onnx, ort-gpt2, strict; auto: zoo, beyond which float64 decides")
    ] = "auto",
    rtol: Annotated[list[str] | None, typer.Option(metavar="[NAME:]V", help="for all outputs, or one")] = None,
    atol: Annotated[list[str] | None, typer.Option(metavar="[NAME:]V", help="for all outputs, or one")] = None,
    checks: Annotated[
        str,
        typer.Option(help="of outputs, taps, cache, chunk, prefix, batch, order, causal, determinism, finite; or all"),
    ] = "outputs",
    noise_floor: Annotated[
        bool, typer.Option("--noise-floor", help="take the budget from ONNX Runtime's difference from itself")
    ] = False,
    padding: Annotated[
        bool, typer.Option("--padding", help="compare rows of padding, too: nothing defines them")
    ] = False,
    search_time: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="processor time to look for the cause")
    ] = 60.0,
    json: Annotated[Path | None, typer.Option(help="write every metric and threshold")] = None,
    junit: Annotated[Path | None, typer.Option(help="write one test case for each output and check")] = None,
    html: Annotated[
        Path | None, typer.Option(help="write a page to look at, with every tap, which are then compared")
    ] = None,
    save_trace: Annotated[Path | None, typer.Option(help="write ours, all taps of the first input, as .npz")] = None,
) -> None:
    """Compare a model's outputs: ours, ONNX Runtime's and the recorded ones.

    Where they differ, says which operation is the first to differ and which mistake explains it. Exit code 0:
    pass, 1: a comparison failed, 2: usage or unreadable input, 3: nothing was compared.

    Examples:

    - `gpt2np parity`
    - `gpt2np parity model.onnx --checks all`
    - `gpt2np parity model.onnx --against mypackage.port:forward --random 3`
    - `gpt2np parity model.onnx --noise-floor --junit parity.xml --json parity.json`
    """
    from ..parity import capture, parties, run
    from ._page import evidence_for, write_page
    from ._terminal import check_writable, deliver, search_clock

    check_writable(json, junit, html, save_trace)
    names = tuple(dict.fromkeys([*run.parse_checks(checks), *(["taps"] if html is not None else [])]))
    options = capture.Options(
        parties.model_path(model), against or [], data or [], prompt or [], random, ids or [], seed, engine, preset,
        rtol or [], atol or [], names, noise_floor, padding,
    )  # fmt: skip
    evidence = evidence_for(html)
    with search_clock(search_time) as clock:
        report = run.parity(options, save_trace, clock, evidence)
    deliver(report, json, junit)
    write_page(html, report, evidence)
    raise typer.Exit(report.exit_code)
