"""The forms in which further exporters write GPT-2, built node by node: recognised, and run like ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from forms import C, F, Form, L, V, causal, written_out
from gpt2np.session import InferenceSession
from runtime import assert_close, feeds_for, runtime


def agree(path: Path, sizes: tuple[tuple[int, int], ...] = ((1, 1), (2, 5), (1, 24))) -> InferenceSession:
    """Both engines give what ONNX Runtime gives, for (B, T)."""
    theirs = runtime(path)
    for engine in ("numpy", "numba"):
        ours = InferenceSession(path, engine=engine)
        for B, T in sizes:
            feeds = feeds_for(ours.model.recognised, B, T)
            for port, got, expected in zip(
                ours.get_outputs(), ours.run(None, feeds), theirs.run(None, feeds), strict=True
            ):
                assert_close(got, expected, f"{engine} {port.name} B={B} T={T}")
    return ours


def new_gelu(form: Form, x: str) -> str:
    """0.5 * x * (1 + tanh(...)), as minGPT and nanoGPT write it: x is read three times."""
    half = form.op("Mul", x, form.constant(0.5, np.float32))
    cubed = form.op("Mul", form.op("Pow", x, form.constant(3, np.float32)), form.constant(0.044715, np.float32))
    inner = form.op("Mul", form.op("Add", x, cubed), form.constant((2 / np.pi) ** 0.5, np.float32))
    return form.op("Mul", half, form.op("Add", form.op("Tanh", inner), form.constant(1, np.float32)))


def without_biases(form: Form, x: str) -> str:
    """Blocks whose maps and layer norms have no bias."""

    def plain(value: str, name: str, *shape: int) -> str:
        return form.op("MatMul", value, form.weight(f"{name}.weight", *shape))

    def norm(value: str, name: str) -> str:
        return form.op("LayerNormalization", value, form.weight(f"{name}.weight", C))

    form.linear = plain  # type: ignore[method-assign]
    form.norm = lambda f, value, name: norm(value, name)
    for i in range(L):
        heads = written_out(causal)(form, i, norm(x, f"h.{i}.ln_1"))
        x = form.op("Add", x, plain(heads, f"h.{i}.attn.c_proj", C, C))
        fc = plain(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc", C, F)
        x = form.op("Add", x, plain(new_gelu(form, fc), f"h.{i}.mlp.c_proj", F, C))
    return norm(x, "ln_f")


def test_maps_without_bias_before_gelu_written_out(tmp_path):
    form = Form()
    form.head(without_biases(form, form.embed(form.input("ids", np.int64, "B", "T"))))
    ours = agree(form.save(tmp_path / "model.onnx"))
    assert ours.model.config.activation == "gelu_tanh"
    assert not ours.model.recognised.sources["h.0.mlp.c_fc.bias"].load().any()


def last_by_gather_nd(form: Form, x: str) -> str:
    """x[:, [-1], :] as torch.export writes it."""
    first = form.op("Transpose", x, perm=[1, 0, 2])
    return form.op("Transpose", form.op("GatherND", first, form.constant([[-1]], np.int64)), perm=[1, 0, 2])


def last_by_slice(form: Form, x: str) -> str:
    return form.op("Slice", x, form.ints(-1), form.ints(2**63 - 1), form.ints(1))


@pytest.mark.parametrize("last", [last_by_gather_nd, last_by_slice])
def test_logits_of_the_last_position(tmp_path, last: Callable[[Form, str], str]):
    form = Form()
    x = form.blocks(form.embed(form.input("ids", np.int64, "B", "T")), written_out(causal))
    head = form.op("Transpose", form.weight("wte.weight", V, C))
    form.op("MatMul", last(form, x), head, out=form.output("logits", "B", 1, V))
    ours = agree(form.save(tmp_path / "model.onnx"))
    assert [p.role for p in ours.model.recognised.outputs] == ["last_logits"]


def test_negative_ids_and_positions_are_counted_from_the_end(tmp_path):
    """As ONNX's Gather does; beyond that they are errors."""
    from gpt2np.errors import ContextOverflowError, TokenRangeError

    path = Path(__file__).parents[1] / "data" / "optimum_past.onnx"
    ours, theirs = InferenceSession(path, engine="numpy"), runtime(path)
    feeds = feeds_for(ours.model.recognised, 2, 4, 3)
    feeds["input_ids"][0, 1], feeds["input_ids"][1, 3] = -1, -64
    feeds["position_ids"][1, :2] = -16, -1
    for port, got, expected in zip(ours.get_outputs(), ours.run(None, feeds), theirs.run(None, feeds), strict=True):
        assert_close(got, expected, port.name)
    feeds["input_ids"][0, 1] = -65
    with pytest.raises(TokenRangeError, match="-65"):
        ours.run(None, feeds)
    feeds["input_ids"][0, 1], feeds["position_ids"][0, 0] = 0, -17
    with pytest.raises(ContextOverflowError, match="-17"):
        ours.run(None, feeds)
    with pytest.raises(TokenRangeError, match="-1"):  # the Python model takes ids as they are
        ours.model([[-1]])
