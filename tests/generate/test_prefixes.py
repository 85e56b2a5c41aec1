"""What texts have in common is computed once, with the same bits."""

import copy
import pickle

import numpy as np
import pytest

from gpt2np.errors import ContextOverflowError, InputError
from gpt2np.generate import generate
from gpt2np.score import predictions
from tiny import random_ids, shapes_run, tiny_model

ENGINES = ["numpy", pytest.param("numba", marks=pytest.mark.jit)]


@pytest.fixture(scope="module", params=ENGINES)
def model(request):
    return tiny_model(request.param)


def contents(cache):
    return [view.tobytes() for view in cache.views()]


def test_a_copy_and_its_original_go_their_own_ways(model):
    ids = random_ids(model.config, 12).tolist()
    first = model.new_cache()
    model(ids[:6], cache=first)
    fork = first.copy()
    third = fork.copy()
    assert np.shares_memory(first.array, third.array)  # nothing has been copied yet
    with pytest.raises(ValueError, match="read-only"):
        fork.layers[0][:] = 1
    before = contents(first)
    model(ids[6:], cache=fork)
    assert contents(first) == contents(third) == before
    assert not np.shares_memory(first.array, fork.array)
    third.crop(4)
    model(ids[7:9], cache=third)
    model([0, 1], cache=first)  # the last holder writes in place
    for cache, text in ((fork, ids), (third, [*ids[:4], *ids[7:9]]), (first, [*ids[:6], 0, 1])):
        alone, split = model.new_cache(), model.new_cache()
        model(text[:4], cache=split)
        model(text[4:6], cache=split)
        model(text, cache=alone)
        assert cache.length == len(text)
        if model.engine == "numba":
            assert contents(cache) == contents(alone)
        for ours, theirs in zip(cache.views(), alone.views(), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert fork.max_length == first.max_length


def test_a_prompts_endings_are_scored_by_running_it_once(model, monkeypatch):
    prompt = random_ids(model.config, 8).tolist()
    rows = [([*prompt, *ending], 8) for ending in ([1, 2, 3], [4], [1, 5, 9, 2], [7, 7])]
    alone = [predictions(model, [row])[0] for row in rows]
    shapes = shapes_run(model, monkeypatch)
    together = predictions(model, rows)
    for (logs, best), (expected, expected_best) in zip(together, alone, strict=True):
        np.testing.assert_allclose(logs, expected, rtol=0 if model.engine == "numba" else 1e-5)
        np.testing.assert_array_equal(best, expected_best)
    if model.engine == "numba":
        assert shapes == [(1, 7), (4, 4)]  # the prompt but its last token; that one and three more for each ending
    different = [([i, *ids[1:]], first) for i, (ids, first) in enumerate(rows)]
    for got, row in zip(predictions(model, different), different, strict=True):
        np.testing.assert_allclose(got[0], predictions(model, [row])[0][0], rtol=0 if model.engine == "numba" else 1e-5)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_whatever_copies_a_cache_makes_one_of_its_own(model, duplicate):
    cache, expected = model.new_cache(), model.new_cache()
    model([1, 2], cache=cache)
    model([1, 2, 3], cache=expected)
    kept = cache.copy()
    for original in (cache, kept):
        twin = duplicate(original)
        past = model([3], cache=twin).past
        model([4], cache=original)
        for held, ours, theirs in zip(past, twin.views(), expected.views(), strict=True):
            np.testing.assert_array_equal(held, ours)
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.jit
def test_prompts_that_begin_alike_run_their_beginning_once(monkeypatch):
    model = tiny_model("numba")
    base = random_ids(model.config, 10).tolist()
    prompts = [[*base, 3], [1, 2], [*base, 5, 6], base, [*base[:4], 9], base]
    alone = [[s[1:] for s in generate(model, ids, 6)] for ids in prompts]
    shapes = shapes_run(model, monkeypatch)
    steps = list(generate(model, prompts, 6))
    for row, expected in enumerate(alone):
        assert [s[1:] for s in steps if s.row == row] == expected
    assert sum(rows * T for rows, T in shapes[: len(prompts)]) == 10 + 1 + 1 + 2 + 1 + 2  # of 50 tokens


def test_only_a_cache_of_one_row_fills_others(model):
    one, three = model.new_cache(1), model.new_cache(3)
    model(random_ids(model.config, 5), cache=one)
    three.fill(one)
    assert three.length == 5
    for row in range(3):
        for ours, theirs in zip(three.views(), one.views(), strict=True):
            np.testing.assert_array_equal(ours[:, row], theirs[:, 0])
    with pytest.raises(InputError, match="one row"):
        one.fill(three)
    with pytest.raises(InputError, match="float32.* is filled from one for float64"):
        three.fill(tiny_model(model.engine, "float64").new_cache())
    short = model.new_cache(1, 4)
    model([1, 2, 3], cache=short)
    with pytest.raises(ContextOverflowError, match="5 positions exceed the cache's max_length of 4"):
        short.fill(one)
    assert (three.length, short.length) == (5, 3)
