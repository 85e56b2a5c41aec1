"""Copies of a GPT-2 file with one thing changed: the mistakes that people make when they port transformers.

`MUTANTS` maps a name to a Mutant: how to change the file, which tap is the first to go wrong, and what the
cause is called in `gpt2np.parity`. Each `apply` edits an onnx.ModelProto in place and returns False where the
file has nothing of that kind (no position Add in a file that is given its position_ids, say).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np
import onnx
from onnx import helper, numpy_helper

from graph_edits import (
    Array,
    Model,
    const,
    constant_of,
    copy_of,
    edit,
    insert_after,
    insert_before,
    prune,
    replace_input,
    rewire,
    scope,
    tensor_of,
)


class Mutant(NamedTuple):
    apply: Callable[[Model], bool]
    tap: str
    causes: tuple[str, ...]  # either of these names the mistake


def gelu(layer: int, form: str) -> Callable[[Model], bool]:
    def apply(model: Model) -> bool:
        tanh = scope(model, rf"h\.{layer}/mlp", "Tanh")
        if not tanh:
            return False
        nodes = list(model.graph.node)
        after = next(n for n in nodes if tanh[0].output[0] in n.input)  # 1 + tanh
        last = next(n for n in nodes if after.output[0] in n.input)  # 0.5 x (1 + tanh)
        x = next(n for n in nodes if n.op_type == "Pow" and re.search(rf"h\.{layer}/mlp", n.output[0])).input[0]
        y, k = last.output[0], f"mutant_gelu_{layer}"
        last.output[0] = k + "_old"
        if form == "erf":
            new = [
                const(k + "_s", 2**0.5), helper.make_node("Div", [x, k + "_s"], [k + "_d"]),
                helper.make_node("Erf", [k + "_d"], [k + "_e"]), const(k + "_1", 1.0),
                helper.make_node("Add", [k + "_e", k + "_1"], [k + "_p"]),
                helper.make_node("Mul", [x, k + "_p"], [k + "_m"]), const(k + "_h", 0.5),
                helper.make_node("Mul", [k + "_m", k + "_h"], [y]),
            ]  # fmt: skip
        else:
            new = [
                const(k + "_c", 1.702), helper.make_node("Mul", [x, k + "_c"], [k + "_d"]),
                helper.make_node("Sigmoid", [k + "_d"], [k + "_e"]),
                helper.make_node("Mul", [x, k + "_e"], [y]),
            ]  # fmt: skip
        insert_after(model, last, *new)
        prune(model)
        return True

    return apply


def epsilon(norm: str, value: float) -> Callable[[Model], bool]:
    pattern = norm.replace(".", r"\.").replace(r"\.ln", "/ln")

    def apply(model: Model) -> bool:
        fused = scope(model, pattern, "LayerNormalization")
        for node in fused:
            for attribute in node.attribute:
                if attribute.name == "epsilon":
                    attribute.f = value
            return True
        roots = scope(model, pattern, "Sqrt")
        for node in roots:
            add = next(n for n in model.graph.node if node.input[0] in n.output)
            replace_input(model, add, 1, value)
            return True
        return False

    return apply


def epsilon_outside(norm: str, value: float | None = None) -> Callable[[Model], bool]:
    """sqrt(var + eps) becomes sqrt(var) + eps."""
    pattern = norm.replace(".", r"\.").replace(r"\.ln", "/ln")

    def apply(model: Model) -> bool:
        for root in scope(model, pattern, "Sqrt"):
            add = next(n for n in model.graph.node if root.input[0] in n.output)
            variance, eps = add.input
            if value is not None:
                insert_before(model, add, const("mutant_eps", value))
                eps = "mutant_eps"
            old_root, old_sum = root.output[0], add.output[0]
            add.op_type, root.op_type = "Sqrt", "Add"
            del add.input[:], root.input[:]
            add.input.extend([variance])
            root.input.extend([old_sum, eps])
            assert root.output[0] == old_root
            return True
        return False

    return apply


def ddof(norm: str) -> Callable[[Model], bool]:
    """The variance divided by C - 1 instead of C."""
    pattern = norm.replace(".", r"\.").replace(r"\.ln", "/ln")

    def apply(model: Model) -> bool:
        weight = tensor_of(model, norm + ".weight")
        for root in scope(model, pattern, "Sqrt"):
            add = next(n for n in model.graph.node if root.input[0] in n.output)
            C = weight.dims[0]
            insert_before(
                model, add, const("ddof_k", C / (C - 1)), helper.make_node("Mul", [add.input[0], "ddof_k"], ["ddof_v"])
            )
            add.input[0] = "ddof_v"
            return True
        return False

    return apply


def scale(layer: int, factor: float) -> Callable[[Model], bool]:
    """q k^T scaled by `factor` x 1/sqrt(D)."""

    def apply(model: Model) -> bool:
        softmax = scope(model, rf"h\.{layer}/attn", "Softmax")
        if not softmax:
            return False
        for node in scope(model, rf"h\.{layer}/attn", "Div"):
            value = constant_of(model, node.input[1])
            maker = next((n for n in model.graph.node if node.input[0] in n.output), None)
            if value is not None and value.dtype == np.float32 and maker is not None and maker.op_type == "MatMul":
                replace_input(model, node, 1, float(value) / factor)
                return True
        for node in scope(model, rf"h\.{layer}/attn", "Mul"):  # q * sqrt(1 / sqrt(D)), as SDPA exports have it
            maker = next((n for n in model.graph.node if node.input[1] in n.output), None)
            if maker is not None and maker.op_type == "Sqrt":
                k = f"mutant_scale_{layer}"
                insert_before(model, node, const(k, factor), helper.make_node("Mul", [node.input[1], k], [k + "_x"]))
                node.input[1] = k + "_x"
                return True
        return False

    return apply


def mask_value(layer: int, value: float) -> Callable[[Model], bool]:
    def apply(model: Model) -> bool:
        for node in scope(model, rf"h\.{layer}/attn", "Where"):
            found = constant_of(model, node.input[2])
            if found is not None and found.size == 1 and float(found) < -100:
                replace_input(model, node, 2, value)
                return True
        for node in scope(model, rf"h\.{layer}/attn", "Mul"):
            found = constant_of(model, node.input[1])
            if found is not None and found.size == 1 and float(found) == 1e4:
                replace_input(model, node, 1, -value)
                return True
        return False

    return apply


def mask_shift(layer: int | None, shift: int) -> Callable[[Model], bool]:
    """The causal triangle moved by one: query i sees keys up to i + shift."""

    def apply(model: Model) -> bool:
        buffers = [t for t in model.graph.initializer if t.name.endswith("attn.bias") and len(t.dims) == 4]
        if buffers:
            old = np.array(numpy_helper.to_array(buffers[0]))
            new = np.tril(np.ones_like(old), shift)
            if layer is None:
                buffers[0].CopyFrom(numpy_helper.from_array(new, buffers[0].name))
                return True
            model.graph.initializer.append(numpy_helper.from_array(new, f"shifted.{layer}"))
            names = {f"h.{layer}.attn.bias", f"transformer.h.{layer}.attn.bias"}
            for node in scope(model, rf"h\.{layer}/attn", "Slice"):
                if node.input[0] in names:
                    node.input[0] = f"shifted.{layer}"
                    return True
            return False
        for node in model.graph.node:
            if node.op_type == "LessOrEqual" and layer is None:
                if shift > 0:
                    insert_before(
                        model, node, const("shift", shift, np.int64),
                        helper.make_node("Add", [node.input[1], "shift"], ["shifted"]),
                    )  # fmt: skip
                    node.input[1] = "shifted"
                else:
                    node.op_type = "Less"
                return True
        return False

    return apply


def qkv_order(layer: int, order: tuple[int, int, int]) -> Callable[[Model], bool]:
    """c_attn's thirds taken in another order by the graph's Split."""

    def apply(model: Model) -> bool:
        for node in scope(model, rf"h\.{layer}/attn", "Split"):
            names = list(node.output)
            for i, j in enumerate(order):
                node.output[i] = names[j]
            return True
        return False

    return apply


def on_c_attn(layer: int, change: Callable[[Array, int], Array]) -> Callable[[Model], bool]:
    """Change c_attn's weight and bias alike, as (rows, 3, H, D); rows is 1 for the bias. H comes from the file."""

    def apply(model: Model) -> bool:
        done = False
        for kind in ("weight", "bias"):
            tensor = tensor_of(model, f"h.{layer}.attn.c_attn.{kind}")
            if tensor is None:
                return False
            value = np.array(numpy_helper.to_array(tensor))
            H = head_count(model)
            shaped = value.reshape(-1, 3, H, value.shape[-1] // (3 * H)).copy()
            new = change(shaped, H).reshape(value.shape)
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(new), tensor.name))
            done = True
        return done

    return apply


def head_count(model: Model) -> int:
    """H, from a past input or from the constants beside the Reshape that splits the heads."""
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        if "past" in value.name and len(dims) == 4:
            return int(dims[1].dim_value)
    for node in scope(model, r"h\.0/attn", "Concat"):
        found = constant_of(model, node.input[2]) if len(node.input) == 4 else None
        if found is not None:
            return int(found.reshape(-1)[0])
    raise AssertionError("no head count found in the test file")


def swap(shaped: Array, which: tuple[int, ...], a: int = 0, b: int = 1) -> Array:
    out = shaped.copy()
    for w in which:
        out[:, w, a], out[:, w, b] = shaped[:, w, b], shaped[:, w, a]
    return out


def swap_rows(layer: int, a: int = 0, b: int = 2) -> Callable[[Model], bool]:
    """attn.c_proj reads heads a and b in each other's place."""

    def apply(model: Model) -> bool:
        H = head_count(model)

        def change(w: Array) -> Array:
            shaped = w.reshape(H, -1, w.shape[-1]).copy()
            shaped[[a, b]] = shaped[[b, a]]
            return shaped.reshape(w.shape)

        return edit(f"h.{layer}.attn.c_proj.weight", change)(model)

    return apply


def corrupt(index: tuple[int, ...], change: Callable[[float], float]) -> Callable[[Array], Array]:
    def apply(w: Array) -> Array:
        w = w.copy()
        w[index] = change(float(w[index]))
        return w

    return apply


def drop_bias(name: str) -> Callable[[Model], bool]:
    """The linear map of the graph without its bias: a MatMul for the Gemm, whose third input opset 10 demands."""

    def apply(model: Model) -> bool:
        tensor = tensor_of(model, name)
        if tensor is None:
            return False
        for node in model.graph.node:
            if node.op_type == "Gemm" and len(node.input) == 3 and node.input[2] == tensor.name:
                if any(a.name.startswith("trans") and a.i for a in node.attribute):
                    return False
                node.op_type = "MatMul"
                del node.input[2], node.attribute[:]
                model.graph.initializer.remove(tensor)
                return True
        return False

    return apply


def position_offset(by: int) -> Callable[[Model], bool]:
    """Rows `by` further on in wpe, by an Add before the Gather."""

    def apply(model: Model) -> bool:
        wpe = tensor_of(model, "wpe.weight")
        for node in model.graph.node:
            if wpe is not None and node.op_type == "Gather" and node.input[0] == wpe.name:
                insert_before(
                    model, node, const("offset", by, np.int64),
                    helper.make_node("Add", [node.input[1], "offset"], ["offset_positions"]),
                )  # fmt: skip
                node.input[1] = "offset_positions"
                return True
        return False

    return apply


def head_matrix(change: Callable[[Array], Array]) -> Callable[[Model], bool]:
    """Change the head alone, where it is a matrix of its own."""

    def apply(model: Model) -> bool:
        wte = tensor_of(model, "wte.weight")
        if wte is None:
            return False
        for tensor in model.graph.initializer:
            if tensor.name != wte.name and list(tensor.dims) in (list(wte.dims)[::-1], list(wte.dims)):
                value = np.array(numpy_helper.to_array(tensor))
                tensor.CopyFrom(numpy_helper.from_array(change(value).astype(np.float32), tensor.name))
                return True
        return False

    return apply


def cast_activation(suffix: str, to: int) -> Callable[[Model], bool]:
    """Round what the linear map of one weight gives out to a 16-bit type and back, in the graph."""

    def apply(model: Model) -> bool:
        tensor = tensor_of(model, suffix)
        for node in model.graph.node:
            if tensor is not None and node.op_type == "Gemm" and node.input[1] == tensor.name:
                y = node.output[0]
                node.output[0] = y + "_raw"
                insert_after(
                    model, node, helper.make_node("Cast", [y + "_raw"], [y + "_16"], to=to),
                    helper.make_node("Cast", [y + "_16"], [y], to=onnx.TensorProto.FLOAT),
                )  # fmt: skip
                return True
        return False

    return apply


def bf16(w: Array) -> Array:
    return w.astype(ml_dtypes.bfloat16).astype(np.float32)


def fp16(w: Array) -> Array:
    return w.astype(np.float16).astype(np.float32)


def add_one(x: float) -> float:
    return x + 1.0


def flip(x: float) -> float:
    return -x if abs(x) > 0.05 else x + 0.25


def interleave(shaped: Array, H: int) -> Array:
    """Stored as (H, 3, D), so that a (3, H, D) reader mixes heads and q, k, v."""
    return shaped.transpose(0, 2, 1, 3)


def noise(w: Array) -> Array:
    rng = np.random.default_rng(3)
    return (rng.standard_normal(w.shape) * w.std()).astype(np.float32)


MUTANTS: dict[str, Mutant] = {
    "gelu_erf": Mutant(gelu(1, "erf"), "h.1.mlp.gelu", ("gelu_form",)),
    "gelu_sigmoid": Mutant(gelu(2, "sigmoid"), "h.2.mlp.gelu", ("gelu_form",)),
    "epsilon_ln_2": Mutant(epsilon("h.1.ln_2", 1e-2), "h.1.ln_2", ("epsilon_value",)),
    "epsilon_ln_1": Mutant(epsilon("h.0.ln_1", 1e-3), "h.0.ln_1", ("epsilon_value",)),
    "epsilon_ln_f": Mutant(epsilon("ln_f", 1e-1), "ln_f", ("epsilon_value",)),
    "epsilon_outside": Mutant(epsilon_outside("h.1.ln_1", 1e-2), "h.1.ln_1", ("epsilon_outside", "epsilon_value")),
    "ddof": Mutant(ddof("h.1.ln_2"), "h.1.ln_2", ("ddof",)),
    "scale_missing": Mutant(scale(1, 4.0), "h.1.attn.scores", ("scale",)),
    "scale_doubled": Mutant(scale(0, 0.25), "h.0.attn.scores", ("scale",)),
    "mask_value": Mutant(mask_value(1, -2.0), "h.1.attn.probs", ("mask_value",)),
    "mask_ahead_all": Mutant(mask_shift(None, 1), "h.0.attn.probs", ("mask_shift",)),
    "mask_ahead_one": Mutant(mask_shift(1, 1), "h.1.attn.probs", ("mask_shift",)),
    "mask_behind": Mutant(mask_shift(None, -1), "h.0.attn.probs", ("mask_shift",)),
    "qkv_graph_kqv": Mutant(qkv_order(1, (1, 0, 2)), "h.1.attn.q", ("qkv_order",)),
    "qkv_graph_qvk": Mutant(qkv_order(2, (0, 2, 1)), "h.2.attn.k", ("qkv_order",)),
    "qkv_weight_vqk": Mutant(on_c_attn(1, lambda w, H: w[:, [2, 0, 1]]), "h.1.attn.q", ("qkv_order",)),
    "interleaved": Mutant(on_c_attn(1, interleave), "h.1.attn.q", ("head_split",)),
    "transposed_c_proj": Mutant(edit("h.1.attn.c_proj.weight", np.transpose), "h.1.attn.out", ("transposed",)),
    "transposed_c_proj_0": Mutant(edit("h.0.attn.c_proj.weight", np.transpose), "h.0.attn.out", ("transposed",)),
    "swapped_heads_qkv": Mutant(on_c_attn(1, lambda w, H: swap(w, (0, 1, 2))), "h.1.attn.q", ("swapped_heads",)),
    "swapped_heads_q": Mutant(on_c_attn(1, lambda w, H: swap(w, (0,), 1, 3)), "h.1.attn.q", ("swapped_heads",)),
    "swapped_heads_v": Mutant(on_c_attn(0, lambda w, H: swap(w, (2,), 0, 3)), "h.0.attn.v", ("swapped_heads",)),
    "swapped_heads_c_proj": Mutant(swap_rows(1), "h.1.attn.out", ("swapped_heads",)),
    "element_c_fc": Mutant(
        edit("h.1.mlp.c_fc.weight", corrupt((17, 40), add_one)), "h.1.mlp.c_fc", ("corrupted_element",)
    ),
    "element_c_fc_flip": Mutant(
        edit("h.0.mlp.c_fc.weight", corrupt((5, 9), flip)), "h.0.mlp.c_fc", ("corrupted_element",)
    ),
    "element_mlp_proj": Mutant(
        edit("h.0.mlp.c_proj.weight", corrupt((100, 3), add_one)), "h.0.mlp.out", ("corrupted_element",)
    ),
    "element_attn_proj": Mutant(
        edit("h.1.attn.c_proj.weight", corrupt((7, 50), flip)), "h.1.attn.out", ("corrupted_element",)
    ),
    "element_q": Mutant(
        edit("h.1.attn.c_attn.weight", corrupt((3, 10), add_one)), "h.1.attn.q", ("corrupted_element",)
    ),
    "element_k": Mutant(
        edit("h.2.attn.c_attn.weight", corrupt((3, 70), add_one)), "h.2.attn.k", ("corrupted_element",)
    ),
    "element_v_huge": Mutant(
        edit("h.0.attn.c_attn.weight", corrupt((3, 140), lambda x: 1e3)), "h.0.attn.v", ("corrupted_element",)
    ),
    "element_c_fc_huge": Mutant(
        edit("h.1.mlp.c_fc.weight", corrupt((8, 11), lambda x: 300.0)), "h.1.mlp.c_fc", ("corrupted_element",)
    ),
    "element_ln": Mutant(edit("h.1.ln_2.weight", corrupt((9,), add_one)), "h.1.ln_2", ("corrupted_element",)),
    "element_ln_f": Mutant(edit("ln_f.bias", corrupt((9,), add_one)), "ln_f", ("corrupted_element",)),
    "element_bias": Mutant(edit("h.1.mlp.c_proj.bias", corrupt((9,), add_one)), "h.1.mlp.out", ("corrupted_element",)),
    "element_wpe": Mutant(edit("wpe.weight", corrupt((2, 9), add_one)), "embed", ("corrupted_element",)),
    "nan_c_fc": Mutant(
        edit("h.1.mlp.c_fc.weight", corrupt((8, 11), lambda x: np.nan)), "h.1.mlp.c_fc", ("nan_in_weight",)
    ),
    "nan_ln_f": Mutant(edit("ln_f.weight", corrupt((8,), lambda x: np.nan)), "ln_f", ("nan_in_weight",)),
    "nan_q": Mutant(
        edit("h.2.attn.c_attn.weight", corrupt((8, 5), lambda x: np.nan)), "h.2.attn.q", ("nan_in_weight",)
    ),
    "inf_bias": Mutant(
        edit("h.0.attn.c_proj.bias", corrupt((5,), lambda x: np.inf)), "h.0.attn.out", ("nan_in_weight",)
    ),
    "position_graph": Mutant(position_offset(1), "embed", ("position_offset",)),
    "position_rolled": Mutant(edit("wpe.weight", lambda w: np.roll(w, 1, axis=0)), "embed", ("position_offset",)),
    "bias_zero_c_fc": Mutant(edit("h.1.mlp.c_fc.bias", np.zeros_like), "h.1.mlp.c_fc", ("missing_bias",)),
    "bias_zero_c_proj": Mutant(edit("h.0.attn.c_proj.bias", np.zeros_like), "h.0.attn.out", ("missing_bias",)),
    "bias_zero_c_attn": Mutant(edit("h.1.attn.c_attn.bias", np.zeros_like), "h.1.attn.q", ("missing_bias",)),
    "bias_zero_ln": Mutant(edit("h.1.ln_2.bias", np.zeros_like), "h.1.ln_2", ("missing_bias",)),
    "bias_dropped": Mutant(drop_bias("h.2.mlp.c_fc.bias"), "h.2.mlp.c_fc", ("missing_bias",)),
    "layer_copied_c_proj": Mutant(
        copy_of("h.1.attn.c_proj.weight", "h.0.attn.c_proj.weight"), "h.1.attn.out", ("other_layer",)
    ),
    "layer_copied_ln": Mutant(copy_of("h.1.ln_2.weight", "h.2.ln_2.weight"), "h.1.ln_2", ("other_layer",)),
    "layer_rewired": Mutant(rewire("h.1.mlp.c_fc.weight", "h.2.mlp.c_fc.weight"), "h.1.mlp.c_fc", ("other_layer",)),
    "untied_head": Mutant(head_matrix(noise), "logits", ("untied_head",)),
    "untied_head_slightly": Mutant(head_matrix(lambda w: w + 0.01 * noise(w)), "logits", ("untied_head",)),
    "bf16_c_fc": Mutant(edit("h.1.mlp.c_fc.weight", bf16), "h.1.mlp.c_fc", ("rounding",)),
    "fp16_c_proj": Mutant(edit("h.1.attn.c_proj.weight", fp16), "h.1.attn.out", ("rounding",)),
    "bf16_q": Mutant(edit("h.0.attn.c_attn.weight", bf16), "h.0.attn.q", ("rounding",)),
    "fp16_activation": Mutant(
        cast_activation("h.1.mlp.c_fc.weight", onnx.TensorProto.FLOAT16), "h.1.mlp.c_fc", ("rounding",)
    ),
}
