"""A file with one thing changed, and the original's recorded data: the tool must name the tap and the cause."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest

from gpt2np.parity.capture import Options
from gpt2np.parity.cases import gather_cases
from gpt2np.parity.diff import diff
from gpt2np.parity.run import parity
from mutants import MUTANTS

# Which file each mutant is made from: between them they cover the zoo's two graphs and an export with a past.
OTHERS = {
    "zoo_lm_head": ("untied_head", "untied_head_slightly", "gelu_erf", "element_c_fc", "bf16_q", "swapped_heads_v"),
    "optimum_past": ("mask_behind", "scale_missing", "bias_dropped", "position_graph", "layer_rewired", "element_ln"),
}
CASES = [(name, "zoo_base") for name in MUTANTS if not name.startswith(("untied", "bias_dropped"))]
CASES += [(name, source) for source, names in OTHERS.items() for name in names]
QUICK = {
    "gelu_sigmoid", "epsilon_outside", "ddof", "mask_ahead_one", "nan_q", "position_rolled", "element_k",
    "swapped_heads_q", "qkv_graph_kqv", "fp16_activation", "untied_head", "transposed_c_proj", "bias_dropped",
}  # fmt: skip


def mutate(source: Path, folder: Path, name: str) -> Path:
    """A copy of `source` with that mutant as its model, the data as it was."""
    for path in sorted(source.glob("test_data_set_*"))[:2]:
        shutil.copytree(path, folder / path.name, copy_function=shutil.copyfile)
    model = onnx.load(source / "model.onnx")
    assert MUTANTS[name].apply(model), "this file has nothing to mutate so"
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


@pytest.mark.parametrize(
    ("name", "source"), [pytest.param(n, s, marks=() if n in QUICK else pytest.mark.slow) for n, s in CASES]
)
def test_the_tap_and_the_cause_are_named(name: str, source: str, fixtures: Path, tmp_path: Path) -> None:
    model = mutate(fixtures / source, tmp_path, name)
    report = parity(Options(model, engine="numpy"))
    assert report.exit_code == 1
    found = report.details["diagnosis"]
    assert found["tap"] == MUTANTS[name].tap
    assert set(MUTANTS[name].causes) & {g["cause"] for g in found["guesses"][:2]}, found["guesses"]
    assert MUTANTS[name].tap in report.headline


@pytest.mark.parametrize(
    "name", ["gelu_erf", "transposed_c_proj", "element_c_fc", "layer_copied_ln", "bf16_c_fc", "ddof"]
)
def test_two_models_are_told_apart_operation_by_operation(name: str, fixtures: Path, tmp_path: Path) -> None:
    source = fixtures / "zoo_base"
    model = mutate(source, tmp_path, name)
    report = diff(str(source), str(model), lambda m: gather_cases(m, [], [], 1, 3))
    assert report.exit_code == 1
    found = report.details["diagnosis"]
    assert found["tap"] == MUTANTS[name].tap
    assert set(MUTANTS[name].causes) & {g["cause"] for g in found["guesses"][:2]}, found["guesses"]


MINI = {
    "transposed_c_proj": "transposed", "swapped_heads_q": "swapped_heads", "element_mlp_proj": "corrupted_element",
    "nan_c_fc": "nan_in_weight", "gelu_erf": "gelu_form", "position_rolled": "position_offset",
    "mask_ahead_all": "mask_shift",
}  # fmt: skip


@pytest.mark.parametrize("name", MINI)
def test_the_embedded_model_mutated(name: str, mini: Path, tmp_path: Path) -> None:
    if not (mini / "model.onnx").is_file():
        pytest.skip("weights/mini is not there")
    model = mutate(mini, tmp_path, name)
    found = parity(Options(model, engine="numpy")).details["diagnosis"]
    assert found["tap"] == MUTANTS[name].tap
    assert MINI[name] in {g["cause"] for g in found["guesses"][:2]}, found["guesses"]
