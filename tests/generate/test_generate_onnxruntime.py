"""Greedy generation from a file against ONNX Runtime running that file in its own greedy loop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from conftest import ROOT, SHARED

import gpt2np
from gpt2np import reference
from gpt2np.generate import generate
from gpt2np.parity.rounding import saturates
from gpt2np.session import InferenceSession

FILES = sorted((SHARED / "fixtures").glob("*/model.onnx"))
MINI = ROOT / "weights" / "mini" / "model.onnx"


class Runtime:
    """What a user of ONNX Runtime writes: the whole text in, the last position's logits out.

    A file without a head puts out hidden states; the tied head is then applied to them, in float64.
    """

    def __init__(self, path: Path, head: np.ndarray) -> None:
        self.path = path
        self.head = head  # (V, C)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def last_logits(self, ids: list[int], rounding: Any = None) -> np.ndarray:
        """By ONNX Runtime, or by gpt2np's session that runs the file's nodes with that rounding."""
        row = np.array([ids])
        feeds = {}
        for port in self.session.get_inputs():
            if port.name in ("input1", "input_ids"):
                value = row.reshape((1,) * (len(port.shape) - 1) + (-1,))
            elif port.name == "attention_mask":
                value = np.ones_like(row)
            elif port.name == "position_ids":
                value = np.arange(len(ids))[None]
            else:  # an empty past
                kind = np.float16 if port.type == "tensor(float16)" else np.float32
                value = np.zeros(
                    [d if isinstance(d, int) else 1 if i == 0 else 0 for i, d in enumerate(port.shape)], kind
                )
            feeds[port.name] = value
        session = self.session if rounding is None else InferenceSession(self.path, "numpy", emulate_rounding=rounding)
        output = session.run([self.session.get_outputs()[0].name], feeds)[0]
        last = output.reshape(-1, output.shape[-1])[len(ids) - 1]
        return last if len(last) == len(self.head) else self.head @ last.astype(np.float64)


class RuntimeModel:
    """ONNX Runtime as a language model: what `generate` needs, by reading each text anew."""

    tokenizer = None

    def __init__(self, runtime: Runtime, config: gpt2np.GPT2Config) -> None:
        self.runtime, self.config = runtime, config

    def decoder(self, rows: int, window: int | None = None, cache: Any = None, lookup: bool = False) -> RuntimeModel:
        return self

    def prefill(self, texts: Sequence[list[int]]) -> list[np.ndarray]:
        return [self.runtime.last_logits(ids).astype(np.float32) for ids in texts]

    def feed(self, rows: Sequence[int], texts: Sequence[list[int]]) -> list[np.ndarray]:
        return self.prefill(texts)

    log_probabilities = staticmethod(reference.log_probabilities)


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 3, "logprobs": 2}, {"num_beams": 3}, {"repetition_penalty": 1.3}],
    ids=str,
)
def test_onnxruntime_generates_through_the_same_loop(options: dict[str, Any]) -> None:
    """A session of ONNX Runtime is a language model like any other: same tokens, same log-probabilities."""
    model = gpt2np.load(MINI, engine="numpy")
    runtime = RuntimeModel(Runtime(MINI, model.weights.lm_head), model.config)
    prompts: list[Any] = [[10, 20, 30], [7, 8]]
    expected = list(generate(model, prompts, 12, **options))
    steps = list(generate(runtime, prompts, 12, **options))
    assert [(s.row, s.token_id, s.finish) for s in steps] == [(s.row, s.token_id, s.finish) for s in expected]
    np.testing.assert_allclose([s.logprob for s in steps], [s.logprob for s in expected], rtol=1e-3, atol=1e-4)


ENGINES = ["numpy", pytest.param("numba", marks=pytest.mark.jit)]
ROUNDED = [path for path in FILES if path.parent.name == "int8_dynamic"]  # activations too, while ONNX Runtime runs
EXACT = [MINI, *(path for path in FILES if path not in ROUNDED)]


@pytest.mark.parametrize("path", EXACT, ids=[path.parent.name for path in EXACT])
@pytest.mark.parametrize("engine", ENGINES)
def test_greedy_ids_are_onnxruntimes(path, engine):
    if not path.is_file():
        pytest.skip(f"no {path.parent.name} here")
    model = gpt2np.load(path, engine=engine)
    runtime = Runtime(path, model.weights.lm_head)
    for seed in range(3):
        ids = np.random.default_rng(seed).integers(0, model.config.vocab_size, 4 + 3 * seed).tolist()
        for step in generate(model, ids, 24):
            logits = runtime.last_logits(ids)
            assert step.token_id == int(logits.argmax()), (seed, len(ids), np.sort(logits)[-2:])
            ids = [*ids, step.token_id]


@pytest.mark.parametrize("path", ROUNDED, ids=[path.parent.name for path in ROUNDED])
@pytest.mark.parametrize("engine", ENGINES)
def test_greedy_ids_of_files_that_round(path, engine):
    """Ours are those of the file's nodes without rounding; ONNX Runtime's are those with the rounding of its CPU."""
    model = gpt2np.load(path, engine=engine)
    runtime = Runtime(path, model.weights.lm_head)
    for seed in range(3):
        ids = np.random.default_rng(seed).integers(0, model.config.vocab_size, 4 + 3 * seed).tolist()
        for step in generate(model, ids, 8):
            assert step.token_id == int(runtime.last_logits(ids, "unrounded").argmax())
            rounded = runtime.last_logits(ids, "saturating" if saturates() else True)
            assert int(rounded.argmax()) == int(runtime.last_logits(ids).argmax())
            ids = [*ids, step.token_id]
