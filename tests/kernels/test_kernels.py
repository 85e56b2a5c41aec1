"""The kernels against their twins in reference.py, and the promises that they make about bits, NaN and threads."""

import math
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from unittest.mock import Mock

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2np import get_num_threads, kernels, reference, set_num_threads
from gpt2np.activations import ACTIVATIONS
from gpt2np.arrays import narrowed
from gpt2np.errors import InputError
from gpt2np.kernels import calls, code, machine, panels, sharing, threads, tile, vectors
from gpt2np.kernels.layout import FORMS
from gpt2np.masks import Mask
from gpt2np.reference import no_tap
from gpt2np.weights import MLP, Attention, BlockWeights, LayerNorm, Linear
from tiny import ArraySource, random_ids, tiny_config, tiny_model, tiny_sources

EPS = {np.float32: 2**-23, np.float64: 2**-52}
DTYPES = list(EPS)
rng = np.random.default_rng(0)


def draw(*shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


def close(got, expected, dtype, terms=1):
    """Within the rounding of a sum of that many terms: an error that grows with its root would be far smaller."""
    assert got.dtype == dtype
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(got, expected, rtol=0, atol=4 * EPS[dtype] * scale * terms**0.5)


def packed(linear):
    return Linear(kernels.pack_matrix(linear.weight), linear.bias)


def random_linear(K, N, dtype):
    return Linear(draw(K, N, dtype=dtype) / K**0.5, draw(N, dtype=dtype))


def random_block(C, H, F, dtype, activation="gelu_tanh", seed=0):
    """A block as reference.py takes it, and the same block packed."""
    norms = [LayerNorm(1 + 0.1 * draw(C, dtype=dtype), draw(C, dtype=dtype), 1e-5) for _ in range(2)]
    norms = [LayerNorm(n.weight.astype(dtype), n.bias, n.epsilon) for n in norms]
    maps = [random_linear(*shape, dtype) for shape in ((C, 3 * C), (C, C), (C, F), (F, C))]
    maps = [Linear(m.weight.astype(dtype), m.bias) for m in maps]

    def tree(c_attn, attn_proj, c_fc, mlp_proj):
        scale = 1 / (C // H) ** 0.5
        return BlockWeights(norms[0], Attention(c_attn, attn_proj, H, scale), norms[1], MLP(c_fc, mlp_proj, activation))

    return tree(*maps), tree(*map(packed, maps))


# ------------------------------------------------------------------------------------------------------- twins


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("R", "K", "N"),
    [(1, 1, 1), (1, 5, 40), (1, 300, 150), (2, 300, 90), (3, 128, 32), (7, 129, 33), (13, 300, 65), (50, 17, 170)],
)
def test_linear(R, K, N, dtype):
    x, w = draw(R, K, dtype=dtype), random_linear(K, N, dtype)
    w = Linear(w.weight.astype(dtype), w.bias)
    expected = reference.linear(x.astype(np.float64), *(a.astype(np.float64) for a in w))
    close(kernels.linear(x, *packed(w)), expected, dtype, K)
    assert kernels.linear(x[None, None], *packed(w)).shape == (1, 1, R, N)


def test_packing_keeps_every_weight():
    for K, N in ((1, 1), (20, 33), (33, 64), (17, 16)):
        matrix = draw(K, N)
        np.testing.assert_array_equal(kernels.unpack(kernels.pack_matrix(matrix)), matrix)
        panels = kernels.pack_matrix(np.ascontiguousarray(matrix.T), transposed=True)
        np.testing.assert_array_equal(kernels.unpack(panels), matrix)
        assert panels.data.ctypes.data % 64 == 0


class ReadInTurn(ArraySource):
    """A source that is read some rows at a time."""

    def blocks(self, rows):
        return (self.array[i : i + rows] for i in range(0, len(self.array), rows))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [ArraySource, ReadInTurn])
def test_all_weights_are_packed_as_each_would_be(kind, dtype, monkeypatch):
    monkeypatch.setattr(panels, "READ_BYTES", 1)
    sources = {name: kind(source.array) for name, source in tiny_sources(tiny_config(vocab_size=77, n_embd=39)).items()}
    packed = kernels.pack(sources, dtype)
    assert list(packed) == list(sources)
    for name, got in packed.items():
        array = sources[name].array.astype(dtype)
        if array.ndim == 2 and name != "wpe.weight":
            matrix = array.T if name == "wte.weight" else array
            assert got.data.tobytes() == kernels.pack_matrix(matrix).data.tobytes()
            np.testing.assert_array_equal(kernels.unpack(got), matrix)
            got = got.data
        else:
            np.testing.assert_array_equal(got, array)
        assert got.dtype == dtype
        assert got.ctypes.data % 64 == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [1, 15, 16, 50])
def test_layer_norm(C, dtype):
    x, weight, bias = draw(3, 4, C, dtype=dtype), draw(C, dtype=dtype), draw(C, dtype=dtype)
    arguments = [a.astype(np.float64) for a in (x, weight, bias)]
    close(kernels.layer_norm(x, weight, bias, 1e-5), reference.layer_norm(*arguments, 1e-5), dtype, C)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_activations(name, dtype):
    x = np.linspace(-12, 12, 500).astype(dtype)
    x[:5] = 0, -0.0, np.inf, np.nan, -1e30
    got = kernels.activate(x, name)
    with np.errstate(all="ignore"):
        expected = ACTIVATIONS[name](x.astype(np.float64))
    assert got.dtype == dtype
    finite = np.isfinite(expected)
    assert np.isnan(got[3])
    assert got[2] == expected[2] == (1 if name == "tanh" else np.inf)
    np.testing.assert_allclose(got[finite], expected[finite], rtol=60 * EPS[dtype], atol=8 * EPS[dtype])


def test_logarithm_and_tanh_to_the_last_place():
    x = np.exp(rng.uniform(-3, 12, 2000))
    exact = np.log(x.astype(np.longdouble)) if np.finfo(np.longdouble).eps < 1e-18 else np.log(x)
    got = np.array([vectors.log(value) for value in x])
    assert np.abs((got - exact) / np.spacing(np.abs(got))).max() < 1.5
    assert [vectors.log(2.0**k) for k in (0, 1, 4)] == [0, math.log(2), math.log(16)]
    x = np.concatenate([rng.uniform(-10, 10, 5000), 10.0 ** rng.uniform(-30, 0, 500)]).astype(np.float32)
    exact = np.tanh(x.astype(np.float64))
    assert (np.abs(kernels.activate(x, "tanh") - exact) / np.spacing(np.abs(exact).astype(np.float32))).max() < 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_probabilities(dtype):
    scores, targets = draw(2, 3, 200, dtype=dtype) * dtype(9), rng.integers(0, 200, (2, 3, 4))
    targets[0, 0] = scores[0, 0].argmax()
    logs, best = kernels.log_probabilities(scores, targets)
    exact = scores.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(logs, np.take_along_axis(exact, targets, -1), rtol=1e-6)
    textbook = reference.log_probabilities(scores, targets)
    np.testing.assert_allclose(logs, textbook[0], rtol=1e-6)
    assert (best == (targets == scores.argmax(-1)[..., None])).all()
    assert (best == textbook[1]).all()
    scores[0, 0, 7], scores[0, 1, 7], scores[0, 2, targets[0, 2]] = np.nan, np.inf, -np.inf
    logs, _ = kernels.log_probabilities(scores, targets)
    assert np.isnan(logs[0, :2]).all()
    assert (logs[0, 2] == -np.inf).all()


def test_embed():
    wte, wpe = draw(70, 9), draw(11, 9)
    ids, positions = rng.integers(0, 70, (2, 5)), rng.integers(0, 11, (2, 5))
    got = kernels.embed(ids, positions, kernels.pack_matrix(wte, transposed=True), wpe)
    np.testing.assert_array_equal(got, reference.embed(ids, positions, wte, wpe))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("H", "D"), [(1, 1), (3, 5), (2, 32), (1, 40)])
@pytest.mark.parametrize("activation", ["gelu_tanh", "relu"])
def test_block(H, D, activation, dtype):
    C, F, B, start, T = H * D, 3 * H * D, 2, 4, 13
    plain, packed_block = random_block(C, H, F, dtype, activation)
    x, cache = draw(B, T, C, dtype=dtype), draw(2, B, H, start + T + 2, D, dtype=dtype)
    as_double = [np.asarray(a, np.float64) if isinstance(a, np.ndarray) else a for a in (x, cache)]
    taps: dict[str, np.ndarray] = {}
    expected_taps: dict[str, np.ndarray] = {}
    double = BlockWeights(
        *(
            part._replace(
                **{
                    k: v.astype(np.float64) if isinstance(v, np.ndarray) else Linear(*(a.astype(np.float64) for a in v))
                    for k, v in part._asdict().items()
                    if isinstance(v, np.ndarray | Linear)
                }
            )
            for part in plain
        )
    )
    expected = reference.block(
        as_double[0], double, as_double[1], start, reference.causal_mask, expected_taps.__setitem__, "h"
    )
    got = kernels.block(x, packed_block, cache, start, None, taps.__setitem__, "h")
    close(got, expected, dtype, 4 * (C + F))
    close(cache, as_double[1], dtype, 4 * C)
    assert list(taps) == list(expected_taps)
    for name, value in expected_taps.items():
        assert taps[name].shape == value.shape, name
        close(taps[name], value, dtype, 4 * (C + F))


# -------------------------------------------------------------------------------------------------------- bits


@given(data=st.data())
def test_a_row_of_a_product_does_not_depend_on_the_other_rows(data):
    R, K, N = (data.draw(st.integers(1, high), label=name) for name, high in (("R", 60), ("K", 300), ("N", 150)))
    x, w = draw(R, K), packed(random_linear(K, N, np.float32))
    w = Linear(w.weight, w.bias)
    row = data.draw(st.integers(0, R - 1))
    np.testing.assert_array_equal(kernels.linear(x, *w)[row], kernels.linear(x[row : row + 1], *w)[0])


@pytest.mark.jit
def test_bits_do_not_depend_on_threads(monkeypatch):
    monkeypatch.setattr(threads, "GRAIN", 1)  # deal out even the smallest work
    before = get_num_threads()
    model, ids = tiny_model(n_ctx=150), random_ids(tiny_model().config, 2, 130)
    try:
        results = []
        for count in range(1, machine.MOST_THREADS + 1):
            set_num_threads(count)
            assert get_num_threads() == count
            results.append(model(ids))
    finally:
        set_num_threads(before)
    for result in results[1:]:
        for a, b in zip(result.past + list(result[:2]), results[0].past + list(results[0][:2]), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("n", [0, -1, 10_000])
def test_a_wrong_number_of_threads_is_refused(n):
    with pytest.raises(InputError, match="number of threads"):
        set_num_threads(n)


@pytest.mark.parametrize("D", [4, 32])
def test_a_gap_of_masked_keys_leaves_the_bits_as_they_are(D):
    H, T, gap = 2, 9, 5
    _, w = random_block(H * D, H, H * D, np.float32)
    x = draw(1, T, H * D)
    whole = kernels.block(x, w, np.zeros((2, 1, H, T, D), np.float32), 0, None, no_tap, "")

    # the same sequence with padding after its third position, whose queries see only themselves
    T2 = T + gap
    places = [0, 1, 2, *range(3 + gap, T2)]
    padded = draw(1, T2, H * D)
    padded[:, places] = x
    mask = np.full((1, 1, T2, T2), -np.inf, np.float32)
    mask[0, 0, range(T2), range(T2)] = 0
    for i, query in enumerate(places):
        mask[0, 0, query, places[: i + 1]] = 0
    # the padding's own queries see nothing, so that no query sees the padding's keys
    for query in range(3, 3 + gap):
        mask[0, 0, query] = -np.inf
        mask[0, 0, query, 0] = 0
    got = kernels.block(padded, w, np.zeros((2, 1, H, T2, D), np.float32), 0, Mask(mask), no_tap, "")
    np.testing.assert_array_equal(got[:, places], whole)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("D", [16, 64, 80, 20])
def test_a_single_query_gives_the_bits_of_many(D, dtype):
    """For many queries keys are put into panels; for one they are read as they lie, if their size allows it."""
    T = 20 if machine.DISABLE_JIT else 150
    model = tiny_model(dtype=dtype, n_layer=1, n_head=2, n_embd=2 * D, head_size=D, n_ctx=T)
    ids = random_ids(model.config, 2, T)
    expected, cache = model(ids).logits, model.new_cache(2)
    for t in range(T):
        ours = model(ids[:, t : t + 1], cache=cache).logits[:, 0]
        assert ours.tobytes() == expected[:, t].tobytes(), t


def test_masks_are_added_as_softmax_says():
    H, D, T = 2, 5, 6
    plain, w = random_block(H * D, H, H * D, np.float64)
    x = draw(2, T, H * D, dtype=np.float64)
    lowest = np.finfo(np.float64).min
    for mask_row in ([0.0] * T, [lowest] * T, [-np.inf] * T, [-1.0, 0.5, -np.inf, 0, lowest, 2]):
        mask = np.tile(np.array(mask_row), (2, 1, T, 1))
        got, expected = (
            module.attention(x, block.attn, np.zeros((2, 2, H, T, D)), 0, Mask(mask), no_tap, "")
            for module, block in ((kernels, w), (reference, plain))
        )
        close(got, expected, np.float64, 100)


# ------------------------------------------------------------------------------------------------ NaN, Inf, exp


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_weight_never_comes_out_as_a_number(bad):
    for place in ("c_attn", "c_fc", "ln_1"):
        model = tiny_model()
        h = model._weights.h[0]
        target = {"c_attn": h.attn.c_attn.weight.data, "c_fc": h.mlp.c_fc.weight.data, "ln_1": h.ln_1.weight}[place]
        target[..., 0] = bad
        out = model(random_ids(model.config, 1, 7))
        assert not np.isfinite(out.logits).any(), place


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("plane", [0, 1])
def test_a_bad_number_in_the_cache_is_seen_by_later_tokens_only(bad, plane):
    model = tiny_model()
    ids = random_ids(model.config, 1, 12)
    cache = model.new_cache()
    model(ids[:, :5], cache=cache)
    cache.layers[0][plane, 0, 1, 3] = bad
    assert not np.isfinite(model(ids[:, 5:], cache=cache).last_hidden_state).any()

    # what a later token brings does not reach earlier ones, though they share a tile
    wte = model._weights.wte
    token = int(ids[0, 8])
    clean = model(ids).last_hidden_state
    wte.data[token // tile.PANEL, :, token % tile.PANEL] = bad
    spoilt = model(ids).last_hidden_state
    first = int(np.argmax(ids[0] == token))
    np.testing.assert_array_equal(spoilt[:, :first], clean[:, :first])
    assert np.isnan(spoilt[:, first:]).all()


def fuses():
    """Whether this machine, or the one that NUMBA_CPU_NAME tells, rounds a * b + c once."""
    fused = numba.njit(lambda a: tile.fma(a, a, -(a * a)))
    return fused(np.float32(1.1)) != 0


def exp_of(x):
    out = np.empty_like(x)

    @numba.njit
    def fill(x, out):
        for i in range(x.size):
            out[i] = vectors.exp(x[i])

    fill(x, out)
    return out


@numba.njit(error_model="numpy")
def erfc_of(x):
    out = np.empty_like(x)
    for i in range(x.size):
        out[i] = vectors.erfc(x[i])
    return out


@pytest.mark.jit
def test_erfc_over_a_dense_sweep():
    x = np.arange(0, 2**32, 9973, dtype=np.uint64).astype(np.uint32).view(np.float32)
    x = np.concatenate([x[np.abs(x) < 12], np.linspace(-4, 10.5, 200_000).astype(np.float32)])
    expected = np.array([math.erfc(number) for number in x.tolist()])
    error = np.abs(erfc_of(x) - expected) / np.spacing(expected.astype(np.float32)).astype(np.float64)
    assert error.max() <= 6


def test_erfc_of_special_values():
    x = np.array([0, -0.0, np.inf, -np.inf, np.nan, 20, -20], np.float32)
    np.testing.assert_array_equal(erfc_of(x), np.float32([1, 1, 0, 2, np.nan, 0, 2]))


def check_exp(bits):
    """At most 1 ulp, or 1.25 where multiply-adds round twice; subnormal results too."""
    x = bits.astype(np.uint32).view(np.float32)
    x = x[np.isfinite(x)]
    got = exp_of(x)
    with np.errstate(over="ignore", under="ignore"):
        expected = np.exp(x.astype(np.float64))
        nearest = expected.astype(np.float32)
    finite = np.isfinite(nearest)
    error = np.abs(got[finite] - expected[finite]) / np.spacing(nearest[finite]).astype(np.float64)
    assert (error <= (1.0 if fuses() else 1.25)).all()
    assert (got[~finite] == np.inf).all()


@pytest.mark.jit
def test_exp_over_a_dense_sweep():
    check_exp(np.arange(0, 2**32, 997, dtype=np.uint64))


@pytest.mark.jit
@pytest.mark.slow
def test_exp_of_every_float32():
    for start in range(0, 2**32, 2**26):
        check_exp(np.arange(start, start + 2**26, dtype=np.uint64))


def test_exp_of_special_values():
    x = np.array([0, -0.0, np.inf, -np.inf, np.nan, 200, -200], np.float32)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(exp_of(x), [1, 1, np.inf, 0, np.nan, np.inf, 0])


# ----------------------------------------------------------------------------- several callers, forks, machines


def test_callers_in_several_python_threads(monkeypatch):
    monkeypatch.setattr(threads, "GRAIN", 1)
    model = tiny_model()
    ids = random_ids(model.config, 2, 15)
    expected = model(ids).logits
    same = []

    def call():
        same.extend(np.array_equal(model(ids).logits, expected) for _ in range(5))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert same == [True] * 20


def in_a_new_process(code, *arguments, **environment):
    """Run code in a fresh interpreter and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "support"), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.jit
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_children_forked_while_threads_run_get_the_same_bits():
    code = """
        import os, signal, threading, warnings
        from gpt2np.kernels import threads
        from tiny import ArraySource, random_ids, tiny_config, tiny_model, tiny_sources
        warnings.simplefilter("ignore")
        threads.GRAIN = 1
        model = tiny_model()
        ids = random_ids(model.config, 2, 15)
        expected = model(ids).logits
        busy = True

        def run():
            while busy:
                assert (model(ids).logits == expected).all()

        runners = [threading.Thread(target=run, daemon=True) for _ in range(2)]
        for runner in runners:
            runner.start()
        for _ in range(60):
            child = os.fork()
            if not child:
                signal.alarm(60)  # rather than to wait for ever
                os._exit(0 if (model(ids).logits == expected).all() else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0  # even if a thread was compiling just then
        busy = False
        for runner in runners:
            runner.join()
        assert (model(ids).logits == expected).all()
        print("same")
    """
    assert in_a_new_process(code) == "same\n"


@pytest.mark.jit
@pytest.mark.parametrize(
    ("machine", "features"),
    [("x86-64", "+sse2,-fma,-avx"), ("haswell", "+avx2,+fma,-avx512f")],
    ids=["no FMA", "AVX2"],
)
def test_other_machines_compute_the_same_product(machine, features, tmp_path):
    if numba.core.config.MACHINE_BITS != 64 or os.uname().machine != "x86_64":
        pytest.skip("these are x86-64 machines")
    code = """
        import numba, numpy as np
        from gpt2np.kernels import products, tile
        assert tile.PANEL == 16
        rng = np.random.default_rng(0)
        x, w = rng.standard_normal((7, 30)), rng.standard_normal((30, 20))
        panels = np.zeros((2, 30, 16), np.float32)
        for p in range(2):
            panels[p, :, : min(16, 20 - 16 * p)] = w[:, 16 * p : 16 * p + 16]
        out, x32 = np.zeros((7, 16), np.float32), x.astype(np.float32)
        products.multiply(7, x32, 0, 30, panels, 0, 16, 30, 30, out, 0, 16)
        print(np.abs(out - x32.astype(float) @ panels[0]).max() < 1e-5)
    """
    environment = {"NUMBA_CPU_NAME": machine, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
    assert in_a_new_process(code, **environment) == "True\n"


def compiled_tile(chosen, a, b):
    def add_product(stride, depth, terms, out):
        chosen(a, 1, a.shape[1], b, 2, stride, 0, depth, terms, out, 3, out.shape[1])

    return numba.njit(add_product)


@pytest.mark.jit
@pytest.mark.skipif(not tile.BY_HAND, reason="no AVX2, or more than that")
@pytest.mark.parametrize("rows", range(1, kernels.ROWS + 1))
@pytest.mark.parametrize("ask", [0, 1, 2, 4])
@pytest.mark.parametrize("form", [None, *FORMS])
def test_the_loop_in_instructions_of_avx2_gives_the_bits_of_llvms(rows, ask, form, monkeypatch):
    cases = [(depth, 128) for depth in range(1, 20)] + [(200, 64), (256, 128), (290, 13)]
    a, b, start = draw(rows + 1, 300), draw(300, 20), draw(rows + 1, 24)
    b = narrowed(b, form) if form else b
    found, in_asm = [], []
    for by_hand in (True, False):
        monkeypatch.setattr(tile, "BY_HAND", by_hand)
        add_product = compiled_tile(tile.make_tile(rows, ask=ask), a, b)
        outs = np.array([[start] * len(cases)] * 2)
        for i, stride in enumerate((16, 20)):
            for j, (depth, terms) in enumerate(cases):
                add_product(stride, depth, terms, outs[i, j])
        found.append(outs)
        in_asm.append("#APP" in str(add_product.inspect_asm()))
    assert in_asm == [True, False]
    assert (found[0] != start).any(axis=(2, 3)).all()
    np.testing.assert_array_equal(*(outs.view(np.uint32) for outs in found))


# --------------------------------------------------------------------------------------- compiled code on disk


@pytest.mark.jit
def test_after_warmup_nothing_is_left_to_compile():
    code = """
        import gpt2np
        from gpt2np.kernels import code, warmup
        warmup()
        known = set(code._loaded)
        for weights in (None, "int8", "int4"):
            model = gpt2np.load(weights=weights)
            model([[1] * 200])
            model.trace([[1] * 200])
            model([[1] * 9], attention_mask=[[0] + [1] * 8])
        print(set(code._loaded) - known or "nothing new")
    """
    assert in_a_new_process(code, NUMBA_NUM_THREADS="2") == "nothing new\n"


def add(one, other):
    calls.run("vectors.add", one, other)


NUMBERS = np.arange(3.0), np.ones(3)
KINDS = tuple(map(calls.kind_of, NUMBERS))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A folder for code, with none in it or in memory."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(code, "_loaded", {})
    monkeypatch.setattr(code, "_said", [])
    return tmp_path


@pytest.mark.jit
def test_a_kernel_without_any_folder_for_its_code_still_runs(cache, monkeypatch):
    monkeypatch.setattr(code, "folders", list)
    numbers, narrow = np.ones(3), np.ones(3, np.float32)
    with pytest.warns(RuntimeWarning, match="NUMBA_CACHE_DIR .* gpt2np warmup"):
        add(np.arange(3.0), numbers)
    add(np.arange(3, dtype=np.float32), narrow)  # warns no more
    assert numbers.tolist() == narrow.tolist() == [1, 2, 3]


@pytest.mark.jit
def test_a_folder_that_cannot_be_written_to_or_holds_rubbish_does_no_harm(cache, monkeypatch):
    def found():
        monkeypatch.setattr(code, "_loaded", {})
        numbers = np.ones(3)
        add(np.arange(3.0), numbers)
        return numbers.tolist()

    assert not code.on_disk("vectors.add")
    assert found() == [1, 2, 3]
    assert code.on_disk("vectors.add")
    [path] = cache.rglob("*.o")
    whole = path.read_bytes()
    for rubbish in (b"", b"rubbish", whole[:-1], whole[:200] + b"x" + whole[201:], whole.replace(b"add", b"dad")):
        path.write_bytes(rubbish)
        assert found() == [1, 2, 3]
        whole = path.read_bytes()  # the symbol is another one
        assert found() == [1, 2, 3]
        assert path.read_bytes() == whole

    path.unlink()
    path.parent.rmdir()
    path.parent.write_text("a file where the folder was")
    with pytest.warns(RuntimeWarning, match="NUMBA_CACHE_DIR"):
        assert found() == [1, 2, 3]


@pytest.mark.jit
def test_code_of_other_sources_or_machines_is_not_used(cache, tmp_path, monkeypatch):
    first = code.find("vectors.add", KINDS)
    assert code.find("vectors.add", KINDS) is first
    for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_OPT"):
        machine.description.cache_clear()
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            assert not code.on_disk("vectors.add")
    machine.description.cache_clear()
    assert code.on_disk("vectors.add")
    edited, [old] = tmp_path / "kernels", cache.rglob("*.o")
    shutil.copytree(code.SOURCES, edited, ignore=shutil.ignore_patterns("__pycache__"))
    with open(edited / "tile.py", "a") as file:
        file.write("# another tile\n")
    monkeypatch.setattr(code, "SOURCES", edited)
    monkeypatch.setattr(code, "folders", lambda: [old.parent])
    assert not code.on_disk("vectors.add")
    code._keep("vectors.add", KINDS, b"symbol", b"code")
    assert code.on_disk("vectors.add")
    assert not old.exists()  # nobody will ask for it


@pytest.mark.jit
def test_a_process_that_is_killed_while_it_keeps_code_leaves_none(cache, monkeypatch):
    monkeypatch.setattr(Path, "write_bytes", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        code.find("vectors.add", KINDS)
    assert not code.on_disk("vectors.add")


@pytest.mark.jit
def test_code_from_disk_runs_in_a_process_that_does_without_numba(tmp_path):
    code = """
        import sys
        import numpy as np
        import gpt2np
        print(gpt2np.load()([[1, 2, 3] * 20]).logits.tobytes().hex()[:200], file=open(sys.argv[1], "w"))
        print("numba" in sys.modules)
    """
    for name, compiled in (("first", "True\n"), ("second", "False\n")):
        assert in_a_new_process(code, tmp_path / name, NUMBA_CACHE_DIR=str(tmp_path)) == compiled
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_numbers_of_numpy_are_as_good_as_pythons():
    assert calls.kind_of((np.int64(1), np.float32(1), 1, 1.0, True)) == (tuple, int, float, int, float, bool)
    C = 8
    _, w = random_block(C, 2, C, np.float32)
    x, results = draw(1, 3, C), []
    for start in (2, np.int64(2)):
        cache = np.zeros((2, 1, 2, 5, C // 2), np.float32)
        results.append(kernels.block(x, w, cache, start, None, no_tap, "").tobytes())
    assert results[0] == results[1]


def test_kernels_are_given_contiguous_arrays_empty_and_read_only_ones_too():
    numbers, one = np.ones(3), np.arange(3.0)
    one.flags.writeable = False
    add(one, numbers)
    add(np.empty(0), numbers[:0])
    assert numbers.tolist() == [1, 2, 3]
    if not machine.DISABLE_JIT:
        with pytest.raises(ValueError, match="contiguous"):
            add(np.arange(6.0)[::2], numbers)


@pytest.mark.jit
@pytest.mark.parametrize("count", ["1", "2", "7"])
def test_as_many_threads_as_were_asked_for_sleep_and_wake(count):
    code = """
        import threading, time
        from gpt2np.kernels import threads
        from tiny import random_ids, tiny_model
        threads.GRAIN = 1
        model = tiny_model(n_ctx=40)
        ids = random_ids(model.config, 2, 30)
        results = set()
        for pause in (0, 0, 0.2, 0, 0.2):  # for which they look for work, or sleep
            time.sleep(pause)
            results |= {model(ids).logits.tobytes() for _ in range(20)}
        print(len(results), sum(thread.name == "gpt2np" for thread in threading.enumerate()))
    """
    assert in_a_new_process(code, NUMBA_NUM_THREADS=count) == f"1 {int(count) - 1}\n"


@given(st.integers(1, 5000), st.integers(1, 70), st.integers(1, 6000))
def test_chunks_hold_every_piece_once(pieces, workers, smallest):
    ticket, dealt = np.zeros(1, np.int64), []
    first, last = sharing.next_chunk(ticket, workers, pieces, smallest)
    while first < pieces:
        assert last == pieces or last - first >= smallest
        dealt += range(first, last)
        first, last = sharing.next_chunk(ticket, workers, pieces, smallest)
    assert dealt == list(range(pieces))


@pytest.mark.jit
def test_threads_that_cannot_be_started_are_done_without():
    code = """
        import threading
        from gpt2np.kernels import threads
        from tiny import random_ids, tiny_model
        model = tiny_model(n_ctx=40)
        ids = random_ids(model.config, 2, 30)
        expected, threads.GRAIN = model(ids).logits.tobytes(), 1
        def fail(thread):
            raise RuntimeError("can't start new thread")
        threading.Thread.start = fail
        print(model(ids).logits.tobytes() == expected)
    """
    assert in_a_new_process(code, NUMBA_NUM_THREADS="2") == "True\n"
