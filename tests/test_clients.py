"""Clients of onnxruntime, unchanged, with only the session class exchanged: the same ids and verdicts come out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpt2np
from runtime import DATA

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the clients' own warnings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as Optimum exports it."""
    transformers = pytest.importorskip("transformers", reason="needs transformers and optimum-onnx, and torch")
    shutil.copy(DATA / "optimum_past.onnx", tmp_path / "model.onnx")
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=63
    )
    config.save_pretrained(tmp_path)
    return tmp_path


def optimum_model(folder: Path, session: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Optimum's ORTModelForCausalLM over the folder, with sessions of that class."""
    optimum = pytest.importorskip("optimum.onnxruntime.modeling_decoder", reason="needs optimum-onnx")
    made = []

    class Watched(session):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            made.append(self)
            super().__init__(*arguments, **options)

    monkeypatch.setattr(optimum, "InferenceSession", Watched)
    # Optimum makes an IOBinding, of ONNX Runtime's C++ session alone, even where it is told not to use one.
    monkeypatch.setattr("optimum.onnxruntime.base.IOBinding", lambda session: None)
    model = optimum.ORTModelForCausalLM.from_pretrained(folder, use_io_binding=False)
    assert made, "Optimum did not make its session of the class under test"
    return model


def generated(folder: Path, session: Any, monkeypatch: pytest.MonkeyPatch, **how: Any) -> list[Any]:
    """What it generates from prompts with left padding."""
    torch = pytest.importorskip("torch")
    model = optimum_model(folder, session, monkeypatch)
    results = []
    for seed in range(3):
        torch.manual_seed(seed)
        ids = torch.randint(1, 63, (2, 4))
        mask = torch.ones_like(ids)
        mask[1, 0] = 0
        out = model.generate(ids, attention_mask=mask, max_new_tokens=8, pad_token_id=0, **how)
        results.append(out.tolist())
    return results


@pytest.mark.parametrize(
    "how", [{"do_sample": False}, {"do_sample": True, "top_k": 20}, {"num_beams": 3, "do_sample": False}], ids=str
)
def test_optimum_generates_the_same_ids(folder, monkeypatch, how):
    import onnxruntime

    theirs = generated(folder, onnxruntime.InferenceSession, monkeypatch, **how)
    assert generated(folder, gpt2np.InferenceSession, monkeypatch, **how) == theirs


def piped(folder: Path, session: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What Hugging Face's text-generation pipeline writes over that model, greedy in a batch and sampled."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", padding_side="left")
    model = optimum_model(folder, session, monkeypatch)
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    greedy = pipe(["w5 w6 w7", "w9"], max_new_tokens=8, do_sample=False, batch_size=2)
    torch.manual_seed(3)
    return [greedy, pipe("w5 w6 w7", max_new_tokens=8, do_sample=True, top_k=10)]


def test_the_text_generation_pipeline_writes_the_same(folder, monkeypatch):
    import onnxruntime

    theirs = piped(folder, onnxruntime.InferenceSession, monkeypatch)
    assert piped(folder, gpt2np.InferenceSession, monkeypatch) == theirs


def test_polygraphy_finds_no_difference(monkeypatch):
    comparator = pytest.importorskip("polygraphy.comparator", reason="needs polygraphy")
    backend = pytest.importorskip("polygraphy.backend.onnxrt")
    import onnxruntime

    path = str(DATA / "dynamo_20.onnx")
    feeds = [{"input_ids": np.random.default_rng(0).integers(0, 64, (2, 7))}]
    runners = [
        backend.OnnxrtRunner(lambda: onnxruntime.InferenceSession(path), name="onnxruntime"),
        backend.OnnxrtRunner(lambda: gpt2np.InferenceSession(path), name="gpt2np"),
    ]
    results = comparator.Comparator.run(runners, data_loader=feeds)
    close = comparator.CompareFunc.simple(rtol=1e-3, atol=1e-5)
    assert bool(comparator.Comparator.compare_accuracy(results, compare_func=close))
