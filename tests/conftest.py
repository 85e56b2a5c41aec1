"""Options, skips and files that the whole suite shares."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

JIT_OFF = os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")
settings.register_profile("gpt2np", deadline=None, max_examples=10 if JIT_OFF else 100)  # compiling takes seconds, once
settings.load_profile("gpt2np")

# A suite that runs in the background of a script has SIGINT ignored, and so would the commands that the tests
# start and interrupt: an ignored signal is inherited, a handled one is not.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"  # optional: further exporters' files, present on some machines only


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests that need minutes or gigabytes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
        if item.get_closest_marker("jit") and JIT_OFF:
            item.add_marker(pytest.mark.skip(reason="needs compiled kernels"))


@pytest.fixture(scope="session")
def mini() -> Path:
    """The embedded model's folder."""
    return ROOT / "weights" / "mini"


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Small GPT-2 files of many exporters, where they are present."""
    folder = SHARED / "fixtures"
    if not folder.is_dir():
        pytest.skip("no ../shared/fixtures on this machine")
    return folder
