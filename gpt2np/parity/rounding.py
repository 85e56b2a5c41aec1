"""What a file's own rounding does to its outputs, and what is left of a difference once that is imitated.

gpt2np computes in float32 with the file's exact weights; what runs a float16 or quantised file rounds in between.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import Gpt2npError
from ..weights import Array
from .budgets import Budgets
from .cases import Case
from .compare import Comparison, compare_arrays
from .metrics import Budget, measure
from .report import Report, Table, number
from .subject import Subject

if TYPE_CHECKING:
    from ..onnx.emulate.literal import Literally

UNROUNDED = "unrounded"
FACTOR = 2.0  # the budget of a lossy file grows by so many times the change that its rounding makes
VARIANTS: dict[Literally, str] = {
    True: "imitated as ONNX Runtime rounds without optimisations",
    "optimised": "imitated as with ONNX Runtime's optimisations, which make products with dequantised weights round",
    "saturating": "imitated as on a CPU without VNNI, where sums of two 8-bit products saturate at 16 bits",
}


@functools.cache
def saturates() -> bool:
    """Whether ONNX Runtime, on this machine, cuts the sum of two products of uint8 with int8 off at 16 bits.

    That depends on the CPU and on ONNX Runtime's version, so one such product is run.
    """
    import onnxruntime
    from onnx import helper, numpy_helper

    row, column = np.full((1, 2), 255, np.uint8), np.full((2, 1), 127, np.int8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["row", "column"], ["product"])],
        "product",
        [helper.make_tensor_value_info("row", helper.np_dtype_to_tensor_dtype(row.dtype), row.shape)],
        [helper.make_tensor_value_info("product", helper.np_dtype_to_tensor_dtype(np.dtype(np.int32)), (1, 1))],
        [numpy_helper.from_array(column, "column")],
    )
    file = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    session = onnxruntime.InferenceSession(file.SerializeToString(), providers=["CPUExecutionProvider"])
    return int(session.run(None, {"row": row})[0][0, 0]) != 2 * 255 * 127


def rounds(model: Subject) -> tuple[str, list[Literally]]:
    """How the file rounds on the way, in words ("" for a float32 file), and the ways to imitate it."""
    file = model.file
    kinds = {t.dtype.name for t in file.tensors.values()}
    ways: list[Literally] = [True]
    if any("DequantizeLinear" in source.through for source in model.recognised.sources.values()):
        ways.append("optimised")
    if any("rounded" in note for note in model.recognised.notes):
        return "activations to 8 bits", [*ways, "saturating"] if "int8" in kinds else ways
    if len(ways) > 1:
        return "activations to 8 bits by ONNX Runtime's optimisations", ways
    return "results to 16 bits" if kinds & {"float16", "bfloat16"} else "", ways


@dataclass
class Rounding:
    """Outputs with the rounding imitated in each way, for every case, and their distance from the parties."""

    words: str
    plain: Budgets  # before they are widened; for float16 after
    unrounded: dict[str, dict[str, Array]]  # case -> output: the file's nodes one by one, without rounding
    changes: dict[str, float]  # of each output, by the way that changes it most
    imitated: dict[Literally, dict[str, dict[str, Array]]]  # way -> case -> output
    left: dict[str, dict[Literally, dict[str, float]]] = field(default_factory=dict)  # party -> way -> output

    @classmethod
    def measure(cls, model: Subject, cases: Sequence[Case], budgets: Budgets, report: Report) -> Rounding | None:
        """Widen the budget by what the rounding changes, ours with it against ours without; None if nothing rounds."""
        words, ways = rounds(model)
        if not words:
            return None
        if "saturating" in ways and all(case.data is None for case in cases):  # nothing was recorded on another CPU
            ways.remove(True if saturates() else "saturating")
        exact = model.session("numpy", rounding="unrounded")
        names = [o.name for o in exact.get_outputs()]
        unrounded = {c.name: dict(zip(names, exact.run(names, c.feeds), strict=True)) for c in cases}
        changes = dict.fromkeys(names, 0.0)
        imitated: dict[Literally, dict[str, dict[str, Array]]] = {}
        for way in ways:
            session = model.session("numpy", rounding=way)
            imitated[way] = {}
            for case in cases:
                outputs = dict(zip(names, session.run(names, case.feeds), strict=True))
                imitated[way][case.name] = outputs
                for name, a in unrounded[case.name].items():
                    changes[name] = max(changes[name], measure(a, outputs[name], budgets.default).max_abs)
        plain, base = replace(budgets, measured={}), budgets.default
        if max(changes.values()) <= base.atol:
            return None
        for name, change in changes.items():
            source = f"{base.source}, plus {FACTOR:g} x the file's own rounding"
            budgets.measured[name] = Budget(base.rtol, base.atol + FACTOR * change, source)
        report.budget += f"; plus {FACTOR:g} x what the file's rounding of {words} changes"
        half = any(t.dtype.name == "float16" for t in model.file.tensors.values())
        if half:  # constants of GELU and the like are rounded, too, and ours are not
            plain = budgets
        text = f"the file's own nodes, run one by one in NumPy without rounding{'' if half else '; the plain budget'}"
        report.parties[UNROUNDED] = text
        return cls(words, plain, unrounded, changes, imitated)

    def compare_ours(
        self, model: Subject, case: Case, ours: str, outputs: Mapping[str, Array] | Gpt2npError, padding: bool = False
    ) -> Iterator[Comparison]:
        """Ours against the file's nodes without rounding: what its rounding changes hides no error there."""
        if not isinstance(outputs, Gpt2npError):
            for name, expected in self.unrounded[case.name].items():
                found = Comparison(case.name, name, ours, UNROUNDED, self.plain(name))
                compare_arrays(found, outputs[name], expected, model, case, self.plain, padding)
                yield found

    def compare(self, case: Case, outputs: Mapping[str, Mapping[str, Array] | Gpt2npError]) -> None:
        """Note how far each party's outputs are from each imitation."""
        for party, given in outputs.items():
            for way, cases in self.imitated.items():
                found = self.left.setdefault(party, {}).setdefault(way, {})
                for name, ours in cases[case.name].items():
                    if not isinstance(given, Gpt2npError) and name in given and given[name].shape == ours.shape:
                        a, b = (np.asarray(v, np.float64) for v in (ours, given[name]))
                        distance = float(np.abs(a - b).max(initial=0))
                        found[name] = max(found.get(name, 0.0), distance)

    def show(self, report: Report, budgets: Budgets) -> None:
        """Add the table to a report: for each party by the way that comes closest to it."""
        ways = {party: min(found, key=lambda w: sum(found[w].values())) for party, found in self.left.items()}
        rows: list[tuple[str, ...]] = []
        details: dict[str, Any] = {}
        for name, change in self.changes.items():
            left = {p: self.left[p][ways[p]].get(name, float("nan")) for p in ways}
            budget = budgets(name)
            rows.append((name, number(change), f"{budget.rtol:g}", number(budget.atol), *map(number, left.values())))
            details[name] = {"changes": change, "left": left}
        notes = [
            f"{', '.join(p for p in ways if ways[p] == way)}: {VARIANTS[way]}" for way in dict.fromkeys(ways.values())
        ]
        if "saturating" in self.imitated:
            kind = "saturate" if saturates() else "exact"
            notes.append(f"sums of two 8-bit products by ONNX Runtime on this CPU: {kind}")
        title = f"rounding of {self.words}: what it changes at most, and what is left of each party once it is imitated"
        head = ("output", ">changes", ">rtol", ">atol", *(f">{party}" for party in ways))
        report.tables.append(Table(title, head, rows, notes=notes))
        report.details["rounding"] = details
