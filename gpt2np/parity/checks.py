"""Checks that need no reference: a sound GPT-2 must agree with itself. Each reports an error by position.

cache        the full pass against prefill + decode, chunks, and a left-padded batch
batch        each sequence alone against all of them together, in any order
causal       changing a token must not change the rows before it
determinism  the same call twice gives the same bits
finite       no NaN and no infinity anywhere
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from ..errors import Gpt2npError
from ..weights import Array
from .cases import Case, case_from_ids
from .metrics import Budget, difference
from .parties import Ours, Runner
from .report import Check, number
from .subject import Subject

CHECKS = ("cache", "batch", "causal", "determinism", "finite")


def run_checks(
    names: Sequence[str],
    model: Subject,
    ours: Ours,
    runners: Sequence[Runner],
    cases: Sequence[Case],
    budget: Budget,
    seed: int,
) -> list[Check]:
    """The checks asked for, of every party that can run token ids of our choice."""
    found: list[Check] = []
    ids = prompt_of(model, cases, seed)
    for name in names:
        if name == "cache":
            found += cache_checks(model, ours, ids, budget)
            continue
        for runner in runners:
            try:
                found.append(_RUNS[name](model, runner, ids, budget, cases))
            except Gpt2npError as error:
                found.append(Check(f"{name} {runner.name}", None, str(error)))
    return found


def prompt_of(model: Subject, cases: Sequence[Case], seed: int) -> Array:
    """Token ids (1, T) to check on: the first case's that is long enough, or random ones."""
    for case in cases:
        ids = model.call(case.feeds).input_ids[:1, :64]
        if ids.shape[1] >= 4 and ids.shape[1] + 4 <= model.config.n_ctx:
            return ids
    T = max(1, min(24, model.config.n_ctx - 4))
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, (1, T))


def final(model: Subject, runner: Runner, ids: Array) -> Array:
    """The last tap, (B, T, width), of one call."""
    case = case_from_ids(model, "check", ids)
    outputs = runner.run(case.feeds).outputs
    taps = model.outputs_as_taps(outputs, model.call(case.feeds))
    return taps["logits"] if "logits" in taps else taps["ln_f"]


def by_position(a: Array, b: Array) -> list[float]:
    """Largest difference at each position of two arrays (B, T, width)."""
    return [float(x) for x in difference(a, b).max(axis=(0, 2))] if a.size else []


def judged(name: str, what: str, a: Array, b: Array, budget: Budget) -> Check:
    """Within the budget everywhere, or not; and where it is worst."""
    errors = by_position(a, b)
    outside = difference(a, b) > budget.atol + budget.rtol * np.abs(np.nan_to_num(b))
    worst = int(np.argmax(errors)) if errors else 0
    text = f"{what}: max abs {number(max(errors, default=0.0))}"
    if outside.any():
        first = int(outside.any(axis=(0, 2)).argmax())
        text += (
            f", out of budget from position {first} on"
            if outside[:, -1].any()
            else f", out of budget at position {first}"
        )
    elif errors and errors[worst] > 0:
        text += f" at position {worst}"
    return Check(name, not bool(outside.any()), text, errors)


def cache_checks(model: Subject, ours: Ours, ids: Array, budget: Budget) -> list[Check]:
    """Ours, through its cache in every way that it is used; the full pass is the expected value."""
    gpt2 = ours.gpt2

    def pieces(cuts: Sequence[int]) -> Array:
        cache = gpt2.new_cache(1, ids.shape[1])
        edges = [0, *cuts, ids.shape[1]]
        parts = [gpt2(ids[:, a:b], cache, logits=False) for a, b in pairwise(edges) if b > a]
        return np.concatenate([p.last_hidden_state for p in parts], axis=1)

    T = ids.shape[1]
    full = gpt2(ids, logits=False).last_hidden_state
    half, third = T // 2, max(1, T // 3)
    rows = [
        ("prefill + decode", pieces(range(half, T))),
        ("token by token", pieces(range(1, T))),
        ("chunks", pieces(range(third, T, third))),
    ]
    batch = np.concatenate([ids, ids[:, ::-1]])
    rows.append(("batched", gpt2(batch, logits=False).last_hidden_state[:1]))
    pad = min(3, model.config.n_ctx - T)
    if pad > 0:
        padded = np.concatenate([np.zeros((1, pad), ids.dtype), ids], axis=1)
        mask = np.concatenate([np.zeros((1, pad), np.int64), np.ones((1, T), np.int64)], axis=1)
        positions = np.maximum(np.arange(T + pad) - pad, 0)[None]
        out = gpt2(padded, logits=False, attention_mask=mask, position_ids=positions).last_hidden_state
        rows.append(("left-padded", out[:, pad:]))
    return [judged("cache", f"full pass = {what}", value, full, budget) for what, value in rows]


def check_batch(model: Subject, runner: Runner, ids: Array, budget: Budget, cases: Sequence[Case]) -> Check:
    """Three different sequences: together, together in another order, and alone."""
    batch = np.concatenate([ids, ids[:, ::-1], np.roll(ids, 1, axis=1)])
    order = [2, 0, 1]
    together, permuted = final(model, runner, batch), final(model, runner, batch[order])
    alone = np.concatenate([final(model, runner, row[None]) for row in batch])
    both = np.concatenate([permuted, alone]), np.concatenate([together[order], together])
    return judged(f"batch {runner.name}", "sequences alone, together, in another order", *both, budget)


def check_causal(model: Subject, runner: Runner, ids: Array, budget: Budget, cases: Sequence[Case]) -> Check:
    """Change a token in the middle: rows before it must keep their values, and it itself must not."""
    t = ids.shape[1] // 2
    changed = ids.copy()
    changed[0, t] = (changed[0, t] + 1) % model.config.vocab_size
    before, after = final(model, runner, ids), final(model, runner, changed)
    result = judged(f"causal {runner.name}", f"token {t} changed, rows before it", after[:, :t], before[:, :t], budget)
    result.by_position = by_position(after, before)
    if np.array_equal(after[:, t:], before[:, t:]):
        return Check(result.name, False, f"token {t} changed, and no row from it on did", result.by_position)
    return result


def check_determinism(model: Subject, runner: Runner, ids: Array, budget: Budget, cases: Sequence[Case]) -> Check:
    first, second = final(model, runner, ids), final(model, runner, ids)
    same = first.tobytes() == second.tobytes()
    text = "two runs, the same bits" if same else f"two runs differ by {number(float(difference(first, second).max()))}"
    return Check(f"determinism {runner.name}", same, text, by_position(first, second))


def check_finite(model: Subject, runner: Runner, ids: Array, budget: Budget, cases: Sequence[Case]) -> Check:
    """Every output of every case."""
    bad = []
    for case in cases or [case_from_ids(model, "check", ids)]:
        for name, value in runner.run(case.feeds).outputs.items():
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                where = np.argwhere(~np.isfinite(value))[0].tolist()
                bad.append(f"{case.name} {name}{where} is {value[tuple(where)]}")
    text = "; ".join(bad[:3]) if bad else "no NaN, no infinity in any output"
    return Check(f"finite {runner.name}", not bad, text)


_RUNS: dict[str, Callable[[Subject, Runner, Array, Budget, Sequence[Case]], Check]] = {
    "batch": check_batch,
    "causal": check_causal,
    "determinism": check_determinism,
    "finite": check_finite,
}
