"""GPT-2s with random weights of a trained model's spread, for tests of scale: made tensor by tensor, on demand."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import numpy as np

from ..arrays import empty_aligned
from ..config import GPT2Config
from ..weights import Array, weight_shapes

DRAWN_AT_ONCE = 1 << 16  # weights drawn at once
# L, H, C of OpenAI's four models; all have N = 1024, V = 50257, D = 64.
SIZES = {"gpt2": (12, 12, 768), "medium": (24, 16, 1024), "large": (36, 20, 1280), "xl": (48, 25, 1600)}


def make_config(n_layer: int, n_head: int, n_embd: int, n_ctx: int = 1024, vocab_size: int = 50257) -> GPT2Config:
    """A GPT-2 of these sizes, everything else as OpenAI has it."""
    size = n_embd // n_head
    return GPT2Config(
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_embd,
        n_ctx=n_ctx,
        vocab_size=vocab_size,
        n_inner=4 * n_embd,
        head_size=size,
        attn_scale=1 / math.sqrt(size),
    )


@dataclass(frozen=True)
class RandomWeight:
    """A WeightSource whose content depends on the seed and its name alone, bit for bit on every machine.

    Each weight is the sum of four 16-bit integers (nearly a normal distribution, cut at 3.5 sigma) from the raw
    stream of PCG64, which NumPy, unlike its distributions, promises never to change.
    """

    name: str
    shape: tuple[int, ...]
    seed: int

    @property
    def spread(self) -> tuple[float, float]:
        """Mean and standard deviation, near what the trained GPT-2 has in this place."""
        if self.name == "wte.weight":
            return 0.0, 0.14
        if self.name == "wpe.weight":
            return 0.0, 0.12
        if self.name.endswith("bias"):
            return 0.0, 0.1
        if ".ln_" in f".{self.name}":
            return 1.0, 0.2
        return 0.0, 1 / math.sqrt(self.shape[1] if self.name == "lm_head.weight" else self.shape[0])

    def load(self) -> Array:
        """The weight, float32, a new array each time."""
        mean, deviation = (np.float32(value) for value in self.spread)
        unit = np.float32(math.sqrt(3) / 65536)  # a 16-bit integer has variance 65536² / 12; four, 65536² / 3
        bits = np.random.PCG64(np.random.SeedSequence([self.seed, zlib.crc32(self.name.encode())]))
        array = empty_aligned(self.shape, np.dtype(np.float32))
        flat = array.reshape(-1)
        for start in range(0, flat.size, DRAWN_AT_ONCE):
            block = flat[start : start + DRAWN_AT_ONCE]
            parts = bits.random_raw(block.size).view(np.uint16)
            block[:] = -2 * 65535  # takes the mean off; every sum is a whole number below 2**18, and so exact
            for i in range(4):
                block += parts[i::4]
            block *= unit * deviation
            block += mean
        return array


def random_weights(config: GPT2Config, seed: int) -> dict[str, RandomWeight]:
    """Sources of random weights for every name of `weights.weight_shapes(config)`."""
    return {name: RandomWeight(name, shape, seed) for name, shape in weight_shapes(config).items()}
