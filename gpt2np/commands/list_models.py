"""gpt2np list: what is in weights/, and what can be fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def list_models(
    folder: Annotated[
        Path | None, typer.Option("--in", help="Folder to look in. Default: the clone's weights/.")
    ] = None,
) -> None:
    """List the models that are here, verified or not, and those that can be fetched."""
    from .. import zoo
    from ..paths import weights_folder
    from ..zoo import manifest
    from ._terminal import console, note, print_table

    folders = {zoo.default_folder(), weights_folder()} if folder is None else {folder}
    here = [item for place in sorted(folders) for item in zoo.inventory(place)]
    if here:
        rows = ((str(item.path), f"{item.path.stat().st_size:,}", item.state) for item in here)
        print_table(("file", ">bytes", "state"), rows)
    else:
        note(f"nothing in {', '.join(map(str, folders))}")
    names = {item.path.parent.name for item in here}
    missing = [entry for entry in manifest.entries().values() if entry.name not in names]
    if missing:
        console().print()
        rows_missing = ((entry.name, manifest.download_size(entry), entry.title) for entry in missing)
        print_table(("name", ">bytes", "what"), rows_missing, title="can be fetched: gpt2np fetch NAME")
