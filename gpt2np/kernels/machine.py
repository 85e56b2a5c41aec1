"""The processor that the kernels are made for, and what the environment asks of numba; numba itself is not loaded."""

from __future__ import annotations

import functools
import os
import platform

import llvmlite.binding as llvm

from ..errors import InputError


def _whole(name: str, default: int) -> int:
    """A whole number of the environment, as numba reads it."""
    text = os.environ.get(name, "")
    try:
        return int(text) if text else default
    except ValueError:
        raise InputError(f"{name} must be a whole number, got {text!r}") from None


DISABLE_JIT = bool(_whole("NUMBA_DISABLE_JIT", 0))  # the kernels are plain Python then
PROCESSORS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
MOST_THREADS = max(1, _whole("NUMBA_NUM_THREADS", PROCESSORS))
_CPU, _FEATURES = (os.environ.get(name) or None for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"))


def has(feature: str) -> bool:
    """Whether the machine that code is compiled for, in LLVM's words, has a feature."""
    if _FEATURES is not None:  # the user compiles for another machine
        return f"+{feature}" in _FEATURES.split(",")
    return _CPU is None and bool(llvm.get_host_cpu_features().get(feature, False))


# Without an instruction for float16 LLVM would call a function that may not be there.
FLOAT16 = DISABLE_JIT or platform.machine().lower() in ("arm64", "aarch64") or has("f16c")


@functools.cache
def description() -> str:
    """All of this machine, or of the one that is compiled for, and of what is asked of numba that code depends on."""
    elsewhere = "NUMBA_CACHE_DIR", "NUMBA_NUM_THREADS"
    asked = sorted(item for item in os.environ.items() if item[0].startswith("NUMBA_") and item[0] not in elsewhere)
    features = _FEATURES or ("" if _CPU else llvm.get_host_cpu_features().flatten())
    return repr((llvm.get_process_triple(), _CPU or llvm.get_host_cpu_name(), features, asked))
