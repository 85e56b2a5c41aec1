"""`gpt2np diff`: two parties against each other, tap by tap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ..call import Call
from ..errors import Gpt2npError, InputError, TraceError
from ..weights import Array
from . import trace as traces
from .budgets import Budgets, parse_budgets
from .capture import around, run_case, taps_from
from .cases import Case, pick
from .compare import Comparison, compared, parties
from .explain.diagnose import from_taps, misplaced
from .localise import compare_taps, first_divergence, only_noise
from .operations import tap_inputs
from .parties import Ort, Runner, TraceRunner, model_of, runner_of
from .report import Check, Report, show, tap_lines
from .subject import Subject
from .trace import versions


def diff(
    a: str, b: str, cases: Callable[[Subject], list[Case]], oracle: str | None = None, preset: str = "zoo",
    rtol: Sequence[str] = (), atol: Sequence[str] = (), local: bool = False, repro: Path | None = None,
) -> Report:  # fmt: skip
    """Two parties against each other, tap by tap."""
    budgets = parse_budgets(preset, rtol, atol)
    path = next((model_of(text) for text in (a, b, oracle or "") if model_of(text)), None)
    if path is None:
        return diff_traces(Path(a), Path(b), budgets)
    model = Subject(path)
    runners: list[Runner] = []
    for text in (a, b):
        own = model_of(text)
        runner = Ort(Subject(own), optimise=False) if own is not None else runner_of(model, text, "numba")
        if own is not None:
            runner.name = own.parent.name if own.name == "model.onnx" else own.stem
        runners.append(runner)
    if runners[0].name == runners[1].name:
        for letter, runner in zip("AB", runners, strict=True):
            runner.name = f"{runner.name} {letter}"
    first = next((r for r in runners if isinstance(r, TraceRunner) and not r.trace.plain), None)
    chosen = [Case("trace", first.trace.inputs, None)] if first is not None else cases(model)
    if not chosen:
        raise InputError("nothing to run: give --data, --prompt or --random")
    case = pick(chosen, model, set())
    report = Report(f"{a} - {b}", parties(runners, []), str(budgets.default), versions=versions())
    results = run_case(case, runners)
    x, y = (results[r.name] for r in runners)
    for runner, given in ((runners[0], x), (runners[1], y)):
        if isinstance(given, Gpt2npError):
            report.comparisons.append(
                Comparison(case.name, "(run)", runner.name, "", budgets.default, problem=str(given))
            )
    if not isinstance(x, Gpt2npError) and not isinstance(y, Gpt2npError):
        for name in [n for n in x if n in y]:
            report.comparisons.append(
                compared(case.name, name, runners[0].name, runners[1].name, x[name], y[name], budgets)
            )
        only = [f"{n} (in one of them only)" for n in {*x, *y} if n not in x or n not in y]
        report.not_compared += sorted(only)
    if isinstance(x, Gpt2npError) or isinstance(y, Gpt2npError):
        return report
    report.not_compared += [
        f"whether {r.path} was recorded on this input: it is no trace"
        for r in runners
        if isinstance(r, TraceRunner) and r.trace.plain
    ]
    arbiter = Subject(other) if oracle is not None and (other := model_of(oracle)) else None
    call = model.call(case.feeds)
    given_oracle = TraceRunner(model, Path(oracle)) if oracle is not None and arbiter is None else None
    rows = list(
        compare_taps(
            model.program, call, taps_from(runners[0], case), taps_from(runners[1], case), model.taps(),
            oracle=arbiter.program if arbiter else None,
            oracle_taps=taps_from(given_oracle, case) if given_oracle else None,
        )
    )  # fmt: skip
    rows = [r for r in rows if r.local_a is not None or r.local_b is not None]
    names = (runners[0].name, runners[1].name)
    report.sections.append((f"taps on {case.name}, rms errors", tap_lines(rows, *names, whole=local)))
    report.details["taps"] = [r.as_dict() for r in rows]
    both = [r for r in rows if r.total is not None]
    row = first_divergence(rows)
    report.checks.append(Check("taps", row is None if both else None, f"{len(rows)} taps, {len(both)} of both parties"))
    failing = {c.output: c for c in report.comparisons if not c.ok}
    moved = misplaced(failing.values(), x, y, names[1], call)
    if moved is not None:
        show(report, moved)
        return report
    if row is None:
        report.headline = only_noise(model, failing, rows)
        return report
    which = 0 if row.over_a > row.over_b else 1
    given = around(model, runners[which], case, call, row.tap)
    diagnosis = from_taps(model.program, call, row, names[which], given)
    diagnosis.case = case.name
    show(report, diagnosis)
    if repro is not None:
        dump_repro(repro, model, call, row.tap, given)
    return report


def dump_repro(folder: Path, model: Subject, call: Call, tap: str, given: dict[str, Array]) -> None:
    """The divergent operation alone, with the inputs that the diverging party gave it."""
    from .repro import dump

    inputs = [
        given[n] if n in given else model.program.from_given(n, call, given, np.dtype(np.float64))
        for n in tap_inputs(tap, model.config)
    ]
    dump(folder, model.program, call, tap, inputs, given.get(tap))


def diff_traces(a: Path, b: Path, budgets: Budgets) -> Report:
    """Two traces, judged without running anything."""
    for path in (a, b):
        if not traces.is_trace(str(path)):
            raise InputError(f"{path}: neither a model, a trace.npz, nor a callable beside a model")
    x, y = traces.load(a), traces.load(b)
    if x.manifest["stats_only"] != y.manifest["stats_only"]:
        raise TraceError(f"{a} and {b}: one holds whole arrays, the other statistics only")
    names = (a.stem, b.stem) if a.stem != b.stem else ("A", "B")
    report = Report(
        f"{a} - {b}", dict(zip(names, (x.runner, y.runner), strict=True)), str(budgets.default), versions=versions()
    )
    for one, other in ((x, y), (y, x)):
        if one.plain:  # what are outputs in the other one are outputs here
            one.outputs = {n: v for n, v in one.taps.items() if n in other.outputs}
            one.taps = {n: v for n, v in one.taps.items() if n not in other.outputs}
    for name in sorted({*x.inputs, *y.inputs} if not x.plain and not y.plain else ()):
        if name not in x.inputs or name not in y.inputs or not np.array_equal(x.inputs[name], y.inputs[name]):
            raise TraceError(f"{a} and {b} were recorded on different inputs: {name!r} differs")
    if x.plain or y.plain:
        report.not_compared.append(f"the inputs: {b if y.plain else a} does not say what it was recorded on")
    elif x.manifest.get("model_sha256") != y.manifest.get("model_sha256"):
        report.not_compared.append("the weights: the traces come from two model files")
    for kind in ("outputs", "taps"):
        left, right = getattr(x, kind), getattr(y, kind)
        for name in [n for n in left if n in right]:
            report.comparisons.append(compared("trace", name, *names, left[name], right[name], budgets))
        report.not_compared += sorted(
            f"{n} (in one trace only)" for n in {*left, *right} if n not in left or n not in right
        )
    wrong = next((c for c in report.comparisons if not c.ok and c.output in x.taps), None)
    if wrong is not None:
        report.headline = f"first tap out of budget: {wrong.output}"
    return report
