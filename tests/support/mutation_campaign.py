"""Random semantic mutants of small sound files: gpt2np refuses each, or gives ONNX Runtime's numbers.

    python tests/support/mutation_campaign.py --seed 1 --count 10000        one line for each finding, then a table
    python tests/support/mutation_campaign.py --sound --count 1000          harmless rewrites, which must load
    python tests/support/mutation_campaign.py --only zoo_base:1:57 --save mutant.onnx

A finding is named BASE:SEED:NUMBER, from which the mutant is made again.
"""

from __future__ import annotations

import argparse
import itertools
import signal
import sys
import tempfile
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

import forms
from gpt2np.convert.writer import write_model
from gpt2np.errors import Gpt2npError
from gpt2np.masks import MaskRule
from gpt2np.onnx.read.reader import open_model
from gpt2np.onnx.recognise import Recognised, recognise
from gpt2np.session import InferenceSession
from harmless_rewrites import rewrite
from runtime import DATA, feeds_for
from semantic_mutants import mutate
from tiny import tiny_config, tiny_sources

Array = np.ndarray
Feeds = dict[str, Array]
SHARED = Path(__file__).parents[3] / "shared" / "fixtures"
SECONDS = 30.0  # of the processor's time for one mutant


# ------------------------------------------------------------------------------------------------------ sound files
def written(folder: Path) -> dict[str, Path]:
    """Files that the project's own writer and the tests' forms make."""
    kinds: dict[str, dict[str, Any]] = {
        "own_zoo": {"opset": 10, "lm_head": False, "with_past": False},
        "own_head": {"opset": 13, "lm_head": True, "with_past": False},
        "own_past": {"opset": 18, "lm_head": True, "with_past": True},
    }
    made = {}
    for name, how in kinds.items():
        config = tiny_config(mask=MaskRule(value=-1e4 if how["opset"] < 17 else float(np.finfo(np.float32).min)))
        made[name] = folder / f"{name}.onnx"
        write_model(made[name], config, tiny_sources(config), **how)
    plain: dict[str, tuple[forms.Attention, str]] = {
        "form_plain": (forms.written_out(forms.causal, past=True), "past_key_0"),
        "form_einsum": (forms.einsum_attention, ""),
        "form_attention": (forms.contrib_attention(), "past_0"),
        "form_mha": (forms.multi_head_attention(), "past_key_0"),
    }
    for name, (attention, past) in plain.items():
        form = forms.Form()
        form.norm = forms.rearranged_norm if name == "form_einsum" else None
        ids = form.input("ids", np.int64, "B", "T")
        form.head(form.blocks(form.embed(ids, past, 3 if past == "past_0" else 2), attention))
        made[name] = form.save(folder / f"{name}.onnx")
    return made


def sound_files(folder: Path) -> dict[str, Path]:
    """Every base by its name: kept exports, written files, and further exporters' where they are present."""
    kept = ("optimum_past", "dynamo_20", "dynamo_23", "old_past", "fused_past", "q4")
    more = ("zoo_base", "zoo_lm_head", "optimum_past", "dynamo", "ort_fused")
    found = {name: DATA / f"{name}.onnx" for name in kept} | written(folder)
    return found | {f"shared_{n}": SHARED / n / "model.onnx" for n in more if (SHARED / n / "model.onnx").exists()}


def session(model: onnx.ModelProto, optimise: bool = False) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@dataclass
class Base:
    """A sound file, inputs for it, and what each of its values was on one run."""

    name: str
    path: Path

    @cached_property
    def model(self) -> onnx.ModelProto:
        return onnx.load(self.path)

    @cached_property
    def found(self) -> Recognised:
        return recognise(open_model(self.path))

    @cached_property
    def feeds(self) -> list[Feeds]:
        """Several batches, lengths up to n_ctx, pasts and paddings; every token id is met."""
        config = self.found.config
        roles = {port.role for port in self.found.inputs}
        N, past = config.n_ctx, bool(roles & {"past", "past_key"})
        sizes = [(2, 5, 3), (1, 1, 0), (1, 1, N - 1), (3, 2, N // 2)] if past else [(2, 5, 0), (1, 1, 0), (3, 2, 0)]
        made = [feeds_for(self.found, *s, seed=k) for k, s in enumerate([*sizes, (2, N // 2 + 1, 0), (1, N, 0)])]
        if "attention_mask" in roles:
            for k, (B, T, P) in enumerate([(2, 4, 3 if past else 0), (3, N - 2, 2 if past else 0)]):
                for hidden in (slice(0, 2), slice(P + T - 2, None), slice(1, 3)):  # left, right, a hole
                    keep = np.ones((B, P + T), int)
                    keep[1:, hidden] = 0
                    made.append(feeds_for(self.found, B, T, P, keep, seed=20 + k))
        every = feeds_for(self.found, -(-config.vocab_size // N), N, 0, seed=7)
        ids = next(p.name for p in self.found.inputs if p.role == "input_ids")
        every[ids] = (np.arange(every[ids].size) % config.vocab_size).reshape(every[ids].shape).astype(every[ids].dtype)
        return [*made, every]

    @cached_property
    def values(self) -> dict[str, Array]:
        """What every value of the graph is on the first of the inputs."""
        more = onnx.ModelProto.FromString(self.model.SerializeToString())
        have = {o.name for o in more.graph.output}
        inner = {o: None for n in more.graph.node for o in n.output if o and o not in have}
        more.graph.output.extend(onnx.helper.make_empty_tensor_value_info(o) for o in inner)
        made = session(more).run(None, self.feeds[0])
        found = {o.name: v for o, v in zip(more.graph.output, made, strict=True) if isinstance(v, np.ndarray)}
        weights = {t.name: onnx.numpy_helper.to_array(t) for t in self.model.graph.initializer}
        return {**self.feeds[0], **weights, **found}


# --------------------------------------------------------------------------------------------------------- judging
@dataclass
class Verdict:
    word: str  # "refused", "agrees", "invalid" (ONNX Runtime does not run it), "WRONG", "UNTYPED", "SLOW", "REFUSED"
    why: str = ""


def difference(got: Array, expected: Array, others: Callable[[], tuple[Array, float]]) -> str:
    """How a result differs by more than rounding can; "" where it does not.

    `others` gives it by ONNX Runtime's optimised program, and how far float32 strays from float64 in this model.
    """
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return f"{got.dtype} {got.shape} for {expected.dtype} {expected.shape}"
    got, expected = got.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(expected)
    if not np.array_equal(got[~finite], expected[~finite], equal_nan=True) or not np.isfinite(got[finite]).all():
        return "not finite where the other is, or the other way round"
    if not finite.any():
        return ""
    got, expected = got[finite], expected[finite]
    signal_size = float(np.sqrt(np.mean(expected**2)))
    error = float(np.abs(got - expected).max())
    if error <= 1e-4 * signal_size + 1e-7:
        return ""
    # A change can make a model that amplifies rounding: then ONNX Runtime's own programs differ from each other, and
    # gpt2np's float32 from its float64, on this input or another, about as far as ONNX Runtime does (8: its sums are
    # longer chains). A wrong number in a model that does not amplify is hundreds of times further off.
    optimised, amplified = others()
    if error <= max(30 * float(np.abs(optimised[finite] - expected).max()), 8 * amplified):
        return ""
    return f"off by {error:.2g}, the signal is {signal_size:.2g}"


def judge(base: Base, model: onnx.ModelProto, folder: Path) -> Verdict:
    """Whether gpt2np refuses a mutant, agrees with ONNX Runtime on every input, or neither."""
    try:
        theirs = session(model)
        theirs.run(None, base.feeds[0])
    except Exception as error:
        return Verdict("invalid", str(error).splitlines()[0])
    path = folder / "model.onnx"
    onnx.save(model, path)
    try:
        ours = InferenceSession(path, engine="numpy")
    except Gpt2npError as error:
        return Verdict("refused", f"{type(error).__name__}: {error}")
    except Exception as error:
        return Verdict("UNTYPED", _last_place(error))
    for feeds in base.feeds:
        try:
            expected = theirs.run(None, feeds)
        except Exception:
            continue  # a change that only some lengths can have
        try:
            got = ours.run(None, feeds)
        except Gpt2npError as error:
            return Verdict("refused", f"at {_sizes(feeds)}: {error}")
        except Exception as error:
            return Verdict("UNTYPED", f"at {_sizes(feeds)}: {_last_place(error)}")
        for k, (a, e) in enumerate(zip(got, expected, strict=True)):
            how = difference(a, e, lambda k=k, feeds=feeds: _others(model, path, base.feeds, feeds, k))
            if how:
                return Verdict("WRONG", f"{ours.get_outputs()[k].name} at {_sizes(feeds)}: {how}")
    return Verdict("agrees")


def _others(model: onnx.ModelProto, path: Path, every: list[Feeds], feeds: Feeds, k: int) -> tuple[Array, float]:
    single, double = (InferenceSession(path, engine="numpy", dtype=dtype) for dtype in ("float32", "float64"))
    strays = 0.0
    for each in every:
        try:
            a, b = (s.run(None, each)[k].astype(np.float64) for s in (single, double))
        except Gpt2npError:
            continue
        strays = max(strays, float(np.abs(np.subtract(a, b, where=np.isfinite(b), out=np.zeros_like(b))).max()))
    return session(model, True).run(None, feeds)[k].astype(np.float64), strays


def _sizes(feeds: Feeds) -> str:
    return ", ".join(f"{n} {list(v.shape)}" for n, v in list(feeds.items())[:3])


def _last_place(error: BaseException) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(place.filename).name}:{place.lineno}: {str(error)[:200]}"


class _TooSlow(BaseException):
    pass


def _stop(*_: object) -> None:
    raise _TooSlow


# -------------------------------------------------------------------------------------------------------- campaigns
@dataclass
class Finding:
    name: str
    what: str
    verdict: Verdict


@dataclass
class Campaign:
    """Mutants, or harmless rewrites, one after another."""

    bases: dict[str, Base]
    seed: int = 0
    sound: bool = False
    first: int = 0  # the number to begin with: a campaign that was ended goes on from there
    counts: Counter[str] = field(default_factory=Counter)

    def make(self, base: Base, number: int) -> tuple[str, onnx.ModelProto] | None:
        """The mutant of this number, one in eight with a second change, or None if the draw fails."""
        rng = np.random.default_rng([self.seed, number])
        change = rewrite if self.sound else mutate
        made = change(base.model, base.values, rng)
        if made is None or rng.random() > 0.125:
            return made
        second = change(made[1], base.values, rng)
        return made if second is None else (f"{made[0]}; {second[0]}", second[1])

    def one(self, base: Base, number: int, folder: Path) -> Finding | None:
        """Make and judge a mutant; None where this number makes none that runs."""
        try:
            made = self.make(base, number)
        except Exception as error:
            # values of the first change are not in the base, and onnx's converter has its limits
            self.counts[f"no mutant: {type(error).__name__}"] += 1
            return None
        if made is None:
            return None
        previous = signal.signal(signal.SIGPROF, _stop)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            verdict = judge(base, made[1], folder)
        except _TooSlow:
            verdict = Verdict("SLOW", f"more than {SECONDS:g} s")
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, previous)
        if verdict.word == "invalid":
            return None
        if self.sound and verdict.word == "refused":
            verdict.word = "REFUSED"
        return Finding(f"{base.name}:{self.seed}:{number}", made[0], verdict)

    def run(self, count: int, folder: Path) -> Iterator[Finding]:
        """`count` mutants that run, of the bases in turn."""
        yield from self._count(count, (self.one(self.base(n), n, folder) for n in itertools.count(self.first)))

    def base(self, number: int) -> Base:
        return list(self.bases.values())[number % len(self.bases)]

    def run_apart(self, count: int, folder: Path, workers: int) -> Iterator[Finding]:
        """The same by other processes: ONNX Runtime's own assertions end a process, and some mutants break one."""
        yield from self._count(count, self._apart(folder, workers))

    def _apart(self, folder: Path, workers: int) -> Iterator[Finding | None]:
        numbers = itertools.count(self.first)
        while True:
            with ProcessPoolExecutor(workers, get_context("spawn"), _start, (self, folder)) as pool:
                waiting: deque[tuple[int, Future[Finding | None]]] = deque()
                try:
                    for number in numbers:
                        waiting.append((number, pool.submit(_one, number)))
                        if len(waiting) > 4 * workers:
                            yield waiting.popleft()[1].result()
                except BrokenProcessPool:
                    # one of those that were under way: each is left out, and the campaign goes on behind them
                    self.counts["left out: the process ended"] += len(waiting) + 1

    def _count(self, count: int, findings: Iterable[Finding | None]) -> Iterator[Finding]:
        for finding in itertools.islice((f for f in findings if f is not None), count):
            self.counts[finding.verdict.word] += 1
            yield finding


def _start(campaign: Campaign, folder: Path) -> None:
    global _campaign, _folder
    _campaign, _folder = campaign, Path(tempfile.mkdtemp(dir=folder))


def _one(number: int) -> Finding | None:
    return _campaign.one(_campaign.base(number), number, _folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="begin with this number: go on with one that was ended")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--base", action="append", help="only this file; may be repeated")
    parser.add_argument("--sound", action="store_true", help="harmless rewrites, which must load")
    parser.add_argument("--only", help="one mutant, BASE:SEED:NUMBER")
    parser.add_argument("--save", type=Path, help="keep the mutant of --only here")
    parser.add_argument("--all", action="store_true", help="show refusals and agreements too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        files = sound_files(folder)
        if args.only:
            name, seed, number = args.only.split(":")
            campaign = Campaign({}, int(seed), args.sound)
            base = Base(name, files[name])
            if args.save and (mutant := campaign.make(base, int(number))):
                onnx.save(mutant[1], args.save)
            print(campaign.one(base, int(number), folder))
            return 0
        bases = {name: Base(name, path) for name, path in files.items() if not args.base or name in args.base}
        campaign = Campaign(bases, args.seed, args.sound, args.first)
        for finding in campaign.run_apart(args.count, folder, args.workers):
            if args.all or finding.verdict.word.isupper():
                print(f"{finding.verdict.word} {finding.name} {finding.what}: {finding.verdict.why}", flush=True)
    for word, count in campaign.counts.most_common():
        print(f"{count:6d} {word}")
    return int(any(word.isupper() for word in campaign.counts))


if __name__ == "__main__":
    sys.exit(main())
