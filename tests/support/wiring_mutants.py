"""Copies of a GPT-2 file whose wiring is another one: no weight is changed, some node reads or does something else.

`WIRINGS` maps a name to a Wiring: how to change the file, given the tensor of each tap; the taps that may be named as
the first to go wrong (where a graph shows two readings of one change, either); what the report must say of the cause.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import onnx
from onnx import helper

Proto = onnx.ModelProto
Names = dict[str, str]  # tap -> tensor


class Wiring(NamedTuple):
    change: Callable[[Proto, Names], None]
    places: tuple[str, ...]
    said: tuple[str, ...]  # a cause's name, or words of the report: either of them


def node_of(proto: Proto, tensor: str) -> onnx.NodeProto:
    return next(n for n in proto.graph.node if tensor in n.output)


def remake(tap: str, op: str, *reads: str) -> Callable[[Proto, Names], None]:
    """The node of a tap is another one, which reads these taps."""

    def change(proto: Proto, names: Names) -> None:
        node = node_of(proto, names[tap])
        node.CopyFrom(helper.make_node(op, [names[r] for r in reads], list(node.output)))

    return change


def reread(tap: str, instead: str) -> Callable[[Proto, Names], None]:
    """Who reads one tap reads another."""

    def change(proto: Proto, names: Names) -> None:
        for node in proto.graph.node:
            for i, name in enumerate(node.input):
                if name == names[tap]:
                    node.input[i] = names[instead]

    return change


def after(tap: str, op: str, *more: float, **attributes: float) -> Callable[[Proto, Names], None]:
    """One more node behind a tap, with these constants as further inputs; all that read the tap read what it makes."""

    def change(proto: Proto, names: Names) -> None:
        old, new = names[tap], f"{names[tap]}_after"
        for node in proto.graph.node:
            for i, name in enumerate(node.input):
                if name == old:
                    node.input[i] = new
        made = []
        for i, value in enumerate(more):
            tensor = helper.make_tensor(f"{new}_{i}", onnx.TensorProto.FLOAT, [], [value])
            made.append(helper.make_node("Constant", [], [f"{new}_{i}"], value=tensor))
        made.append(helper.make_node(op, [old, *(n.output[0] for n in made)], [new], **attributes))
        at = list(proto.graph.node).index(node_of(proto, old)) + 1
        for offset, node in enumerate(made):
            proto.graph.node.insert(at + offset, node)
        for output in proto.graph.output:  # the file's own outputs keep their names
            if output.name == old:
                node_of(proto, old).output[0] = f"{old}_before"
                made[-1].input[0], made[-1].output[0] = f"{old}_before", old

    return change


def narrowed(tap: str, to: int = onnx.TensorProto.FLOAT16) -> Callable[[Proto, Names], None]:
    def change(proto: Proto, names: Names) -> None:
        after(tap, "Cast", to=onnx.TensorProto.FLOAT)(proto, names)
        cast = node_of(proto, f"{names[tap]}_after")
        narrow = helper.make_node("Cast", list(cast.input), [f"{names[tap]}_16"], to=to)
        proto.graph.node.insert(list(proto.graph.node).index(cast), narrow)
        cast.input[0] = f"{names[tap]}_16"

    return change


def centring_lost(tap: str, stream: str) -> Callable[[Proto, Names], None]:
    """RMS norm: what is to be normalised keeps its mean."""

    def change(proto: Proto, names: Names) -> None:
        node = next(n for n in proto.graph.node if n.op_type == "Sub" and n.input[0] == names[stream])
        node.CopyFrom(helper.make_node("Identity", [names[stream]], list(node.output)))

    return change


RESIDUAL = ("missing_residual", "residual_twice", "branch_twice", "missing_branch", "other_input")
WIRINGS: dict[str, Wiring] = {
    "residual lost": Wiring(remake("h.1.resid_mid", "Identity", "h.1.attn.out"), ("h.1.resid_mid",), RESIDUAL),
    "residual lost after the MLP": Wiring(
        remake("h.0.resid_post", "Identity", "h.0.mlp.out"), ("h.0.resid_post",), RESIDUAL
    ),
    "attention not added": Wiring(remake("h.1.resid_mid", "Identity", "h.0.resid_post"), ("h.1.resid_mid",), RESIDUAL),
    "MLP not added": Wiring(remake("h.2.resid_post", "Identity", "h.2.resid_mid"), ("h.2.resid_post",), RESIDUAL),
    "branch doubled": Wiring(
        remake("h.1.resid_mid", "Add", "h.1.attn.out", "h.1.attn.out"), ("h.1.resid_mid",), RESIDUAL
    ),
    "stream doubled": Wiring(
        remake("h.1.resid_mid", "Add", "h.0.resid_post", "h.0.resid_post"), ("h.1.resid_mid",), RESIDUAL
    ),
    "residual taken off": Wiring(
        remake("h.1.resid_mid", "Sub", "h.0.resid_post", "h.1.attn.out"), ("h.1.resid_mid",), ("residual_sign",)
    ),
    "residual after the norm": Wiring(
        remake("h.1.resid_mid", "Add", "h.1.ln_1", "h.1.attn.out"), ("h.1.resid_mid",), ("other_input",)
    ),
    "MLP's residual after the norm": Wiring(
        remake("h.1.resid_post", "Add", "h.1.ln_2", "h.1.mlp.out"), ("h.1.resid_post",), ("other_input",)
    ),
    "MLP's residual before the attention": Wiring(
        remake("h.1.resid_post", "Add", "h.0.resid_post", "h.1.mlp.out"), ("h.1.resid_post",), ("other_input",)
    ),
    "residual from the embedding": Wiring(
        remake("h.1.resid_mid", "Add", "embed", "h.1.attn.out"), ("h.1.resid_mid",), ("other_input",)
    ),
    "ln_1 skipped": Wiring(
        reread("h.1.ln_1", "h.0.resid_post"), ("h.1.ln_1", "h.1.attn.q"), ("missing_norm", "other_input")
    ),
    "ln_2 skipped": Wiring(
        reread("h.1.ln_2", "h.1.resid_mid"), ("h.1.ln_2", "h.1.mlp.c_fc"), ("missing_norm", "other_input")
    ),
    "MLP reads ln_1": Wiring(reread("h.1.ln_2", "h.1.ln_1"), ("h.1.ln_2", "h.1.mlp.c_fc"), ("other_input",)),
    "MLP reads the attention": Wiring(
        reread("h.1.ln_2", "h.1.attn.out"), ("h.1.ln_2", "h.1.mlp.c_fc"), ("other_input",)
    ),
    "MLP beside the attention": Wiring(  # GPT-J's parallel blocks
        lambda proto, names: (
            reread("h.1.ln_2", "h.1.ln_1")(proto, names),
            remake("h.1.resid_mid", "Identity", "h.0.resid_post")(proto, names),
        )[0],
        ("h.1.resid_mid", "h.1.ln_2", "h.1.mlp.c_fc"),
        ("other_input", "missing_branch"),
    ),
    "RMS norm": Wiring(centring_lost("h.1.ln_2", "h.1.resid_mid"), ("h.1.ln_2",), ("no_centring",)),
    "RMS norm of ln_1": Wiring(centring_lost("h.1.ln_1", "h.0.resid_post"), ("h.1.ln_1",), ("no_centring",)),
    "layer dropped": Wiring(
        reread("h.1.resid_post", "h.0.resid_post"), ("h.1.ln_1", "h.2.ln_1", "h.1.attn.q"), ("the layer is dropped",)
    ),
    "first layer dropped": Wiring(
        reread("h.0.resid_post", "embed"), ("h.0.ln_1", "h.1.ln_1", "h.0.attn.q"), ("the layer is dropped",)
    ),
    "activation lost": Wiring(
        reread("h.1.mlp.gelu", "h.1.mlp.c_fc"), ("h.1.mlp.gelu",), ("gelu_form", "no activation")
    ),
    "attention halved": Wiring(
        after("h.1.attn.out", "Mul", 0.5), ("h.1.attn.out", "h.1.resid_mid"), ("factor", "residual_scale", "0.5")
    ),
    "MLP clipped": Wiring(
        after("h.1.mlp.out", "Clip", min=-0.2, max=0.2),
        ("h.1.mlp.out", "h.1.resid_post"),
        ("clipped", "with Clip besides"),
    ),
    "c_fc rounded to float16": Wiring(narrowed("h.1.mlp.c_fc"), ("h.1.mlp.c_fc", "h.1.mlp.gelu"), ("rounding",)),
    "attention rounded to float16": Wiring(narrowed("h.0.attn.out"), ("h.0.attn.out", "h.0.resid_mid"), ("rounding",)),
    "ReLU behind GELU": Wiring(
        after("h.1.mlp.gelu", "Relu"), ("h.1.mlp.gelu", "h.1.mlp.out"), ("clipped", "gelu_form")
    ),
    "tanh behind the stream": Wiring(
        after("h.1.resid_post", "Tanh"), ("h.1.resid_post", "h.2.ln_1"), ("with Tanh besides",)
    ),
    "probabilities doubled": Wiring(
        after("h.1.attn.probs", "Mul", 2.0), ("h.1.attn.probs", "h.1.attn.heads"), ("factor", "softmax_form")
    ),
    "softmax over another axis": Wiring(
        lambda proto, names: softmax_axis(proto, names["h.1.attn.probs"]), ("h.1.attn.probs",), ("softmax_form",)
    ),
}


def softmax_axis(proto: Proto, tensor: str) -> None:
    node = node_of(proto, tensor)
    assert node.op_type == "Softmax"
    scores, made = node.input[0], list(node.output)
    index = list(proto.graph.node).index(node)
    perm = [0, 1, 3, 2]
    new = [
        helper.make_node("Transpose", [scores], [f"{tensor}_t"], perm=perm),
        helper.make_node("Softmax", [f"{tensor}_t"], [f"{tensor}_s"], axis=3),
        helper.make_node("Transpose", [f"{tensor}_s"], made, perm=perm),
    ]
    proto.graph.node.remove(node)
    for offset, one in enumerate(new):
        proto.graph.node.insert(index + offset, one)


def rewired(proto: Proto, names: Names, wiring: Wiring) -> Proto:
    """A copy of the model with one change of wiring."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    wiring.change(copy, names)
    return copy
