"""Forms of GPT-2 that exporters and optimisers make, built node by node: recognised, and run like ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from forms import C, D, Form, H, N, V, causal, written_out
from gpt2np.errors import InputError, ModelFileError, UnsupportedModelError
from gpt2np.session import InferenceSession
from runtime import assert_close, feeds_for, runtime

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
    assert session.model.config.mask_kind == "given"


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
    assert (H, D, C) == (3, 4, 12)


@pytest.mark.parametrize("kind", ["megatron", "bool", "added to keys"])
def test_parity_feeds_masks_and_token_types(tmp_path, kind):
    """The debugger runs such files too: its calls are the ones that a session makes of the same feeds."""
    from gpt2np.parity.compare import case_from_ids
    from gpt2np.parity.runners import Model, Ours

    model = Model(masked(tmp_path, kind))
    case = case_from_ids(model, "case", np.array([[1, 2, 3], [4, 5, 6]]))
    run = Ours(model, "numpy").run(case.feeds, taps=["h.1.attn.probs"])
    for name, expected in zip(run.outputs, runtime(model.path).run(list(run.outputs), case.feeds), strict=True):
        assert_close(run.outputs[name], expected, name)
    assert not np.triu(run.taps["h.1.attn.probs"], 1).any()


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
