"""Matrices of 8 and 4 bits: the numbers that they stand for, and the very bits of float32 results on these."""

import numpy as np
import pytest

import gpt2np
from gpt2np import kernels
from gpt2np.errors import InputError, WeightError
from gpt2np.kernels import panels
from gpt2np.model import GPT2
from gpt2np.quantised import GROUP, LEVELS, Quantised, quantise, rounded
from tiny import ArraySource, random_ids, tiny_config, tiny_sources


def draw(*shape):
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def every_level(form, K, N, offsets=False):
    """All levels of a form in a column where K allows it, scales of both signs, and a column of zeros."""
    low, high = LEVELS[form]
    rng = np.random.default_rng([K, N])
    levels = rng.integers(low, high + 1, (K, N)).astype(np.int8)
    column = np.arange(low, high + 1)[:K]
    levels[: len(column), 0] = column
    shape = 1 if form == "int8" and not offsets else -(-K // GROUP), N
    scales = rng.standard_normal(shape).astype(np.float32)
    scales[:, -1] = 0
    return Quantised(form, levels, scales, rng.integers(-255, 256, shape).astype(np.float32) if offsets else None)


@pytest.mark.parametrize("offsets", [False, True], ids=["", "offsets"])
@pytest.mark.parametrize("form", LEVELS)
@pytest.mark.parametrize(
    ("R", "K", "N"),
    [
        *[(1, 1, 1), (1, 304, 40), (2, 128, 32), (1, 96, 70), (2, 300, 40), (3, 129, 33), (13, 264, 65)],
        *[(3, 136, 33), (4, 304, 40), (5, 264, 65), (6, 128, 16), (8, 264, 40)],
    ],
)
def test_a_matrix_of_levels_gives_the_bits_of_its_floats(form, R, K, N, offsets):
    matrix, x, bias = every_level(form, K, N, offsets), draw(R, K), draw(N)
    packed, wide = panels.pack_levels(matrix), kernels.pack_matrix(matrix.floats())
    assert (packed.form, wide.form) == (form, "float32")
    np.testing.assert_array_equal(kernels.unpack(packed), matrix.floats())
    expected, got = kernels.linear(x, wide, bias), kernels.linear(x, packed, bias)
    np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))
    ids, positions = np.array([[N - 1, 0, N // 2]]), np.array([[0, 2, 1]])
    np.testing.assert_array_equal(*(kernels.embed(ids, positions, table, draw(3, K)) for table in (packed, wide)))


@pytest.mark.parametrize("form", LEVELS)
def test_quantising_rounds_to_the_nearest_level(form):
    """No number is further from what it becomes than half a scale, but those past the last level."""
    matrix = draw(70, 9)
    matrix[:, 3] = 0
    matrix[:40, 4] = 1e-30  # a scale below the smallest one
    whole = quantise(matrix, form)
    low, high = LEVELS[form]
    assert whole.levels.min() >= low
    assert whole.levels.max() <= high
    scales = whole.scales if form == "int8" else np.repeat(whole.scales, GROUP, axis=0)[:70]
    off = np.abs(matrix - whole.floats())
    past = matrix / np.where(scales == 0, 1, scales) > high
    assert (off[~past] <= 0.5000001 * np.abs(np.broadcast_to(scales, matrix.shape))[~past] + 1e-30).all()
    largest = {"int8": 127, "int4": 8}[form]
    tops = np.abs(whole.levels[:GROUP] if form == "int4" else whole.levels).max(axis=0)
    assert (tops[[0, 1, 2, 5, 6, 7, 8]] == largest).all()
    assert not whole.floats()[:, 3].any()
    np.testing.assert_array_equal(quantise(whole.floats(), form).floats(), whole.floats())


def test_ties_are_rounded_to_even():
    column = np.array([[127.0], [0.5], [1.5], [-2.5]], np.float32)
    np.testing.assert_array_equal(quantise(column, "int8").levels[:, 0], [127, 0, 2, -2])


@pytest.mark.parametrize("form", ["float32", "bfloat16", "float16", "int8", "int4"])
def test_a_rounded_model_computes_with_the_rounded_numbers(form):
    """Both engines and float64; the kernels to the bit those of float32 matrices, in one call, chunks and batches."""
    config = tiny_config(n_embd=48, n_head=3, head_size=16, n_inner=80)
    sources = tiny_sources(config)
    model = GPT2(config, sources, weights=form)
    assert f"weights rounded to {form}" in repr(model)
    assert model._weights.wte.form == model._weights.h[0].mlp.c_fc.weight.form == form
    numbers = {name: source.load() for name, source in rounded(sources, form).items()}
    plain = GPT2(config, {name: ArraySource(array) for name, array in numbers.items()}, weights="float32")
    for name in ("wpe.weight", "h.0.ln_1.weight", "h.1.mlp.c_fc.bias"):
        np.testing.assert_array_equal(numbers[name], sources[name].array)
    ids = random_ids(config, 2, 11)
    expected = plain(ids).logits
    np.testing.assert_array_equal(model(ids).logits.view(np.uint32), expected.view(np.uint32))
    cache = model.new_cache(2)
    parts = [model(ids[:, a:b], cache=cache).logits for a, b in ((0, 1), (1, 2), (2, 9), (9, 11))]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1).view(np.uint32), expected.view(np.uint32))
    np.testing.assert_array_equal(model(ids[1:]).logits[0].view(np.uint32), expected[1].view(np.uint32))
    textbook, oracle = (GPT2(config, sources, "numpy", dtype, weights=form) for dtype in ("float32", "float64"))
    np.testing.assert_array_equal(textbook.weights.lm_head, numbers["wte.weight"])
    np.testing.assert_allclose(textbook(ids).logits, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(oracle(ids).logits, expected, rtol=1e-4, atol=1e-5)
    kernels_in_float64 = GPT2(config, sources, "numba", "float64", weights=form)
    np.testing.assert_allclose(kernels_in_float64(ids).logits, oracle(ids).logits, rtol=1e-12, atol=1e-12)


@pytest.mark.jit
@pytest.mark.parametrize("form", LEVELS)
def test_threads_do_not_change_a_bit(form):
    matrix, bias = every_level(form, 256, 1030), draw(1030)
    packed, before = panels.pack_levels(matrix), kernels.get_num_threads()
    for R in (1, 2, 70):
        results = []
        for threads in range(1, before + 1):
            kernels.set_num_threads(threads)
            results.append(kernels.linear(draw(R, 256), packed, bias))
        assert all((result.view(np.uint32) == results[0].view(np.uint32)).all() for result in results)
    kernels.set_num_threads(before)


def test_other_weights_are_refused():
    config = tiny_config()
    for wrong in ("int3", "", 8, b"int8", ("int8",), ["int8"]):
        with pytest.raises(InputError, match="weights must be one of float32, bfloat16, float16, int8, int4"):
            GPT2(config, tiny_sources(config), weights=wrong)
    for form, number in (("int8", np.inf), ("int4", np.nan), ("float16", 1e6), ("bfloat16", np.nan)):
        sources = tiny_sources(config)
        sources["h.1.mlp.c_fc.weight"].array[2, 3] = number
        with pytest.raises(WeightError, match=rf"h\.1\.mlp\.c_fc\.weight .* cannot be rounded to {form}"):
            GPT2(config, sources, weights=form)
        with pytest.raises(WeightError):
            GPT2(config, sources, "numpy", weights=form)


def test_load_rounds_the_embedded_model():
    ids = [[1, 2, 3, 4]]
    exact = gpt2np.load(engine="numpy")(ids).logits
    models = (gpt2np.load(engine="numpy", weights=form) for form in ("bfloat16", "int8", "int4"))
    off = [np.abs(model(ids).logits - exact).mean() for model in models]
    assert off[0] == 0 < off[1] < off[2] < 1
