"""What one command found, as plain data; JSON and JUnit of it. text.py and markdown.py make what people read."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ..escape import escaped
from ..schema import stamped

if TYPE_CHECKING:
    from ..call import Call
    from ..weights import Array
    from .cases import Case
    from .compare import Comparison
    from .explain.diagnose import Diagnosis
    from .localise import Seen, TapRow
    from .parties import Runner
    from .subject import Subject

VERDICTS = {0: "pass", 1: "fail", 3: "nothing compared"}


@dataclass
class Check:
    """One check that needs no reference, or one property: passed, failed or not made."""

    name: str
    ok: bool | None  # None: not made
    text: str
    by_position: list[float] = field(default_factory=list)
    party: str = ""  # whose property it is
    worst: float | None = None  # the largest difference that it found
    seconds: float = 0.0  # how long it took

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
    notes: Sequence[str] = ()  # sentences below it: what is left out
    implied: Sequence[str] = ()  # heads of columns that may go where it is too wide, the first one first
    legend: Mapping[str, str] = field(default_factory=dict)  # sentences below it on columns, by their heads


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
    port: tuple[str, int] | None = None  # file and line of the function under test
    began: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """How long it has taken until now."""
        return time.perf_counter() - self.began

    @property
    def exit_code(self) -> int:
        """0 pass, 1 a comparison failed, 3 nothing was compared under a budget that tells right from wrong."""
        if any(not c.ok for c in self.comparisons) or any(c.ok is False for c in self.checks):
            return 1
        return 0 if any(not c.idle for c in self.comparisons) or any(c.ok for c in self.checks) else 3

    def as_dict(self) -> dict[str, Any]:
        """Strict JSON: infinities as strings."""
        port = None if self.port is None else {"file": self.port[0], "line": self.port[1]}
        return plain(stamped("report", {
            "title": self.title, "parties": self.parties, "budget": self.budget, "versions": self.versions,
            "verdict": VERDICTS[self.exit_code], "exit_code": self.exit_code, "seconds": round(self.seconds, 3),
            "port": port, "headline": self.headline, "findings": self.findings, "facts": self.facts,
            "who": self.who or None, "next": self.next or None,
            "place": self.place.as_dict() if self.place else None,
            "diagnosis": None,  # in the details, where there is one
            "comparisons": [c.as_dict() for c in self.comparisons], "checks": [c.as_dict() for c in self.checks],
            "not_compared": self.not_compared, **self.details,
        }))  # fmt: skip


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


def as_json(report: Report) -> str:
    """The report with every metric and threshold, as JSON text."""
    return json.dumps(report.as_dict(), indent=1, allow_nan=False) + "\n"


def junit_of(report: Report) -> str:
    """The report as JUnit XML: one test case for each output of each pair and input, and for each check.

    Names depend on what is compared alone, so that a test keeps its history from run to run.
    """
    from xml.etree import ElementTree as et

    from .. import __version__

    cases = []
    for c in report.comparisons:
        message = c.problem
        if c.metrics is not None and not c.ok:
            m = c.metrics
            message = f"max abs {number(m.max_abs)} at {list(m.at)}: {m.actual_at:.9g}, expected {m.expected_at:.9g}"
            message += f"; {m.failing} of {m.elements} outside {c.budget}"
        cases.append((f"gpt2np.{c.case}.{c.actual}-{c.expected}", c.output, message, False, c.seconds))
    for check in report.checks:
        name = f"{check.name}, {check.party}" if check.party else check.name
        cases.append(("gpt2np.checks", name, "" if check.ok else check.text, check.ok is None, check.seconds))
    failures = sum(bool(message) and not skipped for _, _, message, skipped, _ in cases)
    suite = et.Element(
        "testsuite", name=f"gpt2np: {report.title}", tests=str(len(cases)), failures=str(failures), errors="0",
        skipped=str(sum(skipped for *_, skipped, _ in cases)), time=f"{report.seconds:.3f}",
    )  # fmt: skip
    properties = et.SubElement(suite, "properties")
    values = {"gpt2np": __version__, "verdict": VERDICTS[report.exit_code], "headline": report.headline}
    for name, value in {**values, "budget": report.budget, **report.parties, **report.versions}.items():
        et.SubElement(properties, "property", name=name, value=value)
    for group, name, message, skipped, seconds in cases:
        case = et.SubElement(suite, "testcase", classname=group, name=name, time=f"{seconds:.3f}")
        if report.port is not None:
            case.attrib |= {"file": report.port[0], "line": str(report.port[1])}
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
    return et.tostring(root, encoding="unicode", xml_declaration=True) + "\n"
