"""The KV cache: keys and values of the positions that a model has seen, owned and passed in by the caller.

A query looks at the keys and values of all earlier positions, and these do not depend on what comes later (the causal
mask sees to that). So they are computed once and kept: a further token costs one position, not the whole text again.
"""

from __future__ import annotations

import numpy as np

from .config import GPT2Config
from .errors import ContextOverflowError, InputError
from .weights import Array


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
        If batch_size or max_length is not positive, or max_length exceeds n_ctx.
    """

    def __init__(
        self,
        config: GPT2Config,
        batch_size: int = 1,
        max_length: int | None = None,
        dtype: np.dtype | type = np.float32,
    ) -> None:
        max_length = config.n_ctx if max_length is None else max_length
        if batch_size < 1 or max_length < 1:
            raise InputError(f"a cache needs batch_size >= 1 and max_length >= 1, got {batch_size}, {max_length}")
        if max_length > config.n_ctx:
            raise ContextOverflowError(f"max_length {max_length} exceeds the model's n_ctx of {config.n_ctx}")
        shape = (config.n_layer, 2, batch_size, config.n_head, max_length, config.head_size)
        # zeros, not empty: untouched pages cost nothing, and no garbage can ever reach a kernel
        self._hold(np.zeros(shape, dtype), length=0)

    def _hold(self, array: Array, length: int) -> None:
        self.array = array  # (L, 2, B, H, max_length, D)
        self.layers = list(array)  # L views (2, B, H, max_length, D)
        self._length = length

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

    def views(self) -> list[Array]:
        """L views (2, B, H, length, D) of what is held: [0] the keys, [1] the values."""
        return list(self.array[:, :, :, :, : self._length])

    def check_room(self, new: int) -> None:
        """Raise ContextOverflowError unless `new` further positions fit."""
        if self._length + new > self.max_length:
            raise ContextOverflowError(
                f"{new} new positions after {self._length} cached ones exceed the cache's max_length "
                f"of {self.max_length}"
            )

    def advance(self, new: int) -> None:
        """Count `new` positions, just written by the model, as held."""
        self.check_room(new)
        self._length += new

    def crop(self, length: int) -> None:
        """Forget all but the first `length` positions (a negative length counts from the end, as in a slice)."""
        kept = length if length >= 0 else self._length + length
        if not 0 <= kept <= self._length:
            raise InputError(f"cannot crop a cache of {self._length} positions to {length}")
        self._length = kept

    def copy(self) -> KVCache:
        """An independent cache with the same content and room."""
        twin = object.__new__(KVCache)
        twin._hold(self.array.copy(), self._length)
        return twin
