"""What the commands do: gather the parties and the inputs, compare, look for the cause, report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import Gpt2npError, InputError, UnsupportedModelError
from .compare import (
    Budgets,
    Case,
    case_from_ids,
    cases_from_data,
    compare_case,
    random_cases,
    run_case,
    versions,
)
from .data import expand, find_sets, load_set
from .metrics import PRESETS, Budget
from .report import Report
from .runners import Function, Model, OnnxRef, Ort, Ours, Runner


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
            name, _, number = text.rpartition(":")
            try:
                value = float(number)
            except ValueError:
                value = -1.0
            if not value >= 0:
                raise InputError(f"--{kind} takes V or NAME:V with a number V >= 0, got {text!r}")
            values[kind][name] = value
    if "" in values["rtol"] or "" in values["atol"]:
        base = Budget(values["rtol"].pop("", base.rtol), values["atol"].pop("", base.atol), "given")
    return Budgets(base, values["rtol"], values["atol"])


def runner_of(model: Model, text: str, engine: str) -> Runner:
    """A party by its name on the command line."""
    simple = {
        "ours": lambda: Ours(model, engine),
        "numpy": lambda: Ours(model, "numpy", name="numpy"),
        "numba": lambda: Ours(model, "numba", name="numba"),
        "float64": lambda: Ours(model, "numpy", "float64", name="float64"),
        "ort": lambda: Ort(model),
        "ort-off": lambda: Ort(model, optimise=False),
        "ort-1t": lambda: Ort(model, threads=1),
        "onnxref": lambda: OnnxRef(model),
    }
    if text in simple:
        return simple[text]()
    if text.endswith(".onnx") or Path(text).is_dir():
        other = Ort(Model(model_path(Path(text))))
        other.name = Path(text).parent.name if Path(text).name == "model.onnx" else Path(text).stem
        return other
    if ":" in text:
        return Function(model, text)
    raise InputError(f"--against takes {', '.join(simple)}, a model.onnx, or package.module:function; got {text!r}")


def gather_cases(options: Options, model: Model) -> list[Case]:
    """The inputs to compare on: data sets, prompts, random tokens."""
    from ..onnx.reader import open_model

    chosen = bool(options.prompts or options.random)
    folders = expand(options.data) if options.data else [] if chosen else find_sets(model.path)
    proto = open_model(model.path).proto
    initializers = {t.name for t in proto.graph.initializer}
    inputs = [i.name for i in proto.graph.input if i.name not in initializers]
    outputs = [o.name for o in proto.graph.output]
    cases = cases_from_data([load_set(folder, inputs, outputs) for folder in folders])
    for i, prompt in enumerate(options.prompts):
        cases.append(case_from_ids(model, f"prompt_{i}", prompt_ids(model, prompt)))
    if options.random:
        cases += random_cases(model, options.random, options.seed)
    return cases


def prompt_ids(model: Model, prompt: str):  # type: ignore[no-untyped-def]
    """Token ids (1, T) of a text, by the tokenizer beside the model."""
    import numpy as np

    from .. import tokenizer
    from ..errors import TokenizerError

    found = tokenizer.find_beside(model.path)
    if found is None:
        raise TokenizerError(f"no tokenizer beside {model.path}: --prompt needs one, --random does not")
    ids = found.encode(prompt).ids
    if not ids:
        raise InputError("the prompt is empty")
    return np.array([ids], np.int64)


def parity(options: Options) -> Report:
    """Compare outputs of ONNX Runtime, ours, and the recorded ones."""
    budgets = parse_budgets(options.preset, options.rtol, options.atol)
    model = Model(model_path(options.model))
    cases = gather_cases(options, model)
    ours = Ours(model, options.engine)
    runners: list[Runner] = [ours, *(runner_of(model, text, options.engine) for text in options.against or ["ort"])]
    report = Report(f"{model.path}", parties(runners, cases), str(budgets.default), versions=versions())
    if model.found is None:
        report.not_compared.append(f"ours: {model.problem}")
        runners = [r for r in runners if not isinstance(r, Ours)]
    for case in cases:
        report.comparisons += compare_case(case, model, runners, budgets, run_case(case, runners))
    if not cases:
        report.not_compared.append(f"no test_data_set_* beside {model.path}: give --data, --prompt or --random")
    return report


def parties(runners: Sequence[Runner], cases: Sequence[Case]) -> dict[str, str]:
    """What each party is, for the report's head."""
    found: dict[str, str] = {}
    known = versions()
    for r in runners:
        if isinstance(r, Ours):
            found[r.name] = f"gpt2np, engine {r.engine}, {r.dtype}"
        elif isinstance(r, Ort):
            found[r.name] = (
                f"ONNX Runtime {known['onnxruntime']}, optimisations {'on' if r.optimise else 'off'}, {r.model.path}"
            )
        elif isinstance(r, OnnxRef):
            found[r.name] = f"onnx.reference {known['onnx']}"
        else:
            found[r.name] = "a callable"
    sets = [c.data for c in cases if c.data is not None]
    if sets:
        found["recorded"] = f"outputs stored in {len(sets)} data sets of {sets[0].path.parent}"
    return found


__all__ = ["Gpt2npError", "Options", "UnsupportedModelError", "model_path", "parity"]
