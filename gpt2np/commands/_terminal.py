"""What the commands share for writing to a terminal: coloured and aligned there, plain and unwrapped in a pipe.

Results go to standard output, everything else (progress, notes, errors) to standard error. Text may come from
files, so control characters in it are escaped here, and rich's [markup] is off: no name of a file or of a tensor
is obeyed as a control sequence or taken for a style; use `style=`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NoReturn

from ..escape import escaped
from ..schema import stamped

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from ..parity.explain.problem import Clock

MINUTE = 60.0  # seconds
UNWRAPPED = 100_000  # columns; a pipe has no width, and a table that is cut off there is of no use


def console(stderr: bool = False) -> Console:
    """A rich Console for standard output, or standard error; plain, without colours or wrapping, in a pipe."""
    from rich.console import Console
    from rich.text import Text

    class Escaping(Console):
        def render_str(self, text: str, **how: Any) -> Text:
            return super().render_str(escaped(text, keep="\n\t"), **how)

    made = Escaping(stderr=stderr, markup=False, highlight=False, emoji=False)
    if not made.is_terminal:
        made.width = UNWRAPPED
        made.soft_wrap = True
    return made


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> None:
    """Print a table; a column called ">name" is aligned to the right.

    Cells are printed by str and escaped, or as they are where they are rich renderables (`Text("FAIL", "red")`).
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    out = console()
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD if out.is_terminal else None, pad_edge=False)
    for column in columns:
        table.add_column(
            Text(column.removeprefix(">")), justify="right" if column.startswith(">") else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*(cell if hasattr(cell, "__rich_console__") else Text(escaped(str(cell))) for cell in row))
    out.print(table)


def print_json(kind: str, record: dict[str, Any]) -> None:
    """Print a record as one line of strict JSON (NaN and infinities are refused: give None or a string).

    `kind` is its definition in the schema, see `gpt2np.schema`.
    """
    print(escaped(json.dumps(stamped(kind, record), ensure_ascii=False, allow_nan=False)), flush=True)


@contextmanager
def progress(description: str, total: float | None, unit: str = "", done: int = 0) -> Iterator[Callable[[float], None]]:
    """How far work has come, its rate and the time left, on standard error; yields `advance(amount)`.

    A terminal shows a bar; into a file goes a line each minute. `total`, the amounts, and `done`, which was there
    before, are counted in `unit` ("tokens", "bytes", ...); total is None where it is unknown.
    """
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text("" if task.speed is None else f"{task.speed:,.0f} {unit}/s")

    out, rate, left, told = console(stderr=True), Rate(), TimeRemainingColumn(), time.monotonic()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    bar = Progress(*columns, rate, left, console=out, disable=not out.is_terminal, speed_estimate_period=10 * MINUTE)
    number = bar.add_task(escaped(description), total=total, completed=done)
    [task] = bar.tasks

    def advance(amount: float) -> None:
        nonlocal told
        bar.advance(number, amount)
        if bar.disable and time.monotonic() > told + MINUTE:
            told = time.monotonic()
            speed = "" if task.speed is None else f"{rate.render(task)}, "
            note(f"{description}: {task.percentage:.0f}%, {speed}{left.render(task)} left")

    with nullcontext() if bar.disable else bar:  # rich before 15 ends a disabled one with an empty line
        yield advance


@contextmanager
def search_clock(seconds: float) -> Iterator[Clock]:
    """The time that a search for a cause may take; on a terminal, what it tries is shown on standard error."""
    from rich.text import Text

    from ..parity.explain.problem import Clock

    out = console(stderr=True)
    status = out.status("")

    def show(share: float, doing: str) -> None:
        if out.is_terminal:
            status.start()
            status.update(Text(f"looking for the cause, {share:.0%} of {seconds:g} s: {escaped(doing)}"))

    try:
        yield Clock(seconds, show)
    finally:
        status.stop()


def note(message: str) -> None:
    """Tell the user something that is not a result, on standard error."""
    if hasattr(sys.stderr, "rich_proxied_file"):  # a progress bar is shown: this goes above it
        print(escaped(message, keep="\n"), file=sys.stderr)
    else:
        console(stderr=True).print(message, style="dim")


def check_writable(*paths: Path | None, quiet: bool = False) -> None:
    """Raise InputError for a file that cannot be written because of its folder: before the work, not after it.

    A file that is there already will be replaced; that is said, unless `quiet`.
    """
    from ..errors import InputError

    for path in paths:
        if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK)):
            why = "it is a folder" if path.is_dir() else f"{path.parent} is no folder that can be written to"
            raise InputError(f"cannot write {path}: {why}")
        if path is not None and path.is_file() and not quiet:
            note(f"{path} is there already and will be replaced")


def check_folder(path: Path, own: str) -> None:
    """Raise InputError for a folder that cannot be written, or holds what is not ours: has no file `own`."""
    from ..errors import InputError

    parent = next(place for place in path.absolute().parents if place.exists())
    if path.exists() and not path.is_dir():
        raise InputError(f"cannot write the folder {path}: it is a file")
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"cannot write the folder {path}: {parent} is no folder that can be written to")
    if path.is_dir() and any(path.iterdir()):
        if not (path / own).is_file():
            raise InputError(f"cannot write the folder {path}: it is there already, with other files")
        note(f"{path} is there already and will be replaced")


def fail(message: str, code: int = 2) -> NoReturn:
    """Print "error: message" on standard error and leave the command with `code` (2: usage, unreadable input)."""
    import typer

    console(stderr=True).print(f"error: {message}", style="red")
    raise typer.Exit(code)
