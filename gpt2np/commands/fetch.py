"""gpt2np fetch: get the real GPT-2's files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def fetch(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME",
            help="gpt2-10, gpt2-lm-head-10, gpt2-lm-head-bs-12 (the ONNX Model Zoo's), gpt2, gpt2-medium, gpt2-large, "
            "gpt2-xl (Hugging Face's, converted), or tokenizer.",
        ),
    ],
    to: Annotated[Path | None, typer.Option(help="Folder to put NAME/ into. Default: the clone's weights/.")] = None,
    mirror: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Look here, by the published file names, and not at the known mirrors."),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="Take this file (or the files of this folder); use no network."),
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Use no network: only verify what is there.")] = False,
) -> None:
    """Download GPT-2 models and their tokenizer, verified by size and SHA-256.

    An interrupted download goes on where it stopped when the same command is run again. Proxies are taken from
    HTTPS_PROXY, HTTP_PROXY and NO_PROXY.
    """
    from .. import zoo
    from ..zoo import manifest
    from ._terminal import console, fail, note, print_table, progress
    from .convert import convert

    def make_model(folder: Path) -> None:
        convert(str(folder), folder)

    for name in names:
        try:
            folder = zoo.fetch(name, to, mirror, source, offline, make_model, note, progress)
        except KeyboardInterrupt:
            fail("stopped; what has come so far is kept, and the same command goes on from there", 130)
        entry = manifest.entries()[name]
        rows = []
        for file in entry.files + entry.extras:
            path = folder / file.path
            if path.is_file():
                check = "SHA-256 is the published one" if file.sha256 else "not verified: no published SHA-256 is known"
                rows.append((file.path, f"{path.stat().st_size:,}", check))
        print_table(("file", ">bytes", "check"), rows, title=f"{entry.title}, in {folder}")
        console().print(f"licence: {entry.licence}")
