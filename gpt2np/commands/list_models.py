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
    from ._terminal import console, note, print_table

    folder = zoo.default_folder() if folder is None else folder
    here = zoo.inventory(folder)
    if here:
        rows = ((item.name, item.file, f"{item.bytes:,}", item.state) for item in here)
        print_table(("model", "file", ">bytes", "state"), rows, title=f"in {folder}")
    else:
        note(f"nothing in {folder}")
    missing = [entry for entry in zoo.manifest().values() if not (folder / entry.name).is_dir()]
    if missing:
        console().print()
        rows_missing = ((entry.name, zoo.download_size(entry), entry.title) for entry in missing)
        print_table(("name", ">bytes", "what"), rows_missing, title="can be fetched: gpt2np fetch NAME")
