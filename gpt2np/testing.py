"""Parity in tests: one assertion whose message is the report's essential lines.

    from gpt2np.testing import assert_parity

    def test_port(golden_trace):
        golden = golden_trace("prompt", lambda: gpt2np.load().trace(ids))
        assert_parity(my_port(ids), golden, budget="zoo")

The `golden_trace` fixture comes with the pytest plugin (gpt2np/pytest_plugin.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import ComparisonError, InputError

if TYPE_CHECKING:
    from .parity.metrics import Budget
    from .parity.trace import Trace

__all__ = ["assert_parity"]


def assert_parity(
    actual: Any,
    expected: Any,
    oracle: Any = None,
    budget: str | Budget | tuple[float, float] | Mapping[str, Any] = "zoo",
) -> None:
    """Raise AssertionError unless every array of `actual` is within its budget of the same one of `expected`.

    Parameters
    ----------
    actual, expected : array or tensor, mapping of name to one, Output, tuple of arrays, Trace, or a trace's path
        Names must be the same on both sides; a missing one is a failure.
    oracle : the same, optional
        Values in float64, to say which side is closer to them: R = rms(actual - oracle) / rms(expected - oracle).
    budget : preset name, (rtol, atol), Budget, or {name or "": any of these}
        An element passes if |actual - expected| <= atol + rtol * |expected|. Presets: zoo, onnx, ort-gpt2, strict.

    Raises
    ------
    AssertionError
        With a table of what is out of budget: how far, where, and who is closer to the oracle.
    ComparisonError
        If there is nothing to compare.
    InputError
        If an argument is none of the above.
    """
    __tracebackhide__ = True  # pytest shows the test, not this
    from .parity.compare import Comparison
    from .parity.metrics import measure, rms
    from .parity.report import number
    from .parity.text import comparison_table, table_lines

    a, b = _arrays(actual), _arrays(expected)
    c = {} if oracle is None else _arrays(oracle)
    if not any(array.size for array in (*a.values(), *b.values())):
        raise ComparisonError("nothing to compare: both sides are empty")
    results: list[Comparison] = []
    for name in [*b, *(n for n in a if n not in b)]:
        result = Comparison("", name, "actual", "expected", _budget(budget, name))
        if name not in a or name not in b:
            result.problem = f"missing in {'actual' if name not in a else 'expected'}"
        else:
            try:
                result.metrics = measure(a[name], b[name], result.budget)
            except ComparisonError as error:
                result.problem = str(error)
        results.append(result)
    failed = [r for r in results if not r.ok]
    if not failed:
        return
    lines = [f"parity: {len(failed)} of {len(results)} arrays out of budget; the first is {failed[0].output}"]
    table = comparison_table(failed[:12])
    lines += [text for text, _ in table_lines(table)] if table is not None else []
    for r in failed[:12]:
        m = r.metrics
        if m is None:
            lines.append(f"{r.output}: {r.problem}")
            continue
        text = f"{r.output}: {m.failing} of {m.elements} elements outside {r.budget};"
        lines.append(f"{text} at {list(m.at)} {m.actual_at:.9g}, expected {m.expected_at:.9g}")
        if r.output in c and c[r.output].shape == m.shape:
            near, far = rms(a[r.output], c[r.output]), rms(b[r.output], c[r.output])
            ratio = near / far if far else float("inf") if near else 1.0
            closer = "a tie" if 0.8 < ratio < 1.25 else "actual is closer" if ratio < 1 else "expected is closer"
            lines.append(f"{r.output}: against the oracle R = {number(ratio)}, {closer}")
    if len(failed) > 12:
        lines.append(f"and {len(failed) - 12} more")
    raise AssertionError("\n".join(lines))


def _arrays(value: Any) -> dict[str, np.ndarray]:
    """Any accepted form as {name: array}; one array alone is called "array"."""
    from .parity.forms import as_array, named
    from .parity.trace import Trace, load

    if isinstance(value, (str, Path)):
        value = load(Path(value))
    if isinstance(value, Trace):
        return {**value.outputs, **value.taps}
    several = isinstance(value, (tuple, list)) and all(hasattr(v, "shape") for v in value)
    if isinstance(value, Mapping) or hasattr(value, "_fields") or (several and len(value)):
        given = named(value, [f"output{i + 1}" for i in range(len(value))], "the arrays")
        return {name: as_array(array, f"{name!r} is given") for name, array in given.items()}
    if hasattr(value, "detach"):  # a torch tensor
        value = as_array(value, "the array is given")
    try:
        array = np.asarray(value)
    except ValueError:  # lists of unequal lengths
        array = np.empty(0, object)
    if array.dtype == object:
        raise InputError(f"expected an array, a mapping of arrays, or a trace, got {type(value).__name__}")
    return {"array": array}


def _budget(given: Any, name: str) -> Budget:
    from .parity.metrics import PRESETS, Budget

    if isinstance(given, Mapping):
        if name not in given and "" not in given:
            return PRESETS["zoo"]
        return _budget(given.get(name, given.get("")), name)
    if isinstance(given, Budget):
        return given
    if isinstance(given, str) and given in PRESETS:
        return PRESETS[given]
    if isinstance(given, tuple) and len(given) == 2:
        return Budget(float(given[0]), float(given[1]))
    raise InputError(f"budget must be one of {', '.join(PRESETS)}, (rtol, atol), a Budget, or a mapping; got {given!r}")


def as_trace(value: Any) -> Trace:
    """Arrays by name as a trace that can be saved."""
    from .parity.trace import Trace, provenance

    if isinstance(value, Trace):
        return value
    return Trace({}, {}, _arrays(value), provenance({}, runner="golden"))
