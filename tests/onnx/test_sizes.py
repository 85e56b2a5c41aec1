"""What a graph computes of sizes and of indices is tried at their ends: one position, one sequence, a full context."""

import numpy as np
import pytest

from forms import C, D, Form, N, V, causal, qkv, split_heads, written_out
from gpt2np.errors import TokenRangeError, UnsupportedModelError
from gpt2np.session import InferenceSession
from runtime import assert_close, feeds_for, runtime


def with_positions(change, past=True, start="end"):
    """A file whose positions end where `change(form, end, sizes)` says, and begin T before that or behind the past."""
    form = Form()
    ids = form.input("ids", np.int64, "B", "T")
    B, T = (form.op("Squeeze", form.size(ids, axis)) for axis in (0, 1))
    P = form.op("Squeeze", form.size("past_key_0", 2)) if past else form.constant(0, np.int64)
    S = form.op("Add", P, T)
    end = change(form, S, {"B": B, "T": T, "P": P})
    first = form.op("Sub", end, T) if start == "end" else P
    positions = form.op("Range", first, end, form.constant(1, np.int64))
    words = form.op("Gather", form.weight("wte.weight", V, C), ids)
    x = form.op("Add", words, form.op("Gather", form.weight("wpe.weight", N, C), positions))
    form.head(form.blocks(x, written_out(causal, past=past)))
    return form


def number(form, value):
    return form.constant(value, np.int64)


def where(size, op, limit, other):
    """The end of the positions is another where a size is such."""

    def change(form, end, sizes):
        found = form.op(op, sizes[size], number(form, limit))
        return form.op("Where", found, form.op("Add", end, number(form, other)), end)

    return change


def taken(table):
    """The end of the positions is taken from a table of the file."""
    return lambda form, end, sizes: form.op("Gather", form.constant(table, np.int64), end)


BENT = np.arange(N + 1)
BENT[17] = 16
CHANGES = {
    "a table": taken(BENT),
    "S is 2 at least": lambda form, end, sizes: form.op("Max", end, number(form, 2)),
    "S is n_ctx - 1 at most": lambda form, end, sizes: form.op("Min", end, number(form, N - 1)),
    "S modulo n_ctx": lambda form, end, sizes: form.op("Mod", end, number(form, N)),
    "one sequence": where("B", "Equal", 1, -1),
    "many sequences": where("B", "Greater", 8, -1),
    "one position": where("T", "Less", 2, -1),
    "a length between": where("T", "Equal", 17, -1),
    "a past between": where("P", "Equal", 19, -1),
    "a full past": where("P", "Equal", N - 1, -1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("past", [True, False], ids=["past", "no past"])
def test_rows_of_wpe_that_are_others_at_some_size(tmp_path, change, past):
    path = with_positions(change, past).save(tmp_path / "model.onnx")
    if not past and change in (CHANGES["a past between"], CHANGES["a full past"]):
        InferenceSession(path, engine="numpy")  # there is no such size
        return
    with pytest.raises(UnsupportedModelError, match="of wpe|arithmetic of sizes"):
        InferenceSession(path, engine="numpy")


def test_one_row_more_where_there_is_one_position(tmp_path):
    """Two rows of wpe are added to the row of a single token: the file then gives two positions, without a past."""
    form = with_positions(CHANGES["S is 2 at least"], start="past")
    with pytest.raises(UnsupportedModelError, match="Max node .*arithmetic of sizes of embed"):
        InferenceSession(form.save(tmp_path / "model.onnx"), engine="numpy")


def test_positions_that_are_clipped_where_no_size_is_load(tmp_path):
    """The end of the positions between 1 and n_ctx, as every end is."""

    def change(form, end, sizes):
        return taken(np.arange(N + 1))(form, form.op("Clip", end, number(form, 1), number(form, N)), sizes)

    form = with_positions(change)
    path = form.save(tmp_path / "model.onnx")
    session = InferenceSession(path, engine="numpy")
    for B, T, P in ((1, 1, 0), (2, 3, 4), (1, 1, N - 1)):
        feeds = feeds_for(session.model.recognised, B, T, P)
        for ours, theirs in zip(session.run(None, feeds), runtime(path).run(None, feeds), strict=True):
            assert_close(ours, theirs, "an output")


def test_a_mask_of_one_key_at_some_length(tmp_path):
    """Where there are 9 keys, one element of the mask is taken for all: the slices' end is another."""

    def mask(form, scores):
        T, S = form.size(scores, 2), form.size(scores, 3)
        rows = form.op("Slice", form.constant(np.tri(N, dtype=bool)), form.op("Sub", S, T), S, form.ints(0))
        end = form.op("Where", form.op("Equal", S, form.ints(9)), form.ints(1), S)
        keep = form.op("Slice", rows, form.ints(0), end, form.ints(1))
        return form.op("Where", keep, scores, form.constant(-1e4, np.float32))

    form = Form()
    form.head(
        form.blocks(form.embed(form.input("ids", np.int64, "B", "T"), "past_key_0"), written_out(mask, past=True))
    )
    with pytest.raises(UnsupportedModelError, match="arithmetic of sizes of h.0.attn.scores"):
        InferenceSession(form.save(tmp_path / "model.onnx"), engine="numpy")


class Gemms(Form):
    """Linear maps of (B, T, C) by Gemm, which takes two axes."""

    def linear(self, x, name, inputs, outputs):
        weights = self.weight(f"{name}.weight", inputs, outputs), self.weight(f"{name}.bias", outputs)
        return self.op("Gemm", x, *weights)


def by_heads_alone(form, x):
    """(B, H, M, N) -> (B * H, M, N)"""
    return form.op("Reshape", x, form.op("Concat", form.ints(-1), form.size(x, 2), form.size(x, 3), axis=0))


def attention_of(which):
    """Attention in which an operand of a product has a shape that fits one sequence alone, or no product."""

    def attention(form, i, x):
        q, k, v = (split_heads(form, part) for part in qkv(form, i, x))
        k = form.op("Transpose", k, perm=[0, 1, 3, 2])
        k = by_heads_alone(form, k) if which == "keys" else k
        v = by_heads_alone(form, v) if which == "values" else v
        scores = form.op("Mul", form.op("MatMul", q, k), form.constant(D**-0.5, np.float32))
        probs = form.op("Softmax", causal(form, scores), axis=-1)
        heads = form.op("Transpose", form.op("MatMul", probs, v), perm=[0, 2, 1, 3])
        return form.op("Reshape", heads, form.ints(*((0, 1, -1) if which == "heads" else (0, 0, C))))

    return attention


@pytest.mark.parametrize(
    ("make", "which", "shapes"),
    [
        (Gemms, "", r"Gemm node .* \(2, 4, 24\) by \(24, 72\)"),
        (Form, "keys", r"MatMul node .* \(2, 3, 4, 8\) by \(6, 8, 4\)"),
        (Form, "values", r"MatMul node .* \(2, 3, 4, 4\) by \(6, 4, 8\)"),
        (Form, "heads", r"MatMul node .* \(2, 1, 96\) by \(24, 24\)"),
    ],
)
def test_a_product_of_shapes_that_do_not_fit(tmp_path, make, which, shapes):
    """The elements are those of a GPT-2, but no runtime takes them so, or of one sequence alone."""
    form = make()
    form.head(form.blocks(form.embed(form.input("ids", np.int64, "B", "T")), attention_of(which)))
    path = form.save(tmp_path / "model.onnx")
    with pytest.raises(UnsupportedModelError, match=shapes):
        InferenceSession(path, engine="numpy")
    with pytest.raises(Exception, match="Gemm|MatMul"):
        runtime(path).run(None, {"ids": np.ones((2, 4), np.int64)})


def looked_up(change_ids, change_positions, T="T"):
    form = Form()
    ids, positions = (form.input(name, np.int64, "B", T) for name in ("ids", "position_ids"))
    words = form.op("Gather", form.weight("wte.weight", V, C), change_ids(form, ids))
    places = form.op("Gather", form.weight("wpe.weight", N, C), change_positions(form, positions))
    form.head(form.blocks(form.op("Add", words, places), written_out(causal)))
    return form


FROM_THE_END = {
    "as they are": lambda form, x, size: x,
    "the size added": lambda form, x, size: form.op(
        "Where", form.op("Less", x, number(form, 0)), form.op("Add", x, number(form, size)), x
    ),
    "modulo the size": lambda form, x, size: form.op("Mod", x, number(form, size)),
}
OTHERWISE = {
    "absolute": lambda form, x, size: form.op("Abs", x),
    "at least 0": lambda form, x, size: form.op("Max", x, number(form, 0)),
    "clipped": lambda form, x, size: form.op("Clip", x, number(form, 0), number(form, size - 1)),
}
NEGATIVE = [
    {"ids": np.array([[3, -1, 7, -V]]), "position_ids": np.array([[0, 1, 2, 3]])},
    {"ids": np.array([[3, 2, 7, 1]]), "position_ids": np.array([[0, -1, 2, -N]])},
]


@pytest.mark.parametrize("change", FROM_THE_END.values(), ids=FROM_THE_END)
def test_negative_indices_count_from_the_end(tmp_path, change):
    form = looked_up(lambda form, x: change(form, x, V), lambda form, x: change(form, x, N))
    path = form.save(tmp_path / "model.onnx")
    for feeds in NEGATIVE:
        (ours,) = InferenceSession(path, engine="numpy").run(None, feeds)
        assert_close(ours, runtime(path).run(None, feeds)[0], "logits")


@pytest.mark.parametrize("change", OTHERWISE.values(), ids=OTHERWISE)
def test_negative_indices_are_refused_where_the_graph_makes_others_of_them(tmp_path, change):
    form = looked_up(lambda form, x: change(form, x, V), lambda form, x: change(form, x, N))
    session = InferenceSession(form.save(tmp_path / "model.onnx"), engine="numpy")
    for feeds in NEGATIVE:
        with pytest.raises(TokenRangeError if feeds["ids"].min() < 0 else Exception, match="-"):
            session.run(None, feeds)
        session.run(None, {name: np.abs(value) % N for name, value in feeds.items()})


def test_every_given_position_is_tried_where_the_length_is_fixed(tmp_path):
    """Position 12 alone is another, and the file takes four at a time."""

    def change(form, x):
        return form.op("Where", form.op("Equal", x, number(form, 12)), number(form, 5), x)

    form = looked_up(lambda form, x: x, change, T=4)
    with pytest.raises(UnsupportedModelError, match="takes row 5 of wpe where row 12"):
        InferenceSession(form.save(tmp_path / "model.onnx"), engine="numpy")
