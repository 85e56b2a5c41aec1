"""What the documents show works: examples in docstrings, and the Python blocks of README.md and docs/."""

from __future__ import annotations

import doctest
import importlib.util
import re
from importlib import import_module
from pathlib import Path

import pytest
from conftest import ROOT

WITH_EXAMPLES = sorted(p for p in (ROOT / "gpt2np").rglob("*.py") if ">>> " in p.read_text(encoding="utf-8"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    pytest.param(path, number, block, id=f"{path.name} {number}")
    for path in PAGES
    for number, block in enumerate(
        re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S), 1
    )
]


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_examples_in_docstrings(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    module = import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    failed, tried = doctest.testmod(module)
    assert tried
    assert not failed


@pytest.mark.parametrize(("path", "number", "block"), BLOCKS)
def test_python_in_the_documents(path: Path, number: int, block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block by itself, in the clone's folder, as a reader would paste it."""
    monkeypatch.chdir(ROOT)
    exec(compile(block, f"{path.name}, block {number}", "exec"), {"__name__": "example"})


@pytest.mark.parametrize("path", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_links_between_files_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|mailto:|#)([^)#]+)", text):
        assert (path.parent / target).exists(), target


def test_files_and_functions_that_contributing_names_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in re.findall(r"`((?:gpt2np|tests|docs)/[\w/.]+)`", text):
        assert (ROOT / name).exists(), name
    tests = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, name


def test_the_reference_page_is_that_of_the_code() -> None:
    spec = importlib.util.spec_from_file_location("refresh", ROOT / "docs" / "refresh.py")
    assert spec is not None
    assert spec.loader is not None
    refresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(refresh)
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert page.startswith(refresh.reference_page({})), "python docs/refresh.py"
