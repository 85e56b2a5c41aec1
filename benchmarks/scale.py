"""How long a large corpus takes on many machines: a plan from measured rates, and a simulation that checks it.

    python benchmarks/scale.py              the plan's table, and the simulation with 1,000 fake workers
    python benchmarks/scale.py --measure    Dask's part, measured here: what a shard costs the scheduler
    python benchmarks/scale.py --overhead TEXT [--bytes N]
                                            two workers beside two processes started by hand, on two halves of a text

The plan adds up what happens one after the other. The simulation knows nothing of the plan: it moves a clock from event
to event, with one scheduler that serves one message at a time, one file server that all models come from, workers
that start when their model is there, take a shard when they are free, and vary in speed.
"""

from __future__ import annotations

import argparse
import heapq
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

DAY, HOUR = 86400.0, 3600.0
TURN = 4.0  # seconds; Dask does what it missed whenever it goes on, so that short turns cost it 2%


@dataclass(frozen=True)
class Job:
    """A corpus on a kind of machine; rates are those of docs/scale.md."""

    name: str
    tokens: float  # that are scored, or embedded
    tokens_per_second: float  # of one machine with two cores
    shard_tokens: float
    text_bytes: float = 1e10
    files: int = 100  # that the text is in: each is tokenized as a whole, by one worker; 0: lines, by every worker
    tokenizing: float = 1e6  # bytes a second
    model_bytes: float = 5e8
    server: float = 1e9  # bytes a second, for all machines together
    start: float = 8.0  # seconds from the model's file to the first shard: import, hash, load, check of the bits
    message: float = 7e-3  # seconds of the scheduler for each shard: --measure
    result: float = 1e-3  # seconds to find and to read one result at the end

    @property
    def shards(self) -> int:
        return round(self.tokens / self.shard_tokens)

    @property
    def shard(self) -> float:
        """Seconds."""
        return self.shard_tokens / self.tokens_per_second


SCORE = Job("score 10 GB", tokens=2.4e9, tokens_per_second=390, shard_tokens=16 * 512)
EMBED = Job("embed 8 million documents", tokens=2.4e9, tokens_per_second=1100, shard_tokens=256 * 300, files=0)


def planned(job: Job, machines: int) -> dict[str, float]:
    """Seconds of each part of a run."""
    rounds = -(-job.files // machines) if job.files else 0
    return {
        "models": machines * job.model_bytes / job.server + job.start,
        "tokenizing": rounds * job.text_bytes / job.files / job.tokenizing if job.files else 0.0,
        "work": max(job.shards * job.shard / machines, job.shards * job.message),
        "last shards": job.shard / 2,
        "results": job.shards * job.result,
    }


def simulated(job: Job, machines: int, seed: int = 0) -> float:
    """Seconds of a run, event by event."""
    rng = random.Random(seed)
    free = 0.0  # when the scheduler has served all messages until now
    speed = [rng.uniform(0.9, 1.1) for _ in range(machines)]
    # models come one after the other; who has one begins with texts, then with shards
    events = [((i + 1) * job.model_bytes / job.server + job.start, i) for i in range(machines)]
    heapq.heapify(events)
    texts, shards, end = job.files, job.shards, 0.0
    waiting: list[int] = []
    tokenized, last_text = 0, 0.0
    while events:
        now, worker = heapq.heappop(events)
        end = max(end, now)
        if texts:
            texts -= 1
            tokenized += 1
            done = now + job.text_bytes / job.files / job.tokenizing / speed[worker]
            last_text = max(last_text, done)
            heapq.heappush(events, (done, worker))
            continue
        if now < last_text:  # shards are cut when all texts are tokenized
            waiting.append(worker)
            heapq.heappush(events, (last_text, worker))
            continue
        if shards:
            shards -= 1
            free = max(free, now) + job.message
            heapq.heappush(events, (free + job.shard / speed[worker] * rng.uniform(0.8, 1.2), worker))
    return end + job.shards * job.result


def spoken(seconds: float) -> str:
    return f"{seconds / DAY:.1f} days" if seconds > 2 * DAY else (
        f"{seconds / HOUR:.1f} hours" if seconds > 2 * HOUR else f"{seconds / 60:.0f} minutes"
    )  # fmt: skip


def table() -> None:
    print("| work | machines | time | machine hours | efficiency | of it: models, tokenizing, last shards, results |")
    print("|---|---|---|---|---|---|")
    for job in (SCORE, EMBED):
        one = job.shards * job.shard
        for machines in (1, 16, 256, 1000, 4000):
            parts = planned(job, machines)
            total = sum(parts.values())
            rest = ", ".join(f"{parts[name]:,.0f} s" for name in ("models", "tokenizing", "last shards", "results"))
            hours = f"{machines * total / HOUR:,.0f}"
            print(f"| {job.name} | {machines:,} | {spoken(total)} | {hours} | {one / machines / total:.0%} | {rest} |")
    print("\n| simulated | workers | plan | simulation | plan is off by |\n|---|---|---|---|---|")
    small = replace(SCORE, name="score 10 GB, shards of one window", shard_tokens=512)
    for job, machines in ((SCORE, 256), (EMBED, 256), (SCORE, 1000), (EMBED, 1000), (small, 1000)):
        plan, found = sum(planned(job, machines).values()), simulated(job, machines)
        print(f"| {job.name} | {machines:,} | {plan:,.0f} s | {found:,.0f} s | {plan / found - 1:+.1%} |")


def nothing(shard: object, store: object) -> bytes:
    return b""


def measure() -> None:
    """What a shard costs beside its work: through Dask with two workers, and in this process."""
    from gpt2np.cluster import engine as engines
    from gpt2np.cluster.engine import THIS_PROCESS, compute, open_engine
    from gpt2np.cluster.store import Shard, Store

    engines.SECONDS = 0.0  # one shard a message, as where it takes longer; forked workers have this from here
    shards = [Shard(nothing, {"number": i}) for i in range(2000)]
    with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b, open_engine(2) as local:
        compute(shards[:10], Store(Path(a)), local)
        for name, folder, engine in (("two workers", a, local), ("this process", b, THIS_PROCESS)):
            began, cpu = time.perf_counter(), time.process_time()
            compute(shards, Store(Path(folder)), engine)
            seconds, used = time.perf_counter() - began, time.process_time() - cpu
            wall, own = (1e3 * x / len(shards) for x in (seconds, used))
            print(f"{name}: {wall:.2f} ms a shard; {own:.2f} ms of them processor time of scheduler and client")


def by_turns(parties: dict[str, list[list[str]]]) -> dict[str, tuple[float, float]]:
    """Seconds and processor seconds of each party, whose commands run side by side until all have ended.

    One party runs at a time, the others are stopped: by turns, so that a machine which becomes slower becomes so for
    all of them.
    """
    environment = {**os.environ, "NUMBA_NUM_THREADS": "1"}
    options = {"env": environment, "stdout": subprocess.DEVNULL, "start_new_session": True}
    running = {name: [subprocess.Popen(one, **options) for one in commands] for name, commands in parties.items()}
    found = dict.fromkeys(parties, (0.0, 0.0))

    def tell(processes: list[subprocess.Popen[bytes]], what: signal.Signals) -> None:
        for process in processes:
            os.killpg(process.pid, what)

    for processes in running.values():
        tell(processes, signal.SIGSTOP)
    while any(running.values()):
        for name, processes in running.items():
            began, used = time.perf_counter(), 0.0
            tell(processes, signal.SIGCONT)
            while processes and time.perf_counter() < began + TURN:
                time.sleep(0.01)
                for process in list(processes):
                    ended, status, usage = os.wait4(process.pid, os.WNOHANG)
                    if ended:
                        processes.remove(process)
                        used += usage.ru_utime + usage.ru_stime
                        process.returncode = status  # it is waited for
                        if status:
                            sys.exit("a command failed")
            found[name] = found[name][0] + time.perf_counter() - began, found[name][1] + used
            tell(processes, signal.SIGSTOP)
    return found


def overhead(text: bytes) -> None:
    """The embedded model on halves of a text, and of its first 4,000 bytes, which is little but the start."""
    score = [sys.executable, "-m", "gpt2np", "score", "--json"]
    for name, given in (("start", text[:4000]), ("whole", text)):
        with tempfile.TemporaryDirectory() as folder:
            cut = given.find(b"\n", len(given) // 2)
            files = [Path(folder) / "1.txt", Path(folder) / "2.txt"]
            files[0].write_bytes(given[:cut])
            files[1].write_bytes(given[cut:])
            workers = [*score, *map(str, files), "--workers", "2", "--results", folder]
            found = by_turns({"two processes": [[*score, str(file)] for file in files], "two workers": [workers]})
        for who, (wall, cpu) in found.items():
            print(f"{name}, {len(given):,} bytes, {who}: {wall:.1f} s, {cpu:.1f} s of processor time", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--overhead", type=Path, metavar="TEXT")
    parser.add_argument("--bytes", type=int)
    given = parser.parse_args()
    if given.overhead:
        overhead(given.overhead.read_bytes()[: given.bytes])
    else:
        measure() if given.measure else table()
