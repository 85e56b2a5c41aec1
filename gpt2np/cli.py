"""The `gpt2np` command: one Typer app, one module in `commands/` for each of its commands."""

from __future__ import annotations

import errno
import gc
import os
import sys
import traceback
import warnings
from collections import Counter
from importlib import import_module
from io import TextIOWrapper
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from .errors import Gpt2npError, InputError
from .escape import escaped

WRITTEN = {"output", "graph", "html", "json", "junit", "markdown", "save_trace"}  # options that name a file to write


class _Flags:
    """Help that shows no type after an option that takes no value."""

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return params


class _Command(_Flags, TyperCommand):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse an empty path, as a variable of the shell that is not set leaves it: it would mean this folder.

        And a file to write that the command line names twice: it would be written over, or what is read lost.
        """
        takers = {name: param for param in self.params for name in param.opts if not getattr(param, "is_flag", False)}
        empty = [takers.get(before) for before, arg in pairwise(["", *args]) if not arg]  # None: an argument's
        empty += [takers[arg[:-1]] for arg in args if arg.endswith("=") and arg[:-1] in takers]
        rest = super().parse_args(ctx, args)
        for param in self.params:
            value = ctx.params.get(param.name)
            given = param in empty or (None in empty and param.param_type_name == "argument")
            if given and Path() in (value if isinstance(value, (list, tuple)) else [value]):
                raise InputError(f"{param.opts[0]} is an empty text; expected a path")
        named = [(param, path) for param in self.params for path in _files(param.name, ctx.params.get(param.name))]
        times = Counter(path for _, path in named)
        for param, path in named:
            if param.name in WRITTEN and times[path] > 1 and (path.is_file() or not path.exists()):
                raise InputError(f"{param.opts[0]} {path}: another argument names this file, too")
        return rest


def _files(option: str | None, value: Any) -> list[Path]:
    """The files that an option or argument names: those to write, and of all others those that exist.

    A folder stands for the model in it.
    """
    names = value if isinstance(value, (list, tuple)) else [value]
    texts = [name for name in names if isinstance(name, (str, Path)) and str(name) != "-"]
    paths = [Path(name).resolve() for name in texts if option in WRITTEN or os.path.exists(name)]
    return [path / "model.onnx" if path.is_dir() else path for path in paths]


class _Group(_Flags, TyperGroup):
    pass


app = typer.Typer(
    name="gpt2np",
    cls=_Group,
    help="GPT-2 from model.onnx in NumPy and numba, checked against ONNX Runtime.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

EXIT_CODES = {
    0: "pass, or done",
    1: "a numerical comparison failed",
    2: "a wrong argument, or input that cannot be read, or output that cannot be written: one line says what",
    3: "nothing, or too little, was compared",
    70: "a bug in gpt2np, with its traceback",
    130: "stopped by Ctrl-C",
    141: "the reader of a pipe left, as in `gpt2np info | head`",
}

# command name -> (module in commands/, help panel), in the order of `gpt2np --help`
COMMANDS = {
    "parity": ("parity", "Check"),
    "diff": ("diff", "Check"),
    "trace": ("trace", "Check"),
    "template": ("template", "Check"),
    "info": ("info", "Check"),
    "fingerprint": ("fingerprint", "Check"),
    "generate": ("generate", "Use"),
    "score": ("score", "Use"),
    "embed": ("embed", "Use"),
    "look": ("look", "Learn"),
    "exercises": ("exercises", "Learn"),
    "warmup": ("warmup", "Use"),
    "convert": ("convert", "Files"),
    "synth": ("synth", "Files"),
    "fetch": ("fetch", "Files"),
    "verify": ("verify", "Files"),
    "list": ("list_models", "Files"),
}
for _name, (_module, _panel) in COMMANDS.items():
    _command = getattr(import_module(f".commands.{_module}", __package__), _module)
    app.command(_name, cls=_Command, rich_help_panel=_panel)(_command)


def _version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        typer.echo(f"gpt2np {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """A warning of gpt2np's or of what it uses as one line, without a line of code."""
    from .commands._terminal import note

    note(f"note: {message}")


def main() -> None:
    """Run the command line; a Gpt2npError or OSError becomes one line on standard error and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a locale without the characters of a text or a table shows "?"
            stream.reconfigure(errors="replace")
    warnings.showwarning = _show_warning
    try:
        code = app(prog_name="gpt2np", standalone_mode=False)
    except Gpt2npError as error:
        _leave(str(error))
    except typer.Abort:  # Ctrl-C, as older versions of Typer tell it
        raise SystemExit(130) from None
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of Typer's
            if type(error).__name__ == "NoArgsIsHelpError":
                error.show()  # type: ignore[attr-defined]
                raise SystemExit(2) from None
            context = getattr(error, "ctx", None)
            command = "gpt2np" if context is None else context.command_path
            _leave(f"{error.format_message().rstrip('.')} ({command} --help)")
        if isinstance(error, OSError) and error.filename is not None:  # a full disk, a read-only folder ...
            _leave(f"{escaped(str(error.filename))}: {error.strerror}")
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            _leave(f"cannot write: {error.strerror}")
        print(
            escaped(traceback.format_exc(), keep="\n"), end="", file=sys.stderr
        )  # a bug: Python would say 1, which here is a failed comparison
        raise SystemExit(70) from None
    except SystemExit as end:
        # The reader of a pipe left early, as in `gpt2np info | head`. Typer says 1, which here is a failed
        # comparison; 141 is what a shell shows for a program that died of a broken pipe.
        if isinstance(end.__context__, BrokenPipeError):
            raise SystemExit(141) from None
        raise
    finally:
        gc.freeze()  # nothing is looked for in what ends with the process, which would take half a second
    raise SystemExit(code if isinstance(code, int) else 0)


def _leave(message: str) -> NoReturn:
    """One line on standard error, exit code 2."""
    print(f"gpt2np: {message}", file=sys.stderr)
    raise SystemExit(2) from None
