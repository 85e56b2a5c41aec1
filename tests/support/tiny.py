"""Tiny GPT-2s with random weights of a trained model's spread, made in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gpt2np.config import GPT2Config
from gpt2np.model import GPT2
from gpt2np.weights import weight_shapes


@dataclass(frozen=True)
class ArraySource:
    """A WeightSource over an array that is there already."""

    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def load(self) -> np.ndarray:
        return self.array.copy()


def tiny_config(**changes: Any) -> GPT2Config:
    """L=2, H=3, D=4, C=12: an odd head count, and no dimension equal to another."""
    fields: dict[str, Any] = {
        "n_layer": 2,
        "n_head": 3,
        "n_embd": 12,
        "n_ctx": 20,
        "vocab_size": 37,
        "n_inner": 48,
        "head_size": 4,
        "attn_scale": 0.5,
    }
    return GPT2Config(**{**fields, **changes})


def tiny_sources(config: GPT2Config, seed: int = 0) -> dict[str, ArraySource]:
    """Unit-ish gains, biases that are not zero, matrices of spread 1 / sqrt(inputs)."""
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        values = rng.standard_normal(shape)
        if name.endswith("bias"):
            return 0.1 * values
        if "ln_" in name:
            return 1 + 0.2 * values
        return 0.3 * values if name in ("wte.weight", "wpe.weight") else values / shape[0] ** 0.5

    return {n: ArraySource(draw(n, s).astype(np.float32)) for n, s in weight_shapes(config).items()}


def tiny_model(engine: str = "numba", dtype: str = "float32", seed: int = 0, **changes: Any) -> GPT2:
    config = tiny_config(**changes)
    return GPT2(config, tiny_sources(config, seed), engine, dtype)


def random_ids(config: GPT2Config, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape)


def shapes_run(model: GPT2, monkeypatch: Any) -> list[tuple[int, int]]:
    """Rows and positions of each pass of a model's engine from now on."""
    shapes: list[tuple[int, int]] = []
    for name in ("transformer", "causal_logits"):
        if run := getattr(model._kernels, name, None):

            def counted(ids: np.ndarray, *rest: Any, run: Any = run) -> Any:
                shapes.append(ids.shape)
                return run(ids, *rest)

            monkeypatch.setattr(model._kernels, name, counted)
    return shapes
