"""InferenceSession: ONNX Runtime's calling convention, its answers, and clear errors before any work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from gpt2np.convert.writer import write_model
from gpt2np.errors import ContextOverflowError, InputError, TokenRangeError
from gpt2np.onnx.read.reader import open_model
from gpt2np.onnx.recognise import recognise
from gpt2np.session import InferenceSession
from runtime import DATA, DYNAMO_23, HALF, assert_close, feeds_for, runtime
from tiny import tiny_config, tiny_sources

ENGINES = ["numpy", "numba"]
EXACT = ["dynamo_20", DYNAMO_23, "fused_past", "old_past", "optimum_past", "q4"]


def padded(B: int, S: int, kind: str) -> np.ndarray:
    mask = np.ones((B, S), int)
    if kind == "left":
        mask[0, : S - 2] = 0  # further than the past: some new queries see no key
    elif kind == "right":
        mask[-1, -2:] = 0
    elif kind == "hole":
        mask[0, 1] = mask[-1, S // 2] = 0
    return mask


@pytest.fixture(scope="module")
def session() -> InferenceSession:
    return InferenceSession(DATA / "optimum_past.onnx", engine="numpy")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("zoo") / "model.onnx"
    config = tiny_config()
    write_model(path, config, tiny_sources(config))
    return path


def good_feeds(session: InferenceSession) -> dict[str, np.ndarray]:
    past = any(port.role.startswith("past") for port in session.model.recognised.inputs)
    return feeds_for(session.model.recognised, 2, 3, 4 if past else 0)


# ------------------------------------------------------------------------------------- agreement with ONNX Runtime
@pytest.mark.parametrize("name", EXACT)
def test_inputs_and_outputs_are_declared_as_by_onnx_runtime(name):
    ours, theirs = InferenceSession(DATA / f"{name}.onnx", engine="numpy"), runtime(DATA / f"{name}.onnx")
    assert [(a.name, a.type, a.shape) for a in ours.get_inputs()] == [
        (a.name, a.type, a.shape) for a in theirs.get_inputs()
    ]
    assert [(a.name, a.type) for a in ours.get_outputs()] == [(a.name, a.type) for a in theirs.get_outputs()]


@pytest.mark.parametrize("name", ["zoo", *EXACT])
def test_outputs_without_a_shape_and_outputs_listed_twice_are_those_of_onnx_runtime(name, zoo, tmp_path):
    proto = onnx.load(zoo if name == "zoo" else DATA / f"{name}.onnx")
    proto.graph.output.append(proto.graph.output[0])
    for output in proto.graph.output:
        output.type.tensor_type.ClearField("shape")
    onnx.save(proto, tmp_path / "model.onnx")
    ours, theirs = InferenceSession(tmp_path / "model.onnx", engine="numpy"), runtime(tmp_path / "model.onnx")
    feeds = good_feeds(ours)
    assert len(ours.get_outputs()) == len(proto.graph.output)
    for got, expected in zip(ours.run(None, feeds), theirs.run(None, feeds), strict=True):
        assert_close(got, expected, name)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", EXACT)
def test_outputs_agree_with_onnx_runtime(name, engine):
    path = DATA / f"{name}.onnx"
    ours, theirs = InferenceSession(path, engine=engine), runtime(path)
    roles = {port.role for port in ours.model.recognised.inputs}
    pasts = (0, 1, 5) if roles & {"past", "past_key"} else (0,)
    kinds = ("", "left", "right", "hole") if "attention_mask" in roles else ("",)
    for P in pasts:
        for kind in kinds:
            for B, T in ((1, 1), (2, 6)):
                feeds = feeds_for(ours.model.recognised, B, T, P, padded(B, P + T, kind) if P + T > 3 else None)
                names = [a.name for a in ours.get_outputs()]
                for output, got, expected in zip(names, ours.run(None, feeds), theirs.run(None, feeds), strict=True):
                    assert_close(got, expected, f"{output}, {P} cached, {T} new, padding {kind!r}")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_zoo_file_takes_and_gives_the_zoos_ranks(zoo, engine):
    ours, theirs = InferenceSession(zoo, engine=engine), runtime(zoo)
    for shape in ((1, 1, 8), (1, 3, 5), (2, 3, 4), (1, 1, 1), (1, 1, tiny_config().n_ctx)):
        feeds = {"input1": np.random.default_rng(1).integers(0, tiny_config().vocab_size, shape)}
        for got, expected in zip(ours.run(None, feeds), theirs.run(None, feeds), strict=True):
            assert_close(got, expected, str(shape))
        assert ours.run(["output1"], feeds)[0].shape[:-1] == shape


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "name", ["zoo_base", "zoo_lm_head", "optimum_past", "dynamo", "ort_fused", "q4", "external_data"]
)
def test_recorded_outputs_of_the_shared_fixtures(name, engine, fixtures):
    session = InferenceSession(fixtures / name, engine=engine)
    folders = sorted((fixtures / name).glob("test_data_set_*"))
    assert folders
    for folder in folders:
        feeds, expected = (
            {(t := onnx.load_tensor(p)).name: numpy_helper.to_array(t) for p in folder.glob(f"{kind}_*.pb")}
            for kind in ("input", "output")
        )
        for output, got in zip(expected, session.run(list(expected), feeds), strict=True):
            assert_close(got, expected[output], f"{folder.name} {output}")


# --------------------------------------------------------------------------------------------- rounding emulated
def test_int8_weights_are_exact_and_the_rounding_of_activations_is_the_difference():
    """With the rounding emulated the results agree; without, they are as far off as 8 bits are coarse."""
    path = DATA / "int8.onnx"
    exact, emulated, theirs = (
        InferenceSession(path, engine="numpy"),
        InferenceSession(path, engine="numpy", emulate_rounding=True),
        runtime(path),
    )
    feeds = feeds_for(exact.model.recognised, 2, 5, 3)
    expected = theirs.run(None, feeds)
    for output, got, e in zip(exact.get_outputs(), emulated.run(None, feeds), expected, strict=True):
        assert_close(got, e, output.name)
    difference = np.abs(exact.run(["logits"], feeds)[0] - expected[0]).max()
    assert 1e-4 < difference < 0.2 * np.abs(expected[0]).max()


def test_emulating_a_float_file_changes_nothing_but_the_last_bits():
    path = DATA / "old_past.onnx"
    plain, emulated = (InferenceSession(path, engine="numpy", emulate_rounding=e) for e in (False, True))
    feeds = feeds_for(plain.model.recognised, 2, 4, 3, padded(2, 7, "left"))
    for output, a, b in zip(plain.get_outputs(), plain.run(None, feeds), emulated.run(None, feeds), strict=True):
        assert_close(a, b, output.name)


# ------------------------------------------------------------------------------------------- further kinds of files
def positions_from_mask(model: onnx.ModelProto) -> None:
    """position_ids is no input any more, but counted in attention_mask, padding at 1: as generation code does."""
    graph = model.graph
    graph.input.remove(next(i for i in graph.input if i.name == "position_ids"))
    new = [
        helper.make_node("Constant", [], ["p1"], value_int=1),
        helper.make_node("Constant", [], ["p0"], value_int=0),
        helper.make_node("Constant", [], ["p_axis"], value_ints=[1]),
        helper.make_node("Constant", [], ["p_end"], value_ints=[2**31 - 1]),
        helper.make_node("CumSum", ["attention_mask", "p1"], ["p_count"]),
        helper.make_node("Sub", ["p_count", "p1"], ["p_index"]),
        helper.make_node("Equal", ["attention_mask", "p0"], ["p_padding"]),
        helper.make_node("Where", ["p_padding", "p1", "p_index"], ["p_all"]),
        helper.make_node("Shape", ["input_ids"], ["p_shape"]),
        helper.make_node("Gather", ["p_shape", "p_axis"], ["p_new"]),
        helper.make_node("Neg", ["p_new"], ["p_start"]),
        helper.make_node("Slice", ["p_all", "p_start", "p_end", "p_axis"], ["position_ids"]),
    ]
    old = [onnx.NodeProto.FromString(n.SerializeToString()) for n in graph.node]
    del graph.node[:]
    graph.node.extend(new + old)


@pytest.mark.parametrize("engine", ENGINES)
def test_positions_counted_in_the_mask(tmp_path, engine):
    model = onnx.load(DATA / "optimum_past.onnx")
    positions_from_mask(model)
    onnx.save(model, tmp_path / "model.onnx")
    ours, theirs = InferenceSession(tmp_path, engine=engine), runtime(tmp_path / "model.onnx")
    assert ours.model.recognised.positions == "mask, padding at 1"
    for kind in ("", "left", "hole"):
        feeds = feeds_for(ours.model.recognised, 2, 4, 3, padded(2, 7, kind))
        for got, expected in zip(ours.run(None, feeds), theirs.run(None, feeds), strict=True):
            assert_close(got, expected, kind)


def merged_decoder(path: Path) -> onnx.ModelProto:
    """One file with two branches over the same weights: with past inputs, and without."""
    with_past, without = onnx.load(path), onnx.load(path)
    graph = without.graph
    empty = np.zeros((1, 2, 0, 8), np.float32)
    shape_nodes = [
        helper.make_node("Constant", [], ["no_past"], value=numpy_helper.from_array(empty)),
        helper.make_node("Shape", ["input_ids"], ["b_shape"], start=0, end=1),
        helper.make_node("Constant", [], ["b_rest"], value_ints=[2, 0, 8]),
        helper.make_node("Concat", ["b_shape", "b_rest"], ["b_full"], axis=0),
        helper.make_node("Expand", ["no_past", "b_full"], ["nothing"]),
    ]
    for n in graph.node:
        n.input[:] = ["nothing" if i.startswith("past_key_values") else i for i in n.input]
    old = [onnx.NodeProto.FromString(n.SerializeToString()) for n in graph.node]
    del graph.node[:]
    graph.node.extend(shape_nodes + old)
    bodies = []
    for branch, prefix in ((with_past.graph, "with"), (graph, "without")):
        outputs = {o.name for o in branch.output}
        for n in branch.node:
            n.output[:] = [f"{prefix}.{o}" if o in outputs else o for o in n.output]
            n.input[:] = [f"{prefix}.{i}" if i in outputs else i for i in n.input]
        outs = [helper.make_empty_tensor_value_info(f"{prefix}.{o.name}") for o in branch.output]
        for out, original in zip(outs, branch.output, strict=True):
            out.type.CopyFrom(original.type)
        bodies.append(helper.make_graph(list(branch.node), prefix, [], outs))
    condition = helper.make_tensor_value_info("use_cache_branch", onnx.TensorProto.BOOL, [1])
    node = helper.make_node(
        "If", ["use_cache_branch"], [o.name for o in with_past.graph.output],
        then_branch=bodies[0], else_branch=bodies[1],
    )  # fmt: skip
    main = helper.make_graph(
        [node], "merged", [*with_past.graph.input, condition], list(with_past.graph.output),
        list(with_past.graph.initializer),
    )  # fmt: skip
    return helper.make_model(main, opset_imports=with_past.opset_import, ir_version=with_past.ir_version)


@pytest.mark.parametrize("engine", ENGINES)
def test_merged_decoders(tmp_path, engine):
    onnx.save(merged_decoder(DATA / "optimum_past.onnx"), tmp_path / "model.onnx")
    ours, theirs = InferenceSession(tmp_path, engine=engine), runtime(tmp_path / "model.onnx")
    found = ours.model.recognised
    assert next(p.role for p in found.inputs if p.name == "use_cache_branch") == "use_cache_branch"
    for P in (0, 4):
        feeds = feeds_for(found, 2, 3, P)
        for got, expected in zip(ours.run(None, feeds), theirs.run(None, feeds), strict=True):
            assert_close(got, expected, f"{P} cached")
    # the branch without a past does not look at the past that is fed
    feeds = feeds_for(found, 2, 3, 4)
    feeds["use_cache_branch"] = np.array([False])
    feeds["attention_mask"] = feeds["attention_mask"][:, 4:]
    for got, expected in zip(ours.run(None, feeds), theirs.run(None, feeds), strict=True):
        assert_close(got, expected, "past ignored")


@pytest.mark.parametrize("engine", ENGINES)
def test_logits_of_the_last_position_alone(tmp_path, engine):
    model = onnx.load(DATA / "dynamo_20.onnx")
    last = next(n for n in model.graph.node if "logits" in n.output)
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1]), "last"))
    at = list(model.graph.node).index(last)
    model.graph.node.insert(at, helper.make_node("Gather", [last.input[0], "last"], ["last_hidden"], axis=1))
    next(n for n in model.graph.node if "logits" in n.output).input[0] = "last_hidden"
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1
    onnx.save(model, tmp_path / "model.onnx")
    ours, theirs = InferenceSession(tmp_path, engine=engine), runtime(tmp_path / "model.onnx")
    feeds = feeds_for(ours.model.recognised, 2, 5)
    assert_close(ours.run(None, feeds)[0], theirs.run(None, feeds)[0], "logits")


@HALF
def test_float16_inputs_and_outputs(tmp_path):
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = onnx.load(DATA / "optimum_past.onnx")
    onnx.save(convert_float_to_float16(model), tmp_path / "model.onnx")
    ours, theirs = InferenceSession(tmp_path, engine="numpy"), runtime(tmp_path / "model.onnx")
    assert {a.type for a in ours.get_outputs()} == {"tensor(float16)"}
    feeds = feeds_for(ours.model.recognised, 2, 4, 3)
    assert feeds["past_key_values.0.key"].dtype == np.float16
    for output, got, expected in zip(ours.get_outputs(), ours.run(None, feeds), theirs.run(None, feeds), strict=True):
        assert_close(got, expected, output.name, rtol=0, atol=8 * float(np.finfo(np.float16).eps))


# --------------------------------------------------------------------------------------------- the contract of `run`
def test_outputs_come_in_the_order_asked_for(session):
    feeds = good_feeds(session)
    everything = session.run(None, feeds)
    names = [a.name for a in session.get_outputs()]
    assert len(session.run([], feeds)) == len(names)
    for wanted in (["present.1.value", "logits"], ["logits", "logits"], names[::-1]):
        for name, value in zip(wanted, session.run(wanted, feeds), strict=True):
            assert np.array_equal(value, everything[names.index(name)]), name


def test_results_are_the_callers_own(session):
    feeds = good_feeds(session)
    before = {k: v.copy() for k, v in feeds.items()}
    first = session.run(None, feeds)
    kept = [a.copy() for a in first]
    for array in first:
        array[...] = 7
    for a, b in zip(session.run(None, feeds), kept, strict=True):
        assert np.array_equal(a, b)
    for name, value in feeds.items():
        assert np.array_equal(value, before[name]), name


def test_lists_are_taken_like_arrays(zoo):
    session = InferenceSession(zoo, engine="numpy")
    a = session.run(["output1"], {"input1": [[[1, 2, 3]]]})[0]
    assert np.array_equal(a, session.run(["output1"], {"input1": np.array([[[1, 2, 3]]])})[0])


def changed(name: str, value: object):
    def change(feeds: dict[str, np.ndarray]) -> None:
        feeds[name] = value(feeds[name]) if callable(value) else value

    return change


ERRORS = [
    (lambda f: f.pop("attention_mask"), InputError, r"missing: attention_mask"),
    (changed("token_type_ids", np.zeros((2, 3))), InputError, r"unknown: token_type_ids.*inputs are input_ids"),
    (
        changed("input_ids", lambda a: a.astype(np.int32)),
        InputError,
        r"'input_ids': got int32 \[2, 3\], expected int64",
    ),
    (changed("input_ids", lambda a: a[None]), InputError, r"'input_ids': got int64 \[1, 2, 3\]"),
    (changed("input_ids", lambda a: a[:, :0]), InputError, r"at least one token"),
    (changed("input_ids", lambda a: a[:0]), InputError, r"at least one token"),
    (changed("input_ids", lambda a: a + 60), TokenRangeError, r"outside 0\.\.63"),
    (changed("input_ids", lambda a: a - 100), TokenRangeError, r"token id -\d+"),
    (changed("attention_mask", lambda a: a[:, 1:]), InputError, r"attention_mask.*\(2, 6\), expected \(2, 7\)"),
    (changed("position_ids", lambda a: a + 50), ContextOverflowError, r"positions"),
    (changed("position_ids", lambda a: a - 50), ContextOverflowError, r"positions"),
    (
        changed("past_key_values.1.value", lambda a: a[:, :, 1:]),
        InputError,
        r"past_key_values\.1\.value.*\(2, 2, 4, 8\)",
    ),
    (changed("past_key_values.0.key", lambda a: a[:, :1]), InputError, r"past_key_values\.0\.key.*2"),
    (changed("past_key_values.0.key", lambda a: a[:1]), InputError, r"past_key_values\.0\.key.*\(2, 2, 4, 8\)"),
    (changed("past_key_values.0.key", lambda a: a.astype(np.float64)), InputError, r"float64.*expected float32"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=lambda v: v if isinstance(v, str) else "")
def test_wrong_inputs_are_errors_that_say_what_was_given(session, monkeypatch, change, error, message):
    monkeypatch.setattr("gpt2np.reference.transformer", lambda *a: pytest.fail("work was done"))
    feeds = good_feeds(session)
    change(feeds)
    with pytest.raises(error, match=message):
        session.run(None, feeds)


def test_too_long_a_sequence_is_an_error(session, monkeypatch):
    monkeypatch.setattr("gpt2np.reference.transformer", lambda *a: pytest.fail("work was done"))
    for T, P in ((17, 0), (9, 8), (1, 16)):
        with pytest.raises(ContextOverflowError, match="16"):
            session.run(None, feeds_for(session.model.recognised, 1, T, P))


def test_an_unknown_output_is_an_error(session):
    with pytest.raises(InputError, match=r"no output 'hidden'.*logits"):
        session.run(["hidden"], good_feeds(session))


def test_full_length_is_no_error(session):
    assert session.run(["logits"], feeds_for(session.model.recognised, 1, 8, 8))[0].shape == (1, 8, 64)


def test_a_folder_is_a_path_too(tmp_path):
    (tmp_path / "model.onnx").write_bytes((DATA / "dynamo_20.onnx").read_bytes())
    assert InferenceSession(tmp_path, engine="numpy").get_inputs()[0].name == "input_ids"
    assert recognise(open_model(tmp_path)).config.n_layer == 2


# -------------------------------------------------------------------------------------- what clients of onnxruntime use
def test_the_signature_is_onnxruntimes(tmp_path):
    """Bytes, options, providers and run options, each where onnxruntime takes it."""
    path = DATA / "optimum_past.onnx"
    options = onnxruntime.SessionOptions()
    sessions = [
        InferenceSession(path, options, ["CPUExecutionProvider"], engine="numpy"),
        InferenceSession(str(path), providers=[("CUDAExecutionProvider", {"device_id": 0}), "CPUExecutionProvider"]),
        InferenceSession(path.read_bytes(), sess_options=options, providers=None, provider_options=None),
    ]
    theirs = runtime(path)
    feeds = feeds_for(sessions[0].model.recognised, 2, 3, 2)
    for session in sessions:
        assert session.get_providers() == theirs.get_providers()
        assert set(session.get_provider_options()) == set(theirs.get_provider_options())
        for got, expected in zip(
            session.run(["logits"], feeds, onnxruntime.RunOptions()), theirs.run(["logits"], feeds), strict=True
        ):
            assert_close(got, expected, "logits")
    assert sessions[0].get_session_options() is options


def test_a_session_of_bytes_leaves_no_file_behind():
    import gc

    session = InferenceSession((DATA / "dynamo_20.onnx").read_bytes(), engine="numpy")
    folder = session.model.path.parent
    assert folder.is_dir()
    del session
    gc.collect()
    assert not folder.exists()


@pytest.mark.parametrize("given", [["cpu"], [3], [("CPUExecutionProvider",), None], [()]])
def test_providers_that_are_none_are_an_error(given):
    with pytest.raises(InputError, match="providers must be names"):
        InferenceSession(DATA / "dynamo_20.onnx", None, given)


@pytest.mark.parametrize("name", ["optimum_past", "dynamo_20", "old_past"])
def test_what_a_file_says_about_itself(tmp_path, name):
    model = onnx.load(DATA / f"{name}.onnx")
    model.doc_string, model.domain, model.model_version = "described", "org.example", 7
    helper.set_model_props(model, {"made by": "a test"})
    onnx.save(model, tmp_path / "model.onnx")
    ours, theirs = InferenceSession(tmp_path, engine="numpy").get_modelmeta(), runtime(tmp_path / "model.onnx")
    for field in ("custom_metadata_map", "description", "domain", "graph_name", "graph_description", "producer_name"):
        assert getattr(ours, field) == getattr(theirs.get_modelmeta(), field), field
    assert ours.version == theirs.get_modelmeta().version == 7


def test_a_float64_file_is_computed_in_float64(tmp_path):
    """Results agree with ONNX Runtime's to float64's last digits."""
    model = onnx.load(DATA / "old_past.onnx")
    wide, single = onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT
    constants = [a.t for n in model.graph.node for a in n.attribute if a.name == "value"]
    exact = {np.float32(x): x for x in (0.044715, (2 / np.pi) ** 0.5, 1e-5, 8**0.5, 8**-0.5)}  # not rounded to float32
    for tensor in [*model.graph.initializer, *constants]:
        if tensor.data_type == single:
            value = numpy_helper.to_array(tensor)
            wider = np.array(exact.get(value.item(), value)) if value.size == 1 else value.astype(np.float64)
            tensor.CopyFrom(numpy_helper.from_array(wider.astype(np.float64).reshape(value.shape), tensor.name))
    for port in [*model.graph.input, *model.graph.output]:
        if port.type.tensor_type.elem_type == single:
            port.type.tensor_type.elem_type = wide
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == single:
                attribute.i = wide
    del model.graph.value_info[:]
    onnx.save(model, tmp_path / "model.onnx")
    session, theirs = InferenceSession(tmp_path), runtime(tmp_path / "model.onnx")
    assert session.model.dtype == np.float64
    assert session.get_outputs()[0].type == "tensor(double)"
    feeds = feeds_for(session.model.recognised, 2, 4, 3, padded(2, 7, "left"))
    for port, got, expected in zip(
        session.get_outputs(), session.run(None, feeds), theirs.run(None, feeds), strict=True
    ):
        assert_close(got, expected, port.name, rtol=1e-11, atol=1e-12)
    assert InferenceSession(tmp_path, dtype="float32", engine="numpy").model.dtype == np.float32
