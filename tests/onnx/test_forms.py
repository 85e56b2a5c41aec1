"""Forms of GPT-2 that exporters and optimisers make, built node by node: recognised, and run like ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from forms import (
    C,
    Form,
    N,
    V,
    causal,
    contrib_attention,
    decoder_masked_attention,
    einsum_attention,
    ellipsis_attention,
    group_query_attention,
    multi_head_attention,
    norm_with_its_gain_in_the_root,
    rearranged_norm,
    written_out,
)
from gpt2np.errors import Gpt2npError, InputError, ModelFileError, UnsupportedModelError, WeightError
from gpt2np.masks import MaskRule, mask_for
from gpt2np.session import InferenceSession
from runtime import assert_close, feeds_for, runtime, since

ENGINES = ["numpy", "numba"]
Array = np.ndarray


def agree(
    path: Path,
    sizes: tuple[tuple[int, int, int], ...] = ((1, 1, 0), (2, 5, 0), (2, 4, 3)),
    change: Callable[[dict[str, Array]], object] = lambda feeds: None,
) -> InferenceSession:
    """Both engines give what ONNX Runtime gives, for (B, T, P)."""
    theirs = runtime(path)
    for engine in ENGINES:
        ours = InferenceSession(path, engine=engine)
        found = ours.model.recognised
        past = any(port.role.startswith("past") for port in found.inputs)
        for B, T, P in sizes:
            if P and not past:
                continue
            feeds = feeds_for(found, B, T, P)
            change(feeds)
            for output, got, expected in zip(
                found.outputs, ours.run(None, feeds), theirs.run(None, feeds), strict=True
            ):
                assert_close(got, expected, f"{engine} {output.name} B={B} T={T} P={P}")
    return ours


# ---------------------------------------------------------------------------------------------------------- masks
def megatron(form: Form, scores: str) -> str:
    """s * m - 1e4 * (1 - m), m being cut out of a float mask (B, 1, N, N)."""
    T, S = form.size(scores, 2), form.size(scores, 3)
    rows = form.op("Slice", "attention_mask", form.op("Sub", S, T), S, form.ints(2))
    keep = form.op("Slice", rows, form.ints(0), S, form.ints(3))
    penalty = form.op("Mul", form.op("Sub", form.constant(1, np.float32), keep), form.constant(1e4, np.float32))
    return form.op("Sub", form.op("Mul", scores, keep), penalty)


def replaced(form: Form, scores: str) -> str:
    return form.op("Where", "attention_mask", scores, form.constant(-1e30, np.float32))


def replaced_of_three_axes(form: Form, scores: str) -> str:
    keep = form.op("Unsqueeze", form.op("Cast", "attention_mask", to=9), form.ints(1))
    return form.op("Where", keep, scores, form.constant(-np.inf, np.float32))


def added(form: Form, scores: str) -> str:
    return form.op("Add", scores, "attention_mask")


def added_to_causal(form: Form, scores: str) -> str:
    return form.op("Add", causal(form, scores), "attention_mask")


MASKS: dict[str, tuple[Callable[[Form, str], str], Any, tuple[int | str, ...]]] = {
    "megatron": (megatron, np.float32, ("B", 1, N, N)),
    "megatron of free sizes": (megatron, np.float32, ("B", 1, "rows", "columns")),
    "bool": (replaced, np.bool_, ("B", 1, "T", "S")),
    "integers": (replaced_of_three_axes, np.int64, ("B", "T", "S")),
    "added": (added, np.float32, ("B", 1, "T", "S")),
    "added to keys": (added_to_causal, np.float32, ("B", 1, 1, "S")),
    "added to the causal mask": (added_to_causal, np.float32, ("B", 1, "T", "S")),
}


def masked(path: Path, kind: str) -> Path:
    mask, dtype, shape = MASKS[kind]
    form = Form()
    ids = form.input("ids", np.int64, "B", "T")
    form.input("attention_mask", dtype, *shape)
    form.head(form.blocks(form.embed(ids, "past_key_0"), written_out(mask, past=True)))
    return form.save(path / "model.onnx")


@pytest.mark.parametrize("kind", MASKS)
def test_masks_for_each_query(tmp_path, kind):
    path = masked(tmp_path, kind)
    agree(path)

    def holes(feeds: dict[str, Array]) -> None:
        """Keys that a query does not see, and a query that sees none."""
        mask = feeds["attention_mask"]
        hidden = np.random.default_rng(3).random(mask.shape) < 0.4
        hidden[..., 0] = False  # but this one
        hidden[-1, ..., -1, :] |= "added" not in kind and "integers" != kind
        mask[hidden] = -1e4 if "added" in kind else 0

    agree(path, ((2, 5, 0), (2, 4, 3)), holes)


def test_small_numbers_may_be_added_to_scores(tmp_path):
    """A bias, not a mask: every number counts."""

    def bias(feeds: dict[str, Array]) -> None:
        feeds["attention_mask"][:] = np.random.default_rng(4).standard_normal(feeds["attention_mask"].shape)

    session = agree(masked(tmp_path, "added"), change=bias)
    assert {p.role for p in session.model.recognised.inputs} >= {"attention_bias"}
    assert session.model.config.mask.kind == "given"


@pytest.mark.parametrize("value", [-np.inf, float(np.finfo(np.float32).min)])
def test_rows_without_a_key_are_what_the_graph_makes_of_them(tmp_path, value):
    def blind(feeds: dict[str, Array]) -> None:
        feeds["attention_mask"][0, :, 1] = value

    agree(masked(tmp_path, "added"), ((2, 4, 3),), blind)


def test_without_a_mask_the_model_is_causal(tmp_path):
    """The file wants a mask for each query; the model can do without."""
    session = InferenceSession(masked(tmp_path, "bool"), engine="numpy")
    feeds = feeds_for(session.model.recognised, 2, 5)
    assert_close(session.model(feeds["ids"]).logits, session.run(["logits"], feeds)[0], "logits", 1e-6, 1e-6)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("megatron", lambda m: m[..., :-1], r"expected float32 \[B, 1, 24, 24\]"),
        ("megatron of free sizes", lambda m: m[:, :, :4, :4], "at least a row and a column"),
        ("megatron", lambda m: m * 0.5, "1 for keys that are seen and 0 for others"),
        ("bool", lambda m: m[..., 1:], r"got shape \(2, 1, 4, 6\), expected \(2, 1, 4, 7\)"),
        ("added", lambda m: m[:, :, :2], r"expected \(2, 1, 4, 7\)"),
    ],
)
def test_wrong_masks_are_refused(tmp_path, kind, change, message):
    session = InferenceSession(masked(tmp_path, kind), engine="numpy")
    feeds = feeds_for(session.model.recognised, 2, 4, 3)
    feeds["attention_mask"] = change(feeds["attention_mask"])
    with pytest.raises(InputError, match=message):
        session.run(None, feeds)


def test_a_mask_that_is_added_somewhere_else_is_refused(tmp_path):
    def shifted(form: Form, scores: str) -> str:
        rest = form.op("Slice", "attention_mask", form.ints(1), form.ints(2**31 - 1), form.ints(3))
        first = form.op("Slice", "attention_mask", form.ints(0), form.ints(1), form.ints(3))
        return form.op("Add", scores, form.op("Concat", rest, first, axis=3))

    MASKS["shifted"] = shifted, np.float32, ("B", 1, "T", "S")
    with pytest.raises(UnsupportedModelError, match="mask of layer 0.*element of attention_mask"):
        InferenceSession(masked(tmp_path, "shifted"), engine="numpy")
    del MASKS["shifted"]


def test_two_masks_are_refused(tmp_path):
    def two(form: Form, scores: str) -> str:
        return form.op("Add", form.op("Add", scores, "attention_mask"), "more")

    form = Form()
    ids = form.input("ids", np.int64, "B", "T")
    form.input("attention_mask", np.float32, "B", 1, "T", "S")
    form.input("more", np.float32, "B", 1, "T", "S")
    form.head(form.blocks(form.embed(ids), written_out(two)))
    with pytest.raises(
        UnsupportedModelError, match="masked by several inputs: attention_mask, more|more, attention_mask"
    ):
        InferenceSession(form.save(tmp_path / "model.onnx"))


# ------------------------------------------------------------------------------------------- embeddings and the head
def test_token_types_are_looked_up_in_wte(tmp_path):
    form = Form()
    ids = form.input("ids", np.int64, "B", "T")
    types = form.input("token_type_ids", np.int64, "B", "T")
    x = form.op("Add", form.embed(ids), form.op("Gather", "wte.weight", types))
    form.head(form.blocks(x, written_out(causal)))
    session = agree(form.save(tmp_path / "model.onnx"))
    assert [p.role for p in session.model.recognised.inputs] == ["input_ids", "token_type_ids"]
    feeds = feeds_for(session.model.recognised, 2, 4)
    feeds["token_type_ids"] = feeds["token_type_ids"][:1]
    with pytest.raises(InputError, match="token_type_ids must have the shape of input_ids"):
        session.run(None, feeds)


def test_a_third_table_is_refused(tmp_path):
    form = Form()
    ids = form.input("ids", np.int64, "B", "T")
    types = form.input("token_type_ids", np.int64, "B", "T")
    x = form.op("Add", form.embed(ids), form.op("Gather", form.weight("segments.weight", 2, C), types))
    form.head(form.blocks(x, written_out(causal)))
    with pytest.raises(UnsupportedModelError, match=r"two embeddings.*segments\.weight"):
        InferenceSession(form.save(tmp_path / "model.onnx"))


def one_token(path: Path, declared: int | str) -> Path:
    """Only the last token is read, as if a past held the others, and zero is added to the embeddings."""
    form = Form()
    ids = form.input("ids", np.int64, "B", declared)
    last = form.op("Slice", ids, form.ints(-1), form.ints(2**31 - 1), form.ints(1))
    x = form.op("Add", form.embed(last, "past_key_0"), form.constant(0, np.float32))
    form.head(form.blocks(x, written_out(causal, past=True)))
    return form.save(path / "model.onnx")


def test_a_file_for_one_token_at_a_time(tmp_path):
    session = agree(one_token(tmp_path, 1), ((1, 1, 0), (2, 1, 5)))
    assert session.model.recognised.notes == ()


def test_tokens_that_are_not_looked_up_are_named(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"looks up the tokens \[3, 7\] where \[0, 1, 2, 3, 4, 5, 6, 7\]"):
        InferenceSession(one_token(tmp_path, "T"))


def test_a_past_of_fixed_length(tmp_path):
    form = Form()
    ids = form.input("ids", np.int64, "B", "T")
    x = form.embed(ids, "past_key_0")
    form.head(form.blocks(x, written_out(causal, past=True, cached=lambda i: 6)))
    agree(form.save(tmp_path / "model.onnx"), ((1, 1, 6), (2, 5, 6)))


def test_a_head_with_more_rows_than_wte(tmp_path):
    """ONNX Runtime's tools pad the head to a multiple of 8 rows for speed."""
    form = Form()
    x = form.blocks(form.embed(form.input("ids", np.int64, "B", "T")), written_out(causal))
    form.head(x, V + 3)
    session = agree(form.save(tmp_path / "model.onnx"))
    assert session.model.config.tied
    assert session.model.config.vocab_size == V
    assert session.model([[1, 2]]).logits.shape == (1, 2, V)
    assert any("3 more rows" in note for note in session.model.recognised.notes)


def test_hidden_states_of_each_layer_are_outputs(tmp_path):
    form = Form()
    form.head(form.blocks(form.embed(form.input("ids", np.int64, "B", "T")), written_out(causal), hidden=True))
    session = agree(form.save(tmp_path / "model.onnx"))
    assert [p.role for p in session.model.recognised.outputs] == ["embed", "h.0.resid_post", "logits"]
    feeds = feeds_for(session.model.recognised, 2, 5)
    assert session.run(["hidden_1"], feeds)[0].shape == (2, 5, C)


# --------------------------------------------------------------------------------------------------- fused attention
M = 16  # rows of a buffer
LENGTH = ("past_sequence_length", np.int32, 1)
TOTALS = (("seqlens_k", np.int32, "B"), ("total_sequence_length", np.int32))
KEYS = ("attention_mask", np.int32, "B", "S")
BIAS = ("attention_bias", np.float32, "B", 1, "T", "S")
BEAMS = (("beam_width", np.int32, 1), ("cache_indirection", np.int32, "G", "W", M))
ANY = ((1, 1, 0), (2, 5, 0), (2, 4, 3))
ONE = ((1, 1, 0), (2, 1, 1), (2, 1, 5))
SINGLE = ((1, 1, 0), (2, 5, 0), (1, 4, 3), (2, 1, 3))  # GroupQueryAttention takes further chunks of one sequence

FUSED: dict[str, tuple[Any, tuple[Any, ...], tuple[tuple[int, int, int], ...]]] = {
    "Attention": (contrib_attention(), (), ANY),
    "Attention, mask": (contrib_attention(mask="attention_mask"), (KEYS,), ANY),
    "Attention, mask for each query": (
        contrib_attention(mask="attention_mask"),
        (("attention_mask", np.int32, "B", "T", "S"),),
        ANY,
    ),
    "MultiHeadAttention": (multi_head_attention(), (), ANY),
    "MultiHeadAttention, mask": (multi_head_attention(mask="attention_mask"), (KEYS,), ANY),
    "MultiHeadAttention, score bias": (multi_head_attention(score_bias="attention_bias"), (BIAS,), ANY),
    "MultiHeadAttention, bias": (multi_head_attention(split_bias=True), (), ANY),
    "MultiHeadAttention, buffer": (multi_head_attention(M), (LENGTH,), ANY),
    "DecoderMasked, buffer": (decoder_masked_attention(M), (LENGTH,), ONE),
    "DecoderMasked, mask": (decoder_masked_attention(M, "attention_mask"), (LENGTH, KEYS), ONE),
    "DecoderMasked, beams": (decoder_masked_attention(M, "attention_mask", True), (LENGTH, KEYS, *BEAMS), ONE),
    "GroupQuery": (group_query_attention(), TOTALS, SINGLE),
    "GroupQuery, packed": (group_query_attention(packed=True), TOTALS, SINGLE),
    "GroupQuery, scale": (group_query_attention(scale=0.3), TOTALS, SINGLE),
    "GroupQuery, buffer": (group_query_attention(M), TOTALS, SINGLE),
    "GroupQuery, score bias": (group_query_attention(score_bias="attention_bias"), (*TOTALS, BIAS), SINGLE),
}
SHARED = since("1.31", "new keys behind past_sequence_length rows of a buffer: before, one row too early")
RUNS_SINCE = {
    "MultiHeadAttention, score bias": since("1.22", "a bias of one head for all"),
    "MultiHeadAttention, buffer": SHARED,
    "DecoderMasked, buffer": SHARED,
    "DecoderMasked, mask": SHARED,
    "DecoderMasked, beams": since("1.21", "beams that read each other's past"),
    "GroupQuery, score bias": since("1.22", "a bias of scores"),
}


def kinds(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=RUNS_SINCE.get(name, ())) for name in names]


def with_inputs(path: Path, attention: Any, inputs: tuple[Any, ...], one: bool = False, lengths: bool = False) -> Path:
    """A GPT-2 with position_ids and these inputs; `lengths`: those of GroupQueryAttention are counted in the mask."""
    form = Form()
    T = 1 if one else "T"
    ids = form.input("ids", np.int64, "B", T)
    places = form.input("position_ids", np.int64, "B", T)
    for name, dtype, *shape in inputs:
        form.input(name, dtype, *shape)
    if lengths:
        mask = form.input("attention_mask", np.int64, "B", "S")
        last = form.op("Sub", form.op("ReduceSum", mask, form.ints(1), keepdims=0), form.constant(1, np.int64))
        form.op("Cast", last, to=6, out="seqlens_k")
        form.op("Cast", form.op("Squeeze", form.size(mask, 1)), to=6, out="total_sequence_length")
    words = form.op("Gather", form.weight("wte.weight", V, C), ids)
    x = form.op("Add", words, form.op("Gather", form.weight("wpe.weight", N, C), places))
    form.head(form.blocks(x, attention))
    return form.save(path / "model.onnx")


@pytest.mark.parametrize("kind", kinds(FUSED))
def test_fused_attention(tmp_path, kind):
    attention, inputs, sizes = FUSED[kind]
    path = with_inputs(tmp_path, attention, inputs, sizes is ONE)
    session = agree(path, sizes)
    assert session.model.config.mask.shift == 0
    assert len(session.model.recognised.notes) == (kind == "GroupQuery, scale")


def test_lengths_counted_in_the_attention_mask(tmp_path):
    path = with_inputs(tmp_path, group_query_attention(), (), lengths=True)
    session = agree(path, SINGLE)
    feeds = feeds_for(session.model.recognised, 2, 4, 0, np.array([[1, 1, 1, 1], [1, 1, 1, 0]]))
    with pytest.raises(
        InputError, match=r"lengths of no one past: 'seqlens_k': \[3, 2\], 'total_sequence_length': \[4\]"
    ):
        session.run(None, feeds)


@pytest.mark.parametrize("kind", ["Attention", "DecoderMaskedSelfAttention", "DecoderMasked"])
def test_what_onnx_runtimes_cpu_does_not_run_is_the_plain_model(tmp_path, kind):
    """The buffer of Attention, DecoderMaskedSelfAttention, and DecoderMaskedMultiHeadAttention without a buffer."""
    attention, inputs = {
        "Attention": (contrib_attention(rows=M), (LENGTH,)),
        "DecoderMaskedSelfAttention": (contrib_attention(kind, M), (LENGTH,)),
        "DecoderMasked": (decoder_masked_attention("P"), ()),
    }[kind]
    for name in ("here", "plain"):
        (tmp_path / name).mkdir()
    session = InferenceSession(with_inputs(tmp_path / "here", attention, inputs, kind != "Attention"))
    usual = multi_head_attention() if kind == "DecoderMasked" else contrib_attention()
    theirs = runtime(with_inputs(tmp_path / "plain", usual, ()))
    P, T = 5, 1
    feeds = feeds_for(session.model.recognised, 2, T, P)
    same = {i.name: feeds[i.name] for i in theirs.get_inputs()}
    same = {name: a[..., :P, :] if "past" in name else a for name, a in same.items()}
    names = [output.name for output in session.get_outputs()]
    for name, got, expected in zip(names, session.run(None, feeds), theirs.run(names, same), strict=True):
        if "present" in name and kind != "DecoderMasked":
            past = feeds[name.replace("present", "past")]
            assert np.array_equal(got[..., P + T :, :], past[..., P + T :, :])
            got = got[..., : P + T, :]
        assert_close(got, expected, name)


@RUNS_SINCE["DecoderMasked, beams"]
@pytest.mark.parametrize("engine", ENGINES)
def test_beams_read_the_past_of_each_other(tmp_path, engine):
    attention, inputs, _ = FUSED["DecoderMasked, beams"]
    path = with_inputs(tmp_path, attention, inputs, True)
    session = InferenceSession(path, engine=engine)
    P, W = 6, 3
    feeds = feeds_for(session.model.recognised, 2 * W, 1, P)
    feeds["beam_width"][:] = W
    feeds["cache_indirection"] = np.random.default_rng(0).integers(0, W, (2, W, M)).astype(np.int32)
    for output, got, expected in zip(
        session.get_outputs(), session.run(None, feeds), runtime(path).run(None, feeds), strict=True
    ):
        assert_close(got, expected, output.name)
    feeds["cache_indirection"][0, 0, 1] = W
    with pytest.raises(InputError, match="cache_indirection"):
        session.run(None, feeds)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("past_sequence_length", M + 1, "hold 16 positions; 17"),
        ("past_sequence_length", M - 3, "no room for 4 new ones"),
        ("past_sequence_length", -1, r"lengths of no one past: 'past_sequence_length': \[-1\]"),
    ],
)
def test_wrong_lengths_are_refused(tmp_path, name, value, message):
    session = InferenceSession(with_inputs(tmp_path, multi_head_attention(M), (LENGTH,)), engine="numpy")
    feeds = feeds_for(session.model.recognised, 2, 4, 3)
    feeds[name][:] = value
    with pytest.raises(InputError, match=message):
        session.run(None, feeds)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"do_rotary": 1}, "GroupQueryAttention node 'heads_0' has do_rotary=1: GPT-2 has none"),
        ({"local_window_size": 4}, "local_window_size=4"),
        ({"kv_num_heads": 1}, "3 heads of queries and 1 of keys"),
        ({"softcap": 2.0}, r"softcap=2\.0"),
    ],
)
def test_what_gpt2s_attention_does_not_do_is_named(tmp_path, how, message):
    with pytest.raises(UnsupportedModelError, match=message):
        InferenceSession(with_inputs(tmp_path, group_query_attention(**how), TOTALS))


def test_a_bias_behind_the_split_is_c_attns(tmp_path):
    session = InferenceSession(with_inputs(tmp_path, multi_head_attention(split_bias=True), ()), engine="numpy")
    source = session.model.recognised.sources["h.1.attn.c_attn.bias"]
    assert source.origin == ("h.1.attn.c_attn.bias",)
    tensors = {t.name: t for t in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert np.array_equal(source.load(), numpy_helper.to_array(tensors["h.1.attn.c_attn.bias"]))


# ----------------------------------------------------------------------------------------------------------- spellings
@pytest.mark.parametrize("attention", [einsum_attention, ellipsis_attention], ids=lambda a: a.__name__)
def test_einsum(tmp_path, attention):
    form = Form()
    form.head(form.blocks(form.embed(form.input("ids", np.int64, "B", "T")), attention))
    path = form.save(tmp_path / "model.onnx")
    session = agree(path)
    assert session.model.recognised.notes == ()
    assert session.model.config.attn_scale == 8**-0.5


@pytest.mark.parametrize("norm", [rearranged_norm, norm_with_its_gain_in_the_root], ids=lambda n: n.__name__)
def test_layer_norms_in_another_order(tmp_path, norm):
    form = Form()
    form.norm = norm
    form.head(form.blocks(form.embed(form.input("ids", np.int64, "B", "T")), written_out(causal)))
    session = agree(form.save(tmp_path / "model.onnx"))
    assert session.model.config.layer_norm_epsilon == 1e-3
    assert session.model.config.overrides == ()
    assert session.model.recognised.sources["h.1.ln_2.bias"].origin == ("h.1.ln_2.bias",)


def test_what_only_looks_like_a_layer_norm_is_named(tmp_path):
    def cubed(form: Form, x: str, name: str) -> str:
        normed = rearranged_norm(form, x, name)
        at = next(k for k, n in enumerate(form.nodes) if n.op_type == "Sqrt" and k > len(form.nodes) - 9)
        form.nodes[at].op_type = "Tanh"
        return normed

    form = Form()
    form.norm = cubed
    form.head(form.blocks(form.embed(form.input("ids", np.int64, "B", "T")), written_out(causal)))
    with pytest.raises(UnsupportedModelError, match=r"none of the outputs logits is a layer norm"):
        InferenceSession(form.save(tmp_path / "model.onnx"))


@pytest.mark.parametrize("rows", [2, V - 1])
def test_a_classifiers_head_is_named(tmp_path, rows):
    form = Form()
    x = form.blocks(form.embed(form.input("ids", np.int64, "B", "T")), written_out(causal))
    form.op("MatMul", x, form.weight("classes", C, rows), out=form.output("logits", "B", "T", rows))
    with pytest.raises(WeightError, match=rf"MatMul node 'logits' gives {rows} numbers.*37 tokens.*classifier"):
        InferenceSession(form.save(tmp_path / "model.onnx"))


def test_rotary_positions_are_named(tmp_path):
    def rotary(form: Form, i: int, x: str) -> str:
        for part in ("q", "k"):
            cache = form.constant(np.ones((N, 4)), np.float32)
            form.op("RotaryEmbedding", x, form.ints(0), cache, cache, out=f"{part}{i}", domain="com.microsoft")
        return written_out(causal)(form, i, f"q{i}")

    form = Form()
    form.head(form.blocks(form.embed(form.input("ids", np.int64, "B", "T")), rotary))
    with pytest.raises(UnsupportedModelError, match="RotaryEmbedding node 'q0' rotates.*wpe"):
        InferenceSession(form.save(tmp_path / "model.onnx"))


def test_attention_probabilities_are_outputs(tmp_path):
    form = Form()
    form.head(form.blocks(form.embed(form.input("ids", np.int64, "B", "T")), written_out(causal)))
    probs = [n.output[0] for n in form.nodes if n.op_type == "Softmax"]
    for i, name in enumerate(probs):
        form.op("Identity", name, out=form.output(f"attentions_{i}", "B", 3, "T", "T"))
    session = agree(form.save(tmp_path / "model.onnx"))
    assert [p.role for p in session.model.recognised.outputs][1:] == ["h.0.attn.probs", "h.1.attn.probs"]


# ------------------------------------------------------------------------------------------------------------ storage
def plain(path: Path) -> Path:
    form = Form()
    form.head(form.blocks(form.embed(form.input("ids", np.int64, "B", "T")), written_out(causal)))
    return form.save(path / "model.onnx")


def make_sparse(path: Path, name: str, change: Callable[[onnx.SparseTensorProto], object], flat: bool = True) -> Path:
    """Keep a weight's elements of at least 0.2, and their indices."""
    model = onnx.load(path)
    dense = next(t for t in model.graph.initializer if t.name == name)
    array = numpy_helper.to_array(dense)
    where = np.abs(array) >= 0.2
    indices = np.flatnonzero(where) if flat else np.argwhere(where)
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(array[where], name), numpy_helper.from_array(indices.astype(np.int64)), array.shape
    )
    change(sparse)
    model.graph.initializer.remove(dense)
    model.graph.sparse_initializer.append(sparse)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("flat", [True, False])
def test_sparse_initializers(tmp_path, flat):
    path = make_sparse(plain(tmp_path), "h.1.mlp.c_fc.weight", lambda sparse: None, flat)
    session = agree(path)
    weight = session.model.weights.h[1].mlp.c_fc.weight
    assert 0 < (weight != 0).sum() < weight.size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.dims.__setitem__(0, 1 << 40), "would take .* bytes"),
        (lambda s: s.dims.__setitem__(0, -1), "sparse tensor 'h.1.mlp.c_fc.weight'"),
        (lambda s: s.dims.__setitem__(0, 1), "has .* values"),
        (lambda s: s.indices.dims.__setitem__(0, 3), "indices"),
        (lambda s: s.ClearField("dims"), r"sparse tensor 'h.1.mlp.c_fc.weight' \[\]"),
    ],
)
def test_sparse_initializers_are_checked_before_they_are_made_dense(tmp_path, change, message):
    with pytest.raises(ModelFileError, match=message):
        InferenceSession(make_sparse(plain(tmp_path), "h.1.mlp.c_fc.weight", change))


def test_an_index_outside_a_sparse_initializer(tmp_path):
    def outside(sparse: onnx.SparseTensorProto) -> None:
        indices = numpy_helper.to_array(sparse.indices).copy()
        indices[0] = C * 100
        sparse.indices.CopyFrom(numpy_helper.from_array(indices))

    with pytest.raises(ModelFileError, match="index outside"):
        InferenceSession(make_sparse(plain(tmp_path), "h.1.mlp.c_fc.weight", outside))


def test_onnx_runtimes_own_format_is_named(tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "model.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(plain(tmp_path), options, providers=["CPUExecutionProvider"])
    with pytest.raises(ModelFileError, match=r"ONNX Runtime's own format \(\.ort\)"):
        InferenceSession(tmp_path / "model.ort")


def test_rows_without_a_key_in_a_float64_file():
    """Its lowest number hides all keys alike, which float32 can only say with its own lowest."""
    lowest = float(np.finfo(np.float64).min)
    rule = MaskRule("replaced", lowest, 0, padding=(0.0, lowest), padding_later=(0.0, lowest), blind_rows="masked")
    for dtype in (np.float32, np.float64):
        mask = mask_for(rule, np.array([[0, 1, 1]]), 1, 3, 3, np.dtype(dtype))
        assert mask is not None
        assert mask.added[0, 0, 0].tolist() == [np.finfo(dtype).min] * 3


def parity_files() -> dict[str, Callable[[Path], Path]]:
    def static(path: Path) -> Path:
        form = Form()
        ids = form.input("ids", np.int64, 2, 3)
        x = form.embed(ids, "past_key_0")
        form.head(form.blocks(x, written_out(causal, past=True, cached=lambda i: 4)))
        return form.save(path / "model.onnx")

    files: dict[str, Callable[[Path], Path]] = {
        k: partial(masked, kind=k) for k in ("megatron", "bool", "added to keys")
    }
    for kind in ("MultiHeadAttention, buffer", "GroupQuery", "DecoderMasked, beams"):
        attention, inputs, sizes = FUSED[kind]
        files[kind] = partial(with_inputs, attention=attention, inputs=inputs, one=sizes is ONE)
    return {**files, "sizes fixed": static}


@pytest.mark.parametrize("kind", kinds(parity_files()))
def test_parity_runs_such_files(tmp_path, kind):
    """The debugger makes calls of them, and takes apart the calls that a session makes of the same feeds."""
    from gpt2np.parity.cases import random_cases
    from gpt2np.parity.parties import Ours
    from gpt2np.parity.subject import Subject

    model = Subject(parity_files()[kind](tmp_path))
    case = random_cases(model, 1, seed=3, longest=12)[0]
    run = Ours(model, "numpy").run(case.feeds, taps=["logits", "h.1.attn.probs"])
    for name, expected in zip(run.outputs, runtime(model.path).run(list(run.outputs), case.feeds), strict=True):
        assert_close(run.outputs[name], expected, name)
    assert_close(run.taps["logits"].reshape(run.outputs["logits"].shape), run.outputs["logits"], "tap", 1e-6, 1e-6)
    T, S = run.taps["h.1.attn.probs"].shape[-2:]
    assert not np.triu(run.taps["h.1.attn.probs"], 1 + S - T).any()


def test_a_fused_mask_is_cut_out_of_its_buffer(tmp_path):
    """Attention's mask (B, 1, N, N), which ONNX Runtime runs on GPUs alone: the same as one of what is cut out."""
    attention = contrib_attention(mask="attention_mask")
    for name, shape in (("whole", ("B", 1, N, N)), ("cut", ("B", "T", "S"))):
        (tmp_path / name).mkdir()
        with_inputs(tmp_path / name, attention, (("attention_mask", np.int32, *shape),))
    session, theirs = InferenceSession(tmp_path / "whole"), runtime(tmp_path / "cut" / "model.onnx")
    for P, T in ((0, 5), (3, 4), (6, 1)):
        feeds = feeds_for(session.model.recognised, 2, T, P)
        feeds["attention_mask"][1, 0, :, 1] = 0
        cut = {**feeds, "attention_mask": feeds["attention_mask"][:, 0, P : P + T, : P + T]}
        for output, got, expected in zip(
            session.get_outputs(), session.run(None, feeds), theirs.run(None, cut), strict=True
        ):
            assert_close(got, expected, f"{output.name} P={P}")


@pytest.mark.parametrize("width", [C, 1])
def test_zeros_that_make_a_value_wider_are_refused(tmp_path, width):
    """A vector of zeros changes nothing of (B, T, C), but makes (B, T, 1) as wide as itself."""
    form = Form()
    ids = form.input("ids", np.int64, "B", "T")
    words = form.op("Gather", form.weight("wte.weight", V, width), ids)
    places = form.op("Gather", form.weight("wpe.weight", N, C), form.input("position_ids", np.int64, "B", "T"))
    words = form.op("Add", words, form.constant(np.zeros(C, np.float32)))
    x = form.blocks(form.op("Add", words, places), written_out(causal))
    form.op("MatMul", x, form.weight("lm_head", C, V), out=form.output("logits", "B", "T", V))
    path = form.save(tmp_path / "model.onnx")
    if width == C:
        InferenceSession(path, engine="numpy")
    else:
        with pytest.raises(Gpt2npError):
            InferenceSession(path, engine="numpy")


@pytest.mark.parametrize("switch", ["transBatchA", "transBatchB"])
def test_a_fused_product_that_exchanges_axes_of_the_batch_is_refused(tmp_path, switch):
    """Of one token with as many heads as sequences it gives an output of another shape."""
    form = Form()
    form.head(form.blocks(form.embed(form.input("ids", np.int64, "B", "T")), written_out(causal)))
    node = next(n for n in form.nodes if n.op_type == "MatMul" and "Softmax" in n.input[0])
    node.op_type, node.domain = "FusedMatMul", "com.microsoft"
    path = form.save(tmp_path / "model.onnx")
    InferenceSession(path, engine="numpy")
    node.attribute.append(helper.make_attribute(switch, 1))
    with pytest.raises(UnsupportedModelError, match=f"has {switch}=1"):
        InferenceSession(form.save(path), engine="numpy")
