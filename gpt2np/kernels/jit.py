"""How the functions of the kernels are compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

# No kernel makes an array or keeps one, so none counts who holds them (`_nrt`): each slice would be counted twice, by
# an instruction for which threads wait for each other.
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "_nrt": False}


def jit(inline: Any = "never") -> Callable[[Any], Any]:
    """numba.njit with the settings that all kernels share."""
    decorate: Callable[[Any], Any] = numba.njit(inline=inline, **OPTIONS)
    return decorate
