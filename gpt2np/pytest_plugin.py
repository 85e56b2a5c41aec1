"""pytest plugin: golden traces that are regenerated on demand, and failures that GitHub shows where they are.

    pytest --gpt2np-regenerate        # write the golden traces anew, and say what has changed

Nothing but pytest is imported until a test uses the fixture or fails.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .parity.trace import Trace

__tracebackhide__ = True
WRITTEN = pytest.StashKey[list[tuple[str, str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpt2np")
    group.addoption("--gpt2np-regenerate", action="store_true", help="write golden traces anew, and say what changed")


@pytest.fixture
def golden_trace(request: pytest.FixtureRequest) -> Callable[..., Trace]:
    """`golden_trace(name, make, taps, stats_only, dtype, inputs)`: the trace golden/NAME.npz beside the test file.

    With --gpt2np-regenerate, `make()` is called (it returns arrays by name, a tuple, a tensor, an Output, or a Trace)
    and its result stored; without, the stored one is read, and a missing one fails the test with the command that
    makes it. The other arguments keep the file small: see `gpt2np.testing.as_trace`.
    """

    def golden(
        name: str,
        make: Callable[[], Any],
        taps: Sequence[str] = ("*",),
        stats_only: bool = False,
        dtype: str | None = None,
        inputs: Mapping[str, Any] | None = None,
    ) -> Trace:
        from .parity import trace
        from .paths import shown
        from .testing import as_trace, changes

        path = Path(request.path).parent / "golden" / f"{name}.npz"
        if request.config.getoption("--gpt2np-regenerate"):
            made = as_trace(make(), taps, stats_only, dtype, inputs)
            text = changes(trace.load(path) if path.is_file() else None, made)
            if text:
                path.parent.mkdir(parents=True, exist_ok=True)
                trace.save(path, made)
            request.node.stash.setdefault(WRITTEN, []).append((str(shown(path)), text))
        elif not path.is_file():
            pytest.fail(
                f"no golden trace {shown(path)}: run pytest --gpt2np-regenerate, and commit the file", pytrace=False
            )
        return trace.load(path)

    return golden


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    testing = sys.modules.get("gpt2np.testing")
    if call.when == "call":
        report.gpt2np_written = item.stash.get(WRITTEN, [])  # what a report carries comes from xdist's workers, too
    if call.excinfo is not None and testing is not None and isinstance(call.excinfo.value, testing.ParityError):
        error = call.excinfo.value
        shown = call.excinfo.traceback.filter(call.excinfo)
        last = shown[-1] if shown else call.excinfo.traceback[0]
        report.gpt2np_failed = {"message": str(error), "file": str(last.path), "line": last.lineno + 1}
        item.user_properties.append(("gpt2np.first", error.first))  # JUnit has them from the report of the teardown
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What was written anew; in GitHub Actions also an annotation at each failed assertion, and the job's summary."""
    from . import github
    from .escape import escaped

    reports = [report for held in terminalreporter.stats.values() for report in held]
    written = [pair for report in reports for pair in getattr(report, "gpt2np_written", [])]
    if written:
        terminalreporter.section("golden traces")
        for path in sorted({path for path, _ in written}):
            changed = [text for other, text in written if other == path and text]  # tests may share a trace
            terminalreporter.write_line(f"{path}: {changed[0] if changed else 'unchanged'}")
    for report in reports:
        failed = getattr(report, "gpt2np_failed", None)
        if failed is None:
            continue
        if github.in_actions():
            place = failed["file"], failed["line"]
            terminalreporter.write_line(github.error(failed["message"], report.nodeid, *place))
        if github.has_summary():
            from .parity.markdown import fenced

            github.add_summary(f"### ❌ `{escaped(report.nodeid)}`\n\n{fenced(failed['message'])}\n\n")
