"""Mistakes of a port, made in one tap of a right trace and saved by np.savez: `diff` must name tap and cause."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import gpt2np
import gpt2np.reference
from gpt2np.errors import ComparisonError, InputError, TraceError
from gpt2np.masks import MaskRule
from gpt2np.parity import capture, parties, trace
from gpt2np.parity.cases import Case, case_from_ids
from gpt2np.parity.diff import diff
from gpt2np.parity.subject import Subject

IDS = np.array([[5, 17, 300, 42, 7, 7, 1999, 64, 80, 3, 11, 512, 77, 1024, 9, 350]])
Taps = dict[str, np.ndarray]


def softmax(scores: np.ndarray, seen: np.ndarray) -> np.ndarray:
    scores = np.where(seen, scores, -np.inf)
    exps = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exps / exps.sum(axis=-1, keepdims=True)


def narrow(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).astype(np.float32)


def tanh_gelu(x: np.ndarray, k: float, c: float) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(k * (x + c * x**3)))


def norm(t: Taps, w: gpt2np.GPT2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x, ln = t["h.0.resid_post"], w.weights.h[1].ln_1
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5), ln.weight, ln.bias


def product(t: Taps, w: gpt2np.GPT2) -> np.ndarray:
    """attn.out with sums in float16, 16 terms at a time."""
    weight, bias = w.weights.h[1].attn.c_proj
    x, total = t["h.1.attn.heads"], np.zeros((*IDS.shape, 192), np.float16)
    for k in range(0, 192, 16):
        total = total + (narrow(x[..., k : k + 16]) @ narrow(weight[k : k + 16])).astype(np.float16)
    return total.astype(np.float32) + bias


LOWER = np.tril(np.ones((16, 16), bool))
CASES: dict[str, tuple[str, Callable[[Taps, gpt2np.GPT2], np.ndarray], str]] = {
    "positions all 0": ("embed", lambda t, w: w.weights.wte[IDS] + w.weights.wpe[[[0] * 16]], "positions"),
    "scaled embedding": (
        "embed",
        lambda t, w: w.weights.wte[IDS] * math.sqrt(192) + w.weights.wpe[None, :16],
        "scaled_embedding",
    ),
    "weight and bias swapped": ("h.1.ln_1", lambda t, w: norm(t, w)[0] * norm(t, w)[2] + norm(t, w)[1], "norm_form"),
    "bias first": ("h.1.ln_1", lambda t, w: (norm(t, w)[0] + norm(t, w)[2]) * norm(t, w)[1], "norm_form"),
    "norm left out": ("ln_f", lambda t, w: t["h.5.resid_post"], "missing_norm"),
    "heads not transposed": (
        "h.1.attn.heads",
        lambda t, w: t["h.1.attn.heads"].reshape(1, 16, 6, 32).swapaxes(1, 2).reshape(1, 16, 192),
        "head_split",
    ),
    "copied": ("h.2.attn.k", lambda t, w: t["h.1.attn.k"], "copied"),
    "never written": ("h.2.attn.v", lambda t, w: np.zeros_like(t["h.2.attn.v"]), "never_written"),
    "odd scale": ("h.1.attn.scores", lambda t, w: t["h.1.attn.scores"] * np.float32(2.3094), "scale"),
    "q times v": (
        "h.1.attn.scores",
        lambda t, w: t["h.1.attn.q"] @ t["h.1.attn.v"].swapaxes(-1, -2) / np.float32(math.sqrt(32)),
        "other_input",
    ),
    "masked too late": (
        "h.1.attn.probs",
        lambda t, w: softmax(t["h.1.attn.scores"], np.ones((16, 16), bool)) * LOWER,
        "softmax_form",
    ),
    "window": (
        "h.1.attn.probs",
        lambda t, w: softmax(t["h.1.attn.scores"], LOWER & ~np.tril(LOWER, -4)),
        "mask_shape",
    ),
    "overflow": (
        "h.1.attn.probs",
        lambda t, w: np.where(np.arange(16) == 3, np.float32(np.nan), t["h.1.attn.probs"]),
        "not_finite",
    ),
    "bias twice": ("h.1.attn.out", lambda t, w: t["h.1.attn.out"] + w.weights.h[1].attn.c_proj.bias, "bias_twice"),
    "float16 sums": ("h.1.attn.out", product, "imprecise"),
    "residual after the norm": (
        "h.1.resid_mid",
        lambda t, w: t["h.1.ln_1"] + t["h.1.attn.out"],
        "other_input",
    ),
    "clipped": ("h.1.resid_post", lambda t, w: t["h.1.resid_post"].clip(-2, 2), "clipped"),
    "int8 weights": (
        "h.1.mlp.c_fc",
        lambda t, w: (
            t["h.1.ln_2"] @ int8(w.weights.h[1].mlp.c_fc.weight).astype(np.float32) + w.weights.h[1].mlp.c_fc.bias
        ),
        "quantised",
    ),
    "silu": ("h.1.mlp.gelu", lambda t, w: t["h.1.mlp.c_fc"] / (1 + np.exp(-t["h.1.mlp.c_fc"])), "gelu_form"),
    "a wrong digit": ("h.1.mlp.gelu", lambda t, w: tanh_gelu(t["h.1.mlp.c_fc"], 0.797885, 0.44715), "gelu_constant"),
    "half left out": ("h.1.mlp.gelu", lambda t, w: 2 * t["h.1.mlp.gelu"], "gelu_form"),
    "odd factor": ("h.1.mlp.out", lambda t, w: t["h.1.mlp.out"] * np.float32(1.37), "factor"),
    "fp8": ("h.1.attn.heads", lambda t, w: fp8(t["h.1.attn.heads"]), "rounding"),
}


def int8(x: np.ndarray) -> np.ndarray:
    scale = np.abs(x).max(axis=0) / 127
    return np.rint(x / scale) * scale


def fp8(x: np.ndarray) -> np.ndarray:
    import ml_dtypes

    return x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


@pytest.fixture(scope="module")
def right(mini: Path) -> tuple[gpt2np.GPT2, Taps]:
    model = gpt2np.load(mini, engine="numpy")
    return model, model.trace(IDS, logits=False)


QUICK = {"norm left out", "copied", "q times v", "window", "overflow", "float16 sums", "a wrong digit", "int8 weights"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES])
def test_the_cause_is_named(name: str, right: tuple[gpt2np.GPT2, Taps], mini: Path, tmp_path: Path) -> None:
    model, taps = right
    tap, change, cause = CASES[name]
    wrong = {**taps, tap: np.asarray(change(taps, model), np.float32)}
    np.savez(tmp_path / "port.npz", **wrong)
    report = diff(str(mini), str(tmp_path / "port.npz"), cases)
    assert report.exit_code == 1
    found = report.details["diagnosis"]
    assert found["tap"] == tap
    assert found["guesses"][0]["cause"] == cause, [(g["cause"], g["text"], g["removed"]) for g in found["guesses"]]
    # an error without direction shows how precise the arithmetic was, not what made it so
    assert (f"most likely {cause}" in report.headline) == (cause != "imprecise")


def cases(model: Subject) -> list[Case]:
    return [case_from_ids(model, "ids", IDS)]


def test_plain_arrays_pass_where_they_are_right(right: tuple[gpt2np.GPT2, Taps], mini: Path, tmp_path: Path) -> None:
    _, taps = right
    np.savez(tmp_path / "port.npz", **{n: v[0] if n == "embed" else v for n, v in taps.items()})
    report = diff(str(mini), str(tmp_path / "port.npz"), cases)
    assert report.exit_code == 0
    assert any("port.npz was recorded on this input" in text for text in report.not_compared)


@pytest.mark.parametrize(
    ("arrays", "complaint"),
    [
        ({"layer1": np.zeros(3)}, "'layer1', neither an output"),
        (
            {"h.0.attn.q": np.zeros((1, 6, 16, 16), np.float32)},
            r"shape \(1, 6, 16, 16\), where \(B, H, T, D\) is \(1, 6, 16, 32\)",
        ),
    ],
)
def test_foreign_arrays_fail_with_what_is_wrong(arrays: Taps, complaint: str, mini: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "port.npz", **arrays)
    report = diff(str(mini), str(tmp_path / "port.npz"), cases)
    assert report.exit_code == 1
    with pytest.raises(ComparisonError, match=complaint):
        raise ComparisonError(report.comparisons[0].problem)


def test_arrays_of_text_are_refused(mini: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "port.npz", embed=np.array(["a"]))
    with pytest.raises(TraceError, match="not of numbers"):
        diff(str(mini), str(tmp_path / "port.npz"), cases)


def outputs(model: gpt2np.GPT2) -> dict[str, np.ndarray]:
    out = model(IDS, logits=False)
    return {"output1": out.last_hidden_state[None], **{f"output{i + 2}": np.array(p) for i, p in enumerate(out.past)}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda o: {**o, "output3": o["output3"][::-1]}, "output3 holds values in place of keys"),
        (lambda o: {**o, "output3": o["output4"], "output4": o["output3"]}, "output3 holds what belongs into output4"),
        (lambda o: {**o, "output5": np.stack([o["output5"][0, :, :, ::-1], o["output5"][1]])}, "reverse order, of the"),
        (lambda o: {**o, "output7": np.zeros_like(o["output7"])}, "output7 holds zeros: it was never written"),
    ],
)
def test_right_numbers_in_the_wrong_place(
    change: Callable[[Taps], Taps], said: str, right: tuple[gpt2np.GPT2, Taps], mini: Path, tmp_path: Path
) -> None:
    np.savez(tmp_path / "port.npz", **change(outputs(right[0])))
    report = diff(str(mini), str(tmp_path / "port.npz"), cases)
    assert report.exit_code == 1
    assert said in report.headline


def test_a_port_that_gives_outputs_alone(right: tuple[gpt2np.GPT2, Taps], mini: Path, tmp_path: Path) -> None:
    model, _ = right
    w = model.weights
    blocks = list(w.h)
    blocks[1] = blocks[1]._replace(attn=blocks[1].attn._replace(scale=1.0))
    caches = [np.zeros((2, 1, 6, 16, 32), np.float32) for _ in blocks]
    hidden = gpt2np.reference.transformer(IDS, np.arange(16)[None], w._replace(h=tuple(blocks)), caches)
    np.savez(tmp_path / "port.npz", output1=hidden[None], **{f"output{i + 2}": c for i, c in enumerate(caches)})
    report = diff(str(mini), str(tmp_path / "port.npz"), cases)
    assert report.exit_code == 1
    assert "first divergence h.1.attn.scores; most likely scale" in report.headline


def test_an_output_that_is_not_its_tap_is_not_called_noise(
    right: tuple[gpt2np.GPT2, Taps], mini: Path, tmp_path: Path
) -> None:
    model, taps = right
    made = outputs(model)
    made["output1"] = made["output1"] + np.float32(0.5)
    np.savez(tmp_path / "port.npz", **made, **taps)
    report = diff(str(mini), str(tmp_path / "port.npz"), cases)
    assert report.exit_code == 1
    assert "output1 is not what its taps are" in report.headline


def test_two_files_must_take_the_same_inputs(mini: Path) -> None:
    other = Path(__file__).parents[1] / "data" / "optimum_past.onnx"
    with pytest.raises(InputError, match=r"optimum_past.onnx takes .*input1: both must take the same inputs"):
        diff(str(mini), str(other), cases)


def test_nothing_given_is_nothing_compared(mini: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "port.npz")
    assert diff(str(mini), str(tmp_path / "port.npz"), cases).exit_code == 3


def test_plain_arrays_against_a_golden_trace(right: tuple[gpt2np.GPT2, Taps], mini: Path, tmp_path: Path) -> None:
    model, taps = right
    subject = Subject(mini / "model.onnx")
    golden = capture.record(subject, parties.Ours(subject, "numpy"), cases(subject)[0])
    trace.save(tmp_path / "golden.npz", golden)
    arrays = {**outputs(model), "h.0.ln_1": taps["h.0.ln_1"]}
    np.savez(tmp_path / "port.npz", **arrays)
    two = str(tmp_path / "golden.npz"), str(tmp_path / "port.npz")
    report = diff(*two, cases)
    assert report.exit_code == 0
    assert {c.output for c in report.comparisons} == set(arrays)
    np.savez(tmp_path / "port.npz", **{**arrays, "h.0.ln_1": arrays["h.0.ln_1"] + 1})
    assert "h.0.ln_1" in diff(*two, cases).headline


def nothing(feeds: Taps) -> Taps:
    return {}


def breaks(feeds: Taps) -> Taps:
    raise SystemExit(0)


def cut(feeds: Taps) -> Taps:
    ids = feeds["input1"][0]
    return {"output1": np.zeros((1, *ids.shape, 192), np.float32)[:, :, :-1]}


@pytest.mark.parametrize(("name", "code"), [("nothing", 3), ("breaks", 1), ("cut", 1)])
def test_a_function_that_gives_no_result_never_passes(name: str, code: int, mini: Path) -> None:
    assert diff(str(mini), f"test_parity_causes:{name}", cases).exit_code == code


@pytest.mark.parametrize("command", [["parity", "--json"], ["diff", "a", "b", "--junit"], ["trace", "--random", "-o"]])
def test_a_file_that_cannot_be_written_is_said_before_the_work(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpt2np.cli import main

    monkeypatch.setattr("sys.argv", ["gpt2np", *command, str(tmp_path / "nowhere" / "report")])
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capsys.readouterr()
    assert end.value.code == 2
    assert "nowhere is no folder" in err
    assert not out


@pytest.mark.parametrize(("error", "code"), [(PermissionError(13, "Permission denied", "/x"), 2), (KeyError("x"), 70)])
def test_a_crash_is_never_taken_for_a_failed_comparison(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gpt2np import cli

    def fails(**options: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fails)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == code
    assert ("Traceback" in capsys.readouterr().err) == (code == 70)


def test_the_repro_of_a_mask_that_replaces_scores(mini: Path, tmp_path: Path) -> None:
    import onnxruntime as ort

    from gpt2np.call import Call
    from gpt2np.onnx.read.datasets import load_set
    from gpt2np.parity.program import Program
    from gpt2np.parity.repro import dump

    program = Subject(mini / "model.onnx").program
    program = program.with_(mask=MaskRule(value=-2.0))  # it shows: later keys keep a share
    assert isinstance(program, Program)
    scores = np.random.default_rng(0).standard_normal((1, 6, 16, 16))
    dump(tmp_path, program, Call(IDS, np.arange(16)[None]), "h.1.attn.probs", [scores], None)
    data = load_set(tmp_path / "test_data_set_0")
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (probs,) = session.run(None, data.inputs)
    expected = softmax(np.where(LOWER, scores, -2.0), np.ones((16, 16), bool))
    np.testing.assert_allclose(probs, expected, rtol=1e-5, atol=1e-7)
