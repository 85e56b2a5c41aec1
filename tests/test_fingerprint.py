"""The same bits in every way of computing, and on every machine with fused multiply-add."""

import numpy as np
import pytest
from typer.testing import CliRunner

import gpt2np
from gpt2np import fingerprint
from gpt2np.cli import app
from gpt2np.kernels import chained_product
from gpt2np.kernels.tile import FORMS
from tiny import tiny_model

# Of weights/mini in float32, as computed on x86-64 with AVX2, also when compiled for Haswell and x86-64-v3, and on
# emulated arm64.
MINI = "96bf90efba7d8f304c9b49483974c2d04cd424100ab681836375f4bc0b0bc113"


def fuses():
    """Whether the machine that the kernels are compiled for rounds a * b + c once."""
    x = np.float32([[1.1, 1.1]])
    square = x[0, 0] * x[0, 0]
    return chained_product(x, np.float32([[1.1], [1.1]]), np.zeros(0, np.float32), 2)[0, 0] != square + square


@pytest.mark.jit
def test_every_way_of_computing_the_embedded_model_gives_the_published_bits():
    found = {f.way: f.sha256 for f in fingerprint.fingerprints(gpt2np.load())}
    assert len(set(found.values())) == 1, found
    assert list(found)[:7] == list(fingerprint.WAYS)
    assert [way for way in found if way.startswith("weights")] == [f"weights in {form}" for form in (*FORMS, "float32")]
    if fuses():
        assert found["prompt"] == MINI


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
    assert CliRunner().invoke(app, ["fingerprint", "--dtype", "float16"]).exit_code == 2
