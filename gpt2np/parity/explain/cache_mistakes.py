"""What is done wrong with a KV cache: the past read in another order, or the new positions put in the wrong place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from ...call import Call
from ...weights import Array
from ..operations import Run, split_tap, tap_names
from ..program import Program
from .gradients import F64
from .problem import Guess, Problem

Join = Callable[[Array, Array], Array]  # cached (B, H, P, D), new (B, H, T, D) -> (B, H, S, D)


def arrangements(past: list[Array]) -> Iterator[tuple[str, str, list[Array]]]:
    """(cause, clause, the past as it was taken): each layer's (2, B, H, P, D) in another arrangement."""
    _, B, H, P, D = past[0].shape
    yield "cache_exchanged", "cached keys and values were exchanged", [x[::-1] for x in past]
    yield "cache_zeroed", "the past were all zeros", [np.zeros_like(x) for x in past]
    if len(past) > 1:
        for text, moved in (
            ("each layer used the past of the layer before", [past[-1], *past[:-1]]),
            ("each layer used the past of the layer after", [*past[1:], past[0]]),
            ("every layer used the past of layer 0", [past[0]] * len(past)),
            ("every layer used the past of the last layer", [past[-1]] * len(past)),
            ("the layers' pasts were in reverse order", past[::-1]),
        ):
            yield "cache_layer", text, moved
    if P > 1:
        yield "cache_reversed", "the cached positions were in reverse order", [x[..., ::-1, :] for x in past]
        yield "cache_reversed", "the cached positions were one place further on", [np.roll(x, 1, -2) for x in past]
        yield (
            "cache_layout",
            "the past's (B, H, P, D) were read as (B, P, H, D)",
            [x.reshape(2, B, P, H, D).swapaxes(2, 3) for x in past],
        )
        yield (
            "cache_layout",
            "the past were taken with its heads and positions exchanged",
            [x.swapaxes(2, 3).reshape(x.shape) for x in past],
        )
        yield "cache_layout", "the past's (P, D) were read as (D, P)", [x.swapaxes(3, 4).reshape(x.shape) for x in past]
    if H > 1:
        yield "cache_heads", "the heads of the past were in reverse order", [x[:, :, ::-1] for x in past]
    if B > 1:
        yield "cache_batch", "the past of the batch's sequences were in reverse order", [x[:, ::-1] for x in past]
        yield (
            "cache_batch",
            "every sequence used the past of the first one",
            [np.broadcast_to(x[:, :1], x.shape) for x in past],
        )


def joins() -> Iterator[tuple[str, str, Join]]:
    """(cause, clause, how cached and new are put together)."""
    yield (
        "cache_order",
        "new keys and values came before the cached ones",
        lambda old, new: np.concatenate([new, old], 2),
    )
    yield (
        "cache_overwritten", "the new positions began on the last cached one, which they overwrote",
        lambda old, new: np.concatenate([old[:, :, :-1], new, new[:, :, -1:]], 2),
    )  # fmt: skip
    yield (
        "cache_not_advanced", "the new positions' own keys and values were left out",
        lambda old, new: np.concatenate([old, 0 * new], 2),
    )  # fmt: skip


def cache(problem: Problem, tap: str) -> Iterator[Guess]:
    """Guesses at the first operation that reads the past."""
    call = problem.call
    if call.past is None or not call.start or tap != _first(problem):
        return
    past = [np.stack([np.asarray(keys), np.asarray(values)]) for keys, values in call.past]
    for cause, text, moved in arrangements(past):
        yield Guess(cause, tap, text, call=call._replace(past=moved))
    for cause, text, join in joins():
        runs = {t: _joined(join) for t in problem.taps if split_tap(t)[1] in ("attn.scores", "attn.heads")}
        yield Guess(cause, tap, text, runs=runs)


def written_elsewhere(program: Program, call: Call, held: Mapping[str, Array]) -> Guess | None:
    """New keys and values put in the wrong place, in the attention and in the presents that were given out alike.

    The taps of new keys and values are cut from presents behind the cached positions, where these mistakes leave
    something else.
    """
    assert call.past is not None
    names = tap_names(program.config)
    last = max(held, key=names.index)
    for cause, text, join in joins():
        runs = {t: _joined(join) for t in names if split_tap(t)[1] in ("attn.scores", "attn.heads")}
        for tap, value in program.with_(runs=runs).walk(call, F64, until=last):
            layer, part = split_tap(tap)
            if tap not in held:
                continue
            if part in ("attn.k", "attn.v"):
                past = np.asarray(call.past[layer or 0][int(part == "attn.v")], np.float64)
                value = join(past, value)[..., call.start :, :]
            if np.abs(held[tap] - value).max() > 1e-3 * np.abs(value).max():
                break
        else:
            first = next(iter(runs))
            return Guess(cause, first, text, runs=runs, removed=1.0, explains=True, likely=True)
    return None


def _first(problem: Problem) -> str:
    return next((t for t in problem.suspects if split_tap(t)[1] in ("attn.scores", "attn.heads")), "")


def _joined(join: Join) -> Run:
    """Scores or heads of one layer, over keys or values that were put together in another way."""

    def run(p: Program, call: Call, tap: str, x: list[Array], dtype: Any) -> Array:
        layer, part = split_tap(tap)
        assert layer is not None
        assert call.past is not None
        which = int(part == "attn.heads")
        all_of_them = join(np.asarray(call.past[layer][which]).astype(dtype), x[1])
        if part == "attn.scores":
            return np.asarray(x[0] @ all_of_them.swapaxes(-1, -2) * p.config.layer_scale(layer))
        return np.asarray(x[0] @ all_of_them).transpose(0, 2, 1, 3).reshape(*call.input_ids.shape, -1)

    return run
