"""Recorded sample data for a written model: the textbook's outputs for a few random calls, in float64."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .. import reference
from ..config import GPT2Config
from ..masks import Mask
from ..onnx.read.datasets import save_set
from ..weights import Array, WeightSource, assemble_block


class Sample(NamedTuple):
    """One call of the model, in the textbook's terms."""

    input_ids: Array  # (B, P + T)
    real: Array  # (B, P + T), 1 for tokens, 0 for padding
    past: int  # P, positions that the file takes as past keys and values


def samples(vocab_size: int, n_ctx: int, modern: bool, with_past: bool) -> list[Sample]:
    """Random calls that fit the model: several lengths, batches, and padding where the file knows it."""
    rng = np.random.default_rng(7)
    shapes = [(1, 8, 0), (3, 5, 0), (1, min(64, n_ctx), 0), (1, 1, 0)]  # (B, P + T, P)
    if with_past:
        shapes = [(1, 8, 0), (2, 4, 3), (2, 7, 4)]
    made = []
    for B, S, P in shapes:
        S, P = min(S, n_ctx), min(P, n_ctx - 1)
        made.append(Sample(rng.integers(0, vocab_size, (B, S)), np.ones((B, S), np.int64), P))
    if modern:
        last = made[-1] if with_past else made[1]
        if with_past and last.past > 2:
            last.real[0, :2] = 0  # on the left, inside the past
        elif not with_past and last.real.shape[1] > 2:
            last.real[0, -2:] = 0  # on the right
    return made


def record(
    folder: Path,
    config: GPT2Config,
    weights: Mapping[str, WeightSource],
    lm_head: bool,
    modern: bool,
    with_past: bool,
) -> None:
    """Write test_data_set_0 ... with the textbook's outputs, computed in float64 and stored in float32."""
    calls = samples(config.vocab_size, config.n_ctx, modern, with_past)
    results = run_textbook(config, weights, calls, lm_head)
    for i, (call, (output, caches)) in enumerate(zip(calls, results, strict=True)):
        P = call.past
        inputs: dict[str, Array] = {}
        outputs: dict[str, Array] = {}
        if not modern:
            inputs["input1"] = call.input_ids[None]  # (1, B, T)
            outputs["output1"] = output[None]
            outputs |= {f"output{layer + 2}": cache for layer, cache in enumerate(caches)}
        else:
            inputs["input_ids"] = call.input_ids[:, P:]
            inputs["attention_mask"] = call.real
            inputs["position_ids"] = positions(call)[:, P:]
            outputs["logits" if lm_head else "last_hidden_state"] = output[:, P:]
            if with_past:
                for layer, cache in enumerate(caches):
                    for part, name in enumerate(("key", "value")):
                        inputs[f"past_key_values.{layer}.{name}"] = cache[part, :, :, :P].astype(np.float32)
                        outputs[f"present.{layer}.{name}"] = cache[part]
        save_set(folder / f"test_data_set_{i}", inputs, outputs)


def positions(call: Sample) -> Array:
    """Row of wpe for each token: padding on the left does not count."""
    places: Array = np.maximum(call.real.cumsum(axis=1) - 1, 0)
    return places


def run_textbook(
    config: GPT2Config, weights: Mapping[str, WeightSource], calls: list[Sample], lm_head: bool
) -> list[tuple[Array, list[Array]]]:
    """`reference.transformer` in float64 for several calls at once, with only one layer's weights in memory.

    Returns the hidden states (B, T, C) or logits (B, T, V) and the caches (2, B, H, T, D) of each call.
    """

    def read(name: str) -> Array:
        return weights[name].load().astype(np.float64)

    streams, masks = [], []
    wte, wpe = weights["wte.weight"].load(), weights["wpe.weight"].load()
    for call in calls:
        T = call.input_ids.shape[1]
        rows = positions(call) + config.position_offset
        streams.append(wte[call.input_ids].astype(np.float64) + wpe[rows].astype(np.float64))  # reference.embed
        allowed = np.tri(T, T, config.mask.shift, bool) & call.real[:, None, None].astype(bool)  # (B, 1, T, T)
        # finite, as in the files: a query that sees padding alone averages it, and no NaN comes up
        masks.append(Mask(np.where(allowed, 0.0, float(np.finfo(np.float32).min))))
    del wte, wpe
    caches: list[list[Array]] = [[] for _ in calls]
    for i in range(config.n_layer):
        layer = assemble_block(config, read, i)
        for k, (x, mask) in enumerate(zip(streams, masks, strict=True)):
            B, T, _ = x.shape
            cache = np.zeros((2, B, config.n_head, T, config.head_size))
            streams[k] = reference.block(x, layer, cache, 0, mask, reference.no_tap, f"h.{i}")
            caches[k].append(cache.astype(np.float32))
    ln_f = read("ln_f.weight"), read("ln_f.bias"), config.epsilon("ln_f")
    streams = [reference.layer_norm(x, *ln_f) for x in streams]
    if lm_head:
        table = read("wte.weight" if config.tied else "lm_head.weight")
        bias = read("lm_head.bias") if "lm_head.bias" in weights else np.zeros(0)
        streams = [reference.logits(x, table, bias) for x in streams]
    return [(x.astype(np.float32), cache) for x, cache in zip(streams, caches, strict=True)]
