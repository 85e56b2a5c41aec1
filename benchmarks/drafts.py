"""What drafts (`generate(..., lookup=True)`) bring: tokens a pass, and time with and without, in turns.

    python benchmarks/drafts.py [MODEL] [--tokens N] [--runs N]

Stories: greedy, and sampled at two temperatures. Text that repeats: a sentence many times over. Text that never does:
tokens drawn almost evenly from the vocabulary. Times are the least of the runs, so that other work on the machine
disturbs little; a pass is one run of the model after the prompt.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

import gpt2np
from gpt2np.commands._terminal import print_table
from gpt2np.generate import generate

TEXTS: dict[str, tuple[int, dict[str, Any]]] = {  # how often the prompt stands there, and how tokens are chosen
    "greedy": (1, {}),
    "temperature 0.4": (1, {"temperature": 0.4}),
    "temperature 0.8": (1, {"temperature": 0.8}),
    "text that repeats": (20, {}),
    "text that never repeats": (1, {"temperature": 1000.0}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--tokens", type=int, default=180)
    parser.add_argument("--runs", type=int, default=9)
    arguments = parser.parse_args()

    model = gpt2np.load(arguments.model)
    passes = 0
    real = model._causal_logits

    def counted(*given: Any) -> Any:
        nonlocal passes
        passes += 1
        return real(*given)

    model._causal_logits = counted  # type: ignore[method-assign]
    if model.tokenizer is None:
        prompts = [np.random.default_rng(seed).integers(0, model.config.vocab_size, 4).tolist() for seed in range(4)]
    else:
        prompts = [model.encode(text) for text in ("The dog ran. ", "Once upon a time", "Tom and Sam", "A red ball")]

    rows = []
    for name, (times, options) in TEXTS.items():
        plain, drafted, made, taken = 0.0, 0.0, 0, 0
        for seed, ids in enumerate(prompts[:1] if times > 1 else prompts):
            seconds: dict[bool, list[float]] = {False: [], True: []}
            kept = (ids * times)[: model.config.n_ctx - arguments.tokens]
            for lookup in [False, True] * (arguments.runs + 1):
                passes, began = 0, time.perf_counter()
                steps = generate(model, kept, arguments.tokens, seed=seed, lookup=lookup, **options)
                next(steps)  # with the prefill
                passes, began = 0, time.perf_counter()
                count = sum(1 for _ in steps)
                seconds[lookup].append(time.perf_counter() - began)
            plain, drafted = plain + min(seconds[False]), drafted + min(seconds[True])
            made, taken = made + count, taken + passes
        per_token = (f"{1e3 * value / made:.3f}" for value in (plain, drafted))
        rows.append((name, f"{made / taken:.2f}", *per_token, f"{plain / drafted:.2f}x"))
    columns = ("tokens chosen by", ">tokens a pass", ">ms/token without", ">with", ">faster")
    print_table(columns, rows, title=str(model))


if __name__ == "__main__":
    main()
