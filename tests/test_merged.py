"""A merged decoder holds one model twice, with a past and without: what differs between its branches is refused."""

import onnx
import pytest
from test_session import merged_decoder

from gpt2np.errors import UnsupportedModelError
from gpt2np.session import InferenceSession
from runtime import DATA


def swapped_presents(body):
    names = [o.name for o in body.output]
    key, value = (next(n for n in names if f"present.0.{what}" in n) for what in ("key", "value"))
    for node in body.node:
        node.output[:] = [{key: value, value: key}.get(o, o) for o in node.output]


def another_epsilon(body):
    node = next(n for n in body.node if n.op_type == "LayerNormalization")
    next(a for a in node.attribute if a.name == "epsilon").f = 1e-3


def swapped_weights(body):
    """c_fc of the first layer and that of the second."""
    first, second = (f"transformer.h.{i}.mlp.c_fc.weight" for i in (0, 1))
    for node in body.node:
        node.input[:] = [{first: second, second: first}.get(i, i) for i in node.input]


@pytest.mark.parametrize("change", [swapped_presents, another_epsilon, swapped_weights])
@pytest.mark.parametrize("branch", ["then_branch", "else_branch"])
def test_branches_of_a_merged_decoder_are_one_model(tmp_path, change, branch):
    model = merged_decoder(DATA / "optimum_past.onnx")
    (node,) = model.graph.node
    body = next(a.g for a in node.attribute if a.name == branch)
    before = body.SerializeToString()
    change(body)
    assert body.SerializeToString() != before
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(UnsupportedModelError, match="two different models"):
        InferenceSession(tmp_path / "model.onnx")
