"""Several Python threads that use one model at the same moment get the bits that one gets.

On Python with a global lock they take turns between compiled kernels; without it (a free-threaded build) all of this
runs at once.
"""

import sys
import threading

import numpy as np
import pytest

from gpt2np.embed import embed
from gpt2np.fingerprint import WAYS, digest, texts
from gpt2np.generate import generate
from gpt2np.model import load
from gpt2np.score import TextScoring
from gpt2np.session import InferenceSession
from toy_model import write_toy

TEXT = "Once upon a time there was a king, and the king had a daughter. " * 3
AT_ONCE = 4


def steps(model, **options):
    return [(step.token_id, step.logprob) for step in generate(model, TEXT[:20], 8, eos_token_id=(), **options)]


def score(model):
    scoring = TextScoring(model, TEXT, 20, 10)
    for _ in scoring:
        pass
    return scoring.result


def arrays(model):
    return [row["last_hidden_state"].tobytes() for row in embed(model, TEXT.split())]


JOBS = {
    **{name: lambda model, way=way: digest(way(model, texts(model))) for name, way in WAYS.items()},
    "greedy": steps,
    "sampling": lambda model: steps(model, temperature=0.8, top_k=9, top_p=0.9, repetition_penalty=1.2, seed=3),
    "beams": lambda model: steps(model, num_beams=3),
    "score": score,
    "embed": arrays,
    "encode": lambda model: (model.encode(TEXT), model.decode(model.encode(TEXT))),
    "weights": lambda model: [matrix.tobytes() for matrix in model.weights.h[0].mlp.c_fc],
}


def at_once(jobs):
    """What each of some functions gives, run by a thread of its own; all begin at the same moment."""
    found, begin = [None] * len(jobs), threading.Barrier(len(jobs))

    def run(i, job):
        begin.wait()
        try:
            found[i] = job()
        except BaseException as error:  # shown by the comparison, rather than lost with the thread
            found[i] = error

    runners = [threading.Thread(target=run, args=one) for one in enumerate(jobs)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join()
    return found


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy")) / "model.onnx"


@pytest.mark.parametrize("engine", [pytest.param("numba", marks=pytest.mark.jit), "numpy"])
def test_threads_that_share_a_model_get_the_bits_of_one(engine, path):
    names = list(JOBS)
    alone = load(path, engine)
    expected = {name: JOBS[name](alone) for name in names}
    shared = load(path, engine)  # what is made at the first use is made by all of them at once
    for name in names:
        found = at_once([lambda name=name: JOBS[name](shared)] * AT_ONCE)
        assert found == [expected[name]] * AT_ONCE, name
    found = at_once([lambda name=name: JOBS[name](shared) for name in names])
    assert dict(zip(names, found, strict=True)) == expected


@pytest.mark.jit
def test_threads_that_share_a_session_get_the_bits_of_one(path):
    session = InferenceSession(path)
    feeds = {session.get_inputs()[0].name: np.arange(24).reshape(1, 2, 12)}
    found = at_once([lambda: [out.tobytes() for out in session.run(None, feeds)]] * AT_ONCE)
    assert found == [[out.tobytes() for out in InferenceSession(path).run(None, feeds)]] * AT_ONCE


@pytest.mark.skipif(getattr(sys, "_is_gil_enabled", lambda: True)(), reason="this Python has a global lock")
def test_nothing_that_is_imported_brings_the_global_lock_back(path):
    load(path)(np.arange(5)[None])
    assert not sys._is_gil_enabled()
