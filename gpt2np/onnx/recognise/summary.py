"""From what was found of the parts to a configuration, and what is left over."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ...config import GPT2Config
from ...errors import UnsupportedModelError, WeightError
from ...masks import MaskRule
from ...weights import weight_shapes
from ..evaluate.operators import is_float
from ..graph import Graph
from .attention import AttentionFound
from .mlp import MLPFound
from .scores import MaskFound
from .sources import Source


def make_config(
    graph: Graph,
    sources: Mapping[str, Source],
    epsilons: Mapping[str, float],
    attentions: Sequence[AttentionFound],
    mlps: Sequence[MLPFound],
    masks: Sequence[MaskFound],
    tied: bool,
    offset: int,
    takes_mask: bool,
) -> tuple[GPT2Config, list[str]]:
    """The hyper-parameters, and notes of what is odd about them."""
    V, C = sources["wte.weight"].shape
    heads = [found.heads for found in attentions]
    H, D = heads[0]
    if len(set(heads)) > 1:
        raise UnsupportedModelError(f"the layers have different heads: {sorted(set(heads))}")
    rules = masks_in_common([found.mask for found in masks], takes_mask)
    mask = Counter(rules).most_common(1)[0][0]
    for i, found in enumerate(masks):
        if rules[i] != mask:
            usual = rules.index(mask)
            what = f"layer {i} is masked otherwise ({found.mask.describe()}) than layer {usual} ({mask.describe()})"
            graph.object(UnsupportedModelError(what))
    activations = {i: found.activation for i, found in enumerate(mlps)}
    scales = {i: found.scale for i, found in enumerate(masks)}
    epsilon, activation = _usual(epsilons, 1e-5), _usual(activations, "gelu_tanh")
    scale = _usual(scales, D**-0.5)
    overrides: list[tuple[str, float | str]] = []
    overrides += [(f"{n}.epsilon", e) for n, e in epsilons.items() if e != epsilon]
    overrides += [(f"h.{i}.mlp.activation", a) for i, a in activations.items() if a != activation]
    overrides += [(f"h.{i}.attn.scale", s) for i, s in scales.items() if s != scale]
    notes = [f"{n} is {v}, unlike in the other layers" for n, v in overrides]
    if mask.others:
        values = ", ".join(f"{value:g}" for value in (mask.value, *mask.others))
        notes.append(f"layers hide later keys by different numbers: {values}")
    if mask.shift:
        notes.append(f"query i sees keys up to i{mask.shift:+d}: GPT-2 sees keys up to i")
    if not np.isclose(scale, D**-0.5, rtol=1e-3):
        notes.append(f"scores are scaled by {scale:g}; GPT-2 scales by 1/sqrt({D}) = {D**-0.5:g}")
    config = GPT2Config(
        n_layer=len(attentions),
        n_head=H,
        n_embd=C,
        n_ctx=sources["wpe.weight"].shape[0],
        vocab_size=V,
        n_inner=sources["h.0.mlp.c_fc.weight"].shape[1],
        head_size=D,
        layer_norm_epsilon=epsilon,
        activation=activation,
        attn_scale=scale,
        tied=tied,
        mask=mask,
        position_offset=offset,
        overrides=tuple(overrides),
    )
    return config, notes


def masks_in_common(masks: Sequence[MaskRule], takes_mask: bool) -> list[MaskRule]:
    """The layers' masks; one rule for all where they differ only in numbers that are far below any score.

    With an attention_mask a query may see no key, and then such a number decides what it gets.
    """
    first = masks[0]
    values = sorted({mask.value for mask in masks}, reverse=True)
    alike = [replace(mask, value=first.value, blind_rows=first.blind_rows) == first for mask in masks]
    if takes_mask or len(values) == 1 or not all(alike) or not all(mask.is_causal for mask in masks):
        return list(masks)
    return [replace(mask, value=values[0], blind_rows="masked", others=tuple(values[1:])) for mask in masks]


def _usual(found: Mapping[Any, Any], gpt2: Any) -> Any:
    """What most layers have; GPT-2's own where two are equally frequent."""
    counts = Counter(found.values())
    return max(counts, key=lambda value: (counts[value], value == gpt2))


def check_shapes(sources: Mapping[str, Source], config: GPT2Config) -> None:
    """Every weight must have the shape that the configuration asks for."""
    expected = {**weight_shapes(config), "lm_head.bias": (config.vocab_size,)}
    for name, shape in expected.items():
        if name in sources and sources[name].shape != shape:
            source = sources[name]
            raise WeightError(f"{name} from {source.describe()} has shape {source.shape}, expected {shape}")


def find_leftovers(
    graph: Graph, sources: Mapping[str, Source], head: Source | None, touched: set[str]
) -> tuple[tuple[str, str], ...]:
    """The initializers that are no weights, and why; a floating-point one without a part is an error."""
    used = {name for source in sources.values() for name in source.origin}
    ignored: list[tuple[str, str]] = []
    for name, tensor in graph.initializers.items():
        if name in used:
            continue
        floating = is_float(np.empty(0, tensor.dtype)) if tensor.dtype.kind != "O" else False
        size = math.prod(tensor.shape)
        if head is not None and name in head.origin:
            ignored.append((name, "the head: the same bytes as wte"))
        elif name in touched or name in graph.neutral:
            buffer = size > 4096 or (size > 1 and len(tensor.shape) > 1)
            ignored.append((name, "mask buffer" if buffer else "constant of the graph"))
        elif floating and size > 1 and (rounded := _rounded_copy(graph, name, sources)):
            ignored.append((name, f"what {rounded} was rounded from"))
        elif floating and size > 1:
            what = f"initializer {name!r} {tensor.shape} is left over: it is no weight of this GPT-2"
            graph.object(WeightError(what))
            ignored.append((name, "left over"))
        else:
            ignored.append((name, "constant of the graph"))
    return tuple(ignored)


def _rounded_copy(graph: Graph, name: str, sources: Mapping[str, Source]) -> str:
    """The quantised weight that an initializer without readers was rounded to, "" if there is none."""
    if graph.consumers(name):
        return ""
    for weight, source in sources.items():
        quantised = any(graph.constants[origin].dtype.kind not in "f" for origin in source.origin)
        if quantised and source.shape == graph.shape(name):
            exact, rounded = graph.constant(name), source.load()
            if np.abs(exact - rounded).max() <= 0.02 * np.abs(exact).max():
                return weight
    return ""
