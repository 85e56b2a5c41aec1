"""A report as one file to look at: what the terminal says, then pictures of it, then where it comes from."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from hashlib import sha256
from html import escape
from pathlib import Path
from typing import Any

from ..html import Picture, as_json, packed, page
from ..parity.budgets import AUTO_BUDGET
from ..parity.localise import TapRow
from ..parity.operations import OPERATIONS, split_tap, tap_inputs
from ..parity.report import Report, Table
from ..parity.text import compared, comparison_table, left_out, sentences
from ..parity.trace import Trace, embedded
from ..tokenizer import decode, find_beside
from . import drawings
from .evidence import SAMPLES, Evidence, Witness
from .nodes import line_of_tap, nodes_of_taps, source_line

NOT_FINITE = -1.0  # an error in a cell that holds a NaN or an infinity: JSON has none
LABELS = {
    "verdict": "Verdict", "what": "What is wrong", "where": "Where", "why": "Why", "fact": "From the files",
    "causes": "Causes tried", "who": "Who is right", "next": "What to do next", "note": "Note",
}  # fmt: skip


def report_page(report: Report, evidence: Evidence, command: str, repro: str = "") -> str:
    """The page.

    Parameters
    ----------
    command : what makes it again
    repro : what writes the divergent operation alone as a small model, where there is one
    """
    witness = chosen(report, evidence)
    parts: list[str | Picture] = [first_screen(report)]
    table = comparison_table(report.comparisons)
    if table is not None:
        parts.append("<h2>Outputs</h2>" + table_html(table))
    parts += taps_part(report, witness) if witness is not None else without_arrays(report, evidence)
    parts += tokens_part(report, witness) if witness is not None else []
    others = [f"{w.a} and {w.b}" for w in evidence.pairs if w.taps and w is not witness]
    if others:
        parts.append(f"<p>Compared tap by tap, too, and not drawn: {escape(', '.join(others))}.</p>")
    checks = [check for check in report.checks if check.name != "taps"]
    parts.append("<h2>Checks</h2>")
    parts.append(drawings.matrix(checks) if checks else f"<p>{escape(NO_CHECKS)}</p>")
    further = [t for t in report.tables if not t.title.startswith(("taps on", "invariances"))]  # these are drawn
    if further:
        parts.append("<h2>Tables</h2>" + "".join(map(table_html, further)))
    parts.append(provenance(report, witness, command, repro))
    script = Path(__file__).with_name("report.js").read_text("utf-8")
    return page(f"gpt2np: {report.title}", parts, STYLE, script)


EQUAL = "All taps are equal, bit by bit."
BROKEN = "No error of a tap is a finite number."
NO_TAPS = "No taps were compared: no party gave an array from inside the model."
NO_CHECKS = "No checks without a reference were made; gpt2np parity --checks all makes them."


def chosen(report: Report, evidence: Evidence) -> Witness | None:
    """The pair whose taps are shown: the one that the diagnosis is about, else the first."""
    party = report.details.get("divergent", {}).get("party")
    pairs = [w for w in evidence.pairs if w.taps]
    return next((w for w in pairs if party in (w.a, w.b)), pairs[0] if pairs else None)


def first_screen(report: Report) -> str:
    """The terminal's own sentences."""
    items: list[str] = []
    label = ""
    for sentence in sentences(report):
        label, before = sentence.label or label, label
        text = escape(sentence.text.strip())
        if sentence.label == "verdict":
            mark = {0: "✓", 1: "✗"}.get(report.exit_code, "?")
            items.append(f'<p class="verdict code{report.exit_code}">{mark} {text}</p><dl>')
        elif label == "causes":
            items.append(f"<dt>{LABELS[label]}</dt><dd>{text}</dd>" if label != before else f"<dd>{text}</dd>")
        else:
            items.append(f'<dt>{LABELS.get(label, label)}</dt><dd class="{escape(label)}">{text}</dd>')
    parties = "".join(f"<dt>{escape(name)}</dt><dd>{escape(what)}</dd>" for name, what in report.parties.items())
    missing = escape("; ".join(left_out(report)) or "nothing was left out")
    return (
        f"<h1>{escape(report.title)}</h1>{''.join(items)}</dl><dl class=minor><dt>compared</dt>"
        f"<dd>{escape(compared(report))}</dd><dt>not compared</dt><dd>{missing}</dd>{parties}"
        f"<dt>budget</dt><dd>{escape(report.budget)}</dd></dl>"
    )


def table_html(table: Table) -> str:
    """A table of the terminal's; ">name" is aligned to the right."""
    classes = [" class=number" if name.startswith(">") else "" for name in table.head]
    names = [escape(name.removeprefix(">") or "result") for name in table.head]
    head = "".join(f"<th scope=col{c}>{name}</th>" for c, name in zip(classes, names, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{c}>{escape(cell)}</td>" for c, cell in zip(classes, row, strict=True)) + "</tr>"
        for row in table.rows
    )
    notes = "".join(f"<p>{escape(note)}</p>" for note in (" ".join(table.legend.values()), *table.notes) if note)
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(table.title or "outputs")}"><table>'
        f"<caption>{escape(table.title)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{notes}"
    )


# ------------------------------------------------------------------------------------------------ taps


def taps_part(report: Report, witness: Witness) -> list[str | Picture]:
    """Drift, and the view of the tap that is chosen."""
    a, b = witness.a, witness.b
    held = report.rows.get(f"{a} - {b}", [])
    inside = [c for c in report.comparisons if c.output in witness.taps]
    rows = drawings.drift_rows(held, a, b) if held else drawings.compared_rows(inside, a, b)
    first = next((row.tap for row in held if row.diverges), None)
    if not held:
        first = next((c.output for c in inside if not c.ok), None)
    named = report.diagnosis.tap if report.diagnosis is not None else None  # by the recorded outputs, it may be
    data = tap_data(report, witness, first or (named if named in witness.taps else _worst(held)))
    kinds = {"total": f"{b} - {a}" if a and b else "distance from float64"}
    kinds |= {kind: f"local error of {a if kind[-1] == 'A' else b}" for t in data["taps"].values()
              for kind in t["errors"] if kind != "total"}  # fmt: skip
    options = "".join(f'<option value="{escape(kind)}">{escape(name)}</option>' for kind, name in kinds.items())
    where = f" on {escape(witness.case.name)}" if witness.case is not None else ""
    return [
        f"<h2>Taps{where}</h2>",
        drawings.drift(rows, first)
        if any(drawings.has_mark(row) and row["error"] != drawings.FLOOR for row in rows)
        else f"<p>{EQUAL if all(row['rms'] == 0 for row in rows if row['error'] != drawings.FLOOR) else BROKEN}</p>",
        '<h3 id="one-tap">One tap</h3><p class="choose"><label>tap <select id="tap"></select></label> '
        f'<label>error <select id="kind">{options}</select></label></p><dl id="tap-facts" aria-live="polite"></dl>',
        drawings.heat(), drawings.ulps(),
        "<h4>The ten worst numbers</h4><p>ulps: of the largest number of the row.</p>"
        '<div id="worst" class="wide" tabindex="0" role="region" aria-label="The ten worst numbers"></div>'
        f'<script type="text/plain" id="gpt2np-taps">{packed(as_json(data))}</script>',
    ]  # fmt: skip


def without_arrays(report: Report, evidence: Evidence) -> list[str | Picture]:
    """What can be drawn of traces that hold statistics: the distances of these."""
    pair = evidence.pairs[0] if evidence.pairs else None
    inside = [c for c in report.comparisons if split_tap(c.output)[1] in OPERATIONS and c.metrics is not None]
    if pair is None or not any(c.metrics.rms > 0 for c in inside if c.metrics):
        return [f"<p>{escape(NO_TAPS)}</p>"]
    first = next((c.output for c in inside if not c.ok), None)
    return ["<h2>Taps</h2>", drawings.drift(drawings.compared_rows(inside, pair.a, pair.b), first)]


def tap_data(report: Report, witness: Witness, first: str | None) -> dict[str, Any]:
    """What report.js draws: each tap's cells, ulps and worst numbers, and what is known of its operation."""
    config, found = witness.config, witness.model.found if witness.model is not None else None
    rows = {row.tap: row for row in report.rows.get(f"{witness.a} - {witness.b}", [])}
    nodes = nodes_of_taps(found) if found is not None else {}
    local = "local A" if report.details.get("divergent", {}).get("party") == witness.a else "local B"
    taps = {}
    for tap, summary in witness.taps.items():
        kinds = [kind for kind in summary.sums if kind in ("total", local)] or list(summary.sums)[:1]
        grids = {kind: summary.grid(kind) for kind in kinds}
        row = rows.get(tap)
        taps[tap] = {
            "part": split_tap(tap)[1], "shape": summary.shape, "columns": summary.columns,
            "inputs": tap_inputs(tap, config) if config is not None else (), "nodes": nodes.get(tap, []),
            "scale": row.scale if row is not None and math.isfinite(row.scale) else 1.0,
            "positions": next(iter(grids.values()))[0] if grids else [],
            "errors": {kind: [_cell(c) for line in grid for c in line] for kind, (_, grid) in grids.items()},
            "ulps": summary.ulps.tolist(),
            "worst": [[w.at, *map(_number, (w.a, w.b, w.exact, w.error, w.ulps))] for w in summary.worst],
            "says": _in_words(row, witness) if row is not None else "",
        }  # fmt: skip
    parts = {
        part: {"formula": operation.formula, "line": line_of_tap(part), "code": source_line(line_of_tap(part))}
        for part, operation in OPERATIONS.items()
    }
    return {"parts": parts, "taps": taps, "first": first}


def _worst(rows: Sequence[TapRow]) -> str | None:
    """The tap with the largest local error for its budget."""
    return max(rows, key=lambda row: max(row.over_a, row.over_b)).tap if rows else None


def _cell(value: float | None) -> float | None:
    return value if value is None else float(f"{value:.1e}") if math.isfinite(value) else NOT_FINITE


def _number(value: float | None) -> float | str | None:
    if value is None:
        return None
    return float(f"{value:.8g}") if math.isfinite(value) else str(value)


def _in_words(row: TapRow, witness: Witness) -> str:
    """The row of the terminal's table."""
    known = [
        ("total", row.total), (f"local {witness.a}", row.local_a), (f"local {witness.b}", row.local_b),
        ("inherited", row.inherited), ("float32's own", row.floor), ("rms of the tap", row.scale),
        ("gain", row.gain), ("R", row.r),
    ]  # fmt: skip
    closer = {"a": f"; {witness.a} is closer", "b": f"; {witness.b} is closer"}.get(row.closer, "")
    return ", ".join(f"{name} {value:.3g}" for name, value in known if value is not None) + closer


# ---------------------------------------------------------------------------------------------- tokens


def tokens_part(report: Report, witness: Witness) -> list[str | Picture]:
    """What both would say next, where both gave what it takes."""
    own_head = bool(witness.tokens)
    witness.finish()
    if not witness.tokens or witness.model is None or witness.case is None:
        return []
    made = find_beside(witness.model.path)

    def text(token: int) -> str:
        return f"{token} {decode(made, [token])!r}" if made is not None else str(token)

    budget = next((c.budget for c in report.comparisons if c.top is not None), AUTO_BUDGET)
    note = "" if own_head else " The file has no head: its last hidden states were multiplied by wte."
    rows = drawings.token_rows(witness.tokens, text, witness.model.call(witness.case.feeds).input_ids, budget)
    return ["<h2>Tokens</h2>", drawings.tokens(rows, witness.a, witness.b, note)]


# ------------------------------------------------------------------------------------------ provenance


def provenance(report: Report, witness: Witness | None, command: str, repro: str) -> str:
    """Where it comes from, how to make it again, and the numbers by which it can be judged again."""
    rows = [("made", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")), ("threads", f"{os.cpu_count()} processors")]
    rows += report.versions.items()
    trace = Trace({}, {}, {})
    if witness is not None and witness.model is not None and witness.case is not None:
        model = witness.model
        rows += [("model", str(model.path)), ("its SHA-256", model.file.sha256)]
        rows += [(f"input {name}", f"{value.dtype}{list(value.shape)}, SHA-256 {sha256(value.tobytes()).hexdigest()}")
                 for name, value in witness.case.feeds.items()]  # fmt: skip
        trace.inputs = witness.case.feeds
        trace.manifest = {"case": witness.case.name, "model": str(model.path), "model_sha256": model.file.sha256}
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in rows)
    commands = [("to make this page again", command)] + ([("to write the operation alone", repro)] if repro else [])
    if witness is not None and witness.samples:
        commands.append(("to judge other arrays by this page", "gpt2np diff THIS_PAGE.html other.npz"))
        taps = witness.taps
        trace.taps = dict(sorted(witness.samples.items(), key=lambda item: item[0] not in taps))  # these before outputs
        trace.manifest |= {"runner": witness.a, "versions": report.versions}
        trace.manifest |= {"stats_only": True, "shapes_of_taps": witness.shapes}
    said = "".join(f"<dt>{what}</dt><dd><code>{escape(text)}</code></dd>" for what, text in commands)
    judged = (
        "The page holds the report as JSON (gpt2np-report), and the rms, the largest and "
        f"{SAMPLES} numbers of each array of {escape(witness.a)} (gpt2np-trace)."
        if witness is not None and witness.samples
        else "The page holds the report as JSON (gpt2np-report)."
    )
    held = {"gpt2np-report": report.as_dict()} | ({"gpt2np-trace": embedded(trace)} if trace.taps else {})
    scripts = [f'<script type="application/json" id="{name}">{as_json(value)}</script>' for name, value in held.items()]
    text = f'<h2>Provenance</h2><dl class="minor">{facts}</dl><h2>Commands</h2><dl>{said}</dl><p>{judged}</p>'
    return text + "".join(scripts)


STYLE = """
h2, h3, h4 { break-after: avoid; }
h1 { font-size: 1.1rem; font-weight: normal; margin: .3rem 0; }
.verdict { font-size: 1.4rem; font-weight: bold; margin: .4rem 0; overflow-wrap: anywhere; }
.verdict::before { content: ""; border-left: .5rem solid; margin-right: .5rem; }
.code0::before { border-color: #2e7d4f; }
.code1::before { border-color: #c4431b; }
.code3::before { border-color: #a07800; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .15rem 1rem; margin: .5rem 0; }
dt { opacity: .8; } dd { margin: 0; grid-column: 2; overflow-wrap: anywhere; min-width: 0; }
dd.where, dd.why { font-weight: bold; }
dl.minor { font-size: .85rem; }
.wide { overflow-x: auto; max-width: 100%; }
.wide table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
.wide th, .wide td { padding: .1rem .7rem .1rem 0; text-align: left; white-space: nowrap; }
.wide .number { text-align: right; }
.wide caption { text-align: left; }
.choose label { margin-right: 1rem; } select { font: inherit; max-width: 100%; }
@media (max-width: 500px) { dl { grid-template-columns: 1fr; } dd { grid-column: 1; } }
@media print { .choose { display: none; } .wide { overflow: visible; } }
"""
