"""Every sentence of a verdict is true: storage, shapes, padding, budgets, options, several inputs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from typer.testing import CliRunner

from gpt2np.cli import app
from gpt2np.errors import InputError, TraceError
from gpt2np.model import Output
from gpt2np.onnx.read.datasets import save_set
from gpt2np.parity.budgets import AUTO_BUDGET, Arbiter, parse_budgets
from gpt2np.parity.capture import Options
from gpt2np.parity.cases import Case, case_from_ids, gather_cases, given_ids
from gpt2np.parity.checks import judged
from gpt2np.parity.compare import Comparison, compare_arrays
from gpt2np.parity.diff import diff
from gpt2np.parity.dumps import read_dump
from gpt2np.parity.forms import as_array, named
from gpt2np.parity.metrics import Budget
from gpt2np.parity.parties import Function, Ours
from gpt2np.parity.report import Report
from gpt2np.parity.run import parity
from gpt2np.parity.shapes import fit
from gpt2np.parity.subject import Subject
from gpt2np.parity.text import lines_of
from gpt2np.parity.trace import Trace, load, save

Arrays = dict[str, np.ndarray]
IDS = np.array([[5, 17, 30, 2, 7, 7, 19, 34]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files with random weights, one with a head and no past, one with past inputs and a mask."""
    made = tmp_path_factory.mktemp("verdicts")
    for name, more in (("zoo", []), ("modern", ["--with-past"])):
        result = CliRunner().invoke(
            app, ["synth", "--size", "2,3,12,20,37", "-o", str(made / name), "--seed", "1", *more]
        )
        assert result.exit_code == 0, result.output
    return made


@pytest.fixture(scope="module")
def right(folder: Path) -> tuple[Path, Case, Arrays]:
    """A file, a call of it, and its outputs by the textbook."""
    model = Subject(folder / "zoo" / "model.onnx")
    case = case_from_ids(model, "ids", IDS)
    return model.path, case, Ours(model, "numpy").run(case.feeds).outputs


def judge(path: Path, case: Case, arrays: dict[str, object], tmp_path: Path, **options: object) -> Report:
    np.savez(tmp_path / "port.npz", **arrays)  # type: ignore[arg-type]
    return diff(str(path), str(tmp_path / "port.npz"), lambda model: [case], **options)  # type: ignore[arg-type]


def said(report: Report) -> str:
    return " ".join(" ".join(text for text, _ in lines_of(report)).split())


# ------------------------------------------------------------------------------------------------ storage


@pytest.mark.parametrize("options", [{"rtol": ["1e-4"]}, {"preset": "strict"}])
def test_one_set_of_numbers_has_one_verdict(
    right: tuple[Path, Case, Arrays], tmp_path: Path, options: dict[str, object]
) -> None:
    path, case, outputs = right
    narrow = outputs["output1"].astype(np.float16)
    forms = [
        {"output1": narrow}, {"output1": narrow.astype(np.float32)}, {"last_hidden_state": narrow},
        {"ln_f": narrow[0].astype(np.float64)},
    ]  # fmt: skip
    reports = [judge(path, case, form, tmp_path, **options) for form in forms]
    assert [r.exit_code for r in reports] == [1] * 4
    failing = [next(c.metrics.failing for c in r.comparisons if c.metrics) for r in reports]
    assert len(set(failing)) == 1
    assert failing[0] > 0
    assert "is float16, the other one float32" in said(reports[0])


def test_bfloat16_is_read_whoever_wrote_it(right: tuple[Path, Case, Arrays], tmp_path: Path) -> None:
    path, case, outputs = right
    value = outputs["output1"].astype(ml_dtypes.bfloat16)
    np.savez(tmp_path / "a.npz", x=value)
    with np.load(tmp_path / "a.npz") as file:  # NumPy gives it back as |V2
        np.testing.assert_array_equal(as_array(file["x"], "x"), value.astype(np.float32))
    np.testing.assert_array_equal(as_array(value, "x"), value.astype(np.float32))
    report = judge(path, case, {"output1": value}, tmp_path)
    assert report.exit_code == 1
    assert "output1 is bfloat16" in said(report)


# ------------------------------------------------------------------------------------------------- shapes

SHAPES: dict[str, tuple[Callable[[Arrays], Arrays], int, str]] = {
    "no batch axes": (lambda o: {"output1": o["output1"][0, 0]}, 0, "axes of size 1"),
    "last position": (lambda o: {"output1": o["output1"][:, :, -1:]}, 0, "the last position alone"),
    "another position": (lambda o: {"output1": o["output1"][:, :, 2:3]}, 1, "position 2 alone"),
    "exchanged": (lambda o: {"output1": o["output1"].swapaxes(-1, -2)}, 1, "exchanging the last two axes"),
    "flat": (lambda o: {"output1": o["output1"].reshape(-1)}, 1, "in another shape"),
    "more columns": (lambda o: {"output1": np.pad(o["output1"], [(0, 0)] * 3 + [(0, 5)])}, 1, "the first 12 agree"),
    "fewer positions": (lambda o: {"output1": o["output1"][:, :, :5]}, 1, "5 positions for T = 8: the first 5 agree"),
    "heads last": (lambda o: {"output2": o["output2"].swapaxes(2, 3)}, 1, "keys and values are (B, T, H, D)"),
    "nothing fits": (lambda o: {"output1": np.zeros((3, 5, 7), np.float32)}, 1, "nothing of it could be compared"),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_another_shape_is_told_in_words(name: str, right: tuple[Path, Case, Arrays], tmp_path: Path) -> None:
    path, case, outputs = right
    change, code, words = SHAPES[name]
    report = judge(path, case, change(outputs), tmp_path)
    assert report.exit_code == code
    assert words in said(report)


def test_a_shape_that_fits_by_chance_does_not_agree() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 4, 3)), rng.standard_normal((2, 3, 4))
    assert fit(a, b, "logits", Budget(1e-3, 1e-5)) is None


@pytest.mark.parametrize(
    ("tap", "change", "letters"),
    [
        ("h.0.attn.q", lambda x: x.swapaxes(1, 2), "(B, T, H, D)"),
        ("h.0.attn.v", lambda x: x.swapaxes(1, 2).reshape(1, 8, -1), "(B, T, HD)"),
        ("h.1.attn.k", lambda x: x.swapaxes(2, 3), "(B, H, D, T)"),
        ("h.1.attn.heads", lambda x: x.reshape(1, 8, 3, -1), "(B, T, H, D)"),
        ("h.1.attn.heads", lambda x: x.reshape(1, 8, 3, -1).swapaxes(1, 2), "(B, H, T, D)"),
    ],
)
def test_taps_are_read_in_the_layouts_of_other_programs(
    tap: str, change: Callable[[np.ndarray], np.ndarray], letters: str, right: tuple[Path, Case, Arrays], tmp_path: Path
) -> None:
    path, case, outputs = right
    taps = Ours(Subject(path), "numpy").run(case.feeds, False, Subject(path).taps()).taps
    report = judge(path, case, {**outputs, **taps, tap: change(taps[tap])}, tmp_path)
    assert report.exit_code == 0
    assert f"{tap} is {letters}, read as" in said(report)
    wrong = judge(path, case, {**outputs, **taps, tap: 1.01 * change(taps[tap])}, tmp_path)
    assert (wrong.exit_code, wrong.place and wrong.place.first) == (1, tap)


def test_a_tap_of_no_known_shape_is_said_and_the_rest_compared(
    right: tuple[Path, Case, Arrays], tmp_path: Path
) -> None:
    path, case, outputs = right
    report = judge(path, case, {**outputs, "h.0.attn.probs": np.zeros((1, 8, 8), np.float32)}, tmp_path)
    assert report.exit_code == 1
    assert sum(c.ok for c in report.comparisons) == len(outputs)
    assert "h.0.attn.probs, port - zoo: shape (1, 8, 8), where (B, H, T, S) is (1, 3, 8, 8): it could not" in said(
        report
    )


@pytest.mark.parametrize("tap", ["embed", "h.0.ln_1", "h.1.ln_1"])
@pytest.mark.parametrize("first", [False, True])
def test_a_wrong_tap_behind_which_all_is_right_is_told_for_what_it_is(
    tap: str, first: bool, right: tuple[Path, Case, Arrays], tmp_path: Path
) -> None:
    path, case, outputs = right
    np.savez(tmp_path / "port.npz", **outputs, **{tap: np.ones((1, IDS.size, 12), np.float32)})
    parties = [str(path), str(tmp_path / "port.npz")]
    report = diff(*(parties[::-1] if first else parties), lambda model: [case])
    assert (report.exit_code, report.place and report.place.last) == (1, tap)
    assert f"all the same: port does not go on with what it returned as {tap}" in said(report)
    assert "is not all" not in said(report)


@pytest.mark.parametrize("tap", ["h.0.attn.k", "h.1.attn.v", "ln_f"])
@pytest.mark.parametrize("first", [False, True])
def test_a_wrong_tap_beside_the_right_output_that_holds_it_fails(
    tap: str, first: bool, right: tuple[Path, Case, Arrays], tmp_path: Path
) -> None:
    path, case, outputs = right
    model = Subject(path)
    (value,) = Ours(model, "numpy").run(case.feeds, False, [tap]).taps.values()
    for factor, code in ((1, 0), (1.1, 1)):
        np.savez(tmp_path / "port.npz", **outputs, **{tap: factor * value})
        parties = [str(path), str(tmp_path / "port.npz")]
        report = diff(*(parties[::-1] if first else parties), lambda model: [case])
        assert (report.exit_code, bool(report.place)) == (code, bool(code))


def test_an_output_under_two_names_is_one_array(right: tuple[Path, Case, Arrays], tmp_path: Path) -> None:
    path, case, outputs = right
    assert judge(path, case, {**outputs, "present.0": outputs["output2"]}, tmp_path).exit_code == 0
    report = judge(path, case, {**outputs, "present.0": outputs["output2"] + 1}, tmp_path)
    assert report.exit_code == 1
    assert "'output2' and 'present.0', which are one output, with other numbers in each" in said(report)


def test_rows_of_the_embeddings_that_are_not_finite_are_told_though_no_input_reads_them(
    folder: Path, tmp_path: Path
) -> None:
    import onnx
    from onnx import numpy_helper

    model = onnx.load(folder / "zoo" / "model.onnx")
    table = next(t for t in model.graph.initializer if t.name.endswith("wpe.weight"))
    rows = numpy_helper.to_array(table).copy()
    rows[10:, 3] = np.nan
    table.CopyFrom(numpy_helper.from_array(rows, table.name))
    onnx.save(model, tmp_path / "model.onnx")
    report = parity(Options(tmp_path / "model.onnx", ids=["5,17,30"], engine="numpy"))
    assert report.exit_code == 0
    assert "wpe.weight[10, 3] is nan, and 9 more rows are not finite: wrong wherever an input reads it" in said(report)


# ------------------------------------------------------------------------------------------------ padding


def test_rows_of_padding_are_left_out_and_can_be_asked_for(folder: Path, tmp_path: Path) -> None:
    model = Subject(folder / "modern" / "model.onnx")
    case = case_from_ids(model, "padded", np.concatenate([IDS, IDS[:, ::-1]]))
    mask = np.ones((2, 8), np.int64)
    mask[1, :3] = 0
    case.feeds["attention_mask"] = mask
    case.feeds["position_ids"] = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    outputs = Ours(model, "numpy").run(case.feeds).outputs
    final = next(p.name for p in model.recognised.outputs if p.role in ("logits", "last_hidden_state"))
    padded = outputs[final].copy()
    padded[1, :3] = 77
    report = judge(model.path, case, {final: padded}, tmp_path)
    assert report.exit_code == 0
    assert "3 rows of padding" in said(report)
    assert judge(model.path, case, {final: padded}, tmp_path, padding=True).exit_code == 1
    padded[1, 3] = 77
    assert judge(model.path, case, {final: padded}, tmp_path).exit_code == 1


# ------------------------------------------------------------------------------------------------ budgets


def test_float64_decides_beyond_an_automatic_budget(right: tuple[Path, Case, Arrays]) -> None:
    path, case, _ = right
    model = Subject(path)
    exact = Ours(model, "numpy", "float64")
    value = np.asarray(exact.gpt2(IDS).last_hidden_state)[None]
    rng = np.random.default_rng(0)
    scale = 1e-7 * np.sqrt(np.mean(value**2))
    a, b = (value + scale * rng.standard_normal(value.shape) for _ in range(2))
    budgets = parse_budgets("auto", [], [])
    budgets.default = Budget(0.0, 1e-9, AUTO_BUDGET.source)
    budgets.is_auto = lambda output: True  # type: ignore[method-assign]
    budgets.arbiter = Arbiter(model)

    def compared(x: np.ndarray, y: np.ndarray) -> Comparison:
        result = Comparison(case.name, "output1", "x", "y", budgets.default)
        compare_arrays(result, x, y, model, case, budgets)
        return result

    fair = compared(a, b)
    assert fair.ok
    assert fair.noise == fair.metrics.failing > 0  # type: ignore[union-attr]
    off = a.copy()
    off[0, 0, 3, 4] += 100 * scale
    assert not compared(off, b).ok  # one number is further off than two roundings make
    assert not compared(a + 30 * scale * rng.standard_normal(a.shape), b).ok  # one party is much further away


def test_a_budget_as_wide_as_the_signal_compares_nothing(right: tuple[Path, Case, Arrays], tmp_path: Path) -> None:
    path, case, outputs = right
    noise = np.random.default_rng(0).standard_normal(outputs["output1"].shape).astype(np.float32)
    report = judge(path, case, {"output1": noise}, tmp_path, atol=["9"])
    assert report.exit_code == 3
    assert "as wide as the signal" in said(report)


def test_a_budget_that_the_user_names_stays_as_strict_as_it_is(right: tuple[Path, Case, Arrays]) -> None:
    assert parse_budgets("auto", [], []).is_auto("output1")
    for budgets in (parse_budgets("zoo", [], []), parse_budgets("auto", ["output1:1e-3"], []),
                    parse_budgets("auto", [], ["1e-5"])):  # fmt: skip
        assert not budgets.is_auto("output1")


@pytest.mark.parametrize(
    "options",
    [
        ["--rtol", "outputX:1e-9"],
        ["--engine", "torch"],
        ["--seed", "-1"],
        ["--preset", "lax"],
        ["--atol", "nan"],
        ["--rtol", ":1"],
        ["--json", "new.json", "--junit", "./new.json"],
    ],
)
def test_options_are_refused_before_any_work(options: list[str], folder: Path) -> None:
    result = CliRunner().invoke(app, ["parity", str(folder / "zoo"), *options])
    assert isinstance(result.exception, InputError)
    if options[1] == "outputX:1e-9":
        assert "output1" in str(result.exception)
        assert "last_hidden_state" in str(result.exception)


# ------------------------------------------------------------------------------------------- several cases


def test_every_input_is_compared_and_a_failing_one_is_searched(folder: Path, tmp_path: Path) -> None:
    model = Subject(folder / "zoo" / "model.onnx")
    cases = gather_cases(model, [], [], 3, 0)

    good, bad = tmp_path / "good", tmp_path / "bad"
    for i, case in enumerate(cases):
        outputs = Ours(model, "numpy").run(case.feeds).outputs
        save_set(good / f"test_data_set_{i}", case.feeds, outputs)
        wrong = {n: v + np.float32(0.5 * (i == 1)) for n, v in outputs.items()}
        save_set(bad / f"test_data_set_{i}", case.feeds, wrong)
    assert parity(Options(model.path, data=[good], engine="numpy")).exit_code == 0
    report = parity(Options(model.path, data=[bad], engine="numpy"))
    assert report.exit_code == 1
    assert {c.case for c in report.comparisons} == {f"test_data_set_{i}" for i in range(3)}
    assert report.diagnosis is not None
    assert report.diagnosis.case == "test_data_set_1"
    two = diff(str(model.path), str(model.path), lambda m: cases)
    assert {c.case for c in two.comparisons} == {c.name for c in cases}


def test_arrays_of_one_call_are_compared_with_the_input_that_they_fit(folder: Path, tmp_path: Path) -> None:
    model = Subject(folder / "zoo" / "model.onnx")
    cases = [case_from_ids(model, f"case_{i}", np.roll(IDS, i, axis=1)) for i in range(3)]
    outputs = Ours(model, "numpy").run(cases[2].feeds).outputs
    np.savez(tmp_path / "port.npz", **outputs)
    report = diff(str(model.path), str(tmp_path / "port.npz"), lambda m: cases)
    assert report.exit_code == 0
    assert "case_2 fits best" in said(report)
    np.savez(tmp_path / "port.npz", **outputs, input1=cases[1].feeds["input1"])
    assert diff(str(model.path), str(tmp_path / "port.npz"), lambda m: cases).exit_code == 1


# --------------------------------------------------------------------------------------------------- forms


def test_what_a_function_may_return() -> None:
    x = np.zeros((1, 2, 3))
    names = ["hidden", "present"]
    assert list(named({"hidden": x}, names, "f")) == ["hidden"]
    assert list(named((x, x), names, "f")) == names
    assert list(named(x, names, "f")) == ["hidden"]
    made = named(Output(x, None, [x]), names, "f")
    assert list(made) == ["last_hidden_state", "present.0"]
    pairs = named({"logits": x, "past_key_values": ((x, x), (x, x))}, names, "f")
    assert list(pairs) == ["logits", "present.0.key", "present.0.value", "present.1.key", "present.1.value"]


PORT = """
def forward(feeds):
    return missing(feeds)

def missing(feeds):
    raise KeyError("wte")  # line 6

def nothing(feeds):
    return None

def objects(feeds):
    return {"output1": [[1, 2], None]}

def misspelt(feeds):
    import numpy as np
    return {"last_hiden_state": np.zeros(3)}
"""


def test_a_function_of_a_package_that_is_imported_leaves_the_package_as_it_is(
    right: tuple[Path, Case, Arrays], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Function(Subject(right[0]), "numpy:sin").function is np.sin
    assert sys.modules["numpy"] is np


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("forward", "line 6"), ("nothing", "returned None"), ("objects", "output1"),
        ("misspelt", "last_hidden_state"),
    ],
)  # fmt: skip
def test_what_a_function_does_wrong_is_one_clear_line(
    function: str, words: str, right: tuple[Path, Case, Arrays], tmp_path: Path
) -> None:
    path, case, _ = right
    (tmp_path / "strange_port.py").write_text(PORT)
    report = diff(str(path), f"{tmp_path / 'strange_port.py'}:{function}", lambda m: [case])
    assert report.exit_code == 1
    assert words in report.comparisons[0].problem
    assert "\n" not in report.comparisons[0].problem


# ----------------------------------------------------------------------------------------- dumps and token ids


def write_npy(folder: Path, arrays: Arrays) -> Path:
    (folder / "dump").mkdir()
    for name, value in arrays.items():
        np.save(folder / "dump" / f"{name}.npy", value)
    return folder / "dump"


def write_raw(folder: Path, arrays: Arrays) -> Path:
    entries = {}
    for name, value in arrays.items():
        value.tofile(folder / f"{name}.bin")
        entries[name] = {"shape": list(value.shape), "dtype": value.dtype.name}
    (folder / "dump.json").write_text(json.dumps(entries))
    return folder / "dump.json"


def write_safetensors(folder: Path, arrays: Arrays) -> Path:
    header, data = {}, b""
    for name, value in arrays.items():
        start, data = len(data), data + value.tobytes()
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [start, len(data)]}
    text = json.dumps(header).encode()
    (folder / "dump.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return folder / "dump.safetensors"


@pytest.mark.parametrize("write", [write_npy, write_raw, write_safetensors])
def test_arrays_are_read_in_any_form(
    write: Callable[[Path, Arrays], Path], right: tuple[Path, Case, Arrays], tmp_path: Path
) -> None:
    path, case, outputs = right
    report = diff(str(path), str(write(tmp_path, outputs)), lambda m: [case])
    assert report.exit_code == 0
    assert {c.output for c in report.comparisons} == set(outputs)


def test_a_dump_that_is_not_as_long_as_it_says_is_refused(right: tuple[Path, Case, Arrays], tmp_path: Path) -> None:
    path = write_raw(tmp_path, right[2])
    (tmp_path / "output1.bin").write_bytes(b"1234")
    with pytest.raises(TraceError, match="'output1' has 4 bytes"):
        read_dump(path)
    whole = write_safetensors(tmp_path, right[2]).read_bytes()
    for size in (0, 5, 20, len(whole) - 3):
        (tmp_path / "dump.safetensors").write_bytes(whole[:size])
        with pytest.raises(TraceError):
            read_dump(tmp_path / "dump.safetensors")


def test_token_ids_are_given_as_numbers_or_as_a_file(folder: Path, tmp_path: Path) -> None:
    model = Subject(folder / "zoo" / "model.onnx")
    np.save(tmp_path / "ids.npy", IDS)
    np.savez(tmp_path / "ids.npz", ids=IDS, other=np.zeros(3))
    (tmp_path / "ids.txt").write_text("5 17 30\n2, 7,7 19 34")
    for text in ("5,17,30,2,7,7,19,34", *(str(tmp_path / f"ids.{kind}") for kind in ("npy", "npz", "txt"))):
        np.testing.assert_array_equal(given_ids(text, model), IDS)
    assert given_ids(", ".join([f"{17:050}"] * 6), model).tolist() == [[17] * 6]  # no name of a file is so long
    (tmp_path / "empty.npy").touch()
    for text in (
        "1,x",
        "1,,2",
        "99999",
        "9" * 30,
        "-1",
        "",
        *(str(tmp_path / f"{n}.npy") for n in ("nowhere", "empty")),
    ):
        with pytest.raises(InputError):
            given_ids(text, model)
    report = parity(Options(model.path, ids=["5,17,30"], engine="numpy"))
    assert report.exit_code == 0
    assert {c.case for c in report.comparisons} == {"ids_0"}


def test_a_trace_beside_a_function_gives_the_inputs(right: tuple[Path, Case, Arrays], tmp_path: Path) -> None:
    path, _, _ = right
    golden = str(tmp_path / "golden.npz")
    result = CliRunner().invoke(app, ["trace", str(path), "--ids", "5,17,30", "-o", golden, "--engine", "numpy"])
    assert result.exit_code == 0, result.output
    (tmp_path / "golden_port.py").write_text(
        "import gpt2np\n"
        f"model = gpt2np.load({str(path)!r}, engine='numpy')\n"
        "def forward(feeds):\n    return {'output1': model(feeds['input1'][0]).last_hidden_state[None]}\n"
    )
    report = diff(golden, f"{tmp_path / 'golden_port.py'}:forward", lambda m: [])
    assert report.exit_code == 0, said(report)
    assert [c.output for c in report.comparisons] == ["output1"]


class Tensor:
    """What of a torch.Tensor that needs a gradient is asked for, bfloat16 or not; torch itself is not needed."""

    def __init__(self, value: np.ndarray, dtype: str = "torch.float32", tracked: bool = True) -> None:
        self.value, self.dtype, self.tracked = value, dtype, tracked

    def detach(self) -> Tensor:
        return Tensor(self.value, self.dtype, False)

    def cpu(self) -> Tensor:
        return self

    def float(self) -> Tensor:
        return Tensor(self.value.astype(np.float32), "torch.float32", self.tracked)

    def resolve_conj(self) -> Tensor:
        return self

    def numpy(self) -> np.ndarray:
        if self.tracked:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad.")
        if self.dtype == "torch.bfloat16":
            raise TypeError("Got unsupported ScalarType BFloat16")
        return self.value


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_tensors_are_read_without_torch(dtype: str) -> None:
    value = np.array([[0.5, -2.0, 384.0]], np.float32)
    found = as_array(Tensor(value, dtype), "port gives 'logits'")
    assert found.dtype == np.float32
    assert np.array_equal(found, value)


def test_tensors_of_torch_are_read() -> None:
    torch = pytest.importorskip("torch")
    value = np.array([[0.5, -2.0, 384.0]], np.float32)
    for tensor in (torch.tensor(value, requires_grad=True), torch.tensor(value).bfloat16()):
        assert np.array_equal(as_array(tensor, "port gives 'logits'"), value)


# ------------------------------------------------------------------------------------- what a caller may get wrong


def two(tmp_path: Path, a: object, b: object, **options: object) -> Report:
    """Two sets of plain arrays against each other, each under the name logits."""
    for name, value in (("a", a), ("b", b)):
        np.savez(tmp_path / f"{name}.npz", logits=value)  # type: ignore[arg-type]
    return diff(str(tmp_path / "a.npz"), str(tmp_path / "b.npz"), lambda m: [], **options)  # type: ignore[arg-type]


def test_nan_in_both_compares_nothing(tmp_path: Path) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    nothing = two(tmp_path, x * np.nan, x * np.nan)
    assert nothing.exit_code == 3
    assert "NOTHING COMPARED: all numbers are NaN or infinite in both" in said(nothing)
    assert "not finite" in said(nothing)
    some = two(tmp_path, np.where(x > 4, np.nan, x), np.where(x > 4, np.nan, x))
    assert some.exit_code == 0
    assert "logits where both are NaN or the same infinity" in said(some)
    assert two(tmp_path, x * np.nan, x).exit_code == 1


def test_a_constant_is_compared_under_a_budget_smaller_than_itself(tmp_path: Path) -> None:
    x = np.full(1000, 1.1)
    assert two(tmp_path, x, x + 1e-5).exit_code == 0
    assert two(tmp_path, x, x + 1e-5, atol=["100"]).exit_code == 3
    assert two(tmp_path, np.float32(5), np.float32(0), rtol=["1"]).exit_code == 3


def test_odd_shapes_of_logits_are_compared(tmp_path: Path) -> None:
    assert two(tmp_path, np.float32(3), np.float32(3)).exit_code == 0
    assert two(tmp_path, np.zeros((2, 0)), np.zeros((2, 0))).exit_code == 3
    x = np.arange(6.0).reshape(*(1,) * 12, 2, 3)
    assert two(tmp_path, x, x.swapaxes(-1, -2)).exit_code == 1  # and not after 14! orders of axes


def test_inputs_among_plain_arrays_are_those_of_the_trace(right: tuple[Path, Case, Arrays], tmp_path: Path) -> None:
    _, case, outputs = right
    golden = tmp_path / "golden.npz"
    save(golden, Trace(case.feeds, outputs, {}))
    for name, ids, same in (("input1", IDS[0], True), ("input_ids", IDS, True), ("input_ids", IDS + 1, False)):
        np.savez(tmp_path / "port.npz", **{name: ids}, **outputs)
        if same:
            report = diff(str(golden), str(tmp_path / "port.npz"), lambda m: [])
            assert report.exit_code == 0
            assert report.not_compared == []
        else:
            with pytest.raises(TraceError, match="were recorded on different inputs: 'input1' differs"):
                diff(str(golden), str(tmp_path / "port.npz"), lambda m: [])


@pytest.mark.parametrize("name", ["input1", "input_ids"])
def test_a_port_may_write_its_token_ids_in_its_own_form(
    name: str, right: tuple[Path, Case, Arrays], tmp_path: Path
) -> None:
    path, _, outputs = right
    for ids in (IDS.astype(np.int32), IDS.astype(">i8"), IDS[0].astype(np.uint8), IDS[None, None]):
        np.savez(tmp_path / "port.npz", **{name: ids}, **outputs)
        assert diff(str(path), str(tmp_path / "port.npz"), lambda m: []).exit_code == 0
    for ids in (IDS.astype(np.float32), IDS + 37, np.resize(IDS, (1, 21)), IDS[:, :0]):
        np.savez(tmp_path / "port.npz", **{name: ids}, **outputs)
        with pytest.raises(InputError, match=r"port\.npz: "):
            diff(str(path), str(tmp_path / "port.npz"), lambda m: [])


def test_a_check_of_nan_alone_is_not_made() -> None:
    nan, x = np.full((1, 4, 3), np.nan), np.ones((1, 4, 3))
    budget = Budget(1e-3, 1e-5)
    assert judged("causal", "rows", nan, nan, budget).ok is None
    assert judged("causal", "rows", nan, x, budget).ok is False
    assert judged("causal", "rows", x, x, budget).ok is True


def test_inputs_that_are_asked_for_are_those_of_the_trace(right: tuple[Path, Case, Arrays], tmp_path: Path) -> None:
    path, case, outputs = right
    model, golden = str(path), tmp_path / "golden.npz"
    save(golden, Trace(case.feeds, outputs, {}))
    other = case_from_ids(Subject(path), "other", IDS + 1)
    assert diff(model, str(golden), lambda m: []).exit_code == 0
    report = diff(model, str(golden), lambda m: [other, case])
    assert ({c.case for c in report.comparisons}, report.exit_code) == ({"ids"}, 0)
    assert f"other: {golden} was recorded on other inputs" in report.not_compared
    with pytest.raises(InputError, match="was recorded on other inputs than other"):
        diff(model, str(golden), lambda m: [other])
    result = CliRunner().invoke(app, ["diff", str(golden), str(golden), "--ids", "1,2,3"])
    assert isinstance(result.exception, InputError)
    assert "inputs for a model.onnx" in str(result.exception)
    with pytest.raises(InputError, match="--local needs a model"):
        diff(str(golden), str(golden), lambda m: [], local=True)


def test_statistics_of_other_shapes_differ(right: tuple[Path, Case, Arrays], tmp_path: Path) -> None:
    path, case, _ = right
    taps = Ours(Subject(path), "numpy").run(case.feeds, False, ["embed", "h.0.ln_1"]).taps
    turned = {name: value.reshape(value.shape[::-1]) for name, value in taps.items()}
    save(tmp_path / "golden.npz", Trace(case.feeds, {}, taps), stats_only=True)
    save(tmp_path / "turned.npz", Trace(case.feeds, {}, turned), stats_only=True)
    np.savez(tmp_path / "plain.npz", **turned)
    for name in ("turned", "plain"):
        report = diff(str(tmp_path / "golden.npz"), str(tmp_path / f"{name}.npz"), lambda m: [])
        assert report.exit_code == 1
        assert "expected (1, 8, 12): only statistics of both are known" in said(report)


@pytest.mark.parametrize(
    ("rows", "names", "words"),
    [
        (np.zeros((2, 2)), ["embed", "ln_f"], "'embed' is no row of statistics"),
        (np.zeros((2, 16), complex), ["embed", "ln_f"], "'embed' is no row of statistics"),
        (np.zeros((2, 16)), ["embed", "embed"], "one tap is there twice"),
    ],
)
def test_statistics_that_are_none_are_told(rows: np.ndarray, names: list[str], words: str, tmp_path: Path) -> None:
    manifest = {
        "kind": "gpt2np trace", "schema": 2, "stats_only": True, "rows_of_statistics": names,
        "arrays": {"statistics": {"shape": list(rows.shape), "dtype": rows.dtype.str}},
    }  # fmt: skip
    text = np.frombuffer(json.dumps(manifest).encode(), np.uint8)
    np.savez(tmp_path / "odd.npz", manifest=text, statistics=rows)
    with pytest.raises(TraceError, match=words):
        load(tmp_path / "odd.npz")


def test_a_port_may_write_every_result_into_the_same_memory(folder: Path, tmp_path: Path) -> None:
    """As a port in C with static buffers does: two calls of it are compared, not one with itself."""
    path = folder / "zoo" / "model.onnx"
    (tmp_path / "static_port.py").write_text(
        "import numpy as np, gpt2np\n"
        f"session, memory = gpt2np.InferenceSession({str(path)!r}, engine='numpy'), {{}}\n"
        "names = [o.name for o in session.get_outputs()]\n"
        "def forward(feeds):\n"
        "    for name, value in zip(names, session.run(names, feeds)):\n"
        "        memory.setdefault(name, np.zeros(1 << 16, np.float32))[:value.size] = value.ravel()\n"
        "        yield memory[name][:value.size].reshape(value.shape)\n"
        "def port(feeds):\n"
        "    return list(forward(feeds))\n"
    )
    checks = ("outputs", "prefix", "batch", "order", "causal", "determinism")
    port = f"{tmp_path / 'static_port.py'}:port"
    report = parity(Options(path, against=[port], ids=["5,17,30,2", "7,19"], engine="numpy", checks=checks))
    assert report.exit_code == 0, said(report)


def test_data_sets_of_one_name_are_two_cases(right: tuple[Path, Case, Arrays], tmp_path: Path) -> None:
    path, case, outputs = right
    wrong = {name: value + 1 for name, value in outputs.items()}
    folders = [tmp_path / name / "test_data_set_0" for name in ("wrong", "right")]
    for place, made in zip(folders, (wrong, outputs), strict=True):
        save_set(place, case.feeds, made)
    report = parity(Options(path, data=folders, engine="numpy"))
    assert {c.case for c in report.comparisons if not c.ok} == {"test_data_set_0"}
    assert {c.case for c in report.comparisons} == {"test_data_set_0", "test_data_set_0 (2)"}
    with pytest.raises(InputError, match="two cases are called 'ids'"):
        diff(str(path), "numpy", lambda m: iter([case, case]))  # type: ignore[arg-type,return-value]


WRONG: dict[str, object] = {
    "against": "ort", "prompts": [3], "ids": b"1", "rtol": 1e-3, "atol": [1e-3], "data": "folder", "random": 1.5,
    "seed": -1, "skip": True, "engine": None, "checks": ["output"], "noise_floor": "yes", "padding": 1, "model": 3,
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_options_of_another_type_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="must be|expected a path"):
        Options(**{"model": Path("model.onnx"), name: WRONG[name]})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("a", None), ("b", 3), ("cases", []), ("oracle", 1.5), ("preset", np.zeros(2)), ("rtol", "0.1"), ("atol", 1e-3),
        ("local", "x"), ("repro", 3), ("padding", None), ("replace", "embed"), ("digits", 2),
    ],
)  # fmt: skip
def test_arguments_of_diff_of_another_type_are_refused(
    right: tuple[Path, Case, Arrays], name: str, value: object
) -> None:
    with pytest.raises(InputError, match="must be|expected a path"):
        diff(**{"a": str(right[0]), "b": "numpy", "cases": lambda m: [right[1]], name: value})  # type: ignore[arg-type]
