"""How far an output may be off: presets, what the user gave for one output, what a noise floor shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import ComparisonError, InputError
from ..weights import Array
from .cases import Case, case_from_ids
from .metrics import PRESETS, Budget, measure
from .parties import Ort
from .report import Report, columns, number
from .subject import Subject

NOISE_FACTOR = 8.0  # a measured budget is so many times ONNX Runtime's difference from itself


@dataclass
class Budgets:
    """The budget of each output: one for all, and the ones that the user gave for some."""

    default: Budget
    rtol: dict[str, float] = field(default_factory=dict)
    atol: dict[str, float] = field(default_factory=dict)
    measured: dict[str, Budget] = field(default_factory=dict)  # from a noise floor

    def __call__(self, output: str) -> Budget:
        base = self.measured.get(output, self.default)
        if output not in self.rtol and output not in self.atol:
            return base
        return Budget(self.rtol.get(output, base.rtol), self.atol.get(output, base.atol), "given")


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


def measure_floor(model: Subject, cases: Sequence[Case], budgets: Budgets, report: Report) -> None:
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
