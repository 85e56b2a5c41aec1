"""Files that no exporter writes: gpt2np loads each or refuses it with an error of its own, in time and in memory.

    python tests/support/hostile_campaign.py --seed 1 --count 20000     one line for each finding, then a table
    python tests/support/hostile_campaign.py --only 1:57 --save mutant.onnx

Mutants are looked at in a process of their own, within `MEMORY`; one that dies or hangs is a finding as well. A
finding is named SEED:NUMBER, from which the mutant is made again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from gpt2np.commands.info import describe, print_info
from gpt2np.errors import Gpt2npError
from gpt2np.files import allowance
from gpt2np.onnx.read.reader import open_model
from gpt2np.onnx.recognise import recognise
from gpt2np.session import InferenceSession
from mutation_campaign import sound_files
from runtime import feeds_for
from structural_mutants import mutant

MEMORY = 4 << 30  # bytes of address space for the process
SECONDS = 5.0  # of the processor's time that one file may take
HUNG = 60.0  # seconds of the processor's time after which it is given up; without any progress, ten times as long


@dataclass
class Verdict:
    """What came of one mutant; the words in capitals are findings."""

    word: str  # "loaded", "refused", "guarded" (see `typed_errors`), "UNTYPED", "SLOW", "LARGE", "DIED", "HUNG"
    why: str = ""
    seconds: float = 0.0  # of the processor's time
    peak: int = 0  # bytes held at most, beyond what was held before


def bases(folder: Path) -> dict[str, bytes]:
    """The sound files that every clone can have, without the larger ones of other exporters."""
    return {n: p.read_bytes() for n, p in sound_files(folder).items() if not n.startswith("shared")}


def make(files: dict[str, bytes], seed: int, number: int) -> tuple[str, bytes]:
    """The mutant of this number, and what was done to which file."""
    rng = np.random.default_rng([seed, number])
    name = list(files)[number % len(files)]
    done, data = mutant(files[name], rng)
    return f"{name}: {done}", data


def look(path: Path) -> None:
    """All that `info`, `load` and a session do with a file."""
    file = open_model(path)
    found = recognise(file)
    describe(file, found)
    with contextlib.redirect_stdout(io.StringIO()):
        print_info(file, found)
    for source in found.sources.values():
        source.load()
    session = InferenceSession(path, engine="numpy")
    try:
        feeds = feeds_for(found, 1, 3)
    except Exception:  # inputs that these tests know nothing of
        return
    session.run(None, feeds)


def held(key: str) -> int:
    """Bytes of memory that the process has (VmRSS), or had at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def judge(data: bytes, folder: Path) -> Verdict:
    """Look at a file, and at what that takes."""
    path = folder / "model.onnx"
    path.write_bytes(data)
    Path("/proc/self/clear_refs").write_text("5")  # what was held at most counts from here
    before, began = held("VmRSS"), time.process_time()
    verdict = Verdict("loaded")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            look(path)
    except Gpt2npError as error:
        cause = error.__cause__
        guarded = cause is not None and not isinstance(cause, Gpt2npError) and "not what gpt2np can read" in str(error)
        verdict = Verdict("guarded", f"{last_place(cause)} -> {error}") if guarded else Verdict("refused", str(error))
    except Exception as error:
        verdict = Verdict("UNTYPED", last_place(error))
    verdict.seconds, verdict.peak = time.process_time() - began, held("VmHWM") - before
    if verdict.seconds > SECONDS:
        verdict.word = "SLOW"
    if verdict.peak > 3 * allowance(len(data)):
        verdict.word = "LARGE"
    return verdict


def last_place(error: BaseException | None) -> str:
    """Where in gpt2np an error came up."""
    assert error is not None
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "gpt2np" in f.filename]
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "elsewhere"
    return f"{type(error).__name__} in {place}: {str(error)[:200]}"


def work(files: dict[str, bytes], seed: int, numbers: range, results: Connection) -> None:
    """The process in which mutants are made and looked at, one after another."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            signal.setitimer(signal.ITIMER_PROF, HUNG)  # ends the process, even inside of a library
            results.send((number, "", None))
            done, data = make(files, seed, number)
            results.send((number, done, judge(data, Path(folder))))
    os._exit(0)  # nothing of the parent's is to be cleaned up


def run(files: dict[str, bytes], seed: int, numbers: range) -> Iterator[tuple[int, str, Verdict]]:
    """What came of each mutant."""
    todo = numbers
    while todo:
        mine, theirs = multiprocessing.Pipe(duplex=False)
        worker = multiprocessing.get_context("fork").Process(target=work, args=(files, seed, todo, theirs))
        worker.start()
        theirs.close()
        current = todo[0]
        while True:
            word = "HUNG"
            if mine.poll(10 * HUNG):
                try:
                    current, done, verdict = mine.recv()
                except EOFError:
                    worker.join()
                    word = "HUNG" if worker.exitcode == -signal.SIGPROF else "DIED" if worker.exitcode else ""
                else:
                    if verdict is not None:
                        yield current, done, verdict
                    continue
            worker.kill()
            worker.join()
            todo = range(current + 1, numbers.stop)
            if word:
                yield current, make(files, seed, current)[0], Verdict(word, f"exit code {worker.exitcode}")
            break


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--from", type=int, default=0, dest="start")
    parser.add_argument("--only", help="one mutant, SEED:NUMBER")
    parser.add_argument("--save", type=Path, help="keep the mutant of --only here")
    parser.add_argument("--all", action="store_true", help="show guarded ones, refusals and loaded files, too")
    args = parser.parse_args()
    counts: Counter[str] = Counter()
    slowest, largest = Verdict(""), Verdict("")
    with tempfile.TemporaryDirectory() as folder:
        files = bases(Path(folder))
        numbers = range(args.start, args.start + args.count)
        if args.only:
            args.seed, number = map(int, args.only.split(":"))
            numbers = range(number, number + 1)
            if args.save:
                args.save.write_bytes(make(files, args.seed, number)[1])
        for number, done, verdict in run(files, args.seed, numbers):
            counts[verdict.word] += 1
            slowest, largest = (
                max(slowest, verdict, key=lambda v: v.seconds),
                max(largest, verdict, key=lambda v: v.peak),
            )
            if verdict.word.isupper() or args.all or args.only:
                cost = f"{verdict.seconds:.1f} s, {verdict.peak >> 20} MiB"
                print(f"{verdict.word} {args.seed}:{number} {done} ({cost}): {verdict.why}", flush=True)
    for word, count in counts.most_common():
        print(f"{count:6d} {word}")
    print(f"slowest {slowest.seconds:.1f} s, largest {largest.peak >> 20} MiB")
    return int(any(word.isupper() for word in counts))


if __name__ == "__main__":
    sys.exit(main())
