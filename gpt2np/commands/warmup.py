"""`gpt2np warmup`: compile the kernels ahead of the first use."""

from __future__ import annotations

from typing import Annotated

import typer


def warmup(
    dtype: Annotated[str, typer.Option(help="float32, as all commands use it, or float64.")] = "float32",
) -> None:
    """Compile the kernels and keep them on disk, so that the first run of any command starts at once."""
    import time

    from ..kernels import needs_compilation, warmup
    from ._terminal import console, fail, note

    if dtype not in ("float32", "float64"):
        fail(f"--dtype must be float32 or float64, got {dtype}")
    if needs_compilation():
        note("compiling the kernels, once for this machine: up to three minutes")
    begin = time.perf_counter()
    warmup(dtype)
    console().print(f"kernels for {dtype} are ready ({time.perf_counter() - begin:.1f} s)")
