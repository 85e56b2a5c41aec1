"""The house rules that no linter knows: sizes of files and functions, docstrings that match signatures."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from types import FunctionType

import pytest
from conftest import ROOT

import gpt2np

LINES_OF_A_FILE, LINES_OF_A_FUNCTION = 500, 60

# What is longer, and why. The list only shrinks: an entry that is not needed any more fails the test.
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS = {
    "gpt2np/commands/generate.py generate": "nearly all of it are the declarations of 25 options",
}

SOURCES = sorted((ROOT / "gpt2np").rglob("*.py"))


def lines_without_docstring(function: ast.FunctionDef) -> int:
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function, clean=False) is not None:
        first = function.body[0]
        assert first.end_lineno is not None
        lines -= first.end_lineno - first.lineno + 1
    return lines


def test_no_file_and_no_function_is_too_long() -> None:
    files, functions = set(), set()
    for path in SOURCES:
        name, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
        if text.count("\n") > LINES_OF_A_FILE:
            files.add(name)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and lines_without_docstring(node) > LINES_OF_A_FUNCTION:
                functions.add(f"{name} {node.name}")
    assert files == set(LONG_FILES)
    assert functions == set(LONG_FUNCTIONS)


def documented() -> Iterator[tuple[str, str, FunctionType]]:
    """Name, own docstring and function of everything in the package; of a class, its `__init__`."""
    for path in SOURCES:
        if path.stem == "__main__":
            continue
        module = import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
        own = [v for v in vars(module).values() if getattr(v, "__module__", None) == module.__name__]
        classes = [v for v in own if inspect.isclass(v)]
        functions = [m for v in (module, *classes) for m in vars(v).values() if isinstance(m, FunctionType)]
        for function in functions:
            if function.__module__ == module.__name__:
                yield f"{module.__name__}.{function.__qualname__}", function.__doc__ or "", function
        for kind in classes:
            if isinstance(initialiser := vars(kind).get("__init__"), FunctionType):
                yield f"{module.__name__}.{kind.__qualname__}", vars(kind).get("__doc__") or "", initialiser


def test_parameters_in_docstrings_are_those_of_the_signature() -> None:
    checked, wrong = 0, {}
    for name, text, function in documented():
        section = re.search(r"^Parameters\n-+\n(.*?)(?=^\S[^\n]*\n-{3,}\n|\Z)", inspect.cleandoc(text), re.S | re.M)
        if section is not None:
            lines = re.findall(r"^(\w+(?:, \w+)*)(?: : .*)?$", section[1], re.M)
            named = {word for line in lines for word in line.split(", ")}
            checked += len(named)
            if unknown := named - set(inspect.signature(function).parameters):
                wrong[name] = sorted(unknown)
    assert not wrong
    assert checked > 50


@pytest.mark.parametrize("name", gpt2np.__all__)
def test_every_public_name_has_a_docstring(name: str) -> None:
    assert inspect.getdoc(getattr(gpt2np, name))


def test_the_picture_of_the_rooms_has_every_room() -> None:
    """docs/architecture.md names each folder and file of the package's first level, or its contract does."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    contract = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for path in sorted((ROOT / "gpt2np").iterdir()):
        name = path.stem
        if (name.startswith("_") and name != "__main__") or (path.is_dir() and not (path / "__init__.py").exists()):
            continue
        if path.suffix == ".py" or path.is_dir():
            assert f"{name}.py" in text or f"{name}/" in text or re.search(rf"gpt2np\.{name}\b", contract), name
