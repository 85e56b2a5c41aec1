"""Weights whose right value is not known beforehand and is solved for: one element, or a whole bias."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from ...call import Call
from ...weights import Array
from ..operations import linear_of, split_tap
from ..program import Program
from .gradients import F64
from .problem import Guess, Problem, weight_names

COLUMNS = 12  # that are run to the end in a large model


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


def single_elements(problem: Problem) -> Iterator[Guess]:
    """The single weight element whose change would explain the error best.

    To first order, changing element j by d changes the outputs by J_j d. The error that the best d removes is
    (J_j . e)^2 / |J_j|^2: the numerator for all elements comes from one backward pass over the error e, the
    denominator from backward passes over random vectors r, as the mean of (J_j . r)^2. The most promising ones
    of every weight are then solved exactly.
    """
    program = problem.program
    probes = 256 if len(problem.taps) <= 3 else 16
    back = problem.gradients()
    numerator = back(problem.weighted(problem.residuals()))
    rng = np.random.default_rng(0)
    norms: dict[str, Array] = {name: np.zeros_like(g) for name, g in numerator.items()}
    for _ in range(probes):
        if problem.clock.out("single weights", 0.8):
            return
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
    rough = []
    for name, index, step, tap in placed:
        if tap in problem.suspects and not problem.clock.out(f"one element of {name}", 0.95):
            rough.append(solve_element(problem, name, index, step, tap, rounds=2))
            yield rough[-1]
    for guess in sorted(rough, key=lambda g: -g.removed)[:3]:
        yield solve_element(problem, *guess.element, guess.tap, rounds=8)


def dead_column(problem: Problem) -> Iterator[Guess]:
    """The columns of linear maps whose loss would explain the error best, to first order, the best one first."""
    back = problem.gradients()
    back(problem.weighted(problem.residuals()))
    promising: list[tuple[float, str, int]] = []
    for tap in problem.suspects:
        if split_tap(tap)[1] not in ("attn.out", "mlp.c_fc", "mlp.out") or tap not in back.at_taps:
            continue
        promise = -(back.at_taps[tap] * problem.values[tap]).reshape(-1, problem.values[tap].shape[-1]).sum(axis=0)
        promising += [(float(promise[column]), tap, int(column)) for column in np.argsort(-promise)[:3]]
    promising.sort(reverse=True)
    for _, tap, column in promising[:COLUMNS] if problem.is_large else promising:
        name = linear_of(tap)
        weights = {k: problem.program.weights(f"{name}.{k}", F64).copy() for k in ("weight", "bias")}
        weights["weight"][:, column] = 0
        weights["bias"][column] = 0
        text = f"column {column} of {name} were dead: it gives 0"
        changed = {f"{name}.{k}": value for k, value in weights.items()}
        yield problem.judge(Guess("dead_column", tap, text, weights=changed, fitted=1))


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
    text, now = f"{name}{place} were {best_value:.6g}", f"{old:.6g} there"
    guess = Guess("corrupted_element", tap, text, now, weights={name: changed(best_value)}, fitted=1)
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
    return ((name, tap) for name, tap in weight_names(problem) if name.endswith(".bias"))


def solve_bias(problem: Problem, name: str, tap: str, rounds: int = 3, steps: int = 24) -> Guess:
    """The bias that removes most of the error: Gauss-Newton, each step by conjugate gradients."""
    base = problem.program.weights(name, F64)
    delta = np.zeros_like(base)
    for _ in range(rounds):
        program = problem.program.with_({name: base + delta})
        values = problem.run(program, tap)
        residual = problem.residuals(values)
        error = sum(float(np.square(r).sum()) for r in residual.values())
        if not math.isfinite(error) or error < 1e-14 or problem.clock.out(f"{name} missing", 0.8):
            break
        back = problem.gradients(program, values)

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
    text, now = f"{name} were there (of rms {size:.3g})", "none: it is all zeros"
    return problem.judge(Guess("missing_bias", tap, text, now, weights={name: base + delta}, fitted=base.size))
