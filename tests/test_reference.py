"""The textbook: dtypes, shapes, taps, and its formulas against other ways to compute them."""

import math

import numpy as np
import pytest

from gpt2np import activations, reference
from gpt2np.weights import MLP, Attention, BlockWeights, LayerNorm, Linear
from tiny import random_ids, tiny_config, tiny_model

B, T, C, H, F = 2, 5, 12, 3, 48


def weights(dtype, seed=0):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.standard_normal(shape).astype(dtype)

    norm = LayerNorm(draw(C), draw(C), 1e-5)
    attn = Attention(Linear(draw(C, 3 * C), draw(3 * C)), Linear(draw(C, C), draw(C)), H, 0.5)
    mlp = MLP(Linear(draw(C, F), draw(F)), Linear(draw(F, C), draw(C)), "gelu_tanh")
    return draw(B, T, C), BlockWeights(norm, attn, norm, mlp)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtype_in_is_dtype_out_of_every_function(dtype):
    x, w = weights(dtype)
    cache = np.zeros((2, B, H, T, C // H), dtype)
    table = w.mlp.c_fc.weight.T.copy()  # (F, C) serves as wte and as wpe
    ids = np.zeros((B, T), np.int64)
    results = {
        "embed": reference.embed(ids, ids, table, table),
        "layer_norm": reference.layer_norm(x, *w.ln_1),
        "linear": reference.linear(x, *w.attn.c_attn),
        "softmax": reference.softmax(x),
        "causal_mask": reference.causal_mask(np.zeros((T, T), dtype)),
        "attention": reference.attention(x, w.attn, cache, 0, reference.causal_mask, reference.no_tap, "h.0.attn"),
        "mlp": reference.mlp(x, w.mlp, reference.no_tap, "h.0.mlp"),
        "block": reference.block(x, w, cache, 0, reference.causal_mask, reference.no_tap, "h.0"),
        "logits": reference.logits(x, table, table[:, 0].copy()),
        **{name: f(x) for name, f in activations.ACTIVATIONS.items()},
    }
    assert {name: result.dtype for name, result in results.items()} == dict.fromkeys(results, np.dtype(dtype))
    for head in reference.split_heads(reference.linear(x, *w.attn.c_attn), H):
        assert head.dtype == dtype
        assert head.shape == (B, H, T, C // H)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_taps_come_in_order_with_their_names_shapes_and_dtype(dtype):
    model = tiny_model("numpy", dtype)
    c, S = model.config, 5
    heads = (2, c.n_head, S, c.head_size)
    square, stream = (2, c.n_head, S, S), (2, S, c.n_embd)
    expected = {"embed": stream}
    for i in range(c.n_layer):
        expected |= {f"h.{i}.ln_1": stream, f"h.{i}.attn.q": heads, f"h.{i}.attn.k": heads, f"h.{i}.attn.v": heads}
        expected |= {f"h.{i}.attn.scores": square, f"h.{i}.attn.probs": square}
        expected |= {f"h.{i}.{n}": stream for n in ("attn.heads", "attn.out", "resid_mid", "ln_2")}
        expected |= {f"h.{i}.mlp.c_fc": (2, S, c.n_inner), f"h.{i}.mlp.gelu": (2, S, c.n_inner)}
        expected |= {f"h.{i}.{n}": stream for n in ("mlp.out", "resid_post")}
    expected |= {"ln_f": stream, "logits": (2, S, c.vocab_size)}
    taps = model.trace(random_ids(c, 2, S))
    assert list(taps) == list(expected)
    assert {name: a.shape for name, a in taps.items()} == expected
    assert {a.dtype for a in taps.values()} == {np.dtype(dtype)}


def test_layer_norm_gives_mean_0_and_variance_1():
    x, _ = weights(np.float64)
    y = reference.layer_norm(x, np.ones(C), np.zeros(C), 0.0)
    np.testing.assert_allclose(y.mean(-1), 0, atol=1e-15)
    np.testing.assert_allclose(y.var(-1), 1, rtol=1e-14)


def test_attention_is_the_sum_over_allowed_keys():
    """Against the definition, written with loops over batch, head, query and key."""
    x, w = weights(np.float64)
    D = C // H
    cache = np.zeros((2, B, H, T, D))
    got = reference.attention(x, w.attn, cache, 0, reference.causal_mask, reference.no_tap, "h.0.attn")
    qkv = x @ w.attn.c_attn.weight + w.attn.c_attn.bias
    heads = np.zeros((B, T, C))
    for b in range(B):
        for h in range(H):
            q, k, v = (qkv[b, :, part * C + h * D : part * C + (h + 1) * D] for part in range(3))
            for t in range(T):
                scores = np.array([q[t] @ k[j] * w.attn.scale for j in range(t + 1)])
                probs = np.exp(scores) / np.exp(scores).sum()
                heads[b, t, h * D : (h + 1) * D] = sum(probs[j] * v[j] for j in range(t + 1))
    np.testing.assert_allclose(got, heads @ w.attn.c_proj.weight + w.attn.c_proj.bias, rtol=1e-12)


def test_activations_at_known_points():
    x = np.array([-40.0, -1.0, 0.0, 1.0, 40.0])
    phi = 0.5 * (1 + math.erf(math.sqrt(0.5)))  # P(normal < 1) = 0.8413...
    np.testing.assert_allclose(activations.gelu_erf(x), [0, phi - 1, 0, phi, 40], atol=1e-15)
    np.testing.assert_allclose(activations.gelu_tanh(x), activations.gelu_erf(x), atol=5e-4)
    np.testing.assert_allclose(activations.gelu_quick(x), activations.gelu_erf(x), atol=2.1e-2)
    assert activations.gelu_quick(np.float32([-1e30]))[0] == 0
    np.testing.assert_allclose(activations.silu(x), [0, -1 / (1 + math.e), 0, math.e / (1 + math.e), 40], atol=1e-15)
    assert activations.silu(np.float32([-1e30]))[0] == 0
    np.testing.assert_array_equal(activations.tanh(x), np.tanh(x))
    np.testing.assert_array_equal(activations.relu(np.array([-1.0, 2.0, np.nan])), [0, 2, np.nan])


def test_a_later_token_does_not_change_earlier_rows():
    model = tiny_model("numpy", "float64")
    ids = random_ids(model.config, 1, 6)
    changed = ids.copy()
    changed[0, 4] = (changed[0, 4] + 1) % model.config.vocab_size
    a, b = model(ids).last_hidden_state, model(changed).last_hidden_state
    np.testing.assert_allclose(a[:, :4], b[:, :4], rtol=1e-14)
    assert np.abs(a[:, 4:] - b[:, 4:]).max() > 1e-3


def test_float32_stays_within_rounding_of_float64():
    c = tiny_config()
    ids = random_ids(c, 2, 8)
    single, double = (tiny_model("numpy", d)(ids).last_hidden_state for d in ("float32", "float64"))
    assert single.dtype == np.float32
    assert np.abs(single - double).max() < 1e-5


def test_greedy_is_what_generate_does():
    model = tiny_model("numpy")
    ids = random_ids(model.config, 2, 5)
    expected = [[step.token_id for step in model.generate(row, max_new_tokens=6)] for row in ids]
    assert np.array_equal(reference.greedy(ids, model.weights, 6), np.concatenate([ids, expected], axis=1))
