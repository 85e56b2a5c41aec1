""" "Did you mean": the usual mistakes of porting a transformer, tried one by one.

A `Problem` holds values that are trusted (`given`), values that should come out (`observed`), and the
operations between them. A `Guess` changes the program at one of these operations; how much of the error it
removes says how well it explains it. The same machinery serves both questions:

- the program under test is wrong and good outputs were recorded: which change makes it right?
- the program is right and another party's operation differs: which mistake reproduces what that party did?
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations, permutations
from typing import Any

import numpy as np

from .. import reference
from ..weights import Array
from .gradients import F32, F64, Gradients
from .metrics import difference
from .operations import RUNS, Call, Program, Run, embed_at, masked_softmax, split_tap, tap_inputs, tap_names

NOISE_FACTOR = 10.0  # a guess explains an error if it leaves no more than so many times float32's own error
CERTAIN = 0.96  # rank of what the file itself shows (two layers with one weight) though it cannot be undone


@dataclass
class Guess:
    """One possible mistake, as a change to a program."""

    cause: str  # a stable identifier, for tools
    tap: str  # the first tap that it changes
    text: str  # for people
    weights: dict[str, Array] = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    removed: float = -math.inf  # share of the error that it removes: 1 explains all of it
    explains: bool = False  # what remains is float32 noise
    evidence: str = ""  # what the file itself shows for it
    element: tuple[str, tuple[int, ...], float] = ("", (), 0.0)  # a wrong element: weight, index, correction
    named: str = ""  # the tap to name, where it is an input of `tap` that arrives changed

    @property
    def merit(self) -> tuple[bool, float]:
        """What guesses are ranked by."""
        return self.explains, self.removed

    @property
    def likely(self) -> bool:
        """Whether to name it as the cause: it explains at least half of the error, or the file shows it."""
        return self.explains or self.removed >= 0.5 or bool(self.evidence)

    def applied(self, program: Program) -> Program:
        return program.with_(self.weights, self.runs, **self.config)

    def as_dict(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in ("cause", "tap", "text", "removed", "explains", "evidence")}


class Problem:
    """Operations whose inputs are known and some of whose results are."""

    def __init__(
        self,
        program: Program,
        call: Call,
        given: Mapping[str, Array],
        observed: Mapping[str, Array],
        suspects: Sequence[str],
    ) -> None:
        self.program, self.call = program, call
        self.given = {tap: value.astype(np.float64) for tap, value in given.items()}
        self.observed = {tap: value.astype(np.float64) for tap, value in observed.items()}
        self.suspects = list(suspects)
        names = tap_names(program.config)
        last = max(names.index(tap) for tap in observed)
        needed: set[str] = set()
        pending = list(observed)
        while pending:
            tap = pending.pop()
            if tap not in needed:
                needed.add(tap)
                pending += [i for i in tap_inputs(tap, program.config) if i not in self.given]
        self.taps = [tap for tap in names[: last + 1] if tap in needed]
        finite = {tap: np.nan_to_num(value, posinf=0, neginf=0) for tap, value in self.observed.items()}
        self.weights = {
            tap: 1 / (math.sqrt(float(np.square(value).sum()) * len(observed)) or 1.0) for tap, value in finite.items()
        }
        self.values = self.run(program)
        self.before = self.error(self.values)
        low = self.run(program, dtype=F32)
        noise = self.weighted({tap: low[tap] - self.values[tap] for tap in observed})
        with np.errstate(over="ignore"):
            self.noise = math.sqrt(sum(float(np.square(v).sum()) for v in noise.values()))

    def run(self, program: Program, first: str | None = None, dtype: Any = F64) -> dict[str, Array]:
        """All values of another program; operations before `first` keep the base program's."""
        start = self.taps.index(first) if first in self.taps else 0
        known = {**{t: self.values[t] for t in self.taps[:start]}, **self.given} if start else dict(self.given)
        for tap in self.taps[start:]:
            inputs = [self.given.get(i, known.get(i)) for i in tap_inputs(tap, program.config)]
            known[tap] = program.run(tap, self.call, inputs, dtype)  # type: ignore[arg-type]
        return known

    def weighted(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Arrays of the observed taps, scaled so that the sum of all squares is the relative squared error."""
        return {tap: value * self.weights[tap] for tap, value in arrays.items()}

    def residuals(self, values: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """observed - computed, weighted."""
        values = self.values if values is None else values
        return self.weighted({tap: target - values[tap] for tap, target in self.observed.items()})

    def error(self, values: Mapping[str, Array]) -> float:
        """Relative rms error over all observed taps; infinite where one is not finite."""
        total = 0.0
        for tap, target in self.observed.items():
            with np.errstate(over="ignore"):
                total += float(np.square(difference(values[tap], target) * self.weights[tap]).sum())
        return math.sqrt(total)

    def judge(self, guess: Guess) -> Guess:
        """Fill in how much of the error the guess removes."""
        after = self.error(self.run(guess.applied(self.program), guess.tap))
        guess.removed = 1 - after / self.before if self.before > 0 and math.isfinite(after) else -math.inf
        guess.explains = after <= NOISE_FACTOR * self.noise
        return guess


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


# ---------------------------------------------------------------- the catalogue of usual mistakes


def catalogue(problem: Problem, tap: str, forward: bool, alone: bool = False) -> Iterator[Guess]:
    """Mistakes whose right (or wrong) form is known, at one operation; `alone`: suspected or not."""
    layer, part = split_tap(tap)
    if part == "embed":
        yield from _embedding(problem)
    elif part in ("ln_1", "ln_2", "ln_f"):
        yield from _layer_norm(problem, tap, forward)
    elif part in ("attn.q", "attn.k", "attn.v"):
        # the three share one matrix: they are tried together, at the first of them that is suspected
        group = [f"h.{layer}.attn.{x}" for x in "qkv"]
        if alone or tap == next(t for t in group if t in problem.suspects):
            yield from _c_attn(problem, layer, forward)  # type: ignore[arg-type]
    elif part == "attn.scores":
        yield from _scale(problem, tap)
    elif part == "attn.probs":
        yield from _mask(problem, tap)
        if tap in problem.observed:
            yield from _other_softmax(problem, tap)
    elif part == "attn.heads" and forward:  # in a file, another order of heads is one of c_proj's rows
        yield from _merge(problem, tap)
    elif part in ("attn.out", "mlp.out", "mlp.c_fc"):
        yield from _linear(problem, tap, tap.replace(".out", ".c_proj"), forward)
    elif part == "mlp.gelu":
        now = problem.program.config.layer_activation(layer)  # type: ignore[arg-type]
        for form in reference.ACTIVATIONS:
            if form != now:
                yield Guess(
                    "gelu_form", tap, f"GELU form: {_swap_text(form, now, forward)}", runs={tap: _activation(form)}
                )
        if forward:
            yield from _other_activation(problem, tap, now)
    elif part in ("resid_mid", "resid_post"):
        yield Guess("missing_residual", tap, "the residual is not added", runs={tap: _without_residual})
    elif part == "logits":
        yield from _head(problem)
    if forward:
        yield from _other_input(problem, tap)
        yield from _rounded(problem, tap)


# What an operation is fed with by mistake: (which of its inputs, the tap that it reads). "{x}" is the layer's stream.
OTHER_INPUTS: dict[str, tuple[tuple[int, str], ...]] = {
    "ln_1": ((0, "{h}.resid_mid-1"), (0, "embed")),
    "attn.q": ((0, "{x}"),), "attn.k": ((0, "{x}"),), "attn.v": ((0, "{x}"),),
    "attn.scores": ((1, "{h}.attn.v"), (0, "{h}.attn.k"), (1, "{h}.attn.q"), (0, "{h}.attn.v")),
    "attn.heads": ((1, "{h}.attn.k"), (1, "{h}.attn.q")),
    "attn.out": ((0, "{h}.ln_1"),),
    "resid_mid": ((0, "{h}.ln_1"), (0, "embed")),
    "ln_2": ((0, "{x}"), (0, "{h}.attn.out"), (0, "{h}.ln_1")),
    "mlp.c_fc": ((0, "{h}.resid_mid"), (0, "{h}.ln_1"), (0, "{x}"), (0, "{h}.attn.out")),
    "resid_post": ((0, "{h}.ln_2"), (0, "{x}"), (0, "{h}.ln_1"), (0, "embed")),
    "ln_f": ((0, "{h}.resid_mid"), (0, "{h}.mlp.out"), (0, "embed")),
    "logits": ((0, "{x}"),),
}  # fmt: skip


def together(problem: Problem, tap: str) -> list[str]:
    """The taps that one matrix makes: q, k and v, or the tap alone."""
    if split_tap(tap)[1] not in ("attn.q", "attn.k", "attn.v"):
        return [tap]
    return [f"{tap[:-1]}{x}" for x in "qkv" if f"{tap[:-1]}{x}" in problem.taps]


def _other_input(problem: Problem, tap: str) -> Iterator[Guess]:
    """The operation is right and reads another tap: a norm left out, the residual taken from after the norm ..."""
    config = problem.program.config
    layer, part = split_tap(tap)
    stream = f"h.{(config.n_layer if layer is None else layer) - 1}.resid_post" if layer != 0 else "embed"
    block = f"h.{config.n_layer - 1 if layer is None else layer}"
    inputs = tap_inputs(tap, config)
    for which, name in OTHER_INPUTS.get(part, ()):
        if name.endswith("-1"):
            name = f"h.{(layer or 0) - 1}.resid_mid"
        name = name.format(h=block, x=stream)
        value = problem.given.get(name, problem.values.get(name))
        now = problem.values.get(inputs[which], problem.given.get(inputs[which]))
        if value is None or now is None or name == inputs[which] or value.shape != now.shape:
            continue

        def run(p: Program, c: Call, t: str, x: list[Array], dtype: Any, i: int = which, v: Array = value) -> Array:
            return problem.program.run(t, c, [v if j == i else old for j, old in enumerate(x)], dtype)

        group = together(problem, tap)
        text = f"{' and '.join(group)} read{'s' if len(group) == 1 else ''} {name} instead of {inputs[which]}"
        yield Guess("other_input", group[0], text, runs=dict.fromkeys(group, run))


def _swap_text(other: object, now: object, forward: bool) -> str:
    wrong, right = (other, now) if forward else (now, other)
    return f"{wrong} instead of {right}"


def _activation(form: str) -> Run:
    return lambda p, call, tap, x, dtype: reference.ACTIVATIONS[form](x[0])


def _other_activation(problem: Problem, tap: str, now: str) -> Iterator[Guess]:
    """None of GPT2Config's: none at all, or GELU by tanh with other constants, which the values tell."""

    def form(f: Callable[[Array], Array]) -> dict[str, Run]:
        return {tap: lambda p, call, name, x, dtype: f(x[0])}

    def tanh(k: float, c: float) -> Callable[[Array], Array]:
        return lambda x: 0.5 * x * (1 + np.tanh(k * x + c * x * x * x))

    yield Guess("gelu_form", tap, "no activation at all", runs=form(lambda x: x))
    square = form(lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x))))
    yield Guess("gelu_form", tap, "GELU form: x * x in place of x * x * x in the tanh", runs=square)
    x = problem.values.get(source := tap_inputs(tap, problem.program.config)[0], problem.given.get(source))
    if now == "gelu_tanh" and tap in problem.observed and x is not None:
        with np.errstate(all="ignore"):
            u = 2 * problem.observed[tap] / x - 1
            clear = (np.abs(u) < 0.99) & (np.abs(x) > 0.3)
        if clear.sum() > 8:
            x = x[clear]
            (k, c), *_ = np.linalg.lstsq(np.stack([x, x**3], axis=1), np.arctanh(u[clear]), rcond=None)
            if abs(c) < 1e-3 * abs(k):
                return  # a sigmoid, which is tried by name
            text = (
                f"GELU's constants: tanh({k:.6g} * (x + {c / k:.6g} * x^3)), not tanh(0.797885 * (x + 0.044715 * x^3))"
            )
            yield Guess("gelu_constant", tap, text, runs=form(tanh(float(k), float(c))))


def _without_residual(p: Program, call: Call, tap: str, x: list[Array], dtype: Any) -> Array:
    return x[1]


def _embedding(problem: Problem) -> Iterator[Guess]:
    N = problem.program.config.n_ctx

    def moved(by: int) -> Run:
        def run(p: Program, call: Call, tap: str, x: list[Array], dtype: Any) -> Array:
            return embed_at(p, call, (call.position_ids + by) % N, dtype)

        return run

    def without(p: Program, call: Call, tap: str, x: list[Array], dtype: Any) -> Array:
        return p.weights("wte.weight", dtype)[call.input_ids].astype(dtype)

    def at(rows: Array) -> Run:
        return lambda p, call, tap, x, dtype: embed_at(p, call, np.broadcast_to(rows, call.input_ids.shape), dtype)

    def scaled(p: Program, call: Call, tap: str, x: list[Array], dtype: Any) -> Array:
        wte = p.weights("wte.weight", dtype)[call.input_ids].astype(dtype)
        return np.asarray(wte * math.sqrt(wte.shape[-1]) + p.weights("wpe.weight", dtype)[call.position_ids])

    T = problem.call.input_ids.shape[1]
    if T > 1:
        yield Guess("positions", "embed", "every position is 0", runs={"embed": at(np.zeros(T, int))})
        yield Guess("positions", "embed", "positions run backwards", runs={"embed": at(np.arange(T)[::-1])})
    yield Guess("scaled_embedding", "embed", "the token vectors are multiplied by sqrt(C)", runs={"embed": scaled})
    for by in (1, -1, 2, -2):
        yield Guess("position_offset", "embed", f"positions are off by {abs(by)}", runs={"embed": moved(by)})
    start = problem.call.start
    if start:
        yield Guess(
            "position_offset",
            "embed",
            "positions start again at 0 after the cached ones",
            runs={"embed": moved(-start)},
        )
    yield Guess("missing_positions", "embed", "the position embedding is not added", runs={"embed": without})


def _layer_norm(problem: Problem, tap: str, forward: bool) -> Iterator[Guess]:
    p = problem.program
    now = p.config.epsilon(tap)

    def form(eps: float, outside: bool = False, ddof: int = 0, centre: bool = True) -> Run:
        def run(p: Program, call: Call, tap: str, x: list[Array], dtype: Any) -> Array:
            weight, bias, _ = p.norm(tap, dtype)
            centred = x[0] - x[0].mean(axis=-1, keepdims=True) if centre else x[0]
            variance = (centred * centred).sum(axis=-1, keepdims=True) / (x[0].shape[-1] - ddof)
            root = np.sqrt(variance) + eps if outside else np.sqrt(variance + eps)
            return np.asarray(centred / root * weight + bias)

        return run

    others = {p.config.epsilon(n) for n in norm_names(p)} | {p.config.layer_norm_epsilon}
    candidates = sorted({1e-5, 1e-6, 1e-8, 1e-12, 1e-4, 1e-3, 1e-2, 0.1, 0.0} | others)
    for eps in candidates:
        if not math.isclose(eps, now, rel_tol=1e-3):
            text = f"epsilon {_swap_text(f'{eps:g}', f'{now:g}', forward)}"
            yield Guess("epsilon_value", tap, text, runs={tap: form(eps)})
    for eps in sorted({now, 1e-5, *candidates[1:]}):
        yield Guess("epsilon_outside", tap, f"epsilon {eps:g} outside the root", runs={tap: form(eps, outside=True)})
    yield Guess("ddof", tap, "variance divided by C - 1 instead of C (ddof 1)", runs={tap: form(now, ddof=1)})

    def other(combine: Callable[[Array, Array, Array], Array], axis: Any = -1, root: bool = True) -> Run:
        def run(p: Program, call: Call, tap: str, x: list[Array], dtype: Any) -> Array:
            weight, bias, eps = p.norm(tap, dtype)
            centred = x[0] - x[0].mean(axis=axis, keepdims=True)
            variance = (centred * centred).mean(axis=axis, keepdims=True) + eps
            return np.asarray(combine(centred / (np.sqrt(variance) if root else variance), weight, bias))

        return run

    for text, run in {
        "weight and bias change places": other(lambda y, w, b: y * b + w),
        "the bias is added before the weight is multiplied": other(lambda y, w, b: (y + b) * w),
        "1 + weight in place of weight": other(lambda y, w, b: y * (1 + w) + b),
        "divided by the variance, not by its root": other(lambda y, w, b: y * w + b, root=False),
        "mean and variance over the positions": other(lambda y, w, b: y * w + b, axis=-2),
        "mean and variance over positions and width together": other(lambda y, w, b: y * w + b, axis=(-1, -2)),
        "neither weight nor bias is applied": other(lambda y, w, b: y),
    }.items():
        yield Guess("norm_form", tap, f"{tap}: {text}", runs={tap: run})
    yield Guess("missing_norm", tap, f"{tap} is not applied", runs={tap: lambda p, call, name, x, dtype: x[0]})
    yield Guess("no_centring", tap, "the mean is not taken off (RMS norm)", runs={tap: form(now, centre=False)})
    yield Guess(
        "missing_weight", tap, f"{tap}.weight is not applied",
        weights={f"{tap}.weight": np.ones(p.config.n_embd)},
    )  # fmt: skip
    yield from _other_weights(problem, tap, tap, [n for n in norm_names(p) if n != tap], forward)


def norm_names(p: Program) -> list[str]:
    """Every layer norm of the model."""
    return [f"h.{i}.{n}" for i in range(p.config.n_layer) for n in ("ln_1", "ln_2")] + ["ln_f"]


def _other_weights(problem: Problem, tap: str, name: str, others: list[str], forward: bool) -> Iterator[Guess]:
    """Missing bias, another layer's weights, rounding: what can happen to the weight and bias of any map."""
    w = problem.program.weights
    for other in others:
        both = {f"{name}.{kind}": w(f"{other}.{kind}", F64) for kind in ("weight", "bias")}
        yield Guess("other_layer", tap, f"weight and bias of {other} in place of {name}'s", weights=both)
        for kind in ("weight", "bias"):
            one = {f"{name}.{kind}": both[f"{name}.{kind}"]}
            yield Guess("other_layer", tap, f"{other}.{kind} in place of {name}.{kind}", weights=one)
    bias = w(f"{name}.bias", F64)
    if bias.any():
        yield Guess("missing_bias", tap, f"{name}.bias is missing", weights={f"{name}.bias": np.zeros_like(bias)})
        yield Guess("bias_twice", tap, f"{name}.bias is added twice", weights={f"{name}.bias": 2 * bias})


SIXTEEN_BITS = ("bf16", "fp16")
ROUNDINGS = (*SIXTEEN_BITS, "tf32", "fp8_e4m3", "fp8_e5m2")


def rounded(x: Array, kind: str) -> Array:
    """x as a narrower float can hold it, in float64."""
    import ml_dtypes

    x = x.astype(np.float32)
    if kind == "tf32":  # float32 with 10 of its 23 bits of significand
        return ((x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    narrow = {
        "bf16": ml_dtypes.bfloat16, "fp16": np.float16,
        "fp8_e4m3": ml_dtypes.float8_e4m3fn, "fp8_e5m2": ml_dtypes.float8_e5m2,
    }[kind]  # fmt: skip
    with np.errstate(all="ignore"):
        return x.astype(narrow).astype(np.float64)


def quantised(x: Array, by_column: bool) -> Array:
    """A matrix as 8-bit integers with one scale, or one for each column, hold it."""
    scale = np.abs(x).max(axis=0 if by_column else None, keepdims=True) / 127
    return np.rint(x / np.where(scale > 0, scale, 1)) * scale


def _rounded(problem: Problem, tap: str) -> Iterator[Guess]:
    """Weights, result or inputs of an operation in a narrower float, or all of them; weights in 8-bit integers."""
    p = problem.program
    group = together(problem, tap)
    if tap != group[0]:
        return
    names = list(dict.fromkeys(name for name, of in weight_names(problem) if of in group))
    inputs = tap_inputs(tap, p.config)
    subject = " and ".join(group)
    matrices = [n for n in names if p.weights(n, F64).ndim == 2 and not n.startswith(("wte", "lm_head"))]
    local = group[0] in problem.observed
    for name in matrices if local else ():
        value = p.weights(name, F64).astype(np.float64)
        for by_column, words in ((False, "one scale"), (True, "a scale for each column")):
            text = f"{name} is quantised to int8 with {words}"
            yield Guess("quantised", group[0], text, weights={name: quantised(value, by_column)})
    for kind in ROUNDINGS if local else SIXTEEN_BITS:
        both = {name: rounded(p.weights(name, F64).astype(np.float64), kind) for name in names}
        for name, value in both.items():
            yield Guess("rounding", group[0], f"{name} is rounded to {kind}", weights={name: value})
        if len(both) > 1:
            yield Guess("rounding", group[0], f"{' and '.join(both)} are rounded to {kind}", weights=both)
        every = set(range(len(inputs)))
        if kind != "tf32":  # what tensor cores read, not what they write
            runs = {t: _rounded_run(p, kind, set(), True) for t in group}
            text = f"{subject} {'is' if len(group) == 1 else 'are'} rounded to {kind}"
            yield Guess("rounding", group[0], text, runs=runs)
        for i, name in enumerate(inputs):
            text = f"{name} is rounded to {kind} before {subject} read{'s' if len(group) == 1 else ''} it"
            guess = Guess("rounding", group[0], text, runs={t: _rounded_run(p, kind, {i}, False) for t in group})
            guess.named = name
            yield guess
        if local and (both or len(inputs) > 1):
            for result in (False, True):
                text = f"everything that {subject} read{'s' if len(group) == 1 else ''} is rounded to {kind}"
                text += ", and the result" if result else ""
                runs = {t: _rounded_run(p, kind, every, result) for t in group}
                some = {name: value for name, value in both.items() if result or name in matrices}
                yield Guess("rounding", group[0], text, weights=some, runs=runs)


def _rounded_run(p: Program, kind: str, which: set[int], result: bool) -> Run:
    def run(q: Program, call: Call, tap: str, x: list[Array], dtype: Any) -> Array:
        base = q.with_(runs={tap: RUNS[split_tap(tap)[1]]})
        value = base.run(tap, call, [rounded(v, kind) if i in which else v for i, v in enumerate(x)], dtype)
        return rounded(value, kind) if result else value

    return run


def _linear(problem: Problem, tap: str, name: str, forward: bool) -> Iterator[Guess]:
    p = problem.program
    layer, part = split_tap(tap)
    key = f"{name}.weight"
    weight = p.weights(key, F64)
    rows, columns = weight.shape
    if rows == columns:
        yield Guess("transposed", tap, f"{key} is transposed", weights={key: weight.T})
    else:
        for flipped in (weight.reshape(columns, rows).T, weight.T.reshape(rows, columns)):
            yield Guess("transposed", tap, f"{key} is read as ({columns}, {rows}) transposed", weights={key: flipped})
    if part == "attn.out":
        H = p.config.n_head
        heads = weight.reshape(H, rows // H, columns)
        for a, b in combinations(range(H), 2):
            order = list(range(H))
            order[a], order[b] = b, a
            yield Guess(
                "swapped_heads", tap, f"{key}: heads {a} and {b} are swapped",
                weights={key: heads[order].reshape(rows, columns)},
            )  # fmt: skip
        for text, mixed in (
            ("(D, H) instead of (H, D)", heads.transpose(1, 0, 2)),
            ("(H, D) instead of (D, H)", weight.reshape(rows // H, H, columns).transpose(1, 0, 2)),
        ):
            yield Guess("head_split", tap, f"{key}: rows ordered {text}", weights={key: mixed.reshape(rows, columns)})
    stem = name.split(".", 2)[2]
    others = [f"h.{i}.{stem}" for i in range(p.config.n_layer) if i != layer]
    yield from _other_weights(problem, tap, name, others, forward)


def _c_attn(problem: Problem, layer: int, forward: bool) -> Iterator[Guess]:
    p = problem.program
    name = f"h.{layer}.attn.c_attn"
    taps = [f"h.{layer}.attn.{x}" for x in "qkv"]
    H, D = p.config.n_head, p.config.head_size
    weight, bias = p.weights(f"{name}.weight", F64), p.weights(f"{name}.bias", F64)
    C = len(weight)

    def columns(order: Array) -> dict[str, Array]:
        return {f"{name}.weight": weight[:, order], f"{name}.bias": bias[order]}

    grid = np.arange(3 * H * D).reshape(3, H, D)
    for order in permutations(range(3)):
        if order != (0, 1, 2):
            first = next(i for i in range(3) if order[i] != i)
            names = ", ".join("qkv"[i] for i in order)
            yield Guess(
                "qkv_order",
                taps[first],
                f"c_attn's thirds in the order {names}",
                weights=columns(grid[list(order)].ravel()),
            )
    index = grid.ravel()
    for text, order_in in (
        ("(H, 3, D)", index.reshape(H, 3, D).transpose(1, 0, 2)),
        ("(H, D, 3)", index.reshape(H, D, 3).transpose(2, 0, 1)),
        ("(3, D, H)", index.reshape(3, D, H).transpose(0, 2, 1)),
        ("(D, 3, H)", index.reshape(D, 3, H).transpose(1, 2, 0)),
        ("(D, H, 3)", index.reshape(D, H, 3).transpose(2, 1, 0)),
    ):
        there = order_in.ravel()
        back = np.argsort(there)
        for order_of, words in ((there, f"{text} read as (3, H, D)"), (back, f"(3, H, D) read as {text}")):
            yield Guess("head_split", taps[0], f"head split interleaved: {words}", weights=columns(order_of))
    for which in [(0,), (1,), (2,), (0, 1, 2)]:
        if C == H * D:
            new = weight.copy()
            for w in which:
                new[:, w * C : (w + 1) * C] = weight[:, w * C : (w + 1) * C].T
            letters = "".join("qkv"[w] for w in which)
            yield Guess(
                "transposed",
                taps[which[0]],
                f"{name}.weight: the {letters} part is transposed",
                weights={f"{name}.weight": new},
            )
    for flipped in (weight.reshape(3 * H * D, C).T, weight.T.reshape(C, 3 * H * D)):
        yield Guess(
            "transposed",
            taps[0],
            f"{name}.weight is read as ({3 * H * D}, {C}) transposed",
            weights={f"{name}.weight": flipped},
        )

    def unmoved(q: Program, call: Call, tap: str, x: list[Array], dtype: Any) -> Array:
        value = p.run(tap, call, x, dtype)  # (B, H, T, D)
        return value.transpose(0, 2, 1, 3).reshape(value.shape)

    if forward and problem.call.input_ids.shape[1] > 1:
        text = "(B, T, HD) reshaped to (B, H, T, D) without transposing"
        yield Guess("head_split", taps[0], text, runs=dict.fromkeys(taps, unmoved))
    for heads, which, first in _head_orders(problem, layer):
        swapped = grid.copy()
        for w in which:
            swapped[w] = grid[w][heads]
        moved = [i for i in range(H) if heads[i] != i]
        letters = ", ".join("qkv"[w] for w in which)
        yield Guess(
            "swapped_heads", taps[first], f"heads {' and '.join(map(str, moved))} of {letters} are swapped",
            weights=columns(swapped.ravel()),
        )  # fmt: skip
    others = [f"h.{i}.attn.c_attn" for i in range(p.config.n_layer) if i != layer]
    first_tap = next((t for t in taps if t in problem.suspects), taps[0])
    yield from _other_weights(problem, first_tap, name, others, forward)
    for w, tap in enumerate(taps):
        part = slice(w * H * D, (w + 1) * H * D)
        if bias[part].any():
            changed = bias.copy()
            changed[part] = 0
            yield Guess(
                "missing_bias", tap, f"the {'qkv'[w]} part of {name}.bias is missing", weights={f"{name}.bias": changed}
            )


def _head_orders(problem: Problem, layer: int) -> Iterator[tuple[list[int], tuple[int, ...], int]]:
    """Orders of heads that q, k, v may have been swapped into: (order, which of q, k, v, first of them).

    Where k, v (or q) are observed, their heads are matched directly; q alone is tried pair by pair.
    """
    H = problem.program.config.n_head
    same = list(range(H))
    found: dict[int, list[int]] = {}
    for w, letter in enumerate("qkv"):
        tap = f"h.{layer}.attn.{letter}"
        if tap in problem.observed:
            target, value = problem.observed[tap], problem.values[tap]  # (B, H, T, D)
            if not (np.isfinite(target).all() and np.isfinite(value).all()):
                return
            cost = np.array([[float(np.square(target[:, a] - value[:, b]).mean()) for b in same] for a in same])
            order = [int(i) for i in cost.argmin(axis=1)]
            if sorted(order) == same and order != same:
                found[w] = order
    for w, order in found.items():
        yield order, (w,), w
    for orders in {tuple(o) for o in found.values()}:
        fitting = tuple(w for w in found if found[w] == list(orders))
        yield list(orders), fitting, fitting[0]
        if 0 not in found:
            yield list(orders), (0, *fitting), 0
    if not found:
        for a, b in combinations(same, 2):
            order = same.copy()
            order[a], order[b] = b, a
            for which in ((0,), (0, 1, 2), (1, 2), (1,), (2,), (0, 1)):
                if not any(f"h.{layer}.attn.{'qkv'[w]}" in problem.observed for w in which):
                    yield order, which, which[0]


def _scale(problem: Problem, tap: str) -> Iterator[Guess]:
    p = problem.program
    layer = split_tap(tap)[0]
    assert layer is not None
    now, D = p.config.layer_scale(layer), p.config.head_size
    right = 1 / math.sqrt(D)

    def factor(value: float) -> Run:
        return lambda q, call, name, x, dtype: np.asarray(p.run(name, call, x, dtype) * (value / now))

    candidates = {
        "1/sqrt(D)": right, "missing": 1.0, "applied twice (1/D)": right * right, "doubled (2/sqrt(D))": 2 * right,
        "halved (0.5/sqrt(D))": right / 2, "1/sqrt(C)": 1 / math.sqrt(p.config.n_embd), "sqrt(D)": math.sqrt(D),
        "1/D^0.25": D**-0.25, f"1/sqrt(D)/{layer + 1} (by layer)": right / (layer + 1),
        "4/sqrt(D)": 4 * right, "0.25/sqrt(D)": right / 4,
        "another layer's": p.config.attn_scale or right,
    }  # fmt: skip
    for text, value in candidates.items():
        if not math.isclose(value, now, rel_tol=1e-4):
            words = f"the scale of the scores is {now:.5g}, not {value:.5g}: {text}"
            yield Guess("scale", tap, words, runs={tap: factor(value)})


def _mask(problem: Problem, tap: str) -> Iterator[Guess]:
    """Masks by what GPT2Config can say of them: which keys are forbidden, and what their scores become."""
    now = problem.program.config
    call = problem.call

    def masked(**change: Any) -> Run:
        config = replace(now, **change)

        return lambda p, call, name, x, dtype: masked_softmax(x[0], config, call.attention_mask)

    def keys(shift: int) -> str:
        return "query i sees keys up to i" + (f" {'+-'[shift < 0]} {abs(shift)}" if shift else "")

    S = call.start + call.input_ids.shape[1]
    for shift in (0, 1, -1, 2):
        if shift != now.causal_shift or now.mask_kind == "none":
            cause = "mask_missing" if now.mask_kind == "none" else "mask_shift"
            text = f"mask off by {abs(shift - now.causal_shift)}: {keys(shift)}, not {keys(now.causal_shift)}"
            change = {"mask_kind": "replaced", "mask_value": -1e4} if now.mask_kind == "none" else {}
            yield Guess(cause, tap, text, runs={tap: masked(causal_shift=shift, **change)})
    yield Guess("mask_missing", tap, "no causal mask at all", runs={tap: masked(mask_kind="none", causal_shift=S)})
    values: list[tuple[float, str]] = [
        (v, k) for v in (-1e4, -1.0, -2.0, -5.0, -10.0, -20.0, -50.0, -100.0, -1e3) for k in ("replaced", "added")
    ]
    for value, kind in [*values, (0.0, "replaced"), *_fitted_mask(problem, tap)]:
        if (value, kind) != (now.mask_value, now.mask_kind):
            text = f"mask value: {now.mask_value:.5g} {now.mask_kind}, not {value:.5g} {kind}"
            yield Guess("mask_value", tap, text, runs={tap: masked(mask_value=value, mask_kind=kind)})


def _other_softmax(problem: Problem, tap: str) -> Iterator[Guess]:
    """Softmaxes that are none, and masks that GPT2Config has no words for: the probabilities show both."""
    scores = problem.values.get(source := tap_inputs(tap, problem.program.config)[0], problem.given.get(source))
    probs = problem.observed[tap]
    if scores is None or not np.isfinite(scores).all():
        return
    T, S = scores.shape[-2:]
    causal = np.arange(S) <= np.arange(S - T, S)[:, None]
    allowed = np.where(causal, scores, -np.inf)
    exps = np.exp(allowed - allowed.max(axis=-1, keepdims=True))
    columns = np.exp(allowed - np.maximum(allowed.max(axis=-2, keepdims=True), np.finfo(np.float64).min))
    unmasked = np.exp(scores - scores.max(axis=-1, keepdims=True))

    def instead(value: Array) -> dict[str, Run]:
        return {tap: lambda p, call, name, x, dtype: value}

    yield Guess("softmax_form", tap, "exp without the division by the sum", runs=instead(exps))
    yield Guess("softmax_form", tap, "softmax over the queries, not over the keys",
                runs=instead(columns / np.maximum(columns.sum(axis=-2, keepdims=True), 1e-300)))  # fmt: skip
    yield Guess("softmax_form", tap, "masked after the softmax: the rows do not sum to 1",
                runs=instead(np.where(causal, unmasked / unmasked.sum(axis=-1, keepdims=True), 0)))  # fmt: skip
    seen = np.asarray(np.greater(probs, 0).any(axis=(0, 1)))  # (T, S): keys that some head looks at
    different = np.flatnonzero(np.not_equal(seen, causal).any(axis=-1))
    if len(different) and seen.any(axis=-1).all():
        rows = []
        for row in sorted({int(different[0]), int(different[-1])}):
            keys = np.flatnonzero(seen[row])
            some = "some of " if len(keys) <= keys[-1] - keys[0] else ""
            rows.append(f"query {row} sees {some}keys {keys[0]} to {keys[-1]}, not 0 to {row + S - T}")
        exps = np.where(seen, np.exp(scores - np.where(seen, scores, -np.inf).max(axis=-1, keepdims=True)), 0)
        text = f"another mask: {'; '.join(rows)}"
        yield Guess("mask_shape", tap, text, runs=instead(exps / exps.sum(axis=-1, keepdims=True)))


def _fitted_mask(problem: Problem, tap: str) -> list[tuple[float, str]]:
    """The mask value that observed probabilities imply: log p - score is one constant per row, up to it."""
    if tap not in problem.observed:
        return []
    probs, scores = problem.observed[tap], problem.values[tap_inputs(tap, problem.program.config)[0]]
    T, S = scores.shape[-2:]
    forbidden = np.arange(S) > np.arange(S - T, S)[:, None]
    forbidden = np.broadcast_to(forbidden, probs.shape) & (probs > 1e-30)
    if not forbidden.any():
        return []
    with np.errstate(divide="ignore"):
        log = np.log(probs)
    diagonal = np.arange(S - T, S)[None, None, :, None]
    own = np.take_along_axis(log - scores, np.broadcast_to(diagonal, (*probs.shape[:3], 1)), axis=-1)
    effective = (log - own)[forbidden]
    added = effective - scores[forbidden]
    fitted = [(float(np.median(effective)), "replaced"), (float(np.median(added)), "added")]
    return [(value, kind) for value, kind in fitted if abs(value) > 1e-3]


def _merge(problem: Problem, tap: str) -> Iterator[Guess]:
    H, D = problem.program.config.n_head, problem.program.config.head_size

    def unmoved(p: Program, call: Call, name: str, x: list[Array], dtype: Any) -> Array:
        merged = problem.program.run(name, call, x, dtype)  # (B, T, HD)
        B, T, _ = merged.shape
        return merged.reshape(B, T, H, D).transpose(0, 2, 1, 3).reshape(B, T, H * D)

    yield Guess("head_split", tap, "(B, H, T, D) reshaped to (B, T, HD) without transposing", runs={tap: unmoved})

    def ordered(order: Array) -> Run:
        return lambda p, call, name, x, dtype: problem.program.run(name, call, x, dtype)[..., order]

    grid = np.arange(H * D).reshape(H, D)
    yield Guess("head_split", tap, "heads merged as (D, H)", runs={tap: ordered(grid.T.ravel())})
    yield Guess("head_split", tap, "heads merged from (D, H)", runs={tap: ordered(np.argsort(grid.T.ravel()))})
    for a, b in combinations(range(H), 2):
        order = grid.copy()
        order[[a, b]] = order[[b, a]]
        yield Guess("swapped_heads", tap, f"heads {a} and {b} are swapped", runs={tap: ordered(order.ravel())})


def _head(problem: Problem) -> Iterator[Guess]:
    p = problem.program
    if not p.config.tied:
        wte = p.weights("wte.weight", F64)
        yield Guess("untied_head", "logits", "the head is not wte (untied)", weights={p.head: wte})


# ---------------------------------------------------------------- what has to be solved for


def tap_of_element(program: Program, call: Call, name: str, index: tuple[int, ...]) -> str:
    """The first tap that one element of a weight changes."""
    if not name.startswith("h."):
        stem = name.rsplit(".", 1)[0]
        if stem == "wte" and not (call.input_ids == index[0]).any():
            return "logits"  # of a tied head; no token of the input uses this row
        return {"wte": "embed", "wpe": "embed", "ln_f": "ln_f"}.get(stem, "logits")
    _, layer, stem = name.rsplit(".", 1)[0].split(".", 2)
    if stem == "attn.c_attn":
        width = program.config.n_head * program.config.head_size
        return f"h.{layer}.attn.{'qkv'[index[-1] // width]}"
    return f"h.{layer}.{stem.replace('c_proj', 'out')}"


def single_elements(problem: Problem) -> list[Guess]:
    """The single weight element whose change would explain the error best.

    To first order, changing element j by d changes the outputs by J_j d. The error that the best d removes is
    (J_j . e)^2 / |J_j|^2: the numerator for all elements comes from one backward pass over the error e, the
    denominator from backward passes over random vectors r, as the mean of (J_j . r)^2. The most promising ones
    of every weight are then solved exactly.
    """
    program = problem.program
    probes = 256 if len(problem.taps) <= 3 else 16
    back = Gradients(program, problem.call, problem.values, problem.taps)
    numerator = back(problem.weighted(problem.residuals()))
    rng = np.random.default_rng(0)
    norms: dict[str, Array] = {name: np.zeros_like(g) for name, g in numerator.items()}
    for _ in range(probes):
        noise = {tap: rng.standard_normal(t.shape) for tap, t in problem.observed.items()}
        for name, g in back(problem.weighted(noise)).items():
            norms[name] += g * g / probes
    candidates: list[tuple[str, tuple[int, ...], float]] = []
    for name, g in numerator.items():
        seen = norms[name] > 0
        floor = float(np.median(norms[name][seen])) * 0.05 if seen.any() else 1.0
        score = g * g / (norms[name] + floor)
        for flat in np.argpartition(-score.ravel(), min(3, score.size - 1))[:4]:
            index = tuple(int(i) for i in np.unravel_index(int(flat), score.shape))
            candidates.append((name, index, float(g[index] / (norms[name][index] + floor))))
        # an element far out of its matrix's range is a suspect in itself: large errors are not linear
        value = program.weights(name, F64).astype(np.float64)
        middle = float(np.median(value))
        spread = float(np.median(np.abs(value - middle))) / 0.6745 or 1.0
        extreme = tuple(int(i) for i in np.unravel_index(int(np.abs(value - middle).argmax()), value.shape))
        if abs(value[extreme] - middle) > 6 * spread:
            candidates.append((name, extreme, middle - float(value[extreme])))
    placed = [(n, index, step, tap_of_element(program, problem.call, n, index)) for n, index, step in candidates]
    rough = [solve_element(problem, *c, rounds=2) for c in placed if c[3] in problem.suspects]
    rough.sort(key=lambda g: -g.removed)
    found = [solve_element(problem, *g.element, g.tap, rounds=8) for g in rough[:3]]
    return sorted(found, key=lambda g: -g.removed)


def solve_element(problem: Problem, name: str, index: tuple[int, ...], step: float, tap: str, rounds: int) -> Guess:
    """The value of one element that removes most of the error, by Gauss-Newton steps on that number alone."""
    base = problem.program.weights(name, F64).astype(np.float64)

    def changed(value: float) -> Array:
        new = base.copy()
        new[index] = value
        return new

    def residual(value: float) -> Array:
        values = problem.run(problem.program.with_({name: changed(value)}), tap)
        return np.concatenate([r.ravel() for r in problem.residuals(values).values()])

    old = float(base[index])
    value, best_value = old + step, old
    best = float(np.square(residual(old)).sum())
    for _ in range(rounds):
        e = residual(value)
        size = float(np.square(e).sum())
        if size < best:
            best, best_value = size, value
        h = 1e-4 * max(abs(value), 1e-2)
        slope = (residual(value + h) - e) / h
        bottom = float(np.square(slope).sum())
        if not (bottom > 0 and math.isfinite(bottom) and math.isfinite(size)):
            break
        move = -float((slope * e).sum()) / bottom
        value += move
        if abs(move) < 1e-9 * max(abs(value), 1e-3):
            break
    place = "[" + ", ".join(map(str, index)) + "]"
    text = f"one element of {name}: {place} is {old:.6g}, where {best_value:.6g} fits"
    guess = Guess("corrupted_element", tap, text, weights={name: changed(best_value)})
    guess.element = (name, index, best_value - old)
    return problem.judge(guess)


def absent_biases(problem: Problem) -> list[Guess]:
    """For each bias that is all zeros among others that are not: would a bias remove the error?"""
    found = []
    for name, tap in suspect_biases(problem):
        bias = problem.program.weights(name, F64)
        if not bias.any():
            found.append(solve_bias(problem, name, tap))
    H, D = problem.program.config.n_head, problem.program.config.head_size
    for tap in problem.suspects:
        layer, part = split_tap(tap)
        if part in ("attn.q", "attn.k", "attn.v"):
            w = "qkv".index(part[-1])
            name = f"h.{layer}.attn.c_attn.bias"
            bias = problem.program.weights(name, F64)
            if bias.any() and not bias[w * H * D : (w + 1) * H * D].any():
                found.append(solve_bias(problem, name, tap))
    return found


def suspect_biases(problem: Problem) -> Iterator[tuple[str, str]]:
    """Name of each bias that a suspected tap adds, with that tap; c_attn's once, at its first tap."""
    seen = set()
    for tap in problem.suspects:
        _, part = split_tap(tap)
        if part in ("ln_1", "ln_2", "ln_f"):
            name = f"{tap}.bias"
        elif part in ("attn.q", "attn.k", "attn.v"):
            name = f"{tap[:-2]}.c_attn.bias"
        elif part in ("attn.out", "mlp.out", "mlp.c_fc"):
            name = f"{tap.replace('.out', '.c_proj')}.bias"
        else:
            continue
        if name not in seen:
            seen.add(name)
            yield name, tap


def solve_bias(problem: Problem, name: str, tap: str, rounds: int = 3, steps: int = 24) -> Guess:
    """The bias that removes most of the error: Gauss-Newton, each step by conjugate gradients."""
    base = problem.program.weights(name, F64)
    delta = np.zeros_like(base)
    for _ in range(rounds):
        program = problem.program.with_({name: base + delta})
        values = problem.run(program, tap)
        residual = problem.residuals(values)
        error = sum(float(np.square(r).sum()) for r in residual.values())
        if not math.isfinite(error) or error < 1e-14:
            break
        back = Gradients(program, problem.call, values, problem.taps)

        def along(d: Array, program: Program = program, values: dict[str, Array] = values) -> dict[str, Array]:
            h = 1e-5 / (float(np.abs(d).max()) or 1.0)
            moved = problem.run(program.with_({name: program.weights(name, F64) + h * d}), tap)
            return problem.weighted({t: (moved[t] - values[t]) / h for t in problem.observed})

        x = np.zeros_like(base)
        s = back(problem.weighted(residual))[name]
        p, gamma = s.copy(), float((s * s).sum())
        first = gamma
        for _ in range(min(steps, base.size)):
            if gamma <= 1e-12 * first or gamma == 0:
                break
            q = along(p)
            bottom = sum(float(np.square(v).sum()) for v in q.values())
            if bottom == 0:
                break
            a = gamma / bottom
            x = x + a * p
            residual = {t: residual[t] - a * q[t] for t in residual}
            s = back(problem.weighted(residual))[name]
            gamma, old = float((s * s).sum()), gamma
            p = s + gamma / old * p
        delta = delta + x
    size = float(np.sqrt((delta**2).mean()))
    text = f"{name} is missing: it is all zeros, where one of rms {size:.3g} fits"
    return problem.judge(Guess("missing_bias", tap, text, weights={name: base + delta}))


# ---------------------------------------------------------------- what the error itself shows


def shape_of_the_error(problem: Problem) -> Iterator[Guess]:
    """Where no mistake of the catalogue fits: a copy, a constant factor, a clipped range, or plain imprecision."""
    noise: list[tuple[float, bool]] = []  # error by value of each tap, and whether it is without direction
    for tap, value in problem.observed.items():
        expected = problem.values[tap]
        if not value.any():
            yield Guess("never_written", tap, f"{tap} is all zeros", removed=1.0, evidence="in what it gave")
            continue
        for other, twin in problem.given.items():
            if other != tap and twin.shape == value.shape and np.array_equal(twin, value):
                text = f"{tap} is {other} over again"
                yield Guess("copied", tap, text, removed=1.0, evidence="equal in what it gave")
        bad = ~np.isfinite(value)
        if bad.any() and np.isfinite(expected).all():
            at = tuple(int(i) for i in np.argwhere(bad)[0])
            text = f"{tap}{list(at)} is {value[at]:g}, where {expected[at]:.6g} belongs"
            if np.abs(expected).max() > 65504:
                text += "; float16 ends at 65504"
            yield Guess("not_finite", tap, text, removed=1.0, evidence=f"{int(bad.sum())} of {bad.size} numbers")
        if bad.any() or not np.isfinite(expected).all():
            continue
        error = value - expected
        size, rms = float(np.sqrt(np.mean(error**2))), float(np.sqrt(np.mean(expected**2)))
        if size == 0 or rms == 0:
            continue
        factor = float((value * expected).sum() / (expected * expected).sum())
        low, high = float(value.min()), float(value.max())
        for cause, text, change in (
            ("factor", f"multiplied by {factor:.6g}", partial(np.multiply, factor)),
            ("clipped", f"clipped to {low:.6g} ... {high:.6g}", partial(np.clip, min=low, max=high)),
        ):
            runs = {tap: _afterwards(problem, change)}
            guess = problem.judge(Guess(cause, tap, f"{tap} is {text}", runs=runs))
            if guess.removed > 0.5:
                yield guess
        sizes = np.linalg.svd(error.reshape(-1, error.shape[-1]), compute_uv=False) ** 2
        along = abs(float((error * expected).mean())) / (size * rms)
        noise.append((size / rms, along < 0.1 and sizes[0] < 0.5 * sizes.sum()))
    largest = max((share for share, _ in noise), default=0.0)
    if 2**-20 < largest < 1 / 32 and all(free for share, free in noise if share > largest / 16):
        text = f"arithmetic of about {math.floor(-math.log2(largest))} bits: sums, an approximation or intermediate "
        evidence = f"the error has no direction; it is {largest:.1e} of the value"
        tap = next(iter(problem.observed))
        yield Guess("imprecise", tap, text + "results in a narrow type", removed=0.3, evidence=evidence)


def _afterwards(problem: Problem, change: Callable[[Array], Array]) -> Run:
    return lambda p, call, tap, x, dtype: change(problem.program.run(tap, call, x, dtype))


# ---------------------------------------------------------------- what the file itself shows


def shown_by_the_file(problem: Problem) -> list[Guess]:
    """Oddities among the suspected operations' weights that cannot be undone, only pointed at."""
    found: list[Guess] = []
    found += same_as_another_layer(problem)
    found += representable_in_16_bits(problem)
    return found


def weight_names(problem: Problem) -> Iterator[tuple[str, str]]:
    """Every weight of the suspected operations with its tap, once each."""
    seen = set()
    for tap in problem.suspects:
        _, part = split_tap(tap)
        names: list[str] = []
        if part in ("ln_1", "ln_2", "ln_f"):
            names = [f"{tap}.weight", f"{tap}.bias"]
        elif part in ("attn.q", "attn.k", "attn.v"):
            names = [f"{tap[:-2]}.c_attn.weight", f"{tap[:-2]}.c_attn.bias"]
        elif part in ("attn.out", "mlp.out", "mlp.c_fc"):
            names = [f"{tap.replace('.out', '.c_proj')}.{kind}" for kind in ("weight", "bias")]
        elif part == "embed":
            names = ["wte.weight", "wpe.weight"]
        elif part == "logits":
            names = [problem.program.head]
        for name in names:
            if name not in seen:
                seen.add(name)
                yield name, tap


def same_as_another_layer(problem: Problem) -> list[Guess]:
    found = []
    p = problem.program
    for name, tap in weight_names(problem):
        if not name.startswith("h."):
            continue
        _, layer, stem = name.split(".", 2)
        mine = p.weights(name, F64)
        if not mine.any() or (mine == mine.flat[0]).all():
            continue
        for i in range(p.config.n_layer):
            if i != int(layer) and np.array_equal(mine, p.weights(f"h.{i}.{stem}", F64)):
                words = f"{name} is element for element h.{i}.{stem}: another layer's weight"
                found.append(Guess("other_layer", tap, words, removed=CERTAIN, evidence="equal in the file"))
                break
    return found


def representable_in_16_bits(problem: Problem) -> list[Guess]:
    """Weights that a 16-bit float holds exactly, in a file whose other weights it does not."""
    p = problem.program
    found = []
    for kind in SIXTEEN_BITS:
        exact = {}
        for name, tap in weight_names(problem):
            value = p.weights(name, F64).astype(np.float64)
            if value.any() and value.size > 32:
                exact[name] = (tap, bool((rounded(value, kind) == value).all()))
        rounded_ones = [(name, tap) for name, (tap, is_exact) in exact.items() if is_exact]
        if not rounded_ones:
            continue
        for name, tap in rounded_ones:
            share = expected_rounding_error(problem, name, tap, kind)
            if 0.2 < share < 5:
                alone = len(rounded_ones) < len(exact)
                words = f"{name} holds {kind} values only: rounded to {kind}"
                guess = Guess("rounding", tap, words, evidence=f"error is {share:.2g} x what such rounding makes")
                guess.removed = CERTAIN if alone else 0.5
                found.append(guess)
    return found


def expected_rounding_error(problem: Problem, name: str, tap: str, kind: str) -> float:
    """Error of the problem over the error that rounding errors of this size, drawn at random, would make."""
    value = problem.program.weights(name, F64).astype(np.float64)
    bits = 8 if kind == "bf16" else 11  # of the significand
    _, exponent = np.frexp(value)
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, value.shape) * np.ldexp(1.0, exponent - bits)
    moved = problem.run(problem.program.with_({name: value + noise}), tap)
    made = problem.weighted({t: moved[t] - problem.values[t] for t in problem.observed})
    size = math.sqrt(sum(float(np.square(v).sum()) for v in made.values()))
    return problem.before / size if size > 0 else math.inf
