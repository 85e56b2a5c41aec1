"""Exercises: right answers are accepted, each usual mistake that applies is refused and named."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from gpt2np import exercises, reference
from gpt2np.errors import InputError
from gpt2np.exercises import EXERCISES, answers
from gpt2np.exercises.check import difference

MISTAKES = [(name, text) for name, exercise in EXERCISES.items() for text in exercise.mistakes]


@pytest.mark.parametrize("name", EXERCISES)
def test_the_right_answer_is_accepted(name: str):
    answer = exercises.check(name, EXERCISES[name].right)
    assert answer, answer
    assert str(answer).startswith(f"{name}: right")


@pytest.mark.parametrize(("name", "text"), MISTAKES)
def test_each_mistake_of_the_list_is_refused_and_named(name: str, text: str):
    answer = exercises.check(name, EXERCISES[name].mistakes[text])
    assert not answer
    assert answer.cause == text
    assert text in str(answer)


# Other right answers, written differently
def stepwise_layer_norm(x, weight, bias, epsilon):
    return (x - np.mean(x, -1, keepdims=True)) / (np.var(x, -1, keepdims=True) + epsilon) ** 0.5 * weight + bias


def einsum_attention(x, w, cache, start, mask, tap, name):
    q, k, v = np.split(x @ w.c_attn.weight + w.c_attn.bias, 3, axis=-1)
    B, T, _ = x.shape
    q, k, v = (a.reshape(B, T, w.n_head, -1).swapaxes(1, 2) for a in (q, k, v))
    cache[:, :, :, start : start + T] = k, v
    keys, values = cache[:, :, :, : start + T]
    probs = reference.softmax(mask(np.einsum("bhtd,bhsd->bhts", q, keys) / math.sqrt(q.shape[-1])))
    mixed = np.einsum("bhts,bhsd->bthd", probs, values).reshape(B, T, -1)
    return mixed @ w.c_proj.weight + w.c_proj.bias


def literal_gelu(x):
    return 0.5 * x * (1.0 + np.tanh(0.7978845608028654 * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(
    ("name", "function"),
    [("layer_norm", stepwise_layer_norm), ("attention", einsum_attention), ("gelu", literal_gelu)],
)
def test_a_right_answer_may_be_written_otherwise(name, function):
    assert exercises.check(name, function)


def norm(x, weight, bias, epsilon, *, ddof=0, outside=False, centre=True):
    centred = x - x.mean(-1, keepdims=True) if centre else x
    variance = (centred * centred).sum(-1, keepdims=True) / (x.shape[-1] - ddof)
    root = np.sqrt(variance) + epsilon if outside else np.sqrt(variance + epsilon)
    return centred / root * weight + bias


def attention(x, w, cache, start, mask, tap, name, *, scale=1.0, by=None, split=None, merge=None, bias=1, proj=None,
              thirds=(0, 1, 2), probs=reference.softmax):  # fmt: skip
    """The textbook's, with one thing changed."""
    S = start + x.shape[1]
    cut = split or reference.split_heads
    made = cut(reference.linear(x, w.c_attn.weight, w.c_attn.bias * bias), w.n_head)
    q, k, v = (made[i] for i in thirds)
    tap(f"{name}.q", q)
    tap(f"{name}.k", k)
    tap(f"{name}.v", v)
    cache[0, :, :, start:S], cache[1, :, :, start:S] = k, v
    keys, values = cache[0, :, :, :S], cache[1, :, :, :S]
    scores = q @ keys.swapaxes(-1, -2) * (w.scale * scale if by is None else by)
    tap(f"{name}.scores", scores)
    p = probs(mask(scores))
    tap(f"{name}.probs", p)
    heads = (merge or answers.merge_heads)(p @ values)
    tap(f"{name}.heads", heads)
    out = (proj or (lambda h, c: reference.linear(h, *c)))(heads, w.c_proj)
    tap(f"{name}.out", out)
    return out


def change(function, **how):
    return lambda *arguments: function(*arguments, **how)


def split(order, qkv, n_head):
    """Split by another order of (3, H, D)."""
    B, T, width = qkv.shape
    sizes = {"3": 3, "H": n_head, "D": width // 3 // n_head}
    x = qkv.reshape(B, T, *(sizes[letter] for letter in order))
    return x.transpose(2 + order.index("3"), 0, 2 + order.index("H"), 1, 2 + order.index("D"))


def unmoved_split(qkv, n_head):
    B, T, width = qkv.shape
    return np.stack([part.reshape(B, n_head, T, width // 3 // n_head) for part in np.split(qkv, 3, axis=-1)])


def unmoved_merge(mixed):
    B, H, T, D = mixed.shape
    return mixed.reshape(B, T, H * D)


def interleaved_merge(mixed):
    B, _, T, _ = mixed.shape
    return mixed.transpose(0, 2, 3, 1).reshape(B, T, -1)


def head(q, k, v, scale, *, by=None, shift=0, after=False, probs=reference.softmax):
    scores = q @ k.swapaxes(-1, -2) * (scale if by is None else by)
    T, S = scores.shape[-2:]
    seen = np.arange(S) <= np.arange(S - T, S)[:, None] + shift
    p = probs(scores) * seen if after else probs(np.where(seen, scores, -np.inf))
    return p, p @ v


def mlp(x, w, tap, name, *, gelu=literal_gelu, proj=None, c_fc=1):
    hidden = reference.linear(x, w.c_fc.weight, w.c_fc.bias * c_fc)
    tap(f"{name}.c_fc", hidden)
    hidden = gelu(hidden)
    tap(f"{name}.gelu", hidden)
    out = (proj or (lambda h, c: reference.linear(h, *c)))(hidden, w.c_proj)
    tap(f"{name}.out", out)
    return out


def block(x, w, cache, start, mask, tap, name, *, mid=True, post=True, norm_1=True, norm_2=True, from_norm=False):
    normed = reference.layer_norm(x, *w.ln_1) if norm_1 else x
    tap(f"{name}.ln_1", normed)
    out = reference.attention(normed, w.attn, cache, start, mask, tap, f"{name}.attn")
    x = (normed if from_norm else x) + out if mid else out
    tap(f"{name}.resid_mid", x)
    normed = reference.layer_norm(x, *w.ln_2) if norm_2 else x
    tap(f"{name}.ln_2", normed)
    out = reference.mlp(normed, w.mlp, tap, f"{name}.mlp")
    x = x + out if post else out
    tap(f"{name}.resid_post", x)
    return x


def erf_gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


# (exercise, mistaken function, words of the cause)
KNOWN = [
    ("layer_norm", change(norm, ddof=1), "ddof"),
    ("layer_norm", change(norm, outside=True), "outside the root"),
    ("layer_norm", change(norm, centre=False), "the mean were not taken off"),
    ("layer_norm", lambda x, w, b, e: norm(x, w, b, 1e-6), "epsilon were 1e-06"),
    ("layer_norm", lambda x, w, b, e: norm(x, w, b, 0.0), "epsilon were 0"),
    ("layer_norm", lambda x, w, b, e: norm(x, np.ones_like(w), b, e), "weight"),
    ("layer_norm", lambda x, w, b, e: norm(x, w, np.zeros_like(b), e), "bias were missing"),
    ("layer_norm", lambda x, w, b, e: norm(x, w, 2 * b, e), "twice"),
    ("layer_norm", lambda x, w, b, e: norm(x, b, w, e), "changed places"),
    ("layer_norm", lambda x, w, b, e: norm(x, 1 + w, b, e), "1 + weight"),
    ("layer_norm", lambda x, w, b, e: norm(x, np.ones_like(w), np.zeros_like(b), e), "neither weight nor bias"),
    ("layer_norm", lambda x, w, b, e: x, "not applied"),
    ("head", change(head, by=1.0), "scaled by 1 (there is none)"),
    ("head", change(head, by=1 / 8), "1/D"),
    ("head", change(head, by=1 / math.sqrt(24)), "1/sqrt(C)"),
    ("head", change(head, by=math.sqrt(8)), "scale divides"),
    ("head", change(head, shift=1), "saw keys up to i + 1"),
    ("head", change(head, shift=-1), "saw keys up to i - 1"),
    ("head", change(head, shift=99), "mask"),
    ("head", change(head, after=True), "the mask came after the softmax"),
    ("split_heads", lambda qkv, H: split("H3D", qkv, H), "(H, 3, D)"),
    ("split_heads", lambda qkv, H: split("3DH", qkv, H), "(3, D, H)"),
    ("split_heads", lambda qkv, H: split("HD3", qkv, H), "(H, D, 3)"),
    ("split_heads", unmoved_split, "without transposing"),
    ("split_heads", lambda qkv, H: np.stack(reference.split_heads(qkv, H))[[1, 0, 2]], "k, q, v"),
    ("split_heads", lambda qkv, H: np.stack(reference.split_heads(qkv, H))[[0, 2, 1]], "q, v, k"),
    ("split_heads", lambda qkv, H: np.stack(reference.split_heads(qkv, H))[[2, 1, 0]], "v, k, q"),
    ("split_heads", lambda qkv, H: np.stack(reference.split_heads(qkv, H))[:, :, ::-1], "heads"),
    ("merge_heads", unmoved_merge, "without transposing"),
    ("merge_heads", interleaved_merge, "(D, H)"),
    ("merge_heads", lambda mixed: answers.merge_heads(mixed[:, [1, 0, 2]]), "heads 0 and 1 were swapped"),
    ("attention", change(attention, by=1.0), "scaled by 1 (there is none)"),
    ("attention", change(attention, scale=8**-0.5), "1/D"),
    ("attention", change(attention, bias=0), "bias"),
    ("attention", change(attention, thirds=(1, 0, 2)), "k, q, v"),
    ("attention", change(attention, thirds=(0, 2, 1)), "q, v, k"),
    ("attention", change(attention, split=lambda qkv, H: split("H3D", qkv, H)), "(H, 3, D)"),
    ("attention", change(attention, split=unmoved_split), "without transposing"),
    ("attention", change(attention, merge=unmoved_merge), "without transposing"),
    ("attention", change(attention, proj=lambda h, c: h @ c.weight.T + c.bias), "transposed"),
    ("attention", change(attention, proj=lambda h, c: h @ c.weight), "bias were missing"),
    ("attention", change(attention, probs=lambda s: np.exp(s - s.max(-1, keepdims=True))), "division by the sum"),
    ("gelu", erf_gelu, "GELU by erf"),
    ("gelu", lambda x: x / (1 + np.exp(-1.702 * x)), "GELU by sigmoid"),
    ("gelu", lambda x: np.maximum(x, 0), "ReLU"),
    ("gelu", lambda x: x / (1 + np.exp(-x)), "SiLU"),
    ("gelu", lambda x: x, "no activation"),
    ("gelu", lambda x: 0.5 * x * (1 + np.tanh(0.7978845608028654 * (x + 0.44715 * x**3))), "0.44715 x^3"),
    ("mlp", change(mlp, gelu=erf_gelu), "GELU by erf"),
    ("mlp", change(mlp, gelu=lambda x: x), "no activation"),
    ("mlp", change(mlp, c_fc=0), "c_fc.bias were missing"),
    ("mlp", change(mlp, proj=lambda h, c: h @ c.weight), "c_proj.bias were missing"),
    ("mlp", change(mlp, proj=lambda h, c: h @ c.weight.reshape(24, 96).T + c.bias), "transposed"),
    ("block", change(block, mid=False), "residual"),
    ("block", change(block, post=False), "residual"),
    ("block", change(block, norm_1=False), "not applied"),
    ("block", change(block, norm_2=False), "not applied"),
    ("block", change(block, from_norm=True), "ln_1"),
]


@pytest.mark.parametrize(
    ("name", "function", "words"), KNOWN, ids=[f"{n}-{w}-{i}" for i, (n, _, w) in enumerate(KNOWN)]
)
def test_each_mistake_that_the_debugger_knows_is_refused_and_named(name, function, words):
    answer = exercises.check(name, function)
    assert not answer
    assert words in answer.cause, answer


SILENT = [(name, function, words) for name, function, words in KNOWN if name in ("attention", "mlp", "block")]


@pytest.mark.parametrize(
    ("name", "function", "words"), SILENT, ids=[f"{n}-{w}-{i}" for i, (n, _, w) in enumerate(SILENT)]
)
def test_they_are_named_without_a_tap_too(name, function, words):
    def silent(*arguments):
        return function(*arguments[:-2], reference.no_tap, arguments[-1])

    answer = exercises.check(name, silent)
    assert not answer
    assert words in answer.cause, answer


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x, w, b, e: None, "None"),
        (lambda x, w, b, e: 1 / 0, "ZeroDivisionError"),
        (lambda x: x, "TypeError"),
        (lambda x, w, b, e: "text", "no array of numbers"),
        (lambda x, w, b, e: [[1], [1, 2]], "different lengths"),
        (lambda x, w, b, e: reference.layer_norm(x, w, b, e)[..., :-1], "shape"),
        (lambda x, w, b, e: x.__imul__(2), "changes its argument number 1"),
        (lambda x, w, b, e: reference.layer_norm(x.astype(np.float64), w, b, e), "float64"),
        (lambda x, w, b, e: np.full_like(x, np.nan), "nan"),
        (lambda x, w, b, e: np.sin(x) * 1e3, "None of the usual mistakes"),
    ],
)
def test_what_is_no_answer_is_said_in_words(function, words):
    answer = exercises.check("layer_norm", function)
    assert not answer
    assert words in str(answer)


def test_nonsense_asked_for_is_a_clear_error():
    with pytest.raises(InputError, match="layer_norm"):
        exercises.check("no such", print)
    with pytest.raises(InputError, match="function"):
        exercises.check("gelu", 3)


def test_the_difference_says_where_it_is_largest():
    a = np.zeros((2, 3))
    b = a.copy()
    b[1, 2] = -1
    assert difference(b, a, 1e-9) == "differs in 1 of 6 numbers, most at [1, 2]: -1, where 0 belongs"
    assert difference(a, a, 1e-9) == ""
    assert difference(np.array([np.inf]), np.array([np.inf]), 1e-9) == ""


def test_the_notebooks_have_every_exercise_with_an_empty_cell_and_its_check(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "gpt2np", "exercises", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    text = ""
    for path in sorted(tmp_path.glob("*.ipynb")):
        book = json.loads(path.read_text("utf-8"))
        assert book["nbformat"] == 4
        assert all(cell["cell_type"] == "markdown" or cell["outputs"] == [] for cell in book["cells"])
        code = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
        exec(compile("\n".join(code), path.name, "exec"), {})  # they run as they are: nothing is solved yet
        text += "\n".join(code)
    for name, exercise in EXERCISES.items():
        assert f"def {exercise.signature}:" in text
        assert f'exercises.check("{name}", {name})' in text


def test_notebooks_that_are_there_already_are_left_alone(tmp_path):
    (tmp_path / "chapter_03.ipynb").write_text("mine")
    done = subprocess.run(
        [sys.executable, "-m", "gpt2np", "exercises", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "chapter_03.ipynb" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["chapter_03.ipynb"]
