"""Parity in tests: one assertion whose message is the report's essential lines.

    from gpt2np.testing import assert_parity

    def test_port(golden_trace):
        golden = golden_trace("prompt", lambda: gpt2np.load().trace(ids), stats_only=True)
        assert_parity(my_port(ids), golden, budget="zoo")

The `golden_trace` fixture comes with the pytest plugin (gpt2np/pytest_plugin.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .arguments import one_of, strings
from .errors import ComparisonError, Gpt2npError, InputError

if TYPE_CHECKING:
    from .arrays import Array
    from .parity.compare import Comparison
    from .parity.metrics import Budget
    from .parity.trace import Trace

__all__ = ["ParityError", "assert_parity"]
__tracebackhide__ = True  # pytest shows the test, not what is here


class ParityError(AssertionError):
    """Arrays are apart; `first` is the name of the first one."""

    def __init__(self, message: str, first: str) -> None:
        super().__init__(message)
        self.first = first


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
        Names must be the same on both sides; a missing one is a failure. Where one side is a trace that holds
        statistics of its taps, or some of the taps alone, the other side's are taken likewise. `actual` may also be
        a function: it is called with the inputs that the trace `expected` was recorded on.
    oracle : the same, optional
        Values in float64, to say which side is closer to them: R = rms(actual - oracle) / rms(expected - oracle).
    budget : preset name, (rtol, atol), Budget, or {name or "": any of these}
        An element passes if |actual - expected| <= atol + rtol * |expected|. Presets: zoo, onnx, ort-gpt2, strict.
        A name must be that of an array, so that a misspelt one is no wider budget.

    Raises
    ------
    ParityError
        An AssertionError, with a table of what is out of budget: how far, where, and who is closer to the oracle.
    ComparisonError
        If nothing is compared: there are no numbers, all of them are NaN or infinite on both sides, or noise of their
        own size would pass the budget.
    InputError
        If an argument is none of the above.
    """
    __tracebackhide__ = True
    try:
        failed = _compare(actual, expected, oracle, budget)
    except Gpt2npError as error:
        raise error.with_traceback(None) from None  # where in gpt2np it was found tells a test's reader nothing
    if failed is not None:
        raise failed


def _compare(actual: Any, expected: Any, oracle: Any, budget: Any) -> ParityError | None:
    """What is out of budget, or None; see `assert_parity`."""
    from .parity.compare import Comparison
    from .parity.metrics import measure, rms
    from .parity.report import number
    from .parity.text import comparison_table, table_lines
    from .parity.trace import shapes_apart

    mine, its = _pair(actual, expected)
    a, b = ({**side.outputs, **side.taps} for side in (mine, its))
    c = {} if oracle is None else _arrays(oracle)
    if not any(array.size for array in (*a.values(), *b.values())):
        raise ComparisonError("nothing to compare: both sides are empty")
    _check_oracle(c, a)
    results: list[Comparison] = []
    for name, allowed in _budgets(budget, {**b, **a}).items():
        result = Comparison("", name, "actual", "expected", allowed, problem=shapes_apart(mine, its, name))
        if name not in a or name not in b:
            result.problem = f"missing in {'actual' if name not in a else 'expected'}"
        elif not result.problem:
            try:
                result.metrics = measure(a[name], b[name], result.budget)
            except ComparisonError as error:
                result.problem = str(error)
        results.append(result)
    failed = [r for r in results if not r.ok]
    if not failed:
        _check_compared(results)
        return None
    lines = [f"parity: {len(failed)} of {len(results)} arrays out of budget; the first is {failed[0].output}"]
    table = comparison_table(failed[:12])
    if table is not None:
        lines += [text for text, _ in table_lines(table)]
    for r in failed[:12]:
        m = r.metrics
        if m is None:
            lines.append(f"{r.output}: {r.problem}")
            continue
        text = f"{r.output}: {m.failing} of {m.elements} elements outside {r.budget};"
        lines.append(f"{text} at {list(m.at)} {m.actual_at:.9g}, expected {m.expected_at:.9g}")
        if r.output in c and c[r.output].shape == m.shape:
            near, far = rms(a[r.output], c[r.output]), rms(b[r.output], c[r.output])
            ratio = 1.0 if near == far else near / far if far else float("inf")  # with a NaN in it both are infinite
            closer = "a tie" if 0.8 < ratio < 1.25 else "actual is closer" if ratio < 1 else "expected is closer"
            lines.append(f"{r.output}: against the oracle R = {number(ratio)}, {closer}")
    if len(failed) > 12:
        lines.append(f"and {len(failed) - 12} more")
    return ParityError("\n".join(lines), failed[0].output)


def _check_oracle(oracle: Mapping[str, Array], arrays: Mapping[str, Array]) -> None:
    """Raise InputError where an oracle says nothing of any array: a name may be misspelt."""
    if oracle and not any(name in arrays and v.shape == arrays[name].shape for name, v in oracle.items()):
        held, wanted = (", ".join(f"{n} {v.shape}" for n, v in some.items()) for some in (oracle, arrays))
        raise InputError(f"the oracle holds {held}: none of {wanted}")


def _check_compared(results: Sequence[Comparison]) -> None:
    """Raise ComparisonError where no array would have shown a wrong number; what is equal has no need of a budget."""
    said = {"empty": "there are no numbers", "not finite": "all numbers are NaN or infinite on both sides"}
    if all(r.idle and not (r.idle == "too wide" and r.metrics and r.metrics.max_abs == 0) for r in results):
        wide = f"noise of its own size would pass {results[0].budget}"
        raise ComparisonError(f"nothing is compared: {results[0].output}: {said.get(results[0].idle, wide)}")


def _pair(actual: Any, expected: Any) -> tuple[Trace, Trace]:
    """Both sides as traces; of what one trace holds as statistics, the other side's statistics."""
    from .parity.trace import Trace, alike, load

    sides = [load(Path(side)) if isinstance(side, (str, Path)) else side for side in (actual, expected)]
    if callable(sides[0]) and isinstance(sides[1], Trace):
        sides[0] = _called(sides[0], sides[1])
    a, b = (_as_parts(side, other) for side, other in (sides, sides[::-1]))
    for one, other in ((a, b), (b, a)):
        for name in one.manifest.get("taps_left_out", ()):
            other.taps.pop(name, None)
            other.outputs.pop(name, None)
    alike(a, b)
    return a, b


def _as_parts(side: Any, other: Any) -> Trace:
    """One side as a trace of its own; what are taps in the other one are taps in it."""
    from .parity.forms import as_array
    from .parity.trace import Trace

    if isinstance(side, Trace):
        made, held = (
            {n: as_array(v, f"{n!r} is given") for n, v in some.items()} for some in (side.outputs, side.taps)
        )
        return Trace({}, made, held, side.manifest)
    arrays = _arrays(side)
    taps = {name: v for name, v in arrays.items() if isinstance(other, Trace) and name in other.taps}
    return Trace({}, {name: v for name, v in arrays.items() if name not in taps}, taps)


def _called(function: Any, golden: Trace) -> Any:
    """What a function gives for a trace's inputs."""
    from .parity.forms import named

    if not golden.inputs:
        raise InputError("the trace holds no inputs to call the function with: golden_trace(..., inputs={...})")
    given = function({name: value.copy() for name, value in golden.inputs.items()})
    return named(given, list(golden.outputs) or list(golden.taps), "the function")


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
    if hasattr(value, "detach") or hasattr(value, "harden_mask"):  # a torch tensor, or a masked array
        value = as_array(value, "the array is given")
    try:
        array = np.asarray(value)
    except ValueError:  # lists of unequal lengths
        array = np.empty(0, object)
    if array.dtype == object:
        raise InputError(f"expected an array, a mapping of arrays, or a trace, got {type(value).__name__}")
    return {"array": array}


def _budgets(given: Any, arrays: Mapping[str, Array]) -> dict[str, Budget]:
    """The budget of each array; InputError for what is none, or is for an array that is not there: a misspelt name."""
    if not isinstance(given, Mapping):
        return dict.fromkeys(arrays, _budget(given))
    found = {str(name): _budget(one) for name, one in given.items()}
    for name in found:
        if name and name not in arrays:
            raise InputError(
                f"a budget is given for {name!r}, and there is no such array: there is {', '.join(arrays)}"
            )
    return {name: found.get(name) or found.get("") or _budget("zoo") for name in arrays}


def _budget(given: Any) -> Budget:
    from .parity.metrics import PRESETS, Budget

    if isinstance(given, Budget):
        return given
    if isinstance(given, str) and given in PRESETS:
        return PRESETS[given]
    if isinstance(given, tuple) and len(given) == 2:
        return Budget(*given)
    raise InputError(f"budget must be one of {', '.join(PRESETS)}, (rtol, atol), a Budget, or a mapping; got {given!r}")


def as_trace(
    value: Any,
    taps: Sequence[str] = ("*",),
    stats_only: bool = False,
    dtype: str | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> Trace:
    """What a test calls golden, as a trace that can be saved.

    Parameters
    ----------
    value : as `assert_parity` takes it
    taps : patterns of names
        Taps that match none are left out; what is no tap is an output, and stays.
    stats_only : bool
        Keep of each tap (docs/taps.md) 16 numbers: rms, largest, and 14 elements. Other arrays stay whole.
    dtype : str, optional
        What numbers are stored as, "float16" for half the size. Rounding to it uses half of the zoo's rtol.
    inputs : arrays by name, optional
        What `value` was computed from, for `assert_parity(function, golden)`.
    """
    from .parity.forms import as_array
    from .parity.operations import is_tap
    from .parity.trace import Trace, provenance, summed_up

    if dtype is not None:
        one_of("dtype", dtype, ("float16", "float32", "float64"))
    taps = strings("taps", taps)
    if not isinstance(inputs, Mapping | None):
        raise InputError(f"inputs must be arrays by name, got {type(inputs).__name__}")
    if not isinstance(value, Trace):
        arrays = _arrays(value)
        outputs = {name: array for name, array in arrays.items() if not is_tap(name)}
        value = Trace(
            {}, outputs, {n: v for n, v in arrays.items() if n not in outputs}, provenance({}, runner="golden")
        )
    if stats_only and value.manifest.get("stats_only"):
        raise InputError("the trace holds statistics already")
    kept = {name: v for name, v in value.taps.items() if any(fnmatchcase(name, pattern) for pattern in taps)}
    left_out = [name for name in value.taps if name not in kept]
    more = {name: as_array(array, f"the input {name!r} is given") for name, array in (inputs or {}).items()}
    given = {**value.inputs, **more}
    outputs = value.outputs if dtype is None else {n: _stored(v, dtype) for n, v in value.outputs.items()}
    if dtype is not None and not stats_only:
        kept = {name: _stored(array, dtype) for name, array in kept.items()}
    made = Trace(given, outputs, kept, {**value.manifest, "taps": list(taps), "taps_left_out": left_out})
    return summed_up(made) if stats_only else made


def changes(before: Trace | None, after: Trace) -> str:
    """What a golden trace that is written anew changes, in words; "" where it is the same."""
    from .parity.metrics import difference
    from .parity.report import number

    if before is None:
        return "new"
    old, new = ({**t.inputs, **t.outputs, **t.taps} for t in (before, after))
    words = [f"without {name}" for name in old if name not in new] + [f"new {name}" for name in new if name not in old]
    apart: dict[str, float] = {}
    for name in [n for n in old if n in new]:
        if (old[name].shape, old[name].dtype) != (new[name].shape, new[name].dtype):
            words.append(f"{name} is now {new[name].dtype} {list(new[name].shape)}")
        elif old[name].tobytes() != new[name].tobytes():
            apart[name] = float(difference(old[name], new[name]).max(initial=0))
    if apart:
        worst = max(apart, key=lambda name: apart[name])
        words.append(f"{len(apart)} of {len(new)} arrays changed, the most {worst}, by {number(apart[worst])}")
    if not words and before.manifest.get("shapes_of_taps") != after.manifest.get("shapes_of_taps"):
        words.append("shapes of taps")
    if not words and before.manifest.get("taps") != after.manifest.get("taps"):
        words.append("other patterns of taps")
    return "; ".join(words[:6]) + (f" and {len(words) - 6} more" if len(words) > 6 else "")


def _stored(array: Array, dtype: str) -> Array:
    if array.dtype.kind != "f":
        return array
    with np.errstate(over="ignore"):
        stored = array.astype(dtype)
    if (np.isinf(stored) & ~np.isinf(array)).any():
        raise InputError(
            f"there are numbers beyond {dtype}: the largest is {np.abs(array[np.isfinite(array)]).max():g}"
        )
    return stored
