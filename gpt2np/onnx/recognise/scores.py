"""What happens to scores between the product with the keys and the softmax: a factor, and what is masked how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from ...errors import UnsupportedModelError
from ...masks import CAUSAL, MaskRule
from ..evaluate.evaluator import Evaluator
from ..evaluate.operators import is_float
from .attention import AttentionFound
from .inputs import declared_shape, element_type
from .masks import mask_shapes, read_mask
from .probe import Probe
from .products import AttentionCore

Array = np.ndarray

FAR_BELOW = -1e6  # such a score is far below any other, whatever they are multiplied by


@dataclass(frozen=True)
class MaskFound:
    """What a layer does to its scores."""

    mask: MaskRule
    scale: float  # what q·k is multiplied by


class ScoreProbe:
    """Scores of two sizes sent through the masks of all layers, for one attention_mask after another."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.half = any(t.dtype == np.float16 for t in probe.graph.initializers.values())
        port = next((p for p in probe.graph.inputs if p.name == probe.mask), None)
        self.declared = None if port is None else declared_shape(port)
        self.dtype = np.dtype(np.int64) if port is None else element_type(port)
        self.floating = is_float(np.empty(0, self.dtype))
        rng = np.random.default_rng(0)
        cores = (core for core, like in zip(probe.borders.cores, probe.alike, strict=True) if like is None)
        shapes = {core.scores.out: probe.known[core.scores.out].shape for core in cores}
        self.low = {name: rng.uniform(1, 2, shape) for name, shape in shapes.items()}
        self.high = {name: rng.uniform(-2, -1, shape) for name, shape in shapes.items()}
        self.runs: dict[Any, tuple[Evaluator, Evaluator]] = {}  # for each attention_mask; the layers share them

    def run(self, core: AttentionCore, attention_mask: Array | None) -> tuple[Array, Array]:
        """(factor, added): a score s becomes factor * s + added."""
        B, T, S = self.probe.B, self.probe.T, self.probe.sizes.S
        key = None if attention_mask is None else (attention_mask.shape, attention_mask.tobytes())
        if key not in self.runs:
            feeds: dict[str, Array] = {}
            if attention_mask is not None:
                feeds[self.probe.mask] = attention_mask if self.floating else attention_mask.astype(self.dtype)
            evaluator = self.probe.evaluator
            self.runs[key] = evaluator({**feeds, **self.low}), evaluator({**feeds, **self.high})
        one, two = (evaluator(core.masked).reshape(B, -1, T, S) for evaluator in self.runs[key])
        first, second = (scores[core.scores.out].reshape(B, -1, T, S) for scores in (self.low, self.high))
        with np.errstate(invalid="ignore"):
            factor = np.where(one == two, 0.0, (one - two) / (first - second))
            added = np.where(np.isinf(one), one, one - factor * first)
        added = np.where(np.abs(added) < 1e-8, 0.0, added)  # TensorFlow adds 1e-9 to every score
        if self.half:
            added = np.where(added < np.finfo(np.float16).min, -np.inf, added)
        return factor, added


def read_masks(probe: Probe, attentions: Sequence[AttentionFound]) -> tuple[list[MaskFound], bool]:
    """The masks of all layers, and whether the graph cuts queries and keys out of its attention_mask."""
    scores = ScoreProbe(probe)
    T, S = probe.T, probe.sizes.S
    given: list[tuple[tuple[int, ...] | None, bool]] = [(None, False)]
    if scores.declared is not None:
        given = list(mask_shapes(scores.declared, probe.B, T, S))
    found: list[MaskFound] = []
    cut = False
    for i, (core, attention) in enumerate(zip(probe.borders.cores, attentions, strict=True)):
        if (like := probe.alike[i]) is not None:
            found.append(found[like.first])
            continue
        after, mask, error = 1.0, CAUSAL, None
        for shape, is_cut in given:
            try:
                run = partial(scores.run, core)
                after, mask = read_mask(run, T, S, shape, is_cut, scores.floating, core.guarded)
            except (ValueError, UnsupportedModelError) as why:
                error = error or why
            else:
                given, cut, error = [(shape, is_cut)], is_cut, None
                break
        if error is not None:
            node = probe.graph.producers.get(core.masked)
            where = node.describe() if node else repr(core.masked)
            probe.graph.object(UnsupportedModelError(f"{where}: the mask of layer {i}: {error}"))
        usual = attention.heads[1] ** -0.5
        scale = attention.scale * after
        if mask.value > FAR_BELOW and abs(scale) > 100 * usual and mask.kind in ("replaced", "added"):
            what = f"scores of layer {i} are multiplied by {scale:g} and come near the {mask.value:g} of hidden ones"
            probe.graph.object(UnsupportedModelError(what))
        if core.zeroed:
            mask = replace(mask, blind_rows="zeros", zeroed=True)
        # rounded to float32 on the way
        found.append(MaskFound(mask, usual if np.isclose(scale, usual, rtol=1e-6) else scale))
    return found, cut
