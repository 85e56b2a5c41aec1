"""`gpt2np diff`: two parties against each other, tap by tap. A is the reference, B what is under test."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..arguments import as_path, flag, strings
from ..call import Call
from ..errors import Gpt2npError, InputError, TraceError
from ..files import located
from ..weights import Array
from . import trace as traces
from .budgets import Arbiter, Budgets, parse_budgets
from .capture import run_case, taps_from
from .cases import Case, case_from_ids, gather_cases, pick
from .compare import Comparison, by_one_alone, compare_arrays, parties
from .digits import show_digits, significant_digits
from .explain.problem import Clock
from .files import compare_files
from .forms import as_array, form_of, named
from .localise import Seen, TapRow, compare_taps, first_divergence
from .operations import is_tap, tap_inputs
from .parties import Function, Runner, TraceRunner, model_of, of_another_file, port_of, runner_of
from .replace import check_replace, put_right, say_whether_cured
from .report import Pair, Report, Watch, add_once
from .search import Oracle, investigate, judge
from .subject import Subject, misfit, taps_of
from .trace import versions
from .wiring import compare_wiring

Cases = Callable[[Subject], list[Case]]


def diff(
    a: str, b: str, cases: Cases, oracle: str | None = None, preset: str = "auto", rtol: Sequence[str] = (),
    atol: Sequence[str] = (), local: bool = False, repro: Path | None = None, padding: bool = False,
    replace: Sequence[str] = (), digits: bool = False, clock: Clock | None = None, watch: Watch | None = None,
) -> Report:  # fmt: skip
    """Two parties against each other on every case; where they differ, which operation and why.

    Raises
    ------
    InputError
        Before any work, if an argument is of another type.
    """
    budgets, replace = parse_budgets(preset, rtol, atol), strings("replace", replace)
    a, b, oracle, repro = texts_and_path(a, b, oracle, repro)
    check_kinds(cases, local=local, padding=padding, digits=digits)
    files = [path for text in (a, b) if (path := model_of(text)) is not None]
    judge = model_of(oracle) if oracle else None
    if not files and judge is None:
        refuse_without_model(local=local, dump_repro=repro, padding=padding, replace=replace, digits=digits)
        return diff_traces(a, b, budgets, watch)
    subjects = {path: Subject(path) for path in dict.fromkeys([*files, *([judge] if judge is not None else [])])}
    model = next((s for s in subjects.values() if s.found is not None), next(iter(subjects.values())))
    if model.found is None:
        assert model.problem is not None
        raise model.problem
    budgets.check_names(model.output_names, model)
    if budgets.default.source.startswith("auto"):
        budgets.arbiter = Arbiter(model)
    runners = two_runners(model, subjects, a, b)
    check_replace(replace, model, runners[1])
    report = Report(f"A {a}, B {b}", parties(runners, []), str(budgets.default), versions=versions(), watch=watch)
    report.port = port_of(runners)
    asked = distinct(cases(model))
    chosen = case_of_trace(model, runners, asked, report) or asked or gather_cases(model, (), (), 0, 0)
    if not asked and all(case.name.startswith("random_") for case in chosen):
        add_once(report.findings, "no input was given: compared on random prompts")
    results = compare_cases(report, model, runners, chosen, budgets, padding)
    other = next((s for s in subjects.values() if s is not model and s.path in files), None)
    if other is not None:
        compare_files(report, model, other, b_is_other=files[-1] == other.path)
    if other is not None and other.found is None:
        case = pick(chosen, model, {c.case for c in report.comparisons if not c.ok})
        compare_wiring(report, model, other, case, clock)
        return report
    failing = {c.case for c in report.comparisons if not c.ok and c.output != "(run)"}
    usable = [c for c in chosen if c.name in results]
    if not usable:
        return report
    case = pick(usable, model, failing)
    call = model.call(case.feeds)
    arbiter = Oracle()
    if oracle is not None:
        program = subjects[judge].program if judge is not None else None
        arbiter = Oracle(program, None if program else taps_from(TraceRunner(model, Path(oracle)), case))
    mine = [c for c in report.comparisons if c.case == case.name]
    pair = Pair(case, call, runners[0], runners[1])
    row, given = investigate(report, model, pair, mine, results[case.name], True, local, arbiter, clock)
    what_else(report, model, pair, row, replace, digits)
    save_repro(report, model, call, row, given, repro)
    return report


def texts_and_path(a: Any, b: Any, oracle: Any, repro: Any) -> tuple[str, str, str | None, Path | None]:
    """Names of parties as texts, which may be given as paths, and the folder as a path; InputError for others."""
    for given in (a, b):
        as_path(given)
    return str(a), str(b), None if oracle is None else str(as_path(oracle)), None if repro is None else as_path(repro)


def check_kinds(cases: Any, **flags: Any) -> None:
    """InputError unless the cases are a function, and the flags True or False."""
    if not callable(cases):
        raise InputError(f"cases must be a function of the model that gives a list of cases, got {cases!r:.60}")
    for name, value in flags.items():
        flag(name, value)


def refuse_without_model(**options: Any) -> None:
    """InputError if one of the options is given: two traces are compared as they are."""
    for name, value in options.items():
        if value:
            raise InputError(
                f"--{name.replace('_', '-')} needs a model.onnx as a party: traces are compared as they are"
            )


def distinct(cases: Iterable[Case]) -> list[Case]:
    """Cases as a list; InputError where two have one name, under which one result alone would be kept."""
    found = list(cases)
    names = [case.name for case in found]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two cases are called {name!r}: names of cases must differ")
    return found


def what_else(
    report: Report, model: Subject, pair: Pair, row: TapRow | None, replace: Sequence[str], digits: bool
) -> None:
    """Whether more is wrong behind the first divergence; and what --replace and --digits ask for."""
    if row is not None:
        rows = report.rows.get(f"{pair.a.name} - {pair.b.name}", [])
        if {r.tap for r in rows} - {t for p in model.recognised.outputs for t in taps_of(p)}:
            say_whether_cured(report, rows, row, model, report.details["divergent"]["party"])
    if replace:
        put_right(report, model, pair, replace)
    if digits:
        totals = {r.tap: r.total for rows in report.rows.values() for r in rows if r.total is not None}
        show_digits(report, significant_digits(model.program, pair.call, model.taps()), totals)


def save_repro(
    report: Report, model: Subject, call: Call, row: TapRow | None, given: dict[str, Array], folder: Path | None
) -> None:
    """The divergent operation into a folder, or the word that this can be asked for."""
    if row is not None and folder is not None:
        dump_repro(folder, model, call, row.tap, given)
    elif row is not None and not report.next:
        report.next = f"--dump-repro FOLDER writes {row.tap} alone, with these inputs, as a small model.onnx"


def two_runners(model: Subject, subjects: dict[Path, Subject], a: str, b: str) -> list[Runner]:
    """The parties of the two texts; a model file is run by ONNX Runtime without its optimisations."""
    runners: list[Runner] = []
    for text in (a, b):
        own = model_of(text)
        runner = runner_of(model, text, "numba") if own is None else of_another_file(model, subjects[own])
        if own is not None:
            runner.name = own.parent.name if own.name == "model.onnx" else own.stem
        runners.append(runner)
    if runners[0].name == runners[1].name:
        for letter, runner in zip("AB", runners, strict=True):
            runner.name = f"{runner.name} {letter}"
    return runners


def case_of_trace(model: Subject, runners: Sequence[Runner], asked: Sequence[Case], report: Report) -> list[Case]:
    """The call that a trace, or arrays with their inputs (or token ids alone) among them, were recorded on.

    Raises
    ------
    InputError
        If inputs are asked for, and the trace was recorded on none of them.
    """
    for runner in runners:
        if not isinstance(runner, TraceRunner) or (held := recorded_call(model, runner)) is None:
            continue
        fed = held.feeds
        same = [c for c in asked if all(n in fed and np.array_equal(v, fed[n]) for n, v in c.feeds.items())]
        others = ", ".join(case.name for case in asked if case.name not in {one.name for one in same})
        if asked and not same:
            raise InputError(f"{runner.path} was recorded on other inputs than {others}: give its own, or none")
        if others:
            report.not_compared.append(f"{others}: {runner.path} was recorded on other inputs")
        return same or [held]
    return []


def recorded_call(model: Subject, runner: TraceRunner) -> Case | None:
    """The call that a trace holds the inputs of; None where it does not hold enough of them.

    Raises
    ------
    InputError
        If the model cannot be called with them.
    """
    inputs = runner.trace.inputs
    ids = next(port.name for port in model.recognised.inputs if port.role == "input_ids")
    if set(model.input_names) <= set(inputs):
        case = Case("trace", {n: inputs[n] for n in model.input_names}, None)
    elif runner.trace.plain and ids in inputs:
        case = case_from_ids(model, "trace", inputs[ids].reshape(-1, inputs[ids].shape[-1]))
        case = case._replace(feeds=case.feeds | inputs)
    else:
        return None
    with located(runner.path):
        model.call(case.feeds)
    return case


def compare_cases(
    report: Report, model: Subject, runners: Sequence[Runner], cases: Sequence[Case], budgets: Budgets, padding: bool
) -> dict[str, tuple[dict[str, Array], dict[str, Array]]]:
    """The outputs of both parties on every case, into the report; what they gave, by case.

    Arrays that do not say which call they come from are compared with the case that they fit best.
    """
    a, b = runners
    by_case: dict[str, list[Comparison]] = {}
    results: dict[str, tuple[dict[str, Array], dict[str, Array]]] = {}
    for case in cases:
        given = run_case(case, runners, report)
        x, y = given[a.name], given[b.name]
        found = by_case[case.name] = []
        for runner, outputs in ((a, x), (b, y)):
            if isinstance(outputs, Gpt2npError):
                problem = str(outputs)
                found.append(Comparison(case.name, "(run)", runner.name, "", budgets.default, problem=problem))
        if isinstance(x, Gpt2npError) or isinstance(y, Gpt2npError):
            continue
        for name in [n for n in x if n in y]:
            result = Comparison(case.name, name, b.name, a.name, budgets(name))
            compare_arrays(result, y[name], x[name], model, case, budgets, padding)
            found.append(result)
        for runner, own in ((a, [n for n in x if n not in y]), (b, [n for n in y if n not in x])):
            odd = [n for n in own if is_tap(n) and n not in model.output_names]
            for name in odd:  # what is a tap by its name and none by its shape
                problem = misfit((x if runner is a else y)[name], name, model.config, model.call(case.feeds))
                found.append(Comparison(case.name, name, b.name, a.name, budgets.default, problem=problem))
            add_once(report.not_compared, *by_one_alone([n for n in own if n not in odd], runner.name))
        results[case.name] = (dict(x), dict(y))
    plain = [r for r in runners if isinstance(r, TraceRunner) and r.trace.plain and not r.trace.inputs]
    for runner in plain:
        add_once(report.not_compared, f"whether {runner.path} was recorded on this input: it is no trace")
    if plain and len(cases) > 1:
        best = min(by_case, key=lambda name: (sum(bool(c.problem) for c in by_case[name]),
                                              sum(c.metrics.failing for c in by_case[name] if c.metrics)))  # fmt: skip
        add_once(report.findings, f"{plain[0].path} holds one call's arrays: of {len(cases)} inputs, {best} fits best")
        by_case = {best: by_case[best]}
        results = {name: held for name, held in results.items() if name == best}
    for found in by_case.values():
        report.comparisons += found
    add_once(report.findings, *(note for c in report.comparisons for note in c.notes))
    return results


def dump_repro(folder: Path, model: Subject, call: Call, tap: str, given: dict[str, Array]) -> None:
    """The divergent operation alone, with the inputs that the diverging party gave it."""
    from .repro import dump

    inputs = [
        given[n] if n in given else model.program.from_given(n, call, given, np.dtype(np.float64))
        for n in tap_inputs(tap, model.config)
    ]
    dump(folder, model.program, call, tap, inputs, given.get(tap))


# ------------------------------------------------------------------------------------------------ traces


def diff_traces(a: str, b: str, budgets: Budgets, watch: Watch | None = None) -> Report:
    """Two traces, or a trace and a function that is run on its inputs, judged without a model."""
    x, y = load_either(a, b), load_either(b, a)
    names = (Path(a).stem, Path(b).stem) if Path(a).stem != Path(b).stem else ("A", "B")
    report = Report(
        f"A {a}, B {b}", dict(zip(names, (x.runner, y.runner), strict=True)), str(budgets.default), versions=versions()
    )
    for one, other in ((x, y), (y, x)):
        if one.plain:  # what are outputs in the other one are outputs here
            arrays = {n: as_array(v, f"{b if one is y else a} holds {n!r}") for n, v in one.taps.items()}
            forms = [f"{n} is {form}" for n, v in one.taps.items() if (form := form_of(v))]
            add_once(report.findings, *forms)
            one.inputs = inputs_among(arrays, other)
            one.outputs = {n: v for n, v in arrays.items() if n in other.outputs}
            one.taps = {n: v for n, v in arrays.items() if n not in other.outputs}
    if bool(x.manifest.get("stats_only")) != bool(y.manifest.get("stats_only")):
        held = a if x.manifest.get("stats_only") else b
        add_once(report.not_compared, f"all numbers of the taps: {held} holds the rms, the largest and a few of each")
        traces.alike(x, y)
    budgets.check_names([*x.outputs, *x.taps, *y.outputs, *y.taps])
    check_same_inputs(x, y, a, b, report)
    if watch is not None:
        watch.begin(*names, x.outputs)
    for kind in ("outputs", "taps"):
        left, right = getattr(x, kind), getattr(y, kind)
        for name in [n for n in left if n in right]:
            result = Comparison("trace", name, names[1], names[0], budgets(name))
            compare_arrays(result, right[name], left[name], None, None, budgets)
            result.problem = result.problem or traces.shapes_apart(y, x, name)
            report.comparisons.append(result)
            if watch is not None and left[name].shape == right[name].shape:
                watch.see(Seen(name, 0, left[name], right[name]))
        add_once(report.not_compared, *sorted(f"{n} (in one trace only)" for n in left.keys() ^ right.keys()))
    add_once(report.findings, *(note for c in report.comparisons for note in c.notes))
    wrong = next((c for c in report.comparisons if not c.ok and c.output in x.taps), None)
    if wrong is not None:
        report.headline = f"first tap out of budget: {wrong.output}"
    return report


def inputs_among(arrays: dict[str, Array], golden: traces.Trace) -> dict[str, Array]:
    """The inputs of a trace out of plain arrays, in its shapes: under their own names, or a single one as input_ids."""
    names = {name: name for name in golden.inputs if name in arrays}
    if not names and len(golden.inputs) == 1 and "input_ids" in arrays:
        names = {"input_ids": next(iter(golden.inputs))}
    found = {its: arrays.pop(name) for name, its in names.items()}
    shapes = {name: golden.inputs[name].shape for name in found}
    return {n: v.reshape(shapes[n]) if v.size == math.prod(shapes[n]) else v for n, v in found.items()}


def check_same_inputs(x: traces.Trace, y: traces.Trace, a: str, b: str, report: Report) -> None:
    """Refuse traces of different inputs; say what plain arrays, and traces of two files, leave open."""
    if (x.plain or y.plain) and not x.inputs.keys() & y.inputs.keys():
        report.not_compared.append(f"the inputs: {b if y.plain else a} does not say what it was recorded on")
        return
    for name in sorted({*x.inputs, *y.inputs}):
        if name not in x.inputs or name not in y.inputs or not np.array_equal(x.inputs[name], y.inputs[name]):
            raise TraceError(f"{a} and {b} were recorded on different inputs: {name!r} differs")
    if x.manifest.get("model_sha256") != y.manifest.get("model_sha256"):
        report.not_compared.append("the weights: the traces come from two model files")


def against_float64(model: Subject, runner: Runner, case: Case, made: traces.Trace, watch: Watch) -> Report:
    """One party's trace by itself: each tap against what float64 makes of the party's own inputs."""
    call = model.call(case.feeds)
    report = Report(f"{model.path}, a trace of {runner.name}", parties([runner], [case]), "float32's own error",
                    versions=versions(), watch=watch)  # fmt: skip
    watch.begin(runner.name, "", made.outputs, model, case)
    rows = compare_taps(
        model.program, call, lambda names: {n: made.taps[n] for n in names if n in made.taps}, lambda names: {},
        model.taps(), watch=watch.see,
    )  # fmt: skip
    report.rows[f"{runner.name} - "] = held = [row for row in rows if row.local_a is not None]
    judge(report, held, first_divergence(held), runner.name, asked=True)
    report.details["taps"] = {runner.name: [row.as_dict() for row in held]}
    missing = [name for name in model.taps() if name not in made.taps]
    report.not_compared += [f"{len(missing)} taps that were not recorded"] if missing else []
    return report


def load_either(text: str, other: str) -> traces.Trace:
    """A trace, or what a function gives for the inputs of the other trace."""
    if traces.is_trace(text):
        return traces.load(Path(text))
    if ":" not in text or not traces.is_trace(other):
        raise InputError(f"{text}: neither a model, a trace.npz, nor a function beside one of these")
    golden = traces.load(Path(other))
    if golden.plain:
        raise InputError(f"{other} holds no inputs to run {text} on: give a trace, or a model.onnx and --prompt")
    function = Function(None, text)
    arrays = named(function.call(golden.inputs), list(golden.outputs) or list(golden.taps), text)
    held = {n: as_array(v, f"{text} returned {n!r}") for n, v in arrays.items()}
    outputs = {n: v for n, v in held.items() if n in golden.outputs}
    taps = {n: v for n, v in held.items() if n not in golden.outputs}
    manifest = {**golden.manifest, "runner": text, "stats_only": False}
    return traces.Trace(dict(golden.inputs), outputs, taps, manifest)
