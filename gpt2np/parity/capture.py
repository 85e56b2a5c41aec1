"""What the parties give for a case: outputs, taps, traces of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from ..arguments import as_path, flag, one_of, strings, whole_number
from ..call import Call
from ..errors import Gpt2npError, InputError
from ..weights import Array
from . import trace as traces
from .cases import Case
from .checks import ALL_CHECKS
from .operations import split_tap, tap_names, tap_shape
from .parties import ENGINES, Ort, Runner
from .report import Report, add_once
from .subject import Subject


@dataclass
class Options:
    """What `gpt2np parity` was asked for.

    Raises
    ------
    InputError
        If a field is of another type or has a value that cannot be meant.
    """

    model: Path
    against: Sequence[str] = ()
    data: Sequence[Path] = ()
    prompts: Sequence[str] = ()
    random: int = 0
    ids: Sequence[str] = ()
    seed: int = 0
    engine: str = "numba"
    preset: str = "auto"
    rtol: Sequence[str] = ()
    atol: Sequence[str] = ()
    checks: Sequence[str] = ("outputs",)
    noise_floor: bool = False
    padding: bool = False  # whether rows of padding are compared, too
    skip: int = 0  # random prompts at the beginning that others compare

    def __post_init__(self) -> None:
        self.model = as_path(self.model)
        for name in ("against", "prompts", "ids", "rtol", "atol", "checks"):
            setattr(self, name, strings(name, getattr(self, name)))
        if isinstance(self.data, (str, Path)) or not isinstance(self.data, Sequence):
            raise InputError(f"data must be a sequence of paths, got {self.data!r:.60}")
        self.data = tuple(map(as_path, self.data))
        for name in ("random", "seed", "skip"):
            whole_number(name, getattr(self, name), 0)
        one_of("engine", self.engine, ENGINES)
        for name in ("noise_floor", "padding"):
            flag(name, getattr(self, name))
        for check in self.checks:
            one_of("a check", check, ALL_CHECKS)


def run_case(
    case: Case, runners: Sequence[Runner], report: Report | None = None
) -> dict[str, Mapping[str, Array] | Gpt2npError]:
    """Outputs of every party, or the error that kept it from giving any; what is odd about them into the report."""
    results: dict[str, Mapping[str, Array] | Gpt2npError] = {}
    for runner in runners:
        try:
            given = runner.run(case.feeds)
            results[runner.name] = given.outputs
            if report is not None:
                add_once(report.findings, *(f"{note} ({runner.name})" for note in given.notes))
                add_once(report.not_compared, *(f"{note} ({runner.name})" for note in given.left_out))
        except Gpt2npError as error:
            results[runner.name] = error
    return results


def taps_from(runner: Runner, case: Case) -> Callable[[Sequence[str]], dict[str, Array]]:
    return lambda names: runner.run(case.feeds, False, names).taps


def around(model: Subject, runner: Runner, case: Case, call: Call, tap: str) -> dict[str, Array]:
    """All taps that a party gives, or where they are large those of two layers up to `tap`."""
    wanted = tap_names(model.config)
    if sum(4 * math.prod(tap_shape(t, model.config, call)) for t in wanted) > 256 << 20:
        layer, part = split_tap(tap)
        last = f"h.{layer}.attn.v" if part in ("attn.q", "attn.k") else tap
        outputs = [t for t in wanted if split_tap(t)[1] in ("attn.k", "attn.v", "logits")]
        wanted = [*outputs, *wanted[: wanted.index(last) + 1][-30:]]
    return runner.run(case.feeds, False, wanted).taps


def record(
    model: Subject, runner: Runner, case: Case, taps: Sequence[str] = ("*",), outputs: bool = True
) -> traces.Trace:
    """One call of a party as a trace, with those taps that match a pattern."""
    import os

    names = [t for t in model.taps() if any(fnmatchcase(t, pattern) for pattern in taps)]
    if not names:
        raise InputError(f"no tap matches {', '.join(taps)}; taps are {', '.join(model.taps()[:4])}, ...")
    run = runner.run(case.feeds, outputs, names)
    manifest = traces.provenance(
        case.feeds,
        runner=runner.name,
        case=case.name,
        model=str(model.path),
        model_sha256=model.file.sha256,
        dtype=getattr(runner, "dtype", "float32"),
        engine=getattr(runner, "engine", None),
        weights=getattr(runner, "weights", None),
        optimisation=("all" if runner.optimise else "off") if isinstance(runner, Ort) else None,
        threads=getattr(runner, "threads", None) or os.cpu_count(),
        taps_missing=[t for t in names if t not in run.taps],
    )
    return traces.Trace(dict(case.feeds), run.outputs, run.taps, manifest)
