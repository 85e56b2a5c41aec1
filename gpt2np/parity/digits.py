"""Significant digits by random rounding: which operations amplify, and what any float32 program would show.

Every result of an operation is perturbed in its last bits, at random, a few times; the spread of a tap over these
runs is what rounding alone does to it (Parker 1997, "Monte Carlo arithmetic"; Verificarlo).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..call import Call
from ..weights import Array
from .operations import tap_inputs, tap_names
from .places import kept
from .program import Program
from .report import Report, Table, number

RUNS = 4
EPS = float(np.finfo(np.float32).eps)
SHOWN = 12
BEYOND = 32.0  # times the spread: programs that sum in other orders stay below 10


class Digits(NamedTuple):
    """What random rounding does to one tap."""

    tap: str
    digits: float  # significant decimal digits that are left
    spread: float  # rms deviation from the mean of the runs
    amplification: float  # relative spread out, over the largest relative spread of its inputs


def significant_digits(program: Program, call: Call, names: Sequence[str], seed: int = 0) -> list[Digits]:
    """Each tap's significant digits in float32, from a few runs with perturbed last bits."""
    rng = np.random.default_rng(seed)
    last = max(names, key=tap_names(program.config).index)
    runs: list[dict[str, Array]] = [{} for _ in range(RUNS)]
    relative: dict[str, float] = {}
    found = []
    last_use = {used: tap for tap in tap_names(program.config) for used in tap_inputs(tap, program.config)}
    for tap in tap_names(program.config)[: tap_names(program.config).index(last) + 1]:
        inputs = tap_inputs(tap, program.config)
        for known in runs:
            value = program.run(tap, call, [known[i] for i in inputs], np.dtype(np.float32))
            noise = rng.uniform(-EPS / 2, EPS / 2, value.shape).astype(np.float32)
            known[tap] = value * (1 + noise)
        values = np.stack([known[tap] for known in runs]).astype(np.float64)
        seen = kept(tap, call)
        apart = values - values.mean(axis=0)
        apart = apart if seen is None else np.where(seen, apart, 0.0)
        spread, scale = (float(np.sqrt(np.mean(x * x))) for x in (apart, values))
        relative[tap] = spread / scale if scale else 0.0
        incoming = max((relative[i] for i in inputs), default=0.0)
        digits = -math.log10(relative[tap]) if relative[tap] > 0 else math.inf
        if tap in names:
            found.append(Digits(tap, digits, spread, relative[tap] / incoming if incoming else 1.0))
        for used in inputs:
            if last_use.get(used) == tap:
                for known in runs:
                    known.pop(used, None)
    return found


def show_digits(report: Report, found: Sequence[Digits], totals: Mapping[str, float]) -> None:
    """The taps that lose most, and how the difference of two parties compares with rounding alone, into the report."""
    worst = sorted(found, key=lambda d: d.amplification, reverse=True)[:SHOWN]
    order = {d.tap: i for i, d in enumerate(found)}
    rows = []
    for d in sorted(worst, key=lambda d: order[d.tap]):
        times = totals[d.tap] / d.spread if d.tap in totals and d.spread else None
        rows.append((d.tap, f"{d.digits:.1f}", f"{d.amplification:.2f}", number(d.spread),
                     "" if times is None else f"{times:.1f}" if times < 1000 else number(times)))  # fmt: skip
    legend = f"{RUNS} runs of ours in float32 with perturbed last bits. amplifies: relative spread out / in. A - B: "
    legend += "the difference of the parties over that spread; around 1 it is what any float32 program would show."
    head = ("tap", ">digits", ">amplifies", ">spread", ">A - B")
    report.tables.append(
        Table(f"significant digits; the {len(rows)} taps that amplify most", head, rows, notes=[legend])
    )
    spreads = {d.tap: totals[d.tap] / d.spread for d in found if d.tap in totals and d.spread}
    beyond = next((tap for tap, times in spreads.items() if times > BEYOND), None)
    if beyond is not None:
        text = f"{beyond} is the first tap that differs by more than any float32 program's rounding would show"
        report.findings.append(f"{text}: by {number(spreads[beyond])} times the spread of random rounding")
    elif spreads:
        text = "A - B is what any float32 program would show"
        largest = max(spreads.values())
        how = (
            f"at most {largest:.1f} times the spread of random rounding" if largest else "the same numbers at every tap"
        )
        report.findings.append(f"{text}: {how}")
    report.details["digits"] = [d._asdict() for d in found]
