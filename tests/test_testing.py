"""gpt2np.testing and the pytest plugin: golden traces, small ones, and how a failure is shown."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpt2np
from gpt2np.errors import ComparisonError, InputError
from gpt2np.parity import trace
from gpt2np.parity.trace import Trace
from gpt2np.testing import ParityError, as_trace, assert_parity, changes

pytest_plugins = ["pytester"]

Arrays = Mapping[str, np.ndarray]


@pytest.fixture(scope="module")
def model() -> gpt2np.GPT2:
    return gpt2np.load(engine="numpy")


@pytest.fixture(scope="module")
def taps(model: gpt2np.GPT2) -> dict[str, np.ndarray]:
    return model.trace([[3, 1, 4, 1, 5, 9, 2, 6]])


def saved(tmp_path: Path, value: Any, **how: Any) -> Trace:
    trace.save(tmp_path / "golden.npz", as_trace(value, **how))
    return trace.load(tmp_path / "golden.npz")


def file_outputs(model: gpt2np.GPT2, taps: Arrays) -> dict[str, np.ndarray]:
    """What the embedded model's file puts out: the hidden states, keys and values."""
    pairs = (np.stack([taps[f"h.{i}.attn.k"], taps[f"h.{i}.attn.v"]]) for i in range(model.config.n_layer))
    return {"output1": taps["ln_f"], **{f"output{i + 2}": pair for i, pair in enumerate(pairs)}}


def test_statistics_of_all_taps_and_the_outputs_are_small(model: gpt2np.GPT2, taps: Arrays, tmp_path: Path) -> None:
    golden = saved(tmp_path, {**taps, **file_outputs(model, taps)}, stats_only=True, dtype="float16")
    assert set(golden.taps) == set(taps)
    assert golden.outputs["output2"].dtype == np.float16
    assert (tmp_path / "golden.npz").stat().st_size < 60_000
    assert_parity({**taps, **file_outputs(model, taps)}, golden)
    assert saved(tmp_path, taps, stats_only=True).taps.keys() == taps.keys()
    assert (tmp_path / "golden.npz").stat().st_size < 20_000


@pytest.mark.parametrize(
    "budget",
    [
        ("a", 0), (None, 0), (10**400, 0), (0, float("nan")), {"nowhere": "strict"}, {"": {"": "zoo"}}, [1e-3, 1e-5],
        {"x": ("1", "2")},
    ],
    ids=str,
)  # fmt: skip
def test_a_budget_that_is_none_is_told(budget: Any) -> None:
    with pytest.raises(InputError, match="budget"):
        assert_parity({"x": np.ones(2)}, {"x": np.ones(2)}, budget=budget)


def test_what_holds_no_numbers_is_no_oracle_and_agrees_with_nothing() -> None:
    record = np.zeros(2, [("a", "f4")])
    for odd in (record, np.zeros(2, "V4"), np.array(["a", "b"])):
        with pytest.raises(ParityError, match="cannot compare arrays of dtype"):
            assert_parity(odd, odd)
        with pytest.raises(ComparisonError, match="cannot compare arrays of dtype"):
            assert_parity(np.ones(2), np.zeros(2), oracle=odd)
    with pytest.raises(ParityError, match=r"R = 1\.00e\+0, a tie"):
        assert_parity(np.ones(1), np.zeros(1), oracle=np.array([np.nan]))


def test_what_a_golden_trace_cannot_hold_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"beyond float16: the largest is 1e\+06"):
        as_trace(np.full(2, 1e6), dtype="float16")
    with pytest.raises(ComparisonError, match="the input 'a' is given as an array of Python objects"):
        as_trace(np.ones(2), inputs={"a": object()})
    none = np.zeros((0, 4), np.float32)
    golden = saved(tmp_path, {"ln_f": none, "embed": np.ones(3)}, stats_only=True)
    assert_parity({"ln_f": none, "embed": np.ones(3)}, golden)
    with pytest.raises(ParityError, match="ln_f"):
        assert_parity({"ln_f": np.zeros((1, 4)), "embed": np.ones(3)}, golden)


def test_what_compares_nothing_is_no_pass() -> None:
    nan, x = np.full(4, np.nan), np.arange(1.0, 5.0)
    with pytest.raises(ComparisonError, match="nothing is compared: array: all numbers are NaN or infinite on both"):
        assert_parity(nan, nan)
    with pytest.raises(ComparisonError, match="nothing is compared: array: noise of its own size would pass rtol 0"):
        assert_parity(x, np.zeros(4) + 1, budget=(0, 100))
    with pytest.raises(ComparisonError, match="noise of its own size"):
        assert_parity(1e-7 * x, 1e-6 * x)
    assert_parity(1e-7 * x, 1e-7 * x)  # equal numbers need no budget
    assert_parity({"a": nan, "b": x}, {"a": nan, "b": x})
    assert_parity(np.full(1000, 1.1), np.full(1000, 1.1) + 1e-5)  # of no spread but what rounding makes


def test_two_arrays_of_one_name_and_hidden_numbers_are_told() -> None:
    x = np.ones(3)
    with pytest.raises(ComparisonError, match="'1' is there twice"):
        assert_parity({1: x + 1, "1": x}, {"1": x})
    with pytest.raises(ComparisonError, match=r"'present\.0\.key' is there twice"):
        assert_parity({"past_key_values": [(x + 1, x)], "present.0.key": x}, {"present.0.key": x})
    for masked in (np.ma.masked_array(x, x > 0), {"a": np.ma.masked_array(x, x > 0)}):
        with pytest.raises(ComparisonError, match="masked array"):
            assert_parity(masked, masked)
    assert_parity(np.ma.masked_array(x), x)


def test_every_budget_and_the_oracle_are_looked_at() -> None:
    x = {"a": np.ones(2)}
    with pytest.raises(InputError, match="budget must be one of"):
        assert_parity(x, x, budget={"a": "zoo", "": "nonsense"})
    assert_parity({1: np.ones(2)}, {1: np.ones(2)}, budget={1: "strict"})
    for oracle in ({"misspelt": np.ones(2)}, {"a": np.ones(3)}):
        with pytest.raises(InputError, match=r"none of a \(2,\)"):
            assert_parity(x, x, oracle=oracle)


def test_a_trace_made_by_hand_may_hold_lists() -> None:
    statistics = as_trace({"ln_f": np.ones((2, 3))}, stats_only=True)
    assert_parity(Trace({}, {"a": [1.0, 2.0]}, {}), {"a": np.array([1.0, 2.0])})  # type: ignore[dict-item]
    assert_parity(Trace({}, {}, {"ln_f": [[1.0] * 3] * 2}), statistics)  # type: ignore[dict-item]


def test_statistics_know_the_shapes_of_what_they_are_of(tmp_path: Path) -> None:
    x = np.ones((2, 3, 4))
    golden = saved(tmp_path, {"ln_f": x}, stats_only=True)
    assert_parity({"ln_f": x}, golden)
    for other in ({"ln_f": x.reshape(2, 4, 3)}, as_trace({"ln_f": x.reshape(2, 4, 3)}, stats_only=True)):
        with pytest.raises(ParityError, match=r"shape \(2, 4, 3\), expected \(2, 3, 4\)"):
            assert_parity(other, golden)
        with pytest.raises(ParityError, match=r"shape \(2, 3, 4\), expected \(2, 4, 3\)"):
            assert_parity(golden, other)
    del golden.manifest["shapes_of_taps"]  # as an older version wrote it
    assert_parity({"ln_f": x.reshape(2, 4, 3)}, golden)
    assert changes(golden, as_trace({"ln_f": x}, stats_only=True)) == "shapes of taps"


@pytest.mark.parametrize("how", [{}, {"stats_only": True}, {"dtype": "float16"}, {"taps": ["h.2.*"]}], ids=str)
def test_one_wrong_tap_is_found(taps: Arrays, tmp_path: Path, how: dict[str, Any]) -> None:
    golden = saved(tmp_path, taps, **how)
    assert_parity(taps, golden)
    assert_parity(golden, taps)
    assert_parity(golden, golden)
    with pytest.raises(ParityError, match=r"h\.2\.ln_2") as caught:
        assert_parity({**taps, "h.2.ln_2": taps["h.2.ln_2"] * np.float32(1.01)}, golden)
    assert caught.value.first == "h.2.ln_2"
    with pytest.raises(ParityError, match="missing in actual"):
        assert_parity({name: value for name, value in taps.items() if name != "h.2.ln_2"}, golden)


def test_a_function_is_called_with_the_inputs(tmp_path: Path) -> None:
    """A golden trace of any function, without any model."""
    inputs = {"x": np.arange(6.0).reshape(2, 3)}
    golden = saved(tmp_path, (inputs["x"] * 2, inputs["x"] + 1), inputs=inputs)
    assert_parity(lambda feeds: (feeds["x"] * 2, feeds["x"] + 1), golden)
    assert_parity(lambda feeds: {"output2": feeds["x"] + 1, "output1": feeds["x"] * 2}, tmp_path / "golden.npz")
    with pytest.raises(ParityError, match="output2"):
        assert_parity(lambda feeds: (feeds["x"] * 2, feeds["x"] + 2), golden)
    with pytest.raises(InputError, match="inputs="):
        assert_parity(lambda feeds: feeds, saved(tmp_path, {"y": np.zeros(2)}))


def test_traces_of_the_first_schema_stay_readable(tmp_path: Path) -> None:
    row = trace.statistics(np.arange(20.0))
    manifest = (
        '{"kind": "gpt2np trace", "schema": 1, "stats_only": true, '
        '"arrays": {"tap/ln_f": {"shape": [16], "dtype": "<f8"}}}'
    )
    text = np.frombuffer(manifest.encode(), np.uint8)
    np.savez(tmp_path / "old.npz", **{"manifest": text, "tap/ln_f": row})
    assert_parity({"ln_f": np.arange(20.0)}, trace.load(tmp_path / "old.npz"))


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(InputError, match="float16, float32, float64"):
        as_trace({"ln_f": np.zeros(2)}, dtype="int8")
    with pytest.raises(InputError, match="taps must be a sequence of strings"):
        as_trace({"ln_f": np.zeros(2)}, taps="h.*")
    with pytest.raises(InputError, match="inputs must be arrays by name"):
        as_trace({"ln_f": np.zeros(2)}, inputs=[1])


def test_what_changed_is_said() -> None:
    before = as_trace({"ln_f": np.zeros(4), "embed": np.ones(3), "gone": np.ones(1)})
    assert changes(None, before) == "new"
    assert changes(before, before) == ""
    after = as_trace({"ln_f": np.array([0, 0, 0.5, 0]), "embed": np.ones((3, 1)), "more": np.ones(1)})
    text = changes(before, after)
    assert "without gone" in text
    assert "new more" in text
    assert "embed is now float64 [3, 1]" in text
    assert "1 of 3 arrays changed, the most ln_f, by 5.00e-1" in text


def test_the_example_that_mypy_checks_runs() -> None:
    from typed_client import use

    assert use()


def test_options_of_generate_are_the_same_for_a_type_checker() -> None:
    import inspect

    from gpt2np.generate import GenerateOptions, generate

    known = {p.name: p.annotation for p in inspect.signature(generate).parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert known == {name: held.__forward_arg__ for name, held in GenerateOptions.__annotations__.items()}


# ---------------------------------------------------------------------------------------------- the plugin

Run = Callable[..., pytest.RunResult]

TESTS = textwrap.dedent("""
    import numpy as np
    import pytest
    from gpt2np.testing import assert_parity

    VALUE = 1.0

    @pytest.mark.parametrize("i", range(4))
    def test_port(golden_trace, i):
        golden = golden_trace("port", lambda: {"ln_f": np.full(4, VALUE), "embed": np.ones(2)})
        assert_parity({"ln_f": np.full(4, VALUE), "embed": np.ones(2)}, golden)
""")


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    from importlib.metadata import entry_points

    installed = any(p.value == "gpt2np.pytest_plugin" for p in entry_points(group="pytest11"))
    own = () if installed else ("-p", "gpt2np.pytest_plugin")
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY", "GITHUB_WORKSPACE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(gpt2np.__file__).parents[1])]))
    return lambda *more: pytester.runpytest(*own, "-p", "no:cacheprovider", *more)


def test_golden_traces_are_regenerated_on_demand(pytester: pytest.Pytester, run: Run) -> None:
    file = pytester.makepyfile(test_port=TESTS)
    missing = run()
    assert missing.ret == 1
    missing.stdout.fnmatch_lines("*no golden trace *port.npz: run pytest --gpt2np-regenerate*")
    run("--gpt2np-regenerate").stdout.fnmatch_lines("golden/port.npz: new")
    state = (pytester.path / "golden" / "port.npz").stat()
    run("--gpt2np-regenerate").stdout.fnmatch_lines("golden/port.npz: unchanged")
    assert (pytester.path / "golden" / "port.npz").stat() == state
    assert run().ret == 0
    file.write_text(TESTS.replace("VALUE = 1.0", "VALUE = 1.5"), encoding="utf-8")
    assert run().ret == 1
    regenerated = run("--gpt2np-regenerate")
    regenerated.stdout.fnmatch_lines("golden/port.npz: 1 of 2 arrays changed, the most ln_f, by 5.00e-1")
    assert run().ret == 0


def test_a_failure_shows_the_test_and_nothing_of_gpt2np(
    pytester: pytest.Pytester, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makepyfile(test_port=TESTS + "\n\ndef test_bad():\n    assert_parity(np.ones(2), object())\n")
    assert run("--gpt2np-regenerate", "-k", "not bad").ret == 0
    file = pytester.path / "test_port.py"
    file.write_text(file.read_text(encoding="utf-8").replace("np.full(4, VALUE), \"embed\": np.ones(2)}, golden",
                    "np.full(4, 2.0), \"embed\": np.ones(2)}, golden"), encoding="utf-8")  # fmt: skip
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(pytester.path / "summary.md"))
    result = run("--junit-xml", "report.xml")
    assert result.ret == 1
    out = result.stdout.str()
    assert "testing.py" not in out
    assert "pytest_plugin.py" not in out
    assert "ln_f" in out
    result.stdout.fnmatch_lines("::error file=test_port.py,line=10,title=test_port.py%3A%3Atest_port?0?::parity*ln_f*")
    assert "test_port.py::test_port[0]" in (pytester.path / "summary.md").read_text(encoding="utf-8")
    assert '<property name="gpt2np.first" value="ln_f"' in (pytester.path / "report.xml").read_text(encoding="utf-8")


@pytest.mark.slow
def test_workers_of_xdist_share_golden_traces(pytester: pytest.Pytester, run: Run) -> None:
    pytest.importorskip("xdist")
    pytester.makepyfile(test_port=TESTS)
    made = pytester.runpytest_subprocess("-n", "2", "-p", "no:cacheprovider", "--gpt2np-regenerate")
    assert made.ret == 0
    made.stdout.fnmatch_lines("golden/port.npz: *")
    assert not list((pytester.path / "golden").glob(".*"))
    assert run().ret == 0
