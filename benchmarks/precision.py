"""What fewer bits cost and bring: a model with its matrices in 32, 16, 8 and 4 bits, in one table and one picture.

    python benchmarks/precision.py TEXT [MODEL ...] [--tokens 2000] [--rounds 20] [--plot FILE.svg]

TEXT is a file, which each model's own tokenizer cuts into tokens. For each form: bytes of all weights in memory; ms of
one token after 32, the median of rounds in which all forms take turns; perplexity of the text's first --tokens tokens,
in windows of n_ctx; the share of positions whose most probable token is another one than float32's; and the error of
each layer's residual stream and of the logits in the first window, rms beside float64 with the file's own numbers,
divided by the rms of the float64 numbers.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

import gpt2np
from gpt2np.commands._model import named_model
from gpt2np.commands._terminal import print_table

FORMS = ("float32", "bfloat16", "float16", "int8", "int4")


def memory(model: Any) -> int:
    """Bytes of all weights, each counted once."""
    arrays: dict[int, int] = {}

    def visit(part: Any) -> None:
        if isinstance(part, np.ndarray):
            arrays[part.ctypes.data] = part.nbytes
        elif isinstance(part, tuple):
            for inner in part:
                visit(inner)

    visit(model._weights)
    return sum(arrays.values())


def windows(ids: np.ndarray, width: int) -> list[np.ndarray]:
    """Windows of `width` tokens, of which each but the first begins with the last token of the one before."""
    return [ids[None, start : start + width] for start in range(0, len(ids) - 1, width - 1)]


def score(model: Any, ids: np.ndarray) -> tuple[float, np.ndarray]:
    """Perplexity, and the most probable token after each position."""
    total, best = 0.0, []
    for window in windows(ids, model.config.n_ctx):
        logits = model(window).logits
        logs, _ = model.log_probabilities(logits[:, :-1], window[:, 1:, None])
        total += float(logs.sum())
        best.append(logits[0, :-1].argmax(-1))
    return float(np.exp(-total / (len(ids) - 1))), np.concatenate(best)


def layers(model: Any, ids: np.ndarray) -> list[np.ndarray]:
    """The residual stream after each layer, and the logits."""
    taps = model.trace(ids[None, : model.config.n_ctx])
    return [taps[f"h.{i}.resid_post"] for i in range(model.config.n_layer)] + [taps["logits"]]


def milliseconds(models: dict[str, Any], ids: np.ndarray, rounds: int) -> dict[str, float]:
    """One token after 32, all models in turns."""
    prompt, times = ids[None, :32], {form: [] for form in models}
    caches = {form: model.new_cache() for form, model in models.items()}
    for form, model in models.items():
        model(prompt, cache=caches[form])
    for _ in range(rounds + 1):
        for form, model in models.items():
            began = time.perf_counter()
            model.next_logits([0], caches[form])
            times[form].append(time.perf_counter() - began)
            caches[form].crop(32)
    return {form: 1000 * statistics.median(values[1:]) for form, values in times.items()}


def measure(path: Path, text: str, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each form."""
    models = {form: gpt2np.load(path, weights=form) for form in FORMS}
    exact = gpt2np.load(path, engine="numpy", dtype="float64")
    ids = np.array(exact.encode(text)[:tokens])
    truth, first = layers(exact, ids), None
    ms, rows = milliseconds(models, ids, rounds), []
    for form, model in models.items():
        perplexity, best = score(model, ids)
        first = best if first is None else first
        errors = [
            float(np.sqrt(((a - b) ** 2).mean() / (b**2).mean()))
            for a, b in zip(layers(model, ids), truth, strict=True)
        ]
        flips = float((best != first).mean())
        rows.append(
            {"form": form, "bytes": memory(model), "ms": ms[form], "ppl": perplexity, "flips": flips, "errors": errors}
        )
    return rows


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Error of the logits against time of a token."""
    import altair

    points = [
        {"model": name, "weights": row["form"], "ms": row["ms"], "error": row["errors"][-1]}
        for name, rows in found.items()
        for row in rows
    ]
    altair.Chart(altair.Data(values=points)).mark_point(filled=True, size=80).encode(
        x=altair.X("ms:Q", title="ms for one token").scale(zero=True),
        y=altair.Y("error:Q", title="error of the logits beside float64, rms / rms")
        .scale(type="log", domain=[1e-7, 1])
        .axis(values=[10.0**n for n in range(-7, 1)], format=".0e"),
        color=altair.Color("model:N", title="model"),
        shape=altair.Shape("weights:N", title="weights", sort=list(FORMS)),
    ).properties(width=420, height=300).save(str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("models", nargs="*", default=["mini"])
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    for name in given.models:
        found[name] = measure(named_model(name), given.text.read_text(encoding="utf-8"), given.tokens, given.rounds)
        count = len(found[name][0]["errors"]) - 1
        print(name)
        print_table(
            ("weights", "bytes", "ms", "perplexity", "flips", *(f"h.{i}" for i in range(count)), "logits"),
            (
                (
                    row["form"],
                    f"{row['bytes']:,}",
                    f"{row['ms']:.2f}",
                    f"{row['ppl']:.3f}",
                    f"{100 * row['flips']:.2f}%",
                    *(f"{error:.1e}" for error in row["errors"]),
                )
                for row in found[name]
            ),
        )
    if given.plot is not None:
        draw(found, given.plot)


if __name__ == "__main__":
    main()
