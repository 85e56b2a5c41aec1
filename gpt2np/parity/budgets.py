"""How far an output may be off: presets, what the user gave for one output, what a noise floor or float64 shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ..arguments import one_of, strings
from ..errors import ComparisonError, Gpt2npError, InputError
from ..weights import Array
from .cases import Case, case_from_ids
from .forms import nearest
from .metrics import PRESETS, Budget, difference, measure
from .operations import tap_names
from .parties import Ort
from .places import kept
from .report import Report, Table, number
from .subject import Subject, aliases, taps_of

if TYPE_CHECKING:
    from .compare import Comparison

FLOOR_FACTOR = 8.0  # a measured budget is so many times ONNX Runtime's difference from itself
AUTO = "auto"
AUTO_BUDGET = Budget(PRESETS["zoo"].rtol, PRESETS["zoo"].atol, "auto: the zoo's tolerance; beyond it float64 decides")
EQUALLY_NEAR = 4.0  # parties are about equally near to float64 within this factor
ROUNDING = 8.0  # a difference of two roundings is at most so many times their rms: millions of numbers have long tails


@dataclass
class Budgets:
    """The budget of each output: one for all, and the ones that the user gave for some."""

    default: Budget
    rtol: dict[str, float] = field(default_factory=dict)
    atol: dict[str, float] = field(default_factory=dict)
    measured: dict[str, Budget] = field(default_factory=dict)  # from a noise floor
    arbiter: Arbiter | None = None  # who decides beyond an automatic budget

    def __call__(self, output: str) -> Budget:
        base = self.measured.get(output, self.default)
        if output not in self.rtol and output not in self.atol:
            return base
        return Budget(self.rtol.get(output, base.rtol), self.atol.get(output, base.atol), "given")

    def is_auto(self, output: str) -> bool:
        """Whether nobody asked for this budget, so that float64 may decide beyond it."""
        return self(output) == AUTO_BUDGET

    def check_names(self, names: Sequence[str], model: Subject | None = None) -> None:
        """Refuse thresholds for what is no output, and let a role's name stand for the file's own.

        Raises
        ------
        InputError
            With the names that there are.
        """
        roles = aliases(model.found) if model is not None and model.found is not None else {}
        for kind, values in (("rtol", self.rtol), ("atol", self.atol)):
            for name in list(values):
                if name not in names and name in roles:
                    values[roles[name]] = values.pop(name)
                elif name not in names:
                    valid = ", ".join(dict.fromkeys([*names, *roles])) if len(names) < 40 else nearest(name, names)
                    raise InputError(f"--{kind} {name}:{values[name]:g}: there is no output {name!r}; there is {valid}")


def parse_budgets(preset: str, rtol: Sequence[str], atol: Sequence[str]) -> Budgets:
    """--preset, and --rtol / --atol as V (for everything) or NAME:V (for one output)."""
    one_of("preset", preset, (AUTO, *PRESETS))
    base = AUTO_BUDGET if preset == AUTO else PRESETS[preset]
    values: dict[str, dict[str, float]] = {"rtol": {}, "atol": {}}
    for kind, texts in (("rtol", rtol), ("atol", atol)):
        for text in strings(kind, texts):
            name, colon, digits = text.rpartition(":")
            try:
                value = float(digits)
            except ValueError:
                value = -1.0
            if not 0 <= value < math.inf or bool(name) != bool(colon):
                raise InputError(f"--{kind} takes V or NAME:V with a number V >= 0, got {text!r}")
            values[kind][name] = value
    if "" in values["rtol"] or "" in values["atol"]:
        base = Budget(values["rtol"].pop("", base.rtol), values["atol"].pop("", base.atol), "given")
    return Budgets(base, values["rtol"], values["atol"])


class Arbiter:
    """The file in float64: beyond an automatic budget it tells rounding, which both parties make, from a mistake."""

    def __init__(self, model: Subject) -> None:
        self.model = model
        self._runs: dict[str, tuple[dict[str, Array], dict[str, Array]]] = {}

    @cached_property
    def _ports(self) -> dict[str, tuple[str, ...]]:
        return {p.name: taps_of(p) for p in self.model.recognised.outputs}

    def _values(self, case: Case) -> tuple[dict[str, Array], dict[str, Array]]:
        """What the outputs hold, in float64 and in float32, by tap."""
        if case.name not in self._runs:
            call = self.model.call(case.feeds)
            wanted = {tap for taps in self._ports.values() for tap in taps}
            last = max(wanted, key=tap_names(self.model.config).index)
            runs = [
                {tap: v for tap, v in self.model.program.walk(call, dtype, until=last) if tap in wanted}
                for dtype in (np.float64, np.float32)
            ]
            self._runs = {case.name: (runs[0], runs[1])}
        return self._runs[case.name]

    def noise(self, found: Comparison, case: Case, a: Array, b: Array) -> int:
        """How many of the numbers beyond the budget are rounding: none unless all that both parties do is round.

        Both must be about equally near to float64, or as near as plain float32 is, and a number's difference no
        larger than two such errors make.
        """
        try:
            call = self.model.call(case.feeds)
            mine, theirs = (self.model.outputs_as_taps({found.output: x}, call) for x in (a, b))
            exact, low = self._values(case)
        except Gpt2npError:
            return 0
        count = 0
        for tap in self._ports.get(found.output, ()):
            if tap not in mine or tap not in theirs:
                return 0
            keep = kept(tap, call)
            errors = [difference(x[tap], exact[tap]) for x in (mine, theirs, low)]
            if keep is not None:
                errors = [np.where(keep, e, 0.0) for e in errors]
            if not all(np.isfinite(e).all() for e in errors):
                return 0
            near, far, floor = (float(np.sqrt(np.mean(e * e))) for e in errors)
            if max(near, far) > EQUALLY_NEAR * max(min(near, far), floor):
                return 0
            rows = [np.sqrt(np.mean(e * e, axis=-1, keepdims=True)) for e in errors]
            typical = np.sqrt(rows[0] ** 2 + rows[1] ** 2 + rows[2] ** 2)
            apart = difference(mine[tap], theirs[tap])
            outside = apart > found.budget.atol + found.budget.rtol * np.abs(theirs[tap])
            if keep is not None:
                outside &= keep
            count += int((outside & (apart <= ROUNDING * typical)).sum())
        return count


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
        budgets.measured[name] = Budget(0.0, FLOOR_FACTOR * floor, f"{FLOOR_FACTOR:g} x the noise floor {floor:.2g}")
    report.budget = f"{FLOOR_FACTOR:g} x ONNX Runtime's largest difference from itself (threads, optimisations, batch)"
    rows = [(n, number(f), number(budgets.measured[n].atol)) for n, f in floors.items()]
    report.tables.append(Table("noise floor and budget (max abs)", ("output", ">floor", ">atol"), rows))
    report.details["noise_floor"] = floors


def _joined(name: str, alone: Sequence[Mapping[str, Array]], expected: Array) -> Array | None:
    """Outputs of single sequences put together along the axis that makes the batch's shape."""
    for axis in range(expected.ndim):
        value = np.concatenate([a[name] for a in alone], axis=axis)
        if value.shape == expected.shape:
            return value
    return None
