"""The one table of operations: everything that gpt2np knows about each part of a layer, a row for each tap.

A row says which taps the operation reads, the shape of what it makes, which weights it takes, how it is run, its
gradient, its ONNX graph, its formula, and the line of reference.py that it is. docs/taps.md is printed from it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import reference
from ..activations import ACTIVATIONS
from ..call import Call
from ..config import GPT2Config
from ..masks import Mask, mask_for
from ..weights import Array

if TYPE_CHECKING:
    from .program import Program

HEAD_BLOCK = 8192  # rows of the head cast to the working dtype at a time

# (program, call, tap, the arrays of its input taps, dtype) -> the array of its tap, in that dtype.
Run = Callable[["Program", Call, str, list[Array], "np.dtype[Any]"], Array]


class Back(NamedTuple):
    """The cotangents of an operation's inputs and of its weights."""

    inputs: list[Array]
    weights: dict[str, Array]


class Piece(NamedTuple):
    """One operation as ONNX: nodes, constants, and what it is fed with besides its input taps."""

    nodes: list[Any]
    constants: dict[str, Array]
    feeds: dict[str, Array]


# (program, call, tap, cotangent of the tap, its input taps, its value) -> Back, in float64
Gradient = Callable[["Program", Call, str, Array, list[Array], Array], Back]
# (program, call, tap, names of its inputs, name of its output) -> Piece
WriteGraph = Callable[["Program", Call, str, list[str], str], Piece]


class Operation(NamedTuple):
    """A row. In `inputs` and `weights` {h} is the layer, {x} the residual stream that comes in, {t} the tap."""

    inputs: tuple[str, ...]
    shape: str  # in the letters of design: B T S C H D F V, HD for H times D
    weights: tuple[str, ...]
    run: Run
    gradient: Gradient
    graph: WriteGraph
    formula: str
    line: str  # as it stands in reference.py


# ------------------------------------------------------------------------------------------------- the names


def split_tap(tap: str) -> tuple[int | None, str]:
    """ "h.3.attn.q" -> (3, "attn.q"); "ln_f" -> (None, "ln_f")."""
    if tap.startswith("h."):
        _, layer, part = tap.split(".", 2)
        return int(layer), part
    return None, tap


def is_tap(name: str) -> bool:
    """Whether a name is a tap's, of a model with any number of layers."""
    head, _, rest = name.partition(".")
    layer, _, part = rest.partition(".")
    return name in ("embed", "ln_f", "logits") or (head == "h" and layer.isdecimal() and part in LAYER_PARTS)


def tap_names(config: GPT2Config) -> list[str]:
    """Every tap in the order of computation."""
    layers = [f"h.{i}.{part}" for i in range(config.n_layer) for part in LAYER_PARTS]
    return ["embed", *layers, "ln_f", "logits"]


def tap_inputs(tap: str, config: GPT2Config) -> tuple[str, ...]:
    """The taps that the operation of one tap reads."""
    layer, part = split_tap(tap)
    before = config.n_layer if layer is None else layer
    stream = f"h.{before - 1}.resid_post" if before else "embed"
    return tuple(name.format(h=f"h.{layer}", x=stream) for name in OPERATIONS[part].inputs)


def tap_shape(tap: str, config: GPT2Config, call: Call) -> tuple[int, ...]:
    """The shape of one tap in a call."""
    (B, T), H, D = call.input_ids.shape, config.n_head, config.head_size
    sizes = {
        "B": B, "T": T, "S": call.start + T, "C": config.n_embd, "H": H, "D": D, "HD": H * D,
        "F": config.n_inner, "V": config.vocab_size,
    }  # fmt: skip
    return tuple(sizes[letter] for letter in OPERATIONS[split_tap(tap)[1]].shape.split())


def tap_weights(tap: str, program: Program) -> list[str]:
    """The weights that the operation of one tap takes."""
    layer, part = split_tap(tap)
    names = [w.format(h=f"h.{layer}", t=tap, head=program.head) for w in OPERATIONS[part].weights]
    return [name for name in names if name in program.weights]


# ------------------------------------------------------------------------------------------------- embedding


def embed_at(p: Program, call: Call, position_ids: Array, dtype: np.dtype[Any]) -> Array:
    """The embedding with other rows of wpe."""
    wte = p.weights("wte.weight", dtype)
    x = wte[call.input_ids].astype(dtype) + p.weights("wpe.weight", dtype)[position_ids]
    return np.asarray(x if call.token_type_ids is None else x + wte[call.token_type_ids].astype(dtype))


def _embed(p: Program, call: Call, tap: str, x: list[Array], dtype: np.dtype[Any]) -> Array:
    return embed_at(p, call, call.position_ids, dtype)


def _embed_back(p: Program, call: Call, tap: str, g: Array, x: list[Array], y: Array) -> Back:
    rows = g.reshape(-1, g.shape[-1])
    tokens = np.zeros(p.weights("wte.weight", g.dtype).shape)
    np.add.at(tokens, call.input_ids.ravel(), rows)
    positions = np.zeros(p.weights("wpe.weight", g.dtype).shape)
    np.add.at(positions, call.position_ids.ravel(), rows)
    return Back([], {"wte.weight": tokens, "wpe.weight": positions})


def _embed_graph(p: Program, call: Call, tap: str, x: list[str], y: str) -> Piece:
    f32 = np.dtype(np.float32)
    nodes = [
        _node("Gather", ["wte", "input_ids"], "tokens"), _node("Gather", ["wpe", "position_ids"], "positions"),
        _node("Add", ["tokens", "positions"], y),
    ]  # fmt: skip
    feeds = {"input_ids": call.input_ids, "position_ids": call.position_ids}
    if call.token_type_ids is not None:
        nodes[-1].output[0] = "sum"
        nodes += [_node("Gather", ["wte", "token_type_ids"], "types"), _node("Add", ["sum", "types"], y)]
        feeds["token_type_ids"] = call.token_type_ids
    tables = {"wte": p.weights("wte.weight", f32).astype(f32), "wpe": p.weights("wpe.weight", f32)}
    return Piece(nodes, tables, feeds)


# ------------------------------------------------------------------------------- layer norm and linear maps


def _layer_norm(p: Program, call: Call, tap: str, x: list[Array], dtype: np.dtype[Any]) -> Array:
    return reference.layer_norm(x[0], *p.norm(tap, dtype))


def _layer_norm_back(p: Program, call: Call, tap: str, g: Array, x: list[Array], y: Array) -> Back:
    w, _, eps = p.norm(tap, g.dtype)
    centred = x[0] - x[0].mean(axis=-1, keepdims=True)
    root = np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + eps)
    unit, gw, axes = centred / root, g * w, tuple(range(g.ndim - 1))
    inner = gw - gw.mean(axis=-1, keepdims=True) - unit * (gw * unit).mean(axis=-1, keepdims=True)
    return Back([inner / root], {f"{tap}.weight": (g * unit).sum(axis=axes), f"{tap}.bias": g.sum(axis=axes)})


def _layer_norm_graph(p: Program, call: Call, tap: str, x: list[str], y: str) -> Piece:
    w, b, eps = p.norm(tap, np.dtype(np.float32))
    node = _node("LayerNormalization", [x[0], "weight", "bias"], y, axis=-1, epsilon=eps)
    return Piece([node], {"weight": w, "bias": b}, {})


def linear_of(tap: str) -> str:
    """The linear map that makes a tap: "h.0.attn.q" -> "h.0.attn.c_attn"."""
    return f"{tap[:-2]}.c_attn" if tap[-2:] in (".q", ".k", ".v") else tap.replace(".out", ".c_proj")


def _columns(p: Program, tap: str) -> slice:
    """The columns of its linear map that a tap is: a third of c_attn's, or all."""
    width = p.config.n_head * p.config.head_size
    which = "qkv".find(tap[-1]) if tap[-2:] in (".q", ".k", ".v") else -1
    return slice(None) if which < 0 else slice(which * width, (which + 1) * width)


def _linear(p: Program, call: Call, tap: str, x: list[Array], dtype: np.dtype[Any]) -> Array:
    return p.linear(linear_of(tap), x[0], dtype, _columns(p, tap))


def _linear_back(p: Program, call: Call, tap: str, g: Array, x: list[Array], y: Array) -> Back:
    name, columns = linear_of(tap), _columns(p, tap)
    w = p.weights(f"{name}.weight", g.dtype)
    rows, flat = x[0].reshape(-1, x[0].shape[-1]), g.reshape(-1, g.shape[-1])
    grad, bias = np.zeros(w.shape), np.zeros(w.shape[1])
    grad[:, columns], bias[columns] = rows.T @ flat, flat.sum(axis=0)
    return Back([g @ w[:, columns].T], {f"{name}.weight": grad, f"{name}.bias": bias})


def _linear_graph(p: Program, call: Call, tap: str, x: list[str], y: str) -> Piece:
    name, columns, f32 = linear_of(tap), _columns(p, tap), np.dtype(np.float32)
    w, b = p.weights(f"{name}.weight", f32)[:, columns], p.weights(f"{name}.bias", f32)[columns]
    return Piece([_node("MatMul", [x[0], "weight"], "product"), _node("Add", ["product", "bias"], y)],
                 {"weight": w, "bias": b}, {})  # fmt: skip


# ------------------------------------------------------------------------------------------------- attention


def _qkv(p: Program, call: Call, tap: str, x: list[Array], dtype: np.dtype[Any]) -> Array:
    flat = _linear(p, call, tap, x, dtype)
    return flat.reshape(*flat.shape[:2], p.config.n_head, -1).transpose(0, 2, 1, 3)  # (B, T, HD) -> (B, H, T, D)


def _qkv_back(p: Program, call: Call, tap: str, g: Array, x: list[Array], y: Array) -> Back:
    B, H, T, D = g.shape
    return _linear_back(p, call, tap, g.transpose(0, 2, 1, 3).reshape(B, T, H * D), x, y)


def _qkv_graph(p: Program, call: Call, tap: str, x: list[str], y: str) -> Piece:
    B, T = call.input_ids.shape
    nodes, constants, _ = _linear_graph(p, call, tap, x, "flat")
    nodes += [_node("Reshape", ["flat", "shape"], "split"), _node("Transpose", ["split"], y, perm=[0, 2, 1, 3])]
    return Piece(nodes, {**constants, "shape": np.array([B, T, p.config.n_head, p.config.head_size])}, {})


def with_past(call: Call, layer: int, which: int, new: Array) -> Array:
    """Cached keys (which = 0) or values (1) and the new ones: (B, H, S, D)."""
    if call.past is None:
        return new
    return np.concatenate([call.past[layer][which].astype(new.dtype), new], axis=2)


def _past_graph(call: Call, tap: str, which: int, new: str) -> tuple[list[Any], str, dict[str, Array]]:
    if call.past is None:
        return [], new, {}
    past = np.ascontiguousarray(call.past[_layer(tap)][which], np.float32)
    return [_node("Concat", ["past", new], "all", axis=2)], "all", {"past": past}


def _scores(p: Program, call: Call, tap: str, x: list[Array], dtype: np.dtype[Any]) -> Array:
    keys = with_past(call, _layer(tap), 0, x[1])
    return np.asarray(x[0] @ keys.swapaxes(-1, -2) * p.config.layer_scale(_layer(tap)))


def _scores_back(p: Program, call: Call, tap: str, g: Array, x: list[Array], y: Array) -> Back:
    keys, scale = with_past(call, _layer(tap), 0, x[1]), p.config.layer_scale(_layer(tap))
    return Back([g @ keys * scale, (g.swapaxes(-1, -2) @ x[0] * scale)[:, :, call.start :]], {})


def _scores_graph(p: Program, call: Call, tap: str, x: list[str], y: str) -> Piece:
    nodes, keys, past = _past_graph(call, tap, 0, x[1])
    nodes += [
        _node("Transpose", [keys], "columns", perm=[0, 1, 3, 2]), _node("MatMul", [x[0], "columns"], "product"),
        _node("Mul", ["product", "scale"], y),
    ]  # fmt: skip
    return Piece(nodes, {"scale": np.array(p.config.layer_scale(_layer(tap)), np.float32)}, past)


def masked_softmax(scores: Array, config: GPT2Config, attention_mask: Array | None) -> Array:
    """Probabilities of scores (B, H, T, S) under the mask that a config describes."""
    B, _, T, S = scores.shape
    mask = mask_for(config.mask, attention_mask, B, T, S, scores.dtype) or reference.causal_mask
    return reference.softmax(mask(scores))


def _probs(p: Program, call: Call, tap: str, x: list[Array], dtype: np.dtype[Any]) -> Array:
    return masked_softmax(x[0], p.config, call.attention_mask)


def _probs_back(p: Program, call: Call, tap: str, g: Array, x: list[Array], y: Array) -> Back:
    return Back([y * (g - (g * y).sum(axis=-1, keepdims=True))], {})


def _probs_graph(p: Program, call: Call, tap: str, x: list[str], y: str) -> Piece:
    (B, T), f32 = call.input_ids.shape, np.dtype(np.float32)
    S = call.start + T
    mask = mask_for(p.config.mask, call.attention_mask, B, T, S, f32)
    mask = mask or Mask(reference.causal_mask(np.zeros((1, 1, T, S), f32)))
    nodes = [_node("Add", ["kept", "mask"], "masked"), _node("Softmax", ["masked"], y, axis=-1)]
    if mask.keep is not None:
        hide = _node("Where", ["keep", x[0], "zero"], "kept")
        return Piece([hide, *nodes], {"keep": mask.keep, "zero": np.zeros((), f32), "mask": mask.added}, {})
    nodes[0].input[0] = x[0]
    return Piece(nodes, {"mask": mask.added}, {})


def _heads(p: Program, call: Call, tap: str, x: list[Array], dtype: np.dtype[Any]) -> Array:
    mixed = x[0] @ with_past(call, _layer(tap), 1, x[1])  # (B, H, T, S) @ (B, H, S, D) -> (B, H, T, D)
    return mixed.transpose(0, 2, 1, 3).reshape(*call.input_ids.shape, -1)


def _heads_back(p: Program, call: Call, tap: str, g: Array, x: list[Array], y: Array) -> Back:
    B, H, T, D = x[1].shape
    by_head = g.reshape(B, T, H, D).transpose(0, 2, 1, 3)  # (B, T, HD) -> (B, H, T, D)
    values = with_past(call, _layer(tap), 1, x[1])
    return Back([by_head @ values.swapaxes(-1, -2), (x[0].swapaxes(-1, -2) @ by_head)[:, :, call.start :]], {})


def _heads_graph(p: Program, call: Call, tap: str, x: list[str], y: str) -> Piece:
    (B, T), c = call.input_ids.shape, p.config
    nodes, values, past = _past_graph(call, tap, 1, x[1])
    nodes += [
        _node("MatMul", [x[0], values], "mixed"), _node("Transpose", ["mixed"], "moved", perm=[0, 2, 1, 3]),
        _node("Reshape", ["moved", "shape"], y),
    ]  # fmt: skip
    return Piece(nodes, {"shape": np.array([B, T, c.n_head * c.head_size])}, past)


# ----------------------------------------------------------------------------- residual stream, activation, head


def _add(p: Program, call: Call, tap: str, x: list[Array], dtype: np.dtype[Any]) -> Array:
    return np.asarray(x[0] + x[1])


def _add_back(p: Program, call: Call, tap: str, g: Array, x: list[Array], y: Array) -> Back:
    return Back([g, g], {})


def _add_graph(p: Program, call: Call, tap: str, x: list[str], y: str) -> Piece:
    return Piece([_node("Add", x, y)], {}, {})


def _gelu(p: Program, call: Call, tap: str, x: list[Array], dtype: np.dtype[Any]) -> Array:
    return ACTIVATIONS[p.config.layer_activation(_layer(tap))](x[0])


def _gelu_back(p: Program, call: Call, tap: str, g: Array, x: list[Array], y: Array) -> Back:
    step = 1e-5 * np.maximum(1.0, np.abs(x[0]))  # central differences: right for any activation
    high, low = (p.run(tap, call, [x[0] + s], g.dtype) for s in (step, -step))
    return Back([g * (high - low) / (2 * step)], {})


def _gelu_graph(p: Program, call: Call, tap: str, x: list[str], y: str) -> Piece:
    nodes: list[Any] = []
    constants: dict[str, Array] = {}

    def op(op_type: str, *inputs: str | float) -> str:
        names = [i if isinstance(i, str) else f"constant_{len(constants) + n}" for n, i in enumerate(inputs)]
        constants.update({n: np.array(i, np.float32) for n, i in zip(names, inputs, strict=True) if n != i})
        nodes.append(_node(op_type, names, f"{op_type}_{len(nodes)}"))
        return str(nodes[-1].output[0])

    ACTIVATIONS[p.config.layer_activation(_layer(tap))].onnx(op, x[0])
    nodes[-1].output[0] = y
    return Piece(nodes, constants, {})


def _logits(p: Program, call: Call, tap: str, x: list[Array], dtype: np.dtype[Any]) -> Array:
    head = p.weights(p.head, dtype)
    out = np.empty((*x[0].shape[:-1], len(head)), dtype)
    for row in range(0, len(head), HEAD_BLOCK):
        out[..., row : row + HEAD_BLOCK] = x[0] @ head[row : row + HEAD_BLOCK].astype(dtype).T
    if "lm_head.bias" in p.weights:
        out += p.weights("lm_head.bias", dtype).astype(dtype)
    return out


def _logits_back(p: Program, call: Call, tap: str, g: Array, x: list[Array], y: Array) -> Back:
    flat = g.reshape(-1, g.shape[-1])
    grads = {p.head: flat.T @ x[0].reshape(-1, x[0].shape[-1])}
    if "lm_head.bias" in p.weights:
        grads["lm_head.bias"] = flat.sum(axis=0)
    return Back([g @ p.weights(p.head, g.dtype).astype(g.dtype)], grads)


def _logits_graph(p: Program, call: Call, tap: str, x: list[str], y: str) -> Piece:
    f32 = np.dtype(np.float32)
    constants = {"head": p.weights(p.head, f32).astype(f32).T}
    if "lm_head.bias" not in p.weights:
        return Piece([_node("MatMul", [x[0], "head"], y)], constants, {})
    constants["bias"] = p.weights("lm_head.bias", f32).astype(f32)
    return Piece([_node("MatMul", [x[0], "head"], "product"), _node("Add", ["product", "bias"], y)], constants, {})


def _node(op: str, inputs: list[str], output: str, **attributes: Any) -> Any:
    from onnx.helper import make_node

    return make_node(op, inputs, [output], **attributes)


def _layer(tap: str) -> int:
    layer = split_tap(tap)[0]
    assert layer is not None, tap
    return layer


# ------------------------------------------------------------------------------------------------- the table

_NORM = (_layer_norm, _layer_norm_back, _layer_norm_graph)
_LINEAR = (_linear, _linear_back, _linear_graph)
_QKV = (_qkv, _qkv_back, _qkv_graph)
_ADD = (_add, _add_back, _add_graph)
_BOTH = ("{t}.weight", "{t}.bias")


def _weights(name: str) -> tuple[str, str]:
    return f"{{h}}.{name}.weight", f"{{h}}.{name}.bias"


OPERATIONS: dict[str, Operation] = {
    "embed": Operation((), "B T C", ("wte.weight", "wpe.weight"), _embed, _embed_back, _embed_graph,
        "token vector + position vector", "wte[input_ids] + wpe[position_ids]"),
    "ln_1": Operation(("{x}",), "B T C", _BOTH, *_NORM,
        "the stream, normalised", "normed = layer_norm(x, *w.ln_1)"),
    "attn.q": Operation(("{h}.ln_1",), "B H T D", _weights("attn.c_attn"), *_QKV,
        "queries: c_attn's first third, by heads", 'tap(f"{name}.q", q)'),
    "attn.k": Operation(("{h}.ln_1",), "B H T D", _weights("attn.c_attn"), *_QKV,
        "keys of the new positions: c_attn's second third", 'tap(f"{name}.k", k)'),
    "attn.v": Operation(("{h}.ln_1",), "B H T D", _weights("attn.c_attn"), *_QKV,
        "values of the new positions: c_attn's last third", 'tap(f"{name}.v", v)'),
    "attn.scores": Operation(("{h}.attn.q", "{h}.attn.k"), "B H T S", (), _scores, _scores_back, _scores_graph,
        "q·k, scaled, before the mask", "scores = q @ keys.swapaxes(-1, -2) * w.scale"),
    "attn.probs": Operation(("{h}.attn.scores",), "B H T S", (), _probs, _probs_back, _probs_graph,
        "softmax of the masked scores", "probs = softmax("),
    "attn.heads": Operation(("{h}.attn.probs", "{h}.attn.v"), "B T HD", (), _heads, _heads_back, _heads_graph,
        "probs · v, heads side by side", "heads = (probs @ values)"),
    "attn.out": Operation(("{h}.attn.heads",), "B T C", _weights("attn.c_proj"), *_LINEAR,
        "after c_proj", "out = linear(heads, *w.c_proj)"),
    "resid_mid": Operation(("{x}", "{h}.attn.out"), "B T C", (), *_ADD,
        "the stream after the attention was added", "x = x + attention("),
    "ln_2": Operation(("{h}.resid_mid",), "B T C", _BOTH, *_NORM,
        "the stream, normalised", "normed = layer_norm(x, *w.ln_2)"),
    "mlp.c_fc": Operation(("{h}.ln_2",), "B T F", _weights("mlp.c_fc"), *_LINEAR,
        "after the first linear map", "hidden = linear(x, *w.c_fc)"),
    "mlp.gelu": Operation(("{h}.mlp.c_fc",), "B T F", (), _gelu, _gelu_back, _gelu_graph,
        "after the activation", "hidden = ACTIVATIONS[w.activation](hidden)"),
    "mlp.out": Operation(("{h}.mlp.gelu",), "B T C", _weights("mlp.c_proj"), *_LINEAR,
        "after the second linear map", "out = linear(hidden, *w.c_proj)"),
    "resid_post": Operation(("{h}.resid_mid", "{h}.mlp.out"), "B T C", (), *_ADD,
        "the stream after the MLP was added", "x = x + mlp("),
    "ln_f": Operation(("{x}",), "B T C", _BOTH, *_NORM,
        "`last_hidden_state`", "x = layer_norm(x, *w.ln_f)"),
    "logits": Operation(("ln_f",), "B T V", ("{head}", "lm_head.bias"), _logits, _logits_back, _logits_graph,
        "a score for every token", "scores = hidden @ lm_head.T"),
}  # fmt: skip
LAYER_PARTS = tuple(part for part in OPERATIONS if part not in ("embed", "ln_f", "logits"))
