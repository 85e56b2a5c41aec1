"""Where the values of a GPT-2 lie in a graph, and how its arrays become ours."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ...errors import UnsupportedModelError
from ..evaluate.evaluator import Evaluator
from ..evaluate.operators import is_float
from ..graph import VIEWS
from .probe import Probe
from .products import AttentionCore
from .recognised import TapLocation

Array = np.ndarray


def stream(name: str) -> TapLocation:
    """A value (B, T, width), or with batch and time merged."""
    return TapLocation(name, lambda a, batch: a if a.ndim == 3 else a.reshape(batch, -1, a.shape[-1]))


def widest(probe: Probe, name: str) -> str:
    """Of the views of a value, one that has a batch and a time axis."""
    graph = probe.graph
    views = [n.outputs[0] for n in graph.consumers(name) if n.op in VIEWS and n.inputs[0] == name]
    for view in [*graph.chain(name), *views]:
        try:
            if probe.evaluate(view).ndim == 3:
                return view
        except UnsupportedModelError:
            continue
    return name


def merged_heads(name: str, row_order: Array) -> TapLocation:
    """The heads side by side, in our order."""
    if (row_order == np.arange(len(row_order))).all():
        return stream(name)
    return TapLocation(name, lambda a, batch: a.reshape(batch, -1, a.shape[-1])[..., row_order])


def scores_tap(probe: Probe, core: AttentionCore, H: int, unmasked: float, scale: float) -> TapLocation:
    """Scores are tapped behind the last factor, before anything is masked."""
    value, factor = core.scores.out, unmasked
    while True:
        following = None
        for node in probe.graph.consumers(value):
            if node.op in ("Mul", "Div") and len(node.inputs) == 2:
                other = node.inputs[1] if node.inputs[0] == value else node.inputs[0]
                one = number(probe, other)
                if one is not None and (node.op == "Mul" or node.inputs[0] == value):
                    following = node.outputs[0], one if node.op == "Mul" else 1 / one
        if following is None or value == core.masked:
            break
        value, factor = following[0], factor * following[1]
    return TapLocation(value, by_head(H, scale / factor))


def number(probe: Probe, name: str) -> float | None:
    """A value that is one number, constant or computed from sizes."""
    try:
        value = probe.evaluate(name)
    except UnsupportedModelError:
        return None
    if value.size != 1 or not is_float(value) or not np.isfinite(value).all():
        return None
    return float(value.reshape(-1)[0])


def find_heads(probe: Probe, value: str, numbers: Array, probes: tuple[Evaluator, Evaluator]) -> TapLocation | None:
    """On the way from the map to the product: a value that holds all new positions, split into heads."""
    for candidate in probe.graph.ancestors(value, probe.known.keys()):
        if candidate in probe.graph.synthetic:
            continue
        try:
            array, unit = (evaluator(candidate) for evaluator in probes)
        except UnsupportedModelError:
            continue
        if array.size != numbers.size or not is_float(array):
            continue
        factor = float(unit.flat[0])
        for axes in ((0, 1, 2, 3), (0, 2, 1, 3), (0, 1, 3, 2), (0, 3, 1, 2)):
            if array.ndim == 4 and factor:
                moved = array.transpose(axes)
                if moved.shape == numbers.shape and np.allclose(moved / factor, numbers, rtol=1e-9):
                    return TapLocation(candidate, _moved(axes, factor))
    return None


def _moved(axes: tuple[int, ...], factor: float) -> Callable[[Array, int], Array]:
    return lambda a, batch: a.transpose(axes) if factor == 1 else (a.transpose(axes) / factor).astype(a.dtype)


def by_head(H: int, factor: float) -> Callable[[Array, int], Array]:
    """(B, H, T, S) from an array whose first two axes may be merged, times a number."""

    def convert(a: Array, batch: int) -> Array:
        a = a if a.ndim == 4 else a.reshape(-1, H, *a.shape[-2:])
        return a if np.isclose(factor, 1, rtol=1e-6) else (a * factor).astype(a.dtype)

    return convert
