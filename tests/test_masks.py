"""Masks of a finite number hide a key only while scores keep away from that number."""

import numpy as np
import onnx
import pytest

import gpt2np
from gpt2np import reference
from gpt2np.convert.writer import write_model
from gpt2np.errors import UnsupportedModelError
from gpt2np.masks import CAUSAL, MaskRule, SafeScores, mask_for
from gpt2np.model import GPT2
from gpt2np.session import InferenceSession
from runtime import feeds_for, runtime
from tiny import ArraySource, random_ids, tiny_config, tiny_model, tiny_sources


def far_out(factor):
    """Weights whose scores are larger by the square of that factor."""
    sources = tiny_sources(tiny_config())
    return {
        name: ArraySource((source.array * np.float32(factor)).astype(np.float32)) if "c_attn" in name else source
        for name, source in sources.items()
    }


@pytest.mark.parametrize("engine", ["numba", "numpy"])
@pytest.mark.parametrize("factor", [100, 1e4])
@pytest.mark.parametrize("opset", [10, 18])
def test_scores_below_the_masks_number_give_hidden_keys_weight_as_in_the_file(tmp_path, opset, factor, engine):
    path = tmp_path / "model.onnx"
    write_model(path, tiny_config(), far_out(factor), opset=opset, lm_head=True)
    session = InferenceSession(path, engine=engine)
    feeds = feeds_for(session.model.recognised, 2, 9)
    expected = runtime(path).run(None, feeds)[0]
    np.testing.assert_allclose(session.run(None, feeds)[0], expected, 1e-3, 1e-5)

    # the case is one in which that can be seen
    model = gpt2np.load(path, engine="numpy")
    ids = next(value for value in feeds.values() if value.dtype.kind == "i").reshape(2, 9)
    caches = model.new_cache(2, 9).layers
    causal = reference.transformer(ids, np.arange(9)[None].repeat(2, 0), model.weights, caches)
    assert np.abs(causal - model(ids).last_hidden_state).max() > 0.01


def test_a_single_token_notices_too(tmp_path):
    path = tmp_path / "model.onnx"
    write_model(path, tiny_config(), far_out(100), opset=18, lm_head=True, with_past=True)
    model, textbook = gpt2np.load(path), gpt2np.load(path, engine="numpy")
    got, expected = [], []
    for m, logits in ((model, got), (textbook, expected)):
        cache = m.new_cache()
        logits += [m.next_logits([token], cache) for token in (3, 1, 4, 1, 5)]
    np.testing.assert_allclose(np.stack(got), np.stack(expected), 1e-3, 1e-4)


def test_safe_scores():
    f32, f64 = np.dtype(np.float32), np.dtype(np.float64)
    assert CAUSAL.safe_scores(None, f32) == (-1e4 + 105, np.inf, -np.inf)
    assert CAUSAL.safe_scores(None, f64) == (-1e4 + 746, np.inf, -np.inf)
    assert MaskRule("added").safe_scores(None, f32) == (-np.inf, np.inf, -1e4 + 105)
    assert MaskRule("none").safe_scores(None, f32) == SafeScores()
    added = MaskRule(padding=(1.0, -1e4))
    assert added.safe_scores(None, f32).added == -np.inf
    assert added.safe_scores(np.ones((1, 2)), f32).added == -1e4 + 105


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("size", [0.02, 1.0, 30.0])
def test_a_huge_hidden_key_beside_small_visible_scores_is_noticed(size, padded):
    """Where -10000 is added, a hidden key counts by its own score: textbook and kernels do what the file does."""
    rule = MaskRule(padding=(1.0, -1e4), padding_later=(1.0, -1e4)) if padded else MaskRule("added")
    config = tiny_config(n_layer=1, mask=rule)
    sources = tiny_sources(config)
    ids = np.array([[1, 2, 3, 4, 5]])
    keep = np.array([[1, 1, 1, 1, 0]]) if padded else None
    C, D = config.n_embd, config.head_size
    row = sources["wte.weight"].array[5] + sources["wpe.weight"].array[4]
    normed = (row - row.mean()) / row.std()
    c_attn = sources["h.0.attn.c_attn.weight"].array
    c_attn[:, C : C + D] += 1000 * size * np.outer(normed / C, np.ones(D))  # the last token's first key
    models = [GPT2(config, sources, engine) for engine in ("numba", "numpy")]
    got, expected = (m(ids, attention_mask=keep).last_hidden_state for m in models)
    np.testing.assert_allclose(got, expected, 1e-3, 1e-4)
    whole = mask_for(rule, keep, 1, 5, 5, np.dtype(np.float32), whole=True)
    seen: dict[str, np.ndarray] = {}
    models[1](ids, attention_mask=keep, tap=lambda name, value: seen.setdefault(name, value.copy()))
    probs = seen["h.0.attn.probs"]
    np.testing.assert_array_equal(probs, reference.softmax(whole(seen["h.0.attn.scores"])))
    assert (probs[..., :4, 4] > 0).any() == (size == 30)


@pytest.mark.parametrize("rule", [CAUSAL, MaskRule("added"), MaskRule(blind_rows="masked")], ids=str)
def test_the_whole_mask_and_its_shortcut_give_the_same_for_safe_scores(rule):
    hidden = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    scores = np.random.default_rng(0).standard_normal((2, 3, 5, 5)) * 50
    short, whole = (mask_for(rule, hidden, 2, 5, 5, scores.dtype, whole) for whole in (False, True))
    assert short is not None
    assert whole is not None
    np.testing.assert_array_equal(reference.softmax(short(scores)), reference.softmax(whole(scores)))


def test_padded_queries_that_see_nothing_take_the_kernels_too():
    """What the file gives them comes from its replaced scores alone; the other rows keep their bits."""
    rule = MaskRule(blind_rows="masked")
    model, textbook = (tiny_model(engine, mask=rule) for engine in ("numba", "numpy"))
    ids = random_ids(model.config, 1, 6)
    padded = np.concatenate([np.zeros((1, 3), np.int64), ids], axis=1)
    keep = np.array([[0] * 3 + [1] * 6])
    positions = np.maximum(keep.cumsum(axis=1) - 1, 0)
    got, expected = (m(padded, attention_mask=keep, position_ids=positions) for m in (model, textbook))
    np.testing.assert_allclose(got.last_hidden_state, expected.last_hidden_state, 1e-4, 1e-4)
    np.testing.assert_array_equal(got.logits[:, 3:], model(ids).logits)


def mixed(path, values, sources):
    """A file whose layers hide later keys by these numbers."""
    write_model(path, tiny_config(n_layer=len(values)), sources, opset=10, lm_head=False)
    model = onnx.load(path)
    makers = {output: node for node in model.graph.node for output in node.output}
    for i, value in enumerate(values):
        tensor = makers[f"/h.{i}/attn/Constant_24_output_0"].attribute[0].t
        assert onnx.numpy_helper.to_array(tensor) == 1e4
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.float32(-value)))
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("engine", ["numba", "numpy"])
def test_layers_may_hide_keys_by_different_numbers(tmp_path, engine):
    """-65504 in one layer and -10000 in another: the same model, as long as no score comes near them."""
    path = mixed(tmp_path / "model.onnx", (-65504.0, -1e4, -1e9), tiny_sources(tiny_config(n_layer=3)))
    session = InferenceSession(path, engine=engine)
    assert any("-10000, -65504, -1e+09" in note for note in session.model.recognised.notes)
    for sizes in ((2, 9), (1, 1), (1, 20)):
        feeds = feeds_for(session.model.recognised, *sizes)
        np.testing.assert_allclose(session.run(None, feeds)[0], runtime(path).run(None, feeds)[0], 1e-3, 1e-5)
    cache = session.model.new_cache()
    one_by_one = np.stack([session.model.next_logits([token], cache) for token in (3, 1, 4)], axis=1)
    np.testing.assert_allclose(one_by_one, session.model([[3, 1, 4]]).logits, 1e-3, 1e-4)


@pytest.mark.parametrize("engine", ["numba", "numpy"])
@pytest.mark.parametrize("factor", [100, 1e4])
def test_scores_near_numbers_that_differ_between_layers_are_refused(tmp_path, engine, factor):
    session = InferenceSession(mixed(tmp_path / "model.onnx", (-65504.0, -1e4), far_out(factor)), engine=engine)
    with pytest.raises(UnsupportedModelError, match=r"scores come near the numbers that hide keys \(-10000, -65504\)"):
        session.run(None, feeds_for(session.model.recognised, 2, 9))


def test_numbers_that_do_not_hide_keys_must_be_the_same(tmp_path):
    with pytest.raises(UnsupportedModelError, match="layer 1 is masked otherwise"):
        InferenceSession(mixed(tmp_path / "model.onnx", (-1e4, -5.0), tiny_sources(tiny_config())))
