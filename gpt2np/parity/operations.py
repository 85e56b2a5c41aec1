"""The forward pass as a list of operations, one for each tap name, that can be run one at a time.

`reference.py` is the textbook that a reader follows; here the same functions are cut at every tap, so that an
operation can be fed with somebody else's inputs (local error), swapped for a mistaken one (probes), run in
float32 and float64 side by side (the float32 floor), or written out alone (repro).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from .. import reference
from ..activations import ACTIVATIONS
from ..call import Call
from ..config import GPT2Config
from ..masks import mask_for
from ..weights import Array, WeightSources

HEAD_BLOCK = 8192  # rows of the head cast to the working dtype at a time

LAYER_PARTS = (
    "ln_1", "attn.q", "attn.k", "attn.v", "attn.scores", "attn.probs", "attn.heads", "attn.out",
    "resid_mid", "ln_2", "mlp.c_fc", "mlp.gelu", "mlp.out", "resid_post",
)  # fmt: skip


def tap_names(config: GPT2Config) -> list[str]:
    """Every tap in the order of computation."""
    layers = [f"h.{i}.{part}" for i in range(config.n_layer) for part in LAYER_PARTS]
    return ["embed", *layers, "ln_f", "logits"]


def split_tap(tap: str) -> tuple[int | None, str]:
    """ "h.3.attn.q" -> (3, "attn.q"); "ln_f" -> (None, "ln_f")."""
    if tap.startswith("h."):
        _, layer, part = tap.split(".", 2)
        return int(layer), part
    return None, tap


def tap_inputs(tap: str, config: GPT2Config) -> tuple[str, ...]:
    """The taps that the operation of one tap reads."""
    layer, part = split_tap(tap)
    last = f"h.{config.n_layer - 1}.resid_post" if config.n_layer else "embed"
    if layer is None:
        return {"embed": (), "ln_f": (last,), "logits": ("ln_f",)}[part]
    name = f"h.{layer}"
    before = f"h.{layer - 1}.resid_post" if layer else "embed"
    return {
        "ln_1": (before,),
        "attn.q": (f"{name}.ln_1",),
        "attn.k": (f"{name}.ln_1",),
        "attn.v": (f"{name}.ln_1",),
        "attn.scores": (f"{name}.attn.q", f"{name}.attn.k"),
        "attn.probs": (f"{name}.attn.scores",),
        "attn.heads": (f"{name}.attn.probs", f"{name}.attn.v"),
        "attn.out": (f"{name}.attn.heads",),
        "resid_mid": (before, f"{name}.attn.out"),
        "ln_2": (f"{name}.resid_mid",),
        "mlp.c_fc": (f"{name}.ln_2",),
        "mlp.gelu": (f"{name}.mlp.c_fc",),
        "mlp.out": (f"{name}.mlp.gelu",),
        "resid_post": (f"{name}.resid_mid", f"{name}.mlp.out"),
    }[part]


def tap_shape(tap: str, config: GPT2Config, call: Call) -> tuple[int, ...]:
    """The shape of one tap, as docs/taps.md lists it."""
    (B, T), H, D = call.input_ids.shape, config.n_head, config.head_size
    part = split_tap(tap)[1]
    if part in ("attn.q", "attn.k", "attn.v"):
        return B, H, T, D
    if part in ("attn.scores", "attn.probs"):
        return B, H, T, call.start + T
    widths = {"attn.heads": H * D, "mlp.c_fc": config.n_inner, "mlp.gelu": config.n_inner, "logits": config.vocab_size}
    return B, T, widths.get(part, config.n_embd)


# An operation: (program, call, the arrays of its input taps) -> the array of its tap, in its inputs' dtype.
Run = Callable[["Program", Call, str, list[Array], "np.dtype[Any]"], Array]


class Parameters:
    """Weights by name in the dtype asked for, read when first used; `changed` take the place of the file's."""

    def __init__(self, sources: WeightSources, changed: Mapping[str, Array] | None = None) -> None:
        self.sources = sources
        self.changed = dict(changed or {})
        self._cached = lru_cache(maxsize=48)(self._cast)
        self._raw = lru_cache(maxsize=3)(lambda name: self.sources[name].load())

    def __call__(self, name: str, dtype: np.dtype[Any]) -> Array:
        """One weight; matrices of the vocabulary's size come as they are stored, to be cast where used."""
        if name in self.changed:
            return self.changed[name] if name.startswith(("wte", "lm_head")) else self.changed[name].astype(dtype)
        if name in ("wte.weight", "lm_head.weight"):
            return self._raw(name)
        return self._cached(name, dtype)

    def _cast(self, name: str, dtype: np.dtype[Any]) -> Array:
        return self.sources[name].load().astype(dtype)

    def with_(self, changed: Mapping[str, Array]) -> Parameters:
        """The same with further weights replaced; what was read already is shared."""
        twin = object.__new__(Parameters)
        twin.sources, twin._cached, twin._raw = self.sources, self._cached, self._raw
        twin.changed = {**self.changed, **changed}
        return twin


@dataclass(frozen=True)
class Program:
    """A GPT-2 as operations: its config, its weights, and replaced operations by tap name."""

    config: GPT2Config
    weights: Parameters
    replaced: Mapping[str, Run]

    @classmethod
    def of(cls, config: GPT2Config, sources: WeightSources) -> Program:
        return cls(config, Parameters(sources), {})

    def with_(
        self, weights: Mapping[str, Array] | None = None, runs: Mapping[str, Run] | None = None, **config: Any
    ) -> Program:
        """The same with some weights, operations or config fields replaced."""
        return Program(
            replace(self.config, **config),
            self.weights.with_(weights) if weights else self.weights,
            {**self.replaced, **(runs or {})},
        )

    def run(self, tap: str, call: Call, inputs: list[Array], dtype: np.dtype[Any]) -> Array:
        """One operation on the given inputs, all cast to dtype."""
        given = [x.astype(dtype, copy=False) for x in inputs]
        run = self.replaced.get(tap) or RUNS[split_tap(tap)[1]]
        with np.errstate(all="ignore"):  # NaN and infinities are data here: they are looked for, not warned of
            return run(self, call, tap, given, dtype)

    def from_given(self, tap: str, call: Call, given: Mapping[str, Array], dtype: np.dtype[Any]) -> Array:
        """The operation of `tap` fed with `given`; inputs that are not given are computed from what is."""
        inputs = [
            given[name] if name in given else self.from_given(name, call, given, dtype)
            for name in tap_inputs(tap, self.config)
        ]
        return self.run(tap, call, inputs, dtype)

    def walk(
        self,
        call: Call,
        dtype: Any = np.float64,
        start: Mapping[str, Array] | None = None,
        until: str = "logits",
    ) -> Iterator[tuple[str, Array]]:
        """All taps in order, or the ones after those that `start` gives; only what is still needed is kept."""
        dtype = np.dtype(dtype)
        known = dict(start or {})
        names = tap_names(self.config)
        last_use = {name: after for after in names for name in tap_inputs(after, self.config)}
        first = max((names.index(name) for name in known), default=-1) + 1
        for name in names[first : names.index(until) + 1]:
            known[name] = self.run(name, call, [known[i] for i in tap_inputs(name, self.config)], dtype)
            yield name, known[name]
            for used in tap_inputs(name, self.config):
                if last_use[used] == name:
                    known.pop(used, None)

    def linear(self, name: str, x: Array, dtype: np.dtype[Any], columns: slice = slice(None)) -> Array:
        """x @ weight + bias of the linear map `name`, or some of its output columns."""
        weight, bias = self.weights(f"{name}.weight", dtype), self.weights(f"{name}.bias", dtype)
        return reference.linear(x, weight[:, columns], bias[columns])

    def norm(self, name: str, dtype: np.dtype[Any]) -> tuple[Array, Array, float]:
        """Weight, bias and epsilon of the layer norm `name`."""
        weight, bias = self.weights(f"{name}.weight", dtype), self.weights(f"{name}.bias", dtype)
        return weight, bias, self.config.epsilon(name)

    @property
    def head(self) -> str:
        """Name of the matrix that makes the logits."""
        return "wte.weight" if self.config.tied else "lm_head.weight"


def _embed(p: Program, call: Call, tap: str, inputs: list[Array], dtype: np.dtype[Any]) -> Array:
    return embed_at(p, call, call.position_ids, dtype)


def embed_at(p: Program, call: Call, position_ids: Array, dtype: np.dtype[Any]) -> Array:
    """Embedding with other rows of wpe."""
    wte = p.weights("wte.weight", dtype)
    x = wte[call.input_ids].astype(dtype) + p.weights("wpe.weight", dtype)[position_ids]
    return np.asarray(x if call.token_type_ids is None else x + wte[call.token_type_ids].astype(dtype))


def _layer_norm(p: Program, call: Call, tap: str, inputs: list[Array], dtype: np.dtype[Any]) -> Array:
    return reference.layer_norm(inputs[0], *p.norm(tap, dtype))


def _qkv(p: Program, call: Call, tap: str, inputs: list[Array], dtype: np.dtype[Any]) -> Array:
    c = p.config
    width = c.n_head * c.head_size
    which = "qkv".index(tap[-1])
    x = p.linear(f"{tap[:-2]}.c_attn", inputs[0], dtype, slice(which * width, (which + 1) * width))
    return x.reshape(*x.shape[:2], c.n_head, c.head_size).transpose(0, 2, 1, 3)  # (B, T, HD) -> (B, H, T, D)


def _with_past(call: Call, layer: int, which: int, new: Array) -> Array:
    """Cached keys (which = 0) or values (1) and the new ones: (B, H, S, D)."""
    if call.past is None:
        return new
    return np.concatenate([call.past[layer][which].astype(new.dtype), new], axis=2)


def _scores(p: Program, call: Call, tap: str, inputs: list[Array], dtype: np.dtype[Any]) -> Array:
    layer = split_tap(tap)[0]
    assert layer is not None
    keys = _with_past(call, layer, 0, inputs[1])
    return np.asarray(inputs[0] @ keys.swapaxes(-1, -2) * p.config.layer_scale(layer))


def masked_softmax(scores: Array, config: GPT2Config, attention_mask: Array | None) -> Array:
    """Probabilities of scores (B, H, T, S) under the mask that a config describes."""
    B, _, T, S = scores.shape
    mask = mask_for(config.mask, attention_mask, B, T, S, scores.dtype) or reference.causal_mask
    return reference.softmax(mask(scores))


def _probs(p: Program, call: Call, tap: str, inputs: list[Array], dtype: np.dtype[Any]) -> Array:
    return masked_softmax(inputs[0], p.config, call.attention_mask)


def _heads(p: Program, call: Call, tap: str, inputs: list[Array], dtype: np.dtype[Any]) -> Array:
    layer = split_tap(tap)[0]
    assert layer is not None
    probs, v = inputs
    B, _, T, _ = probs.shape
    mixed = probs @ _with_past(call, layer, 1, v)  # (B, H, T, S) @ (B, H, S, D) -> (B, H, T, D)
    return mixed.transpose(0, 2, 1, 3).reshape(B, T, -1)


def _attn_out(p: Program, call: Call, tap: str, inputs: list[Array], dtype: np.dtype[Any]) -> Array:
    return p.linear(tap.replace(".out", ".c_proj"), inputs[0], dtype)


def _add(p: Program, call: Call, tap: str, inputs: list[Array], dtype: np.dtype[Any]) -> Array:
    return np.asarray(inputs[0] + inputs[1])


def _c_fc(p: Program, call: Call, tap: str, inputs: list[Array], dtype: np.dtype[Any]) -> Array:
    return p.linear(tap, inputs[0], dtype)


def _gelu(p: Program, call: Call, tap: str, inputs: list[Array], dtype: np.dtype[Any]) -> Array:
    layer = split_tap(tap)[0]
    assert layer is not None
    return ACTIVATIONS[p.config.layer_activation(layer)](inputs[0])


def _logits(p: Program, call: Call, tap: str, inputs: list[Array], dtype: np.dtype[Any]) -> Array:
    head = p.weights(p.head, dtype)
    x = inputs[0]
    out = np.empty((*x.shape[:-1], len(head)), dtype)
    for row in range(0, len(head), HEAD_BLOCK):
        out[..., row : row + HEAD_BLOCK] = x @ head[row : row + HEAD_BLOCK].astype(dtype).T
    if "lm_head.bias" in p.weights.sources or "lm_head.bias" in p.weights.changed:
        out += p.weights("lm_head.bias", dtype).astype(dtype)
    return out


RUNS: dict[str, Run] = {
    "embed": _embed,
    "ln_1": _layer_norm,
    "attn.q": _qkv,
    "attn.k": _qkv,
    "attn.v": _qkv,
    "attn.scores": _scores,
    "attn.probs": _probs,
    "attn.heads": _heads,
    "attn.out": _attn_out,
    "resid_mid": _add,
    "ln_2": _layer_norm,
    "mlp.c_fc": _c_fc,
    "mlp.gelu": _gelu,
    "mlp.out": _attn_out,
    "resid_post": _add,
    "ln_f": _layer_norm,
    "logits": _logits,
}
