"""What ports do wrong with a KV cache or a padded batch, for files that take a past (`ports.Port` does the rest)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ports import Array, Port

P, T = 4, 5  # cached and new positions
Feeds = dict[str, Array]


class CacheBug(NamedTuple):
    place: str  # the tap or output to be named
    causes: tuple[str, ...]
    change: Callable[[Port, dict[str, Any]], None] | None = None  # before the run: the call's own arguments
    after: Callable[[list[Array], list[Array]], list[Array]] | None = None  # presents, past -> presents given out
    padded: bool = False  # whether the first sequence begins with two positions of padding


def on_past(change: Callable[[list[Array]], list[Array]]) -> Callable[[Port, dict[str, Any]], None]:
    def apply(port: Port, call: dict[str, Any]) -> None:
        call["past"] = change(call["past"])

    return apply


def step(name: str, wrong: Callable[..., Array]) -> Callable[[Port, dict[str, Any]], None]:
    def apply(port: Port, call: dict[str, Any]) -> None:
        port.wrong[name] = wrong

    return apply


def new_positions(port: Port, call: dict[str, Any]) -> None:
    call["positions"] = np.broadcast_to(np.arange(call["ids"].shape[1]), call["ids"].shape)


def without_mask(port: Port, call: dict[str, Any]) -> None:
    call["mask"] = None


def counted_from_padding(port: Port, call: dict[str, Any]) -> None:
    call["positions"] = None  # from the first cached position on, in every row


def mis_read(x: Array) -> Array:
    """(2, B, H, P, D) whose memory is taken for (2, B, P, H, D)."""
    two, B, H, S, D = x.shape
    return x.reshape(two, B, S, H, D).transpose(0, 1, 3, 2, 4)


def unmoved(self: Port, i: int, T: int, S: int, mask: Array | None) -> Array:
    return np.tri(T, S, 0, dtype=bool)


def overwrite(self: Port, i: int, past: Array, new: Array) -> Array:
    return np.concatenate([past[:, :, :-1], new, new[:, :, -1:]], axis=2)


CACHE_BUGS: dict[str, CacheBug] = {
    "past read as (B, P, H, D)": CacheBug(
        "h.0.attn.scores", ("cache_layout",), on_past(lambda p: [mis_read(x) for x in p])
    ),
    "past keys and values exchanged": CacheBug(
        "h.0.attn.scores", ("cache_exchanged",), on_past(lambda p: [x[::-1] for x in p])
    ),
    "past ignored as zeros": CacheBug(
        "h.0.attn.scores", ("cache_zeroed",), on_past(lambda p: [np.zeros_like(x) for x in p])
    ),
    "past of the layer before": CacheBug("h.0.attn.scores", ("cache_layer",), on_past(lambda p: [p[-1], *p[:-1]])),
    "past of layer 0 everywhere": CacheBug("h.1.attn.scores", ("cache_layer",), on_past(lambda p: [p[0]] * len(p))),
    "past rows reversed": CacheBug(  # attention does not mind the order: only the presents show it
        "present.0", ("output_order",), on_past(lambda p: [x[:, :, :, ::-1] for x in p])
    ),
    "past of the other sequence": CacheBug(
        "h.0.attn.scores", ("cache_batch",), on_past(lambda p: [x[:, ::-1] for x in p])
    ),
    "new before old": CacheBug(
        "h.0.attn.scores", ("cache_order",), step("joined", lambda s, i, old, new: np.concatenate([new, old], 2))
    ),
    "last row overwritten": CacheBug("h.0.attn.scores", ("cache_overwritten",), step("joined", overwrite)),
    "positions from 0": CacheBug("embed", ("position_offset", "positions"), new_positions),
    "mask not moved on": CacheBug("h.0.attn.probs", ("mask_shift", "mask_shape"), step("seen", unmoved)),
    "mask unused": CacheBug("h.0.attn.probs", ("mask_unused",), without_mask, padded=True),
    "positions count the padding": CacheBug(
        "embed", ("positions", "position_offset"), counted_from_padding, padded=True
    ),
    "presents exchanged": CacheBug("present.0", ("output_order",), after=lambda new, old: [x[::-1] for x in new]),
    "presents of the next layer": CacheBug("present.0", ("output_order",), after=lambda new, old: [*new[1:], new[0]]),
    "presents not advanced": CacheBug(
        "present.0",
        ("output_order", "cache_order"),
        after=lambda new, old: [
            np.concatenate([o, np.zeros_like(n[:, :, :, P:])], 3) for n, o in zip(new, old, strict=True)
        ],
    ),
    "presents without the past": CacheBug(
        "present.0",
        ("output_order", "cache_order"),
        after=lambda new, old: [
            np.concatenate([np.zeros_like(o), n[:, :, :, P:]], 3) for n, o in zip(new, old, strict=True)
        ],
    ),
    "presents new before old": CacheBug(
        "present.0", ("output_order",), after=lambda new, old: [np.roll(x, T, 3) for x in new]
    ),
    "presents as (B, S, H, D)": CacheBug(
        "present.0", ("output_order",), after=lambda new, old: [x.swapaxes(2, 3).reshape(x.shape) for x in new]
    ),
}


def call_on(port: Port, seed: int, vocabulary: int, padded: bool = False) -> tuple[dict[str, Any], Feeds]:
    """A call with a past that a right pass left behind, and the same as the file's own inputs."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocabulary, (2, P + T))
    mask = np.ones(ids.shape, np.int64)
    mask[0, : 2 * padded] = 0
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    past = port.run(ids[:, :P], positions[:, :P], mask=mask[:, :P])
    call = {"ids": ids[:, P:], "positions": positions[:, P:], "past": past, "mask": mask}
    feeds: Feeds = {"input_ids": ids[:, P:], "attention_mask": mask, "position_ids": positions[:, P:]}
    for i, (k, v) in enumerate(past):
        feeds[f"past_key_values.{i}.key"], feeds[f"past_key_values.{i}.value"] = k, v
    return call, feeds
