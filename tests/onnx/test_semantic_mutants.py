"""Files with one change in what they compute are refused, or run as ONNX Runtime runs them; other words load.

A short campaign of each kind; `python tests/support/mutation_campaign.py` runs long ones, with other seeds.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import harmless_rewrites
import mutation_campaign
from mutation_campaign import Base, Campaign, judge, sound_files
from runtime import is_older
from semantic_mutants import Editor


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    """The sound files that every clone can have."""
    files = sound_files(tmp_path_factory.mktemp("sound"))
    return {name: Base(name, path) for name, path in files.items() if not name.startswith("shared")}


@pytest.mark.parametrize("name", ["optimum_past", "own_zoo", "form_attention"])
def test_a_change_that_is_not_noticed_would_be_found(bases, name, tmp_path, monkeypatch):
    """The judge calls a session that runs the file before the change wrong."""
    base = bases[name]
    e = Editor(base.model, base.values, np.random.default_rng(0))
    output = next(p.name for p in base.found.outputs if p.role in ("logits", "last_hidden_state"))
    assert e.insert(output, lambda x: e.op("Mul", x, e.constant(1.001, np.float32)))
    honest = mutation_campaign.InferenceSession
    monkeypatch.setattr(mutation_campaign, "InferenceSession", lambda path, **how: honest(base.path, **how))
    assert judge(base, base.model, tmp_path).word == "agrees"
    assert judge(base, e.model, tmp_path).word == "WRONG"


def test_every_sound_file_agrees_on_every_input(bases, tmp_path):
    for base in bases.values():
        if base.name == "dynamo_23" and is_older("1.23"):
            continue  # it does not know opset 23
        verdict = judge(base, base.model, tmp_path)
        assert verdict.word == "agrees", f"{base.name}: {verdict}"


# Once refused: shapes that only some layers have, scales taken there and back, zeros added inside a part: before heads
# are split, in a layer norm, behind the embeddings.
@pytest.mark.parametrize(
    "name",
    ["q4:11:113", "old_past:2026:21", "own_head:202:371", "old_past:202:510", "form_mha:202:532", "q4:8802:221"],
)
def test_other_words_that_were_refused_load(bases, tmp_path, name):
    base, seed, number = name.split(":")
    finding = Campaign({}, int(seed), sound=True).one(bases[base], int(number), tmp_path)
    assert finding is not None
    assert finding.verdict.word == "agrees", finding


def test_layers_that_are_written_differently_load(bases, tmp_path):
    """One layer's c_attn is a Gemm on matrices, the others' are products of arrays with three axes."""
    base = bases["fused_past"]
    for seed in range(20):
        e = Editor(base.model, base.values, np.random.default_rng(seed))
        if harmless_rewrites.gemm(e) is not None:
            assert judge(base, e.model, tmp_path).word == "agrees"


def test_other_words_for_the_same_function_load(bases, tmp_path):
    found = list(Campaign(bases, seed=2026, sound=True).run(40, tmp_path))
    assert {f.verdict.word for f in found} == {"agrees"}, [f for f in found if f.verdict.word != "agrees"]


def test_random_changes_are_refused_or_computed(bases, tmp_path):
    found = list(Campaign(bases, seed=2026).run(60, tmp_path))
    assert not [f for f in found if f.verdict.word.isupper()]
    assert {f.verdict.word for f in found} == {"agrees", "refused"}


# Found by long campaigns: a switch that is -1, scores so large that -10000 no longer hides what it is added to, a
# GELU with a constant that is off by a hundredth, rows of wpe as whole numbers, wte negated for the embedding alone,
# two rows of wpe for one token, a mask of one key for all where there are eight.
@pytest.mark.parametrize(
    "name",
    [
        "form_attention:12:389",
        "fused_past:12:760",
        "dynamo_20:12:2467",
        "form_attention:13:173",
        "form_plain:12:4329",
        "form_mha:101:23178",
        "q4:7402:59",
    ],
)
def test_changes_that_once_gave_other_numbers(bases, tmp_path, name):
    base, seed, number = name.split(":")
    finding = Campaign({}, int(seed)).one(bases[base], int(number), tmp_path)
    assert finding is not None
    assert finding.verdict.word in ("agrees", "refused"), finding


def test_a_seed_names_a_mutant(bases):
    base = bases["dynamo_20"]
    first, second = (Campaign(bases, seed=3).make(base, 4) for _ in range(2))
    assert first is not None
    assert second is not None
    assert first[0] == second[0]
    assert isinstance(first[1], onnx.ModelProto)
    assert first[1] == second[1]
