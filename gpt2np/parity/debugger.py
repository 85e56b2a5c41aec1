"""What the commands do: gather the parties and the inputs, compare, look for the cause, report."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from ..errors import ComparisonError, Gpt2npError, InputError, TokenizerError, TraceError
from ..onnx.read.datasets import expand, find_sets, load_set
from ..weights import Array
from . import trace as traces
from .arbiter import TapRow, compare_taps, first_divergence
from .checks import CHECKS, run_checks
from .compare import (
    Budgets,
    Case,
    Comparison,
    case_from_ids,
    cases_from_data,
    compare_case,
    random_cases,
    run_case,
    versions,
)
from .explain.diagnose import Diagnosis, from_recorded, from_taps, misplaced, nonfinite, unplaced
from .metrics import PRESETS, Budget, measure
from .operations import Call, split_tap, tap_inputs, tap_names, tap_shape
from .report import Check, Line, Report, columns, number, wrap
from .rounding import Rounding, rounds
from .runners import Function, Model, OnnxRef, Ort, Ours, Recorded, Runner, TraceRunner, taps_of

NOISE_FACTOR = 8.0  # a measured budget is so many times ONNX Runtime's difference from itself
SEARCH_TOKENS = 64  # the search for a cause takes the largest input up to this size, or else the smallest
SHOWN_ROWS = 24  # of the tap table; JSON has them all
ALL_CHECKS = ("outputs", "taps", *CHECKS)


@dataclass
class Options:
    """What `gpt2np parity` was asked for."""

    model: Path
    against: list[str] = field(default_factory=list)
    data: list[Path] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    random: int = 0
    seed: int = 0
    engine: str = "numba"
    preset: str = "zoo"
    rtol: list[str] = field(default_factory=list)
    atol: list[str] = field(default_factory=list)
    checks: tuple[str, ...] = ("outputs",)
    noise_floor: bool = False


# ------------------------------------------------------------------------------------- what was asked for


def model_path(given: Path | None) -> Path:
    """The file of a MODEL argument: itself, the model.onnx in a folder, or the embedded model."""
    from ..model import embedded_model_path

    place = embedded_model_path() if given is None else given
    return place / "model.onnx" if place.is_dir() else place


def parse_budgets(preset: str, rtol: Sequence[str], atol: Sequence[str]) -> Budgets:
    """--preset, and --rtol / --atol as V (for everything) or NAME:V (for one output)."""
    if preset not in PRESETS:
        raise InputError(f"preset {preset!r} is none of {', '.join(PRESETS)}")
    base = PRESETS[preset]
    values: dict[str, dict[str, float]] = {"rtol": {}, "atol": {}}
    for kind, texts in (("rtol", rtol), ("atol", atol)):
        for text in texts:
            name, _, digits = text.rpartition(":")
            try:
                value = float(digits)
            except ValueError:
                value = -1.0
            if not 0 <= value < math.inf:
                raise InputError(f"--{kind} takes V or NAME:V with a number V >= 0, got {text!r}")
            values[kind][name] = value
    if "" in values["rtol"] or "" in values["atol"]:
        base = Budget(values["rtol"].pop("", base.rtol), values["atol"].pop("", base.atol), "given")
    return Budgets(base, values["rtol"], values["atol"])


def parse_checks(text: str) -> tuple[str, ...]:
    """ "outputs,taps" -> ("outputs", "taps"); "all" for every one."""
    names = ALL_CHECKS if text == "all" else tuple(dict.fromkeys(n.strip() for n in text.split(",") if n.strip()))
    unknown = [n for n in names if n not in ALL_CHECKS]
    if unknown or not names:
        raise InputError(f"--checks takes {', '.join(ALL_CHECKS)} or all, got {text!r}")
    return names


def runner_of(model: Model, text: str, engine: str) -> Runner:
    """A party by its name on the command line."""
    simple: dict[str, Callable[[], Runner]] = {
        "ours": lambda: Ours(model, engine),
        "numpy": lambda: Ours(model, "numpy", name="numpy"),
        "numba": lambda: Ours(model, "numba", name="numba"),
        "float64": lambda: Ours(model, "numpy", "float64", name="float64"),
        "ort": lambda: Ort(model),
        "ort-off": lambda: Ort(model, optimise=False),
        "onnxref": lambda: OnnxRef(model),
    }
    if text in simple:
        return simple[text]()
    threads = re.fullmatch(r"(ort|ort-off)-(\d+)t", text)
    if threads:
        return Ort(model, optimise=threads[1] == "ort", threads=int(threads[2]))
    if traces.is_trace(text):
        return TraceRunner(model, Path(text))
    if text.endswith(".onnx") or Path(text).is_dir():
        path = model_path(Path(text))
        if not path.is_file():
            raise InputError(f"{text}: no such model")
        other = Ort(Model(path), optimise=False)
        other.name = path.parent.name if path.name == "model.onnx" else path.stem
        return other
    if ":" in text:
        return Function(model, text)
    raise InputError(
        f"a party is {', '.join(simple)}, ort-1t (threads), a model.onnx, a trace.npz, or package.module:function;"
        f" got {text!r}"
    )


def gather_cases(model: Model, data: Sequence[Path], prompts: Sequence[str], count: int, seed: int) -> list[Case]:
    """The inputs to compare on: data sets (by default those beside the model), prompts, random tokens."""
    from ..onnx.read.reader import open_model

    folders = expand(data) if data else [] if prompts or count else find_sets(model.path)
    proto = open_model(model.path).proto
    initializers = {t.name for t in proto.graph.initializer}
    inputs = [i.name for i in proto.graph.input if i.name not in initializers]
    outputs = [o.name for o in proto.graph.output]
    cases = cases_from_data([load_set(folder, inputs, outputs) for folder in folders])
    for i, prompt in enumerate(prompts):
        cases.append(case_from_ids(model, f"prompt_{i}", prompt_ids(model, prompt)))
    return cases + (random_cases(model, count, seed) if count else [])


def prompt_ids(model: Model, prompt: str) -> Array:
    """Token ids (1, T) of a text, by the tokenizer beside the model."""
    from .. import tokenizer

    found = tokenizer.find_beside(model.path)
    if found is None:
        raise TokenizerError(f"no tokenizer beside {model.path}: --prompt needs one, --random and --data do not")
    ids = found.encode(prompt).ids
    if not ids:
        raise InputError("the prompt is empty")
    return np.array([ids], np.int64)


def parties(runners: Sequence[Runner], cases: Sequence[Case]) -> dict[str, str]:
    """What each party is, for the report's head."""
    found: dict[str, str] = {}
    known = versions()
    for r in runners:
        if isinstance(r, Ours):
            found[r.name] = f"gpt2np, engine {r.engine}, {r.dtype}"
        elif isinstance(r, Ort):
            threads = f", {r.threads} threads" if r.threads is not None else ""
            found[r.name] = (
                f"ONNX Runtime {known['onnxruntime']}, optimisations {'on' if r.optimise else 'off'}{threads}"
                + ("" if r.name.startswith("ort") else f", on {r.model.path}")
            )
        elif isinstance(r, OnnxRef):
            found[r.name] = f"onnx.reference {known['onnx']}"
        elif isinstance(r, TraceRunner):
            found[r.name] = f"a trace of {r.trace.runner} in {r.path}"
        else:
            found[r.name] = "a callable"
    sets = [c.data for c in cases if c.data is not None]
    if sets:
        found[Recorded.name] = f"outputs stored in {len(sets)} data sets of {sets[0].path.parent}"
    return found


# ------------------------------------------------------------------------------------------------ parity


def parity(options: Options) -> Report:
    """Compare ours, others and the recorded outputs; where they differ, say which operation and why."""
    budgets = parse_budgets(options.preset, options.rtol, options.atol)
    model = Model(model_path(options.model))
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


def refuse(model: Model, report: Report) -> None:
    """gpt2np cannot run the file: an error where that is all there is to say, else a part of the report."""
    messages = list(dict.fromkeys(str(e) for e in ([model.problem] if model.problem else model.objections)))
    if model.problem is not None and all(c.ok for c in report.comparisons):
        raise model.problem
    for message in messages:
        report.comparisons.append(
            Comparison("the file", "(run)", "ours", "", Budget(0, 0), problem=f"no GPT-2 that gpt2np runs: {message}")
        )


def measure_floor(model: Model, cases: Sequence[Case], budgets: Budgets, report: Report) -> None:
    """Budgets from ONNX Runtime's difference from itself: threads, optimisations, batch size."""
    base = Ort(model)
    variants = [Ort(model, optimise=False), Ort(model, threads=1), Ort(model, optimise=False, threads=1)]
    floors: dict[str, float] = {}
    for case in cases:
        expected = base.run(case.feeds).outputs
        given = [v.run(case.feeds).outputs for v in variants]
        if model.found is not None and case.data is None:
            ids = model.call(case.feeds).input_ids
            alone = [base.run(case_from_ids(model, "", row[None]).feeds).outputs for row in ids] if len(ids) > 1 else []
            if alone:
                given.append({n: joined for n in expected if (joined := _joined(n, alone, expected[n])) is not None})
        for outputs in given:
            for name, value in outputs.items():
                floors[name] = max(floors.get(name, 0.0), measure(value, expected[name], budgets.default).max_abs)
    for name, floor in floors.items():
        values = [base.run(c.feeds).outputs[name] for c in cases]
        scale = max(float(np.abs(v[np.isfinite(v)]).max(initial=0)) for v in values)
        floor = max(floor, float(np.spacing(np.float32(scale))))
        if not math.isfinite(floor):  # ONNX Runtime is finite in one run and not in another: no noise
            raise ComparisonError(f"no noise floor: {name} is finite in some runs of ONNX Runtime and not in others")
        budgets.measured[name] = Budget(0.0, NOISE_FACTOR * floor, f"{NOISE_FACTOR:g} x the noise floor {floor:.2g}")
    report.budget = f"{NOISE_FACTOR:g} x ONNX Runtime's largest difference from itself (threads, optimisations, batch)"
    body = [(columns((n, number(f), number(budgets.measured[n].atol)), (-40, 12, 12)), "") for n, f in floors.items()]
    report.sections.append(("noise floor and budget (max abs)", body))
    report.details["noise_floor"] = floors


def _joined(name: str, alone: Sequence[dict[str, Array]], expected: Array) -> Array | None:
    """Outputs of single sequences put together along the axis that makes the batch's shape."""
    for axis in range(expected.ndim):
        value = np.concatenate([a[name] for a in alone], axis=axis)
        if value.shape == expected.shape:
            return value
    return None


def pick(cases: Sequence[Case], model: Model, failing: set[str]) -> Case:
    """The input to search on: a failing one, large enough to tell and small enough to be quick."""
    wanted = [c for c in cases if c.name in failing] or list(cases)
    sizes = {c.name: model.call(c.feeds).input_ids.size for c in wanted}
    small = [c for c in wanted if sizes[c.name] <= SEARCH_TOKENS]
    return max(small, key=lambda c: sizes[c.name]) if small else min(wanted, key=lambda c: sizes[c.name])


def explain(
    report: Report, model: Model, ours: Ours | None, others: Sequence[Runner], cases: Sequence[Case], asked: bool
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


def spare_weights(model: Model) -> dict[str, Array]:
    """Floating-point initializers that the graph does not use."""
    from ..onnx.read.reader import open_model

    names = [name for name, why in model.recognised.ignored if why == "left over"]
    file = open_model(model.path)
    return {name: file.tensors[name].load() for name in names}


def tap_rows(model: Model, a: Runner, b: Runner, case: Case, call: Call) -> tuple[list[TapRow], str]:
    """The rows of the taps that at least one of the two gives, or why there are none."""

    def taps(runner: Runner) -> Callable[[Sequence[str]], dict[str, Array]]:
        return lambda names: runner.run(case.feeds, False, names).taps

    try:
        rows = list(compare_taps(model.program, call, taps(a), taps(b), model.taps()))
    except Gpt2npError as error:
        return [], str(error)
    rows = [r for r in rows if r.local_b is not None]
    return rows, "" if rows else "it gives none"


def around(model: Model, runner: Runner, case: Case, call: Call, tap: str) -> dict[str, Array]:
    """A party's taps up to one of them: all, or where they are large the last two layers."""
    names = tap_names(model.config)
    wanted = names[: names.index(tap) + 1]
    layer, part = split_tap(tap)
    if part in ("attn.q", "attn.k"):
        wanted = names[: names.index(f"h.{layer}.attn.v") + 1]
    if sum(4 * math.prod(tap_shape(t, model.config, call)) for t in wanted) > 256 << 20:
        wanted = wanted[-30:]
    return runner.run(case.feeds, False, wanted).taps


# ------------------------------------------------------------------------------------------------ tables


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


# ------------------------------------------------------------------------------------------------- trace


def record(
    model: Model, runner: Runner, case: Case, taps: Sequence[str] = ("*",), outputs: bool = True
) -> traces.Trace:
    """One call of a party as a trace, with those taps that match a pattern."""
    import os

    from ..onnx.read.reader import open_model

    names = [t for t in model.taps() if any(fnmatchcase(t, pattern) for pattern in taps)]
    if not names:
        raise InputError(f"no tap matches {', '.join(taps)}; taps are {', '.join(model.taps()[:4])}, ...")
    run = runner.run(case.feeds, outputs, names)
    manifest = traces.provenance(
        case.feeds,
        runner=runner.name,
        case=case.name,
        model=str(model.path),
        model_sha256=open_model(model.path).sha256,
        dtype=getattr(runner, "dtype", "float32"),
        engine=getattr(runner, "engine", None),
        optimisation=("all" if runner.optimise else "off") if isinstance(runner, Ort) else None,
        threads=getattr(runner, "threads", None) or os.cpu_count(),
        taps_missing=[t for t in names if t not in run.taps],
    )
    return traces.Trace(dict(case.feeds), run.outputs, run.taps, manifest)


def save_ours(options: Options, path: Path) -> None:
    """Ours as a trace, all taps of the first input."""
    model = Model(model_path(options.model))
    cases = gather_cases(model, options.data, options.prompts, options.random, options.seed)
    if not cases:
        raise InputError("no input to trace: give --data, --prompt or --random")
    traces.save(path, record(model, Ours(model, options.engine), cases[0]))


# -------------------------------------------------------------------------------------------------- diff


def diff(
    a: str, b: str, cases: Callable[[Model], list[Case]], oracle: str | None = None, preset: str = "zoo",
    rtol: Sequence[str] = (), atol: Sequence[str] = (), local: bool = False, repro: Path | None = None,
) -> Report:  # fmt: skip
    """Two parties against each other, tap by tap."""
    budgets = parse_budgets(preset, rtol, atol)
    path = next((_model_of(text) for text in (a, b, oracle or "") if _model_of(text)), None)
    if path is None:
        return diff_traces(Path(a), Path(b), budgets)
    model = Model(path)
    runners: list[Runner] = []
    for text in (a, b):
        own = _model_of(text)
        runner = Ort(Model(own), optimise=False) if own is not None else runner_of(model, text, "numba")
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
                _compared(case.name, name, runners[0].name, runners[1].name, x[name], y[name], budgets)
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
    arbiter = Model(other) if oracle is not None and (other := _model_of(oracle)) else None
    call = model.call(case.feeds)
    given_oracle = TraceRunner(model, Path(oracle)) if oracle is not None and arbiter is None else None
    rows = list(
        compare_taps(
            model.program, call, _taps(runners[0], case), _taps(runners[1], case), model.taps(),
            oracle=arbiter.program if arbiter else None,
            oracle_taps=_taps(given_oracle, case) if given_oracle else None,
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


def only_noise(model: Model, failing: Mapping[str, Comparison], rows: Sequence[TapRow]) -> str:
    """The headline where outputs fail and no operation differs: noise, or an output that is not what its tap is."""
    apart = {row.tap: row.max_abs for row in rows}
    ports = {port.name: port for port in model.recognised.outputs}
    for name, c in failing.items():
        known = [apart.get(tap) for tap in taps_of(ports[name])]
        if c.metrics is None or c.metrics.max_abs > 2 * max((k for k in known if k is not None), default=math.inf):
            return f"{name} is not what its taps are: they agree, so it is lost after the last operation"
    return "inherited float32 noise alone: no operation differs by itself" if failing else ""


def dump_repro(folder: Path, model: Model, call: Call, tap: str, given: dict[str, Array]) -> None:
    """The divergent operation alone, with the inputs that the diverging party gave it."""
    from .repro import dump

    inputs = [
        given[n] if n in given else model.program.from_given(n, call, given, np.dtype(np.float64))
        for n in tap_inputs(tap, model.config)
    ]
    dump(folder, model.program, call, tap, inputs, given.get(tap))


def _taps(runner: Runner, case: Case) -> Callable[[Sequence[str]], dict[str, Array]]:
    return lambda names: runner.run(case.feeds, False, names).taps


def _model_of(text: str) -> Path | None:
    """The model file that a party's name stands for, if it is one."""
    if text.endswith(".onnx") or (text and Path(text).is_dir()):
        path = model_path(Path(text))
        if not path.is_file():
            raise InputError(f"{text}: no such model")
        return path
    return None


def _compared(case: str, name: str, a: str, b: str, x: Array, y: Array, budgets: Budgets) -> Comparison:
    result = Comparison(case, name, a, b, budgets(name))
    try:
        result.metrics = measure(x, y, result.budget)
    except ComparisonError as error:
        result.problem = str(error)
    return result


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
            report.comparisons.append(_compared("trace", name, *names, left[name], right[name], budgets))
        report.not_compared += sorted(
            f"{n} (in one trace only)" for n in {*left, *right} if n not in left or n not in right
        )
    wrong = next((c for c in report.comparisons if not c.ok and c.output in x.taps), None)
    if wrong is not None:
        report.headline = f"first tap out of budget: {wrong.output}"
    return report
