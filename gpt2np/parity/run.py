"""`gpt2np parity`: ours, others and the recorded outputs; where they differ, which operation and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..errors import Gpt2npError, InputError
from ..weights import Array
from . import trace as traces
from .budgets import Arbiter, Budgets, measure_floor, parse_budgets
from .capture import Options, record, run_case
from .cases import Case, gather_cases, pick
from .checks import ALL_CHECKS, CHECKS, matrix, run_checks
from .compare import Comparison, compare_case, parties, tell_outputs_of_one_file
from .explain.problem import Clock
from .metrics import Budget
from .parties import Ort, Ours, Recorded, Runner, model_path, port_of, runner_of
from .rebuilt import without_original
from .recordings import suspect_record
from .report import Pair, Report, Watch, add_once
from .rounding import Rounding, rounds
from .search import from_the_record, investigate, settle, where_not_finite
from .searched import search_parity
from .subject import Subject
from .trace import versions

Outputs = Mapping[str, Mapping[str, Array] | Gpt2npError]


def parse_checks(text: str) -> tuple[str, ...]:
    """ "outputs,taps" -> ("outputs", "taps"); "all" for every one."""
    names = ALL_CHECKS if text == "all" else tuple(dict.fromkeys(n.strip() for n in text.split(",") if n.strip()))
    unknown = [n for n in names if n not in ALL_CHECKS]
    if unknown or not names:
        raise InputError(f"--checks takes {', '.join(ALL_CHECKS)} or all, got {text!r}")
    return names


def parity(
    options: Options, save_trace: Path | None = None, clock: Clock | None = None, watch: Watch | None = None
) -> Report:
    """Compare ours, others and the recorded outputs; where they differ, say which operation and why."""
    budgets = parse_budgets(options.preset, options.rtol, options.atol)
    model = Subject(model_path(options.model))
    if model.found is not None and model.found.search is not None:
        return search_parity(model, model.found.search, options, parity)
    budgets.check_names(model.output_names, model)
    cases = gather_cases(model, options.data, options.prompts, options.random, options.seed, options.ids, options.skip)
    ours = Ours(model, options.engine)
    others = [runner_of(model, text, options.engine) for text in options.against or ["ort"]]
    runners: list[Runner] = [ours, *others]
    report = Report(str(model.path), parties(runners, cases), str(budgets.default), versions=versions(), watch=watch)
    report.port = port_of(runners)
    if not model.whole:
        runners = [r for r in others if not isinstance(r, Ours)]
        report.parties.pop(ours.name)
    elif budgets.default.source.startswith("auto"):
        budgets.arbiter = Arbiter(model)
    say_what_is_compared_on(report, model, cases, options)
    rounding = None
    if options.noise_floor:
        measure_floor(model, cases, budgets, report)
    elif model.whole:
        rounding = Rounding.measure(model, cases, budgets, report)
    captured = compare_all(report, model, runners, cases, budgets, rounding, options) if (
        "outputs" in options.checks
    ) else {}  # fmt: skip
    if not model.whole:
        refuse(model, report)
    check_invariances(report, model, runners, cases, budgets, options)
    if cases and ("taps" in options.checks or watch is not None or report.exit_code == 1):
        if model.found is None:
            without_original(report, model, cases, captured, clock)
        else:
            explain(
                report, model, ours if model.whole else None, others, cases, captured, "taps" in options.checks, clock
            )
    if save_trace is not None and cases and model.whole:
        traces.save(save_trace, record(model, ours, cases[0]))
    return report


def say_what_is_compared_on(report: Report, model: Subject, cases: Sequence[Case], options: Options) -> None:
    """Where inputs come from that nobody gave, and what of the file these may not show."""
    if any(not c.recorded for c in cases) and not (options.prompts or options.random or options.ids):
        add_once(report.findings, f"no test_data_set_* beside {model.path.name}: compared on random prompts")
    if model.whole:
        add_once(report.findings, *rows_not_finite(model))
    if not cases:
        report.not_compared.append(f"no test_data_set_* beside {model.path}: give --data, --prompt or --random")


def check_invariances(
    report: Report, model: Subject, runners: Sequence[Runner], cases: Sequence[Case], budgets: Budgets, options: Options
) -> None:
    """The checks without a reference that were asked for; `runners[0]` is ours, where gpt2np can run the file."""
    names = [n for n in options.checks if n in CHECKS]
    ours = runners[0]
    if not names or not model.whole or not isinstance(ours, Ours):
        return
    final = next(p.name for p in model.recognised.outputs if p.role in ("logits", "last_hidden_state"))
    report.checks += run_checks(names, model, ours, runners, cases, budgets(final), options.seed)
    audit = matrix(report.checks)
    report.tables += [audit] if audit is not None else []


def rows_not_finite(model: Subject) -> Iterator[str]:
    """NaN and infinities in rows of wpe and wte, which show only where an input reads the row."""
    for name in ("wpe.weight", "wte.weight"):
        value = model.recognised.sources[name].load()
        bad = ~np.isfinite(value).all(axis=1)
        if bad.any():
            row = int(bad.argmax())
            column = int((~np.isfinite(value[row])).argmax())
            others = int(bad.sum()) - 1
            more = f", and {others:,} more {'row is' if others == 1 else 'rows are'} not finite" if others else ""
            yield f"{name}[{row}, {column}] is {value[row, column]}{more}: wrong wherever an input reads it"


def compare_all(
    report: Report, model: Subject, runners: Sequence[Runner], cases: Sequence[Case], budgets: Budgets,
    rounding: Rounding | None, options: Options,
) -> dict[str, Outputs]:  # fmt: skip
    """Run all parties on all cases and compare their outputs, into the report. Returns what they gave, by case."""
    exact = [Ort(model, optimise=False)] if any(isinstance(r, Ort) and r.optimise for r in runners) else []
    captured: dict[str, Outputs] = {}
    tell_outputs_of_one_file(report, model, runners)
    for case in cases:
        outputs = captured[case.name] = run_case(case, runners, report)
        report.comparisons += compare_case(case, model, runners, budgets, outputs, options.padding)
        if rounding is not None:
            ours = runners[0].name
            recorded = {Recorded.name: case.data.outputs} if case.data is not None else {}
            report.comparisons += rounding.compare_ours(model, case, ours, outputs[ours], options.padding)
            rest = {name: given for name, given in outputs.items() if name != ours}
            rounding.compare(case, {**recorded, **rest, **run_case(case, exact)})
    if rounding is not None:
        rounding.show(report, budgets)
    add_once(report.findings, *(note for c in report.comparisons for note in c.notes))
    return captured


def refuse(model: Subject, report: Report) -> None:
    """gpt2np cannot run the file: an error where that is all there is to say, else a part of the report."""
    messages = list(dict.fromkeys(str(e) for e in ([model.problem] if model.problem else model.refusals)))
    if model.problem is not None and all(c.ok for c in report.comparisons):
        raise model.problem
    for message in messages:
        report.comparisons.append(
            Comparison("the file", "(run)", "ours", "", Budget(0, 0), problem=f"no GPT-2 that gpt2np runs: {message}")
        )


def explain(
    report: Report, model: Subject, ours: Ours | None, others: Sequence[Runner], cases: Sequence[Case],
    captured: Mapping[str, Outputs], asked: bool, clock: Clock | None = None,
) -> None:  # fmt: skip
    """Tap by tap on one input; then the record itself; then the file against the recorded data.

    asked: whether the taps are judged though nothing failed; a page shows them without judging.
    """
    every = asked or report.watch is not None
    failing = {c.case for c in report.comparisons if not c.ok and (c.metrics is not None or c.problem)}
    usable = []
    for case in cases:
        try:
            model.call(case.feeds)
            usable.append(case)
        except InputError as error:
            add_once(report.not_compared, f"taps on {case.name}: {error}")
    if not usable:
        return
    case = pick(usable, model, failing) if failing or not every else max(usable, key=lambda c: size(model, c))
    call = model.call(case.feeds)
    found = where_not_finite(model, call, report.comparisons)
    if found is not None:
        settle(report, found, case.name)
        return
    given = captured.get(case.name, {})
    for other in others:
        a: Runner = ours if ours is not None else other
        between = [c for c in report.comparisons if {c.actual, c.expected} == {a.name, other.name}]
        between = [c for c in between if c.case == case.name and c.output != "(run)"]
        if rounds(model)[0] == "activations to 8 bits":
            add_once(report.not_compared, f"local errors of {other.name}: the file rounds activations, which they show")
            continue
        if not every and ours is not None and all(c.ok for c in between):
            continue
        outputs = [given.get(a.name, {}), given.get(other.name, {})]
        both = [o for o in outputs if isinstance(o, Mapping)]
        if len(both) == 2 and report.diagnosis is None:
            investigate(report, model, Pair(case, call, a, other), between, both, asked, clock=clock)
    if report.diagnosis is None and ours is not None:
        explain_record(report, model, ours, case, captured)
    if report.diagnosis is None and case.data is not None and failing:
        found = from_the_record(report, model, case, call, clock)
        if found is not None:
            settle(report, found, case.name)


def explain_record(report: Report, model: Subject, ours: Ours, case: Case, captured: Mapping[str, Outputs]) -> None:
    """Where all programs agree and the recorded outputs alone do not: what is wrong with the record."""
    recorded = {c.output: c for c in report.comparisons if c.case == case.name and c.expected == Recorded.name
                and c.actual == ours.name and not c.ok}  # fmt: skip
    made = {name: outputs[ours.name] for name, outputs in captured.items() if ours.name in outputs}
    right = {name: o for name, o in made.items() if isinstance(o, Mapping)}
    if case.name not in right or not all(c.ok for c in report.comparisons if c.expected != Recorded.name):
        return
    found = suspect_record(model, case, recorded, right)
    if found is not None:
        settle(report, found, case.name)
        report.who = "ours and the other programs agree; the recorded data alone differs"
        report.next = "record the data set anew, from the inputs that are stored"


def size(model: Subject, case: Case) -> int:
    """Token ids of a case."""
    return int(model.call(case.feeds).input_ids.size)
