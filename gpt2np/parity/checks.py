"""Checks that need no reference: a sound GPT-2 must agree with itself. Each reports an error by position.

cache        the full pass against token by token; for ours, against prefill + decode, chunks, padding, too
chunk        the full pass against three chunks, each with the past that the one before gave
prefix       the first half alone against the first half of the whole
batch        each sequence alone against all of them together
order        the sequences of a batch in another order
causal       changing a token must not change the rows before it
determinism  the same call twice gives the same bits
finite       no NaN and no infinity anywhere
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np

from ..call import Call
from ..errors import ComparisonError, Gpt2npError
from ..weights import Array
from .cases import Case, case_from_ids
from .compare import Comparison
from .metrics import Budget, difference, measure
from .parties import Ours, Runner
from .places import kept_output
from .report import Check, Table, number
from .subject import Subject

CHECKS = ("cache", "chunk", "prefix", "batch", "order", "causal", "determinism", "finite")
ALL_CHECKS = ("outputs", "taps", *CHECKS)


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
        for runner in runners:
            if name == "cache" and runner is ours:
                continue
            try:
                check = _RUNS[name](model, runner, ids, budget, cases)
            except Gpt2npError as error:
                check = Check(f"{name} {runner.name}", None, str(error))
            check.party = runner.name
            check.worst = max(check.by_position, default=None) if name != "causal" else check.worst
            found.append(check)
    return found


def matrix(checks: Sequence[Check]) -> Table | None:
    """Checks of several parties side by side: pass or fail, with the largest difference."""
    parties = list(dict.fromkeys(c.party for c in checks if c.party))
    names = list(dict.fromkeys(c.name.split(" ")[0] for c in checks if c.party and c.name != "taps"))
    if len(parties) < 2 or not names:
        return None
    cells = {(c.name.split(" ")[0], c.party): c for c in checks}

    def cell(check: Check | None) -> str:
        if check is None or check.ok is None:
            return ""
        return ("ok" if check.ok else "FAIL") + ("" if check.worst is None else f" {number(check.worst)}")

    rows = [row for name in names if any((row := (name, *(cell(cells.get((name, party))) for party in parties)))[1:])]
    styles = ["red" if any("FAIL" in c for c in row) else "" for row in rows]
    notes = ["each party against itself, with the largest difference; an empty cell was not made, and is said above"]
    return Table("invariances", ("check", *parties), rows, styles, notes)


def past_kept(
    model: Subject, call: Call, outputs: Mapping[str, Array], comparisons: Sequence[Comparison], party: str
) -> Check | None:
    """Whether `present[:past]` is the past that was fed in; None where there was none, or nothing to compare."""
    if call.past is None or not call.start:
        return None
    budgets = {c.output: c.budget for c in comparisons}
    wrong, worst, compared = [], 0.0, 0
    for port in model.recognised.outputs:
        value = outputs.get(port.name)
        if value is None or port.layer is None or not port.role.startswith("present") or port.name not in budgets:
            continue
        keys, values = (np.asarray(x) for x in call.past[port.layer])
        fed = {"present_key": keys, "present_value": values}.get(port.role, np.stack([keys, values]))
        shape = (*fed.shape[:-2], call.start + call.input_ids.shape[1], fed.shape[-1])
        if value.shape != shape:
            continue  # the comparison says so
        seen = kept_output(port.role, shape, call)
        seen = seen if seen is None else seen[..., : call.start, :]
        found = measure(value[..., : call.start, :], fed, budgets[port.name], seen)
        compared += 1
        worst = max(worst, found.max_abs)
        if not found.ok:
            wrong.append(f"{port.name} ({found.failing:,} of {found.elements:,} numbers differ)")
    if not compared:
        return None
    text = "present[:past] holds the past that was fed in"
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        text = f"present[:past] is not the past that was fed in: {', '.join(wrong[:3])}{more}"
    return Check("past kept", not wrong, text, party=party, worst=worst)


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
    """Within the budget everywhere, or not; and where it is worst. NaN against NaN alone is no check."""
    errors = by_position(a, b)
    if not (np.isfinite(a).any() or np.isfinite(b).any()):
        return Check(name, None, f"{what}: all numbers are NaN or infinite", errors)
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
    checks = [judged("cache", f"full pass = {what}", value, full, budget) for what, value in rows]
    checks[1].party, checks[1].worst = ours.name, max(checks[1].by_position, default=None)
    return checks


def check_batch(model: Subject, runner: Runner, ids: Array, budget: Budget, cases: Sequence[Case]) -> Check:
    """Three different sequences: alone, and together."""
    batch = three_of(ids)
    alone = np.concatenate([final(model, runner, row[None]) for row in batch])
    return judged(f"batch {runner.name}", "sequences alone and together", alone, final(model, runner, batch), budget)


def check_order(model: Subject, runner: Runner, ids: Array, budget: Budget, cases: Sequence[Case]) -> Check:
    """Three different sequences together: in another order they must come out in that order."""
    batch, order = three_of(ids), [2, 0, 1]
    together, permuted = final(model, runner, batch), final(model, runner, batch[order])
    return judged(f"order {runner.name}", "sequences in another order", permuted, together[order], budget)


def three_of(ids: Array) -> Array:
    """Three sequences of the same tokens, (3, T)."""
    return np.concatenate([ids, ids[:, ::-1], np.roll(ids, 1, axis=1)])


def check_prefix(model: Subject, runner: Runner, ids: Array, budget: Budget, cases: Sequence[Case]) -> Check:
    """The first half alone: its rows must be those of the whole."""
    t = max(1, ids.shape[1] // 2)
    alone, whole = final(model, runner, ids[:, :t]), final(model, runner, ids)
    return judged(f"prefix {runner.name}", f"the first {t} tokens alone", alone, whole[:, :t], budget)


def check_chunk(model: Subject, runner: Runner, ids: Array, budget: Budget, cases: Sequence[Case]) -> Check:
    """Three chunks, each with the past that the one before gave."""
    size = max(1, -(-ids.shape[1] // 3))
    whole = final(model, runner, ids)
    return judged(f"chunk {runner.name}", "chunks = the whole", in_chunks(model, runner, ids, size), whole, budget)


def check_cache(model: Subject, runner: Runner, ids: Array, budget: Budget, cases: Sequence[Case]) -> Check:
    """Token by token through the past inputs."""
    whole = final(model, runner, ids)
    return judged(f"cache {runner.name}", "token by token = the whole", in_chunks(model, runner, ids, 1), whole, budget)


def in_chunks(model: Subject, runner: Runner, ids: Array, size: int) -> Array:
    """The last tap of a call that is cut into chunks, (B, T, width).

    Raises
    ------
    ComparisonError
        If the file takes no past, or one in a buffer of its own.
    """
    found = model.recognised
    pasts = {(p.role, p.layer): p.name for p in found.inputs if p.role in ("past", "past_key", "past_value")}
    presents = {p.name: (p.role.replace("present", "past"), p.layer) for p in found.outputs}
    if not pasts or found.lengths or not set(pasts) <= set(presents.values()):
        raise ComparisonError("the file takes no past inputs that grow" if pasts else "the file takes no past inputs")
    past: dict[str, Array] | None = None
    parts = []
    for start in range(0, ids.shape[1], size):
        case = case_from_ids(model, "check", ids[:, start : start + size], past)
        outputs = runner.run(case.feeds).outputs
        taps = model.outputs_as_taps(outputs, model.call(case.feeds))
        parts.append(taps["logits"] if "logits" in taps else taps["ln_f"])
        past = {pasts[role]: outputs[name] for name, role in presents.items() if role in pasts}
    return np.concatenate(parts, axis=1)


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
    "cache": check_cache,
    "chunk": check_chunk,
    "order": check_order,
    "prefix": check_prefix,
    "causal": check_causal,
    "determinism": check_determinism,
    "finite": check_finite,
}
