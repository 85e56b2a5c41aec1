"""What the commands print and save: a table within 100 columns, JSON, JUnit."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..escape import escaped
from .compare import Comparison
from .localise import TapRow, first_divergence

if TYPE_CHECKING:
    from .explain.diagnose import Diagnosis

WIDTH = 100
Line = tuple[str, str]  # text, style


@dataclass
class Check:
    """One check that needs no reference, or one property: passed, failed or not made."""

    name: str
    ok: bool | None  # None: not made
    text: str
    by_position: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "ok": self.ok, "text": self.text, "by_position": self.by_position}


@dataclass
class Report:
    """Everything that one command found."""

    title: str
    parties: dict[str, str]  # name -> what it is
    budget: str
    comparisons: list[Comparison] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    sections: list[tuple[str, list[Line]]] = field(default_factory=list)  # further tables, ready to print
    details: dict[str, Any] = field(default_factory=dict)  # their data, for JSON
    not_compared: list[str] = field(default_factory=list)
    headline: str = ""  # what was found, in one sentence, where something was
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0 pass, 1 a comparison failed, 3 nothing was compared."""
        if any(not c.ok for c in self.comparisons) or any(c.ok is False for c in self.checks):
            return 1
        measured = any(c.metrics is not None and c.metrics.elements for c in self.comparisons)
        return 0 if measured or any(c.ok for c in self.checks) else 3

    def as_dict(self) -> dict[str, Any]:
        """Strict JSON: infinities as strings."""
        return plain({
            "title": self.title, "parties": self.parties, "budget": self.budget, "versions": self.versions,
            "verdict": {0: "pass", 1: "fail", 3: "nothing compared"}[self.exit_code], "headline": self.headline,
            "comparisons": [c.as_dict() for c in self.comparisons], "checks": [c.as_dict() for c in self.checks],
            "not_compared": self.not_compared, **self.details,
        })  # fmt: skip


def plain(value: Any) -> Any:
    """The same as strict JSON takes it: NumPy scalars as numbers, infinities and NaN as strings."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "item") and not isinstance(value, str):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def number(value: float) -> str:
    """Three significant digits, at most 8 characters."""
    if value == 0:
        return "0"
    return f"{value:.2e}".replace("e-0", "e-").replace("e+0", "e+") if math.isfinite(value) else str(value)


def columns(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Cells side by side; a negative width aligns to the left; long cells are cut in the middle."""
    parts = []
    for cell, width in zip(cells, widths, strict=True):
        size = abs(width)
        if len(cell) > size:
            keep = size - 1
            cell = cell[: keep - keep // 2] + "…" + cell[len(cell) - keep // 2 :]
        parts.append(cell.ljust(size) if width < 0 else cell.rjust(size))
    return "  ".join(parts).rstrip()


def wrap(text: str, indent: str = "") -> list[str]:
    """Text in lines of at most WIDTH columns."""
    import textwrap

    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_long_words=True) or [""]


def comparison_lines(comparisons: Sequence[Comparison]) -> list[Line]:
    """One line for each output and pair of parties: the worst of all cases."""
    groups: dict[tuple[str, str, str], list[Comparison]] = {}
    for c in comparisons:
        if c.metrics is not None:
            groups.setdefault((c.output, c.actual, c.expected), []).append(c)
    if not groups:
        return []
    cases = len({c.case for c in comparisons})
    widths = (-18, -17, 8, -25, 8, 8, -4)
    lines: list[Line] = [(columns(("output", "parties", "max abs", " at", "max rel", "rms", ""), widths), "bold")]
    for (output, actual, expected), group in groups.items():
        worst = max(group, key=lambda c: (not c.ok, c.metrics.max_abs if c.metrics else 0.0))
        m = worst.metrics
        assert m is not None
        case = worst.case.removeprefix("test_data_set_")
        where = f" {'set ' if case != worst.case else ''}{case} {list(m.at)}" if cases > 1 else f" {list(m.at)}"
        ok = all(c.ok for c in group)
        cells = (
            output, f"{actual} - {expected}", number(m.max_abs), where.replace(", ", ","), number(m.max_rel),
            number(max(c.metrics.rms for c in group if c.metrics)), "ok" if ok else "FAIL",
        )  # fmt: skip
        lines.append((columns(cells, widths), "" if ok else "red"))
    return lines


def logit_lines(comparisons: Sequence[Comparison]) -> list[Line]:
    """For logits: do the parties choose the same tokens?"""
    lines: list[Line] = []
    groups: dict[tuple[str, str, str], list[Comparison]] = {}
    for c in comparisons:
        if c.top is not None:
            groups.setdefault((c.output, c.actual, c.expected), []).append(c)
    for (output, actual, expected), group in groups.items():
        tops = [c.top for c in group if c.top is not None]
        positions, changed, real = (
            sum(getattr(t, n) for t in tops) for n in ("positions", "top1_changed", "top1_real")
        )
        overlap = sum(t.topk_overlap * t.positions for t in tops) / max(positions, 1)
        kl = number(max(t.kl_max for t in tops))
        text = f"{output}, {actual} - {expected}: top-1 differs at {changed} of {positions} positions"
        text += f" ({real} beyond the budget), top-{tops[0].k} overlap {overlap:.1%}, KL at most {kl} nats"
        lines += [(line, "red" if real else "") for line in wrap(text, "  ")]
    return lines


def lines_of(report: Report) -> list[Line]:
    """The whole report, ready to print."""
    lines: list[Line] = [(line, "bold") for line in wrap(report.title)]
    for name, what in report.parties.items():
        lines += [(line, "") for line in wrap(f"{name:<10}{what}", " " * 10)]
    lines += [(line, "") for line in wrap(f"{'budget':<10}{report.budget}", " " * 10)]
    table = comparison_lines(report.comparisons)
    if table:
        lines += [("", ""), *table]
    logits = logit_lines(report.comparisons)
    if logits:
        lines += [("", ""), *logits]
    broken = [c for c in report.comparisons if c.problem]
    if broken:
        lines.append(("", ""))
        for c in broken:
            pair = c.actual if c.output == "(run)" else f"{c.output}, {c.actual} - {c.expected}"
            lines += [(line, "red") for line in wrap(f"{c.case}: {pair}: {c.problem}", "  ")]
    if report.checks:
        lines.append(("", ""))
        for check in report.checks:
            word = {True: "ok", False: "FAIL", None: "not made"}[check.ok]
            style = {True: "", False: "red", None: "yellow"}[check.ok]
            lines += [(line, style) for line in wrap(f"{check.name:<18}{word:<9}{check.text}", " " * 27)]
    for title, body in report.sections:
        lines += [("", ""), *((line, "bold") for line in wrap(title)), *body]
    return [*lines, ("", ""), *summary_lines(report)]


def summary_lines(report: Report) -> list[Line]:
    """The last lines: what was compared, what was not, the verdict."""
    measured = [c for c in report.comparisons if c.metrics is not None]
    cases = list(dict.fromkeys(c.case for c in measured))
    outputs = list(dict.fromkeys(c.output for c in measured))
    pairs = list(dict.fromkeys((c.actual, c.expected) for c in measured))
    text = (
        f"compared: {len(cases)} {'input' if len(cases) == 1 else 'inputs'} x {len(outputs)} outputs"
        f" x {len(pairs)} pairs of parties, {sum(c.metrics.elements for c in measured if c.metrics):,} numbers"
        if measured
        else "compared: no outputs"
    )
    made = [c for c in report.checks if c.ok is not None]
    if made:
        text += f"; {len(made)} checks"
    lines: list[Line] = [(line, "") for line in wrap(text, "  ")]
    missing = [*report.not_compared, *(f"{c.name} ({c.text})" for c in report.checks if c.ok is None)]
    nothing = "nothing was left out" if measured or made else "anything"
    lines += [(line, "") for line in wrap("not compared: " + ("; ".join(missing) or nothing), "  ")]
    code = report.exit_code
    failed = [c for c in report.comparisons if not c.ok]
    if code == 3:
        lines.append(("verdict: NOTHING COMPARED", "bold yellow"))
    elif code == 0:
        lines.append(("verdict: PASS", "bold green"))
    else:
        outputs = [f"the run of {c.actual}" if c.output == "(run)" else c.output for c in failed]
        names = list(dict.fromkeys([*outputs, *(c.name for c in report.checks if c.ok is False)]))
        shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        text = f"verdict: FAIL in {shown}"
        if report.headline:
            text += f": {report.headline}"
        lines += [(line, "bold red") for line in wrap(text, "  ")]
    return lines


def write_json(report: Report, path: Path) -> None:
    """The report with every metric and threshold, written whole or not at all."""
    _write(path, json.dumps(report.as_dict(), indent=1, allow_nan=False) + "\n")


def write_junit(report: Report, path: Path) -> None:
    """One JUnit test case for each output of each pair and input, and for each check."""
    from xml.etree import ElementTree as et

    cases = []
    for c in report.comparisons:
        message = c.problem
        if c.metrics is not None and not c.ok:
            m = c.metrics
            message = f"max abs {number(m.max_abs)} at {list(m.at)}: {m.actual_at:.9g}, expected {m.expected_at:.9g}"
            message += f"; {m.failing} of {m.elements} outside {c.budget}"
        cases.append((f"{c.case}.{c.actual}-{c.expected}", c.output, message, False))
    cases += [("checks", check.name, "" if check.ok else check.text, check.ok is None) for check in report.checks]
    failures = sum(bool(message) and not skipped for _, _, message, skipped in cases)
    skips = sum(skipped for *_, skipped in cases)
    suite = et.Element(
        "testsuite", name="gpt2np parity", tests=str(len(cases)), failures=str(failures), skipped=str(skips), errors="0"
    )
    for group, name, message, skipped in cases:
        case = et.SubElement(suite, "testcase", classname=group, name=name)
        if skipped:
            et.SubElement(case, "skipped", message=message)
        elif message:
            et.SubElement(case, "failure", message=message).text = report.headline or message
    root = et.Element("testsuites")
    root.append(suite)
    for element in root.iter():  # XML has no room for control characters
        element.attrib.update({name: escaped(value) for name, value in element.attrib.items()})
        element.text = element.text and escaped(element.text, keep="\n")
    et.indent(root)
    _write(path, et.tostring(root, encoding="unicode", xml_declaration=True) + "\n")


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


SHOWN_ROWS = 24  # of the tap table; JSON has them all


def tap_lines(rows: Sequence[TapRow], a: str, b: str, whole: bool = False) -> list[Line]:
    """The table of taps: all, or those around the first divergence, or those with most local error."""
    alone = a == b  # one party against its own operations
    widths = (-19, 9) if alone else (-19, 8, 9, 9, 9, 7, 7, -10)
    head = (
        ("tap", "local")
        if alone
        else ("tap", "total", f"local {a}"[:9], f"local {b}"[:9], "inherited", "gain", "R", "closer")
    )
    lines: list[Line] = [(columns(head, widths), "bold")]
    first = first_divergence(rows)
    if whole or len(rows) <= SHOWN_ROWS:
        shown = set(range(len(rows)))
    elif first is not None:
        at = list(rows).index(first)
        shown = set(range(max(0, at - SHOWN_ROWS // 2), at + SHOWN_ROWS // 2))
    else:
        order = sorted(range(len(rows)), key=lambda i: -max(rows[i].over_a, rows[i].over_b))
        shown = set(order[: SHOWN_ROWS - 1]) | {len(rows) - 1}

    def cell(value: float | None, digits: str = "") -> str:
        return "-" if value is None else f"{value:{digits}}" if digits else number(value)

    for i, row in enumerate(rows):
        if i in shown:
            closer = {"a": a, "b": b, "tie": "tie"}[row.closer] if row.r is not None else "-"
            mark = "  FIRST" if row is first else "  over" if row.diverges else ""
            cells = (row.tap, cell(row.local_b)) if alone else (
                row.tap, cell(row.total), cell(row.local_a), cell(row.local_b), cell(row.inherited),
                cell(row.gain, ".3g"), cell(row.r, ".3g"), closer,
            )  # fmt: skip
            lines.append((columns(cells, widths) + mark, "red" if row.diverges else ""))
    if len(shown) < len(rows):
        lines.append((f"({len(rows) - len(shown)} more taps in --json)", "dim"))
    return lines


def show(report: Report, diagnosis: Diagnosis) -> None:
    """The diagnosis as a section, a headline and JSON."""
    report.details["diagnosis"] = diagnosis.as_dict()
    body: list[Line] = []
    if len(diagnosis.suspects) > 1:
        first, last, count = diagnosis.suspects[0], diagnosis.suspects[-1], len(diagnosis.suspects)
        text = f"suspected on {diagnosis.case}: {first} to {last} ({count} operations)"
        body += [(line, "") for line in wrap(text, "  ")]
    likely = diagnosis.guesses[0] if diagnosis.guesses and diagnosis.guesses[0].likely else None
    if diagnosis.guesses:
        text = "did you mean (share of the error that it explains)"
        body.append((text if likely else f"{text}: nothing explains half of it", "bold"))
    for i, guess in enumerate(diagnosis.guesses, 1):
        share = "   shown" if guess.evidence and not guess.explains else f"{guess.removed:8.2%}"
        extra = f" ({guess.evidence})" if guess.evidence else ""
        text = f"{i}. {share}  {guess.named or guess.tap}  {guess.cause}: {guess.text}{extra}"
        body += [(line, "green" if guess.explains else "") for line in wrap(text, " " * 13)]
    report.sections.append((f"first divergence: {diagnosis.tap} ({diagnosis.text})", body))
    report.headline = f"first divergence {diagnosis.tap}"
    if likely is not None:
        report.headline += f"; most likely {likely.cause}: {likely.text}"
    else:
        report.headline += "; none of the usual mistakes explains it"
