"""`gpt2np fingerprint`: are the results the same bits in every way of computing them?"""

from __future__ import annotations

from typing import Annotated

import typer

from ._model import WeightsOption


def fingerprint(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="model.onnx, its folder, or a fetched model's name. Default: embedded."),
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32 or float64; may be given twice. Default: both.")
    ] = None,
    weights: WeightsOption = None,
) -> None:
    """Print SHA-256 of what a model computes: one line for each dtype if every way of computing gives the same bits.

    The ways: one call, chunks, single tokens, a batch, a padded batch, a reused prefix, drafts, weights in 16 bits
    where these hold them and in 32, 1 and more threads. In float32 the hash should not depend on the machine, as
    long as it has fused multiply-add (docs/scale.md says where that was seen); without, and in float64, other
    machines may have other last bits. Exit code 1 if ways differ.
    """
    from ..fingerprint import fingerprints
    from ..model import load
    from ._model import named_model
    from ._terminal import console, fail

    path = named_model(model)
    wanted = dtype or ["float32", "float64"]
    for name in wanted:
        if name not in ("float32", "float64"):
            fail(f"--dtype must be float32 or float64, got {name}")
    alike = True
    for name in wanted:
        ways: dict[str, list[str]] = {}
        for found in fingerprints(load(path, dtype=name, weights=weights)):
            ways.setdefault(found.sha256, []).append(found.way)
        for sha256, same in ways.items():
            console().print(f"{name}  {sha256}  {', '.join(same)}", soft_wrap=True)
        alike = alike and len(ways) == 1
    if not alike:
        raise typer.Exit(1)
