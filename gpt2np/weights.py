"""GPT-2's weights under OpenAI's names.

Each NamedTuple holds what one operation needs, in the order in which the function of that name in
`reference.py` and of the kernels takes it, so that parameters unpack as arguments:
`layer_norm(x, *w.h[0].ln_1)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from .arrays import Array as Array
from .config import GPT2Config
from .errors import WeightError


class LayerNorm(NamedTuple):
    weight: Array  # (C,)
    bias: Array  # (C,)
    epsilon: float


class Linear(NamedTuple):
    weight: Array  # (inputs, outputs), as OpenAI stores it: y = x @ weight + bias
    bias: Array  # (outputs,)


class Attention(NamedTuple):
    c_attn: Linear  # (C, 3HD)
    c_proj: Linear  # (HD, C)
    n_head: int  # H
    scale: float  # scores = q·k * scale


class MLP(NamedTuple):
    c_fc: Linear  # (C, F)
    c_proj: Linear  # (F, C)
    activation: str  # a name in activations.ACTIVATIONS


class BlockWeights(NamedTuple):
    ln_1: LayerNorm
    attn: Attention
    ln_2: LayerNorm
    mlp: MLP


class Blocks(tuple[BlockWeights, ...]):
    """The blocks, in order; an engine may keep what it makes of them in `table`, which no copy takes over."""

    table: Any = None

    def __reduce__(self) -> Any:
        return Blocks, (tuple(self),)


class GPT2Weights(NamedTuple):
    wte: Array  # (V, C) token embedding
    wpe: Array  # (N, C) position embedding
    h: tuple[BlockWeights, ...]  # L Blocks
    ln_f: LayerNorm
    lm_head: Array  # (V, C); the same object as wte when the head is tied
    lm_head_bias: Array  # (V,), or (0,) where the head has no bias (GPT-2 has none)

    @property
    def block_matrices(self) -> list[Array]:
        """The four matrices of each block, in the order in which they are used."""
        return [linear.weight for b in self.h for linear in (b.attn.c_attn, b.attn.c_proj, b.mlp.c_fc, b.mlp.c_proj)]


class WeightSource(Protocol):
    """One weight that has been found but not yet read."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def load(self) -> Array:
        """A new, aligned, C-contiguous float array of that shape, owned by the caller."""
        ...


WeightSources = Mapping[str, WeightSource]  # under the names of `weight_shapes`
Read = Callable[[str], Array]


def weight_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of a GPT-2, in the checkpoint's order.

    `lm_head.weight` (V, C) is among them only when the head is separate. A file without biases has sources
    of zeros for them. `lm_head.bias` (V,) is optional in every file and therefore not listed.
    """
    V, N, C, F = config.vocab_size, config.n_ctx, config.n_embd, config.n_inner
    HD = config.n_head * config.head_size
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (V, C), "wpe.weight": (N, C)}
    for i in range(config.n_layer):
        linears = {"attn.c_attn": (C, 3 * HD), "attn.c_proj": (HD, C), "mlp.c_fc": (C, F), "mlp.c_proj": (F, C)}
        for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
            shape = linears.get(part, (C,))
            shapes[f"h.{i}.{part}.weight"] = shape
            shapes[f"h.{i}.{part}.bias"] = shape[-1:]
    shapes["ln_f.weight"] = shapes["ln_f.bias"] = (C,)
    if not config.tied:
        shapes["lm_head.weight"] = (V, C)
    return shapes


TABLES = ("wte.weight", "lm_head.weight")  # stored as rows for tokens


def is_matrix(name: str) -> bool:
    """Whether a weight of that name is a matrix that is multiplied by; of wpe, only rows are added."""
    return name in TABLES or (name.endswith(".weight") and name.split(".")[-2] in ("c_attn", "c_proj", "c_fc"))


def check_sources(config: GPT2Config, sources: Mapping[str, WeightSource | Array]) -> None:
    """Raise WeightError unless every weight of the config is there in its shape, and no other."""
    shapes = weight_shapes(config)
    if "lm_head.bias" in sources:
        shapes["lm_head.bias"] = (config.vocab_size,)
    for name, shape in shapes.items():
        if name not in sources:
            raise WeightError(f"weight {name} {shape} is missing")
        if tuple(sources[name].shape) != shape:
            describe = getattr(sources[name], "describe", None)  # where it comes from in a file
            origin = f" from {describe()}" if describe else ""
            raise WeightError(f"weight {name}{origin} has shape {tuple(sources[name].shape)}, expected {shape}")
    for name in sources:
        if name not in shapes:
            raise WeightError(f"weight {name} {tuple(sources[name].shape)} is left over: no place for it in this GPT-2")


def _layer_norm(config: GPT2Config, read: Read, name: str) -> LayerNorm:
    return LayerNorm(read(f"{name}.weight"), read(f"{name}.bias"), config.epsilon(name))


def _linear(read: Read, name: str) -> Linear:
    return Linear(read(f"{name}.weight"), read(f"{name}.bias"))


def assemble_block(config: GPT2Config, read: Read, i: int) -> BlockWeights:
    """The weights of layer i, from a function that reads one weight by its name."""
    return BlockWeights(
        ln_1=_layer_norm(config, read, f"h.{i}.ln_1"),
        attn=Attention(
            c_attn=_linear(read, f"h.{i}.attn.c_attn"),
            c_proj=_linear(read, f"h.{i}.attn.c_proj"),
            n_head=config.n_head,
            scale=config.layer_scale(i),
        ),
        ln_2=_layer_norm(config, read, f"h.{i}.ln_2"),
        mlp=MLP(
            c_fc=_linear(read, f"h.{i}.mlp.c_fc"),
            c_proj=_linear(read, f"h.{i}.mlp.c_proj"),
            activation=config.layer_activation(i),
        ),
    )


def assemble(config: GPT2Config, read: Read, head_bias: bool = False) -> GPT2Weights:
    """The whole tree of weights, from a function that reads one weight by its name.

    Weights are read one at a time, in file order, so that a `read` which converts or packs needs room for
    one original at most. `head_bias` says whether `lm_head.bias` can be read.
    """
    wte, wpe = read("wte.weight"), read("wpe.weight")
    return GPT2Weights(
        wte=wte,
        wpe=wpe,
        h=Blocks(assemble_block(config, read, i) for i in range(config.n_layer)),
        ln_f=_layer_norm(config, read, "ln_f"),
        lm_head=wte if config.tied else read("lm_head.weight"),
        lm_head_bias=read("lm_head.bias") if head_bias else np.zeros(0, wpe.dtype),
    )
