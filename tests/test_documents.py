"""What the documents show works: examples in docstrings, and the Python blocks of README.md and docs/."""

from __future__ import annotations

import doctest
import importlib.util
import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import typer
from conftest import ROOT

from gpt2np import cli

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


@pytest.mark.jit
@pytest.mark.parametrize(("path", "number", "block"), BLOCKS)
def test_python_in_the_documents(path: Path, number: int, block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block by itself, in the clone's folder, as a reader would paste it."""
    monkeypatch.chdir(ROOT)
    exec(compile(block, f"{path.name}, block {number}", "exec"), {"__name__": "example"})


@pytest.mark.parametrize("path", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_links_between_files_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!https?:|mailto:)([^)#]*)#?([^)]*)\)", text):
        file = path.parent / target if target else path
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings], (target, anchor)


def test_files_and_functions_that_contributing_and_architecture_name_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in re.findall(r"`((?:gpt2np|tests|docs)/[\w/.]+)`", text):
        assert (ROOT / name).exists(), name
    code = "".join(p.read_text(encoding="utf-8") for room in ("tests", "gpt2np") for p in (ROOT / room).rglob("*.py"))
    rooms = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    ways_in = [
        name for cell in re.findall(r"\| ([^|]+) \|$", rooms, re.M) for name in re.findall(r"`(?:\w+\.)?(\w+)`", cell)
    ]
    assert len(ways_in) > 10
    for name in (*ways_in, *re.findall(r"`([A-Za-z]+_\w+|[A-Z]\w+)`", text)):
        assert re.search(rf"^(?:def|class) {name}\b|^{name}\b.*=", code, re.M), name


def the_refresher() -> ModuleType:
    spec = importlib.util.spec_from_file_location("refresh", ROOT / "docs" / "refresh.py")
    assert spec is not None
    assert spec.loader is not None
    refresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(refresh)
    return refresh


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the page is of a POSIX shell")
def test_the_sessions_of_the_porters_page_go_as_shown() -> None:
    """Word for word, but for numbers: these depend on ONNX Runtime's version and on the machine."""
    refresh = the_refresher()
    page = refresh.PORTING.read_text(encoding="utf-8")
    shown, run = (re.sub(r"[\d.,e+-]*\d", "0", text).split() for text in (page, refresh.sessions(page)))
    assert shown == run


def test_the_workflow_for_porters_runs_commands_that_there_are() -> None:
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load((ROOT / "docs" / "parity-workflow.yml").read_text(encoding="utf-8"))["jobs"]["parity"]
    app = typer.main.get_command(cli.app)
    commands = [step["run"].split() for step in job["steps"] if step.get("run", "").startswith("gpt2np ")]
    assert [words[1] for words in commands] == ["warmup", "diff"]
    for _, name, *arguments in commands:
        app.commands[name].make_context(name, arguments)  # type: ignore[attr-defined]


def test_the_reference_page_is_that_of_the_code() -> None:
    refresh = the_refresher()
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert page == refresh.reference_page(), "python docs/refresh.py"
