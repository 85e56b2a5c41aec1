"""Scoring against the definitions in float64, in windows of every kind, stopped and gone on with."""

import json
import math
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2np.errors import InputError, TokenizerError, TokenRangeError
from gpt2np.score import LastWordScoring, Progress, TextScoring, predictions, read_passages, windows
from gpt2np.tokenizer import encode
from tiny import tiny_model
from toy_model import TOY, toy_model

ENGINES = ["numpy", pytest.param("numba", marks=pytest.mark.jit)]
TEXT = "Once upon a time there was a king — naïve as he was 🙂.\n\nHe said: 'we'll see what the time is!' " * 4


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def by_definition(model, ids, window, stride):
    """The recipe of Hugging Face's guide, one window at a time, summed over tokens."""
    logs, previous_end = [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        predicted = log_softmax(model(ids[begin:end]).logits[0])[:-1]  # of ids[begin + 1 : end]
        each = np.take_along_axis(predicted, np.array(ids[begin + 1 : end])[:, None], axis=1)[:, 0]
        new = end - previous_end  # target length: the rest of the labels is masked
        logs += each[-new:].tolist() if new < end - begin else each.tolist()
        previous_end = end
        if end == len(ids):
            break
    return logs


def run(scoring):
    for _ in scoring:
        pass
    return scoring.result


@pytest.mark.parametrize(("window", "stride"), [(60, 30), (60, 60), (60, 1), (13, 5), (2, 1), (60, 59)])
def test_float64_is_the_definition(window, stride):
    model = toy_model(dtype="float64")
    expected = by_definition(model, encode(TOY, TEXT), window, stride)
    result = run(TextScoring(model, TEXT, window, stride, batch_size=3))
    assert result.scored == len(expected)
    np.testing.assert_allclose(result.log_likelihood, sum(expected), rtol=1e-12)
    if stride < window:
        assert result.scored == result.tokens - 1


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_float32_is_as_exact_as_its_logits(engine, batch_size):
    exact = run(TextScoring(toy_model(dtype="float64"), TEXT, 40, 17))
    result = run(TextScoring(toy_model(engine), TEXT, 40, 17, batch_size))
    np.testing.assert_allclose(result.log_likelihood, exact.log_likelihood, rtol=1e-6)
    assert (result.tokens, result.words, result.bytes) == (exact.tokens, exact.words, exact.bytes)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_what_was_generated_has_the_same_bits_when_it_is_scored(options):
    model = toy_model("numba")
    prompt = encode(TOY, "Once upon a time")
    steps = list(model.generate(prompt, 12, eos_token_id=(), logprobs=0 if options else 3, **options))
    ((logs, best),) = predictions(model, [([*prompt, *(step.token_id for step in steps)], len(prompt))])
    assert [step.logprob for step in steps] == logs.tolist()
    if not options:
        assert best.all()
        assert [step.top[0] for step in steps] == [(step.token_id, step.logprob) for step in steps]


def test_what_the_numbers_mean():
    result = run(TextScoring(toy_model(), TEXT))
    nll = -result.log_likelihood
    assert result.tokens == len(encode(TOY, TEXT))
    assert result.words == len(TEXT.split())
    assert result.bytes == len(TEXT.encode())
    assert result.log_likelihood_per_token == -nll / result.scored
    assert result.perplexity == math.exp(nll / result.scored)
    assert result.perplexity_per_word == math.exp(nll / result.words)
    assert result.perplexity_per_byte == math.exp(nll / result.bytes)
    assert math.isclose(2**result.bits_per_byte, result.perplexity_per_byte)


def test_a_uniform_model_has_the_vocabulary_as_its_perplexity():
    model = toy_model()
    model._kernels = _flat(model)
    result = run(TextScoring(model, TEXT, 20, 7))
    np.testing.assert_allclose(result.perplexity, TOY.get_vocab_size(), rtol=1e-6)


def _flat(model, favourite=0):
    """All tokens alike, but for a first choice when one is given."""

    class Kernels:
        transformer = staticmethod(model._kernels.transformer)
        log_probabilities = staticmethod(model._kernels.log_probabilities)

        @staticmethod
        def logits(hidden, *_):
            scores = np.full((*hidden.shape[:2], model.config.vocab_size), 3, np.float32)
            scores[..., favourite] += favourite > 0
            return scores

    return Kernels


@given(st.integers(2, 200), st.integers(2, 50), st.data())
def test_every_token_is_scored_once(tokens, window, data):
    stride = data.draw(st.integers(1, window))
    scored = []
    for begin, first, end in windows(tokens, window, stride):
        assert begin < first < end <= begin + window
        assert first == 1 or first - begin >= min(window - stride, 1)
        scored += range(first, end)
    assert scored == sorted(set(scored))
    left_out = set(range(tokens)) - set(scored)
    assert left_out == ({0} if stride < window else set(range(0, tokens, stride)))


@pytest.mark.parametrize("engine", ENGINES)
def test_predictions_do_not_depend_on_the_batch(engine):
    model = tiny_model(engine)
    rng = np.random.default_rng(0)
    rows = [(rng.integers(0, 37, n).tolist(), first) for n, first in ((20, 1), (5, 4), (12, 6), (2, 1))]
    together = predictions(model, rows)
    for row, (logs, best) in zip(rows, together, strict=True):
        ids, first = row
        ((alone, alone_best),) = predictions(model, [row])
        assert len(logs) == len(best) == len(ids) - first
        assert best.tolist() == alone_best.tolist()
        if engine == "numba":
            assert logs.tobytes() == alone.tobytes()
        else:
            np.testing.assert_allclose(logs, alone, atol=1e-5)
        logits = model(ids).logits[0, first - 1 : -1].astype(np.float64)
        np.testing.assert_allclose(logs, log_softmax(logits)[range(len(logs)), ids[first:]], atol=1e-5)
        assert best.tolist() == (logits.argmax(axis=-1) == ids[first:]).tolist()


def test_a_large_vocabulary_is_looked_at_in_parts(monkeypatch):
    model = toy_model()
    whole = run(TextScoring(model, TEXT, 40, 20))
    monkeypatch.setattr("gpt2np.score.CHUNK", 8 * 3 * TOY.get_vocab_size())  # three positions at once
    np.testing.assert_allclose(run(TextScoring(model, TEXT, 40, 20)).log_likelihood, whole.log_likelihood, rtol=1e-6)


# ---------------------------------------------------------------------------------------------- resume


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path):
    file = tmp_path / "progress.json"
    model = toy_model()
    whole = run(TextScoring(model, TEXT, 20, 5, 2))

    stopped = TextScoring(model, TEXT, 20, 5, 2, progress=Progress(file))
    assert sum(islice(stopped, 3)) == stopped.done > 0
    part = stopped.result
    assert part.scored == stopped.done == part.tokens - 1
    assert TEXT.encode().startswith(TOY.decode(encode(TOY, TEXT)[: part.tokens]).encode()[:-3])
    assert (part.words, part.bytes) < (whole.words, whole.bytes)

    later = TextScoring(model, TEXT, 20, 5, 2, progress=Progress(file))
    assert later.done == stopped.done
    assert len(list(later)) == len(list(TextScoring(model, TEXT, 20, 5, 2))) - 3
    assert later.result == whole
    finished = TextScoring(model, TEXT, 20, 5, 2, progress=Progress(file))
    assert list(finished) == []
    assert finished.result == whole
    assert [p.name for p in tmp_path.iterdir()] == ["progress.json"]


def test_without_a_file_nothing_is_taken_over():
    nowhere = Progress(None)
    first = run(TextScoring(toy_model(), TEXT, progress=nowhere))
    second = TextScoring(toy_model(), TEXT[::-1], progress=nowhere)
    assert second.done == 0
    assert run(second) != first


@pytest.mark.parametrize("change", ["text", "window", "stride", "weights"])
def test_another_run_starts_afresh(tmp_path: Path, change):
    progress = Progress(tmp_path / "progress.json")
    run(TextScoring(toy_model(), TEXT, 20, 5, progress=progress))
    model = toy_model(n_ctx=61) if change == "weights" else toy_model()
    other = TextScoring(
        model,
        TEXT + "x" * (change == "text"),
        21 if change == "window" else 20,
        4 if change == "stride" else 5,
        progress=Progress(tmp_path / "progress.json"),
    )
    assert other.done == 0
    run(other)
    # and the first one's results are still there
    assert TextScoring(toy_model(), TEXT, 20, 5, progress=Progress(tmp_path / "progress.json")).done > 0


@pytest.mark.parametrize(
    "content", ["", "no json", "[]", '{"other": 1}', '{"gpt2np score": []}', '{"gpt2np score": {"x": 5}}']
)
def test_a_foreign_file_is_not_overwritten(tmp_path: Path, content):
    file = tmp_path / "notes.json"
    file.write_text(content)
    with pytest.raises(InputError, match="not a progress file"):
        Progress(file)
    assert file.read_text() == content


def test_a_place_that_cannot_be_written_is_an_error_at_once(tmp_path: Path):
    for place in (tmp_path / "no_such_folder" / "p.json", tmp_path):
        with pytest.raises(InputError, match="cannot keep progress in"):
            Progress(place)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_lost_on_the_way_is_an_error(tmp_path: Path):
    folder = tmp_path / "folder"
    folder.mkdir()
    scoring = TextScoring(toy_model(), TEXT, 20, 5, progress=Progress(folder / "p.json"))
    folder.rmdir()
    with pytest.raises(InputError, match="cannot keep progress in"):
        list(scoring)


# ------------------------------------------------------------------------------------------ last words

PASSAGES = ["Once upon a time there was a little girl", "The king said: we'll see the sea\n", "a  bé 🙂"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_last_words_by_definition(engine, batch_size):
    model = toy_model(engine)
    correct, log_likelihood = 0, 0.0
    for passage, context, word in zip(
        PASSAGES,
        ["Once upon a time there was a little", "The king said: we'll see the", "a  bé"],
        [" girl", " sea", " 🙂"],
        strict=True,
    ):
        assert passage.split()[-1] == word.strip()
        ids, target = encode(TOY, context), encode(TOY, word)
        right = True
        for token in target:
            logits = model(ids).logits[0, -1].astype(np.float64)
            right &= int(logits.argmax()) == token
            log_likelihood += log_softmax(logits)[token]
            ids.append(token)
        correct += right
    result = run(LastWordScoring(model, PASSAGES, batch_size))
    assert (result.passages, result.correct) == (3, correct)
    np.testing.assert_allclose(result.log_likelihood, log_likelihood, rtol=1e-5)
    assert result.accuracy == correct / 3
    assert math.isclose(result.perplexity, math.exp(-result.log_likelihood / 3))


def test_a_word_that_is_guessed_counts():
    model = toy_model()
    (the,) = encode(TOY, " the")
    model._kernels = _flat(model, the)
    result = run(LastWordScoring(model, ["Once upon the", "Once upon the ", "Once upon a time"]))
    assert (result.passages, result.correct) == (3, 2)


def test_a_passage_longer_than_the_context_loses_its_beginning():
    model = toy_model()
    n_ctx = model.config.n_ctx
    passage = " ".join(["king"] * 200) + " girl"
    ids = [*encode(TOY, " ".join(["king"] * 200)), *encode(TOY, " girl")]
    n = len(encode(TOY, " girl"))
    ((logs, _),) = predictions(model, [(ids[-n_ctx:], n_ctx - n)])
    assert run(LastWordScoring(model, [passage])).log_likelihood == math.fsum(logs)


def test_last_words_go_on_too(tmp_path: Path):
    file = tmp_path / "p.json"
    whole = run(LastWordScoring(toy_model(), PASSAGES, 1))
    stopped = LastWordScoring(toy_model(), PASSAGES, 1, progress=Progress(file))
    next(iter(stopped))
    later = LastWordScoring(toy_model(), PASSAGES, 1, progress=Progress(file))
    assert later.done == 1
    assert run(later) == whole


def test_reading_passages():
    assert read_passages('{"text": "a b"}\n\n{"text": "c d", "n": 1}\r\n') == ["a b", "c d"]
    for bad in ("no json", '"text"', '{"txt": 1}', "[1]", '{"text": 5}', '{"text": null}', '{"text": "a"}'):
        with pytest.raises(InputError, match="line 2"):
            read_passages(json.dumps({"text": "a b"}) + "\n" + bad)


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, r"window must be in 2\.\.60"),
        ({"window": 61}, r"window must be in 2\.\.60"),
        ({"window": 10, "stride": 11}, r"stride must be in 1\.\.10"),
        ({"stride": 0}, "stride"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 1.5}, "batch_size must be a whole number"),
        ({"window": "a"}, "window must be a whole number"),
        ({"stride": 1.0}, "stride must be a whole number"),
        ({"progress": "progress.json"}, "progress must be a Progress, got str"),
        ({"tokenizer": "tokenizer.json"}, "a tokenizer is what"),
        ({"text": "a"}, "two tokens"),
        ({"text": ""}, "two tokens"),
    ],
)
def test_bad_arguments(options, message):
    model = toy_model()
    model._kernels = None  # any work would fail
    with pytest.raises(InputError, match=message):
        TextScoring(model, **{"text": TEXT, **options})


def test_bad_passages():
    for passages, message in (
        ([], "there is no passage"),
        ("a word", "passages must be a sequence of strings"),
        ([b"a word"], "passages must be a sequence of strings"),
        (["word"], "passage 1 of 1"),
        (["a b", " "], "passage 2 of 2"),
    ):
        with pytest.raises(InputError, match=message):
            LastWordScoring(toy_model(), passages)


def test_the_tokenizer_must_be_there_and_fit():
    with pytest.raises(TokenizerError, match="--tokenizer"):
        TextScoring(tiny_model("numpy"), TEXT)
    with pytest.raises(TokenRangeError, match="not this model's tokenizer"):
        TextScoring(tiny_model("numpy"), TEXT, tokenizer=TOY)
