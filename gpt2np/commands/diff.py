"""`gpt2np diff`: two parties tap by tap."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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


def diff(
    a: Annotated[
        str, typer.Argument(help="a model (path, or a name: gpt2-10, mini), an .npz, or package.module:function")
    ],
    b: Annotated[str, typer.Argument(help="the other one")],
    oracle: Annotated[
        str | None, typer.Option(help="arbiter: a model.onnx or a float64 trace; default: A in float64")
    ] = None,
    local: Annotated[bool, typer.Option("--local", help="every tap with what its operation itself added")] = False,
    dump_repro: Annotated[
        Path | None, typer.Option(help="write the divergent operation alone into this folder")
    ] = None,
    replace: Annotated[
        list[str] | None, typer.Option(metavar="TAP", help="run B on with A's values of this tap: is the rest right?")
    ] = None,
    digits: Annotated[
        bool, typer.Option("--digits", help="significant digits of each tap, by random rounding")
    ] = False,
    data: Annotated[list[Path] | None, typer.Option(help="a test_data_set folder, or a folder of them")] = None,
    prompt: PromptOption = None,
    ids: IdsOption = None,
    random: Annotated[int, typer.Option(min=0, help="run on random prompts")] = 0,
    seed: Annotated[int, typer.Option(help="of the random prompts")] = 0,
    preset: PresetOption = "auto",
    rtol: ToleranceOption = None,
    atol: ToleranceOption = None,
    padding: PaddingOption = False,
    search_time: SearchTimeOption = 60.0,
    json: JsonOption = None,
    junit: JunitOption = None,
    markdown: MarkdownOption = None,
    quiet: QuietOption = False,
    html: Annotated[Path | None, typer.Option(help="write a page to look at, with every tap")] = None,
) -> None:
    """Find the first operation in which two models, traces or functions differ.

    Each operation is fed with each party's own inputs, so that what it itself adds is told from what came in.
    Two traces are judged without running anything.

    Examples:

    - `gpt2np diff model.onnx mypackage.port:forward --prompt "Once upon a time"`
    - `gpt2np diff model.onnx port.npz --data test_data_set_0`
    - `gpt2np diff good.onnx bad.onnx --random 1 --dump-repro repro/`
    - `gpt2np diff golden.npz port.npz`

    An .npz is a trace, or what np.savez wrote under the names of outputs and taps; a folder of .npy, a .safetensors,
    or a .json beside raw .bin files ({"NAME": {"shape": [...], "dtype": "float32"}}) will do as well. Without an
    input, a few random prompts are compared. Exit code 0: no difference,
    1: a difference or a missing run, 2: usage or unreadable input, 3: nothing was compared.
    """
    from ..parity import cases
    from ..parity import diff as parity_diff
    from ..parity.subject import Subject
    from ._model import named_party
    from ._page import evidence_for, write_page
    from ._terminal import check_folder, check_writable, search_clock

    check_writable(None if str(json) == "-" else json, junit, markdown, html, quiet=quiet)
    if dump_repro is not None:
        check_folder(dump_repro, "replay.py")

    a, b = named_party(a), named_party(b)
    given = wanted(data, prompt, random, ids, parties=(a, b, oracle or ""))

    def inputs(model: Subject) -> list[cases.Case]:
        return cases.gather_cases(model, data or [], prompt or [], random, seed, ids or []) if given else []

    evidence = evidence_for(html)
    with search_clock(search_time) as clock:
        report = parity_diff.diff(
            a, b, inputs, oracle, preset, rtol or [], atol or [], local, dump_repro, padding, replace or [], digits,
            clock, evidence,
        )  # fmt: skip
    write_page(html, report, evidence)
    deliver(report, json, junit, markdown, quiet)
    raise typer.Exit(report.exit_code)


def wanted(*inputs: object, parties: tuple[str, ...]) -> bool:
    """Whether inputs are given; InputError where none of the parties is a model that could be run on them."""
    from ..parity.parties import model_of

    if any(inputs) and not any(map(model_of, parties)):
        raise InputError("--data, --prompt, --ids and --random are inputs for a model.onnx: traces hold their own")
    return any(inputs)
