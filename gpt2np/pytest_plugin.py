"""pytest plugin: golden traces that are regenerated on demand.

    pytest --gpt2np-regenerate        # write the golden traces anew, then review the difference in git

Nothing but pytest is imported until a test uses the fixture.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .parity.trace import Trace


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpt2np")
    group.addoption("--gpt2np-regenerate", action="store_true", help="write golden traces anew instead of reading them")


@pytest.fixture
def golden_trace(request: pytest.FixtureRequest) -> Callable[[str, Callable[[], Any]], Trace]:
    """`golden_trace(name, make)`: the trace golden/NAME.npz beside the test file.

    With --gpt2np-regenerate, `make()` is called (it returns arrays by name, or a Trace) and its result stored;
    without, the stored one is read, and a missing one fails the test with the command that makes it.
    """

    def golden(name: str, make: Callable[[], Any]) -> Trace:
        from .parity import trace
        from .testing import as_trace

        path = Path(request.path).parent / "golden" / f"{name}.npz"
        if request.config.getoption("--gpt2np-regenerate"):
            path.parent.mkdir(exist_ok=True)
            trace.save(path, as_trace(make()))
        elif not path.is_file():
            pytest.fail(f"no golden trace {path}: run pytest --gpt2np-regenerate, and commit the file", pytrace=False)
        return trace.load(path)

    return golden
