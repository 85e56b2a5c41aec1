"""`gpt2np trace`: save outputs and intermediate results of one call."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._model import WeightsOption


def trace(
    model: Annotated[
        str | None,
        typer.Argument(help="model.onnx, its folder, or a fetched model's name; default: embedded"),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="the .npz to write")] = Path("trace.npz"),
    prompt: Annotated[str | None, typer.Option(help="run on this text (needs a tokenizer)")] = None,
    data: Annotated[Path | None, typer.Option(help="run on the input of this test_data_set folder")] = None,
    ids: Annotated[
        str | None, typer.Option(metavar="1,2,3|FILE", help="run on these token ids (.npy, .npz or text)")
    ] = None,
    random: Annotated[bool, typer.Option("--random", help="run on a random prompt")] = False,
    seed: Annotated[int, typer.Option(help="of the random prompt")] = 0,
    runner: Annotated[str, typer.Option(help="ours, ort, ort-off, onnxref, or package.module:function")] = "ours",
    taps: Annotated[
        list[str] | None, typer.Option(help=r"pattern of tap names, as 'h.\*.attn.\*'; default: all")
    ] = None,
    stats_only: Annotated[bool, typer.Option("--stats-only", help="keep rms, maximum and samples of each tap")] = False,
    dtype: Annotated[str, typer.Option(help="of ours: float32 or float64")] = "float32",
    engine: Annotated[str, typer.Option(help="of ours: numba or numpy")] = "numba",
    weights: WeightsOption = None,
    html: Annotated[
        Path | None, typer.Option(help="also write a page to look at: each tap's distance from float64")
    ] = None,
) -> None:
    """Save what a model computes inside, under the same tap names for every exporter and runtime.

    Examples:

    - `gpt2np trace --prompt "Once upon a time" -o golden.npz --dtype float64`
    - `gpt2np trace model.onnx --data test_data_set_0 --runner ort --taps 'h.*.attn.*' -o attention.npz`
    """
    from ..errors import InputError
    from ..parity import capture, parties
    from ..parity import trace as traces
    from ..parity.cases import gather_cases
    from ..parity.diff import against_float64
    from ..parity.subject import Subject
    from ._model import named_model
    from ._page import evidence_for, write_page
    from ._terminal import check_writable, console

    if sum((prompt is not None, data is not None, ids is not None, random)) != 1:
        raise InputError("give one of --prompt, --ids, --data and --random")
    if weights is not None and runner != "ours":
        raise InputError("--weights is of ours alone: another runner takes the file as it is")
    check_writable(output, html)
    evidence = evidence_for(html)
    subject = Subject(parties.model_path(named_model(model)))
    cases = gather_cases(
        subject, [] if data is None else [data], [] if prompt is None else [prompt], int(random), seed,
        [] if ids is None else [ids],
    )  # fmt: skip
    party = (
        parties.Ours(subject, engine if dtype == "float32" else "numpy", dtype, weights=weights)
        if runner == "ours"
        else parties.runner_of(subject, runner, engine)
    )
    made = capture.record(subject, party, cases[0], taps or ["*"])
    traces.save(output, made, stats_only)
    if evidence is not None:
        write_page(html, against_float64(subject, party, cases[0], made, evidence), evidence)
    what = f"{len(made.taps)} taps and {len(made.outputs)} outputs of {party.name} on {cases[0].name}"
    console().print(f"{output}: {what}, {output.stat().st_size:,} bytes")
    missing = made.manifest["taps_missing"]
    if missing:
        console().print(f"not in this graph: {', '.join(missing[:8])}{' ...' if len(missing) > 8 else ''}")
