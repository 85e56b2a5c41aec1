"""What the outputs are: hidden states, logits, keys and values, or a value on the way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...errors import UnsupportedModelError
from .attention import AttentionFound, upright
from .blocks import Branch, Roles
from .inputs import declared_shape, element_type
from .linear import LinearFound, nearest_linears
from .probe import Probe
from .recognised import Port, TapLocation

if TYPE_CHECKING:
    import onnx

Array = np.ndarray


def find_outputs(
    probe: Probe, caches: Mapping[str, int], attentions: Sequence[AttentionFound], taps: Mapping[str, TapLocation]
) -> Roles:
    """The role of every output; `caches` tells the layer of those that are made of an attention's maps."""
    graph = probe.graph
    roles = dict(probe.borders.output_roles)
    for output in sorted(graph.outputs, key=lambda o: caches.get(o.name, -1)):
        if output.name in roles:
            continue
        found: tuple[str, int | None] | None = None
        if (layer := caches.get(output.name)) is not None:
            like = probe.alike[layer]
            if like is not None:
                role, first = roles[next(a for a, b in like.names.items() if b == output.name)]
                found = like.tap(role), None if first is None else layer
            else:
                found = _present(probe, output.name, layer, attentions[layer])
        found = found or _tapped(probe, output.name, taps)
        if found is None:
            node = graph.producers.get(output.name)
            where = f" ({node.describe()})" if node else ""
            raise UnsupportedModelError(
                f"output {output.name!r}{where} is neither hidden states, logits, nor keys and values"
            )
        roles[output.name] = found
    return roles


def ports(protos: Iterable[onnx.ValueInfoProto], roles: Roles, probe: Probe) -> tuple[Port, ...]:
    """Inputs or outputs with their roles; one without a declared shape has the axes that it is found with."""

    def shape(proto: onnx.ValueInfoProto) -> tuple[int | str | None, ...]:
        return declared_shape(proto) or (None,) * probe.evaluate(proto.name).ndim

    return tuple(Port(p.name, element_type(p), shape(p), *roles[p.name]) for p in protos)


def _tapped(probe: Probe, output: str, taps: Mapping[str, TapLocation]) -> tuple[str, None] | None:
    """An output that is one of the taps as it stands, such as the hidden states of each layer."""
    views = set(probe.graph.chain(output))
    (ids,) = probe.inputs.named("input_ids")
    for name, tap in taps.items():
        if views & set(probe.graph.chain(tap.tensor)):
            shape = probe.evaluate(output).shape
            if len(shape) == 4 or shape[:-1] == probe.known[ids].shape:
                return name, None
    return None


def twins_of(probe: Probe, output: str, branch: Branch) -> tuple[dict[LinearFound, LinearFound], list[str]]:
    """The maps behind a present output, each with that of the attention which it is or repeats; and the caches.

    A fused attention may leave a second copy of c_attn for its present output.
    """
    graph = probe.graph
    linears, pasts = nearest_linears(graph, output)
    twins = {
        linear: m
        for linear in linears
        for m in branch.maps
        if linear.weight.is_same(m.weight)
        and (linear.bias is m.bias or (linear.bias and m.bias and linear.bias.is_same(m.bias)))
        and graph.strip(linear.x) == graph.strip(m.x)
    }
    return twins, pasts


def _present(probe: Probe, output: str, i: int, found: AttentionFound) -> tuple[str, int] | None:
    """Whether an output holds the keys or values of layer i, or both."""
    branch = probe.borders.layers[i][0]
    core = branch.core
    assert core is not None
    twins, pasts = twins_of(probe, output, branch)
    if not twins:
        return None
    codes: dict[str, Array] = {}
    start = 1
    for name in [m.out for m in branch.maps] + sorted(set(pasts)):
        size = probe.known[name].size
        codes[name] = np.arange(start, start + size, dtype=np.float64).reshape(probe.known[name].shape)
        start += size
    for linear, m in twins.items():
        codes[linear.out] = codes[m.out].reshape(probe.feed_linear(linear))
    asked = output, core.scores.a, core.scores.b, core.heads.b
    got, *arrived = probe.run_with(codes, *asked)
    if found.offsets:
        nothing, *offsets = probe.run_with({n: np.zeros_like(c) for n, c in codes.items()}, *asked)
        got, arrived = got - nothing, [a - m for a, m in zip(arrived, offsets, strict=True)]
    _, k, v = upright(core, arrived[0], np.rint(arrived[1] / found.factors[1]), arrived[2])
    H, D = found.heads
    k, v = (a.reshape(probe.B, H, -1, D) for a in (k, v))
    for role, expected in (("present_key", k), ("present_value", v), ("present", np.stack([k, v]))):
        if got.ndim == expected.ndim and probe.lengths:
            got = got[..., : expected.shape[-2], :]
        if got.shape == expected.shape and (got == expected).all():
            return role, i
    return None
