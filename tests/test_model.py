"""GPT2 and KVCache: one path for prefill, chunks, single tokens and batches; errors before any work."""

import functools
import gc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gpt2np
from gpt2np.errors import (
    ContextOverflowError,
    InputError,
    ModelFileError,
    TokenizerError,
    TokenRangeError,
    WeightError,
)
from gpt2np.masks import MaskRule
from gpt2np.model import GPT2
from gpt2np.onnx.read.reader import open_model
from gpt2np.parity import trace
from tiny import ArraySource, random_ids, tiny_config, tiny_model, tiny_sources

ENGINES = ["numpy", "numba"]


@functools.cache
def shared_model(engine, **changes):  # hypothesis calls a test many times: one model for each engine
    return tiny_model(engine, "float32" if engine == "numba" else "float64", **changes)


def agree(engine, a, b):
    """Bit for bit with the kernels; to float64 rounding in NumPy, whose matrix products depend on the shapes."""
    if engine == "numba":
        np.testing.assert_array_equal(a, b)
    else:
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("engine", ENGINES)
@given(data=st.data())
def test_full_pass_equals_any_chunks_with_a_cache(engine, data):
    model = shared_model(engine)
    T = data.draw(st.integers(1, model.config.n_ctx), label="T")
    cuts = sorted(data.draw(st.sets(st.integers(1, T)), label="cuts") - {T})
    ids = random_ids(model.config, data.draw(st.integers(1, 3), label="B"), T, seed=T)
    whole = model(ids)
    cache = model.new_cache(len(ids))
    chunks = [model(part, cache=cache) for part in np.split(ids, cuts, axis=1)]
    assert cache.length == T
    agree(engine, np.concatenate([c.last_hidden_state for c in chunks], axis=1), whole.last_hidden_state)
    agree(engine, np.concatenate([c.logits for c in chunks], axis=1), whole.logits)
    for got, expected in zip(cache.views(), whole.past, strict=True):
        agree(engine, got, expected)


@pytest.mark.parametrize("engine", ENGINES)
@given(data=st.data())
def test_a_batch_gives_each_row_what_it_gets_alone(engine, data):
    model = shared_model(engine)
    B, T = data.draw(st.integers(2, 5)), data.draw(st.integers(1, model.config.n_ctx))
    ids = random_ids(model.config, B, T, seed=B)
    together = model(ids)
    for row in range(B):
        alone = model(ids[row])
        agree(engine, together.last_hidden_state[row : row + 1], alone.last_hidden_state)
        for a, b in zip(together.past, alone.past, strict=True):
            agree(engine, a[:, row : row + 1], b)


@pytest.mark.parametrize("on", [True, False])
def test_loading_leaves_the_collector_as_it_was(on, tmp_path):
    before = gc.isenabled()
    try:
        (gc.enable if on else gc.disable)()
        gpt2np.load(engine="numpy")
        assert gc.isenabled() is on
        (tmp_path / "model.onnx").write_bytes(b"no model")
        with pytest.raises(gpt2np.Gpt2npError):
            gpt2np.load(tmp_path)
        assert gc.isenabled() is on
    finally:
        (gc.enable if before else gc.disable)()


@pytest.mark.parametrize("engine", ENGINES)
def test_crop_and_copy_go_back_in_time(engine):
    model = shared_model(engine)
    ids = random_ids(model.config, 1, 9)
    cache = model.new_cache()
    model(ids[:, :5], cache=cache)
    branch = cache.copy()
    first = model(ids[:, 5:], cache=cache).last_hidden_state
    agree(engine, model(ids[:, 5:], cache=branch).last_hidden_state, first)  # the copy is independent
    cache.crop(5)
    assert cache.length == 5
    agree(engine, model(ids[:, 5:], cache=cache).last_hidden_state, first)
    cache.crop(-4)
    assert cache.length == 5
    for bad in (6, -6):
        with pytest.raises(InputError, match="crop"):
            cache.crop(bad)


@pytest.mark.parametrize("engine", ENGINES)
def test_left_padding_is_masked_out(engine):
    model = shared_model(engine)
    ids = random_ids(model.config, 1, 6)
    padded = np.concatenate([np.zeros((1, 3), np.int64), ids], axis=1)
    mask = np.array([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    positions = np.array([[0, 0, 0, 0, 1, 2, 3, 4, 5]])
    got = model(padded, attention_mask=mask, position_ids=positions).last_hidden_state
    assert np.isfinite(got).all()
    agree(engine, got[:, 3:], model(ids).last_hidden_state)


@pytest.mark.parametrize("engine", ENGINES)
def test_results_do_not_alias_and_inputs_are_not_written(engine):
    model = shared_model(engine)
    ids = random_ids(model.config, 2, 7)
    before = ids.copy()
    first = model(ids)
    kept = [a.copy() for a in (first.last_hidden_state, first.logits, *first.past)]
    model(random_ids(model.config, 2, 7, seed=1))
    np.testing.assert_array_equal(ids, before)
    for now, then in zip((first.last_hidden_state, first.logits, *first.past), kept, strict=True):
        np.testing.assert_array_equal(now, then)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_shows_in_the_result_without_warnings(engine, bad):
    config = tiny_config()
    sources = tiny_sources(config)
    sources["h.0.ln_1.bias"].array[3] = bad
    assert np.isnan(GPT2(config, sources, engine)([1, 2, 3]).last_hidden_state).all()


def test_ids_of_every_rank_and_integer_type():
    model = shared_model("numpy")
    ids = random_ids(model.config, 2, 3, 4)
    rank3 = model(ids).last_hidden_state
    assert rank3.shape == (6, 4, model.config.n_embd)
    np.testing.assert_array_equal(model(ids.reshape(6, 4)).last_hidden_state, rank3)
    np.testing.assert_array_equal(model(ids.astype(np.uint8)).last_hidden_state, rank3)
    assert model(ids[0, 0].tolist()).last_hidden_state.shape == (1, 4, model.config.n_embd)


def test_logits_can_be_left_out_or_asked_for_the_last_position():
    model = shared_model("numpy")
    ids = random_ids(model.config, 2, 5)
    assert model(ids, logits=False).logits is None
    np.testing.assert_allclose(model(ids, logits="last").logits, model(ids).logits[:, -1:], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("ids", "error", "words"),
    [
        ([[1.0, 2.0]], InputError, "integers.*float64"),
        (5, InputError, r"\(T,\).*got \(\)"),
        (np.zeros((1, 1, 1, 1), int), InputError, "got"),
        (np.zeros((1, 0), int), InputError, "at least one"),
        ([[3, 37]], TokenRangeError, r"37 at \(0, 1\).*0\.\.36"),
        ([[-1, 3]], TokenRangeError, r"-1 at \(0, 0\)"),
        (np.zeros((1, 21), int), ContextOverflowError, "21 positions.*20"),
    ],
)
def test_bad_ids_say_what_was_given_and_expected(ids, error, words):
    with pytest.raises(error, match=words):
        shared_model("numpy")(ids)


def test_a_full_cache_raises_and_is_left_as_it_was():
    model = shared_model("numpy")
    cache = model.new_cache(max_length=4)
    model([1, 2, 3], cache=cache)
    with pytest.raises(ContextOverflowError, match="2 new positions after 3"):
        model([1, 2], cache=cache)
    assert cache.length == 3
    with pytest.raises(ContextOverflowError, match="n_ctx"):
        model.new_cache(max_length=21)
    with pytest.raises(InputError, match="batch"):
        model([[1], [2]], cache=cache)
    with pytest.raises(InputError, match="batch_size"):
        model.new_cache(batch_size=0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "changes", [{}, {"mask": MaskRule(value=-100.0)}, {"mask": MaskRule(shift=1)}, {"position_offset": 2}]
)
def test_next_logits_are_those_of_a_call(engine, changes):
    model = shared_model(engine, **changes)
    ids = random_ids(model.config, 3, 6)
    one, other = model.new_cache(3), model.new_cache(3)
    for cache in (one, other):
        model(ids[:, :4], cache=cache)
    for column in ids[:, 4:].T:
        expected = model(column[:, None], cache=one, logits="last").logits[:, 0]
        np.testing.assert_array_equal(model.next_logits(column.astype(np.uint8), other), expected)
    assert other.length == 6
    np.testing.assert_array_equal(np.array(other.views()), np.array(one.views()))


@pytest.mark.parametrize("engine", ENGINES)
def test_log_probabilities_of_any_number_of_tokens(engine):
    model = shared_model(engine)
    scores = model(random_ids(model.config, 2, 3)).logits
    targets = np.tile(np.arange(37), (2, 3, 1))
    logs, best = model.log_probabilities(scores, targets)
    assert logs.dtype == np.float64
    np.testing.assert_allclose(np.exp(logs).sum(axis=-1), 1, rtol=1e-6)
    assert (best.argmax(axis=-1) == scores.argmax(axis=-1)).all()
    np.testing.assert_array_equal(model.log_probabilities(scores, targets[..., 5:7])[0], logs[..., 5:7])
    np.testing.assert_array_equal(model.log_probabilities(scores[1, 2], [36, 0])[0], logs[1, 2, [36, 0]])
    for bad, error, words in [
        ((scores, targets[..., 0]), InputError, r"targets must have shape \(2, 3, n\), got \(2, 3\)"),
        ((scores, targets[:, :2]), InputError, r"targets must have shape \(2, 3, n\), got \(2, 2, 37\)"),
        ((scores[..., :36], targets), InputError, r"scores must be float.. \(..., 37\), got float.. \(2, 3, 36\)"),
        ((scores.astype(np.float16), targets), InputError, "scores must be float.*got float16"),
        ((np.float32(1), targets), InputError, r"scores must be .*got float32 \(\)"),
        ((scores, targets + 1), TokenRangeError, r"37 at \(0, 0, 36\) of targets"),
        ((scores[0, 0], [-1]), TokenRangeError, r"-1 at \(0,\) of targets"),
        ((scores[0, 0], [0.5]), InputError, "targets must be integers"),
    ]:
        with pytest.raises(error, match=words):
            model.log_probabilities(*bad)


def test_next_logits_check_as_a_call_does():
    model = shared_model("numpy")
    with pytest.raises(TokenRangeError, match=r"37 at \(1,\).*0\.\.36"):
        model.next_logits([3, 37], model.new_cache(2))
    with pytest.raises(TokenRangeError, match="-1 at"):
        model.next_logits([-1], model.new_cache())
    with pytest.raises(InputError, match="must be integers, got dtype float64"):
        model.next_logits([1.5], model.new_cache())
    for tokens in ([[1, 2]], 1):
        with pytest.raises(InputError, match=r"must have shape \(B,\), got \("):
            model.next_logits(tokens, model.new_cache())
    with pytest.raises(InputError, match="rows of different lengths"):
        model.next_logits([[1], [2, 3]], model.new_cache())
    with pytest.raises(TokenRangeError, match="37 at"):
        model.logits_of_each([3, 37], model.new_cache())
    with pytest.raises(InputError, match="made for batch 1.*needed: batch 2"):
        model.next_logits([1, 2], model.new_cache())
    full, all_positions = model.new_cache(max_length=4), model.new_cache()
    full.advance(4)
    all_positions.advance(20)
    with pytest.raises(ContextOverflowError, match="max_length of 4"):
        model.next_logits([1], full)
    with pytest.raises(ContextOverflowError, match="n_ctx of 20"):
        model.next_logits([1], all_positions)
    shifted = shared_model("numpy", position_offset=2)
    nearly = shifted.new_cache()
    nearly.advance(18)
    with pytest.raises(ContextOverflowError, match=r"positions 20\.\.20"):
        shifted.next_logits([1], nearly)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": "float64"}, "batch 1, float64, 2 layers, 3 heads of 4; needed: batch 1, float32"),
        ({"n_layer": 1}, "1 layers.*needed.*2 layers"),
        ({"n_head": 2}, "2 heads of 4.*needed.*3 heads of 4"),
        ({"head_size": 5}, "3 heads of 5.*needed.*3 heads of 4"),
    ],
)
def test_a_cache_of_another_model_is_an_error(changes, words):
    cache = tiny_model("numpy", **changes).new_cache()
    with pytest.raises(InputError, match=words):
        tiny_model("numpy")([1], cache=cache)
    assert cache.length == 0


@pytest.mark.parametrize("engine", ["numba", "numpy"])
def test_a_call_that_fails_leaves_the_cache_as_it_was(engine):
    model = tiny_model(engine)
    ids = random_ids(model.config, 2, 6)
    expected = model(ids)
    for name in model.trace(ids):

        def fail(tap, _, name=name):
            if tap == name:
                raise KeyError(name)

        cache = model.new_cache(2)
        model(ids[:, :2], cache=cache)
        with pytest.raises(KeyError):
            model(ids[:, 2:], cache=cache, tap=fail)
        assert cache.length == 2
        np.testing.assert_allclose(model(ids[:, 2:], cache=cache).logits, expected.logits[:, 2:], atol=1e-5)


@pytest.mark.parametrize("engine", ["numba", "numpy"])
def test_two_calls_cannot_use_a_cache_at_once(engine):
    model = tiny_model(engine)
    cache, other = model.new_cache(), model.new_cache()

    def again(name, _):
        if name == "h.0.ln_2":
            model([1, 2], cache=cache)

    model([1, 2], cache=other, tap=again)
    with pytest.raises(InputError, match="held 2 positions when a call began and 4 when it ended"):
        model([3], cache=cache, tap=again)


def test_bad_masks_and_positions():
    model = shared_model("numpy")
    with pytest.raises(InputError, match=r"attention_mask.*\(1, 3\)"):
        model([1, 2, 3], attention_mask=np.ones((1, 2)))
    for mask in ([[1, 2, 1]], [[1, np.nan, 1]], [[0.0, -1e4, 0.0]]):
        with pytest.raises(InputError, match="attention_mask must be 1 .* got"):
            model([1, 2, 3], attention_mask=mask)
    with pytest.raises(InputError, match=r"position_ids.*\(1, 3\)"):
        model([1, 2, 3], position_ids=np.zeros((1, 2), int))
    with pytest.raises(ContextOverflowError, match="20"):
        model([1], position_ids=[[20]])


def test_missing_misshapen_and_left_over_weights_are_named():
    config = tiny_config()
    sources = tiny_sources(config)
    missing = {k: v for k, v in sources.items() if k != "h.1.ln_2.bias"}
    with pytest.raises(WeightError, match=r"h\.1\.ln_2\.bias.*missing"):
        GPT2(config, missing, "numpy")
    with pytest.raises(WeightError, match=r"wpe\.weight has shape \(3, 3\)"):
        GPT2(config, {**sources, "wpe.weight": ArraySource(np.zeros((3, 3), np.float32))}, "numpy")
    with pytest.raises(WeightError, match="extra.*left over"):
        GPT2(config, {**sources, "extra": ArraySource(np.zeros(1, np.float32))}, "numpy")


def test_unknown_engine_dtype_and_file():
    for wrong in ({"engine": "jax"}, {"dtype": "float16"}):
        with pytest.raises(InputError, match="must be"):
            GPT2(tiny_config(), tiny_sources(tiny_config()), **wrong)
    with pytest.raises(ModelFileError, match="nowhere"):
        gpt2np.load("nowhere/model.onnx")


@pytest.mark.parametrize("engine", ENGINES)
def test_variants_of_gpt2_run_with_both_engines(engine):
    """Untied head, another MLP width and head size, mixed activations: float64 of the textbook decides."""
    changes = {
        "tied": False,
        "n_inner": 20,
        "head_size": 5,
        "activation": "gelu_erf",
        "overrides": (("h.1.mlp.activation", "relu"), ("h.0.ln_2.epsilon", 1e-2), ("h.1.attn.scale", 0.1)),
        "position_offset": 1,
        "mask": MaskRule(shift=1),
    }
    got = tiny_model(engine, **changes)(ids := random_ids(tiny_config(), 2, 9))
    oracle = tiny_model("numpy", "float64", **changes)(ids)
    np.testing.assert_allclose(got.logits, oracle.logits, rtol=1e-4, atol=1e-5)
    assert np.abs(oracle.logits - tiny_model("numpy", "float64")(ids).logits).max() > 0.1


def test_text_goes_in_and_comes_out():
    model = gpt2np.load(engine="numpy")
    ids = model.encode("Once upon a time")
    assert model.decode(ids) == "Once upon a time"
    assert model.decode([]) == ""
    np.testing.assert_array_equal(model.trace("Once upon a time")["ln_f"], model.trace(ids)["ln_f"])
    with pytest.raises(TokenRangeError, match="outside"):
        model.decode([10**6])
    with pytest.raises(TokenizerError, match="no tokenizer"):
        tiny_model("numpy").encode("text")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], r"at least one token, got shape \(0,\)"),
        ([[]], "at least one token"),
        ([[1, 2], [3]], "rows of different lengths"),
        ("Once upon a time", "got text; model.encode"),
        ([1.5], "must be integers, got dtype float64"),
        (None, r"must have shape .*, got \(\)"),
    ],
    ids=str,
)
def test_ids_that_are_none_are_named_for_what_they_are(ids, message):
    with pytest.raises(InputError, match=message):
        shared_model("numpy")(ids)


def test_dir_lists_the_public_names():
    assert set(gpt2np.__all__) <= set(dir(gpt2np))
    assert not {name for name in dir(gpt2np) if name.startswith("_")} - {"__version__"}
    assert not {"Any", "TYPE_CHECKING", "annotations", "import_module"} & set(dir(gpt2np))


@pytest.mark.parametrize("path", ["", b"", b"model.onnx", 5, 1.5, [], "a\0b"])
@pytest.mark.parametrize("read", [gpt2np.load, gpt2np.tokenizer.load, open_model, trace.load])
def test_what_is_no_path_is_an_error(read, path):
    """An empty one, as an unset variable leaves it, is not this folder."""
    with pytest.raises(InputError, match="expected a path, got"):
        read(path)


def test_arguments_of_another_kind_are_told_for_what_they_are():
    model = gpt2np.load(engine="numpy")
    cache, session = model.new_cache(), gpt2np.InferenceSession(model.path, engine="numpy")
    model([[1, 2, 3]], cache=cache)
    feeds = {"input1": np.ones((1, 1, 3), np.int64)}
    wrong = {
        "crop": lambda: cache.crop(1.5),
        "a cache is what new_cache gives, got list": lambda: model([[1]], cache=[]),
        "a cache is what new_cache gives, got NoneType": lambda: model.next_logits([1], None),
        "a cache is what new_cache gives, got dict": lambda: model.logits_of_each([1], {}),
        "a cache is what new_cache gives, got str": lambda: cache.fill("cache"),
        "a cache is what new_cache gives, got int": lambda: model.generate([1], 1, cache=3),
        "number of new positions must be a whole number": lambda: cache.advance(-1),
        "batch_size must be a whole number": lambda: model.new_cache(1.5),
        "max_length must be a whole number": lambda: model.new_cache(1, "8"),
        "no memory for a cache": lambda: model.new_cache(2**62),
        "tap must be a function": lambda: model([1], cache=cache, tap=[]),
        "logits must be one of True, False, last, got 'Last'": lambda: model([1], cache=cache, logits="Last"),
        "logits must be one of": lambda: model([1], cache=cache, logits=np.ones(2)),
        "engine must be one of numba, numpy": lambda: gpt2np.load(engine=np.array(["numpy", "numba"])),
        "emulate_rounding must be one of.*got 'optimized'": lambda: gpt2np.InferenceSession(
            model.path, emulate_rounding="optimized"
        ),
        "attention_mask must be rows of one length": lambda: model([[1, 2]] * 2, attention_mask=[[1, 1], [1]]),
        "position_ids must be integers": lambda: model([1], position_ids=0),
        "position_ids must be rows of one length": lambda: model([[1, 2]] * 2, position_ids=[[0, 1], [0]]),
        "input 'input1' must be rows of one length": lambda: session.run(None, {"input1": [[[1], [1, 2]]]}),
        "output_names must be a sequence of strings, got 'output1'": lambda: session.run("output1", feeds),
        "providers must be names": lambda: gpt2np.InferenceSession(model.path, providers=1),
        "expected token ids, got": lambda: gpt2np.tokenizer.decode(model.tokenizer, [-1]),
        "a tokenizer is what gpt2np.tokenizer.load gives, got str": lambda: model.generate("a", tokenizer="a.json"),
        "expected a path, got 5": lambda: gpt2np.zoo.find(5),
        "the number of threads must be a whole number": lambda: gpt2np.set_num_threads(1.5),
        "expected a text, got NoneType": lambda: model.encode(None),
        "expected a text, got bytes": lambda: model.encode(b"text"),
        "expected token ids, got NoneType": lambda: model.decode(None),
        "expected a dictionary of inputs by name, got list": lambda: session.run(None, [feeds["input1"]]),
        "expected a dictionary of inputs by name, got NoneType": lambda: session.run(None, None),
        "unknown: 1": lambda: session.run(None, feeds | {1: feeds["input1"]}),
    }
    for words, call in wrong.items():
        with pytest.raises(gpt2np.errors.InputError, match=words):
            call()
    assert cache.length == 3
