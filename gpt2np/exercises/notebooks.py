"""The exercises as notebooks: for each an empty function and the cell that checks it."""

from __future__ import annotations

import json
import textwrap
from itertools import groupby
from pathlib import Path
from typing import Any

from ..errors import InputError
from .tasks import EXERCISES, Exercise


def write(folder: Path) -> list[Path]:
    """Write chapter_NN.ipynb for every chapter that has exercises; returns the files.

    Raises
    ------
    InputError
        If one of them is there already: it may hold somebody's work.
    """
    books = {
        folder / f"chapter_{chapter:02}.ipynb": notebook(chapter, list(found))
        for chapter, found in groupby(EXERCISES.values(), key=lambda exercise: exercise.chapter)
    }
    for path in books:
        if path.exists():
            raise InputError(f"{path} is there already; move it away or give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for path, book in books.items():
        path.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return list(books)


def notebook(chapter: int, found: list[Exercise]) -> dict[str, Any]:
    """One chapter's exercises as a notebook of format 4."""
    cells = [
        markdown(f"# Exercises of chapter {chapter}\n\nFill in the functions and run the cells below them."),
        code("import math\n\nimport numpy as np\n\nfrom gpt2np import exercises, reference"),
    ]
    for exercise in found:
        task = textwrap.indent("\n".join(textwrap.wrap(exercise.task, 90)), "    ").strip()
        quotes = "'''" if '"' in task else '"""'
        cells += [
            markdown(f"## {exercise.name}"),
            code(f"def {exercise.signature}:\n    {quotes}{task}{quotes}\n    raise NotImplementedError"),
            code(f'exercises.check("{exercise.name}", {exercise.name})'),
        ]
    for i, cell in enumerate(cells):
        cell["id"] = f"chapter-{chapter}-{i}"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def markdown(text: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "metadata": {}, "source": text.splitlines(keepends=True)}


def code(text: str) -> dict[str, Any]:
    empty: dict[str, Any] = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    return {**empty, "source": text.splitlines(keepends=True)}
