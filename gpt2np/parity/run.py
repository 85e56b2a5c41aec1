"""`gpt2np parity`: ours, others and the recorded outputs; where they differ, which operation and why."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import InputError
from ..weights import Array
from .budgets import measure_floor, parse_budgets
from .capture import Options, around, run_case
from .cases import Case, gather_cases, pick
from .checks import CHECKS, run_checks
from .compare import Comparison, compare_case, parties
from .explain.diagnose import Diagnosis, from_recorded, from_taps, misplaced, nonfinite, unplaced
from .localise import first_divergence, only_noise, tap_rows
from .metrics import Budget
from .parties import Ort, Ours, Recorded, Runner, model_path, runner_of
from .report import Check, Report, number, show, tap_lines
from .rounding import Rounding, rounds
from .searched import search_parity
from .subject import Subject
from .trace import versions

ALL_CHECKS = ("outputs", "taps", *CHECKS)


def parse_checks(text: str) -> tuple[str, ...]:
    """ "outputs,taps" -> ("outputs", "taps"); "all" for every one."""
    names = ALL_CHECKS if text == "all" else tuple(dict.fromkeys(n.strip() for n in text.split(",") if n.strip()))
    unknown = [n for n in names if n not in ALL_CHECKS]
    if unknown or not names:
        raise InputError(f"--checks takes {', '.join(ALL_CHECKS)} or all, got {text!r}")
    return names


def parity(options: Options) -> Report:
    """Compare ours, others and the recorded outputs; where they differ, say which operation and why."""
    budgets = parse_budgets(options.preset, options.rtol, options.atol)
    model = Subject(model_path(options.model))
    if model.found is not None and model.found.search is not None:
        return search_parity(model, model.found.search, options, parity)
    cases = gather_cases(model, options.data, options.prompts, options.random, options.seed)
    ours = Ours(model, options.engine)
    others = [runner_of(model, text, options.engine) for text in options.against or ["ort"]]
    runners: list[Runner] = [ours, *others]
    report = Report(str(model.path), parties(runners, cases), str(budgets.default), versions=versions())
    whole = model.found is not None and not model.objections
    if not whole:
        runners = [r for r in others if not isinstance(r, Ours)]
        report.parties.pop(ours.name)
    if not cases:
        report.not_compared.append(f"no test_data_set_* beside {model.path}: give --data, --prompt or --random")
    if options.noise_floor:
        measure_floor(model, cases, budgets, report)
    rounding = Rounding.measure(model, cases, budgets, report) if whole and not options.noise_floor else None
    plain = [Ort(model, optimise=False)] if any(isinstance(r, Ort) and r.optimise for r in others) else []
    if "outputs" in options.checks:
        for case in cases:
            outputs = run_case(case, runners)
            report.comparisons += compare_case(case, model, runners, budgets, outputs)
            if rounding is not None:
                recorded = {Recorded.name: case.data.outputs} if case.data is not None else {}
                report.comparisons += rounding.compare_ours(case, ours.name, outputs.pop(ours.name))
                rounding.compare(case, {**recorded, **outputs, **run_case(case, plain)})
    if rounding is not None:
        rounding.show(report, budgets)
    if not whole:
        refuse(model, report)
    names = [n for n in options.checks if n in CHECKS]
    if names and whole:
        final = next(p.name for p in model.recognised.outputs if p.role in ("logits", "last_hidden_state"))
        report.checks += run_checks(names, model, ours, runners, cases, budgets(final), options.seed)
    diagnosis: Diagnosis | None = None
    if cases and model.found is not None and ("taps" in options.checks or report.exit_code == 1):
        diagnosis = explain(report, model, ours if whole else None, others, cases, "taps" in options.checks)
    elif model.found is None:
        diagnosis = unplaced(str(model.problem))
    if diagnosis is not None and report.exit_code == 1:
        show(report, diagnosis)
    return report


def refuse(model: Subject, report: Report) -> None:
    """gpt2np cannot run the file: an error where that is all there is to say, else a part of the report."""
    messages = list(dict.fromkeys(str(e) for e in ([model.problem] if model.problem else model.objections)))
    if model.problem is not None and all(c.ok for c in report.comparisons):
        raise model.problem
    for message in messages:
        report.comparisons.append(
            Comparison("the file", "(run)", "ours", "", Budget(0, 0), problem=f"no GPT-2 that gpt2np runs: {message}")
        )


def explain(
    report: Report, model: Subject, ours: Ours | None, others: Sequence[Runner], cases: Sequence[Case], asked: bool
) -> Diagnosis | None:
    """Tap by tap on one input; then from the recorded data; the table, and the diagnosis if there is one."""
    failing = {c.case for c in report.comparisons if not c.ok and c.metrics is not None}
    usable = []
    for case in cases:
        try:
            model.call(case.feeds)
            usable.append(case)
        except InputError as error:
            report.not_compared.append(f"taps on {case.name}: {error}")
    if not usable:
        return None
    if failing or not asked:
        case = pick(usable, model, failing)
    else:
        case = max(usable, key=lambda c: model.call(c.feeds).input_ids.size)
    call = model.call(case.feeds)
    broken = [c for c in report.comparisons if c.metrics is not None and not c.ok and c.metrics.nonfinite[0]]
    if broken:
        found = nonfinite(model.program, call, model.taps())
        if found is not None:
            return found
    diagnosis: Diagnosis | None = None
    for other in others:
        rows, problem = tap_rows(model, ours or other, other, case, call)
        if problem:
            report.not_compared.append(f"taps of {other.name}: {problem}")
            continue
        a = ours.name if ours is not None else other.name
        report.sections.append(
            (f"taps on {case.name}: {a} and {other.name}, rms errors", tap_lines(rows, a, other.name))
        )
        report.details.setdefault("taps", {})[f"{a} - {other.name}"] = [r.as_dict() for r in rows]
        missing = [t for t in model.taps() if t not in {r.tap for r in rows if r.local_b is not None}]
        if missing:
            shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
            report.not_compared.append(f"{other.name} does not give {shown}")
        if rounds(model)[0] == "activations to 8 bits":
            report.not_compared.append(f"local errors of {other.name}: the file rounds activations, which they show")
            continue
        row = first_divergence(rows)
        between = [c for c in report.comparisons if {c.actual, c.expected} == {a, other.name} and c.case == case.name]
        apart = {c.output: c for c in between if not c.ok}
        if apart and diagnosis is None and ours is not None:
            right, given = ours.run(case.feeds).outputs, other.run(case.feeds).outputs
            diagnosis = misplaced(apart.values(), right, given, other.name, call)
        if row is None and apart:
            report.headline = f"between {a} and {other.name}: {only_noise(model, apart, rows)}"
        if asked:
            worst = max(rows, key=lambda r: max(r.over_a, r.over_b))
            share = number(max(worst.over_a, worst.over_b))
            text = f"{len(rows)} taps of {other.name}; largest local error {share} of its budget, at {worst.tap}"
            report.checks.append(Check("taps", row is None, text if row is None else f"{text}; first at {row.tap}"))
        if row is not None and diagnosis is None:
            runner: Runner = ours if ours is not None and row.over_a > 1 else other
            diagnosis = from_taps(model.program, call, row, runner.name, around(model, runner, case, call, row.tap))
            diagnosis.case = case.name
            report.details["divergent"] = {"tap": row.tap, "party": runner.name, "case": case.name}
    if diagnosis is None and case.data is not None and failing:
        recorded = model.outputs_as_taps(case.data.outputs, call)
        diagnosis = from_recorded(model.program, call, recorded, spare_weights(model))
        if diagnosis is not None:
            diagnosis.case = case.name
    return diagnosis


def spare_weights(model: Subject) -> dict[str, Array]:
    """Floating-point initializers that the graph does not use."""
    from ..onnx.read.reader import open_model

    names = [name for name, why in model.recognised.ignored if why == "left over"]
    file = open_model(model.path)
    return {name: file.tensors[name].load() for name in names}
