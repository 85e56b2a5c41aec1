"""The same bits in every way of computing, and on every machine with fused multiply-add."""

import os
import platform
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from typer.testing import CliRunner

import gpt2np
from gpt2np import fingerprint
from gpt2np.cli import app
from gpt2np.errors import InputError
from gpt2np.kernels import chained_product
from gpt2np.kernels.layout import FORMS
from published import DRAWS, MINI, draws
from tiny import tiny_model


def fuses():
    """Whether the machine that the kernels are compiled for rounds a * b + c once."""
    x = np.float32([[1.1, 1.1]])
    square = x[0, 0] * x[0, 0]
    return chained_product(x, np.float32([[1.1], [1.1]]), np.zeros(0, np.float32), 2)[0, 0] != square + square


@pytest.mark.jit
@pytest.mark.parametrize("weights", MINI)
def test_every_way_of_computing_the_embedded_model_gives_the_published_bits(weights):
    found = {f.way: f.sha256 for f in fingerprint.fingerprints(gpt2np.load(weights=weights))}
    assert len(set(found.values())) == 1, found
    assert list(found)[:7] == list(fingerprint.WAYS)
    others = {None: [*FORMS, "float32"], "int8": ["float32"], "int4": ["float16", "float32"]}  # that hold these numbers
    assert [way for way in found if way.startswith("weights")] == [f"weights in {form}" for form in others[weights]]
    if fuses():
        assert found["prompt"] == MINI[weights]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_changed_bit_changes_the_fingerprint(dtype):
    model = tiny_model(dtype=dtype)
    given = fingerprint.texts(model)
    before = fingerprint.digest(fingerprint.WAYS["prompt"](model, given))
    assert before == fingerprint.digest(fingerprint.WAYS["single tokens"](model, given))
    bias = model._weights.ln_f.bias
    bias[0] = np.nextafter(bias[0], bias.dtype.type(9))
    assert fingerprint.digest(fingerprint.WAYS["prompt"](model, given)) != before


def test_drafts_of_the_fingerprint_are_right_and_wrong(monkeypatch):
    """Each pass runs a draft along; some tokens of drafts are taken and some are not."""
    model = tiny_model()
    passes, run = [], model.logits_of_each
    monkeypatch.setattr(model, "logits_of_each", lambda tokens, cache: passes.append(tokens) or run(tokens, cache))
    given = fingerprint.texts(model)[:1]
    [found] = fingerprint._drafts(model, given)
    assert len(given[0]) / 6 < len(passes) < len(given[0]) - 6
    assert all(len(tokens) > 1 for tokens in passes)
    [expected] = fingerprint._whole(model, given)
    for name, array in found._asdict().items():
        assert np.array_equal(array, getattr(expected, name)), name


def test_weights_that_16_bits_do_not_hold_are_kept_in_32_alone():
    model = tiny_model()
    ways = [f.way for f in fingerprint.fingerprints(model)]
    assert not any(way.startswith("weights") for way in ways)


@pytest.mark.jit
def test_the_command_says_which_ways_differ(monkeypatch):
    done = CliRunner().invoke(app, ["fingerprint", "--dtype", "float32"])
    assert done.exit_code == 0
    [line] = done.output.splitlines()
    assert line.startswith("float32  ")
    assert all(way in line for way in fingerprint.WAYS)

    def wrong(model, given):
        return [result._replace(hidden=result.hidden + 1) for result in fingerprint._whole(model, given)]

    monkeypatch.setitem(fingerprint.WAYS, "chunks", wrong)
    done = CliRunner().invoke(app, ["fingerprint", "--dtype", "float32"])
    assert done.exit_code == 1
    assert [line.split("  ")[2] for line in done.output.splitlines()][1] == "chunks"
    monkeypatch.undo()
    monkeypatch.setattr(fingerprint, "WAYS", {"prompt": fingerprint._whole})
    done = CliRunner().invoke(app, ["fingerprint", "--dtype", "float32", "--weights", "int8"])
    assert done.exit_code == 0
    assert done.output.split()[1] == MINI["int8"] or not fuses()
    assert CliRunner().invoke(app, ["fingerprint", "--dtype", "float16"]).exit_code == 2
    assert isinstance(CliRunner().invoke(app, ["fingerprint", "--weights", "int3"]).exception, InputError)


@pytest.mark.jit
def test_draws_and_beams_of_the_embedded_model_are_the_published_ones():
    if fuses():
        assert draws(gpt2np.load()) == DRAWS


@pytest.mark.jit
def test_numpy_and_blas_on_another_machine_change_nothing_that_is_promised():
    """Results, scores, embeddings, and what goes on from a text: by NumPy for the oldest CPUs, too."""
    code = """
        import gpt2np, hashlib
        from gpt2np.embed import embed
        from gpt2np.fingerprint import WAYS, digest, texts
        from gpt2np.generate import generate
        from gpt2np.score import TextScoring

        model, text = gpt2np.load(), "Once upon a time there was a king, and the king had a daughter. "
        print(digest(WAYS["prompt"](model, texts(model))))
        drawn = {"temperature": 1.0, "seed": 3}, {"top_p": 0.9, "seed": 4}
        for options in {"repetition_penalty": 1.3}, {"lookup": True}, {"num_beams": 3, "length_penalty": 0.7}, *drawn:
            print(list(generate(model, text, 20, **options)))
        scoring = TextScoring(model, text * 4, 40, 20)
        print(list(scoring), scoring.result)
        for pool in "mean", "last", None:
            rows = embed(model, [text, text[:9]], pool=pool)
            print(hashlib.sha256(b"".join(row["last_hidden_state"].tobytes() for row in rows)).hexdigest())
    """
    features = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
    other = {"NPY_DISABLE_CPU_FEATURES": " ".join(features), "OPENBLAS_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    if platform.machine() in ("x86_64", "AMD64"):
        other["OPENBLAS_CORETYPE"] = "Prescott"
    found = [
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], env=os.environ | more, capture_output=True, text=True
        )
        for more in ({}, other)
    ]
    assert [done.returncode for done in found] == [0, 0], found[1].stderr
    assert found[0].stdout == found[1].stdout
