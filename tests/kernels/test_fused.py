"""A model as a program of steps: matrices of several forms, threads that come late, what is kept and for how long."""

import copy
import gc
import pickle
import threading
import weakref

import numpy as np
import pytest

from gpt2np.kernels import get_num_threads, jit, programs, sharing, threads
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
    for model, calls in ((mixed, 3), (same, 1)):
        cache = model.new_cache(2)
        model(ids, cache)
        assert len(cache.layers.programs[2, T].calls) == calls
    ours, expected = mixed(ids), same(ids)
    assert ours.logits.tobytes() == expected.logits.tobytes()
    assert all(a.tobytes() == b.tobytes() for a, b in zip(ours.past, expected.past, strict=True))


@pytest.mark.parametrize("T", [1, 9, 60])
@pytest.mark.parametrize("form", [None, "int8", "int4"])
def test_logits_in_the_same_call_are_those_of_calls_of_their_own(form, T):
    """For few positions and many; with the tied head and one that has a bias."""
    config = tiny_config(n_ctx=T)
    for sources in (tiny_sources(config), mixed_sources(config)):
        model = GPT2(config, sources, weights=form)
        own = model._weights._replace(lm_head=model._weights.lm_head, lm_head_bias=np.ones(37, np.float32))
        for weights in (model._weights, own):
            model._weights = weights
            ids = random_ids(config, 1, T)
            ours = model.logits_of_each(ids[0].tolist(), model.new_cache())
            assert ours.tobytes() == model(ids).logits[0].tobytes()
    assert (programs.tabulate(own).kept[-1] == 1).all()


@pytest.mark.jit
@pytest.mark.parametrize("options", [{}, {"dtype": "float64"}, {"weights": "bfloat16"}, {"weights": "int8"}])
def test_threads_call_code_for_the_arguments_that_they_have(options, monkeypatch):
    """An address says nothing of types: other threads must run the code that the caller runs."""
    if get_num_threads() == 1:
        pytest.skip("one thread alone")
    config = tiny_config()
    model = GPT2(config, tiny_sources(config), **options)
    ids, mask = random_ids(config, 2, 3), np.array([[0, 1, 1], [1, 1, 1]])
    for given in ({}, {"attention_mask": mask}):
        results = []
        for grain in (1 << 40, 1):
            monkeypatch.setattr(threads, "GRAIN", grain)
            results += [model(ids, model.new_cache(2, 5), **given).logits.tobytes() for _ in range(20)]
        assert len(set(results)) == 1


def test_addresses_are_not_copied():
    model = GPT2(tiny_config(), tiny_sources(tiny_config()))
    expected = model([[1, 2, 3]]).logits
    twin = copy.deepcopy(model._weights)
    assert twin.h.table is None
    assert model._weights.h.table is programs.tabulate(model._weights)
    first, second = model._weights.h[0].mlp.c_fc.weight.data, twin.h[0].mlp.c_fc.weight.data
    first[:] = 0  # the copy does not see it
    assert (second != 0).any()
    model._weights = twin
    assert (model([[1, 2, 3]]).logits == expected).all()


@jit.jit()
def count(counter):
    sharing.count(counter, 1)


def test_a_thread_waits_for_what_others_still_do():
    done, order = np.zeros(8, np.int64), []

    def work():
        for piece in range(3):
            order.append(piece)
            count(done)

    worker = threading.Timer(0.05, work)
    worker.start()
    sharing.wait_for(done, 3)
    assert order == [0, 1, 2]
    worker.join()
    sharing.wait_for(done, 3)  # what is done already is not waited for


def test_a_thread_that_comes_late_finds_nothing_to_do(monkeypatch):
    """Steps are done by whoever is there; one that comes afterwards goes through all of them at once."""
    model = GPT2(tiny_config(), tiny_sources(tiny_config()))
    ids = random_ids(tiny_config(), 1, 12)
    expected, done = model(ids).logits, []

    def one_after_the_other(call, workers, *first):
        if not first:  # no program
            call.run()
            return
        for _ in range(2):
            call.run(*first[:-1], 2)
            done.append(call.arguments[4][:-1, 1, 0].copy())  # pieces of all steps but lm_head that are done

    monkeypatch.setattr(programs.threads, "run", one_after_the_other)
    assert model(ids).logits.tobytes() == expected.tobytes()
    assert len(done) == 2
    assert done[0].all()
    assert (done[0] == done[1]).all()


def test_a_program_is_kept_with_its_cache_while_weights_and_memory_are_the_same():
    config = tiny_config()
    model, other = GPT2(config, tiny_sources(config)), GPT2(config, tiny_sources(config), weights="int8")
    ids, cache = random_ids(config, 1, 4)[0].tolist(), model.new_cache()
    expected = [model.next_logits([i], cache).tobytes() for i in ids]
    program = cache.layers.programs[1, 1]
    assert list(cache.layers.programs) == [(1, 1)]
    cache.crop(0)
    assert [other.next_logits([i], cache).tobytes() for i in ids] != expected  # weights of its own
    assert cache.layers.programs[1, 1] is not program
    twin = cache.copy()  # of which one must take other memory
    for one in (cache, twin, copy.deepcopy(twin)):
        one.crop(0)
        assert [model.next_logits([i], one).tobytes() for i in ids] == expected
    assert not pickle.loads(pickle.dumps(cache)).layers.programs


@pytest.mark.parametrize("T", [48, 49])
def test_what_was_returned_is_not_written_to_again(T):
    """Programs keep the memory of few rows; results have their own."""
    config = tiny_config(n_ctx=T)
    model = GPT2(config, tiny_sources(config))
    cache, first, second = model.new_cache(), *random_ids(config, 2, T)
    results = []
    for ids in (first, second, first):
        cache.crop(0)
        output = model(ids, cache=cache)
        results.append((output.last_hidden_state.copy(), output.last_hidden_state))
    assert (T == 48) == bool(cache.layers.programs)
    for before, now in results:
        assert np.array_equal(before, now)


def test_long_calls_can_be_stopped_between_blocks():
    config = tiny_config(n_ctx=49)
    model = GPT2(config, tiny_sources(config))
    program = programs.Program(model._weights, model.new_cache().layers, 1, 49, 1)
    steps = len(programs.BLOCK)
    begins = [0, *range(1 + steps, 2 + steps * config.n_layer, steps)]
    assert [first for first, *_ in program.calls] == begins
    assert len(program.steps) == 3 + steps * config.n_layer


def test_the_memory_of_a_cache_is_free_as_soon_as_nobody_has_it():
    model = GPT2(tiny_config(), tiny_sources(tiny_config()))
    cache = model.new_cache()
    model.next_logits([1], cache)
    memory = weakref.ref(cache.array.base)
    gc.disable()
    try:
        del cache
        assert memory() is None
    finally:
        gc.enable()


def test_a_kept_program_uses_no_more_threads_than_a_call_may(monkeypatch):
    if get_num_threads() == 1:
        pytest.skip("one thread alone")
    model = GPT2(tiny_config(), tiny_sources(tiny_config()))
    cache, used, before = model.new_cache(), [], get_num_threads()
    monkeypatch.setattr(threads, "GRAIN", 1)
    monkeypatch.setattr(threads, "run", lambda call, workers, *first: used.append(workers))
    for count in (before, 1, before):
        threads.set_num_threads(count)
        model.next_logits([1], cache)
    assert used[0] > 1
    assert used == [used[0], 1, used[0]]


@pytest.mark.jit
def test_who_finds_the_threads_taken_works_alone(monkeypatch):
    if get_num_threads() == 1:
        pytest.skip("one thread alone")
    monkeypatch.setattr(threads, "GRAIN", 1)
    model = GPT2(tiny_config(), tiny_sources(tiny_config()))
    expected = model([[1, 2, 3]]).logits.tobytes()
    team = threads._team
    monkeypatch.setattr(team, "run", lambda *given: pytest.fail("it was free"))
    with team.lock:
        assert model([[1, 2, 3]]).logits.tobytes() == expected
