"""What `parity`, `diff` and `trace` share: options of what is compared, and the delivery of a report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..parity.report import Report

PromptOption = Annotated[list[str] | None, typer.Option(help="run on this text (needs a tokenizer)")]
IdsOption = Annotated[
    list[str] | None, typer.Option(metavar="1,2,3|FILE", help="run on these token ids (.npy, .npz or text)")
]
PresetOption = Annotated[
    str, typer.Option(help="budget: zoo, onnx, ort-gpt2, strict; auto: zoo, beyond which float64 decides")
]
ToleranceOption = Annotated[list[str] | None, typer.Option(metavar="[NAME:]V", help="for all outputs, or one")]
PaddingOption = Annotated[bool, typer.Option("--padding", help="compare rows of padding, too: nothing defines them")]
SearchTimeOption = Annotated[float, typer.Option(min=0, metavar="SECONDS", help="processor time to look for the cause")]
JsonOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="write everything as JSON; - prints it instead of the report")
]
JunitOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="write one test case for each output and check, as JUnit XML")
]
MarkdownOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="write a summary as Markdown; in GitHub Actions the job gets one")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="print no report: the exit code and the files say it")]


def deliver(report: Report, json: Path | None, junit: Path | None, markdown: Path | None, quiet: bool) -> None:
    """Print a report, write the files that were asked for, and tell GitHub Actions where that is running."""
    from .. import github
    from ..files import write_text
    from ..parity.markdown import markdown_of
    from ..parity.report import as_json, junit_of
    from ..parity.text import WIDTH, lines_of
    from ._terminal import console

    made = ((json if str(json) != "-" else None, as_json), (junit, junit_of), (markdown, markdown_of))
    for path, text_of in made:
        if path is not None:
            write_text(path, text_of(report))
    if github.has_summary():
        github.add_summary(markdown_of(report))
    # files first: the reader of the report may leave early, as in `| head`
    if str(json) == "-":
        sys.stdout.write(as_json(report))
    elif not quiet:
        out = console()
        for text, style in lines_of(report, min(out.width, WIDTH) if out.is_terminal else WIDTH):
            out.print(text, style=style or None)
    if github.in_actions() and report.exit_code and str(json) != "-":
        file, line = report.port or (None, None)
        message = "; ".join(text for text in (report.headline or "numbers differ", report.who, report.next) if text)
        if report.exit_code == 3:
            message = "nothing was compared"
        print(github.error(message, f"gpt2np: {report.title}", file, line))
