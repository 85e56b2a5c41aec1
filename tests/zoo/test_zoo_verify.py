"""`gpt2np verify`: it must believe the right file and no other. Facts are made for tiny models in float64."""

from __future__ import annotations

import copy
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import typer
from typer.testing import CliRunner

import gpt2np
from gpt2np import zoo
from gpt2np.commands.convert import convert
from gpt2np.commands.fetch import fetch as fetch_command
from gpt2np.commands.verify import verify as verify_command
from gpt2np.config import GPT2Config
from gpt2np.convert.writer import write_model
from gpt2np.errors import ModelFileError
from gpt2np.model import GPT2
from gpt2np.onnx.read.reader import open_model
from gpt2np.onnx.recognise import recognise
from gpt2np.parity.parties import Ours
from gpt2np.parity.subject import Subject
from gpt2np.zoo import manifest
from gpt2np.zoo.facts import Facts, load_facts
from gpt2np.zoo.manifest import file_hash
from gpt2np.zoo.verify import (
    Finding,
    check_fact,
    check_file,
    check_fingerprints,
    check_search,
    check_tokenizer,
    fingerprint,
    verdict,
    verify,
)
from records import validate
from runtime import runtime
from search_files import loop_file
from tiny import tiny_config, tiny_sources

CONFIG = tiny_config()
SOURCES = tiny_sources(CONFIG)
IDS = [3, 1, 4, 1, 5, 9]


def make_facts(config: GPT2Config, sources: Any, *files: Path, exact: bool = True) -> dict[str, Any]:
    """Facts of every kind, computed by the float64 textbook."""
    oracle = GPT2(config, sources, "numpy", "float64")
    out = oracle([IDS])
    assert out.logits is not None
    last, hidden = out.logits[0, -1], out.last_hidden_state[0, -1]
    top = [int(i) for i in np.argsort(-last)[:5]]
    log_p = out.logits[0] - np.log(np.exp(out.logits[0]).sum(-1, keepdims=True))
    following: list[int] = []
    for _ in range(7):
        logits = oracle([IDS + following]).logits
        assert logits is not None
        following.append(int(logits[0, -1].argmax()))
    fingerprints = {name: fingerprint(source.load()) for name, source in sources.items()}
    for values in fingerprints.values():
        if not exact:
            del values["sha256"]
    fields = ("n_layer", "n_head", "n_embd", "n_ctx", "vocab_size", "n_inner", "layer_norm_epsilon", "activation")
    return {
        "model": "the tiny GPT-2",
        "config": {field: getattr(config, field) for field in fields},
        "parameters": sum(source.load().size for source in sources.values()),
        "files": [{"name": file.name, "bytes": file.stat().st_size, "sha256": file_hash(file)} for file in files],
        "weights": {
            "source": "float64",
            "tied": True,
            "l2": {"rtol": 1e-6, "atol": 0},
            "max_abs": {"rtol": 1e-6, "atol": 0},
            "first": {"rtol": 1e-6, "atol": 0},
            "fingerprints": fingerprints,
        },
        "facts": [
            {"kind": "logits", "ids": IDS, "tokens": top, "values": list(last[top]), "top": True, "atol": 1e-4},
            {"kind": "logits", "ids": IDS, "tokens": [0, 1], "values": list(last[:2]), "rtol": 1e-4, "prompt": "words"},
            {"kind": "hidden", "ids": IDS, "values": list(hidden[:8]), "mean_abs": 1e-4}
            | {"l2": float(np.linalg.norm(hidden)), "l2_atol": 1e-3},
            {"kind": "cross_entropy", "ids": IDS, "atol": 1e-4}
            | {"value": float(-log_p[range(len(IDS) - 1), IDS[1:]].mean())},
            {"kind": "greedy", "ids": IDS, "next": following, "atol": 1e-4},
        ],
    }


def with_source(raw: dict[str, Any]) -> dict[str, Any]:
    for fact in raw["facts"]:
        fact["source"] = "float64"
    return raw


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model.onnx", CONFIG, SOURCES, lm_head=True)[0]


def save_facts(raw: dict[str, Any], folder: Path) -> Path:
    path = folder / "facts.json"
    path.write_text(json.dumps({"models": [with_source(raw)]}))
    return path


def run(path: Path, raw: dict[str, Any], tmp_path: Path, **arguments: Any) -> tuple[dict[str, list[Finding]], str]:
    """The checks by group, and the verdict."""
    facts = load_facts(save_facts(raw, tmp_path))
    checks = list(verify(path, facts, facts[0].files, engine="numpy", **arguments))
    groups: dict[str, list[Finding]] = {}
    for check in checks:
        groups.setdefault(check.group, []).append(check)
    return groups, verdict(checks)


def results(checks: list[Finding]) -> set[str]:
    return {check.result for check in checks}


def test_the_right_file_passes_everything(model: Path, tmp_path: Path) -> None:
    groups, words = run(model, make_facts(CONFIG, SOURCES, model), tmp_path)
    assert {group: results(checks) for group, checks in groups.items()} == {
        "file": {"pass"},
        "config": {"pass"},
        "weights": {"pass"},
        "facts": {"pass", "skip"},
        "sample data": {"skip"},
        "ONNX Runtime": {"pass"},
    }
    assert [(check.what, check.result) for check in groups["facts"] if check.result != "pass"] == [
        ("tokenizer", "skip")
    ]
    assert len(groups["facts"]) == 6
    assert "the published file bit by bit" in words


def test_another_export_of_the_right_weights_passes(model: Path, tmp_path: Path) -> None:
    facts = make_facts(CONFIG, SOURCES, model)
    other = write_model(tmp_path / "other.onnx", CONFIG, SOURCES, opset=17, lm_head=True, with_past=True)[0]
    groups, words = run(other, facts, tmp_path)
    assert results(groups["file"]) == {"skip"}
    assert results(groups["weights"]) == results(groups["ONNX Runtime"]) == {"pass"}
    assert "FAIL" not in results(groups["facts"])
    assert f"{len(SOURCES)} were compared byte by byte" in groups["weights"][0].found
    assert "has the weights of the tiny GPT-2" in words


def changed_by_one_bit(path: Path, name: str) -> None:
    """Flip the lowest mantissa bit of one element of one initializer, in place."""
    proto = onnx.load(str(path))
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    payload = tensor.raw_data
    data = path.read_bytes()
    start = data.index(payload) + len(payload) // 8 * 4  # an element in the middle
    path.write_bytes(data[:start] + bytes([data[start] ^ 1]) + data[start + 1 :])


def initializers(path: Path) -> list[str]:
    return [t.name for t in onnx.load(str(path)).graph.initializer if t.data_type == onnx.TensorProto.FLOAT]


def test_one_changed_element_is_caught_whichever_it_is(tmp_path: Path) -> None:
    """In the published file by its SHA-256; in a file of unknown hash by the weight's own."""
    original = write_model(tmp_path / "original.onnx", CONFIG, SOURCES, opset=17, lm_head=True)[0]
    facts = make_facts(CONFIG, SOURCES, original)
    path = tmp_path / "model.onnx"
    weights = [name for name in initializers(original) if onnx_size(original, name) >= 12]
    assert len(weights) >= len(SOURCES)
    (parsed,) = load_facts(save_facts(facts, tmp_path))
    for name in weights:
        path.write_bytes(original.read_bytes())
        changed_by_one_bit(path, name)
        whole = check_file(path, parsed.files)
        assert whole.result == "FAIL", name
        assert "altered" in whole.found
        checks = list(check_fingerprints(recognise(open_model(path)), parsed))
        assert "FAIL" in results(checks), name
        assert any(check.found.endswith("its bytes differ from the published ones") for check in checks[:1]), name
    _, words = run(path, facts, tmp_path)
    assert words == "This is the tiny GPT-2 altered: the file is not the published one."
    groups, words = run(path, {**facts, "files": []}, tmp_path)
    assert results(groups["file"]) == {"skip"}
    assert "is not the tiny GPT-2, by its weights" in words


def onnx_size(path: Path, name: str) -> int:
    return next(int(np.prod(t.dims)) for t in onnx.load(str(path)).graph.initializer if t.name == name)


def test_published_figures_alone_catch_a_changed_element_that_matters(tmp_path: Path) -> None:
    facts = make_facts(CONFIG, SOURCES, exact=False)
    for element, change in ((0, 0.01), (100, 0.5)):
        sources = tiny_sources(CONFIG)
        weight = sources["h.1.mlp.c_fc.weight"].array.copy()
        weight.flat[element] += change
        sources["h.1.mlp.c_fc.weight"] = replace(sources["h.1.mlp.c_fc.weight"], array=weight)
        path = write_model(tmp_path / "model.onnx", CONFIG, sources, lm_head=True)[0]
        groups, _ = run(path, facts, tmp_path)
        found = [check.found for check in groups["weights"] if check.result == "FAIL"]
        assert found[0].startswith("h.1.mlp.c_fc.weight: l2 is ")
        assert f"{len(SOURCES) - 1} of {len(SOURCES)} match" in found[-1]
        assert "FAIL" in results(groups["facts"])


def save_checkpoint(folder: Path, config: GPT2Config, weights: dict[str, np.ndarray]) -> Path:
    """model.safetensors and config.json in Hugging Face's form."""
    header, blobs, at = {}, [], 0
    for name, weight in weights.items():
        header[name] = {"dtype": "F32", "shape": weight.shape, "data_offsets": [at, at + weight.nbytes]}
        at += weight.nbytes
        blobs.append(weight.tobytes())
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))
    settings = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd, "n_inner": config.n_inner}
    settings |= {"n_positions": config.n_ctx, "vocab_size": config.vocab_size, "model_type": "gpt2"}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder / "model.safetensors"


def test_a_checkpoint_proves_every_weight_bit_by_bit(model: Path, tmp_path: Path) -> None:
    facts = make_facts(CONFIG, SOURCES, exact=False)
    weights = {name: source.load() for name, source in SOURCES.items()}
    checkpoint = save_checkpoint(tmp_path, CONFIG, weights)
    groups, _ = run(model, facts, tmp_path, checkpoint=checkpoint)
    assert results(groups["weights"]) == {"pass"}
    assert any(check.found == f"all {len(SOURCES)} weights are those of the checkpoint" for check in groups["weights"])

    weights["h.1.ln_2.bias"].view(np.int32)[3] ^= 1
    groups, _ = run(model, facts, tmp_path, checkpoint=save_checkpoint(tmp_path, CONFIG, weights))
    assert [check.found for check in groups["weights"] if check.result == "FAIL"] == ["h.1.ln_2.bias differ"]


def test_a_verified_checkpoint_is_found_beside_the_model(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert zoo.verified_checkpoint(model) is None
    path = save_checkpoint(tmp_path, CONFIG, {name: source.load() for name, source in SOURCES.items()})
    assert zoo.verified_checkpoint(tmp_path) is None  # no published one
    file = zoo.RemoteFile(path.name, path.name, path.stat().st_size, file_hash(path), ())
    monkeypatch.setattr(manifest, "entries", lambda: {"tiny": zoo.Entry("tiny", "", "", (file,), (), None, True)})
    assert zoo.verified_checkpoint(model) == path


def test_an_untied_head_must_equal_wte(tmp_path: Path) -> None:
    untied = replace(CONFIG, tied=False)
    facts = make_facts(CONFIG, SOURCES)
    for change in (0.0, 0.001):
        sources: dict[str, Any] = dict(SOURCES)
        sources["lm_head.weight"] = SOURCES["wte.weight"].array.copy()
        sources["lm_head.weight"][5, 5] += change
        path = write_model(tmp_path / "model.onnx", untied, sources, lm_head=True)[0]
        groups, _ = run(path, facts, tmp_path)
        assert ("FAIL" in results(groups["weights"])) == (change != 0)


# --- facts: each kind can fail -------------------------------------------------------------------------------

MODEL = GPT2(CONFIG, SOURCES, "numpy")
KINDS = ("top logits", "logits", "hidden", "cross_entropy", "greedy")


def fact(kind: str) -> dict[str, Any]:
    return copy.deepcopy(with_source(make_facts(CONFIG, SOURCES))["facts"][KINDS.index(kind)])


@pytest.mark.parametrize("kind", KINDS)
def test_a_fact_holds(kind: str) -> None:
    check = check_fact(MODEL, fact(kind))
    assert check.result == "pass", check
    assert check.source == "float64"


@pytest.mark.parametrize("kind", KINDS)
def test_a_fact_fails_for_other_weights(kind: str) -> None:
    other = GPT2(CONFIG, tiny_sources(CONFIG, seed=1), "numpy")
    assert check_fact(other, fact(kind)).result == "FAIL"


def test_a_beam_search_is_checked_by_the_search_that_a_file_holds(tmp_path: Path) -> None:
    path = loop_file(tmp_path / "model.onnx")
    ours = Ours(Subject(path), "numpy")
    feeds = {"input_ids": np.array([IDS[:3]]), "attention_mask": np.ones((1, 3), np.float32), "new_tokens": np.array(4)}
    first = runtime(path).run(None, feeds)[0][0].tolist()
    known = {"kind": "beam_search", "ids": IDS[:3], "width": 4, "new_tokens": 4, "first": first, "source": "recorded"}
    assert check_search(ours, known).result == "pass"
    assert check_search(ours, {**known, "first": [*first[:-1], first[-1] + 1]}).result == "FAIL"
    assert check_search(ours, {**known, "width": 5}).result == "skip"


def test_a_value_just_beyond_the_tolerance_fails() -> None:
    for kind, key, step in (
        ("top logits", "values", 1.5e-4),
        ("hidden", "values", 1.5e-3),
        ("hidden", "l2", 1.5e-3),
        ("cross_entropy", "value", 1.5e-4),
    ):
        for sign, result in ((0, "pass"), (1, "FAIL"), (-1, "FAIL")):
            wrong = fact(kind)
            if key == "values":
                wrong[key][0] += sign * step
            else:
                wrong[key] += sign * step
            assert check_fact(MODEL, wrong).result == result, (kind, key, sign)


def test_a_missing_top_token_fails() -> None:
    wrong = fact("top logits")
    del wrong["tokens"][0], wrong["values"][0]
    check = check_fact(MODEL, wrong)
    assert check.result == "FAIL"
    assert "another token is above" in check.found


def test_another_greedy_token_fails_unless_it_is_a_tie() -> None:
    right = fact("greedy")
    logits = MODEL([IDS]).logits
    assert logits is not None
    second = int(np.argsort(-logits[0, -1])[1])
    gap = float(np.sort(logits[0, -1])[-1] - logits[0, -1, second])
    wrong = {**right, "next": [second]}
    assert check_fact(MODEL, wrong).result == "FAIL"
    check = check_fact(MODEL, {**wrong, "atol": gap})
    assert check.result == "pass"
    assert check.found.startswith("0 of 1 tokens; another is more likely")


def test_a_token_outside_the_vocabulary_is_a_failure_not_a_crash() -> None:
    assert check_fact(MODEL, {**fact("logits"), "ids": [1000]}).result == "FAIL"


def test_a_tokenizer_that_cuts_otherwise_is_found_out(mini: Path) -> None:
    loaded = gpt2np.load(mini, engine="numpy")
    tokenizer = loaded.tokenizer
    assert tokenizer is not None
    ids = gpt2np.tokenizer.encode(tokenizer, "Once upon a time")
    right = Facts("m", {}, None, (), {}, ({"prompt": "Once upon a time", "ids": ids, "source": "mini"},))
    assert check_tokenizer(loaded, right).result == "pass"
    wrong = Facts("m", {}, None, (), {}, ({"prompt": "Once upon a time", "ids": ids[::-1], "source": "mini"},))
    assert check_tokenizer(loaded, wrong).result == "FAIL"


# --- facts with text ---------------------------------------------------------------------------------------


def test_a_greedy_text_needs_a_tokenizer(model: Path) -> None:
    loaded = gpt2np.load(model, engine="numpy")
    check = check_fact(loaded, {"kind": "greedy", "ids": IDS, "text": "abc", "atol": 0.1, "source": ""})
    assert check.result == "skip"
    assert "gpt2np fetch tokenizer" in check.found


def test_a_greedy_text(model: Path) -> None:
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJK"
    (model.parent / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    (model.parent / "merges.txt").write_text("#version: 0.2\n")
    loaded = gpt2np.load(model, engine="numpy")
    text = "".join(letters[i] for i in fact("greedy")["next"])
    right = {"kind": "greedy", "ids": IDS, "text": text, "atol": 0, "source": ""}
    assert check_fact(loaded, right).result == "pass"
    for wrong in (text[:-1] + "?", "?" + text[1:], text + "?" * 100):
        check = check_fact(loaded, {**right, "text": wrong})
        assert check.result == "FAIL"
        assert "characters, published" in check.found


# --- other files ---------------------------------------------------------------------------------------------


def test_another_gpt2_is_told_what_differs(model: Path, tmp_path: Path) -> None:
    checks = list(verify(model, load_facts(), zoo.known_files(), engine="numpy"))
    words = " | ".join(check.found for check in checks if check.result == "FAIL")
    assert "n_layer is 2, that of GPT-2 124M 12" in words
    assert "wpe.weight has shape (20, 12), expected (1024, 768)" in words
    assert "0 of 23 match" in words
    assert [check.result for check in checks if check.group == "facts"] == ["skip"]
    assert {check.result for check in checks if check.group == "ONNX Runtime"} == {"pass"}
    sentence = verdict(checks)
    assert sentence.startswith("This is not GPT-2 124M, by its config and weights. gpt2np computes what ONNX Runtime")


def test_another_activation_is_another_model(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.onnx", replace(CONFIG, activation="relu"), SOURCES, opset=17, lm_head=True)[0]
    groups, words = run(path, make_facts(CONFIG, SOURCES), tmp_path)
    assert [check.found for check in groups["config"]] == ["activation is relu, that of the tiny GPT-2 gelu_tanh"]
    assert results(groups["weights"]) == {"pass"}
    assert "by its config." in words


def test_another_number_of_parameters_is_another_model(model: Path, tmp_path: Path) -> None:
    facts = make_facts(CONFIG, SOURCES)
    groups, _ = run(model, {**facts, "parameters": facts["parameters"] + 1}, tmp_path)
    assert [check.result for check in groups["config"]] == ["FAIL"]
    assert "parameters" in groups["config"][0].found


def test_a_graph_that_is_no_gpt2(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    values = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1]) for n in "xy"]
    proto = onnx.helper.make_model(onnx.helper.make_graph([node], "g", values[:1], values[1:]))
    onnx.save(proto, str(tmp_path / "model.onnx"))
    groups, words = run(tmp_path / "model.onnx", make_facts(CONFIG, SOURCES), tmp_path)
    assert results(groups["graph"]) == {"FAIL"}
    assert "facts" not in groups
    assert words == "This is not a GPT-2 that gpt2np knows, and so not the tiny GPT-2."


def test_sample_data_that_does_not_agree(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "with data"
    convert(model, folder)

    def outcome() -> list[Finding]:
        return [check for check in verify(folder, load_facts(), engine="numpy") if check.group == "sample data"]

    assert len(outcome()) == 4
    assert results(outcome()) == {"pass"}
    output = folder / "test_data_set_1" / "output_0.pb"
    tensor = onnx.TensorProto.FromString(output.read_bytes())
    values = onnx.numpy_helper.to_array(tensor).copy()
    values.flat[7] += 0.01
    output.write_bytes(onnx.numpy_helper.from_array(values, tensor.name).SerializeToString())
    assert [check.result for check in outcome()] == ["pass", "FAIL", "pass", "pass"]
    assert "1 values beyond the tolerance" in outcome()[1].found
    (folder / "test_data_set_1" / "output_2.pb").unlink()
    assert outcome()[1].found == "outputs ['output1', 'output2', 'output3'], expected ['output1', 'output2']"
    output.unlink()
    with pytest.raises(ModelFileError, match="not numbered"):
        outcome()


def test_the_embedded_model_is_not_gpt2_but_passes_facts_about_itself(mini: Path, tmp_path: Path) -> None:
    found = recognise(open_model(mini))
    facts = make_facts(found.config, found.sources, mini / "model.onnx")
    tokenizer = gpt2np.tokenizer.load(mini)
    for one, prompt in zip(facts["facts"], ("Once upon a time", "<|endoftext|>"), strict=False):
        one |= {"prompt": prompt, "ids": gpt2np.tokenizer.encode(tokenizer, prompt)}
    oracle = GPT2(found.config, found.sources, "numpy", "float64")
    for one in facts["facts"][:2]:
        logits = oracle([one["ids"]]).logits
        assert logits is not None
        one["tokens"] = [int(logits[0, -1].argmax())]
        one["values"] = [float(logits[0, -1].max())]
    groups, words = run(mini, facts, tmp_path)
    assert {group: results(checks) for group, checks in groups.items() if group not in ("sample data", "weights")} == {
        "file": {"pass"},
        "config": {"pass"},
        "facts": {"pass"},
        "ONNX Runtime": {"pass"},
    }
    assert "2 prompts give the published tokens" in groups["facts"][0].found
    assert "FAIL" not in results(groups["weights"])
    assert "bit by bit" in words
    sentence = verdict(list(verify(mini, load_facts(), zoo.known_files(), engine="numpy")))
    assert sentence.startswith("This is not GPT-2 124M, by its config and weights.")


# --- the file of facts, and the command ------------------------------------------------------------------------


def test_the_published_facts() -> None:
    models = load_facts()
    assert [one.parameters for one in models] == [124_439_808, 354_823_168, 774_030_080, 1_557_611_200]
    facts = models[0]
    assert facts.model == "GPT-2 124M"
    assert facts.parameters == 124_439_808
    assert len(facts.weights["fingerprints"]) == 23
    assert len(facts.facts) == 19
    assert [fact["first"] for fact in facts.facts if fact["kind"] == "beam_search"] == [
        [8642, 562, 318, 407, 262, 691, 835, 284]
    ]
    assert all(0 <= token < 50257 for f in facts.facts for token in f["ids"] + f.get("next", []) + f.get("tokens", []))
    assert all(f["source"] for f in facts.facts)
    names = {file.name for file in zoo.known_files()}
    assert names == {"gpt2-10.onnx", "gpt2-lm-head-10.onnx", "gpt2-lm-head-bs-12.onnx"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"models": []}',
        '{"models": [{"model": "m"}]}',
        '{"models": [{"model": "m", "config": {}, "facts": [{"kind": "unknown"}]}]}',
        '{"models": [{"model": "m", "config": {}, "facts": [{"kind": "greedy", "ids": [1]}]}]}',
        '{"models": [{"model": "m", "config": {}, "weights": {"fingerprints": {"w": {"l2": 1}}}}]}',
        '{"models": [{"model": "m", "config": {}, "files": [{"name": "x"}]}]}',
    ],
)
def test_a_bad_file_of_facts_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "facts.json").write_text(text)
    with pytest.raises(ModelFileError, match="is no file of facts|about no model|is not JSON|is no JSON object"):
        load_facts(tmp_path / "facts.json")


def test_a_missing_file_of_facts(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="cannot read"):
        load_facts(tmp_path / "none.json")


APP = typer.Typer()
APP.command("verify")(verify_command)


def test_the_verify_command(model: Path, tmp_path: Path) -> None:
    facts = tmp_path / "facts.json"
    save_facts(make_facts(CONFIG, SOURCES, model), tmp_path)
    result = CliRunner().invoke(APP, [str(model), "--facts", str(facts)])
    assert result.exit_code == 0, result.output
    assert "float64" in result.output
    assert "This is the tiny GPT-2, the published file bit by bit" in result.output

    result = CliRunner().invoke(APP, [str(model), "--facts", str(facts), "--json"])
    groups = [validate(line, "verify_check")["group"] for line in result.stdout.splitlines()]
    assert groups.count("facts") == 6

    result = CliRunner().invoke(APP, ["mini", "--facts", str(facts)])
    assert result.exit_code == 1
    assert "This is not the tiny GPT-2" in result.output

    changed_by_one_bit(model, initializers(model)[3])
    result = CliRunner().invoke(APP, [str(model), "--facts", str(facts)])
    assert result.exit_code == 1
    assert "altered" in result.output

    facts.write_text('{"models": [{"model": "m", "config": {}}]}')
    result = CliRunner().invoke(APP, [str(model), "--facts", str(facts)])
    assert result.exit_code == 3, result.output

    result = CliRunner().invoke(APP, [str(model)])
    assert result.exit_code == 1
    assert "This is not GPT-2 124M" in result.output


def test_a_fetched_checkpoint_is_converted_and_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`gpt2np fetch gpt2`, then `gpt2np verify gpt2`, with a tiny checkpoint in its place."""
    (tmp_path / "got").mkdir()
    save_checkpoint(tmp_path / "got", CONFIG, {name: source.load() for name, source in SOURCES.items()})
    files = tuple(
        zoo.RemoteFile(path.name, f"tiny/{path.name}", path.stat().st_size, file_hash(path), ())
        for path in ((tmp_path / "got" / "model.safetensors"), (tmp_path / "got" / "config.json"))
    )
    entry = zoo.Entry("tiny", "a tiny checkpoint", "none", files, (), None, convert=True)
    monkeypatch.setattr(manifest, "entries", lambda: {"tiny": entry})
    monkeypatch.setattr(manifest, "default_folder", lambda: tmp_path / "weights")
    app = typer.Typer()
    app.command("fetch")(fetch_command)
    app.command("verify")(verify_command)

    result = CliRunner().invoke(app, ["fetch", "tiny", "--from", str(tmp_path / "got")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "weights" / "tiny" / "model.onnx").is_file()
    before = (tmp_path / "weights" / "tiny" / "model.onnx").stat().st_mtime_ns
    assert CliRunner().invoke(app, ["fetch", "tiny", "--offline"]).exit_code == 0
    assert (tmp_path / "weights" / "tiny" / "model.onnx").stat().st_mtime_ns == before

    result = CliRunner().invoke(app, ["verify", "tiny"])
    assert result.exit_code == 1
    assert f"all {len(SOURCES)} weights are those of the checkpoint" in result.output
    assert "This is not GPT-2 124M" in result.output
