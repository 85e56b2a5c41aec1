"""Hidden states of texts: as the model gives them one by one."""

import numpy as np
import pytest

from gpt2np.embed import embed
from gpt2np.errors import ContextOverflowError, InputError, TokenizerError
from gpt2np.tokenizer import encode
from tiny import tiny_model
from toy_model import TOY, toy_model

ENGINES = ["numpy", pytest.param("numba", marks=pytest.mark.jit)]
TEXTS = ["Once upon a time", "x", "the king and the queen had a son", "é"]


def agree(engine, ours, theirs):
    assert ours.shape == theirs.shape
    if engine == "numba":
        assert ours.tobytes() == theirs.tobytes()
    else:
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_last_hidden_state(engine, batch_size):
    model = toy_model(engine)
    found = list(embed(model, TEXTS, batch_size=batch_size))
    assert len(found) == len(TEXTS)
    for text, states in zip(TEXTS, found, strict=True):
        ids = encode(TOY, text)
        assert states["input_ids"].tolist() == ids
        agree(engine, states["last_hidden_state"], model(ids).last_hidden_state[0])


@pytest.mark.parametrize("engine", ENGINES)
def test_every_tap(engine):
    model = toy_model(engine)
    taps = list(model.trace([0]))
    for text, states in zip(TEXTS, embed(model, TEXTS, [*taps, "last_hidden_state"]), strict=True):
        expected = model.trace(encode(TOY, text))
        for tap in taps:
            agree(engine, states[tap], expected[tap][0])
        agree(engine, states["last_hidden_state"], expected["ln_f"][0])


def test_pooling():
    model = toy_model()
    for text, last, mean in zip(TEXTS, embed(model, TEXTS, pool="last"), embed(model, TEXTS, pool="mean"), strict=True):
        states = model(encode(TOY, text)).last_hidden_state[0]
        np.testing.assert_allclose(last["last_hidden_state"], states[-1], atol=1e-5)
        np.testing.assert_allclose(mean["last_hidden_state"], states.mean(axis=0), atol=1e-5)
        assert last["last_hidden_state"].dtype == mean["last_hidden_state"].dtype == np.float32


def test_ids_need_no_tokenizer():
    model = tiny_model("numpy")
    (states,) = embed(model, [3, 1, 4])
    np.testing.assert_array_equal(states["last_hidden_state"], model([3, 1, 4]).last_hidden_state[0])
    with pytest.raises(TokenizerError):
        embed(model, "text")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"taps": ["h.9.ln_1"]}, InputError, "no tap 'h.9.ln_1'; there are embed, h.0"),
        ({"taps": ["h.0.attn.q"], "pool": "mean"}, InputError, "cannot be pooled"),
        ({"pool": "max"}, InputError, "pool"),
        ({"taps": "ln_f"}, InputError, "taps must be a sequence of strings, got 'ln_f'"),
        ({"batch_size": 1.5}, InputError, "batch_size must be a whole number"),
        ({"batch_size": 0}, InputError, "batch_size"),
        ({"texts": ["a", "b" * 500]}, ContextOverflowError, "text 2 of 2"),
        ({"texts": ["a", ""]}, InputError, "empty"),
        ({"texts": []}, InputError, "no prompt"),
    ],
)
def test_errors_come_at_the_call(options, error, message):
    with pytest.raises(error, match=message):
        embed(toy_model(), **{"texts": TEXTS, **options})
