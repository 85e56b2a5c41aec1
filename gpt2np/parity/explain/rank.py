"""All guesses at one problem, tried and ranked: "did you mean"."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ...activations import ACTIVATIONS
from ...weights import Array
from ..operations import split_tap
from .attention_mistakes import c_attn, mask, merge, other_softmax, scale
from .evidence import shape_of_the_error, shown_by_the_file
from .gradients import F64
from .mistakes import activation, embedding, head, layer_norm, linear, other_activation, other_input, without_residual
from .problem import Guess, Problem, swap_text, weight_names
from .rounding_mistakes import narrow_types
from .solve import absent_biases, single_elements


def rank(problem: Problem, forward: bool, spare: Mapping[str, Array] | None = None, keep: int = 5) -> list[Guess]:
    """The best explanations, best first.

    forward: the program is right and a mistake is to be reproduced; otherwise it is wrong and to be undone.
    spare: initializers of the file that nothing uses, which may be the weights that are missed.
    """
    best: dict[tuple[str, str], Guess] = {}

    def keep_best(guess: Guess) -> None:
        """Of each cause at each tap only the best: a guess may hold whole weight matrices."""
        key = guess.cause, guess.tap
        if guess.removed > 0.02 and (key not in best or guess.merit > best[key].merit):
            best[key] = guess

    if problem.before > 0 and math.isfinite(problem.before):
        for tap in problem.suspects:
            for guess in catalogue(problem, tap, forward):
                keep_best(problem.judge(guess))
        for guess in spare_weights(problem, spare or {}):
            keep_best(problem.judge(guess))
        if not forward:
            for guess in [*everywhere(problem, list(best.values())), *absent_biases(problem)]:
                keep_best(guess)
        if not any(g.explains for g in best.values()):
            for guess in single_elements(problem):
                if guess.removed > 0.5:  # among millions of numbers, one that fits a little can always be found
                    keep_best(guess)
    if forward and problem.before > 0 and not any(g.explains for g in best.values()):
        for guess in shape_of_the_error(problem):
            keep_best(guess)
    if not forward:
        explained = any(g.explains for g in best.values())
        for found in shown_by_the_file(problem):
            found.removed = 0.1 if explained else found.removed
            keep_best(found)
    ranked = sorted(best.values(), key=lambda g: g.merit, reverse=True)
    return [g for g in ranked if g.removed > 0.05][:keep]


def everywhere(problem: Problem, guesses: Sequence[Guess]) -> list[Guess]:
    """The most promising guesses once more, made in every layer at once: exporters err in all layers alike."""
    if any(g.explains for g in guesses):
        return []
    found = []
    norms = ("ln_1", "ln_2", "ln_f")
    for guess in sorted(guesses, key=lambda g: -g.removed)[:8]:
        layer, part = split_tap(guess.tap)
        if layer is None or guess.removed < 0.02:
            continue
        weights, runs = dict(guess.weights), dict(guess.runs)
        key = guess.text.replace(f"h.{layer}.", "h.*.")
        for tap in problem.taps:
            other, its_part = split_tap(tap)
            group = its_part == part or (part in norms and its_part in norms)
            if group and tap != guess.tap:
                for twin in catalogue(problem, tap, forward=False, alone=True):
                    if twin.cause == guess.cause and twin.text.replace(f"h.{other}.", "h.*.") == key:
                        weights |= twin.weights
                        runs |= twin.runs
                        break
        if len(weights) + len(runs) > len(guess.weights) + len(guess.runs):
            text = f"{guess.text}, and so in the other layers"
            found.append(problem.judge(Guess(guess.cause, guess.tap, text, weights=weights, runs=runs)))
    return found


def spare_weights(problem: Problem, spare: Mapping[str, Array]) -> Iterator[Guess]:
    """Weights that lie in the file unused, in place of one of their shape."""
    for name, tap in weight_names(problem):
        shape = problem.program.weights(name, F64).shape
        for origin, value in spare.items():
            for fitting in (value, value.T) if value.shape != value.shape[::-1] else (value,):
                if fitting.shape == shape:
                    text = f"{origin}, which the file holds unused, in place of what it takes for {name}"
                    yield Guess("other_layer", tap, text, weights={name: fitting.astype(np.float64)})


def catalogue(problem: Problem, tap: str, forward: bool, alone: bool = False) -> Iterator[Guess]:
    """Mistakes whose right (or wrong) form is known, at one operation; `alone`: suspected or not."""
    layer, part = split_tap(tap)
    if part == "embed":
        yield from embedding(problem)
    elif part in ("ln_1", "ln_2", "ln_f"):
        yield from layer_norm(problem, tap, forward)
    elif part in ("attn.q", "attn.k", "attn.v"):
        # the three share one matrix: they are tried together, at the first of them that is suspected
        group = [f"h.{layer}.attn.{x}" for x in "qkv"]
        if alone or tap == next(t for t in group if t in problem.suspects):
            yield from c_attn(problem, layer, forward)  # type: ignore[arg-type]
    elif part == "attn.scores":
        yield from scale(problem, tap)
    elif part == "attn.probs":
        yield from mask(problem, tap)
        if tap in problem.observed:
            yield from other_softmax(problem, tap)
    elif part == "attn.heads" and forward:  # in a file, another order of heads is one of c_proj's rows
        yield from merge(problem, tap)
    elif part in ("attn.out", "mlp.out", "mlp.c_fc"):
        yield from linear(problem, tap, tap.replace(".out", ".c_proj"), forward)
    elif part == "mlp.gelu":
        now = problem.program.config.layer_activation(layer)  # type: ignore[arg-type]
        for form in ACTIVATIONS:
            if form != now:
                yield Guess(
                    "gelu_form", tap, f"GELU form: {swap_text(form, now, forward)}", runs={tap: activation(form)}
                )
        if forward:
            yield from other_activation(problem, tap, now)
    elif part in ("resid_mid", "resid_post"):
        yield Guess("missing_residual", tap, "the residual is not added", runs={tap: without_residual})
    elif part == "logits":
        yield from head(problem)
    if forward:
        yield from other_input(problem, tap)
        yield from narrow_types(problem, tap)
