"""What a page shows of the taps, summed up while their arrays are there: heat maps, ulps, worst numbers, tokens.

An error is the distance of B from A, the reference; where one party alone gives a tap, its distance from float64.
`local` is the distance of a party from what float64 makes of that party's own inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..config import GPT2Config
from ..parity.cases import Case
from ..parity.localise import ROWS, Seen
from ..parity.metrics import difference
from ..parity.operations import OPERATIONS, split_tap
from ..parity.subject import Subject
from ..parity.trace import statistics
from ..weights import Array

CELLS = 16, 12  # rows and columns of a heat map at most
WORST = 10
BINS = 26  # of the histogram: 0, less than 1 ulp, 1, 2-3, 4-7, ... and in the last one all that is beyond
SAMPLES = 126  # numbers of each array that a page keeps to be judged again, besides its rms and its largest


class Token(NamedTuple):
    """What two sets of logits say at one position."""

    batch: int
    position: int
    a: int  # the most probable token
    b: int
    exact: int | None  # float64's
    margin: float  # A's score of it above A's second best
    size: float  # of the larger one of the scores that a flip exchanges
    apart: float  # the largest difference of a score here
    kl: float  # KL(A || B) in nats


class Worst(NamedTuple):
    """One element, with what each party and float64 have there."""

    error: float
    at: tuple[int, ...]
    a: float | None
    b: float | None
    exact: float | None
    ulps: float


@dataclass
class Summary:
    """One tap."""

    tap: str
    shape: tuple[int, ...]
    columns: list[str]
    sums: dict[str, list[Array]] = field(default_factory=dict)  # kind of error -> sums of squares, (B, T, columns)
    counts: list[Array] = field(default_factory=list)  # of the elements in them
    ulps: Array = field(default_factory=lambda: np.zeros(BINS, np.int64))
    worst: list[Worst] = field(default_factory=list)

    def grid(self, kind: str) -> tuple[list[str], list[list[float | None]]]:
        """Names of the rows and rms errors of the cells; None where nothing is defined, infinite where a NaN is."""
        sums, counts = np.concatenate(self.sums[kind], axis=1), np.concatenate(self.counts, axis=1)
        B, T, W = sums.shape
        starts = cuts(B * T, CELLS[0])
        total, n = (np.add.reduceat(x.reshape(B * T, W), starts) for x in (sums, counts))
        cells = [[math.sqrt(s / c) if c else None for s, c in zip(*row, strict=True)]
                 for row in zip(total.tolist(), n.tolist(), strict=True)]  # fmt: skip
        names = [f"{i // T}:{i % T}" if B > 1 else str(i) for i in range(B * T)]
        return spans(names, starts), cells


def cuts(n: int, at_most: int) -> list[int]:
    """Where blocks of about the same size begin."""
    count = min(n, at_most)
    return [n * i // count for i in range(count)]


def spans(names: list[str], starts: list[int]) -> list[str]:
    """ "4" for a block of one, "4-7" for one of several."""
    ends = [*starts[1:], len(names)]
    return [names[i] if j == i + 1 else f"{names[i]}-{names[j - 1]}" for i, j in zip(starts, ends, strict=True)]


def folded(tap: str, value: Array, heads: int) -> Array:
    """Sums over what a heat map does not show: (B, T, columns), a column being a head or a block of channels."""
    letters = OPERATIONS[split_tap(tap)[1]].shape
    if letters.startswith("B H T"):
        value = value.sum(axis=-1).transpose(0, 2, 1)  # (B, H, T, S or D) -> (B, T, H)
    elif letters.endswith("HD") and heads:
        value = value.reshape(*value.shape[:2], heads, -1).sum(axis=-1)
    return np.asarray(np.add.reduceat(value, cuts(value.shape[-1], CELLS[1]), axis=-1))


def columns_of(tap: str, shape: tuple[int, ...], heads: int) -> list[str]:
    """Names of those columns."""
    letters = OPERATIONS[split_tap(tap)[1]].shape
    by_head = letters.startswith("B H T") or (letters.endswith("HD") and heads > 0)
    n = (shape[1] if letters.startswith("B H T") else heads) if by_head else shape[-1]
    what = "head" if by_head else "token" if letters.endswith("V") else "channel"
    return [f"{what}{'s' if '-' in name else ''} {name}"
            for name in spans([str(i) for i in range(n)], cuts(n, CELLS[1]))]  # fmt: skip


class Evidence:
    """A `report.Watch`: sums up the taps of one pair after the other."""

    def __init__(self) -> None:
        self.pairs: list[Witness] = []

    def begin(
        self, a: str, b: str, given: Mapping[str, Array], model: Subject | None = None, case: Case | None = None
    ) -> None:
        """The taps of these two parties follow; `given` are A's outputs."""
        self.pairs.append(Witness(a, b, model, case))
        for name, value in given.items():
            self.pairs[-1].sample(name, value)

    def see(self, seen: Seen) -> None:
        """One tap, or some positions of it."""
        self.pairs[-1].see(seen)


@dataclass
class Witness:
    """One pair of parties: summaries by tap, tokens, and samples of A by which the page can be judged again."""

    a: str
    b: str
    model: Subject | None = None
    case: Case | None = None
    taps: dict[str, Summary] = field(default_factory=dict)
    tokens: list[Token] = field(default_factory=list)
    samples: dict[str, Array] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)  # of the arrays that they are of
    last: Seen | None = None  # ln_f of both parties, for a file without a head

    @property
    def config(self) -> GPT2Config | None:
        return self.model.config if self.model is not None and self.model.found is not None else None

    def sample(self, name: str, value: Array) -> None:
        """Keep of an array what the page can be judged again by."""
        if value.size:
            with np.errstate(over="ignore"):
                self.samples[name] = statistics(value, SAMPLES).astype(np.float32)
            self.shapes[name] = list(value.shape)

    def see(self, seen: Seen) -> None:
        """Sum one tap up; `logits` come some positions at a time."""
        given = seen.a if seen.a is not None else seen.b
        part = split_tap(seen.tap)[1]
        if given is None or part not in OPERATIONS or given.ndim != len(OPERATIONS[part].shape.split()):
            return
        heads = self.config.n_head if self.config is not None else 0
        if seen.tap not in self.taps:
            self.taps[seen.tap] = Summary(seen.tap, given.shape, columns_of(seen.tap, given.shape, heads))
        found = self.taps[seen.tap]
        kinds = dict(errors(seen))
        for kind, error in kinds.items():
            with np.errstate(over="ignore"):
                found.sums.setdefault(kind, []).append(folded(seen.tap, np.square(error), heads))
        keep = np.ones(given.shape) if seen.keep is None else np.broadcast_to(seen.keep, given.shape).astype(float)
        found.counts.append(folded(seen.tap, keep, heads))
        total = next(iter(kinds.values()), None)
        if total is not None:
            rank(found, seen, total)
        if seen.a is not None and seen.keep is None and part != "logits":
            self.sample(seen.tap, seen.a)
        if seen.a is not None and seen.b is not None:
            if part == "logits":
                self.tokens += tokens(seen.a, seen.b, seen.exact, seen.start)
            elif part == "ln_f":
                self.last = seen

    def finish(self) -> None:
        """Tokens of a file without a head: what its last hidden states say through wte, as GPT-2's own head does."""
        if self.tokens or self.last is None or self.model is None or self.model.found is None or self.case is None:
            return
        call, program = self.model.call(self.case.feeds), self.model.program
        a, b, exact = self.last.a, self.last.b, self.last.exact
        assert a is not None
        assert b is not None
        assert exact is not None
        for start in range(0, a.shape[1], ROWS):
            low, theirs, high = (
                program.run("logits", call, [x[:, start : start + ROWS]], np.dtype(dtype))
                for x, dtype in ((a, np.float32), (b, np.float32), (exact, np.float64))
            )
            self.tokens += tokens(low, theirs, high, start)


def errors(seen: Seen) -> Iterator[tuple[str, Array]]:
    """Kinds of error that can be told of a tap, the total one first, as |difference| in float64."""
    pairs = [("total", seen.a, seen.b), ("local A", seen.a, seen.op_a), ("local B", seen.b, seen.op_b)]
    if seen.a is None or seen.b is None:
        pairs[0] = ("total", seen.a if seen.a is not None else seen.b, seen.exact)
    for kind, one, other in pairs:
        if one is not None and other is not None:
            error = difference(one, other)
            yield kind, error if seen.keep is None else np.where(np.broadcast_to(seen.keep, error.shape), error, 0.0)


def rank(found: Summary, seen: Seen, error: Array) -> None:
    """The histogram in ulps of the largest number of each row, and the worst elements."""
    reference = next(x for x in (seen.a, seen.exact, seen.b) if x is not None)
    if seen.b is None and seen.exact is not None:
        reference = seen.exact
    with np.errstate(over="ignore", invalid="ignore"):
        largest = np.nan_to_num(np.abs(reference), nan=0.0, posinf=0.0).max(axis=-1, keepdims=True)
        ulp = np.spacing(np.maximum(largest, np.finfo(np.float32).tiny).astype(np.float32)).astype(np.float64)
        ulps = error / ulp
        bins = np.where(ulps < 1, ulps > 0, 2 + np.floor(np.log2(np.maximum(ulps, 1))))
    held = np.ones(error.shape, bool) if seen.keep is None else np.broadcast_to(seen.keep, error.shape)
    found.ulps += np.bincount(np.minimum(bins[held], BINS - 1).astype(int), minlength=BINS)
    flat = error.reshape(-1)
    top = np.argpartition(-flat, min(WORST, flat.size - 1))[:WORST]
    for place in top[flat[top] > 0]:
        at = tuple(int(i) for i in np.unravel_index(int(place), error.shape))
        index = tuple(i + (seen.start if axis == 1 else 0) for axis, i in enumerate(at)) if seen.start else at
        a, b, exact = (None if x is None else float(x[at]) for x in (seen.a, seen.b, seen.exact))
        found.worst.append(Worst(float(error[at]), index, a, b, exact, float(ulps[at])))
    found.worst = sorted(found.worst, key=lambda w: (-w.error, w.at))[:WORST]


def tokens(a: Array, b: Array, exact: Array | None, start: int) -> Iterator[Token]:
    """What two sets of logits, (B, positions, V), say at each position."""
    for batch in range(a.shape[0]):
        for row in range(a.shape[1]):
            x, y = (np.nan_to_num(v[batch, row].astype(np.float64), nan=-np.inf) for v in (a, b))
            if not (np.isfinite(x).any() and np.isfinite(y).any()):
                continue
            second, first = np.partition(x, -2)[-2:] if x.size > 1 else (x[0], x[0])
            with np.errstate(invalid="ignore", over="ignore"):
                p, q = (v - v.max() - np.log(np.exp(v - v.max()).sum()) for v in (x, y))
                kl = float(np.where(np.exp(p) > 0, np.exp(p) * (p - q), 0).sum())
            mine, theirs, apart = int(x.argmax()), int(y.argmax()), float(difference(x, y).max())
            size = float(max(abs(x[mine]), abs(x[theirs])))
            right = None if exact is None else int(exact[batch, row].argmax())
            yield Token(batch, start + row, mine, theirs, right, float(first - second), size, apart, max(kl, 0.0))
