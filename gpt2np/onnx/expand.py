"""Fused operators as the plain nodes that they stand for.

Optimisers fuse layer norms with the additions before them, a bias with the GELU behind it, and a whole attention
into one node. Each is taken apart here, as the graph is read, so that one pattern per part of GPT-2 is enough.
The values between the pieces are invented: the file does not hold them, so no tap can point there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .graph import Graph, Node

MASKED = "gpt2np.MaskedScores"  # our own: what a fused attention does to scores before its softmax


class _Pieces:
    """Nodes in the place of one node."""

    def __init__(self, graph: Graph, origin: Node) -> None:
        self.graph, self.origin = graph, origin
        self.nodes: list[Node] = []

    def add(self, op: str, *inputs: str, out: str = "", count: int = 1, **attributes: Any) -> str:
        """Append a node and return its (first) output; further ones are named `...:1`, `...:2`."""
        from .graph import Node

        if not out:
            out = f"{self.origin.outputs[0] or self.origin.name} [{len(self.nodes)}]"
            self.graph.invented.add(out)
        outputs = (out, *(f"{out}:{i}" for i in range(1, count)))
        self.graph.invented.update(outputs[1:])
        attributes["written_as"] = self.origin.op
        self.nodes.append(Node(op, op.rpartition(".")[0], self.origin.name, inputs, outputs, attributes))
        return out

    def constant(self, value: Any) -> str:
        """The name of a new constant."""
        name = f"{self.origin.outputs[0] or self.origin.name} constant {len(self.graph.invented)}"
        self.graph.invented.add(name)
        self.graph.constants[name] = np.asarray(value)
        return name

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))


def _skip_layer_norm(graph: Graph, node: Node) -> list[Node]:
    p = _Pieces(graph, node)
    x, skip, gain, shift, bias = (node.input(i) for i in range(5))
    total = node.outputs[3] if len(node.outputs) > 3 else ""
    if bias:
        x = p.add("Add", x, bias)
    named = "" if graph.literal else total
    summed = p.add("Add", x, skip, out=named)
    if total != named:  # the norm reads the sum before it is rounded to float16
        p.add("Identity", summed, out=total)
    epsilon = node.attributes.get("epsilon", 1e-12)
    p.add("LayerNormalization", summed, gain, shift, out=node.outputs[0], epsilon=epsilon, axis=-1)
    return p.nodes


def _embed_layer_norm(graph: Graph, node: Node) -> list[Node]:
    p = _Pieces(graph, node)
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
    p = _Pieces(graph, node)
    x = p.add("Add", node.inputs[0], node.inputs[1])
    plain = "com.microsoft.FastGelu" if node.op == "com.microsoft.FastGelu" else "com.microsoft.Gelu"
    p.add(plain, x, out=node.outputs[0])
    return p.nodes


def _fused_gemm(graph: Graph, node: Node) -> list[Node] | None:
    activation = node.attributes.get("activation", "")
    p = _Pieces(graph, node)
    attributes = {k: v for k, v in node.attributes.items() if not k.startswith("activation")}
    if not activation:
        p.add("Gemm", *node.inputs, out=node.outputs[0], **attributes)
    else:
        p.add(activation, p.add("Gemm", *node.inputs, **attributes), out=node.outputs[0])
    return p.nodes


def _split_heads(p: _Pieces, x: str, heads: int) -> str:
    """(B, T, HD) -> (B, H, T, D)"""
    return p.add("Transpose", p.add("Reshape", x, p.ints(0, 0, heads, -1)), perm=[0, 2, 1, 3])


def _merge_heads(p: _Pieces, x: str, out: str) -> None:
    """(B, H, T, D) -> (B, T, HD)"""
    p.add("Reshape", p.add("Transpose", x, perm=[0, 2, 1, 3]), p.ints(0, 0, -1), out=out)


def _attend(p: _Pieces, q: str, k: str, v: str, masks: tuple[str, str], guarded: bool = False, **how: Any) -> str:
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


def _contrib_attention(graph: Graph, node: Node) -> list[Node] | None:
    """com.microsoft.Attention: input, weights, bias, mask_index, past, attention_bias."""
    x, weights, bias, mask, past, score_bias = (node.input(i) for i in range(6))
    attributes = node.attributes
    if attributes.get("do_rotary", 0) or attributes.get("past_present_share_buffer", 0):
        return None
    heads = attributes["num_heads"]
    p = _Pieces(graph, node)
    qkv = p.add("MatMul", x, weights)
    if bias:
        qkv = p.add("Add", qkv, bias)
    sizes = attributes.get("qkv_hidden_sizes")
    q = p.add("Split", qkv, p.ints(*sizes), count=3, axis=2) if sizes else p.add("Split", qkv, count=3, axis=2)
    q, k, v = (_split_heads(p, part, heads) for part in (q, f"{q}:1", f"{q}:2"))
    if past:
        old = (p.add("Gather", past, p.constant(np.int64(i)), axis=0) for i in (0, 1))
        k, v = (p.add("Concat", a, b, axis=2) for a, b in zip(old, (k, v), strict=True))
    if len(node.outputs) > 1 and node.outputs[1]:
        pair = [p.add("Unsqueeze", a, p.ints(0)) for a in (k, v)]
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
    """com.microsoft.MultiHeadAttention: query, key, value, bias, key_padding_mask, attention_bias, two pasts."""
    q, k, v, bias, mask, score_bias, past_k, past_v = (node.input(i) for i in range(8))
    if not k or not v or (len(node.inputs) > 8 and any(node.inputs[8:])):
        return None
    heads = node.attributes["num_heads"]
    p = _Pieces(graph, node)
    if bias:
        size = graph.shape(bias)[0] // 3
        parts = p.add("Split", bias, p.ints(size, size, size), count=3, axis=0)
        q, k, v = (p.add("Add", a, b) for a, b in zip((q, k, v), (parts, f"{parts}:1", f"{parts}:2"), strict=True))
    q, k, v = (_split_heads(p, a, heads) for a in (q, k, v))
    present_k, present_v = (node.outputs[i] if len(node.outputs) > i else "" for i in (1, 2))
    if past_k:
        k, v = p.add("Concat", past_k, k, out=present_k, axis=2), p.add("Concat", past_v, v, out=present_v, axis=2)
    else:
        k = p.add("Identity", k, out=present_k)
        v = p.add("Identity", v, out=present_v)
    out = _attend(
        p, q, k, v, (mask, score_bias),
        scale=node.attributes.get("scale", 0.0),
        causal=node.attributes.get("unidirectional", 0),
        filter=node.attributes.get("mask_filter_value", -10000.0),
    )  # fmt: skip
    _merge_heads(p, out, node.outputs[0])
    return p.nodes


def _onnx_attention(graph: Graph, node: Node) -> list[Node] | None:
    """ONNX Attention, opset 23 and later: Q, K, V, attn_mask, past_key, past_value."""
    q, k, v, mask, past_k, past_v = (node.input(i) for i in range(6))
    attributes = node.attributes
    if attributes.get("softcap", 0.0) or node.input(6) or (len(node.outputs) > 3 and node.outputs[3]):
        return None
    p = _Pieces(graph, node)
    heads = attributes.get("q_num_heads", 0)
    if heads:
        if attributes.get("kv_num_heads", heads) != heads:
            return None
        q, k, v = (_split_heads(p, a, heads) for a in (q, k, v))
    present_k, present_v = (node.outputs[i] if len(node.outputs) > i else "" for i in (1, 2))
    if past_k:
        k, v = p.add("Concat", past_k, k, out=present_k, axis=2), p.add("Concat", past_v, v, out=present_v, axis=2)
    elif present_k:
        k, v = p.add("Identity", k, out=present_k), p.add("Identity", v, out=present_v)
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


RULES: dict[str, Callable[[Graph, Node], list[Node] | None]] = {
    "com.microsoft.SkipLayerNormalization": _skip_layer_norm,
    "com.microsoft.EmbedLayerNormalization": _embed_layer_norm,
    "com.microsoft.FastGelu": _biased_gelu,
    "com.microsoft.BiasGelu": _biased_gelu,
    "com.microsoft.FusedGemm": _fused_gemm,
    "com.microsoft.Attention": _contrib_attention,
    "com.microsoft.MultiHeadAttention": _multi_head_attention,
    "Attention": _onnx_attention,
}
