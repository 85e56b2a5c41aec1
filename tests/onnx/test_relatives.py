"""Relatives of GPT-2 are refused for what they are, and what is GPT-2 all the same loads."""

import numpy as np
import pytest

from forms import C, D, F, Form, H, N, V, causal, split_heads, written_out
from gpt2np.errors import UnsupportedModelError
from gpt2np.session import InferenceSession
from runtime import assert_close, feeds_for, runtime


def refused(form, tmp_path, message):
    with pytest.raises(UnsupportedModelError, match=message):
        InferenceSession(form.save(tmp_path / "model.onnx"), engine="numpy")


def ids_of(form):
    return form.input("ids", np.int64, "B", "T")


def grouped(groups):
    """Attention whose queries share keys and values, as in GPTBigCode (1) or Llama."""

    def attention(form, i, x):
        name = f"h.{i}.attn"
        q = split_heads(form, form.linear(x, f"{name}.q", C, C))
        shared = []
        for part in "kv":
            flat = form.linear(x, f"{name}.{part}", C, groups * D)
            shared.append(form.op("Transpose", form.op("Reshape", flat, form.ints(0, 0, groups, D)), perm=[0, 2, 1, 3]))
        if groups > 1:
            shared = [form.op("Tile", s, form.ints(1, H // groups, 1, 1)) for s in shared]
        scores = form.op("MatMul", q, form.op("Transpose", shared[0], perm=[0, 1, 3, 2]))
        scores = form.op("Mul", scores, form.constant(D**-0.5, np.float32))
        heads = form.op("MatMul", form.op("Softmax", causal(form, scores), axis=-1), shared[1])
        return form.op("Reshape", form.op("Transpose", heads, perm=[0, 2, 1, 3]), form.ints(0, 0, C))

    return attention


def test_multi_query_attention(tmp_path):
    form = Form()
    form.head(form.blocks(form.embed(ids_of(form)), grouped(1)))
    refused(form, tmp_path, r"3 heads of queries share 1 of keys \(multi-query attention\)")


def rotated(form, i, x):
    """q and k turned by angles that grow with the position, as in GPT-NeoX."""
    ids = "ids"
    positions = form.op(
        "Range", form.constant(0, np.int64), form.op("Squeeze", form.size(ids, 1)), form.constant(1, np.int64)
    )
    positions = form.op("Unsqueeze", form.op("Cast", positions, to=1), form.ints(1))
    angles = form.op("Mul", positions, form.constant(np.tile(0.1 ** np.arange(D // 2), 2), np.float32))  # (T, D)
    cos, sin = form.op("Cos", angles), form.op("Sin", angles)
    q, k, v = (split_heads(form, form.linear(x, f"h.{i}.attn.{part}", C, C)) for part in "qkv")
    turned = []
    for part in (q, k):
        halves = [f"{part}_{i}_{n}" for n in "ab"]
        form.op("Split", part, out=halves, axis=3, num_outputs=2)
        other = form.op("Concat", form.op("Neg", halves[1]), halves[0], axis=3)
        turned.append(form.op("Add", form.op("Mul", part, cos), form.op("Mul", other, sin)))
    scores = form.op("MatMul", turned[0], form.op("Transpose", turned[1], perm=[0, 1, 3, 2]))
    heads = form.op("MatMul", form.op("Softmax", causal(form, scores), axis=-1), v)
    return form.op("Reshape", form.op("Transpose", heads, perm=[0, 2, 1, 3]), form.ints(0, 0, C))


def test_rotary_positions(tmp_path):
    form = Form()
    form.head(form.blocks(form.op("Gather", form.weight("wte.weight", V, C), ids_of(form)), rotated))
    refused(form, tmp_path, r"positions are turned into angles \((Cos|Sin) node .*rotary positions.*wpe")


def test_parallel_blocks(tmp_path):
    """Attention and MLP read the same stream, as in GPT-J."""
    form = Form()
    x = form.embed(ids_of(form))
    for i in range(2):
        heads = written_out(causal)(form, i, form.layer_norm(x, f"h.{i}.ln_1"))
        out = form.linear(heads, f"h.{i}.attn.c_proj", C, C)
        fc = form.linear(form.layer_norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc", C, F)
        mlp = form.linear(form.op("Gelu", fc, approximate="tanh"), f"h.{i}.mlp.c_proj", F, C)
        x = form.op("Add", form.op("Add", x, out), mlp)
    form.head(form.layer_norm(x, "ln_f"))
    refused(form, tmp_path, r"side by side \(parallel blocks, as in GPT-J\)")


def test_a_classifier_at_the_last_token(tmp_path):
    form = Form()
    x = form.blocks(form.embed(ids_of(form)), written_out(causal))
    scores = form.op("MatMul", x, form.weight("score.weight", C, 3))
    last = form.op(
        "ReduceSum",
        form.op("Cast", form.op("Not", form.op("Equal", "ids", form.constant(0, np.int64))), to=7),
        form.ints(1),
    )
    last = form.op("Sub", last, form.constant(1, np.int64))
    picked = form.op("GatherND", scores, last, batch_dims=1)
    form.op("Identity", picked, out=form.output("logits", "B", 3))
    refused(form, tmp_path, "classifier with 3 classes")


def test_a_window_of_keys(tmp_path):
    """Local attention of GPT-Neo, in the second layer alone, at any length up to n_ctx."""
    for window in (1, 8, N - 1):
        band = np.tri(N, dtype=bool) & ~np.tri(N, k=-window, dtype=bool)

        def local(form, scores, band=band):
            T, S = form.size(scores, 2), form.size(scores, 3)
            rows = form.op("Slice", form.constant(band), form.op("Sub", S, T), S, form.ints(0))
            keep = form.op("Slice", rows, form.ints(0), S, form.ints(1))
            return form.op("Where", keep, scores, form.constant(-1e4, np.float32))

        form = Form()
        attentions = [written_out(causal), written_out(local)]
        form.head(form.blocks(form.embed(ids_of(form)), lambda form, i, x, a=attentions: a[i](form, i, x)))
        refused(form, tmp_path, "the mask of layer 1: query .* sees only the last .* keys .*GPT-Neo")


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0])
def test_a_branch_of_low_rank_is_merged(tmp_path, scale):
    """LoRA beside c_attn, exported before it was merged: W + scale * A @ B."""
    form = Form()
    plain = form.linear

    def linear(x, name, inputs, outputs):
        out = plain(x, name, inputs, outputs)
        if not name.endswith("c_attn"):
            return out
        down = form.op("MatMul", x, form.weight(f"{name}.lora_A", inputs, 4))
        up = form.op("MatMul", down, form.weight(f"{name}.lora_B", 4, outputs))
        return form.op("Add", out, form.op("Mul", up, form.constant(scale, np.float32)))

    form.linear = linear
    form.head(form.blocks(form.embed(ids_of(form)), written_out(causal)))
    path = form.save(tmp_path / "model.onnx")
    session = InferenceSession(path, engine="numpy")
    feeds = feeds_for(session.model.recognised, 2, 7)
    assert_close(session.run(None, feeds)[0], runtime(path).run(None, feeds)[0], "logits")
    assert any("LoRA" in step for s in session.model.recognised.sources.values() for step in s.through)
