"""An attention: which columns of which map are queries, keys and values of which head, and what is around them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NoReturn

import numpy as np

from ...errors import UnsupportedModelError
from ..evaluate.evaluator import Evaluator
from .blocks import Branch
from .forms import Likeness
from .linear import LinearFound, nearest_linears
from .probe import Probe
from .products import AttentionCore
from .recognised import TapLocation
from .sources import Source, joined, zeros
from .taps import by_head, find_heads, merged_heads, stream, widest

Array = np.ndarray

IN_ORDER = "columns reordered"


@dataclass(frozen=True)
class AttentionFound:
    """What was found of an attention; its mask waits until all layers are known."""

    i: int
    branch: Branch
    heads: tuple[int, int]  # H, D
    columns: tuple[tuple[int, Array], ...]  # of q, k and v: which map, and which of its columns, head by head
    factors: tuple[float, float, float]  # what q, k and v are multiplied by behind their maps
    offsets: tuple[Array, ...]  # (H, D) each: what is added to q, k and v behind their maps; none: nothing
    added: tuple[Source, ...]  # the same as biases (HD,)
    row_order: Array  # of c_proj
    scale: float  # what q·k is multiplied by before the product's output
    taps: dict[str, TapLocation]

    def maps(self) -> list[tuple[LinearFound, Array]]:
        """The maps of q, k and v, and which of their columns."""
        return [(self.branch.maps[which], columns) for which, columns in self.columns]

    @property
    def sources(self) -> dict[str, Source]:
        """The weights."""
        name = f"h.{self.i}.attn.c_proj"
        found = {**_c_attn(self), **self.branch.out.sources(name)}
        found[f"{name}.weight"] = self.branch.out.weight.taken(self.row_order, 0, "rows reordered")
        return found

    @property
    def notes(self) -> list[str]:
        """Anything odd."""
        notes = []
        if IN_ORDER in _c_attn(self)[f"h.{self.i}.attn.c_attn.weight"].through:
            order = _order_in_words(self.columns, self.heads)
            notes.append(f"h.{self.i}.attn.c_attn: {order}; columns are reordered to q, k, v by head")
        if (self.row_order != np.arange(len(self.row_order))).any():
            notes.append(f"h.{self.i}: the heads are merged in another order; rows of c_proj are reordered")
        return notes

    def again(self, like: Likeness, branch: Branch) -> AttentionFound:
        """The attention of a layer that is written like this one's."""
        return replace(self, i=like.layer, branch=branch, taps=like.taps(self.taps))


def read_attention(probe: Probe, i: int, branch: Branch) -> AttentionFound:
    """The attention of layer i."""
    core, name = branch.core, f"h.{i}.attn"
    assert core is not None
    B, T, P = probe.B, probe.T, probe.P
    S = P + T
    # 1. Number every output of the maps and every cached element, and see which numbers arrive where.
    values = (core.scores.a, core.scores.b, core.heads.b)
    codes, starts = _numbered(probe, branch, values)
    numbered, unit = probe.evaluator(codes), probe.evaluator({n: np.ones_like(c) for n, c in codes.items()})
    flat, arrived = [unit(v) for v in values], [numbered(v) for v in values]
    offsets: list[Array] = []  # what is added to q, k and v behind the maps, where that is anything
    read: set[str] = set()
    if any((f != f.flat[0]).any() for f in flat):
        nothing = Evaluator(probe.graph, {**probe.known, **{n: np.zeros_like(c) for n, c in codes.items()}}, read)
        offsets = [nothing(v) for v in values]
        flat, arrived = ([a - m for a, m in zip(some, offsets, strict=True)] for some in (flat, arrived))
    factors = _factors(probe, i, core, flat)
    q, k, v = upright(core, *(a / f for a, f in zip(arrived, factors, strict=True)))
    D = q.shape[-1]
    if q.size % (B * T * D) or q.size == 0 or k.shape[-2] != S:
        fail(probe, core.scores.out, f"q {q.shape} and k {k.shape} are not (batch, heads, time, head size)")
    H = q.size // (B * T * D)
    if (groups := k.size // (B * S * D)) != H:
        kind = "multi-query attention" if groups == 1 else "grouped-query attention"
        fail(probe, core.scores.out, f"{H} heads of queries share {groups} of keys ({kind}): GPT-2 has one for each")
    q, k, v = q.reshape(B, H, T, D), k.reshape(B, H, -1, D), v.reshape(B, H, -1, v.shape[-1])
    if v.shape != (B, H, S, D) or k.shape != (B, H, S, D):
        fail(probe, core.heads.out, f"k {k.shape} and v {v.shape} are not {(B, H, S, D)}")

    # 2. Columns of the maps, in our order: q, k, v; each head after head.
    numbers = [np.rint(a).astype(np.int64) for a in (q, k[:, :, P:], v[:, :, P:])]
    columns = tuple(_columns(i, branch.maps, starts, n, what) for n, what in zip(numbers, "qkv", strict=True))
    added: tuple[Source, ...] = ()
    behind: tuple[Array, ...] = ()
    if offsets:
        behind = upright(core, *(m / f for m, f in zip(offsets, factors, strict=True)))
        behind = tuple(m.reshape(B, H, -1, D) for m in behind)
        added = tuple(_added_bias(probe, m, n, read) for m, n in zip(behind, numbers, strict=True))
        probe.touched |= read
    for what, array, index in (("past_key", k, 0), ("past_value", v, 1)):
        _check_past(probe, i, what, index, np.rint(array[:, :, :P]).astype(np.int64), codes)

    # 3. Rows of c_proj.
    row_order = _row_order(probe, i, branch, core, H, D)
    taps = _taps(probe, name, branch, (numbered, unit), (q, k[:, :, P:], v[:, :, P:]), row_order)
    scale = core.scores.alpha * factors[0] * factors[1]
    offset = tuple(m[0, :, -1] for m in behind)
    return AttentionFound(i, branch, (H, D), columns, factors, offset, added, row_order, scale, taps)


def fail(probe: Probe, value: str, why: str) -> NoReturn:
    """Raise an error that names the node behind a value."""
    node = probe.graph.producers.get(value)
    raise UnsupportedModelError(f"{node.describe() if node else repr(value)}: {why}")


def upright(core: AttentionCore, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """Operands of the two products with time before the head's elements."""
    k = k if core.scores.transposed else k.swapaxes(-1, -2)
    return q, k, v.swapaxes(-1, -2) if core.heads.transposed else v


def _numbered(probe: Probe, branch: Branch, values: tuple[str, ...]) -> tuple[dict[str, Array], dict[str, int]]:
    """A number for every element of the maps' outputs and the caches, and where each of them starts."""
    pasts = {n for v in values for n in nearest_linears(probe.graph, v)[1]} & set(probe.roles)
    codes: dict[str, Array] = {}
    starts: dict[str, int] = {}
    start = 1
    for value in [*(m.out for m in branch.maps), *sorted(pasts)]:
        shape = probe.known[value].shape
        size = math.prod(shape)
        codes[value] = np.arange(start, start + size, dtype=np.float64).reshape(shape)
        starts[value] = start
        start += size
    return codes, starts


def _factors(probe: Probe, i: int, core: AttentionCore, flat: list[Array]) -> tuple[float, float, float]:
    """What q, k and v are multiplied by behind their maps."""
    values = (core.scores.a, core.scores.b, core.heads.b)
    found = [float(f.flat[0]) for f in flat]
    for what, value, ones_out, factor in zip("qkv", values, flat, found, strict=True):
        if not np.allclose(ones_out, factor, rtol=1e-6) or factor == 0 or not np.isfinite(factor):
            fail(probe, value, f"{what} of layer {i} is not its linear map's output times one number")
    if found[2] != 1:
        fail(probe, core.heads.b, f"v of layer {i} is scaled by {found[2]:g}")
    if core.heads.alpha != 1:
        fail(probe, core.heads.out, f"the heads of layer {i} are scaled by {core.heads.alpha:g}")
    return found[0], found[1], found[2]


def _row_order(probe: Probe, i: int, branch: Branch, core: AttentionCore, H: int, D: int) -> Array:
    """In which order the heads' elements are merged, (HD,)."""
    B, T = probe.B, probe.T
    order = np.arange(B * H * T * D, dtype=np.float64).reshape(B, H, T, D)
    (merged,) = probe.run_with({core.heads.out: order.reshape(probe.known[core.heads.out].shape)}, branch.out.x)
    expected = order.transpose(0, 2, 1, 3).reshape(B * T, H * D)
    merged = merged.reshape(B * T, -1)
    row_order = np.argsort(merged[0])
    if merged.shape != expected.shape or (merged[:, row_order] != expected).any():
        fail(probe, branch.out.x, f"the heads of layer {i} are merged in an unknown way")
    return row_order


def _columns(
    i: int, maps: tuple[LinearFound, ...], starts: Mapping[str, int], numbers: Array, what: str
) -> tuple[int, Array]:
    """Which columns of which map make q, k or v: numbers (B, H, T, D) -> (which map, (HD,))."""
    B, _, T, _ = numbers.shape
    for which, linear in enumerate(maps):
        width = linear.weight.shape[1]
        offset = numbers - starts[linear.out]
        if (offset < 0).any() or (offset >= B * T * width).any():
            continue
        row, column = offset // width, offset % width
        expected = np.arange(B * T).reshape(B, 1, T, 1)
        if (row != expected).any() or (column != column[:1, :, :1]).any():
            break
        return which, column[0, :, 0].reshape(-1)
    raise UnsupportedModelError(f"{maps[0].node.describe()}: {what} of layer {i} mixes positions, maps, or the cache")


def _added_bias(probe: Probe, offset: Array, numbers: Array, read: set[str]) -> Source:
    """What is added to q, k or v behind its map, (B, H, S, D), as a bias (HD,)."""
    H, T, D = numbers.shape[1:]
    bias = np.ascontiguousarray(offset[0, :, -1].reshape(H * D), np.float32)
    if (offset[:, :, -T:] != offset[:1, :, -1:]).any() or offset[:, :, :-T].any():
        raise UnsupportedModelError("what is added to queries, keys or values differs between positions")
    constants = probe.graph.constants
    large = {n for n in read if math.prod(probe.graph.shape(n)) > 1 and constants[n].dtype.kind not in "iub"}
    return Source(bias.shape, tuple(sorted(large)), ("Add",), bias.copy)


def _c_attn(found: AttentionFound) -> dict[str, Source]:
    """Weight and bias of c_attn: the maps' columns in our order."""
    name = f"h.{found.i}.attn.c_attn"
    parts, added = found.maps(), found.added

    def bias(m: LinearFound, c: Array, more: Source | None = None) -> Source:
        own = (m.bias or zeros(m.weight.shape[1:], "no bias in the file")).taken(c, 0, IN_ORDER)
        if more is None:
            return own
        return more if m.bias is None else own.plus(more)

    biases = [bias(m, c, more) for (m, c), more in zip(parts, added or (None,) * 3, strict=True)]
    if len({which for which, _ in found.columns}) == 1:
        linear = parts[0][0]
        index = np.concatenate([c for _, c in parts])
        parts = [(linear, index)]
        biases = biases if added else [bias(linear, index)]
    weight = joined([m.weight.taken(c, 1, IN_ORDER) for m, c in parts], "Concat q, k, v")
    return {f"{name}.weight": weight, f"{name}.bias": joined(biases, "Concat q, k, v")}


def _check_past(probe: Probe, i: int, what: str, index: int, numbers: Array, codes: Mapping[str, Array]) -> None:
    """Cached keys and values must come first, in their own order."""
    if probe.P == 0:
        return
    for name, (role, layer) in probe.roles.items():
        if layer != i or role not in (what, "past"):
            continue
        given = (codes[name][index] if role == "past" else codes[name])[:, :, : probe.P]
        if numbers.shape == given.shape and (numbers == given).all():
            return
    raise UnsupportedModelError(f"layer {i}: the {what.replace('_', ' ')} inputs do not come before the new positions")


def _taps(
    probe: Probe,
    name: str,
    branch: Branch,
    probes: tuple[Evaluator, Evaluator],
    expected: tuple[Array, Array, Array],
    row_order: Array,
) -> dict[str, TapLocation]:
    core = branch.core
    assert core is not None
    taps: dict[str, TapLocation] = {}
    for what, value, numbers in zip("qkv", (core.scores.a, core.scores.b, core.heads.b), expected, strict=True):
        location = find_heads(probe, value, numbers, probes)
        if location is not None:
            taps[f"{name}.{what}"] = location
    taps[f"{name}.probs"] = TapLocation(core.probs, by_head(expected[0].shape[1], 1.0))
    taps[f"{name}.heads"] = merged_heads(widest(probe, branch.out.x), row_order)
    if not branch.out.bias_later:
        taps[f"{name}.out"] = stream(widest(probe, branch.out.out))
    return taps


def _order_in_words(columns: tuple[tuple[int, Array], ...], heads: tuple[int, int]) -> str:
    H, D = heads
    firsts = [int(c[0]) for _, c in columns]
    runs = all((c == c[0] + np.arange(H * D)).all() for _, c in columns)
    if runs:
        return "the graph takes " + ", ".join(w for _, w in sorted(zip(firsts, "qkv", strict=True))) + " in this order"
    if sorted(firsts) == [0, D, 2 * D]:
        return "q, k and v lie side by side within each head"
    return "the graph takes q, k and v in an order of its own"
