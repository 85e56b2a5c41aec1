"""Parts of the search for a cause by themselves: where an error is, what may be called likely, what time allows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gpt2np.activations import gelu_erf
from gpt2np.call import Call
from gpt2np.parity.cases import case_from_ids
from gpt2np.parity.diff import diff
from gpt2np.parity.explain.problem import Clock, Guess, Problem, name_likely
from gpt2np.parity.explain.rank import promising, rank
from gpt2np.parity.explain.where import describe
from gpt2np.parity.program import Program
from gpt2np.parity.subject import Subject
from gpt2np.parity.text import sentences
from tiny import random_ids, tiny_config, tiny_sources


@pytest.mark.parametrize(
    ("axes", "past", "part", "said"),
    [
        ("B T C", 0, np.s_[:, 5], "only position 5"),
        ("B T C", 0, np.s_[..., 17], "only column 17"),
        ("B H T D", 0, np.s_[:, 2, 3:], "only head 2, positions from 3 on"),
        ("B T C", 0, np.s_[1], "only batch row 1"),
        ("B T C", 0, np.s_[1, 4, 7], "one number of 480: [1, 4, 7]"),
        ("B H T S", 4, np.s_[..., :4], "only the keys of the past"),
        ("B T C", 0, np.s_[:, ::2], "only every 2nd position from 0 on"),
        ("B T C", 0, np.s_[:], ""),
    ],
)
def test_where_inside_an_array_is_said_in_words(axes: str, past: int, part: object, said: str) -> None:
    shapes = {"B T C": (2, 12, 20), "B H T D": (2, 4, 6, 8), "B H T S": (2, 3, 5, 9)}
    error = np.zeros(shapes[axes])
    error[part] = 1.0  # type: ignore[index]
    assert describe(error + 1e-9, 1e-6, axes, past) == said


def guess(cause: str, removed: float, **fields: object) -> Guess:
    return Guess(cause, "embed", cause, removed=removed, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("guesses", "likely"),
    [
        ([guess("a", 0.999, explains=True)], True),
        ([guess("a", 0.57)], False),
        ([guess("a", 0.95)], True),
        ([guess("a", 0.95), guess("b", 0.9)], False),  # b leaves twice as much: a rival
        ([guess("a", 0.95), guess("b", 0.2)], True),
        ([guess("a", 0.95, fitted=1)], False),  # what is fitted has to explain everything
    ],
)
def test_most_likely_is_said_only_of_what_leaves_noise_or_has_no_rival(guesses: list[Guess], likely: bool) -> None:
    name_likely(guesses)
    assert guesses[0].likely == likely


def problem(clock: Clock) -> Problem:
    config = tiny_config()
    program = Program.of(config, tiny_sources(config))
    ids = random_ids(config, 1, 9)
    call = Call(ids, np.arange(9)[None])
    right = dict(program.walk(call))
    x = right["h.0.ln_2"] @ program.weights("h.0.mlp.c_fc.weight", np.dtype(np.float64))
    given = {"h.0.ln_2": right["h.0.ln_2"]}
    return Problem(program, call, given, {"h.0.mlp.c_fc": x.astype(np.float32)}, ["h.0.mlp.c_fc"], clock)


def test_a_search_ends_when_its_time_is_used_up_and_tells_how_far_it_is() -> None:
    tried: list[tuple[float, str]] = []
    found = rank(problem(Clock(60, lambda share, doing: tried.append((share, doing)))))
    assert [found[0].cause, found[0].likely] == ["missing_bias", True]
    assert all(0 <= share <= 1 for share, _ in tried)
    assert any("bias were missing" in doing for _, doing in tried)
    assert not rank(problem(Clock(0.0)))


class Counted(Clock):
    """A clock that goes on by one whenever it is looked at."""

    looks = 0

    @property
    def used(self) -> float:
        self.looks += 1
        return float(self.looks)


@pytest.mark.parametrize("seconds", [200.0, 2000.0])
def test_the_time_of_a_search_is_a_hard_limit_wherever_it_is(seconds: float) -> None:
    """Nothing explains this error, so that every stage is reached; each operation asks the clock whether it may run."""
    clock = Counted(seconds)
    one = problem(clock)
    one.observed["h.0.mlp.c_fc"] += 0.3 * np.sin(7 * one.observed["h.0.mlp.c_fc"])
    one.before = one.error(one.values)
    found = rank(one)
    assert clock.looks <= seconds + 8
    assert not any(g.likely for g in found)
    assert clock.limit == float("inf")


def test_a_guess_that_gives_another_width_is_not_ranked_by_the_error_it_makes() -> None:
    """Of large vocabularies some columns are looked at; that the head were wte gives all of them."""
    config = tiny_config()
    whole = Program.of(config, tiny_sources(config))
    head = whole.weights("wte.weight", np.dtype(np.float64))[::3]
    program = whole.with_({"lm_head.weight": head}, tied=False)
    call = Call(random_ids(config, 1, 9), np.arange(9)[None])
    logits = dict(program.walk(call))["logits"]
    found = Problem(program, call, {}, {"logits": 1.5 * logits}, ["ln_f", "logits"])
    assert all(g.cause != "untied_head" for g in promising(found))


def test_a_sentence_is_the_same_whichever_of_the_two_is_at_fault() -> None:
    one = Guess("epsilon_value", "ln_f", "epsilon were 1e-06", "1e-05")
    assert one.sentence("port.npz") == "port.npz behaves as if epsilon were 1e-06; the model has 1e-05"
    assert one.sentence("the file") == "what was recorded behaves as if epsilon were 1e-06; the file has 1e-05"


def test_a_mistake_in_one_layer_is_found_by_the_last_output_of_a_large_model(mini: Path, tmp_path: Path) -> None:
    """One backward pass over the error says which of all mistakes at single operations are worth a whole run."""
    if not (mini / "model.onnx").is_file():
        pytest.skip("weights/mini is not there")
    model = Subject(mini / "model.onnx")
    case = case_from_ids(model, "ids", np.random.default_rng(0).integers(0, model.config.vocab_size, (1, 24)))
    wrong = model.program.with_(runs={"h.3.mlp.gelu": lambda p, call, tap, x, dtype: gelu_erf(x[0])})
    hidden = dict(wrong.walk(model.call(case.feeds), np.float32, until="ln_f"))["ln_f"]
    np.savez(tmp_path / "port.npz", output1=hidden[None])
    report = diff(str(mini), str(tmp_path / "port.npz"), lambda m: [case])
    assert report.diagnosis is not None
    best = report.diagnosis.guesses[0]
    assert (best.tap, best.cause, best.likely) == ("h.3.mlp.gelu", "gelu_form", True)
    told = report.details["diagnosis"]["guesses"][0]["sentence"]
    assert told.startswith("port behaves as if the activation were")
    assert next(s.text for s in sentences(report) if s.label == "why").endswith(told)  # JSON and text say the same
