"""Files that search for a continuation: found, run as ONNX Runtime runs them, compared, and refused where unknown."""

from __future__ import annotations

import json
import sys

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

import gpt2np
from gpt2np import InferenceSession
from gpt2np.cli import app
from gpt2np.errors import ContextOverflowError, InputError, UnsupportedModelError
from runtime import runtime, since
from search_files import DECODER, EOS, WIDTH, loop_file, node_feeds, node_file


def run_cli(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def loop(tmp_path_factory):
    return loop_file(tmp_path_factory.mktemp("loop") / "model.onnx")


@pytest.fixture(scope="module")
def beam(tmp_path_factory):
    return node_file(tmp_path_factory.mktemp("beam") / "model.onnx", "BeamSearch", outputs=3)


def loop_feeds(T: int, new: int, seed: int = 0, hidden: int = 0) -> dict[str, np.ndarray]:
    mask = np.ones((1, T), np.float32)
    mask[:, :hidden] = 0
    ids = np.random.default_rng(seed).integers(0, 64, (1, T))
    return {"input_ids": ids, "attention_mask": mask, "new_tokens": np.array(new)}


@pytest.mark.parametrize("engine", ["numpy", "numba"])
def test_a_loop_gives_the_sequences_of_onnx_runtime(loop, engine):
    ours, theirs = InferenceSession(loop, engine=engine), runtime(loop)
    assert [p.name for p in ours.get_inputs()] == ["input_ids", "attention_mask", "new_tokens"]
    assert [(p.name, p.type) for p in ours.get_outputs()] == [("last_results", "tensor(int64)")]
    ended = 0
    for seed in range(14):
        T = 1 + seed % 6
        feeds = loop_feeds(T, 1 + seed % 9, seed, hidden=min(seed % 3, T - 1))
        (got,), (expected,) = ours.run(None, feeds), theirs.run(None, feeds)
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected, str(feeds))
        ended += (expected[:, T:] == EOS).any()
    assert ended > 1  # beams that end are among them


def defined(sequences: np.ndarray, feeds: dict[str, np.ndarray]) -> int:
    """Up to where the last sequence ends: behind it ONNX Runtime's greedy search leaves what was in memory."""
    T = feeds["input_ids"].shape[1]
    over = (sequences[:, T:] == EOS).all(axis=0)
    return T + int(over.argmax()) + 1 if over.any() else sequences.shape[1]


OUTER_WEIGHTS = pytest.param({"outer_weights": True}, marks=since("1.28", "weights outside the decoder's body"))


@pytest.mark.parametrize("kind", ["BeamSearch", "GreedySearch"])
@pytest.mark.parametrize("how", [{}, {"early_stopping": 1, "no_repeat_ngram_size": 2}, OUTER_WEIGHTS])
def test_search_nodes_give_the_sequences_of_onnx_runtime(tmp_path, kind, how):
    if kind == "GreedySearch":
        how = {name: given for name, given in how.items() if name != "early_stopping"}
    path = node_file(tmp_path / "model.onnx", kind, **how, outputs=3 if kind == "BeamSearch" else 1)
    ours, theirs = InferenceSession(path, engine="numpy"), runtime(path)
    rng = np.random.default_rng(1)
    for _ in range(12):
        feeds = node_feeds(kind, rng)
        got, expected = ours.run(None, feeds), theirs.run(None, feeds)
        stop = defined(got[0], feeds) if kind == "GreedySearch" else None
        np.testing.assert_array_equal(got[0][:, :stop], expected[0][:, :stop], str(feeds))
        assert got[0].dtype == expected[0].dtype
        for a, b in zip(got[1:2], expected[1:2], strict=True):
            np.testing.assert_allclose(a, b, 1e-4, 1e-4)


@pytest.mark.parametrize(
    ("name", "penalty"),
    [("length_penalty", p) for p in (1e38, 40, -40, -np.inf)] + [("repetition_penalty", p) for p in (1e38, np.inf)],
)
def test_absurd_penalties_mean_what_they_mean_to_onnx_runtime(beam, name, penalty):
    """Powers of the length and products that are infinite or 0 in float32."""
    feeds = node_feeds("BeamSearch", np.random.default_rng(2)) | {name: np.array([penalty], np.float32)}
    got, expected = InferenceSession(beam, engine="numpy").run(None, feeds), runtime(beam).run(None, feeds)
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_allclose(got[1], expected[1], 1e-4)


def test_a_file_that_searches_is_a_model_too(loop, beam):
    plain = gpt2np.load(DECODER, engine="numpy")
    for path in (loop, beam):
        model = gpt2np.load(path, engine="numpy")
        assert model.config == plain.config
        assert np.array_equal(model([[1, 2, 3]]).logits, plain([[1, 2, 3]]).logits)


def test_info_says_how_a_file_searches(loop, beam):
    told = json.loads(run_cli("info", loop, "--json").output)
    assert told["search"]["described"].startswith(f"beam search, width {WIDTH}, end-of-text token {EOS};")
    assert [p["role"] for p in told["inputs"]] == ["input_ids", "attention_mask", "new_tokens"]
    assert {p["role"] for p in told["search"]["decoder_inputs"]} >= {"input_ids", "position_ids", "past"}
    told = json.loads(run_cli("info", beam, "--json").output)
    assert "input 'num_beams'" in told["search"]["described"]
    assert f"beam search, width {WIDTH}" in run_cli("info", loop).output


def test_parity_compares_sequences_and_the_model_inside(loop, beam, tmp_path):
    greedy = node_file(tmp_path / "model.onnx", "GreedySearch")
    for path in (loop, beam, greedy):
        report = tmp_path / "report.json"
        done = run_cli("parity", path, "--random", "2", "--engine", "numpy", "--json", report)
        assert done.exit_code == 0, done.output
        compared = {(c["case"].split(",")[0], c["output"]) for c in json.loads(report.read_text())["comparisons"]}
        assert ("inside", "og_logits" if path == loop else "logits") in compared
        assert any(output in ("last_results", "sequences") for _, output in compared)


def test_one_wrong_token_fails(loop, tmp_path):
    """No budget excuses a token, be it as large as its number."""
    folder = loop.parent / "test_data_set_0"
    folder.mkdir()
    feeds = loop_feeds(4, 5)
    (right,) = runtime(loop).run(None, feeds)
    for k, (name, array) in enumerate(feeds.items()):
        (folder / f"input_{k}.pb").write_bytes(onnx.numpy_helper.from_array(array, name).SerializeToString())

    def parity(sequences):
        tensor = onnx.numpy_helper.from_array(sequences, "last_results")
        (folder / "output_0.pb").write_bytes(tensor.SerializeToString())
        return run_cli("parity", loop, "--engine", "numpy", "--rtol", "0.1").exit_code

    wrong = right.copy()
    wrong[2, -1] += 1
    assert (parity(right), parity(wrong)) == (0, 1)


def test_convert_writes_the_model_inside(loop, tmp_path):
    done = run_cli("convert", loop, "-o", tmp_path / "out", "--lm-head")
    assert done.exit_code == 0, done.output
    plain, out = gpt2np.load(DECODER, engine="numpy"), gpt2np.load(tmp_path / "out", engine="numpy")
    np.testing.assert_allclose(out([[1, 2]]).logits, plain([[1, 2]]).logits, 1e-5, 1e-5)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("max_length", 3, "max_length is 3; expected 5 to 17"),
        ("max_length", 18, "max_length is 18"),
        ("num_beams", 0, "num_beams is 0"),
        ("num_return_sequences", 4, "num_return_sequences is 4; expected 1 to 3"),
        ("repetition_penalty", 0, "repetition_penalty is 0"),
        ("min_length", 9, "min_length is 9"),
    ],
)
def test_settings_out_of_range_are_errors_before_any_work(beam, monkeypatch, name, given, message):
    monkeypatch.setattr("gpt2np.reference.transformer", lambda *a: pytest.fail("work was done"))
    feeds = {
        "input_ids": np.ones((1, 4), np.int32), "max_length": [9], "min_length": [0], "num_beams": [3],
        "num_return_sequences": [1], "length_penalty": [1.0], "repetition_penalty": [1.0],
        "vocab_mask": np.ones(64, np.int32), name: [given],
    }  # fmt: skip
    feeds = {n: np.asarray(v, np.float32 if "penalty" in n else np.int32) for n, v in feeds.items()}
    with pytest.raises(InputError, match=message):
        InferenceSession(beam, engine="numpy").run(None, feeds)


def test_too_many_tokens_are_an_error(loop):
    with pytest.raises(ContextOverflowError):
        InferenceSession(loop, engine="numpy").run(None, loop_feeds(10, 30))


@pytest.mark.skipif(sys.platform != "linux", reason="ONNX Runtime draws other numbers with other C++ libraries")
@pytest.mark.parametrize(
    "how",
    [{"top_p": 0.7, "temperature": 1.3}, {"top_p": 0.3, "min_tokens_to_keep": 3}, {"top_p": 0.5, "temperature": 1e-6}],
)
def test_sampling_draws_what_onnx_runtime_draws(tmp_path, how):
    path = node_file(tmp_path / "model.onnx", "Sampling", **how)
    ours, theirs = InferenceSession(path, engine="numpy"), runtime(path)
    rng = np.random.default_rng(0)
    compared = 0
    for seed in range(14):
        feeds = {**node_feeds("Sampling", rng), "seed": np.array([seed * 12345], np.int32)}
        (got,), (expected,) = ours.run(None, feeds), theirs.run(None, feeds)
        stop = defined(got, feeds)
        np.testing.assert_array_equal(got[:, :stop], expected[:, :stop], str(feeds))
        compared += stop - feeds["input_ids"].shape[1]
    assert compared > 30


def test_a_temperature_that_no_score_can_be_divided_by_is_an_error(tmp_path):
    path = node_file(tmp_path / "model.onnx", "Sampling", top_p=0.5, temperature=1e-42)
    feeds = {**node_feeds("Sampling", np.random.default_rng(0)), "seed": np.array([1], np.int32)}
    with pytest.raises(InputError, match=r"temperature of 1.*e-42"):
        InferenceSession(path, engine="numpy").run(None, feeds)


@pytest.mark.parametrize("how", [{"custom": 1}, {"presence_penalty": 0.5}])
def test_sampling_that_is_not_known_is_refused(tmp_path, how):
    with pytest.raises(UnsupportedModelError, match=next(iter(how))):
        InferenceSession(node_file(tmp_path / "model.onnx", "Sampling", **how), engine="numpy")


def test_a_loop_that_is_no_search_is_refused(tmp_path):
    def no_log_softmax(body):
        next(n for n in body.node if n.op_type == "LogSoftmax").op_type = "Softmax"

    def unknown_operator(body):
        next(n for n in body.node if n.op_type == "TopK").op_type = "Unknown"

    with pytest.raises(UnsupportedModelError, match="0 LogSoftmax nodes"):
        gpt2np.load(loop_file(tmp_path / "a.onnx", no_log_softmax), engine="numpy")
    with pytest.raises(UnsupportedModelError, match="Unknown"):
        InferenceSession(loop_file(tmp_path / "b.onnx", unknown_operator), engine="numpy")


def test_the_zoos_own_exporter(request):
    """bs12.onnx was made by the code that made gpt2-lm-head-bs-12."""
    folder = request.config.rootpath.parent / "shared" / "cases"
    if not folder.is_dir():
        pytest.skip("no ../shared/cases on this machine")
    session = InferenceSession(folder / "bs12.onnx", engine="numpy")
    for case in json.loads((folder / "bs12.expected.json").read_text()):
        feeds = {
            "input_ids": np.array(case["input_ids"]),
            "attention_mask": np.array(case["attention_mask"], np.float32),
            "out_token_num": np.array(case["out_token_num"]),
        }
        assert session.run(None, feeds)[0].tolist() == case["output"]
