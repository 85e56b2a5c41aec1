"""What was found at a few positions, tried at others: all of them where it may depend on the position.

The ledger admits what moves elements, counts positions and hides keys; whether these do so as GPT-2's do is found by
running them: all token ids, all positions of the context, and all pairs of a query and a key, at more than one batch
size and length. What only moves is run on numbers that tell where they come from, once for rows and once for
columns, so that nothing large is made of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import UnsupportedModelError
from ...masks import MaskRule
from ..budget import OverBudget
from .attention import AttentionFound, fail, upright
from .blocks import Branch, Roles
from .embeddings import prove_given_positions, prove_ids, prove_positions
from .inputs import declared_shape
from .linear import LinearFound
from .masks import keys_in_words, mask_shapes, per_query
from .outputs import twins_of
from .probe import Probe
from .products import AttentionCore
from .recognised import TapLocation
from .scores import MaskFound

Array = np.ndarray

AT_ONCE = 1 << 20  # pairs of queries and keys that are compared in one run


@dataclass(frozen=True)
class Findings:
    """What was found of a graph that depends on sizes."""

    offset: int  # of the first row of wpe
    positions: str  # how rows of wpe are chosen
    attentions: Sequence[AttentionFound]
    masks: Sequence[MaskFound]
    mask_cut: bool
    output_roles: Roles
    taps: Mapping[str, TapLocation]


def prove(probes: Sequence[Probe], found: Findings) -> frozenset[str]:
    """Try what was found by the first probe at the others' sizes, in those layers that are written differently.

    Returns the roles of those inputs whose negative numbers are rows counted from a table's end.

    Raises
    ------
    UnsupportedModelError
        If it does not hold there.
    """
    usual = probes[0]
    from_the_end = {"input_ids"} if prove_ids(usual, usual.borders.words, "input_ids") else set()
    if usual.borders.types is not None and prove_ids(usual, usual.borders.types, "token_type_ids"):
        from_the_end.add("token_type_ids")
    if usual.inputs.named("position_ids") and prove_given_positions(probes, found.offset):
        from_the_end.add("position_ids")
    declared = {o.name: len(declared_shape(o)) for o in usual.graph.outputs}
    for probe in probes:
        prove_positions(probe, found.offset, found.positions)
        for output, (role, layer) in found.output_roles.items():
            if layer is None:
                prove_shape(probe, output, role, declared[output], found.taps if probe is usual else {})
    for i, (branch, _) in enumerate(usual.borders.layers):
        if usual.alike[i] is not None:
            continue
        assert branch.core is not None
        presents = {output: role for output, (role, layer) in found.output_roles.items() if layer == i}
        if branch.core.zeroed:
            for probe in probes:
                prove_zeroed(probe, i, branch.core, found.masks[i].mask, found.mask_cut)
        for probe in probes[1:]:
            prove_attention(probe, i, branch, found.attentions[i])
            prove_mask(probe, i, branch.core, found.masks[i], found.attentions[i].scale, found.mask_cut)
            for output, role in presents.items():
                prove_present(probe, output, role, i, branch, found.attentions[i])
    return frozenset(from_the_end)


# ------------------------------------------------------------------------------------------------ what only moves
def prove_attention(probe: Probe, i: int, branch: Branch, found: AttentionFound) -> None:
    """q, k, v and the merged heads hold the elements that were found, at this size, too."""
    core = branch.core
    assert core is not None
    B, T = probe.B, probe.T
    H, D = found.heads
    values = (core.scores.a, core.scores.b, core.heads.b)
    for side in ("rows", "columns"):
        feeds, expected = _codes(probe, i, branch.maps, found, side)
        arrived = probe.run_with(feeds, *values)
        if found.offsets:
            nothing = probe.run_with({name: np.zeros_like(code) for name, code in feeds.items()}, *values)
            for behind, offset, factor in zip(upright(core, *nothing), found.offsets, found.factors, strict=True):
                if (behind.reshape(B, H, -1, D)[:, :, probe.P :] / factor != offset[:, None]).any():
                    fail(probe, core.scores.out, f"what is added to q, k or v of layer {i} changes with the length")
            arrived = [a - m for a, m in zip(arrived, nothing, strict=True)]
        parts = zip("qkv", values, upright(core, *arrived), expected, found.factors, strict=True)
        for what, value, array, code, factor in parts:
            if not _same(array, (B, H, T if what == "q" else probe.sizes.S, D), code, factor):
                fail(probe, value, f"{what} of layer {i} holds other elements {_at(probe)} than {_at()}")
        code = expected[0] if side == "rows" else np.arange(1.0, H * D + 1).reshape(1, H, 1, D)
        shape = probe.known[core.heads.out].shape
        heads = np.broadcast_to(code, (B, H, T, D)).reshape(shape)
        (merged,) = probe.run_with({core.heads.out: heads}, branch.out.x)
        wanted = (np.arange(1.0, B * T + 1)[:, None]) if side == "rows" else np.argsort(found.row_order) + 1.0
        if merged.size != B * T * H * D or (merged.reshape(B * T, H * D) != wanted).any():
            fail(probe, branch.out.x, f"the heads of layer {i} are merged otherwise {_at(probe)} than {_at()}")


def _codes(
    probe: Probe, i: int, maps: Sequence[LinearFound], found: AttentionFound, side: str
) -> tuple[dict[str, Array], tuple[Array, Array, Array]]:
    """Numbers for the maps' outputs and the caches, by row or by column, and those expected in q, k and v."""
    B, T, P = probe.B, probe.T, probe.P
    H, D = found.heads
    rows = side == "rows"
    widths = [m.weight.shape[1] for m in maps]
    firsts = {m.out: 1 + sum(widths[:n]) for n, m in enumerate(maps)}
    feeds: dict[str, Array] = {}
    for m, width in zip(maps, widths, strict=True):
        shape, ends = probe.known[m.out].shape, m.sizes or (width,)
        if rows:
            code = np.arange(1.0, B * T + 1).reshape(*shape[: -len(ends)], *(1,) * len(ends))
        else:
            code = np.arange(float(firsts[m.out]), firsts[m.out] + width).reshape(ends)
        feeds[m.out] = np.broadcast_to(code, shape)
    old, caches = _cache_codes(probe, i, found, rows)
    feeds |= caches
    expected = []
    for what, (m, columns) in zip(("", "past_key", "past_value"), found.maps(), strict=True):
        code = np.arange(1.0, B * T + 1).reshape(B, 1, T, 1)
        if not rows:
            code = np.broadcast_to((columns + float(firsts[m.out])).reshape(1, H, 1, D), (1, H, T, D))
        if what in old and P:
            code = np.concatenate([old[what][:, :, :P], code], axis=2)
        expected.append(code)
    return feeds, (expected[0], expected[1], expected[2])


def _cache_codes(probe: Probe, i: int, found: AttentionFound, rows: bool) -> tuple[dict[str, Array], dict[str, Array]]:
    """Negative numbers for past keys and values, (B, 1, P, 1) or (1, H, P, D), and for the inputs that hold them."""
    H, D = found.heads
    codes: dict[str, Array] = {}
    feeds: dict[str, Array] = {}
    for name, (role, layer) in probe.roles.items():
        if layer != i or not role.startswith("past"):
            continue
        shape = probe.known[name].shape
        B, length = shape[-4], shape[-2]
        if rows:
            code = -1.0 - np.arange(B * length).reshape(B, 1, length, 1)
        else:
            code = np.broadcast_to(-1.0 - np.arange(H * D).reshape(1, H, 1, D), (1, H, length, D))
        both = {"past_key": code, "past_value": code - 1e6}
        codes |= both if role == "past" else {role: both[role]}
        given = np.stack(list(both.values())) if role == "past" else both[role]
        feeds[name] = np.broadcast_to(given, shape)
    return codes, feeds


def _same(array: Array, shape: tuple[int, ...], code: Array, factor: float) -> bool:
    """Whether an array of any leading axes holds a code, (B, H, T, D) or broadcast to that, times a factor."""
    if array.size != math.prod(shape) or array.shape[-2:] != shape[-2:]:
        return False
    array = array.reshape(shape)
    return bool((array == code).all() if factor == 1 else np.allclose(array, code * factor, rtol=1e-9, atol=0))


def _at(probe: Probe | None = None) -> str:
    if probe is None:
        return "for 2 sequences of 4 new positions"
    return f"for {probe.B} sequences of {probe.T} new positions behind {probe.P}"


def prove_present(probe: Probe, output: str, role: str, i: int, branch: Branch, found: AttentionFound) -> None:
    """Keys and values that are handed out are those that are used."""
    H, D = found.heads
    twins, _ = twins_of(probe, output, branch)
    for side in ("rows", "columns"):
        feeds, (_, k, v) = _codes(probe, i, branch.maps, found, side)
        for linear, m in twins.items():
            feeds[linear.out] = feeds[m.out].reshape(probe.feed_linear(linear))
        (got,) = probe.run_with(feeds, output)
        if found.offsets:
            (nothing,) = probe.run_with({name: np.zeros_like(code) for name, code in feeds.items()}, output)
            got = got - nothing
        whole = (probe.B, H, probe.sizes.S, D)
        both = [np.broadcast_to(code, whole) for code in (k, v)]
        expected = np.stack(both) if role == "present" else both[role == "present_value"]
        if got.ndim == expected.ndim and probe.lengths:
            got = got[..., : probe.sizes.S, :]
        if got.shape != expected.shape or (got != expected).any():
            fail(probe, output, f"{output!r} holds other keys or values {_at(probe)} than {_at()}")


# ------------------------------------------------------------------------------------------------ masks
def prove_mask(probe: Probe, i: int, core: AttentionCore, found: MaskFound, before: float, cut: bool) -> None:
    """Every pair of a query and a key is masked as those of the usual probe."""
    mask, scale = found.mask, found.scale / before
    B, T, S = probe.B, probe.T, probe.sizes.S
    half = probe.half
    score = 1.25
    shape = probe.known[core.scores.out].shape
    few = (B, 1, T, S) if len(shape) == 4 else (B, T, S)  # all heads are treated alike
    dtype = np.float64 if half else np.float32

    def run(feeds: dict[str, Array]) -> Array:
        budget = probe.graph.budget
        left = 0 if budget is None else budget.left
        try:
            (got,) = probe.run_with({**feeds, core.scores.out: np.broadcast_to(dtype(score), few)}, core.masked)
        except OverBudget:
            raise
        except UnsupportedModelError:
            (got,) = probe.run_with({**feeds, core.scores.out: np.broadcast_to(dtype(score), shape)}, core.masked)
        if budget is not None:
            budget.give_back(left)
        return got.reshape(B, -1, T, S)

    later = np.arange(S) > np.arange(probe.P, S)[:, None] + mask.shift  # (T, S)
    if mask.kind in ("none", "given"):
        later = np.zeros_like(later)
    hidden = (float(mask.kind == "added"), mask.value)
    name = probe.mask
    if not name:
        _compare(probe, i, core, run({}), [(later, hidden)], score * scale, mask, probe.P)
        return
    known = probe.known[name]
    options = mask_shapes(_declared(probe, name), B, T, S)
    full = np.ones(next(size for size, is_cut in options if is_cut == cut), known.dtype)
    rng = np.random.default_rng(0)
    if mask.adds:
        given = rng.integers(-4, 4, full.shape).astype(known.dtype)
        with np.errstate(invalid="ignore"):  # -inf less -inf, where keys are hidden in any case
            added = run({name: given}) - run({name: np.zeros_like(full)})
        wanted = np.broadcast_to(per_query(given, T, S, cut), added.shape)
        if not (np.isclose(added, wanted, rtol=1e-5) | later).all():
            fail(
                probe, core.masked, f"layer {i} adds other elements of {name!r} to its scores {_at(probe)} than {_at()}"
            )
        return
    for share in (0.0, 0.3):
        padded: Array = np.asarray(rng.random(full.shape) < share)
        if share:
            padded[0, ..., : S // 2] = True
        gone = per_query(padded, T, S, cut)
        got = run({name: np.where(padded, 0, full)})
        where = [(later & ~gone, hidden), (gone & ~later, mask.padding), (gone & later, mask.padding_later)]
        _compare(probe, i, core, got, where, score * scale, mask, probe.P)


def prove_zeroed(probe: Probe, i: int, core: AttentionCore, mask: MaskRule, cut: bool) -> None:
    """What is set to 0 behind the softmax are the probabilities of hidden keys, and nothing else."""
    B, T, S = probe.B, probe.T, probe.sizes.S
    later = np.arange(S) > np.arange(probe.P, S)[:, None] + mask.shift  # (T, S)
    feeds = {core.node.outputs[0]: np.broadcast_to(1.0, probe.known[core.scores.out].shape)}
    patterns: list[tuple[dict[str, Array], Array]] = [({}, later)]
    if probe.mask and not mask.adds:
        known = probe.known[probe.mask]
        full = np.ones(
            next(size for size, is_cut in mask_shapes(_declared(probe, probe.mask), B, T, S) if is_cut == cut)
        )
        rng = np.random.default_rng(0)
        gone = [np.asarray(rng.random(full.shape) < share) for share in (0.0, 0.3, 0.3)]
        gone[-1][0, ..., : S // 2 + 1] = True  # with queries that see no key
        patterns = [
            ({probe.mask: np.where(g, 0, full).astype(known.dtype)}, later | per_query(g, T, S, cut)) for g in gone
        ]
    for given, hidden in patterns:
        (got,) = probe.run_with({**feeds, **given}, core.heads.a)
        if mask.adds or mask.kind == "given" or (got.reshape(B, -1, T, S) != ~hidden).any():
            fail(probe, core.heads.a, f"layer {i} sets other probabilities to 0 {_at(probe)} than those of hidden keys")


def _compare(
    probe: Probe,
    i: int,
    core: AttentionCore,
    got: Array,
    effects: Sequence[tuple[Array, tuple[float, float]]],
    score: float,
    mask: MaskRule,
    first: int,
) -> None:
    """Raise unless the scores of queries, from position `first` on, have become what the mask says."""
    rows = max(1, AT_ONCE // got.shape[-1])
    if got.shape[-2] > rows:  # some at a time, so that little is made of them
        for start in range(0, got.shape[-2], rows):
            some = slice(start, start + rows)
            parts = [(where if where.shape[-2] == 1 else where[..., some, :], effect) for where, effect in effects]
            _compare(probe, i, core, got[..., some, :], parts, score, mask, first + start)
        return
    # twice float32's lowest number is -inf, too
    lowest = np.finfo(np.float16 if probe.half else np.float32).min
    hidden = np.zeros(np.broadcast_shapes(got.shape[-2:], *(where.shape for where, _ in effects)), bool)
    expected = np.full(hidden.shape, score)
    for where, (factor, added) in effects:
        where = np.broadcast_to(where, hidden.shape)
        hidden |= where
        expected[where] = factor * score + added
    if (got == expected).all():  # as with the usual scales and mask values; what follows takes ten times as long
        return
    seen = ~hidden.all(axis=-1, keepdims=True)  # what happens to rows without a key is read elsewhere
    with np.errstate(invalid="ignore"):
        near = np.abs(got - expected) <= 1e-4 * np.abs(expected)
    close = (got == expected) | (near & np.isfinite(expected))  # any number is near an infinity
    close |= (got <= lowest) & (expected <= lowest)
    if (close | ~seen).all():
        return
    b, _, t, key = np.argwhere(~(close | ~seen) & np.ones_like(got, bool))[0]
    query = first + t
    row = np.broadcast_to(close, got.shape)[b, 0, t]
    sight = np.flatnonzero(~np.broadcast_to(hidden, (*got.shape[:1], 1, *got.shape[2:]))[b, 0, t] & row)
    if 0 < len(sight) < query + 1 + mask.shift and (np.diff(sight) == 1).all() and sight[-1] == query + mask.shift:
        what = f"query {query} sees {keys_in_words(sight - mask.shift, query)}"
    else:
        due = expected[min(b, len(expected) - 1), 0, t, key] if expected.ndim == 4 else expected[t, key]
        what = f"the score {score:g} of query {query} and key {key} becomes {got[b, 0, t, key]:g}, not {due:g}"
    fail(probe, core.masked, f"the mask of layer {i}: {what}")


def _declared(probe: Probe, name: str) -> tuple[int | str | None, ...]:
    return declared_shape(next(p for p in probe.graph.inputs if p.name == name))


# ------------------------------------------------------------------------------------------------ outputs
def prove_shape(probe: Probe, output: str, role: str, declared: int, taps: Mapping[str, TapLocation]) -> None:
    """An output must have the shape that a session gives it: the graph's own, not the one that is declared.

    `declared` is the number of axes that the file declares for it.
    """
    (ids,) = probe.inputs.named("input_ids")
    given = probe.known[ids].shape
    actual = probe.evaluate(output).shape
    B, T, S = probe.B, probe.T, probe.sizes.S
    if role == "last_logits":
        allowed = {3: (B, 1), 2: (B,)}.get(len(actual), ())
    elif role.endswith(("attn.scores", "attn.probs", "attn.q", "attn.k", "attn.v")):
        allowed = (B, actual[1] if len(actual) == 4 else 0, T)
    else:
        allowed = given if len(actual) == len(given) + 1 else (B, T)
    if actual[:-1] != tuple(allowed) or (role.endswith(("scores", "probs")) and actual[-1] != S):
        fail(probe, output, f"output {output!r} has shape {actual} for token ids {given}")
    if declared not in (0, len(actual)):
        fail(probe, output, f"output {output!r} is declared with {declared} axes and has {len(actual)}")
    if role in taps and role != "logits":
        numbers = np.arange(float(np.prod(actual))).reshape(actual)
        ours = taps[role].convert(numbers.reshape(B, T, -1) if len(actual) > 3 and actual[:-1] == given else numbers, B)
        if ours.size != numbers.size or (ours.ravel() != numbers.ravel()).any():
            fail(probe, output, f"output {output!r} holds the numbers of {role} in another order or scale")
