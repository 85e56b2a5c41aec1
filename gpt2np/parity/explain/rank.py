"""All guesses at one problem, tried in the order of what they cost, and ranked: "did you mean".

1. what the arrays show by themselves; 2. mistakes with nothing to fit, at each suspected operation; 3. the same made
in every layer at once; 4. other weights and narrower types; 5. mistakes confined to the part of the array where the
error is; 6. numbers that are fitted; 7. single weights; 8. the shape of the error. A stage is left out where an
earlier one explains everything, and the clock ends the search wherever it is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import permutations
from typing import Any

import numpy as np

from ...call import Call
from ...weights import Array
from ..operations import OPERATIONS, Run, linear_of, split_tap, tap_inputs
from ..program import Program
from . import attention_mistakes as attention
from .cache_mistakes import cache
from .embedding_mistakes import embedding, head
from .evidence import facts, shape_of_the_error, shown_by_the_file, stored_narrow
from .gradients import F64
from .mistakes import (
    activation,
    fitted_epsilon,
    layer_norm,
    linear,
    other_input,
    other_weights,
    residual,
    whole_results,
)
from .problem import CLOSE, Clock, Guess, Problem, TimeUp, name_likely, norm_names, one_thread, weight_names
from .rounding_mistakes import narrow_everywhere, narrow_types
from .solve import absent_biases, dead_column, single_elements
from .where import describe, inside

KEPT = 0.02  # a guess that removes less is forgotten
SHOWN = 0.05
MAPS = ("attn.q", "attn.k", "attn.v", "attn.out", "mlp.c_fc", "mlp.out")
MAP = re.compile(r"(?<=\.)(?:attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)(?=\.)")
BRANCH = re.compile("the attention's|the MLP's")
# What is most often made in all layers alike, tried first.
USUAL = ("gelu_form", "epsilon_value", "scale", "mask_missing", "mask_shift", "ddof", "no_centring", "missing_bias")
NEAR = 0.3  # how far the error that a guess makes to first order may be from the one observed
PROMISING = 24  # such guesses are run to the end
FIT = 0.5  # among millions of numbers, one that fits a little can always be found: what is fitted must do this much


class Ranking:
    """The best guess of each cause at each tap; a guess may hold whole weight matrices."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.best = problem, dict[tuple[str, str], Guess]()

    @property
    def explained(self) -> bool:
        return any(g.explains for g in self.best.values())

    @property
    def settled(self) -> bool:
        """Whether something explains it that fits nothing to it."""
        return any(g.explains and not g.fitted for g in self.best.values())

    def keep(self, guess: Guess) -> None:
        key = guess.cause, guess.tap
        if guess.removed > KEPT and (key not in self.best or guess.merit > self.best[key].merit):
            self.best[key] = guess

    def try_all(self, guesses: Iterable[Guess], share: float, least: float = KEPT) -> None:
        """Judge guesses until that share of the time is used up."""
        for guess in guesses:
            if self.problem.clock.out(guess.text, share):
                return
            if guess.tap in self.problem.given:  # what is vouched for is right
                continue
            judged = guess if math.isfinite(guess.removed) else self.problem.judge(guess)
            if judged.removed > least:
                self.keep(judged)
            if judged.explains and not judged.fitted and self.problem.is_large:
                return  # what else would fit is not worth the time

    def ranked(self) -> list[Guess]:
        return sorted(self.best.values(), key=lambda g: g.merit, reverse=True)


def rank(
    problem: Problem, spare: Mapping[str, Array] | None = None, recorded: bool = False, keep: int = 5
) -> list[Guess]:
    """The best explanations, best first; the first of them says whether it may be called the cause.

    spare: initializers of the file that nothing uses, which may be the weights that are missed.
    recorded: what was observed is recorded data; the file itself is then suspected, and its weights looked at.
    """
    with one_thread():
        ranked = search(problem, spare or {}, recorded)[:keep]
    name_likely(ranked)
    return ranked


def search(problem: Problem, spare: Mapping[str, Array], recorded: bool) -> list[Guess]:
    """All stages of the search, in the order of what they cost."""
    found = Ranking(problem)
    with until(problem.clock, 0.85):
        for guess in [*facts(problem), *stored_narrow(problem)]:
            found.keep(guess)
        if problem.before > 0 and math.isfinite(problem.before):
            try_mistakes(problem, found, spare)
    with until(problem.clock, 0.92):
        if problem.before > 0 and not found.explained:
            found.try_all(shape_of_the_error(problem), 1.0)
    with until(problem.clock, 0.98):
        shown = shown_by_the_file(problem) if recorded else []
        for guess in shown:
            guess.removed = 0.1 if found.explained else guess.removed
            guess.likely = not found.explained and len({g.tap for g in shown}) == 1 and guess.removed > 0.9
            found.keep(guess)
    ranked = [g for g in found.ranked() if g.removed > SHOWN]
    near = bool(ranked) and ranked[0].removed >= CLOSE and not ranked[0].fitted  # then what is left has no shape
    return [g for g in ranked if not (near and g.cause == "imprecise")]


def try_mistakes(problem: Problem, found: Ranking, spare: Mapping[str, Array]) -> None:
    """The stages that try mistakes, each with its share of the time, until one explains everything."""
    if problem.is_wide and problem.is_whole:  # one mistake in all layers is usual, and layer by layer takes long
        found.try_all(promising(problem), 0.45)
        if not found.settled:
            found.try_all(everywhere(problem), 0.55)
    if not found.settled:
        found.try_all(plain(problem), 0.6)
    stages: list[Callable[[], Iterable[Guess]]] = [
        lambda: everywhere(problem) if problem.is_whole and not problem.is_wide else (),
        lambda: spare_weights(problem, spare),
        lambda: (g for tap in problem.suspects for g in further(problem, tap)),
        lambda: confined(problem, found),
        lambda: step_by_step(problem, found.ranked()),
        lambda: by_head(problem, found.ranked()),
        lambda: fitted(problem, found.ranked()),
        lambda: absent_biases(problem),
    ]
    for number, stage in enumerate(stages):
        if not found.explained:
            found.try_all(stage(), 0.5 + 0.04 * number)
    if not found.explained and not problem.clock.out("single weights", 0.7):
        found.try_all(dead_column(problem), 1.0, FIT)
        found.try_all(single_elements(problem), 1.0, FIT)


@contextmanager
def until(clock: Clock, share: float) -> Iterator[None]:
    """What is done here ends when that share of the time is used up, with whatever was found."""
    before, clock.limit = clock.limit, share
    try:
        with suppress(TimeUp):
            yield
    finally:
        clock.limit = before


def catalogue(problem: Problem, tap: str, alone: bool = False) -> Iterator[Guess]:
    """Mistakes with nothing to fit, at one operation. `alone`: q, k or v by itself, suspected or not."""
    layer, part = split_tap(tap)
    if part == "embed":
        yield from embedding(problem)
    elif part in ("ln_1", "ln_2", "ln_f"):
        yield from layer_norm(problem, tap)
    elif part in ("attn.q", "attn.k", "attn.v"):
        # the three share one matrix: they are tried together, at the first of them that is suspected
        group = [f"h.{layer}.attn.{x}" for x in "qkv"]
        if alone or tap == next(t for t in group if t in problem.suspects):
            yield from attention.c_attn(problem, layer)  # type: ignore[arg-type]
    elif part == "attn.scores":
        yield from attention.scale(problem, tap)
        yield from attention.other_scores(problem, tap)
        yield from cache(problem, tap)
    elif part == "attn.probs":
        yield from attention.mask(problem, tap)
        yield from attention.other_softmax(problem, tap)
    elif part == "attn.heads":
        yield from attention.merge(problem, tap)
        yield from cache(problem, tap)
    elif part in ("attn.out", "mlp.out", "mlp.c_fc"):
        yield from linear(problem, tap, tap.replace(".out", ".c_proj"))
    elif part == "mlp.gelu":
        yield from activation(problem, tap)
    elif part in ("resid_mid", "resid_post"):
        yield from residual(problem, tap)
    elif part == "logits":
        yield from head(problem)
    yield from other_input(problem, tap)
    yield from whole_results(problem, tap)


def further(problem: Problem, tap: str) -> Iterator[Guess]:
    """What is more work or less usual: another map's weights, narrower types."""
    layer, part = split_tap(tap)
    p = problem.program
    if part in ("ln_1", "ln_2", "ln_f"):
        yield from other_weights(problem, tap, tap, [n for n in norm_names(p) if n != tap])
    elif part in ("attn.q", "attn.out", "mlp.c_fc", "mlp.out") or (tap == problem.suspects[0] and "attn." in part):
        for name in dict.fromkeys(n.rsplit(".", 1)[0] for n, at in weight_names(problem) if at == tap):
            stem = name.split(".", 2)[2]
            others = [f"h.{i}.{stem}" for i in range(p.config.n_layer) if i != layer]
            yield from other_weights(problem, tap, name, others)
    yield from narrow_types(problem, tap)


def promising(problem: Problem) -> list[Guess]:
    """Mistakes at single operations that to first order make just the error that was observed, the nearest first.

    To first order, an operation whose result moves by d moves what is observed by J d. Of a mistake that is the whole
    error e, e . J d = |e|^2; and e . J d for all operations comes from one backward pass over e. The operation alone
    is run for each guess, not all that follows it.
    """
    back = problem.gradients()
    back(problem.weighted(problem.residuals()))
    found: list[tuple[float, int, Guess]] = []
    taps = [t for t in problem.suspects if t in back.at_taps and split_tap(t)[1] not in MAPS]
    for tap in sorted(taps, key=lambda tap: split_tap(tap)[1] != "mlp.gelu"):  # the usual one first
        if problem.clock.out(f"what {tap} alone may make", 0.3):
            break
        inputs = [problem.given.get(i, problem.values.get(i)) for i in tap_inputs(tap, problem.program.config)]
        for guess in catalogue(problem, tap):
            if guess.tap != tap or guess.call is not None or any(x is None for x in inputs):
                continue
            made = guess.applied(problem.program).run(tap, problem.call, inputs, F64)  # type: ignore[arg-type]
            if made.shape != problem.values[tap].shape:  # a head of another width than the columns that are looked at
                continue
            with np.errstate(all="ignore"):
                share = float((back.at_taps[tap] * (made - problem.values[tap])).sum()) / problem.before**2
            if abs(share - 1) < NEAR:
                found.append((abs(share - 1), len(found), guess))
    return [guess for *_, guess in sorted(found, key=lambda f: f[:2])[:PROMISING]]


def plain(problem: Problem) -> Iterator[Guess]:
    """The catalogue at every suspected operation; of large models the linear maps, which cost most, come last."""
    taps = problem.suspects
    if problem.is_large and not problem.local:
        taps = sorted(taps, key=lambda tap: split_tap(tap)[1] in MAPS)
    return (guess for tap in taps for guess in catalogue(problem, tap))


def everywhere(problem: Problem) -> Iterator[Guess]:
    """The same mistake made in every layer at once: exporters and ports err in all layers alike."""
    groups: dict[tuple[str, str], list[Guess]] = {}
    wide = problem.is_wide
    for tap in problem.taps:
        part = split_tap(tap)[1]
        if part in ("attn.k", "attn.v", "embed", "logits") or problem.clock.out(share=0.5):
            continue
        for guess in catalogue(problem, tap, alone=True):
            if wide and guess.cause == "swapped_heads":  # every pair of heads, each a run of the whole model
                continue
            if not guess.fitted and guess.call is None:
                variant = re.sub(r"\bln_[12f]\b", "ln", guess.variant).replace("h.*.ln", "ln")
                groups.setdefault((guess.cause, variant), []).append(guess)
                of_any = BRANCH.sub("a branch's", MAP.sub("map", variant))
                if of_any != variant:  # the same of several maps: a bias that two devices add, no bias anywhere
                    groups.setdefault((guess.cause, of_any), []).append(guess)
                    if part in ("attn.out", "mlp.out"):
                        groups.setdefault((guess.cause, f"{of_any}, c_proj"), []).append(guess)
    distinct = {tuple(map(id, same)): same for same in groups.values() if len(same) > 1}.values()
    for same in sorted(distinct, key=lambda same: USUAL.index(same[0].cause) if same[0].cause in USUAL else 99):
        yield in_all(same)
        without = [g for g in same if g.tap != "ln_f"]
        if 1 < len(without) < len(same) and not problem.is_large:
            yield in_all(without)
    yield all_maps_misread(problem)
    yield from narrow_everywhere(problem)
    yield from layer_orders(problem)


def in_all(same: Sequence[Guess]) -> Guess:
    """One mistake made at several operations, as one guess."""
    weights = {name: value for g in same for name, value in g.weights.items()}
    runs = {tap: run for g in same for tap, run in g.runs.items()}
    layers = sorted({layer for g in same if (layer := split_tap(g.tap)[0]) is not None})
    whole = layers == list(range(len(layers)))
    which = f"all {len(layers)} layers" if whole else f"layers {', '.join(map(str, layers))}"
    maps = dict.fromkeys(stem for g in same for stem in MAP.findall(g.text))
    text = same[0].text + (f", and so of {', '.join(list(maps)[1:])}" if len(maps) > 1 else "")
    which = f"the whole of layer {layers[0]}" if len(layers) == 1 else which
    text = BRANCH.sub("each branch's", text) if len({b for g in same for b in BRANCH.findall(g.text)}) > 1 else text
    text += f", and so in {which}" + " and ln_f" * (same[-1].tap == "ln_f")
    steps = [g.more for g in same if g.more is not None]
    more = (lambda: map(in_all, zip(*(step() for step in steps), strict=True))) if len(steps) == len(same) else None
    return Guess(same[0].cause, same[0].tap, text, same[0].now, weights=weights, runs=runs, more=more)


def layer_orders(problem: Problem) -> Iterator[Guess]:
    """The layers' weights in another order: one too early or late, backwards, two exchanged, one over again."""
    p, L = problem.program, problem.program.config.n_layer
    if problem.local:  # one operation's weights are no layer's
        return

    def of(order: Sequence[int]) -> dict[str, Run]:
        def run(q: Program, call: Call, tap: str, x: list[Array], dtype: Any) -> Array:
            layer, part = split_tap(tap)
            return p.run(f"h.{order[layer or 0]}.{part}", call, x, dtype)

        moved = {i for i in range(L) if order[i] != i}
        parts = ("ln_1", "ln_2", *MAPS)
        return {t: run for t in problem.taps if split_tap(t)[0] in moved and split_tap(t)[1] in parts}

    same = list(range(L))
    orders = [(f"layers {i} and {i + 1} were exchanged", [*same[:i], i + 1, i, *same[i + 2 :]]) for i in same[:-1]]
    orders += [("layers came in reverse order", same[::-1]), ("all layers had the weights of layer 0", [0] * L)]
    orders += [
        ("each layer had the weights of the one after", [*same[1:], 0]),
        ("each layer had the weights of the one before", [L - 1, *same[:-1]]),
        ("each layer but the last had the weights of the one after", [*same[1:], L - 1]),
        ("each layer but the first had the weights of the one before", [0, *same[:-1]]),
    ]
    orders += [(f"layer {j} had the weights of layer {i}", [*same[:j], i, *same[j + 1 :]])
               for i, j in permutations(same, 2) if not problem.is_large or abs(i - j) == 1]  # fmt: skip
    tried: list[list[int]] = []
    for text, order in orders:
        runs = of(order)
        if runs and order not in tried:
            tried.append(order)
            yield Guess("layer_order", next(iter(runs)), text, runs=runs)
    for to, of_what in (("ln_1", "ln_2"), ("ln_2", "ln_1")):

        def other(q: Program, call: Call, tap: str, x: list[Array], dtype: Any, stem: str = of_what) -> Array:
            return p.run(f"h.{split_tap(tap)[0]}.{stem}", call, x, dtype)

        taps = [t for t in problem.taps if split_tap(t)[1] == to]
        if len(taps) > 1:
            text = f"{to} had the weights of {of_what}, in all layers"
            yield Guess("other_layer", taps[0], text, runs=dict.fromkeys(taps, other))


def all_maps_misread(problem: Problem) -> Guess:
    """The weights of every linear map taken for (out, in): checkpoints of GPT-2 hold (in, out)."""

    def run(p: Program, call: Call, tap: str, x: list[Array], dtype: Any) -> Array:
        name = linear_of(tap)
        weight = problem.program.weights(f"{name}.weight", dtype)
        flipped = {f"{name}.weight": weight.reshape(weight.shape[::-1]).T}
        return problem.program.with_(flipped).run(tap, call, x, dtype)

    taps = [tap for tap in problem.taps if split_tap(tap)[1] in MAPS]
    text = "the weights of all linear maps were read as (out, in) and transposed"
    return Guess("transposed", taps[0] if taps else problem.taps[0], text, runs=dict.fromkeys(taps, run))


def spare_weights(problem: Problem, spare: Mapping[str, Array]) -> Iterator[Guess]:
    """Weights that lie in the file unused, in place of one of their shape."""
    for name, tap in weight_names(problem):
        shape = problem.program.weights(name, F64).shape
        for origin, value in spare.items():
            for fitting in (value, value.T) if value.shape != value.shape[::-1] else (value,):
                if fitting.shape == shape:
                    text = f"{name} were {origin}, which the file holds unused"
                    yield Guess("other_layer", tap, text, weights={name: fitting.astype(np.float64)})


def confined(problem: Problem, found: Ranking) -> Iterator[Guess]:
    """The mistakes of the catalogue once more, made only in the part of the array where the error is."""
    if not problem.local:
        return
    masks = {}
    for tap, value in problem.observed.items():
        scale = float(np.sqrt(np.mean(np.square(problem.values[tap])))) or 1.0
        mask = inside(value - problem.values[tap], 1e-5 * scale)
        if mask is not None:
            masks[tap] = mask
    if not masks:
        return
    problem.only = masks
    try:
        for tap in problem.suspects:
            for guess in catalogue(problem, tap):
                judged = problem.judge(guess)
                if judged.explains:
                    judged.text += f" ({_words(problem, tap)})"
                    yield judged
    finally:
        problem.only = {}


def step_by_step(problem: Problem, ranked: Sequence[Guess]) -> Iterator[Guess]:
    """Mistakes that explain a part, with more of their kind as long as that helps: two dead heads, further swaps."""
    for best in [g for g in ranked if g.more is not None][:3]:
        while best.more is not None and not best.explains:
            guess = max(map(problem.judge, best.more()), key=lambda g: g.merit, default=best)
            if guess.merit <= best.merit:
                break
            best = guess
            yield best


def by_head(problem: Problem, ranked: Sequence[Guess]) -> Iterator[Guess]:
    """The guesses about scores and probabilities that explain a part, made in one head alone."""
    for guess in [g for g in ranked if g.cause in ("scale", "mask_shift", "mask_missing", "softmax_form")][:4]:
        if set(guess.runs) != {guess.tap} or guess.removed < 0.1:
            continue
        for number in range(problem.program.config.n_head):
            run = in_one_head(problem, guess.runs[guess.tap], number)
            text = f"{guess.text}, in head {number} alone"
            yield Guess(guess.cause, guess.tap, text, guess.now, runs={guess.tap: run})


def in_one_head(problem: Problem, wrong: Run, head: int) -> Run:
    def run(p: Program, call: Call, tap: str, x: list[Array], dtype: Any) -> Array:
        value = np.array(problem.program.run(tap, call, x, dtype))
        value[:, head] = wrong(p, call, tap, x, dtype)[:, head]
        return value

    return run


def _words(problem: Problem, tap: str) -> str:
    scale = float(np.sqrt(np.mean(np.square(problem.values[tap])))) or 1.0
    error = problem.observed[tap] - problem.values[tap]
    return describe(error, 1e-5 * scale, OPERATIONS[split_tap(tap)[1]].shape, problem.call.start)


def fitted(problem: Problem, ranked: Sequence[Guess]) -> Iterator[Guess]:
    """One number solved for: an epsilon where another epsilon helps, a scale where another scale does."""
    for guess in [g for g in ranked if g.cause == "epsilon_value"][:3]:
        yield fitted_epsilon(problem, guess.tap, 1e-3)
    for guess in [g for g in ranked if g.cause == "scale"][:3]:
        yield attention.fitted_scale(problem, guess.tap)
