"""What generating costs beside the engine: choosing tokens, turning them into text, and Python.

    python benchmarks/generate.py [MODEL] [--tokenizer PATH] [--tokens N]

Each line is one way of choosing tokens. "kernels" is the time inside transformer(), logits() and causal_logits();
"model" is the rest of the model's part (checks of its input, the cache); "loop" is what is left of a step: sampling,
log-probabilities, detokenising, the generator itself. Lower quartiles over all tokens of interleaved runs, which
other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

import gpt2np
from gpt2np.commands._terminal import print_table
from gpt2np.generate import generate

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 0.8},
    "top-k 40": {"temperature": 0.8, "top_k": 40},
    "top-p 0.95": {"temperature": 0.8, "top_p": 0.95},
    "top-k, top-p, min-p, penalty": {
        "temperature": 0.8,
        "top_k": 200,
        "top_p": 0.95,
        "min_p": 0.02,
        "repetition_penalty": 1.1,
    },
    "greedy, 5 logprobs, stop": {"logprobs": 5, "stop": ["\n\n\n", "THE END"]},
}


class Clock:
    """Adds up the time inside the calls that it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, function: Any) -> Any:
        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - began

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()

    model = gpt2np.load(arguments.model)
    tokenizer = gpt2np.tokenizer.load(arguments.tokenizer) if arguments.tokenizer else model.tokenizer
    kernels, call = Clock(), Clock()
    real = model._kernels
    wrapped = {name: kernels(getattr(real, name)) for name in ("transformer", "logits", "causal_logits")}
    model._kernels = SimpleNamespace(**wrapped, log_probabilities=real.log_probabilities)  # type: ignore[assignment]
    type(model).__call__ = call(type(model).__call__)  # type: ignore
    type(model).next_logits = call(type(model).next_logits)  # type: ignore

    prompt = np.random.default_rng(0).integers(0, model.config.vocab_size - 1, 8).tolist()
    parts: dict[str, list[tuple[float, float, float]]] = {name: [] for name in WAYS}
    for run in range(arguments.runs + 1):
        for name, options in WAYS.items():
            steps = generate(model, prompt, arguments.tokens, seed=run, tokenizer=tokenizer, **options)
            next(steps)  # with the prefill
            while True:
                began, before = time.perf_counter(), (call.seconds, kernels.seconds)
                if next(steps, None) is None:
                    break
                whole = time.perf_counter() - began
                inside, deepest = call.seconds - before[0], kernels.seconds - before[1]
                if run:  # the first one compiles and warms up
                    parts[name].append((deepest, inside - deepest, whole - inside))
    rows = []
    for name, measured in parts.items():
        engine, checks, loop = np.quantile(np.array(measured), 0.25, axis=0) * 1e3
        whole = engine + checks + loop
        rows.append(
            (
                name,
                *(f"{ms:.3f}" for ms in (whole, engine, checks, loop)),
                f"{(checks + loop) / whole:.1%}",
                f"{loop / whole:.1%}",
            )
        )
    columns = ("tokens chosen by", ">ms/token", ">kernels", ">model", ">loop", ">beside the kernels", ">loop alone")
    print_table(columns, rows, title=f"{model}, {'with' if tokenizer else 'without'} tokenizer")


if __name__ == "__main__":
    main()
