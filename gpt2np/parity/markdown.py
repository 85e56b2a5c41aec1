"""A report as Markdown: the verdict, the first divergence and the table, the whole text folded below."""

from __future__ import annotations

import re

from ..escape import escaped
from .report import Report, Table
from .text import Sentence, compared, comparison_table, left_out, lines_of, sentences

MARKS = {0: "✅", 1: "❌", 3: "⚠️"}


def markdown_of(report: Report) -> str:
    """The report for a summary page, a comment or a file."""
    (_, text, _), *said = sentences(report)
    lines = [f"## {MARKS[report.exit_code]} {_plain(text)}: {_plain(report.title)}", ""]
    said += [
        Sentence("compared", compared(report)),
        Sentence("not compared", "; ".join(left_out(report))),
        Sentence("budget", report.budget),
    ]
    lines += [f"- **{label}**: {_plain(text)}" if label else f"  - {_plain(text)}" for label, text, _ in said if text]
    table = comparison_table(report.comparisons)
    if table is not None:
        lines += ["", *_table(table)]
    whole = "\n".join(text for text, _ in lines_of(report))
    lines += ["", "<details><summary>the whole report</summary>", "", fenced(whole), "</details>"]
    return "\n".join(lines) + "\n\n"


def fenced(text: str) -> str:
    """Text as it is, in a fence that is longer than any in it."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return "\n".join((fence, escaped(text, keep="\n"), fence))


def _table(table: Table) -> list[str]:
    """A table of ours in Markdown's own form."""
    head = [name.removeprefix(">") for name in table.head]
    sides = ["---:" if name.startswith(">") else "---" for name in table.head]
    rows = [[_plain(cell) for cell in row] for row in table.rows]
    return [f"| {' | '.join(row)} |" for row in (head, sides, *rows)]


def _plain(text: str) -> str:
    """Text in which nothing is taken for Markdown: names may hold any character."""
    marked = escaped(text).replace("\\", "\\\\")
    for character in "`*_<>[]|#":
        marked = marked.replace(character, "\\" + character)
    return marked
