"""Fused operators as the plain nodes that they stand for.

Optimisers fuse layer norms with the additions before them, a bias with the GELU behind it, and a whole attention
into one node. Each is taken apart here, as the graph is read, so that one pattern per part of GPT-2 is enough.
The values between the pieces are synthetic: the file does not hold them, so no tap can point there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import UnsupportedModelError
from ..graph import MASKED, Graph, Node
from .rewriter import Pieces

_FAR = 2**31 - 1


def _skip_layer_norm(graph: Graph, node: Node) -> list[Node]:
    p = Pieces(graph, node)
    x, skip, gain, shift, bias = (node.input(i) for i in range(5))
    total = node.outputs[3] if len(node.outputs) > 3 else ""
    if bias:
        x = p.add("Add", x, bias)
    named = "" if graph.rounding else total
    summed = p.add("Add", x, skip, out=named)
    if total != named:  # the norm reads the sum before it is rounded to float16
        p.add("Identity", summed, out=total)
    epsilon = node.attributes.get("epsilon", 1e-12)
    p.add("LayerNormalization", summed, gain, shift, out=node.outputs[0], epsilon=epsilon, axis=-1)
    return p.nodes


def _embed_layer_norm(graph: Graph, node: Node) -> list[Node]:
    p = Pieces(graph, node)
    ids, segments, words, places, segment_table, gain, shift, _, positions = (node.input(i) for i in range(9))
    if not positions:  # 0, 1, 2, ... for each sequence
        shape = p.add("Shape", ids)
        length = p.add("Gather", shape, p.constant(np.int64(1)), axis=0)
        positions = p.add("Range", p.constant(np.int64(0)), length, p.constant(np.int64(1)))
    total = node.outputs[2] if len(node.outputs) > 2 else ""
    word = p.add("Gather", words, ids, axis=0)
    place = p.add("Gather", places, positions, axis=0)
    if segment_table:
        word = p.add("Add", word, p.add("Gather", segment_table, segments, axis=0))
    total = p.add("Add", word, place, out=total)
    epsilon = node.attributes.get("epsilon", 1e-12)
    p.add("LayerNormalization", total, gain, shift, out=node.outputs[0], epsilon=epsilon, axis=-1)
    return p.nodes


def _biased_gelu(graph: Graph, node: Node) -> list[Node] | None:
    if not node.input(1):
        return None
    p = Pieces(graph, node)
    x = p.add("Add", node.inputs[0], node.inputs[1])
    plain = "com.microsoft.FastGelu" if node.op == "com.microsoft.FastGelu" else "com.microsoft.Gelu"
    p.add(plain, x, out=node.outputs[0])
    return p.nodes


def _fused_gemm(graph: Graph, node: Node) -> list[Node] | None:
    activation = node.attributes.get("activation", "")
    p = Pieces(graph, node)
    attributes = {k: v for k, v in node.attributes.items() if not k.startswith("activation")}
    if not activation:
        p.add("Gemm", *node.inputs, out=node.outputs[0], **attributes)
    else:
        p.add(activation, p.add("Gemm", *node.inputs, **attributes), out=node.outputs[0])
    return p.nodes


def _fused_matmul(graph: Graph, node: Node) -> None:
    """It is a product of patterns' own, unless it exchanges the first axis with those of the batch."""
    _refuse(node, ["transBatchA", "transBatchB"])


def _split_heads(p: Pieces, x: str, heads: int) -> str:
    """(B, T, HD) -> (B, H, T, D)"""
    return p.add("Transpose", p.add("Reshape", x, p.ints(0, 0, heads, -1)), perm=[0, 2, 1, 3])


def _merge_heads(p: Pieces, x: str, out: str) -> None:
    """(B, H, T, D) -> (B, T, HD)"""
    p.add("Reshape", p.add("Transpose", x, perm=[0, 2, 1, 3]), p.ints(0, 0, -1), out=out)


def _attend(p: Pieces, q: str, k: str, v: str, masks: tuple[str, str], guarded: bool = False, **how: Any) -> str:
    """(B, H, T, D), 2 x (B, H, S, D) -> (B, H, T, D); `masks`: of keys or of scores, and a bias for the scores."""
    scale = how.pop("scale")
    scores = p.add("MatMul", q, p.add("Transpose", k, perm=[0, 1, 3, 2]))
    if scale:
        scores = p.add("Mul", scores, p.constant(np.float32(scale)))
    else:  # 1 / sqrt(D)
        size = p.add("Shape", q, start=3)
        root = p.add("Sqrt", p.add("Cast", size, to=1))
        scores = p.add("Div", scores, root)
    masked = p.add(MASKED, scores, *masks, **how)
    probs = p.add("Softmax", masked, axis=-1)
    if guarded:
        nothing = p.add("IsNaN", probs)
        probs = p.add("Where", nothing, p.constant(np.float32(0)), probs)
    return p.add("MatMul", probs, v)


def _cached(p: Pieces, past: str, new: str, present: str, past_length: str, cleared: bool = False) -> str:
    """Keys or values of all positions, (B, H, S, D).

    Without `past_length` the past (B, H, P, D) comes before the new ones, and that is the present. With it the past
    is a buffer (B, H, M, D) of which the first `past_length` (1,) positions count; the new ones take the next places,
    and what is behind them in the present is zero if `cleared`.
    """
    if not past:
        return p.add("Identity", new, out=present)
    if not past_length:
        return p.add("Concat", past, new, out=present, axis=2)
    old = p.add("Slice", past, p.ints(0), past_length, p.ints(2))
    all_positions = p.add("Concat", old, new, axis=2)
    if present:
        stop = p.add("Shape", all_positions, start=2, end=3)
        rest = p.add("Slice", past, stop, p.ints(_FAR), p.ints(2))
        if cleared:
            rest = p.add("Mul", rest, p.constant(np.float32(0)))
        p.add("Concat", all_positions, rest, out=present, axis=2)
    return all_positions


def _refuse(node: Node, attributes: Sequence[str] = (), inputs: Mapping[int, str] | None = None) -> None:
    """Raise if a fused attention does what GPT-2's does not."""
    for name in attributes:
        if node.attributes.get(name, 0) not in (0, -1):
            raise UnsupportedModelError(f"{node.describe()} has {name}={node.attributes[name]}: GPT-2 has none")
    for index, name in (inputs or {}).items():
        if node.input(index):
            raise UnsupportedModelError(f"{node.describe()} has an input {name}: GPT-2 has none")


def _past_length(p: Pieces, node: Node, index: int, beams: tuple[int, int] | None = None) -> str:
    """The input past_sequence_length as a vector (1,); where it is given, past and present are buffers."""
    name = node.input(index)
    if not name:
        return ""
    p.graph.lengths[name] = "cached_length"
    for which, role in zip(beams or (), ("beam_width", "cache_indirection"), strict=False):
        if node.input(which):
            p.graph.lengths[node.input(which)] = role
    return p.add("Reshape", p.add("Cast", name, to=7), p.ints(1))


def _contrib_attention(graph: Graph, node: Node) -> list[Node] | None:
    """com.microsoft.Attention: input, weights (none: projected already), bias, mask_index, past, attention_bias,
    past_sequence_length.

    DecoderMaskedSelfAttention has two more: beam_width, cache_indirection.
    """
    x, weights, bias, mask, past, score_bias = (node.input(i) for i in range(6))
    attributes = node.attributes
    _refuse(node, ["do_rotary"])
    graph.one_token |= node.op.endswith("DecoderMaskedSelfAttention")
    heads = attributes["num_heads"]
    p = Pieces(graph, node)
    qkv = p.add("MatMul", x, weights) if weights else x
    if bias:
        qkv = p.add("Add", qkv, bias)
    sizes = attributes.get("qkv_hidden_sizes")
    q = p.add("Split", qkv, p.ints(*sizes), count=3, axis=2) if sizes else p.add("Split", qkv, count=3, axis=2)
    q, k, v = (_split_heads(p, part, heads) for part in (q, f"{q}:1", f"{q}:2"))
    length = _past_length(p, node, 6, (7, 8))
    presents = [f"{node.outputs[0]} present {i}" for i in (0, 1)]
    graph.synthetic.update(presents)
    olds = [p.add("Gather", past, p.constant(np.int64(i)), axis=0) if past else "" for i in (0, 1)]
    k, v = (_cached(p, *parts, length) for parts in zip(olds, (k, v), presents, strict=True))
    if len(node.outputs) > 1 and node.outputs[1]:
        pair = [p.add("Unsqueeze", present, p.ints(0)) for present in presents]
        p.add("Concat", *pair, out=node.outputs[1], axis=0)
    out = _attend(
        p, q, k, v, (mask, score_bias),
        scale=attributes.get("scale", 0.0),
        causal=attributes.get("unidirectional", 0),
        filter=attributes.get("mask_filter_value", -10000.0),
    )  # fmt: skip
    _merge_heads(p, out, node.outputs[0])
    return p.nodes


def _multi_head_attention(graph: Graph, node: Node) -> list[Node] | None:
    """com.microsoft.MultiHeadAttention: query, key, value, bias, key_padding_mask, attention_bias, two pasts.

    DecoderMaskedMultiHeadAttention has the same in another order.
    """
    masked = node.op.endswith("DecoderMaskedMultiHeadAttention")
    graph.one_token |= masked
    order = (0, 1, 2, 10, 3, 4, 5, 6) if masked else range(8)
    q, k, v, bias, mask, score_bias, past_k, past_v = (node.input(i) for i in order)
    if not k or not v:
        raise UnsupportedModelError(f"{node.describe()} has packed queries, keys and values")
    heads = node.attributes["num_heads"]
    p = Pieces(graph, node)
    length = _past_length(p, node, *((7, (8, 9)) if masked else (8, (10, 9))))
    if bias:
        size = graph.shape(bias)[0] // 3
        parts = p.add("Split", bias, p.ints(size, size, size), count=3, axis=0)
        q, k, v = (p.add("Add", a, b) for a, b in zip((q, k, v), (parts, f"{parts}:1", f"{parts}:2"), strict=True))
    q, k, v = (_split_heads(p, a, heads) for a in (q, k, v))
    present_k, present_v = (node.outputs[i] if len(node.outputs) > i else "" for i in (1, 2))
    k, v = _cached(p, past_k, k, present_k, length), _cached(p, past_v, v, present_v, length)
    out = _attend(
        p, q, k, v, (mask, score_bias),
        scale=node.attributes.get("scale", 0.0),
        causal=node.attributes.get("unidirectional", 0),
        filter=node.attributes.get("mask_filter_value", -10000.0),
    )  # fmt: skip
    _merge_heads(p, out, node.outputs[0])
    return p.nodes


def _group_query_attention(graph: Graph, node: Node) -> list[Node] | None:
    """com.microsoft.GroupQueryAttention: query, key, value, two pasts, seqlens_k, total_sequence_length."""
    q, k, v, past_k, past_v, last, total = (node.input(i) for i in range(7))
    attributes = node.attributes
    heads = attributes["num_heads"]
    if attributes.get("kv_num_heads", heads) != heads:
        groups = attributes["kv_num_heads"]
        raise UnsupportedModelError(
            f"{node.describe()} has {heads} heads of queries and {groups} of keys: GPT-2 has as many"
        )
    unlike = ("do_rotary", "softcap", "smooth_softmax", "local_window_size", "sliding_window_cache")
    inputs = {7: "cos_cache", 11: "head_sink", 12: "k_scale", 14: "q_norm_weight"}
    _refuse(node, [*unlike, "kv_cache_bit_width"], inputs)
    p = Pieces(graph, node)
    if not k:
        q = p.add("Split", q, count=3, axis=2)
        q, k, v = q, f"{q}:1", f"{q}:2"
    q, k, v = (_split_heads(p, a, heads) for a in (q, k, v))
    graph.lengths[last], graph.lengths[total] = "seqlens_k", "total_sequence_length"
    length = p.add("Reshape", p.add("Cast", total, to=7), p.ints(1))
    length = p.add("Sub", length, p.add("Shape", q, start=2, end=3))
    present_k, present_v = (node.outputs[i] if len(node.outputs) > i else "" for i in (1, 2))
    k, v = _cached(p, past_k, k, present_k, length, True), _cached(p, past_v, v, present_v, length, True)
    out = _attend(
        p, q, k, v, ("", node.input(10)),
        scale=attributes.get("scale", 0.0),
        causal=attributes.get("causal", 1),
        filter=float("-inf"),
    )  # fmt: skip
    _merge_heads(p, out, node.outputs[0])
    return p.nodes


def _onnx_attention(graph: Graph, node: Node) -> list[Node] | None:
    """ONNX Attention, opset 23 and later: Q, K, V, attn_mask, past_key, past_value."""
    q, k, v, mask, past_k, past_v = (node.input(i) for i in range(6))
    attributes = node.attributes
    _refuse(node, ["softcap"], {6: "nonpad_kv_seqlen"})
    if len(node.outputs) > 3 and node.outputs[3]:
        return None
    p = Pieces(graph, node)
    heads = attributes.get("q_num_heads", 0)
    if heads:
        if attributes.get("kv_num_heads", heads) != heads:
            return None
        q, k, v = (_split_heads(p, a, heads) for a in (q, k, v))
    present_k, present_v = (node.outputs[i] if len(node.outputs) > i else "" for i in (1, 2))
    k, v = _cached(p, past_k, k, present_k, ""), _cached(p, past_v, v, present_v, "")
    out = _attend(
        p, q, k, v, ("", mask),
        scale=attributes.get("scale", 0.0),
        causal=attributes.get("is_causal", 0),
        filter=float("-inf"),
        guarded=True,
    )  # fmt: skip
    if heads:
        _merge_heads(p, out, node.outputs[0])
    else:
        p.add("Identity", out, out=node.outputs[0])
    return p.nodes


def _einsum(graph: Graph, node: Node) -> list[Node] | None:
    """A product of two activations over one axis, as Transpose and MatMul."""
    terms, arrow, out = node.attributes["equation"].replace(" ", "").partition("->")
    letters = terms.split(",")
    if not arrow or len(letters) != 2 or any(graph.is_constant(i) for i in node.inputs):
        return None
    if all(len(t.replace("...", "")) > 2 for t in letters):  # then it stands for the batch
        letters, out = [t.replace("...", "_") for t in letters], out.replace("...", "_")
    own = next((c for c in out if (c in letters[0]) != (c in letters[1])), "")
    (left, first), (right, second) = sorted(zip(letters, node.inputs, strict=True), key=lambda t: own not in t[0])
    rows, columns = [c for c in left if c not in right], [c for c in right if c not in left]
    summed = [c for c in left if c in right and c not in out]
    if len(rows) != 1 or len(columns) != 1 or len(summed) != 1 or set(out) - set(left + right):
        return None
    (r,), (c,), (s,) = rows, columns, summed
    p = Pieces(graph, node)
    if "..." in out:  # of any rank: only the last two axes are known
        if (left, out) != (f"...{r}{s}", f"...{r}{c}"):
            return None
        p.add("com.microsoft.FusedMatMul", first, second, out=node.outputs[0], transB=int(right == f"...{c}{s}"))
        return p.nodes

    def turned(x: str, now: str, then: str) -> str:
        return x if now == then else p.add("Transpose", x, perm=[now.index(letter) for letter in then])

    batch = "".join(letter for letter in out if letter not in (r, c))
    factors = turned(first, left, f"{batch}{r}{s}"), turned(second, right, f"{batch}{s}{c}")
    if out == f"{batch}{r}{c}":
        p.add("MatMul", *factors, out=node.outputs[0])
    else:
        turned_back = [f"{batch}{r}{c}".index(letter) for letter in out]
        p.add("Transpose", p.add("MatMul", *factors), out=node.outputs[0], perm=turned_back)
    return p.nodes


def _rotary(graph: Graph, node: Node) -> None:
    raise UnsupportedModelError(f"{node.describe()} rotates queries or keys by their positions: GPT-2 adds wpe instead")


RULES: dict[str, Callable[[Graph, Node], list[Node] | None]] = {
    "com.microsoft.SkipLayerNormalization": _skip_layer_norm,
    "com.microsoft.EmbedLayerNormalization": _embed_layer_norm,
    "com.microsoft.FastGelu": _biased_gelu,
    "com.microsoft.BiasGelu": _biased_gelu,
    "com.microsoft.FusedGemm": _fused_gemm,
    "com.microsoft.FusedMatMul": _fused_matmul,
    "com.microsoft.Attention": _contrib_attention,
    "com.microsoft.DecoderMaskedSelfAttention": _contrib_attention,
    "com.microsoft.MultiHeadAttention": _multi_head_attention,
    "com.microsoft.DecoderMaskedMultiHeadAttention": _multi_head_attention,
    "com.microsoft.GroupQueryAttention": _group_query_attention,
    "Attention": _onnx_attention,
    "Einsum": _einsum,
    "RotaryEmbedding": _rotary,
    "com.microsoft.RotaryEmbedding": _rotary,
}
