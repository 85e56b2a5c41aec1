"""Matrices in 16 bits: the numbers of float32, and the very bits of its results."""

import numpy as np
import pytest

import gpt2np
from gpt2np import kernels
from gpt2np.arrays import NARROW, narrow_form, narrowed, widened
from gpt2np.kernels import panels
from gpt2np.kernels.layout import FORMS
from gpt2np.model import GPT2
from tiny import ArraySource, random_ids, tiny_config, tiny_sources


def draw(*shape):
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def sixteen_bit(form, *shape):
    """float32 numbers that a 16-bit form holds: ordinary ones, zeros of both signs, subnormal, infinite, NaN."""
    numbers = draw(*shape)
    flat = numbers.reshape(-1)
    odd = np.array([0.0, -0.0, 6e-8, -3e-5, 65504.0, np.inf, -np.inf], np.float32)
    flat[: min(flat.size, odd.size)] = odd[: flat.size]
    bits = narrowed(numbers, form)
    assert bits.dtype == NARROW[form]
    return widened(bits)


@pytest.mark.parametrize("form", NARROW)
def test_sixteen_bits_hold_what_they_are_said_to_hold(form):
    every = np.arange(1 << 16).astype(NARROW[form])
    numbers = widened(every)
    quiet = ~np.isnan(numbers) | (numbers.view(np.uint32) >> 22 & 1 == 1)  # what a processor makes of any NaN
    np.testing.assert_array_equal(narrowed(numbers[quiet], form), every[quiet])
    assert narrow_form([numbers[quiet]], [form]) == form
    for wrong in (np.float32(1.0000001), np.float32(1e-45), np.float32(3e38 if form == "float16" else 1 / 3)):
        block = np.append(numbers[quiet], wrong)
        assert narrow_form([numbers[quiet], block], [form]) is None
    assert narrow_form([np.ones(3, np.float64)]) is None
    assert (
        narrow_form([np.array([1.0, 0.5], np.float32), np.full(2, 1 / 3, np.float16).astype(np.float32)]) == "float16"
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("R", "K", "N"),
    [
        (1, 1, 1),
        (1, 300, 140),
        (2, 128, 32),
        (3, 129, 33),
        (4, 130, 40),
        (5, 9, 48),
        (8, 300, 17),
        (13, 257, 65),
        (55, 17, 130),
    ],
)
def test_a_matrix_in_sixteen_bits_gives_the_same_bits(form, R, K, N):
    x, weight, bias = draw(R, K), sixteen_bit(form, K, N), draw(N)
    narrow, wide = kernels.pack_matrix(weight, form=form), kernels.pack_matrix(weight)
    assert (narrow.form, wide.form) == (form, "float32")
    assert 2 * narrow.data.nbytes == wide.data.nbytes
    np.testing.assert_array_equal(kernels.unpack(narrow).view(np.uint32), weight.view(np.uint32))
    expected, got = kernels.linear(x, wide, bias), kernels.linear(x, narrow, bias)
    np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))
    table = sixteen_bit(form, N, K)
    ids, positions = np.array([[N - 1, 0, N // 2]]), np.array([[0, 2, 1]])
    rows = [
        kernels.embed(ids, positions, kernels.pack_matrix(table, transposed=True, form=kept), draw(3, K))
        for kept in (form, None)
    ]
    np.testing.assert_array_equal(*(row.view(np.uint32) for row in rows))


@pytest.mark.parametrize("form", FORMS)
def test_a_model_in_sixteen_bits_gives_the_same_bits(form, monkeypatch):
    """All of it, or some matrices of it; the prompt, and tokens after it."""
    config = tiny_config()
    exact = {
        name: ArraySource(widened(narrowed(source.array, form))) if source.array.ndim == 2 else source
        for name, source in tiny_sources(config).items()
    }
    some = dict(exact)
    some["h.1.mlp.c_fc.weight"] = tiny_sources(config)["h.1.mlp.c_fc.weight"]
    some["wte.weight"] = tiny_sources(config)["wte.weight"]
    for sources, words in ((exact, f"weights in {form}"), (some, f"7 of 9 matrices in {form}")):
        model = GPT2(config, sources)
        assert words in repr(model)
        with monkeypatch.context() as patched:
            patched.setattr(panels, "FORMS", ())
            plain = GPT2(config, sources)
        assert "float16" not in repr(plain)
        assert panels.narrow_form([np.ones(2, np.float32)], ()) is None
        caches = model.new_cache(2), plain.new_cache(2)
        for ids in (random_ids(config, 2, 9), random_ids(config, 2, 1), random_ids(config, 2, 3)):
            got, expected = (m(ids, cache=cache).logits for m, cache in zip((model, plain), caches, strict=True))
            np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))
    assert "float16" not in repr(GPT2(config, exact, dtype="float64"))


def test_the_embedded_model_is_kept_in_sixteen_bits():
    """Half the memory; its weights were trained so."""
    matrices = [
        p for p in kernels.pack(gpt2np.load(engine="numpy")._sources, np.float32).values() if hasattr(p, "form")
    ]
    assert {p.form for p in matrices} == {"bfloat16"}
