"""parity, trace and diff on the embedded model: verdicts, exit codes, parties, traces, repro, the plugin."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from typer.testing import CliRunner

import gpt2np
from gpt2np.cli import app
from gpt2np.errors import ComparisonError, InputError, TraceError
from gpt2np.model import Output
from gpt2np.onnx.read.datasets import expand, find_sets, load_set, save_set
from gpt2np.parity import trace
from gpt2np.parity.capture import Options, record
from gpt2np.parity.cases import gather_cases
from gpt2np.parity.diff import diff
from gpt2np.parity.operations import tap_inputs, tap_names
from gpt2np.parity.parties import Ort, Ours
from gpt2np.parity.program import Program
from gpt2np.parity.run import parity
from gpt2np.parity.subject import Subject
from gpt2np.parity.text import lines_of
from gpt2np.testing import assert_parity


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 in the zoo's contract, with data recorded by the float64 textbook."""
    folder = tmp_path_factory.mktemp("small")
    result = CliRunner().invoke(app, ["synth", "--size", "2,3,12,20,37", "-o", str(folder), "--seed", "1"])
    assert result.exit_code == 0, result.output
    found = Subject(folder / "model.onnx")
    for i, case in enumerate(gather_cases(found, [], [], 3, 0)):
        outputs = Ours(found, "numpy", "float64").run(case.feeds).outputs
        save_set(folder / f"test_data_set_{i}", case.feeds, outputs)
    return folder


@pytest.fixture
def model(small: Path, tmp_path: Path) -> Path:
    """An own copy of it, to change."""
    shutil.copytree(small, tmp_path / "model", copy_function=shutil.copyfile)
    return tmp_path / "model"


def run(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


# ---------------------------------------------------------------------------------------------- verdicts


def test_noise_that_leaves_a_tiny_budget_is_called_noise(small: Path) -> None:
    code, output = run("parity", small, "--engine", "numpy", "--rtol", "0", "--atol", "1e-9")
    assert code == 1
    assert "inherited float32 noise alone" in " ".join(output.split())


@pytest.mark.parametrize("engine", ["numpy", pytest.param("numba", marks=pytest.mark.jit)])
def test_a_sound_file_passes_every_check(small: Path, engine: str, tmp_path: Path) -> None:
    code, output = run(
        "parity",
        small,
        "--engine",
        engine,
        "--checks",
        "all",
        "--json",
        tmp_path / "r.json",
        "--junit",
        tmp_path / "r.xml",
    )
    assert code == 0, output
    assert output.startswith("verdict: PASS")
    assert max(map(len, output.splitlines())) <= 100
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["verdict"] == "pass"
    assert {"max_abs", "rms", "p99", "cosine", "snr_db", "scaled_ulp"} <= set(report["comparisons"][0]["metrics"])
    suite = ElementTree.parse(tmp_path / "r.xml").getroot()[0]
    assert int(suite.attrib["tests"]) == len(report["comparisons"]) + len(report["checks"])
    assert suite.attrib["failures"] == "0"


def test_one_edited_expected_output_fails_and_is_named(model: Path) -> None:
    file = sorted((model / "test_data_set_0").glob("output_*.pb"))[-1]
    tensor = onnx.load_tensor(str(file))
    value = np.array(numpy_helper.to_array(tensor))
    value.flat[3] += 0.01
    file.write_bytes(numpy_helper.from_array(value, tensor.name).SerializeToString())
    code, output = run("parity", model, "--engine", "numpy")
    assert code == 1
    assert f"verdict: FAIL in {tensor.name}" in output


def test_a_missing_or_unknown_output_is_a_failure(model: Path) -> None:
    folder = model / "test_data_set_0"
    last = sorted(folder.glob("output_*.pb"))[-1]
    tensor = onnx.load_tensor(str(last))
    tensor.name = "nobody"
    last.write_bytes(tensor.SerializeToString())
    report = parity(Options(model, engine="numpy"))
    assert report.exit_code == 1
    assert {"nobody"} <= {c.output for c in report.comparisons if c.problem}


def test_without_data_random_prompts_are_compared_and_a_bad_argument_is_refused(model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copyfile(model / "model.onnx", bare / "model.onnx")
    code, output = run("parity", bare)
    assert code == 0
    assert "compared on random prompts" in output
    for options in (["--preset", "lax"], ["--rtol", "x"], ["--checks", "speed"], ["--against", "nobody"]):
        with pytest.raises(InputError):
            run("parity", model, *options)
    with pytest.raises(ComparisonError):
        run("parity", model, "--data", tmp_path / "nowhere")


def test_the_noise_floor_makes_the_budget(small: Path) -> None:
    report = parity(Options(small, engine="numpy", noise_floor=True))
    assert report.exit_code == 0
    assert all(c.budget.rtol == 0 and 0 < c.budget.atol < 1e-3 for c in report.comparisons)


def test_random_prompts_and_other_parties(small: Path) -> None:
    report = parity(Options(small, against=["ort-off", "onnxref", "float64"], random=2, seed=4, engine="numpy"))
    assert report.exit_code == 0
    assert {c.expected for c in report.comparisons} == {"ort-off", "onnxref", "float64"}
    again = parity(Options(small, against=["ort-off"], random=2, seed=4, engine="numpy"))
    first = [c.metrics for c in report.comparisons if c.expected == "ort-off"]
    assert first == [c.metrics for c in again.comparisons]


def test_a_graph_that_is_no_gpt2_is_still_judged_against_the_data(model: Path) -> None:
    proto = onnx.load(model / "model.onnx")
    for node in proto.graph.node:
        if node.op_type == "Add" and any(n.op_type == "Tanh" and n.output[0] in node.input for n in proto.graph.node):
            node.op_type = "Mul"  # x * tanh(...) instead of x * (1 + tanh(...)), in every layer
    onnx.save(proto, model / "model.onnx")
    report = parity(Options(model, engine="numpy"))
    assert report.exit_code == 1
    assert report.details["diagnosis"]["tap"] == "h.0.mlp.gelu"
    assert "activation" in " ".join(text for text, _ in lines_of(report))
    last = [n for n in proto.graph.node if n.op_type in ("Gemm", "MatMul")][-1]
    last.output[0], after = "doubled", last.output[0]
    at = list(proto.graph.node).index(last) + 1
    proto.graph.node.insert(at, onnx.helper.make_node("Mul", ["doubled", "doubled"], [after]))
    onnx.save(proto, model / "model.onnx")
    report = parity(Options(model, engine="numpy"))
    assert report.exit_code == 1
    assert any("no GPT-2 that gpt2np runs" in c.problem for c in report.comparisons)


# ------------------------------------------------------------------------------------- a user's own port

PORT = """
import numpy as np
from gpt2np.parity.subject import Subject
from gpt2np.parity import operations
from pathlib import Path
model = Subject(Path({path!r}))

def forward(feeds, bug=True):
    program = model.program
    if bug:
        program = program.with_(runs={{"h.1.mlp.gelu": lambda p, call, tap, x, dtype: np.maximum(x[0], 0)}})
    return dict(program.walk(model.call(feeds), np.float32, until=model.taps()[-1]))

def sound(feeds):
    return forward(feeds, False)

def broken(feeds):
    raise ZeroDivisionError("oh no")
"""


def test_a_bug_in_a_users_function_is_found_by_one_command(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_port.py").write_text(PORT.format(path=str(small / "model.onnx")))
    monkeypatch.chdir(tmp_path)
    code, output = run("parity", small, "--against", "my_port:forward", "--engine", "numpy")
    assert code == 1
    assert "first divergence h.1.mlp.gelu" in " ".join(output.split())
    assert "the activation were ReLU" in " ".join(output.split())
    assert run("parity", small, "--against", "my_port:sound", "--engine", "numpy", "--checks", "taps")[0] == 0
    code, output = run("parity", small, "--against", "my_port:broken", "--engine", "numpy")
    assert code == 1
    assert "ZeroDivisionError" in output
    sys.modules.pop("my_port")


def test_outputs_of_two_files_that_are_different_things_are_not_compared(tmp_path: Path) -> None:
    """As the zoo's output1, which is the last hidden state in one file and the logits in the other."""
    for name, options in {"base": [], "head": ["--lm-head"]}.items():
        assert run("synth", "--size", "2,3,12,20,37", *options, "-o", tmp_path / name)[0] == 0
    for a, b, role in (("base", "head", "logits"), ("head", "base", "last_hidden_state")):
        code, output = run("diff", tmp_path / a, tmp_path / b, "--ids", "1,2,3")
        assert code == 0, output
        assert f"output1 is {role} here, and another thing in the first file ({b})" in " ".join(output.split())
        assert f"output1 ({a} alone gives it)" in " ".join(output.split())
        code, output = run("parity", tmp_path / a, "--against", tmp_path / b, "--random", "1", "--engine", "numpy")
        assert code == 0, output
        assert f"output1 is {role} here, and another thing in the first file ({b})" in " ".join(output.split())
        assert "output1 (the model alone gives it)" in " ".join(output.split())
        assert f"output1 ({role}) ({b} alone gives it)" in " ".join(output.split())
        assert "output2" in output


def test_another_file_without_an_output_in_common_is_an_error(small: Path, tmp_path: Path) -> None:
    proto = onnx.load(str(small / "model.onnx"))
    for output in proto.graph.output:
        for node in proto.graph.node:
            node.output[:] = [name + "_" if name == output.name else name for name in node.output]
            node.input[:] = [name + "_" if name == output.name else name for name in node.input]
        output.name += "_"
    onnx.save(proto, str(tmp_path / "other.onnx"))
    compared = "parity", small, "--against", tmp_path / "other.onnx", "--random", "1", "--engine", "numpy"
    with pytest.raises(InputError, match=r"gives output1, .*other\.onnx gives output1_, .*: there is no output in"):
        run(*compared)
    assert run(*compared, "--checks", "taps")[0] == 0


# ------------------------------------------------------------------------------------------------- traces


def test_a_trace_is_written_whole_and_judged_again(small: Path, tmp_path: Path) -> None:
    path, other = tmp_path / "a.npz", tmp_path / "b.npz"
    data = small / "test_data_set_0"
    assert run("trace", small, "--data", data, "-o", path, "--engine", "numpy")[0] == 0
    assert run("trace", small, "--data", data, "-o", other, "--runner", "ort")[0] == 0
    loaded = trace.load(path)
    found = Subject(small / "model.onnx")
    assert set(loaded.taps) == set(found.taps())
    assert loaded.manifest["model_sha256"] == trace.load(other).manifest["model_sha256"]
    assert loaded.manifest["versions"]["onnxruntime"]
    code, output = run("diff", path, other)
    assert code == 0, output
    assert run("diff", path, other, "--rtol", "0", "--atol", "0")[0] == 1
    assert (
        run("parity", small, "--against", path, "--data", data, "--engine", "numpy", "--checks", "outputs,taps")[0] == 0
    )
    assert (
        run(
            "trace",
            small,
            "--data",
            data,
            "-o",
            tmp_path / "c.npz",
            "--taps",
            "h.*.attn.*",
            "--stats-only",
            "--engine",
            "numpy",
        )[0]
        == 0
    )
    stats = trace.load(tmp_path / "c.npz")
    assert {n.split(".")[2] for n in stats.taps} == {"attn"}
    assert {v.shape for v in stats.taps.values()} == {(16,)}
    assert not list(tmp_path.glob(".*.part"))


def test_a_trace_of_rounded_weights(small: Path, tmp_path: Path) -> None:
    path, options = tmp_path / "a.npz", ("--ids", "5,9,2", "--engine", "numpy", "--weights", "int8")
    assert run("trace", small, "-o", path, *options)[0] == 0
    loaded = trace.load(path)
    assert loaded.manifest["weights"] == "int8"
    expected = gpt2np.load(small, "numpy", weights="int8")([[5, 9, 2]]).last_hidden_state
    np.testing.assert_array_equal(loaded.taps["ln_f"].reshape(expected.shape), expected)
    with pytest.raises(InputError, match="--weights is of ours alone"):
        run("trace", small, "-o", path, *options, "--runner", "ort")


def test_a_damaged_or_foreign_trace_is_refused(small: Path, tmp_path: Path) -> None:
    model = Subject(small / "model.onnx")
    case = gather_cases(model, [], [], 1, 0)[0]
    path = tmp_path / "t.npz"
    trace.save(path, record(model, Ours(model, "numpy"), case, ["embed", "ln_f"]))
    whole = path.read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:cut])
        with pytest.raises(TraceError):
            trace.load(path)
    np.savez(tmp_path / "foreign.npz", **{"tap/embed": np.zeros(3)})
    with pytest.raises(TraceError, match="no manifest"):
        trace.load(tmp_path / "foreign.npz")
    with pytest.raises(TraceError, match="No such file"):
        trace.load(tmp_path / "nowhere.npz")
    path.write_bytes(whole)
    with pytest.raises(TraceError, match="another model file"):
        trace.load(path, sha256="0" * 64)
    with np.load(path) as file:
        arrays = dict(file)
    arrays["tap/embed"] = arrays["tap/embed"][:, :1]
    np.savez(tmp_path / "short.npz", **arrays)
    with pytest.raises(TraceError, match="its manifest says"):
        trace.load(tmp_path / "short.npz")


# --------------------------------------------------------------------------------------- taps and repro


def test_operations_one_by_one_are_the_textbook(small: Path) -> None:
    model = Subject(small / "model.onnx")
    case = gather_cases(model, [], [], 1, 2)[0]
    taps = Ours(model, "numpy", "float64").run(case.feeds, False, model.taps()).taps
    call = model.call(case.feeds)
    for tap in model.taps():
        made = model.program.run(tap, call, [taps[i] for i in tap_inputs(tap, model.config)], np.dtype(np.float64))
        np.testing.assert_allclose(made, taps[tap], rtol=1e-9, atol=1e-12, err_msg=tap)


def test_onnx_runtimes_intermediates_come_under_our_names(small: Path) -> None:
    model = Subject(small / "model.onnx")
    case = gather_cases(model, [], [], 1, 2)[0]
    ort, ours = (r.run(case.feeds, False, model.taps()).taps for r in (Ort(model), Ours(model, "numpy")))
    assert set(ort) == set(ours) == set(model.taps())
    assert_parity(ort, ours, budget=(1e-4, 1e-4))


@pytest.mark.parametrize("tap", ["embed", "ln_1", "attn.q", "attn.scores", "attn.probs", "attn.heads", "attn.out",
                                 "resid_mid", "mlp.c_fc", "mlp.gelu", "ln_f"])  # fmt: skip
def test_a_repro_runs_by_itself(small: Path, tmp_path: Path, tap: str) -> None:
    from gpt2np.parity.repro import dump

    model = Subject(small / "model.onnx")
    call = model.call(gather_cases(model, [], [], 1, 2)[0].feeds)
    name = tap if tap in ("embed", "ln_f") else f"h.1.{tap}"
    taps = dict(model.program.walk(call, np.float32, until="ln_f"))
    # walk drops what is no longer needed from its own memory, but yields all
    dump(tmp_path, model.program, call, name, [taps[i] for i in tap_inputs(name, model.config)], taps[name])
    data = load_set(tmp_path / "test_data_set_0")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, data.inputs)
    np.testing.assert_allclose(got, next(iter(data.outputs.values())), rtol=1e-3, atol=1e-5)
    if tap == "mlp.gelu":
        done = subprocess.run(
            [sys.executable, str(tmp_path / "replay.py")], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "0 of" in done.stdout


def test_diff_writes_the_operation_that_differs(small: Path, model: Path, tmp_path: Path) -> None:
    proto = onnx.load(model / "model.onnx")
    for tensor in proto.graph.initializer:
        if tensor.name.endswith("h.1.mlp.c_fc.bias"):
            value = np.array(numpy_helper.to_array(tensor)) + np.float32(0.5)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    onnx.save(proto, model / "model.onnx")
    report = diff(str(small), str(model), lambda m: gather_cases(m, [], [], 1, 0), repro=tmp_path / "repro")
    assert report.exit_code == 1
    assert report.details["diagnosis"]["tap"] == "h.1.mlp.c_fc"
    assert (tmp_path / "repro" / "model.onnx").is_file()
    assert max(len(text) for text, _ in lines_of(report)) <= 100
    same = diff(str(small), str(small / "model.onnx"), lambda m: gather_cases(m, [], [], 1, 0))
    assert same.exit_code == 0


# ----------------------------------------------------------------------------------------- data and plugin


def test_sets_are_found_in_numeric_order_and_read_by_name(tmp_path: Path) -> None:
    for i in (10, 2, 0):
        save_set(tmp_path / f"test_data_set_{i}", {"x": np.arange(3)}, {f"out{j}": np.full(2, j) for j in range(12)})
    assert [p.name for p in find_sets(tmp_path)] == ["test_data_set_0", "test_data_set_2", "test_data_set_10"]
    assert expand([tmp_path]) == find_sets(tmp_path)
    data = load_set(tmp_path / "test_data_set_2")
    assert [int(v[0]) for v in data.outputs.values()] == list(range(12))  # output_10.pb comes after output_2.pb
    (tmp_path / "test_data_set_2" / "output_3.pb").unlink()
    with pytest.raises(Exception, match="not numbered"):
        load_set(tmp_path / "test_data_set_2")


def test_assert_parity_says_what_and_where() -> None:
    b = {"h.0.ln_1": np.ones((1, 2, 3)), "ln_f": np.ones((1, 2, 3))}
    a = {n: v.copy() for n, v in b.items()}
    assert_parity(a, b)
    a["ln_f"][0, 1, 2] = 1.5
    with pytest.raises(AssertionError, match=r"ln_f: 1 of 6 elements .* at \[0, 1, 2\] 1.5, expected 1") as failure:
        assert_parity(a, b, oracle=b)
    assert "expected is closer" in str(failure.value)
    assert_parity(a, b, budget={"ln_f": (1.0, 0.0)})
    with pytest.raises(AssertionError, match="missing in actual"):
        assert_parity({"ln_f": b["ln_f"]}, b)
    with pytest.raises(ComparisonError):
        assert_parity({}, {})
    with pytest.raises(InputError):
        assert_parity(b, b, budget="loose")


def test_assert_parity_takes_what_a_model_returns() -> None:
    x, p = np.ones((1, 2, 3), np.float32), np.zeros((2, 1, 1, 2, 3), np.float32)
    out = Output(x, None, [p])
    assert_parity(out, out)
    assert_parity((x, p), [x, p])
    with pytest.raises(AssertionError, match="last_hidden_state"):
        assert_parity(out._replace(last_hidden_state=x + 1), out)
    with pytest.raises(AssertionError, match="missing in actual"):
        assert_parity((x,), (x, p))


def test_the_plugin_is_light() -> None:
    code = (
        "import sys, gpt2np.pytest_plugin; print(sorted({'numpy', 'numba', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_tap_names_are_unique_and_every_input_comes_before() -> None:
    from tiny import tiny_config, tiny_sources

    config = tiny_config()
    names = tap_names(config)
    assert len(set(names)) == len(names) == 14 * config.n_layer + 3
    assert all(names.index(i) < names.index(n) for n in names for i in tap_inputs(n, config))
    assert Program.of(config, tiny_sources(config)).head == "wte.weight"
