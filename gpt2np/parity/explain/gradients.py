"""Reverse mode through the operations: how much each weight, or each tap, could have caused a difference.

Used to find a single wrong weight element among millions, and to say which mistakes are worth a whole run: the
gradient of the error with respect to everything costs one backward pass. Only unmodified operations are
differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ...call import Call
from ...weights import Array
from ..operations import OPERATIONS, split_tap, tap_inputs
from ..program import Program

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)


class Gradients:
    """Cotangents flow from the observed taps back to the weights of `taps`, in float64."""

    def __init__(
        self, program: Program, call: Call, values: Mapping[str, Array], taps: Sequence[str],
        check: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """check: called before each operation, to end a pass that takes too long."""
        self.program, self.call, self.values, self.taps, self.check = program, call, values, list(taps), check
        self.at_taps: dict[str, Array] = {}  # of the last pass: the cotangent of each tap's own value

    def __call__(self, cotangents: Mapping[str, Array]) -> dict[str, Array]:
        """{weight name: sum over the observed taps of cotangent . d tap / d weight}."""
        flow: dict[str, Array] = {tap: np.array(value, np.float64) for tap, value in cotangents.items()}
        grads: dict[str, Array] = {}
        self.at_taps = {}
        for tap in reversed(self.taps):
            if tap not in flow:
                continue
            self.check()
            g = self.at_taps[tap] = flow.pop(tap)
            inputs = tap_inputs(tap, self.program.config)
            x = [self.values[name] for name in inputs]
            back = OPERATIONS[split_tap(tap)[1]].gradient(self.program, self.call, tap, g, x, self.values[tap])
            for name, grad in back.weights.items():
                grads[name] = grads[name] + grad if name in grads else grad
            for name, cotangent in zip(inputs, back.inputs, strict=True):
                if name in self.taps:
                    flow[name] = flow[name] + cotangent if name in flow else cotangent
        return grads
