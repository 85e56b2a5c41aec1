"""keras-hub's GPT-2 as torch.onnx.export writes it: wpe repeated for each sequence, hidden keys without probability."""

import numpy as np
import pytest

from forms import C, D, Form, H, N, V, qkv, split_heads
from gpt2np.errors import InputError, UnsupportedModelError
from gpt2np.session import InferenceSession
from runtime import assert_close, runtime

FAR = -1e9
B, T = 2, 7  # of files whose sizes are fixed


def keras(fixed=False, rows=None, zeroed=None, nothing=0.0, gain=1.0):
    """A file with ids and a padding mask; `rows` and `zeroed` change the rows of wpe, and what is set to 0."""
    form = Form()
    sizes = (B, T) if fixed else ("B", "T")
    ids = form.input("ids", np.int32, *sizes)
    given = form.input("padding_mask", np.int32, *sizes)
    ids = form.op("Cast", ids, to=7)
    end = form.op("Where", form.op("Less", ids, number(form, 0)), form.op("Add", ids, number(form, V)), ids)
    words = form.op("Gather", form.weight("wte.weight", V, C), end)
    if fixed:
        wpe = 0.3 * form.rng.standard_normal((T, C)).astype(np.float32)
        places = form.constant(np.stack([wpe] * B) if rows is None else rows(wpe))
        keep = form.constant(np.stack([np.tri(T, dtype=np.int32)] * B))
    else:
        size = form.op("Concat", form.size(ids, 0), form.size(ids, 1), form.ints(C), axis=0)
        wpe = form.op("Slice", form.weight("wpe.weight", N, C), form.ints(0), form.size(ids, 1), form.ints(0))
        places = form.op("Expand", wpe, size) if rows is None else rows(form, wpe, size)
        steps = form.op("Range", number(form, 0), form.op("Squeeze", form.size(ids, 1)), number(form, 1))
        keep = form.op("GreaterOrEqual", form.op("Unsqueeze", steps, form.ints(1)), steps)
        keep = form.op("Cast", form.op("Unsqueeze", keep, form.ints(0)), to=6)
    keep = form.op("Min", form.op("Unsqueeze", given, form.ints(1)), keep)
    keep = form.op("Greater", form.op("Unsqueeze", keep, form.ints(1)), form.constant(0, np.int32))

    def attention(form, i, x):
        q, k, v = (split_heads(form, part) for part in qkv(form, i, x))
        q = form.op("Mul", q, form.constant(gain * D**-0.5, np.float32))
        scores = form.op("MatMul", q, form.op("Transpose", k, perm=[0, 1, 3, 2]))
        probs = form.op("Softmax", form.op("Where", keep, scores, form.constant(FAR, np.float32)), axis=3)
        seen = keep if zeroed is None else zeroed(form, keep)
        probs = form.op("Where", seen, probs, form.constant(nothing, np.float32))
        heads = form.op("Transpose", form.op("MatMul", probs, v), perm=[0, 2, 1, 3])
        return form.op("Reshape", heads, form.ints(0, 0, H * D))

    form.head(form.blocks(form.op("Add", words, places), attention))
    return form


def number(form, value):
    return form.constant(value, np.int64)


def feeds(B, T, hidden=()):
    rng = np.random.default_rng(T)
    mask = np.ones((B, T), np.int32)
    mask[-1, hidden] = 0
    return {"ids": rng.integers(0, V, (B, T)).astype(np.int32), "padding_mask": mask}


@pytest.mark.parametrize("fixed", [False, True], ids=["any length", "one length"])
@pytest.mark.parametrize("engine", ["numpy", pytest.param("numba", marks=pytest.mark.jit)])
def test_it_loads_and_agrees(tmp_path, fixed, engine):
    path = keras(fixed).save(tmp_path / "model.onnx")
    session, theirs = InferenceSession(path, engine=engine), runtime(path)
    sizes = [(B, T)] if fixed else [(1, 1), (2, 7), (3, N)]
    for some in sizes:
        for hidden in ((), slice(5, None), slice(0, 3), slice(1, 2)):  # left: queries that see no key
            given = feeds(*some, hidden)
            assert_close(session.run(None, given)[0], theirs.run(None, given)[0], "logits")


def test_scores_that_come_near_the_mask_are_refused(tmp_path):
    """There the file's hidden keys have a part in the sum of the softmax, but none in the result."""
    path = keras(gain=-1e10).save(tmp_path / "model.onnx")
    session = InferenceSession(path, engine="numpy")
    with pytest.raises(UnsupportedModelError, match="scores come near the numbers that hide keys"):
        session.run(None, feeds(2, 7))


OTHERS = {
    "seen ones": lambda form, keep: form.op("Not", keep),
    "all": lambda form, keep: form.op("And", keep, form.constant(False)),
    "none": lambda form, keep: form.op("Or", keep, form.constant(True)),
    "another of a head": lambda form, keep: form.op("And", keep, form.constant(np.arange(H).reshape(1, H, 1, 1) != 1)),
}


@pytest.mark.parametrize("zeroed", OTHERS.values(), ids=OTHERS)
def test_other_probabilities_set_to_zero_are_refused(tmp_path, zeroed):
    with pytest.raises(UnsupportedModelError, match="layer 0 sets other probabilities to 0"):
        InferenceSession(keras(zeroed=zeroed).save(tmp_path / "model.onnx"), engine="numpy")


def test_other_numbers_than_zeros_are_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match="other numbers than zeros in the place of probabilities"):
        InferenceSession(keras(nothing=0.01).save(tmp_path / "model.onnx"), engine="numpy")


def swapped(form, wpe, size):
    """(T, 1, C) for every sequence, (T, B, C), called (B, T, C): the shape is right, the rows are not."""
    order = form.op("Gather", size, form.ints(1, 0, 2))
    return form.op("Reshape", form.op("Expand", form.op("Unsqueeze", wpe, form.ints(1)), order), size)


def first(form, wpe, size):
    """Position 0 for every token."""
    return form.op("Expand", form.op("Slice", wpe, form.ints(0), form.ints(1), form.ints(0)), size)


@pytest.mark.parametrize("rows", [swapped, first])
def test_rows_that_are_repeated_otherwise_are_refused(tmp_path, rows):
    with pytest.raises(UnsupportedModelError):
        InferenceSession(keras(rows=rows).save(tmp_path / "model.onnx"), engine="numpy")


def test_other_rows_for_another_sequence_are_refused(tmp_path):
    form = keras(True, lambda wpe: np.stack([wpe, wpe[::-1]]))
    with pytest.raises(UnsupportedModelError):
        InferenceSession(form.save(tmp_path / "model.onnx"), engine="numpy")


@pytest.mark.parametrize("value", [-1, 2])
def test_a_padding_mask_says_0_or_1(tmp_path, value):
    """The file hides a key of -1, where others show all that is not 0."""
    session = InferenceSession(keras().save(tmp_path / "model.onnx"), engine="numpy")
    given = feeds(2, 7)
    given["padding_mask"][0, 1] = value
    with pytest.raises(InputError, match="says 1 for keys that are seen and 0 for others"):
        session.run(None, given)
