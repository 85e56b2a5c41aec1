"""`--html FILE`: what parity, diff and trace share for the page."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..pages.evidence import Evidence
    from ..parity.report import Report

INPUTS = ("--data", "--prompt", "--ids", "--random", "--seed", "--rtol", "--atol", "--preset")


def evidence_for(html: Path | None) -> Evidence | None:
    """What sums up the taps for a page, where one was asked for; that pages cannot be made is said before any work."""
    if html is None:
        return None
    from ..optional import ALL_FOR_PAGES, needs

    with needs("vl-convert-python", "a page with pictures", ALL_FOR_PAGES):
        import vl_convert  # noqa: F401
    from ..pages import drawings  # noqa: F401
    from ..pages.evidence import Evidence

    return Evidence()


def write_page(html: Path | None, report: Report, evidence: Evidence | None) -> None:
    """Write the page, whole or not at all."""
    if html is None or evidence is None:
        return
    from ..files import write_text
    from ..pages.report_page import report_page

    write_text(html, report_page(report, evidence, shlex.join(["gpt2np", *sys.argv[1:]]), repro(report)))


def repro(report: Report) -> str:
    """The command that writes the divergent operation alone, on the same input."""
    words = sys.argv[1:]
    if "divergent" not in report.details or "--dump-repro" in words:
        return ""
    if words[:1] == ["diff"]:
        return shlex.join(["gpt2np", *words, "--dump-repro", "repro/"])
    other = next((words[i + 1] for i, word in enumerate(words[:-1]) if word == "--against"), "ours")
    given = [w for i, w in enumerate(words) if w.startswith(INPUTS) or (i and words[i - 1] in INPUTS)]
    return shlex.join(["gpt2np", "diff", report.title, other, *given, "--dump-repro", "repro/"])
