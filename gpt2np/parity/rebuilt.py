"""A file that is no GPT-2, whose weights are a GPT-2's: these wired as they should be, beside the file's own graph.

Exporters keep the weights' names. Where a pass over the weights alone gives the recorded outputs, they are right and
the graph is not, and the first tap that the graph does not hold is where it goes wrong.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..call import Call, checked_call
from ..config import GPT2Config
from ..errors import Gpt2npError
from ..weights import Array, weight_shapes
from .cases import Case
from .explain.problem import Clock
from .localise import F32
from .metrics import Budget, measure
from .operations import linear_of, split_tap, tap_names
from .program import Program
from .report import Report, add_once
from .subject import Subject
from .wiring import Sound, Tensors, bracket_outputs, capture_tensors, place_wiring

ENOUGH = Budget(1e-3, 1e-4)  # within which the weights alone give the recorded outputs


def without_original(
    report: Report, model: Subject, cases: Sequence[Case], captured: Mapping[str, Any], clock: Clock | None = None
) -> None:
    """Place and cause of a file that cannot be placed, against its recorded outputs, into the report."""
    for case in cases:
        wrong = any(c.case == case.name and not c.ok and c.metrics is not None for c in report.comparisons)
        found = rebuilt(model, case) if wrong and case.data is not None else None
        if found is None:
            continue
        try:
            theirs = capture_tensors(model, case)
        except Gpt2npError as error:
            add_once(report.not_compared, f"the tensors inside: {error}")
            break
        program, call, tensors = found
        place_wiring(report, sound_of(program, call, tensors), model, theirs, case.name, clock)
        if report.place is not None:
            report.who = "the file's weights, wired as a GPT-2's, give the recorded outputs: its graph is what differs"
            return
    bracket_outputs(report, model, cases, captured)


def sound_of(program: Program, call: Call, tensors: Mapping[str, str]) -> Sound:
    """The GPT-2 of these weights, as another graph's tensors are put beside it."""
    taps, config = dict(program.walk(call, F32)), program.config

    def stand_in(tap: str, graph: Tensors) -> tuple[str | None, Array | None]:
        name = tensor_of(tap, graph, tensors, config)
        value = graph.values.get(name or "")
        third = {"attn.q": 0, "attn.k": 1, "attn.v": 2}.get(split_tap(tap)[1])
        if value is not None and third is not None and value.size == 3 * taps[tap].size:
            B, H, T, D = taps[tap].shape
            value = value.reshape(B, T, 3, H, D)[:, :, third].swapaxes(1, 2)
        return name, value.reshape(taps[tap].shape) if value is not None and value.size == taps[tap].size else None

    def read(layer: int) -> set[str]:
        return {held for name, held in tensors.items() if name.startswith(f"h.{layer}.mlp.")}

    return Sound(program, call, taps, {}, stand_in, read, ("a GPT-2", "the file"))


def rebuilt(model: Subject, case: Case) -> tuple[Program, Call, dict[str, str]] | None:
    """The GPT-2 of the file's weights, the call, and the initializer of each weight; None unless it fits the record."""
    assert case.data is not None
    tensors = {}
    for name in model.file.tensors:
        canonical = re.search(r"(?:^|\.)((?:wte|wpe|lm_head|ln_f|h\.\d+\.[a-z_0-9.]+)\.(?:weight|bias))$", name)
        if canonical:
            tensors[canonical[1]] = name
    if "lm_head.weight" in tensors:
        tensors.setdefault("wte.weight", tensors["lm_head.weight"])
    shapes = {name: tuple(model.file.tensors[held].shape) for name, held in tensors.items()}
    outputs, feeds = case.data.outputs, case.feeds
    if any(len(shapes.get(n, ())) != 2 for n in ("wte.weight", "wpe.weight", "h.0.mlp.c_fc.weight")):
        return None
    (V, C), F = shapes["wte.weight"], shapes["h.0.mlp.c_fc.weight"][1]
    layers = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("h."))
    for heads in heads_of(outputs, C):
        D = C // heads
        config = GPT2Config(layers, heads, C, shapes["wpe.weight"][0], V, F, D, attn_scale=1 / math.sqrt(D))
        if any(shapes.get(name) != shape for name, shape in weight_shapes(config).items()):
            return None
        call = call_of(config, feeds)
        if call is None:
            return None
        program = Program.of(config, {name: model.file.tensors[held] for name, held in tensors.items()})
        if fits(program, call, outputs):
            return program, call, tensors
    return None


def heads_of(outputs: Mapping[str, Array], C: int) -> list[int]:
    """H by the presents (.., B, H, S, D), else what is usual."""
    seen = {v.shape[-3] for v in outputs.values() if v.ndim >= 4 and v.shape[-3] * v.shape[-1] == C}
    return [*seen] or [h for h in dict.fromkeys((C // 64, 12, 16, 8, 4, 3, 2, 1)) if h and C % h == 0]


def call_of(config: GPT2Config, feeds: Mapping[str, Array]) -> Call | None:
    """Token ids, with positions and a mask where they have their usual names; None for any other input."""
    positions, mask, types = (feeds.get(n) for n in ("position_ids", "attention_mask", "token_type_ids"))
    ids = [v for n, v in feeds.items() if n not in ("position_ids", "attention_mask", "token_type_ids")]
    if len(ids) != 1 or ids[0].dtype.kind not in "iu":
        return None
    try:
        return checked_call(config, ids[0], position_ids=positions, attention_mask=mask, token_type_ids=types)
    except Gpt2npError:
        return None


def fits(program: Program, call: Call, outputs: Mapping[str, Array]) -> bool:
    """Whether a pass over these weights gives the recorded outputs: each is the tap of its numbers, or two of them."""
    held: list[Array] = []
    for tap, value in program.walk(call, F32):
        if split_tap(tap)[1] in ("attn.k", "attn.v", "ln_f", "logits"):
            held.append(value)
    pairs = [np.stack([k, v]) for k, v in zip(held[0:-2:2], held[1:-2:2], strict=True)]
    candidates = [*held, *pairs]
    return bool(outputs) and all(
        any(c.size == value.size and measure(value, c.reshape(value.shape), ENOUGH).ok for c in candidates)
        for value in outputs.values()
    )


def tensor_of(tap: str, graph: Tensors, tensors: Mapping[str, str], config: GPT2Config) -> str | None:
    """The tensor where a tap would be, told by the weights that are used beside it; None where they do not tell."""
    layer, part = split_tap(tap)

    def reader(weight: str) -> Any:
        return next((n for n in graph.nodes.values() if tensors.get(weight) in n.input), None)

    if part in ("ln_1", "ln_2", "ln_f") or part in ("attn.q", "attn.k", "attn.v", "attn.out", "mlp.c_fc", "mlp.out"):
        node = reader(f"{tap if 'ln_' in part else linear_of(tap)}.bias")
        return node.output[0] if node is not None else None
    if part in ("mlp.gelu", "attn.heads"):  # what c_proj reads
        node = reader(f"h.{layer}.{part.split('.')[0]}.c_proj.weight")
        return behind(node.input[0], graph) if node is not None else None
    if part in ("embed", "resid_mid", "resid_post"):  # what the next norm reads
        names = tap_names(config)
        norm = next(t for t in names[names.index(tap) :] if split_tap(t)[1] in ("ln_1", "ln_2", "ln_f"))
        return normalised(reader(f"{norm}.bias"), graph)
    if part == "attn.probs":  # what is multiplied with the values to make the heads
        heads = tensor_of(f"h.{layer}.attn.heads", graph, tensors, config)
        product = graph.nodes.get(behind(heads, graph, "Transpose")) if heads else None
        return str(product.input[0]) if product is not None and product.op_type == "MatMul" else None
    if part == "attn.scores":
        probs = tensor_of(f"h.{layer}.attn.probs", graph, tensors, config)
        return scores_of(probs, graph) if probs else None
    return None


def scores_of(probs: str, graph: Tensors) -> str | None:
    """Upwards from the probabilities: the first product, or what divides it or multiplies it by the scale."""
    pending = [probs]
    while pending:
        node = graph.nodes.get(pending.pop(0))
        if node is not None and node.op_type == "MatMul":
            scaled = [n for n in graph.nodes.values() if n.op_type in ("Div", "Mul") and node.output[0] in n.input]
            return str(scaled[0].output[0] if scaled else node.output[0])
        pending += node.input if node is not None else ()
    return None


def behind(tensor: str, graph: Tensors, *more: str) -> str:
    """The tensor that others are only another shape of."""
    while tensor in graph.nodes and graph.nodes[tensor].op_type in ("Reshape", "Identity", "Flatten", *more):
        tensor = graph.nodes[tensor].input[0]
    return tensor


def normalised(node: Any, graph: Tensors) -> str | None:
    """What a layer norm reads, upwards from the node that adds its bias: what has its mean taken off."""
    pending = [node] if node is not None else []
    while pending:
        node = pending.pop(0)
        if node.op_type == "LayerNormalization":
            return str(node.input[0])
        makers = [graph.nodes[name] for name in node.input if name in graph.nodes]
        if node.op_type == "Sub" and any(m.op_type == "ReduceMean" and m.input[0] == node.input[0] for m in makers):
            return str(node.input[0])
        pending += makers
    return None
