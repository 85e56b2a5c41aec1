"""`gpt2np exercises`: the book's exercises as notebooks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def exercises(folder: Annotated[Path, typer.Argument(help="the folder to write to; is made if need be")]) -> None:
    """Write the book's exercises that ask for a function as notebooks: empty functions, and the cells that check them.

    A check compares your function with the textbook's on several inputs, and says where it differs, by how much, and
    which mistake it looks like.

    Example: `gpt2np exercises my_answers/`
    """
    from ..exercises.notebooks import write
    from ._terminal import console

    for path in write(folder):
        console().print(str(path))
