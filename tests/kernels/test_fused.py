"""All blocks in one call: matrices of several forms, threads that come late, copies of the weights."""

import copy
import threading

import numpy as np
import pytest

from gpt2np.kernels import fused, get_num_threads, threads
from gpt2np.model import GPT2
from tiny import ArraySource, random_ids, tiny_config, tiny_sources


def mixed_sources(config):
    """Matrices of which one can be kept in 16 bits."""
    sources = dict(tiny_sources(config))
    name = "h.1.mlp.c_fc.weight"
    sources[name] = ArraySource((sources[name].load().view(np.uint32) & 0xFFFF0000).view(np.float32))
    return sources


@pytest.mark.parametrize("T", [1, 9])
def test_matrices_of_several_forms_give_the_bits_of_one(T):
    config = tiny_config()
    mixed = GPT2(config, mixed_sources(config))
    same = GPT2(config, mixed_sources(config), weights="float32")
    ids = random_ids(config, 2, T)
    for model, alike in ((mixed, False), (same, True)):
        model(ids)
        assert model._weights.h.table.alike == alike
    ours, expected = mixed(ids), same(ids)
    assert ours.logits.tobytes() == expected.logits.tobytes()
    assert all(a.tobytes() == b.tobytes() for a, b in zip(ours.past, expected.past, strict=True))


@pytest.mark.parametrize("T", [1, 9, 60])
@pytest.mark.parametrize("form", [None, "int8", "int4"])
def test_logits_in_the_same_call_are_those_of_calls_of_their_own(form, T):
    """In it where the head's matrix is kept as the others are and the positions are few; the tied one and its own."""
    config = tiny_config(n_ctx=T)
    for sources in (tiny_sources(config), mixed_sources(config)):
        model = GPT2(config, sources, weights=form)
        own = model._weights._replace(lm_head=model._weights.lm_head, lm_head_bias=np.ones(37, np.float32))
        for weights in (model._weights, own):
            model._weights = weights
            ids = random_ids(config, 1, T)
            ours = model.logits_of_each(ids[0].tolist(), model.new_cache())
            assert ours.tobytes() == model(ids).logits[0].tobytes()
    assert (fused.tabulate(own).arrays[-1][12] == 1).all()


@pytest.mark.jit
@pytest.mark.parametrize("options", [{}, {"dtype": "float64"}, {"weights": "bfloat16"}, {"weights": "int8"}])
def test_threads_call_code_for_the_arguments_that_they_have(options, monkeypatch):
    """An address says nothing of types: `block_parallel` must have those of the `block_steps` that it calls."""
    if get_num_threads() == 1:
        pytest.skip("one thread alone")
    monkeypatch.setattr(threads, "GRAIN", 1)
    config = tiny_config()
    model = GPT2(config, tiny_sources(config), **options)
    mask = np.array([[0, 1, 1], [1, 1, 1]])
    for given in ({}, {"attention_mask": mask}):
        model(random_ids(config, 2, 3), model.new_cache(2, 5), **given)
    called = {tuple(map(str, (*s[1:7], s[8:]))) for s in fused.block_parallel.signatures}
    compiled = {tuple(map(str, (*s[:6], s[7:]))) for s in fused.block_steps.signatures}
    assert called
    assert called <= compiled
    assert {str(s[7].dtype) for s in fused.block_parallel.signatures} <= {"float32", "float64"}


def test_addresses_are_not_copied():
    model = GPT2(tiny_config(), tiny_sources(tiny_config()))
    expected = model([[1, 2, 3]]).logits
    twin = copy.deepcopy(model._weights)
    assert twin.h.table is None
    assert model._weights.h.table is fused.tabulate(model._weights)
    first, second = model._weights.h[0].mlp.c_fc.weight.data, twin.h[0].mlp.c_fc.weight.data
    first[:] = 0  # the copy does not see it
    assert (second != 0).any()
    model._weights = twin
    assert (model([[1, 2, 3]]).logits == expected).all()


@threads.jit()
def count(counter):
    threads.count(counter, 1)


def test_a_thread_waits_for_what_others_still_do():
    done, order = np.zeros(8, np.int64), []

    def work():
        for piece in range(3):
            order.append(piece)
            count(done)

    worker = threading.Timer(0.05, work)
    worker.start()
    threads.wait_for(done, 3)
    assert order == [0, 1, 2]
    worker.join()
    threads.wait_for(done, 3)  # what is done already is not waited for


def test_a_thread_that_comes_late_finds_nothing_to_do(monkeypatch):
    """Steps are done by whoever is there; one that comes afterwards goes through all of them at once."""
    model = GPT2(tiny_config(), tiny_sources(tiny_config()))
    ids = random_ids(tiny_config(), 1, 12)
    expected, done = model(ids).logits, []

    def one_after_the_other(address, counters, workers, pieces, smallest, blocks, steps, scratch, *arguments):
        for _ in range(2):
            fused.block_steps(counters, 2, pieces, smallest, blocks, steps, scratch[0], *arguments)
            done.append(counters[:, :, 1, 0].copy())

    before = get_num_threads()
    if before == 1:
        pytest.skip("one thread alone")
    monkeypatch.setattr(threads, "GRAIN", 1)
    monkeypatch.setattr(fused, "block_parallel", one_after_the_other)
    assert model(ids).logits.tobytes() == expected.tobytes()
    assert len(done) == 2
    assert done[0].all()
    assert (done[0] == done[1]).all()
