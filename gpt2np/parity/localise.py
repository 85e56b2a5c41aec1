"""Two parties tap by tap: how far apart, where it starts, and who is closer to float64.

For every tap, with op the operation of the program under test in float64 and a, b what the parties gave:

    total      a - b
    local      a - op(a's own inputs), and the same for b: what this operation itself added
    inherited  op(a's inputs) - op(b's inputs): what came in with the inputs
    gain       relative total of this tap / largest relative total of its inputs
    R          rms(a - f64) / rms(b - f64), f64 being a float64 run from the token ids on

The budget of a local error is measured, not chosen: the same operation is run in float32 on the same inputs,
and the error of that run against float64 is this operation's float32 floor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from ..call import Call
from ..weights import Array
from .compare import Comparison
from .metrics import difference
from .operations import split_tap, tap_inputs, tap_names, tap_shape
from .places import kept
from .program import Program
from .subject import Subject, taps_of

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)

# How many times the float32 floor a local error may be. Between NumPy, ONNX Runtime and the kernels, which sum
# in different orders and approximate exp and tanh differently, it is at most 5 over all fixtures.
LOCAL_FACTOR = 32.0
ROWS = 64  # positions of logits that are judged at a time: they are the one tap of the vocabulary's size

Taps = Callable[[Sequence[str]], Mapping[str, Array]]


@dataclass(frozen=True)
class TapRow:
    """What is known of one tap. Errors are rms over all elements; None where a party does not give the tap."""

    tap: str
    shape: tuple[int, ...]
    scale: float  # rms of the float64 run
    total: float | None
    max_abs: float | None
    at: tuple[int, ...]
    inherited: float | None
    local_a: float | None
    local_b: float | None
    floor: float  # rms error of the operation in float32
    over_a: float  # largest local error over its budget: above 1, the operation itself differs
    over_b: float
    gain: float | None
    r: float | None
    float64_a: float | None = None  # rms distance from the float64 run
    float64_b: float | None = None

    @property
    def closer(self) -> str:
        """Which party is closer to float64: "a", "b" or "tie"."""
        if self.r is None or (0.8 < self.r < 1.25):
            return "tie"
        return "a" if self.r < 1 else "b"

    @property
    def diverges(self) -> bool:
        return max(self.over_a, self.over_b) > 1

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "closer": self.closer, "diverges": self.diverges}


class Seen(NamedTuple):
    """One tap, or some of its positions, with all that its row is computed from: what a page shows of it."""

    tap: str
    start: int  # the first position
    a: Array | None
    b: Array | None
    op_a: Array | None = None  # float64: the operation fed with A's own inputs
    op_b: Array | None = None
    exact: Array | None = None  # the float64 run from the token ids on
    keep: Array | None = None  # where it is defined


class _Sum:
    """Root mean square and largest value of an error that comes in pieces along the positions."""

    def __init__(self) -> None:
        self.squares, self.count, self.largest = 0.0, 0, 0.0
        self.at: tuple[int, ...] = ()

    def add(self, a: Array, b: Array, offset: int = 0, axis: int = 1, keep: Array | None = None) -> None:
        distance = difference(a, b)
        self.count += distance.size
        if keep is not None:
            seen = np.broadcast_to(keep, distance.shape)
            distance = np.where(seen, distance, 0.0)
            self.count -= distance.size - int(seen.sum())
        with np.errstate(over="ignore"):
            self.squares += float(np.square(distance).sum())
        where = np.unravel_index(int(distance.argmax()), distance.shape)
        if float(distance[where]) > self.largest or not self.at:
            self.largest = float(distance[where])
            self.at = tuple(int(w) + (offset if i == axis else 0) for i, w in enumerate(where))

    @property
    def rms(self) -> float:
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    @property
    def known(self) -> float | None:
        """rms, or None where nothing was added."""
        return self.rms if self.at else None


def compare_taps(
    program: Program,
    call: Call,
    a: Taps,
    b: Taps,
    names: Sequence[str],
    group_bytes: int = 128 << 20,
    oracle: Program | None = None,
    oracle_taps: Taps | None = None,
    eps: float = float(np.finfo(np.float32).eps),
    watch: Callable[[Seen], None] | None = None,
) -> Iterator[TapRow]:
    """One row for each tap, in order. The oracle is the program in float64, another program, or given taps.

    `watch` is shown every tap while its arrays are there.

    `eps` is the rounding that the program itself asks for: float16's where the file computes in float16. Rows of
    padding are left out, and what is computed from them takes the operation's own values there.

    Parties are asked for some layers' taps at a time, so that no more than about `group_bytes` of them are in
    memory at once. Where a party does not give a tap, its value is computed from what it gave before.
    """
    known: dict[str, dict[str, Array]] = {"a": {}, "b": {}, "oracle": {}}
    relative: dict[str, float] = {}
    last_use = {used: name for name in names for used in tap_inputs(name, program.config)}
    for group in tap_groups(program, call, names, group_bytes):
        given = {"a": dict(a(group)), "b": dict(b(group)), "oracle": dict(oracle_taps(group)) if oracle_taps else {}}
        for tap in group:
            inputs = tap_inputs(tap, program.config)
            programs = {"a": program, "b": program, "oracle": oracle or program}
            row = _row(programs, call, tap, {p: [known[p][i] for i in inputs] for p in known}, given, known, eps, watch)
            incoming = max((relative[i] for i in inputs if i in relative), default=0.0)
            if row.total is not None:
                relative[tap] = row.total / row.scale if row.scale else 0.0
            elif incoming:
                relative[tap] = incoming
            gain = relative[tap] / incoming if incoming and row.total is not None else None
            yield TapRow(**{**asdict(row), "gain": gain})
            for party in known:
                for used in inputs:
                    if last_use[used] == tap:
                        known[party].pop(used, None)
                if tap not in last_use:
                    known[party].pop(tap, None)
            for values in given.values():
                values.pop(tap, None)


def tap_groups(program: Program, call: Call, names: Sequence[str], group_bytes: int) -> Iterator[list[str]]:
    """The taps cut into runs of whole layers whose float32 arrays fit into `group_bytes`."""
    group: list[str] = []
    size = 0
    for tap in names:
        if group and split_tap(tap)[1] in ("ln_1", "ln_f", "logits") and size > group_bytes:
            yield group
            group, size = [], 0
        group.append(tap)
        size += 4 * math.prod(tap_shape(tap, program.config, call))
    yield group


def _row(
    programs: Mapping[str, Program],
    call: Call,
    tap: str,
    inputs: Mapping[str, list[Array]],
    given: Mapping[str, Mapping[str, Array]],
    known: Mapping[str, dict[str, Array]],
    eps: float,
    watch: Callable[[Seen], None] | None = None,
) -> TapRow:
    """All errors of one tap; leaves every party's value in `known`."""
    T = call.input_ids.shape[1]
    step = ROWS if tap == "logits" else T
    kinds = ("total", "inherited", "a", "b", "floor_a", "floor_b", "oracle_a", "oracle_b", "scale")
    sums = {name: _Sum() for name in kinds}
    a, b = given["a"].get(tap), given["b"].get(tap)
    over = {"a": 0.0, "b": 0.0}
    seen = kept(tap, call)
    for start in range(0, T, step):
        part = slice(start, start + step)

        def cut(value: Array, part: slice = part) -> Array:
            return value[:, part] if tap == "logits" else value

        keep = None if seen is None else cut(seen)
        op = {p: programs[p].run(tap, call, [cut(x) for x in inputs[p]], F64) for p in inputs}
        if tap in given["oracle"]:
            op["oracle"] = cut(given["oracle"][tap])
        for party, value in (("a", a), ("b", b)):
            low = programs[party].run(tap, call, [cut(x) for x in inputs[party]], F32)
            sums[f"floor_{party}"].add(low, op[party], start, keep=keep)
            if value is not None:
                sums[party].add(cut(value), op[party], start, keep=keep)
                sums[f"oracle_{party}"].add(cut(value), op["oracle"], start, keep=keep)
        if watch is not None:
            mine, theirs = (None if x is None else cut(x) for x in (a, b))
            watch(Seen(tap, start, mine, theirs, op["a"], op["b"], op["oracle"], keep))
        sums["scale"].add(op["oracle"], np.zeros_like(op["oracle"]), keep=keep)
        if a is not None and b is not None:
            sums["total"].add(cut(a), cut(b), start, keep=keep)
            sums["inherited"].add(op["a"], op["b"], start, keep=keep)
        if tap != "logits":
            known["oracle"][tap] = op["oracle"]
            for party, value in (("a", a), ("b", b)):
                own = op[party] if value is None else value
                known[party][tap] = own if keep is None else np.where(keep, own, op[party])
    for party, value in (("a", a), ("b", b)):
        if value is not None:
            over[party] = _over(sums[party], sums[f"floor_{party}"], eps / 4 * sums["scale"].rms)
    both = a is not None and b is not None
    r = _ratio(sums["oracle_a"].rms, sums["oracle_b"].rms) if both else None
    shape = tuple((a if a is not None else b if b is not None else known["oracle"].get(tap, np.empty(0))).shape)
    return TapRow(
        tap, shape, sums["scale"].rms, sums["total"].known, sums["total"].largest if both else None,
        sums["total"].at, sums["inherited"].known, sums["a"].known, sums["b"].known,
        max(sums["floor_a"].rms, sums["floor_b"].rms), over["a"], over["b"], None, r,
        sums["oracle_a"].known, sums["oracle_b"].known,
    )  # fmt: skip


def _over(local: _Sum, floor: _Sum, rounding: float) -> float:
    """A local error over its budget, by rms or by its largest element: above 1, the operation itself differs."""
    ratios = [
        local.rms / (LOCAL_FACTOR * max(floor.rms, rounding)),
        local.largest / (LOCAL_FACTOR * max(floor.largest, 4 * rounding)),
    ]
    return max((r for r in ratios if not math.isnan(r)), default=0.0)


def _ratio(near: float, far: float) -> float | None:
    """R, or None where it is not defined."""
    r = near / far if far > 0 else (1.0 if near == 0 else math.inf)
    return None if math.isnan(r) else r


def first_divergence(rows: Sequence[TapRow]) -> TapRow | None:
    """The first tap whose local error leaves its budget, on either side."""
    return next((row for row in rows if row.diverges), None)


def agreeing(model: Subject, call: Call, given: Mapping[str, Array]) -> tuple[list[str], list[str]]:
    """Which of these taps a run from the token ids explains, float32 rounding aside, and which it does not."""
    names = [tap for tap in tap_names(model.config) if tap in given]
    if not names:
        return [], []
    exact, low = (
        {tap: value for tap, value in model.program.walk(call, dtype, until=names[-1]) if tap in given}
        for dtype in (F64, F32)
    )
    good: list[str] = []
    bad: list[str] = []
    for tap in names:
        sums = {name: _Sum() for name in ("given", "floor", "scale")}
        for name, value, to in (
            ("given", given[tap], exact[tap]), ("floor", low[tap], exact[tap]),
            ("scale", exact[tap], np.zeros_like(exact[tap])),
        ):  # fmt: skip
            sums[name].add(value, to, keep=kept(tap, call))
        allowed = LOCAL_FACTOR * max(sums["floor"].rms, sums["scale"].rms * 1e-7)
        (good if sums["given"].rms <= allowed else bad).append(tap)
    return good, bad


def only_noise(model: Subject, failing: Mapping[str, Comparison], rows: Sequence[TapRow]) -> str:
    """The headline where outputs fail and no operation differs: noise, or an output that is not what its tap is."""
    apart = {row.tap: row.max_abs for row in rows}
    ports = {port.name: port for port in model.recognised.outputs}
    for name, c in failing.items():
        known = [k for tap in taps_of(ports[name]) if (k := apart.get(tap)) is not None] if name in ports else []
        if c.metrics is not None and known and c.metrics.max_abs > 2 * max(known):
            return f"{name} is not what its taps are: they agree, so it is lost after the last operation"
        if c.metrics is None or not known:
            return ""
    return "inherited float32 noise alone: no operation differs by itself" if failing else ""
