"""How often the debugger is right: files and ports with one mistake, and right ones, judged kind by kind.

    python tests/support/judge.py [--only WORD] [--verbose]
        [--kind file,taps,outputs,logits,cache,wiring,rewired,record,clean]

Everything is made from a small GPT-2 that the program writes itself. For each case: is the first place right, is
the cause among the first two, is a cause named "most likely" that is not one of the case's, is a right one failed.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import gpt2np
from cache_ports import CACHE_BUGS, call_on
from mutants import MUTANTS
from other_models import OTHERS
from port_bugs import PORTS, Bug, port_of
from wiring_mutants import WIRINGS, rewired
from wrong_records import IDS, OTHER, RECORDS

# wiring: a file beside the one whose wiring it changed; rewired: such a file alone, against the right one's outputs
# logits: a port's logits and nothing else
KINDS = ("file", "taps", "outputs", "logits", "cache", "wiring", "rewired", "record", "clean")
BUGS = {**PORTS, **OTHERS}
SIZES = "3,4,64,32,96"


class Verdict(NamedTuple):
    failed: bool  # the report says FAIL
    place: str
    causes: list[str]
    likely: str  # the cause that is called most likely, or ""
    text: str
    report: Any = None

    def is_at(self, places: tuple[str, ...]) -> bool:
        """Whether the place is one of these; an output is known by how it begins, "" is any place."""
        return any(self.place == p or (p.startswith("present") and self.place.startswith(p)) or not p for p in places)

    def names(self, causes: tuple[str, ...]) -> bool:
        """Whether one of these is among the first two causes, or said by the headline, a fact or where inside it is."""
        said = " ".join([self.text, *self.report.facts, self.report.diagnosis.where if self.report.diagnosis else ""])
        return bool(set(self.causes) & set(causes)) or any(" " in c and c in said for c in causes)

    def misleads(self, causes: tuple[str, ...]) -> bool:
        """Whether a cause is called most likely that is none of these."""
        return bool(self.likely) and self.likely not in causes and not self.names(causes)

    def __repr__(self) -> str:
        return f"{self.place}: {self.causes}; {self.text}"


class Case(NamedTuple):
    kind: str
    name: str
    run: Callable[[Path], Verdict]  # given an empty folder
    places: tuple[str, ...] = ()  # any of them is right; none: nothing is wrong
    causes: tuple[str, ...] = ()  # either of these, or words that the report must say


def write_small(folder: Path, kind: str, seed: int = 0) -> Path:
    """A small random GPT-2 with recorded data; kind: base, lm or past."""
    from gpt2np.commands.synth import synth

    target = folder / kind
    if not target.exists():
        synth(SIZES, seed, target, kind == "lm", kind == "past", False, None, None)
    return target


def verdict_of(report: Any) -> Verdict:
    found = report.details.get("diagnosis") or {}
    guesses = found.get("guesses", [])
    likely = guesses[0]["cause"] if guesses and guesses[0].get("likely", "most likely" in report.headline) else ""
    place = found.get("tap", "") or (report.place.first if report.place else "")
    return Verdict(report.exit_code == 1, place, [g["cause"] for g in guesses[:2]], likely, report.headline, report)


def diff(model: Path, other: Path, feeds: dict[str, np.ndarray]) -> Verdict:
    from gpt2np.parity import diff
    from gpt2np.parity.cases import Case as Input

    return verdict_of(diff.diff(str(model), str(other), lambda m: [Input("input", feeds, None)]))


def from_files(source: Path, names: list[str] | None = None) -> Iterator[Case]:
    import onnx

    from gpt2np.parity.capture import Options
    from gpt2np.parity.run import parity

    for name, mutant in MUTANTS.items():
        model = onnx.load(source / "model.onnx")
        if (names is not None and name not in names) or not mutant.apply(model):
            continue

        def run(folder: Path, model: Any = model) -> Verdict:
            for path in sorted(source.glob("test_data_set_*"))[:2]:
                shutil.copytree(path, folder / path.name, copy_function=shutil.copyfile)
            onnx.save(model, folder / "model.onnx")
            return verdict_of(parity(Options(folder / "model.onnx", engine="numpy")))

        yield Case("file", name, run, (mutant.tap,), mutant.causes)


def from_ports(source: Path, bugs: dict[str, Bug], kinds: tuple[str, ...]) -> Iterator[Case]:
    model = gpt2np.load(source, engine="numpy")
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 12))
    for name, bug in bugs.items():
        for kind in [k for k in kinds if k == "taps" or bug.outputs_tell]:

            def run(folder: Path, bug: Bug = bug, kind: str = kind) -> Verdict:
                port = port_of(model.weights, bug)
                presents = port.run(ids)
                arrays = {f"output{i + 2}": p for i, p in enumerate(presents)} if kind != "logits" else {}
                arrays["output1"] = port.taps["logits"][None]
                np.savez(folder / "port.npz", **({**arrays, **port.taps} if kind == "taps" else arrays))
                return diff(source, folder / "port.npz", {"input1": ids[None]})

            yield Case(kind, name, run, (bug.tap,), bug.causes)


def clean_ports(source: Path) -> Iterator[Case]:
    """The port without a mistake: all taps, outputs alone, a past, padding, and numbers in other layouts."""
    model = gpt2np.load(source, engine="numpy")
    V = model.config.vocab_size
    for seed in range(4):
        ids = np.random.default_rng(seed).integers(0, V, (2, 9 + seed))

        def run(folder: Path, ids: np.ndarray = ids, seed: int = seed) -> Verdict:
            port = port_of(model.weights, None)
            if source.name == "past":
                call, feeds = call_on(port, seed, V)
                presents = port.run(**call)
                arrays = {
                    f"present.{i}.{n}": p[j] for i, p in enumerate(presents) for j, n in enumerate(("key", "value"))
                }
                arrays["logits"] = port.taps["logits"]
            else:
                feeds = {"input1": ids[None]}
                presents = port.run(ids)
                arrays = {f"output{i + 2}": p for i, p in enumerate(presents)} | {"output1": port.taps["logits"][None]}
            np.savez(folder / "port.npz", **(arrays if seed % 2 else {**arrays, **port.taps}))
            return diff(source, folder / "port.npz", feeds)

        yield Case("clean", f"right port {seed} of {source.name}", run)


def from_caches(source: Path) -> Iterator[Case]:
    model = gpt2np.load(source, engine="numpy")
    for name, bug in CACHE_BUGS.items():

        def run(folder: Path, bug: Any = bug) -> Verdict:
            port = port_of(model.weights, None)
            call, feeds = call_on(port, 0, model.config.vocab_size, bug.padded)
            past = call["past"]
            if bug.change is not None:
                bug.change(port, call)
            presents = port.run(**call)
            presents = presents if bug.after is None else bug.after(presents, past)
            arrays = {
                f"present.{i}.{n}": x for i, p in enumerate(presents) for n, x in zip(("key", "value"), p, strict=True)
            }
            np.savez(folder / "port.npz", logits=port.taps["logits"], **arrays)
            return diff(source, folder / "port.npz", feeds)

        yield Case("cache", name, run, (bug.place,), bug.causes)


def from_wirings(source: Path, kinds: tuple[str, ...]) -> Iterator[Case]:
    import onnx

    from gpt2np.onnx.read.datasets import save_set
    from gpt2np.parity.capture import Options
    from gpt2np.parity.parties import Ours
    from gpt2np.parity.run import parity
    from gpt2np.parity.subject import Subject

    subject, proto = Subject(source / "model.onnx"), onnx.load(source / "model.onnx")
    names = {tap: place.tensor for tap, place in subject.recognised.taps.items()}
    feeds = {"input1": np.concatenate([IDS, OTHER])[None]}
    outputs = Ours(subject, "numpy").run(feeds).outputs
    for name, wiring in WIRINGS.items():
        for kind in kinds:

            def run(folder: Path, wiring: Any = wiring, kind: str = kind) -> Verdict:
                (folder / "bad").mkdir()
                onnx.save(rewired(proto, names, wiring), folder / "bad" / "model.onnx")
                if kind == "wiring":
                    return diff(source, folder / "bad", feeds)
                save_set(folder / "bad" / "test_data_set_0", feeds, outputs)
                return verdict_of(parity(Options(folder / "bad" / "model.onnx", engine="numpy")))

            yield Case(kind, name, run, wiring.places, wiring.said)


def from_records(source: Path) -> Iterator[Case]:
    from gpt2np.onnx.read.datasets import save_set
    from gpt2np.parity.capture import Options
    from gpt2np.parity.parties import Ours
    from gpt2np.parity.run import parity
    from gpt2np.parity.subject import Subject

    ours = Ours(Subject(source / "model.onnx"), "numpy")

    def given(ids: np.ndarray) -> dict[str, np.ndarray]:
        return {name: value.copy() for name, value in ours.run({"input1": ids[None]}).outputs.items()}

    for name, record in RECORDS.items():

        def run(folder: Path, record: Any = record) -> Verdict:
            shutil.copyfile(source / "model.onnx", folder / "model.onnx")
            save_set(folder / "test_data_set_0", {"input1": IDS[None]}, record.change(given(IDS), given, IDS))
            save_set(folder / "test_data_set_1", {"input1": OTHER[None]}, given(OTHER))
            return verdict_of(parity(Options(folder / "model.onnx", engine="numpy")))

        yield Case("record", name, run, ("",), record.said)


def judge(case: Case) -> tuple[Verdict | None, str, list[bool]]:
    """The verdict, or what went wrong in getting one; [place right, cause in two, false likely, false alarm]."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            v = case.run(Path(folder))
        except Exception as error:  # a crash is a miss
            return None, f"{type(error).__name__}: {error}", [False, False, False, not case.places]
    if not case.places:
        return v, v.text, [True, True, False, v.failed]
    return v, v.text, [v.failed and v.is_at(case.places), v.names(case.causes), v.misleads(case.causes), False]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", default=",".join(KINDS))
    parser.add_argument("--only", default="")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    kinds = options.kind.split(",")
    totals = {k: [0, 0, 0, 0, 0, 0.0] for k in kinds}
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(Path(folder), kinds):
            if options.only not in case.name:
                continue
            start = time.process_time()
            v, text, marks = judge(case)
            took = time.process_time() - start
            row = totals[case.kind]
            row[0] += 1
            row[5] += took
            for i, mark in enumerate(marks):
                row[i + 1] += mark
            good = marks == [True, True, False, False]
            if options.verbose or not good:
                words = f"{v.place} {v.causes}{' LIKELY' if v.likely else ''}" if v else "CRASH"
                flags = "".join(c if m else "-" for c, m in zip("PCFA", marks, strict=True))
                wanted = f"{' or '.join(case.places)} {case.causes}"
                print(f"{flags} {case.kind:8}{case.name:34} wanted {wanted}; {words}; {text}"[:400], flush=True)
    print(f"{'kind':10}{'cases':>6}{'place':>7}{'cause':>7}{'false likely':>14}{'false alarm':>13}{'seconds':>9}")
    for kind, (n, *marks, took) in totals.items():
        print(f"{kind:10}{n:6}{marks[0]:7}{marks[1]:7}{marks[2]:14}{marks[3]:13}{took:9.0f}")


def cases(folder: Path, kinds: list[str]) -> Iterator[Case]:
    base, lm = write_small(folder, "base", 2), write_small(folder, "lm", 0)
    if "file" in kinds:
        yield from from_files(base)
        yield from from_files(lm, ["untied_head", "untied_head_slightly"])
    yield from from_ports(lm, BUGS, tuple(k for k in ("taps", "outputs", "logits") if k in kinds))
    yield from from_wirings(base, tuple(k for k in ("wiring", "rewired") if k in kinds))
    if "record" in kinds:
        yield from from_records(base)
    past = write_small(folder, "past", 1) if {"cache", "clean"} & set(kinds) else None
    if past is not None and "cache" in kinds:
        yield from from_caches(past)
    if past is not None and "clean" in kinds:
        yield from clean_ports(lm)
        yield from clean_ports(past)


if __name__ == "__main__":
    sys.exit(main())
