"""The KV cache: keys and values of the positions that a model has seen, owned and passed in by the caller.

A query looks at the keys and values of all earlier positions, and these do not depend on what comes later (the causal
mask sees to that). So they are computed once and kept: a further token costs one position, not the whole text again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from .arguments import whole_number
from .config import GPT2Config
from .errors import ContextOverflowError, InputError
from .weights import Array


class Layers(tuple[Array, ...]):
    """The views of each layer of a cache; an engine may keep what it makes of them in `programs`, but no copy does."""

    def __init__(self, views: Iterable[Array]) -> None:
        self.programs: dict[Any, Any] = {}


FORM = "{}, {} layers, {} heads of {}"


class KVCache:
    """Preallocated keys and values for `batch_size` sequences of up to `max_length` positions.

    Parameters
    ----------
    config : GPT2Config
        Gives L, H, D and n_ctx.
    batch_size : int
        B, the number of sequences that are run together.
    max_length : int, optional
        Positions to make room for; at most (and by default) n_ctx.
    dtype : numpy dtype
        float32 for the engines, float64 for the oracle.

    Raises
    ------
    InputError, ContextOverflowError
        If batch_size or max_length is no positive whole number, max_length exceeds n_ctx, or there is no memory.
    """

    def __init__(
        self,
        config: GPT2Config,
        batch_size: int = 1,
        max_length: int | None = None,
        dtype: np.dtype | type = np.float32,
    ) -> None:
        batch_size = whole_number("batch_size", batch_size, 1)
        max_length = whole_number("max_length", config.n_ctx if max_length is None else max_length, 1)
        if max_length > config.n_ctx:
            raise ContextOverflowError(f"max_length {max_length} exceeds the model's n_ctx of {config.n_ctx}")
        shape = (config.n_layer, 2, batch_size, config.n_head, max_length, config.head_size)
        # zeros, not empty: untouched pages cost nothing, and no garbage can ever reach a kernel
        try:
            self._hold(np.zeros(shape, dtype))
        except (MemoryError, ValueError):  # the latter: more than NumPy can count
            raise InputError(f"there is no memory for a cache of {batch_size} x {max_length} positions") from None
        self._length = 0

    def _hold(self, memory: Array, holders: set[int] | None = None) -> None:
        """Use this memory; holders: the ids of the caches that share it, by default this one alone."""
        self._memory = memory
        self._holders = {id(self)} if holders is None else holders
        self.array = memory.view()  # (L, 2, B, H, max_length, D)
        self.array.flags.writeable = holders is None  # what others share is written by nobody
        self.layers = Layers(self.array)  # L views (2, B, H, max_length, D)

    @property
    def length(self) -> int:
        """Number of positions held; the next token takes this position."""
        return self._length

    @property
    def batch_size(self) -> int:
        """B."""
        return int(self.array.shape[2])

    @property
    def max_length(self) -> int:
        """Number of positions there is room for."""
        return int(self.array.shape[4])

    @property
    def form(self) -> tuple[Any, ...]:
        """What a model's caches have in common: dtype, L, H, D; for FORM."""
        L, _, _, H, _, D = self.array.shape
        return self.array.dtype, L, H, D

    def views(self) -> list[Array]:
        """L views (2, B, H, length, D) of what is held: [0] the keys, [1] the values."""
        return list(self.array[:, :, :, :, : self._length])

    def check_room(self, new: int) -> None:
        """Raise ContextOverflowError unless `new` further positions fit."""
        if self._length + whole_number("the number of new positions", new, 0) > self.max_length:
            raise ContextOverflowError(
                f"{new} new positions after {self._length} cached ones exceed the cache's max_length "
                f"of {self.max_length}"
            )

    def advance(self, new: int, start: int | None = None) -> None:
        """Count `new` positions, just written by the model from `start` on, as held; by default after the last one.

        Raises
        ------
        InputError, ContextOverflowError
            If another call has changed the length since this one began, or there is no room.
        """
        if start not in (None, self._length):
            raise InputError(
                f"the cache held {start} positions when a call began and {self._length} when it ended: "
                "two calls used it at once, so that it no longer holds what either has written"
            )
        self.check_room(new)
        self._length += int(new)

    def crop(self, length: int) -> None:
        """Forget all but the first `length` positions (a negative length counts from the end, as in a slice)."""
        number = whole_number("the length to crop to", length, -self._length)
        kept = number if number >= 0 else self._length + number
        if not 0 <= kept <= self._length:
            raise InputError(f"cannot crop a cache of {self._length} positions to {length}")
        self._length = kept

    def copy(self) -> KVCache:
        """An independent cache with the same content and room.

        Both share their memory until a model runs on one of them, which then takes a copy of the positions it holds.
        """
        twin = object.__new__(KVCache)
        twin._length = self._length
        self._holders.add(id(twin))  # one step, as is discarding: threads may copy one cache at once
        for cache in (self, twin):
            cache._hold(self._memory, self._holders)
        return twin

    __copy__ = copy

    def __getstate__(self) -> tuple[Array, int]:
        """For pickle and deepcopy: the memory alone, of which the views are made anew."""
        return self._memory, self._length

    def __setstate__(self, state: tuple[Array, int]) -> None:
        memory, self._length = state
        self._hold(memory)

    def fill(self, other: KVCache) -> None:
        """Hold what a cache of one row holds, in every row.

        Raises
        ------
        InputError, ContextOverflowError
            If the other is no cache, has more than one row, or is another model's, or holds more positions than there
            is room for here.
        """
        if as_cache(other).batch_size != 1:
            raise InputError(f"a cache is filled from one of one row, got {other.batch_size} rows")
        if other.form != self.form:
            raise InputError(f"a cache for {FORM.format(*self.form)} is filled from one for {FORM.format(*other.form)}")
        n = other.length
        if n > self.max_length:
            raise ContextOverflowError(f"{n} positions exceed the cache's max_length of {self.max_length}")
        self.make_writable()
        self._length = n
        self.array[:, :, :, :, :n] = other.array[:, :, :, :, :n]

    def make_writable(self) -> None:
        """Take memory of its own if others share it: for whoever writes into `layers`, as a model does."""
        if self.array.flags.writeable:
            return
        memory = self._memory
        if len(self._holders) > 1:  # else the others have taken theirs
            memory = np.zeros_like(memory)
            memory[:, :, :, :, : self._length] = self.array[:, :, :, :, : self._length]
            self._holders.discard(id(self))  # only now: the last one writes into the memory that was read here
        self._hold(memory)


def as_cache(value: Any) -> KVCache:
    """`value`, which must be a KVCache, else InputError."""
    if not isinstance(value, KVCache):
        raise InputError(f"a cache is what new_cache gives, got {type(value).__name__}")
    return value
