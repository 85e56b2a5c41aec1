"""A report as people read it: the verdict first, then the tables, in 60 to 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .compare import Comparison
from .report import Check, Report, Table, number

WIDTH = 100  # columns, where nobody asks for fewer
LABEL = 10  # columns of the words before a sentence: "where", "why" ...
Line = tuple[str, str]  # text, style


def wrap(text: str, indent: str = "", width: int = WIDTH) -> list[str]:
    """Text in lines of at most `width` columns."""
    return textwrap.wrap(text, width, subsequent_indent=indent, break_long_words=True, break_on_hyphens=False) or [""]


def labelled(label: str, text: str, style: str = "", width: int = WIDTH) -> list[Line]:
    """ "where     h.0.mlp.gelu ...", the following lines indented alike."""
    return [
        (line, style)
        for line in wrap(f"{label:<{LABEL}}" + (" " if len(label) >= LABEL else "") + text, " " * LABEL, width)
    ]


def table_lines(table: Table, width: int = WIDTH) -> list[Line]:
    """A table whose columns are as wide as their cells.

    Where that is too wide, columns that others imply go; where it still is, names get lines of their own.
    """
    heads = [h.removeprefix(">") for h in table.head]
    right = [h.startswith(">") for h in table.head]
    cells = [heads, *map(list, table.rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
    shown = list(range(len(heads)))

    def too_wide() -> bool:
        return sum(widths[i] for i in shown) + 2 * (len(shown) - 1) > width

    for name in table.implied:
        if too_wide():
            shown.remove(heads.index(name))
    apart = too_wide()

    def joined(row: Sequence[str]) -> str:
        columns = shown[1:] if apart else shown
        parts = [row[i].rjust(widths[i]) if right[i] else row[i].ljust(widths[i]) for i in columns]
        return ("    " if apart else "") + "  ".join(parts).rstrip()

    lines: list[Line] = [(line, "bold") for line in wrap(table.title, "", width)] if table.title else []
    if table.rows:
        lines.append((joined(heads), "bold"))
    styles = list(table.styles) or [""] * len(table.rows)
    for row, style in zip(table.rows, styles, strict=True):
        if apart:
            lines.append((row[0], style))
        lines.append((joined(row), style))
    legend = " ".join(table.legend[heads[i]] for i in shown if heads[i] in table.legend)
    for note in (*filter(None, [legend]), *table.notes):
        lines += [(line, "dim") for line in wrap(note, "  ", width)]
    return lines


# ------------------------------------------------------------------------------------------- comparisons


def place_of(case: str, at: Sequence[int], cases: int) -> str:
    """ "set 2 [0,0,253,126]"."""
    short = case.removeprefix("test_data_set_")
    set_ = f"{'set ' if short != case else ''}{short} " if cases > 1 and case else ""
    return f"{set_}[{','.join(map(str, at))}]"


def comparison_table(comparisons: Sequence[Comparison]) -> Table | None:
    """The worst of all cases for each output and pair of parties; outputs of one shape that agree share a row."""
    groups: dict[tuple[str, str, str], list[Comparison]] = {}
    for c in comparisons:
        if c.metrics is not None:
            groups.setdefault((c.output, c.actual, c.expected), []).append(c)
    merged: list[list[Comparison]] = []
    last: object = None
    for (_, actual, expected), group in groups.items():
        fine = all(c.ok for c in group)
        key = (
            actual,
            expected,
            group[0].budget,
            [c.metrics.shape for c in group if c.metrics],
            {c.idle for c in group},
        )
        if fine and merged and key == last:
            merged[-1] += group
        else:
            merged.append(list(group))
        last = key if fine else None
    if not merged:
        return None
    cases = len({c.case for c in comparisons})
    budgets = {(c.budget.rtol, c.budget.atol) for group in merged for c in group}
    rows, styles = [], []
    for group in merged:
        worst = max(group, key=lambda c: (not c.ok, c.metrics.max_abs if c.metrics else 0.0))
        m = worst.metrics
        assert m is not None
        names = list(dict.fromkeys(c.output for c in group))
        name = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
        where = place_of(worst.case, m.at, cases)
        if len(names) > 1:
            where = f"{worst.output} {where}"
        ok, idle = all(c.ok for c in group), next((c.idle for c in group if c.idle), "")
        word = (idle or "ok") if ok else "FAIL"
        budget = (f"{worst.budget.rtol:g}", f"{worst.budget.atol:.3g}") if len(budgets) > 1 else ()
        outside = sum(c.metrics.failing for c in group if c.metrics)
        rows.append((
            name, f"{worst.actual} - {worst.expected}", number(m.max_abs), where,
            number(max(c.metrics.rms for c in group if c.metrics)), *budget,
            f"{outside:,} of {sum(c.metrics.elements for c in group if c.metrics):,}" if outside else "0", word,
        ))  # fmt: skip
        styles.append("red" if not ok else "yellow" if idle else "")
    head = ("output", "parties", ">max abs", "at", ">rms", *((">rtol", ">atol") * (len(budgets) > 1)), ">outside", "")
    notes = []
    if any("too wide" in row for row in rows):
        notes.append("too wide: noise of the signal's own size would pass this budget, so the row compares nothing")
    if any("not finite" in row for row in rows):
        notes.append("not finite: both hold nothing but NaN or infinities there, which many mistakes give")
    if any(c.noise for c in comparisons):
        notes.append("outside: numbers beyond the budget; those of rows marked ok are rounding by the float64 run")
    return Table("", head, rows, styles, notes, ("rms", "at"))


def logit_lines(comparisons: Sequence[Comparison], width: int = WIDTH) -> list[Line]:
    """For logits: do the parties choose the same tokens? Said where they fail or do not always."""
    lines: list[Line] = []
    groups: dict[tuple[str, str, str], list[Comparison]] = {}
    for c in comparisons:
        if c.top is not None:
            groups.setdefault((c.output, c.actual, c.expected), []).append(c)
    for (output, actual, expected), group in groups.items():
        tops = [c.top for c in group if c.top is not None]
        if all(c.ok for c in group) and not any(t.top1_changed for t in tops):
            continue
        positions, changed, real = (
            sum(getattr(t, n) for t in tops) for n in ("positions", "top1_changed", "top1_real")
        )
        overlap = sum(t.topk_overlap * t.positions for t in tops) / max(positions, 1)
        kl = number(max(t.kl_max for t in tops))
        text = f"{output}, {actual} - {expected}: top-1 differs at {changed} of {positions} positions"
        text += f" ({real} beyond the budget), top-{tops[0].k} overlap {overlap:.1%}, KL at most {kl} nats"
        lines += [(line, "red" if real else "") for line in wrap(text, "  ", width)]
    return lines


# ------------------------------------------------------------------------------------------------ verdict


def failed_names(report: Report) -> list[str]:
    failed = [c for c in report.comparisons if not c.ok]
    outputs = [f"the run of {c.actual}" if c.output == "(run)" else c.output for c in failed]
    return list(dict.fromkeys([*outputs, *(c.name for c in report.checks if c.ok is False)]))


class Sentence(NamedTuple):
    """One thing that is said of a report, unwrapped; an empty label goes on with what the one before began."""

    label: str  # verdict, what, where, inside, why, fact, causes, who, next, note
    text: str
    style: str = ""


def verdict_lines(report: Report, width: int = WIDTH) -> list[Line]:
    """The sentences as they are printed."""
    lines: list[Line] = []
    for label, text, style in sentences(report):
        if label == "verdict":
            lines += [(line, style) for line in wrap(f"verdict: {text}", "  ", width)]
        else:
            lines += labelled(label, text, style, width)
    return lines


def sentences(report: Report) -> list[Sentence]:
    """What is wrong, where, why, who is right, what to do next: for the terminal and for pages alike."""
    code = report.exit_code
    measured = [c for c in report.comparisons if c.metrics is not None]
    if code == 3:
        text = "NOTHING COMPARED"
        if any(c.wide for c in measured):
            text += ": the budget is as wide as the signal, so noise would pass it; give --rtol and --atol, or --preset"
        elif any(c.idle == "not finite" for c in measured):
            text += ": all numbers are NaN or infinite in both, which many mistakes give"
        return [Sentence("verdict", text, "bold yellow")]
    notes = [Sentence("note", text) for text in report.findings]
    if code == 0:
        text, rounding = "PASS", sum(c.noise for c in measured if c.ok)
        if rounding:
            what = "1 number" if rounding == 1 else f"{rounding:,} numbers"
            text += f"; {what} beyond the zoo's tolerance {'is' if rounding == 1 else 'are'} rounding: float64 decides"
        return [Sentence("verdict", text, "bold green"), *notes]
    names = failed_names(report)
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    text = f"FAIL in {shown}"
    if report.diagnosis is None and report.place is None and report.headline:
        text += f": {report.headline}"
    said = [Sentence("verdict", text, "bold red"), Sentence("what", what_failed(report))]
    if report.diagnosis is not None or report.place is not None:
        first, _, cause = report.headline.partition("; ")
        where = "" if report.place is None else report.place.text.removeprefix(first.removeprefix("first divergence "))
        by_cause = where.startswith("between") and " between " not in first  # no output shows one operation
        where = f"; the outputs say {where}" if by_cause else where
        where = first + (where if where.startswith((":", " ", ";")) or not where else f": {where}")
        inside = report.diagnosis.where if report.diagnosis is not None else ""
        said += [Sentence("where", where), Sentence("inside", inside), Sentence("why", cause)]
    said += [Sentence("fact", fact) for fact in report.facts[:6]]
    if len(report.facts) > 6:
        said.append(Sentence("", f"and {len(report.facts) - 6} more facts in --json"))
    said += [*causes(report), Sentence("who", report.who), Sentence("next", report.next), *notes]
    return [sentence for sentence in said if sentence.text]


def what_failed(report: Report) -> str:
    """The worst failing array in numbers."""
    failed = [c for c in report.comparisons if not c.ok and c.metrics is not None]
    shaped = next((c for c in failed if c.problem), None)
    if shaped is not None:
        return f"{shaped.output} of {shaped.actual} has {shaped.problem}"
    if not failed:
        return ""
    worst = max(failed, key=lambda c: c.metrics.failing / max(c.metrics.elements, 1) if c.metrics else 0.0)
    m = worst.metrics
    assert m is not None
    text = f"{worst.output} of {worst.actual} against {worst.expected}"
    text += f" on {worst.case}" if worst.case else ""
    text += f": {m.failing:,} of {m.elements:,} numbers outside the budget, the worst {m.actual_at:.7g}"
    return f"{text} where {m.expected_at:.7g} is expected, at [{','.join(map(str, m.at))}]"


def causes(report: Report) -> list[Sentence]:
    """The further causes that were tried, with the share of the error that each explains.

    Where one explains everything, without being fitted, one that explains a part has nothing to say.
    """
    found = report.diagnosis
    guesses = [] if found is None else found.guesses
    if guesses and guesses[0].explains and not guesses[0].fitted:
        guesses = [guess for guess in guesses if guess.explains]
    if len(guesses) < 2:
        return []
    said = []
    for i, guess in enumerate(guesses):
        share = "shown" if guess.evidence and not guess.explains else f"{guess.removed:.2%}"
        extra = f" ({guess.evidence})" if guess.evidence else ""
        text = f"{share:>7}  {guess.named or guess.tap}  {guess.cause}"
        text += extra if i == 0 else f": {guess.text}{extra}"  # the first one's text stands above
        said.append(Sentence("" if i else "causes", text, "green" if guess.explains else ""))
    return said


# ------------------------------------------------------------------------------------------------ report


def lines_of(report: Report, width: int = WIDTH) -> list[Line]:
    """The whole report, ready to print on so many columns; 60 are the least that it can do with."""
    width = max(width, 60)
    lines = [*verdict_lines(report, width), ("", "")]
    missing = left_out(report)
    nothing = "nothing was left out" if any(c.metrics for c in report.comparisons) or report.checks else "anything"
    for text in (f"compared: {compared(report)}", f"not compared: {'; '.join(missing) or nothing}"):
        lines += [(line, "") for line in wrap(text, "  ", width)]
    lines.append(("", ""))
    lines += [(line, "bold") for line in wrap(report.title, "", width)]
    names = max(LABEL, *(len(name) + 2 for name in report.parties), 0)
    for name, what in [*report.parties.items(), ("budget", report.budget)]:
        lines += [(line, "") for line in wrap(f"{name:<{names}}{what}", " " * min(names, LABEL), width)]
    table = comparison_table(report.comparisons)
    if table:
        lines += [("", ""), *table_lines(table, width)]
    logits = logit_lines(report.comparisons, width)
    if logits:
        lines += [("", ""), *logits]
    lines += problem_lines(report.comparisons, width)
    in_a_table = any(table.title == "invariances" for table in report.tables)
    listed = [c for c in report.checks if not (in_a_table and c.party and c.ok) or c.name == "taps"]
    listed = [c for c in listed if c.ok is not None]
    if listed:
        lines += [("", ""), *check_lines(listed, width)]
    for further in report.tables:
        lines += [("", ""), *table_lines(further, width)]
    return lines


def problem_lines(comparisons: Iterable[Comparison], width: int = WIDTH) -> list[Line]:
    """What could not be measured, each message once however many inputs it comes from; the first stands above."""
    cases: dict[tuple[str, str], list[str]] = {}
    for c in comparisons:
        if c.problem and c.metrics is None:
            pair = c.actual if c.output == "(run)" else f"{c.output}, {c.actual} - {c.expected}"
            cases.setdefault((pair, c.problem), []).append(c.case)
    lines: list[Line] = [("", "")] if cases else []
    for (pair, problem), held in cases.items():
        where = held[0] if len(held) == 1 else f"{len(held)} inputs"
        lines += [(line, "red") for line in wrap(f"{where}: {pair}: {problem}", "  ", width)]
    return lines


def check_lines(checks: Sequence[Check], width: int = WIDTH) -> list[Line]:
    lines: list[Line] = []
    names = max(len(c.name) for c in checks)
    for check in checks:
        word = {True: "ok", False: "FAIL", None: "not made"}[check.ok]
        style = {True: "", False: "red", None: "yellow"}[check.ok]
        text = f"{check.name:<{names}}  {word:<8}  {check.text}"
        lines += [(line, style) for line in wrap(text, " " * (names + 12), width)]
    return lines


def compared(report: Report) -> str:
    """What the verdict is about, in numbers."""
    measured = [c for c in report.comparisons if c.metrics is not None]
    cases, outputs, pairs = (
        len(dict.fromkeys(keys))
        for keys in (
            [c.case for c in measured], [c.output for c in measured], [(c.actual, c.expected) for c in measured],
        )
    )  # fmt: skip
    if not measured:
        text = "no outputs"
    else:
        numbers = sum(c.metrics.elements for c in measured if c.metrics)
        text = f"{_many(cases, 'input')} x {_many(outputs, 'output')} x {_many(pairs, 'pair')} of parties"
        text += f", {numbers:,} numbers"
    made = [c for c in report.checks if c.ok is not None]
    return text + (f"; {_many(len(made), 'check')}" if made else "")


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def left_out(report: Report) -> list[str]:
    """What was not compared, each once."""
    held: dict[str, list[str]] = {}
    for c in report.comparisons:
        if c.left_out:
            held.setdefault(c.left_out, []).append(c.output)
    texts = [f"{text}, of {_shown(list(dict.fromkeys(names)))}" for text, names in held.items()]
    wide = list(dict.fromkeys(c.output for c in report.comparisons if c.wide))
    if wide:
        texts.append(f"{_shown(wide)} under a budget as wide as the signal")
    alike = [c.output for c in report.comparisons if c.ok and c.metrics is not None and max(c.metrics.nonfinite)]
    if alike:
        texts.append(f"{_shown(list(dict.fromkeys(alike)))} where both are NaN or the same infinity")
    unmade: dict[str, list[str]] = {}
    for check in report.checks:
        if check.ok is None:
            unmade.setdefault(check.text, []).append(check.name)
    texts += [f"{', '.join(names)} ({text})" for text, names in unmade.items()]
    return list(dict.fromkeys([*texts, *report.not_compared]))


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} ... {names[-1]}"
