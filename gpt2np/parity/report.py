"""What one command found, as plain data; JSON and JUnit of it. text.py makes what people read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ..escape import escaped

if TYPE_CHECKING:
    from ..call import Call
    from ..weights import Array
    from .cases import Case
    from .compare import Comparison
    from .explain.diagnose import Diagnosis
    from .localise import Seen, TapRow
    from .parties import Runner
    from .subject import Subject

SCHEMA_VERSION = 1  # of the JSON: raised when a field changes its meaning or goes; new fields do not raise it


@dataclass
class Check:
    """One check that needs no reference, or one property: passed, failed or not made."""

    name: str
    ok: bool | None  # None: not made
    text: str
    by_position: list[float] = field(default_factory=list)
    party: str = ""  # whose property it is
    worst: float | None = None  # the largest difference that it found

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name, "ok": self.ok, "text": self.text, "by_position": self.by_position,
            "party": self.party or None, "worst": self.worst,
        }  # fmt: skip


@dataclass
class Table:
    """Cells as they are to be printed; a column called ">name" is aligned to the right."""

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    styles: Sequence[str] = ()  # of the rows; none: all plain
    notes: Sequence[str] = ()  # sentences below it: the legend, what is left out


@dataclass
class Place:
    """Where the first mistake lies: one operation where it was seen, else the interval between two seen ones."""

    first: str
    last: str
    text: str
    suspects: list[str] = field(default_factory=list)
    next: str | None = None  # the array to return next: it halves the interval

    def as_dict(self) -> dict[str, Any]:
        return {
            "first": self.first, "last": self.last, "text": self.text, "suspects": self.suspects,
            "next_tap": self.next,
        }  # fmt: skip


class Pair(NamedTuple):
    """Two parties on one case: A is the model's own or the reference, B is under test."""

    case: Case
    call: Call
    a: Runner
    b: Runner


class Watch(Protocol):
    """Who is shown the taps while their arrays are there, to draw them: `pages.evidence.Evidence`."""

    def begin(
        self, a: str, b: str, given: Mapping[str, Array], model: Subject | None = None, case: Case | None = None
    ) -> None:
        """The taps of these two parties follow, on one case of a model, or from traces; `given` are A's outputs."""

    def see(self, seen: Seen) -> None:
        """One tap, or some positions of it."""


@dataclass
class Report:
    """Everything that one command found."""

    title: str
    parties: dict[str, str]  # name -> what it is
    budget: str
    comparisons: list[Comparison] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)  # further ones, ready to print
    details: dict[str, Any] = field(default_factory=dict)  # their data, for JSON
    not_compared: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)  # what is worth saying whatever the verdict
    headline: str = ""  # what was found, in one sentence, where something was
    rows: dict[str, list[TapRow]] = field(default_factory=dict)  # taps, by pair of parties
    diagnosis: Diagnosis | None = None
    place: Place | None = None
    facts: list[str] = field(default_factory=list)  # what two files differ in, read from them
    who: str = ""  # who is right, by float64
    next: str = ""  # what to do next
    versions: dict[str, str] = field(default_factory=dict)
    watch: Watch | None = None

    @property
    def exit_code(self) -> int:
        """0 pass, 1 a comparison failed, 3 nothing was compared under a budget that tells right from wrong."""
        if any(not c.ok for c in self.comparisons) or any(c.ok is False for c in self.checks):
            return 1
        return 0 if any(c.counts for c in self.comparisons) or any(c.ok for c in self.checks) else 3

    def as_dict(self) -> dict[str, Any]:
        """Strict JSON: infinities as strings."""
        from .. import __version__

        return plain({
            "schema_version": SCHEMA_VERSION, "gpt2np": __version__,
            "title": self.title, "parties": self.parties, "budget": self.budget, "versions": self.versions,
            "verdict": {0: "pass", 1: "fail", 3: "nothing compared"}[self.exit_code], "exit_code": self.exit_code,
            "headline": self.headline, "findings": self.findings, "facts": self.facts, "who": self.who or None,
            "next": self.next or None, "place": self.place.as_dict() if self.place else None,
            "diagnosis": None,  # in the details, where there is one
            "comparisons": [c.as_dict() for c in self.comparisons], "checks": [c.as_dict() for c in self.checks],
            "not_compared": self.not_compared, **self.details,
        })  # fmt: skip


def add_once(texts: list[str], *new: str) -> None:
    """Append what is not there yet: one message once."""
    texts += [t for t in dict.fromkeys(new) if t and t not in texts]


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


def write_json(report: Report, path: Path) -> None:
    """The report with every metric and threshold, written whole or not at all."""
    write_text(path, json.dumps(report.as_dict(), indent=1, allow_nan=False) + "\n")


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
    write_text(path, et.tostring(root, encoding="unicode", xml_declaration=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """A file, whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
