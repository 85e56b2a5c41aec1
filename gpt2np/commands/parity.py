"""`gpt2np parity`: are the outputs right, and if not, which operation is it and why?"""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError
from ._report import (
    IdsOption,
    JsonOption,
    JunitOption,
    MarkdownOption,
    PaddingOption,
    PresetOption,
    PromptOption,
    QuietOption,
    SearchTimeOption,
    ToleranceOption,
    deliver,
)
from ._shards import ClusterOption, ResultsOption, Shards, WorkersOption, open_shards, wanted

if TYPE_CHECKING:
    from ..parity.capture import Options

AgainstOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PARTY",
        help="ort (default), ort-off, ort-1t, onnxref, numpy, numba, float64, another model.onnx, a trace.npz, "
        "or package.module:function; repeat for several",
    ),
]
ChecksOption = Annotated[
    str, typer.Option(help="of outputs, taps, cache, chunk, prefix, batch, order, causal, determinism, finite; or all")
]


def parity(
    model: Annotated[
        list[str] | None,
        typer.Argument(help="model.onnx, its folder, or a fetched model's name, or several; default: embedded"),
    ] = None,
    against: AgainstOption = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="a test_data_set folder or a folder of them; default: beside MODEL")
    ] = None,
    prompt: PromptOption = None,
    ids: IdsOption = None,
    random: Annotated[int, typer.Option(min=0, help="run on that many random prompts")] = 0,
    seed: Annotated[int, typer.Option(help="of the random prompts")] = 0,
    engine: Annotated[str, typer.Option(help="ours: numba or numpy")] = "numba",
    preset: PresetOption = "auto",
    rtol: ToleranceOption = None,
    atol: ToleranceOption = None,
    checks: ChecksOption = "outputs",
    noise_floor: Annotated[
        bool, typer.Option("--noise-floor", help="take the budget from ONNX Runtime's difference from itself")
    ] = False,
    padding: PaddingOption = False,
    search_time: SearchTimeOption = 60.0,
    json: JsonOption = None,
    junit: JunitOption = None,
    markdown: MarkdownOption = None,
    quiet: QuietOption = False,
    html: Annotated[
        Path | None, typer.Option(help="write a page to look at, with every tap, which are then compared")
    ] = None,
    save_trace: Annotated[Path | None, typer.Option(help="write ours, all taps of the first input, as .npz")] = None,
    workers: WorkersOption = None,
    cluster: ClusterOption = None,
    results: ResultsOption = None,
) -> None:
    """Compare a model's outputs: ours, ONNX Runtime's and the recorded ones.

    Where they differ, says which operation is the first to differ and which mistake explains it. Exit code 0:
    pass, 1: a comparison failed, 2: usage or unreadable input, 3: nothing was compared.

    Examples:

    - `gpt2np parity`
    - `gpt2np parity model.onnx --checks all`
    - `gpt2np parity model.onnx --against mypackage.port:forward --random 3`
    - `gpt2np parity model.onnx --noise-floor --junit parity.xml --json parity.json`
    - `gpt2np parity models/*.onnx --random 10000 --workers 4` (one report for each 50 prompts: docs/scale.md)
    """
    from ..parity import capture, parties, run
    from ._model import named_model
    from ._page import evidence_for, write_page
    from ._terminal import check_writable, search_clock

    check_writable(None if str(json) == "-" else json, junit, markdown, html, save_trace, quiet=quiet)
    names = run.parse_checks(checks)
    given: list[str | None] = list(model) if model else [None]
    models = [parties.model_path(named_model(one)) for one in given]
    options = capture.Options(
        models[0], against or [], data or [], prompt or [], random, ids or [], seed,
        engine, preset, rtol or [], atol or [], names, noise_floor, padding,
    )  # fmt: skip
    if wanted(workers, cluster, results) or len(models) > 1:
        if any((junit, markdown, html, save_trace)):
            raise InputError("--junit, --markdown, --html and --save-trace are of one model in one process")
        with open_shards(workers, cluster, results) as shards:
            raise typer.Exit(_sweep(shards, options, models, search_time, json, quiet))
    evidence = evidence_for(html)
    with search_clock(search_time) as clock:
        report = run.parity(options, save_trace, clock, evidence)
    write_page(html, report, evidence)
    deliver(report, json, junit, markdown, quiet)
    raise typer.Exit(report.exit_code)


def _sweep(
    shards: Shards, options: Options, models: list[Path], search_time: float, json: Path | None, quiet: bool
) -> int:
    """Compare by shards, and tell what came out of them all; returns the exit code."""
    from ..cluster import sweep
    from ..files import write_text
    from ..schema import stamped
    from ._terminal import console, print_json, print_table

    pieces = sweep.report_shards(options, models, search_time)
    shards.compute(pieces, "comparing", "prompts")
    whole, lines = sweep.merged(pieces, shards.store)
    whole["cluster"] = shards.summary()
    if str(json) == "-":
        print_json("sweep", whole)
    elif json is not None:
        write_text(json, dumps(stamped("sweep", whole), indent=1, allow_nan=False) + "\n")
    if str(json) != "-" and not quiet:
        out = console()
        out.print(f"verdict: {whole['verdict'].upper()}\n")
        rows = [
            (row["model"], *(f"{row[name]:,}" for name in sweep.COUNTS), sweep.VERDICTS[row["exit_code"]].upper())
            for row in whole["models"]
        ]
        print_table(("model", *(f">{name}" for name in sweep.COUNTS), "verdict"), rows)
        for line in lines:
            out.print(line)
        shards.tell()
    return int(whole["exit_code"])
