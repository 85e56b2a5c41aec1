"""Which GPT-2 a graph is: hyper-parameters, weights, intermediate values, inputs and outputs.

The search runs from the outputs backwards: the head, the last layer norm, then the terms of the residual
stream, each of them an attention or an MLP behind a layer norm of its own, down to the embeddings. Structure
finds the borders of each part (blocks.py). What a part does inside its borders is found by running it on inputs
that tell (probe.py): the columns of c_attn that become the query of head 3 are those whose numbers arrive there,
whatever mixture of Split, Slice, Reshape and Transpose carries them; the mask is what it does to scores; the
activation is the function whose values come out. Neither admits a node: that is the ledger's task (ledger.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ...arrays import keep_freed_memory
from ...config import GPT2Config
from ...errors import UnsupportedModelError, WeightError
from ...files import allowance
from ...weights import weight_shapes
from ..budget import OverBudget
from ..graph import Graph
from ..guard import typed_errors
from ..normalise.build import build_graph
from ..read.reader import ModelFile
from .admit import admit
from .attention import AttentionFound, read_attention
from .blocks import find_borders
from .embeddings import check_ids, find_positions
from .forms import cache_outputs, find_alike
from .head import HeadFound, read_head
from .inputs import find_inputs
from .ledger import Ledger
from .mlp import MLPFound, read_mlp
from .outputs import find_outputs, ports
from .probe import Probe, longest_tried, probes_of
from .proof import Findings, prove
from .recognised import Entry, Recognised, TapLocation
from .scores import read_masks
from .search import find_search
from .sources import Source
from .summary import check_shapes, find_leftovers, make_config
from .taps import scores_tap, stream


@typed_errors()
def recognise(file: ModelFile, refusals: list[UnsupportedModelError] | None = None) -> Recognised:
    """Find the GPT-2 in an ONNX file.

    Parameters
    ----------
    file : ModelFile
    refusals : list, optional
        Collects errors after which a GPT-2 can still be made out: a layer norm, activation or mask of another
        kind (taken for GPT-2's own), an initializer left over. For tools that look for what is wrong with a file.

    Raises
    ------
    UnsupportedModelError
        If a part of the graph is no part of a GPT-2, or malformed; the message names the node. Also if the file
        asks for more memory than one of its size gets (see `budget`).
    WeightError
        If a floating-point initializer is left over, missing, or of a shape that does not fit.
    """
    keep_freed_memory()
    found = _recognise(file, refusals)
    nbytes = sum(4 * math.prod(source.shape) for source in found.sources.values())
    if nbytes > allowance(file.nbytes):
        raise WeightError(f"the weights would take {nbytes:,} bytes, which a file of {file.nbytes:,} cannot hold")
    return found


def _recognise(file: ModelFile, refusals: list[UnsupportedModelError] | None) -> Recognised:
    search = find_search(file)
    if search is not None:
        inner = _recognise(search.decoder, refusals)
        return replace(inner, taps={}, search=search.named(inner.inputs))
    condition = merged_condition(file)
    if not condition:
        return read_graph(build_graph(file, refusals=refusals))
    # A merged decoder: one branch with past inputs, one without, over the same weights.
    branches = [read_graph(build_graph(file, b, refusals), condition) for b in ("then", "else")]
    branches.sort(key=lambda r: not any(p.role.startswith("past") for p in r.inputs))
    found, other = branches
    if _what(found) != _what(other):
        raise UnsupportedModelError(f"the branches of the If on {condition!r} are two different models")
    return replace(found, taps={})  # what is inside a branch cannot be an output of the file


def merged_condition(file: ModelFile) -> str:
    """The input that an If of the main graph chooses its branch by, "" if there is none."""
    inputs = {i.name for i in file.proto.graph.input}
    return next((n.input[0] for n in file.proto.graph.node if n.op_type == "If" and n.input[0] in inputs), "")


def _what(found: Recognised) -> tuple[object, ...]:
    """What two branches of one file must have in common."""
    weights = {name: (source.origin, source.through) for name, source in found.sources.items()}
    outputs = [(port.name, port.role, port.layer) for port in found.outputs]
    return found.config, found.positions, found.from_the_end, weights, outputs, found.head_padding is None


LOOKED_UP = frozenset({"input_ids", "token_type_ids", "position_ids"})  # roles of inputs that choose rows of tables


def admit_and_prove(
    probe: Probe, config: GPT2Config, found: Findings, notes: list[str]
) -> tuple[tuple[Entry, ...], frozenset[str]]:
    """Enter every node into the ledger, and try what was found at other sizes: n_ctx, one token behind a full cache.

    Returns the ledger and the roles of the inputs whose negative numbers count from the end.
    """
    graph, n_ctx = probe.graph, config.n_ctx - max(found.offset, 0)
    left = 0 if graph.budget is None else graph.budget.left
    asked = OverBudget()
    for longest in longest_tried(graph, n_ctx):
        try:
            probes = probes_of(probe, longest)
            entries = admit(Ledger(graph, probes), found.output_roles, found.taps)
            from_the_end = LOOKED_UP if graph.refusals is not None else prove(probes, found)
        except OverBudget as error:
            asked = error
            if graph.budget is not None:
                graph.budget.left = left
            continue
        if longest < n_ctx:
            notes.append(
                f"masks and positions were read for up to {longest:,} of {n_ctx:,} positions: the file is small"
            )
        return entries, from_the_end
    raise asked


def rounding_notes(graph: Graph, entries: Sequence[Entry]) -> list[str]:
    """What in a file is of a lower precision than its result here."""
    notes = [
        f"activations are rounded as the file is run, by {op} ({count} nodes); here they are not"
        for op, count in graph.roundings.items()
    ]
    casts = [entry for entry in entries if entry.role == "rounding" and entry.node.op == "Cast"]
    if casts:
        where = ", ".join(dict.fromkeys(entry.tap for entry in casts[:3]))
        notes.append(f"the graph rounds values to 16 bits, by {len(casts)} Cast nodes (at {where}); here they are not")
    return notes


def read_norms(probe: Probe, sources: dict[str, Source], taps: dict[str, TapLocation]) -> dict[str, float]:
    """Add the layer norms' weights and taps, and those of the stream between them; the epsilon of each."""
    borders = probe.borders
    norms = {"ln_f": borders.final}
    for i, (attention, mlp) in enumerate(borders.layers):
        norms |= {f"h.{i}.ln_1": attention.norm, f"h.{i}.ln_2": mlp.norm}
        taps[f"h.{i}.resid_mid"], taps[f"h.{i}.resid_post"] = stream(mlp.norm.x), stream(borders.streams[i + 1])
    for name, norm in norms.items():
        sources.update(norm.sources(name, borders.words.table.shape[1]))
        taps[name] = stream(norm.out)
        probe.touched |= norm.read
    return {name: float(str(np.float32(norm.epsilon))) for name, norm in norms.items()}  # 1e-05, as float32 holds it


def read_parts(probe: Probe) -> tuple[list[AttentionFound], list[MLPFound]]:
    """The attentions and the MLPs; those that are written like earlier ones by what was found of these."""
    attentions: list[AttentionFound] = []
    mlps: list[MLPFound] = []
    for i, (attention, mlp) in enumerate(probe.borders.layers):
        like = probe.alike[i]
        if like is not None:
            before = attentions[like.first], mlps[like.first]
            if like.has(before[0].taps) and like.has(before[1].taps) and not before[0].offsets:
                attentions.append(before[0].again(like, attention))
                mlps.append(before[1].again(like, mlp))
                continue
            probe.alike[i] = None
        attentions.append(read_attention(probe, i, attention))
        mlps.append(read_mlp(probe, i, mlp))
    return attentions, mlps


def read_graph(graph: Graph, condition: str = "") -> Recognised:
    """Find the GPT-2 in a graph."""
    # 1. Borders, inputs, embeddings
    borders = find_borders(graph)
    inputs = find_inputs(graph, borders, condition)
    notes = inputs.notes
    caches = cache_outputs(graph, borders)
    probe = Probe(graph, borders, inputs, find_alike(graph, borders, inputs.roles, caches))
    check_ids(probe)
    probe.place()
    offset, positions = find_positions(probe)
    if offset:
        notes.append(f"the first token takes row {offset} of wpe")

    # 2. Part by part
    sources: dict[str, Source] = {"wte.weight": borders.words.table, "wpe.weight": borders.places.table}
    taps: dict[str, TapLocation] = {"embed": stream(borders.layers[0][0].norm.x)}
    epsilons = read_norms(probe, sources, taps)
    attentions, mlps = read_parts(probe)
    masks, mask_cut = read_masks(probe, attentions)
    head = read_head(probe)
    parts: list[AttentionFound | MLPFound | HeadFound] = [*attentions, *mlps, head]
    for part in parts:
        sources.update(part.sources)
        taps.update(part.taps)
        notes += part.notes
    for i, (core, attended) in enumerate(zip(borders.cores, attentions, strict=True)):
        taps[f"h.{i}.attn.scores"] = scores_tap(probe, core, attended.heads[0], attended.scale, masks[i].scale)

    # 3. What it is, and what is left over
    config, odd = make_config(graph, sources, epsilons, attentions, mlps, masks, head.tied, offset, bool(inputs.mask))
    notes += odd
    check_shapes(sources, config)
    output_roles = find_outputs(probe, caches, attentions, taps)
    for like in probe.alike:
        if like is not None:
            like.touch(probe.touched)
    ignored = find_leftovers(graph, sources, head.weight, probe.touched)
    findings = Findings(offset, positions, attentions, masks, mask_cut, output_roles, taps)
    entries, from_the_end = admit_and_prove(probe, config, findings, notes)
    notes += rounding_notes(graph, entries)
    if config.mask.adds:
        inputs.roles[inputs.mask] = "attention_bias", None
    graph.budget = None  # what is evaluated from now on has been looked at
    order = list(weight_shapes(config)) + ["lm_head.bias"] * ("lm_head.bias" in sources)
    return Recognised(
        config,
        {name: sources[name] for name in order},
        {name: tap for name, tap in taps.items() if tap.tensor not in graph.synthetic},
        ports(graph.inputs, inputs.roles, probe),
        ports(graph.outputs, output_roles, probe),
        ignored,
        tuple(notes),
        positions,
        mask_cut,
        head.padding,
        inputs.lengths,
        graph if inputs.lengths else None,
        from_the_end=from_the_end,
        ledger=entries,
    )
