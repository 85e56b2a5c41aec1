"""The debugger's judge as tests: files and ports with one mistake, made from files that the tests write.

`python tests/support/judge.py` runs all of them and prints a table; here each is a test of its own.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import gpt2np
import judge
from cache_ports import CACHE_BUGS
from gpt2np.parity.text import lines_of, sentences
from mutants import MUTANTS, mask_value
from port_bugs import Bug, erf, port_of
from ports import Port
from wiring_mutants import WIRINGS
from wrong_records import RECORDS

QUICK = {
    ("file", "gelu_sigmoid"), ("file", "mask_ahead_one"), ("file", "nan_q"), ("file", "position_rolled"),
    ("file", "element_k"), ("file", "swapped_heads_q"), ("file", "transposed_c_proj"),
    ("taps", "wpe row repeated"), ("taps", "epsilon 3e-2"), ("taps", "norms exchanged"), ("taps", "softmax + 1"),
    ("taps", "mask in blocks of 4"), ("taps", "dropout on out"), ("taps", "c_fc dead column"),
    ("taps", "logits in integers"),
    ("taps", "head 2 unscaled"), ("taps", "position 5 of out"), ("taps", "wte int8"), ("taps", "log-softmaxed logits"),
    ("taps", "GELU 0.0447"), ("taps", "rotary embedding"), ("taps", "out cut off to integers"),
    ("taps", "2 heads for 4"), ("taps", "c_fc reads int8"), ("taps", "ten largest logits"), ("taps", "one other token"),
    ("taps", "heads 0 and 2 zero"), ("taps", "layer 1 left out"),
    ("outputs", "keys and values in float16"), ("outputs", "layers 1 and 2 exchanged"), ("outputs", "ALiBi"),
    ("logits", "all maps misread"), ("logits", "positions twice"), ("logits", "logits capped"),
    ("outputs", "GELU by erf everywhere"), ("outputs", "tokens shifted"), ("outputs", "scale by layer"),
    ("outputs", "c_proj bias negated"), ("outputs", "centred logits"),
    ("outputs", "heads 0 and 2 zero everywhere"), ("outputs", "c_proj's heads in reverse order"),
    ("outputs", "ln_2 in int8"), ("outputs", "window of 5 in every second layer"), ("outputs", "layer 1 twice"),
    ("outputs", "half of each c_proj"), ("taps", "c_proj reads other numbers"), ("taps", "values read as (T, D)"),
    ("taps", "keys and values of the first sequence"), ("outputs", "keys and values of pairs of heads"),
    ("outputs", "head not transposed"), ("outputs", "token types of zeros"),
    *(("cache", name) for name in CACHE_BUGS), ("file", "fp16_activation"),
    *(("wiring", name) for name in ("residual lost", "MLP reads ln_1", "ln_2 skipped", "RMS norm", "layer dropped",
                                    "stream doubled", "tanh behind the stream", "c_fc rounded to float16")),
    *(("rewired", name) for name in ("residual after the norm", "ln_1 skipped", "RMS norm of ln_1", "MLP not added",
                                     "first layer dropped", "softmax over another axis", "attention halved")),
    *(("record", name) for name in ("presents exchanged", "keys for values in one layer", "one number", "batch rolled",
                                    "two other tokens", "other inputs", "one present of other tokens",
                                    "two positions exchanged", "rounded to bfloat16")),
}  # fmt: skip
NAMES = [
    *(("file", name) for name in MUTANTS),
    *(
        (kind, name)
        for kind in ("taps", "outputs", "logits")
        for name, bug in judge.BUGS.items()
        if kind == "taps" or bug.outputs_tell
    ),
    *(("cache", name) for name in CACHE_BUGS),
    *((kind, name) for kind in ("wiring", "rewired") for name in WIRINGS),
    *(("record", name) for name in RECORDS),
]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], judge.Case]:
    made = judge.cases(tmp_path_factory.mktemp("small"), list(judge.KINDS))
    return {(case.kind, case.name): case for case in made}


def marks(kind: str, name: str) -> list[pytest.MarkDecorator]:
    return [] if (kind, name) in QUICK else [pytest.mark.slow]


@pytest.mark.parametrize(("kind", "name"), [pytest.param(k, n, marks=marks(k, n)) for k, n in NAMES])
def test_the_place_and_the_cause_are_named(
    kind: str, name: str, cases: dict[tuple[str, str], judge.Case], tmp_path: Path
) -> None:
    case = cases[kind, name]
    verdict = case.run(tmp_path)
    assert verdict.failed
    assert verdict.is_at(case.places), verdict
    assert verdict.names(case.causes), verdict
    assert not verdict.misleads(case.causes), verdict


def test_where_inside_an_array_it_is_wrong_is_printed(cases: dict[tuple[str, str], judge.Case], tmp_path: Path) -> None:
    report = cases["taps", "position 5 of out"].run(tmp_path).report
    said = {s.label: s.text for s in sentences(report)}
    assert said["inside"] == "h.1.attn.out is wrong in position 5 alone"
    assert "none of the usual mistakes explains it" in said["why"]
    for width in (60, 80, 100):
        lines = [line for line, _ in lines_of(report, width)]
        assert max(map(len, lines)) <= width
        columns = next(line for line in lines if "local A" in line and "total" in line).split()
        assert ("gain:" in " ".join(lines)) == ("gain" in columns)  # columns that are not shown have no legend


def test_the_first_of_several_mistakes_is_named_by_the_outputs_next_to_it(tmp_path: Path) -> None:
    """GELU by erf in layer 0, a mask one ahead in layer 1: neither explains all; layer 1's keys and values one."""
    source = judge.write_small(tmp_path, "lm")
    model = gpt2np.load(source, engine="numpy")
    port = port_of(
        model.weights, Bug("", (), {"gelu": erf, "seen": lambda s, i, T, S, m: np.tri(T, S, i, dtype=bool)}, (0, 1))
    )
    port.wrong["gelu"] = lambda self, i, x: erf(self, i, x) if i == 0 else Port.gelu(self, i, x)
    ids = np.arange(24).reshape(2, 12)
    presents = port.run(ids)
    np.savez(tmp_path / "port.npz", output1=port.taps["logits"][None],
             **{f"output{i + 2}": p for i, p in enumerate(presents)})  # fmt: skip
    verdict = judge.diff(source, tmp_path / "port.npz", {"input1": ids[None]})
    assert (verdict.place, verdict.likely) == ("h.0.mlp.gelu", "gelu_form"), verdict
    assert "what comes later differs further" in verdict.report.diagnosis.guesses[0].evidence
    assert verdict.report.next.startswith("put that right")


@pytest.mark.parametrize(("name", "kept"), [("past rows reversed", False), ("positions from 0", True)])
def test_presents_are_held_against_the_past_that_was_fed_in(
    name: str, kept: bool, cases: dict[tuple[str, str], judge.Case], tmp_path: Path
) -> None:
    check = next(c for c in cases["cache", name].run(tmp_path).report.checks if c.name == "past kept")
    assert check.ok == kept
    assert ("is not the past" in check.text) != kept


@pytest.mark.parametrize("kind", ["lm", "past"])
def test_a_right_port_passes(kind: str, tmp_path: Path) -> None:
    folder = judge.write_small(tmp_path, kind)
    for case in judge.clean_ports(folder):
        verdict = case.run(tmp_path)
        assert not verdict.failed, (case.name, verdict)


MINI = {
    "transposed_c_proj": "transposed", "element_mlp_proj": "corrupted_element", "nan_c_fc": "nan_in_weight",
    "gelu_erf": "gelu_form", "mask_ahead_all": "mask_shift",
}  # fmt: skip


@pytest.mark.parametrize("name", MINI)
def test_the_embedded_model_mutated(name: str, mini: Path, tmp_path: Path) -> None:
    if not (mini / "model.onnx").is_file():
        pytest.skip("weights/mini is not there")
    case = next(iter(judge.from_files(mini, [name])))
    verdict = case.run(tmp_path)
    assert verdict.place == MUTANTS[name].tap
    assert MINI[name] in verdict.causes


@pytest.mark.parametrize("name", ["gelu_erf", "transposed_c_proj", "element_c_fc", "ddof"])
def test_two_models_are_told_apart_operation_by_operation(name: str, tmp_path: Path) -> None:
    import onnx

    source = judge.write_small(tmp_path, "base", 2)
    model = onnx.load(source / "model.onnx")
    assert MUTANTS[name].apply(model)
    (tmp_path / "bad").mkdir()
    onnx.save(model, tmp_path / "bad" / "model.onnx")
    ids = np.random.default_rng(0).integers(0, 96, (1, 1, 12))
    verdict = judge.diff(source, tmp_path / "bad", {"input1": ids})
    assert verdict.place == MUTANTS[name].tap
    assert set(verdict.causes) & set(MUTANTS[name].causes)


def test_masks_with_other_constants_in_other_layers_are_the_same(tmp_path: Path) -> None:
    import onnx

    source = judge.write_small(tmp_path, "base", 2)
    model = onnx.load(source / "model.onnx")
    assert mask_value(1, -65504.0)(model)
    (tmp_path / "other").mkdir()
    onnx.save(model, tmp_path / "other" / "model.onnx")
    verdict = judge.diff(source, tmp_path / "other", {"input1": np.arange(12).reshape(1, 1, 12)})
    assert not verdict.failed, verdict
    assert verdict.report.exit_code == 0
