"""The parts of a GPT-2 entered into the ledger, from the outputs to the embeddings."""

from __future__ import annotations

from collections.abc import Mapping

from . import roles
from .blocks import Branch, Roles
from .ledger import Ledger
from .linear import LinearFound
from .lookup import Lookup
from .norm import LayerNormFound
from .outputs import twins_of
from .recognised import Entry, TapLocation


def admit(ledger: Ledger, output_roles: Roles, taps: Mapping[str, TapLocation]) -> tuple[Entry, ...]:
    """Enter every node that an output depends on.

    Raises
    ------
    UnsupportedModelError
        If a node is none that its role admits.
    """
    borders = ledger.probes[0].borders
    _outputs(ledger, output_roles, taps)
    if borders.head is not None:
        _linear(ledger, "logits", borders.head)
        ledger.region("head", "ln_f", [borders.head.x], [borders.final.out], roles.CARRIER)
    _layer_norm(ledger, "ln_f", borders.final)
    alike = ledger.probes[0].alike
    for i, (attention, mlp) in enumerate(borders.layers):
        if alike[i] is None:
            _attention(ledger, i, attention)
            _mlp(ledger, i, mlp)
    _stream(ledger)
    for like in alike:
        if like is not None:
            ledger.inherit(like)
    _embeddings(ledger)
    return tuple(ledger.close())


def _stream(ledger: Ledger) -> None:
    """The sums of the residual stream, each up to the one before it."""
    borders, alike = ledger.probes[0].borders, ledger.probes[0].alike
    layers, streams = borders.layers, borders.streams
    starts = [*(lookup.out for lookup in borders.lookups), *(b.addend.value for layer in layers for b in layer)]
    ledger.region("residual", "embed", streams[:1], starts, roles.RESIDUAL)
    starts.append(streams[0])
    for i, (_, mlp) in enumerate(layers):
        for part, value in (("resid_mid", mlp.norm.x), ("resid_post", streams[i + 1])):
            if alike[i] is None:
                ledger.region("residual", f"h.{i}.{part}", [value], starts, roles.RESIDUAL)
            starts.append(value)


def _outputs(ledger: Ledger, output_roles: Roles, taps: Mapping[str, TapLocation]) -> None:
    probe = ledger.probes[0]
    borders = probe.borders
    for output, (role, layer) in output_roles.items():
        if role in ("logits", "last_logits") and borders.head is not None:
            ledger.region("output", "logits", [output], [borders.head.out], roles.VIEW)
        elif role == "last_hidden_state":
            ledger.region("output", "ln_f", [output], [borders.final.out], roles.VIEW)
        elif layer is not None:
            if probe.alike[layer] is not None:
                continue
            branch = borders.layers[layer][0]
            twins, pasts = twins_of(probe, output, branch)
            tap = f"h.{layer}.attn.{'v' if role == 'present_value' else 'k'}"
            ledger.region("carrier", tap, [output], [*(m.out for m in twins), *pasts], roles.SCALED_CARRIER)
            for linear in twins:
                _linear(ledger, f"h.{layer}.attn.c_attn", linear)
                ledger.region("carrier", f"h.{layer}.ln_1", [linear.x], [branch.norm.out], roles.VIEW)
        else:
            ledger.region("output", role, [output], ledger.graph.chain(taps[role].tensor), roles.VIEW)


def _linear(ledger: Ledger, tap: str, linear: LinearFound) -> None:
    """A product with weights, a bias, and what only changes the view between them."""
    if linear.low_rank:
        starts = ledger.graph.chain(linear.x)
        ledger.region("linear map", tap, [linear.out], starts, {**roles.LINEAR, **roles.RESIDUAL})
        ledger.region("carrier", tap, starts[:1], starts[-1:], roles.VIEW)
        return
    ledger.region("linear map", tap, [linear.out], [linear.x], roles.LINEAR)


def _layer_norm(ledger: Ledger, tap: str, norm: LayerNormFound) -> None:
    ledger.region("layer norm", tap, [norm.out], [norm.x], roles.LAYER_NORM)


def _attention(ledger: Ledger, i: int, branch: Branch) -> None:
    """From ln_1 to c_proj's output."""
    core, name = branch.core, f"h.{i}.attn"
    assert core is not None
    _linear(ledger, f"{name}.out", branch.out)
    ledger.region("merging of heads", f"{name}.heads", [branch.out.x], [core.heads.out], roles.CARRIER)
    ledger.region("product with values", f"{name}.heads", [core.heads.out], core.heads.node.inputs, roles.PRODUCT)
    _masked(ledger, "probabilities", f"{name}.probs", core.node.outputs[0], core.heads.a, roles.PROBS)
    ledger.region("softmax", f"{name}.probs", core.node.outputs[:1], [core.masked], roles.SOFTMAX)
    _masked(ledger, "scale and mask", f"{name}.scores", core.scores.out, core.masked, roles.SCORES)
    ledger.region("product with keys", f"{name}.scores", [core.scores.out], core.scores.node.inputs, roles.PRODUCT)
    inputs = ledger.probes[0].inputs
    pasts = [value for value, (role, layer) in inputs.roles.items() if role.startswith("past") and layer == i]
    starts = [*(m.out for m in branch.maps), *pasts]
    for part, value in zip("qkv", (core.scores.a, core.scores.b, core.heads.b), strict=True):
        ledger.region("carrier", f"{name}.{part}", [value], starts, roles.SCALED_CARRIER)
    for linear in branch.maps:
        _linear(ledger, f"{name}.c_attn", linear)
        ledger.region("carrier", f"h.{i}.ln_1", [linear.x], [branch.norm.out], roles.VIEW)
    _layer_norm(ledger, f"h.{i}.ln_1", branch.norm)


def _masked(ledger: Ledger, role: str, tap: str, start: str, end: str, allowed: Mapping[str, roles.NodeCheck]) -> None:
    """The way of scores, or probabilities, from one value to another, and beside it what hides them."""
    graph = ledger.graph
    way, pending = {start}, [start]
    while pending:
        for node in graph.consumers(pending.pop()):
            fresh = [o for o in node.outputs if ledger.is_data(o) and o not in way and end not in node.inputs]
            way.update(fresh)
            pending.extend(fresh)
    beside: list[str] = []
    seen, pending = {start}, [end]
    while pending:
        value = pending.pop()
        if value in seen:
            continue
        seen.add(value)
        if value not in way:
            beside.append(value)
        elif (made_by := graph.producers.get(value)) is not None:
            pending.extend(i for i in made_by.inputs if i)
    ledger.region(role, tap, [end], [start, *beside], allowed)
    masks = ledger.probes[0].inputs.named("attention_mask")
    ledger.region("mask", tap, beside, masks, roles.MASK)


def _mlp(ledger: Ledger, i: int, branch: Branch) -> None:
    """From ln_2 to c_proj's output."""
    (fc,) = branch.maps
    _linear(ledger, f"h.{i}.mlp.out", branch.out)
    ledger.region("activation", f"h.{i}.mlp.gelu", [branch.out.x], [fc.out], roles.ACTIVATION)
    _linear(ledger, f"h.{i}.mlp.c_fc", fc)
    ledger.region("carrier", f"h.{i}.ln_2", [fc.x], [branch.norm.out], roles.VIEW)
    _layer_norm(ledger, f"h.{i}.ln_2", branch.norm)


def _embeddings(ledger: Ledger) -> None:
    """Which rows are looked up."""
    inputs, borders = ledger.probes[0].inputs, ledger.probes[0].borders
    given = [n for n, (role, _) in inputs.roles.items() if role not in ("unused", "use_cache_branch")]
    ways = (("tokens", borders.words, roles.IDS), ("positions", borders.places, roles.POSITIONS))
    for role, lookup, allowed in (*ways, ("token types", borders.types, roles.IDS)):
        if lookup is None or lookup.out in ledger.graph.constants:
            continue
        starts = inputs.named("input_ids") if role == "tokens" else given
        _lookup(ledger, lookup)
        ledger.region(role, "embed", lookup.node.inputs[1:], starts, allowed)


def _lookup(ledger: Ledger, lookup: Lookup) -> None:
    node = lookup.node
    ledger.enter_sizes(node.inputs[0])
    ledger.region("lookup", "embed", [lookup.out], [*node.inputs[1:]], roles.LOOKUP)
