"""GPT-2 124M on one CPU in gpt2np and in its peers, in 32, 16, 8 and 4 bits: time, share of the machine, error.

    python benchmarks/peers.py [--model MODEL] [--python PYTHON] [--bits 32,16,8,4] [--parties NAME,NAME,...]
                               [--rounds 5] [--seconds S] [--work FOLDER] [--readme README.md]

All parties have the same weights, in the files that each of them reads: MODEL is anything that `gpt2np convert` reads;
without it random weights are made by `gpt2np synth`, on which errors are those of random weights. PYTHON is an
interpreter with the peers:

    pip install torch transformers openvino nncf ctranslate2
    CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python        # compiles llama.cpp for this machine

Beside gpt2np, ONNX Runtime in 4 bits needs the extra [bench]. Those that are missing are left out, by name. Every
party is a process of its own with two threads. First each runs alone, to make its files and to have its error
measured. Then those of the same number of bits take turns: in a round each does every piece of work once, and so do a
loop that reads memory and one of multiply-adds. What was measured is written to FOLDER/peers.json after every round,
so that a later call goes on where an earlier one ended; with --seconds a call begins no round that would end later
than so many seconds after the first began.

What is measured, the same for all: the scores of the last of T positions from an empty cache, and then those of one
token after the other, each the most likely one. No party computes scores of positions that nobody asks for.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from parties import NOT_TRIED, PARTIES, make_files, open_party
from speed import THREADS, Party, ceilings_party, machine, put_between, serve, spread

LENGTHS = (1, 8, 32, 128, 512, 1024)
CACHED = (32, 512, 960)
SHORT = ("1", "8", "32", "128", "512", "1024", "after 32", "after 512")  # what README shows
NEW = 8  # tokens after each of CACHED in a round
RANDOM = "random ones, so that errors with a trained model's would differ"
PROMPTS, PROMPT = 8, 32  # error: over the scores after so many prompts of so many tokens

# ---------------------------------------------------------------------------------------------- the measuring


class Race:
    """What was measured so far (`results`, kept in a file), and how to measure more."""

    def __init__(self, work: Path, python: str, parties: list[str]) -> None:
        import numpy as np

        from gpt2np.convert.folder import open_source

        self.work, self.python, self.parties = work, python, parties
        self.file = work / "peers.json"
        self.config = open_source(work / "past")[0]
        empty: dict[str, Any] = {"errors": {}, "absent": {}, "rounds": {}}
        self.results = json.loads(self.file.read_text()) if self.file.exists() else empty
        rng = np.random.default_rng(0)
        size, V = min(PROMPT, self.config.n_ctx), self.config.vocab_size
        self.prompts = [rng.integers(0, V, size).tolist() for _ in range(PROMPTS)]
        self.ids = rng.integers(0, V, self.config.n_ctx).tolist()

    def save(self) -> None:
        self.file.write_text(json.dumps(self.results, indent=1))

    def start(self, name: str, bits: int) -> Party | None:
        python = sys.executable if PARTIES[name][2] else self.python
        try:
            return Party(f"{name}/{bits}", self.work, python, __file__)
        except (RuntimeError, OSError) as error:
            self.leave_out(name, bits, error)
            return None

    def leave_out(self, name: str, bits: int, error: Exception) -> None:
        reason = str(error).rpartition(" does not run: ")[2][:200]
        print(f"{name} in {bits} bits is left out: {reason}", file=sys.stderr)
        self.results["absent"][f"{name}/{bits}"] = reason

    def measure_errors(self, bits: int) -> None:
        """Each party alone: |scores - float64's| / |float64's|, over all prompts (Frobenius norms)."""
        import numpy as np

        for name in (name for name in self.parties if bits in PARTIES[name][1]):
            if f"{name}/{bits}" in self.results["errors"]:
                continue
            party = self.start(name, bits)
            if party is not None:
                try:
                    party("scores", self.prompts, str(self.work / "scores.npy"))
                    found, right = np.load(self.work / "scores.npy").astype(np.float64), self.right_scores()
                    self.results["errors"][party.name] = float(np.linalg.norm(found - right) / np.linalg.norm(right))
                    self.results["absent"].pop(party.name, None)
                except (RuntimeError, OSError) as error:
                    self.leave_out(name, bits, error)
                party.close()
            self.save()

    def right_scores(self) -> Any:
        import numpy as np

        import gpt2np

        file = self.work / "float64.npy"
        if not file.exists():
            oracle = gpt2np.load(self.work / "past", engine="numpy", dtype="float64")
            np.save(file, np.stack([oracle([ids], logits="last").logits[0, -1] for ids in self.prompts]))
        return np.load(file)

    def measure_times(self, bits: int, rounds: int, seconds: float) -> None:
        """Rounds in which the parties of so many bits take turns, until each was in `rounds` of them."""
        names = [name for name in self.parties if f"{name}/{bits}" in self.results["errors"]]
        done = self.results["rounds"].setdefault(str(bits), []) if names else []
        left = max((rounds - sum(name in r["1"] for r in done) for name in names), default=0)
        if left <= 0:
            return
        with ThreadPoolExecutor() as pool:
            started = pool.map(lambda name: self.start(name, bits), names)
        parties = {name: party for name, party in zip(names, started, strict=True) if party is not None}
        ceilings = Party("ceilings", "", script=__file__)
        for party in parties.values():  # memory is handed out, code compiled and loaded
            for length in (1, self.config.n_ctx - 2):
                party("run", self.ids[:length], 2)
        began = last = time.monotonic()
        for _ in range(left):
            done.append(self.one_round(parties, ceilings))
            self.save()
            took, last = time.monotonic() - last, time.monotonic()
            if last + took > began + seconds:
                break
        for party in (*parties.values(), ceilings):
            party.close()

    def one_round(self, parties: dict[str, Party], ceilings: Party) -> dict[str, dict[str, float]]:
        """{work: {party: seconds}} and {"limits": {"read": GB/s, "fma": GFLOP/s}}: the best of the round."""
        self.results["date"] = time.strftime("%Y-%m-%d")
        result: dict[str, dict[str, float]] = {"limits": {"read": 0.0, "fma": 0.0}}
        for length, cached in works(self.config.n_ctx):
            for name, party in parties.items():
                time.sleep(0.3)  # the last one's threads spin for 0.2 s before they sleep (OpenMP's usual setting)
                times = [party("run", self.ids[:length], NEW * cached) for _ in range(3 if length <= 32 else 1)]
                first, token = (statistics.median(column) for column in zip(*times, strict=True))
                if length in LENGTHS:
                    result.setdefault(f"{length}", {})[name] = first
                if cached:
                    result.setdefault(f"after {length}", {})[name] = token
            for limit, best in result["limits"].items():
                result["limits"][limit] = max(best, ceilings(limit))
        return result


def works(n_ctx: int) -> Iterator[tuple[int, bool]]:
    """All lengths, and whether tokens follow."""
    for length in sorted({*LENGTHS, *CACHED}):
        if length + NEW * (length in CACHED) <= n_ctx:
            yield length, length in CACHED


# ------------------------------------------------------------------------------------------------- the report


def limit_seconds(config: Any, bits: int, kv_bytes: int, work: str, read: float, fma: float) -> float:
    """What no program can beat: every weight and the cache read once, or every float32 multiply-add done."""
    C, L = config.n_embd, config.n_layer
    blocks, head = L * (4 * C * C + 2 * C * config.n_inner), config.vocab_size * C
    cached = int(work.removeprefix("after ")) + NEW // 2 if work.startswith("after") else 0
    positions = 1 if cached else int(work)
    keys = positions * cached + positions * (positions + 1) / 2
    reads = bits / 8 * (blocks + head) + kv_bytes * 2 * L * C * (cached + positions)
    flop = 2 * (positions * blocks + head + 2 * L * C * keys)
    return max(reads / read, flop / fma) / 1e9


def table(race: Race, shown: Sequence[str]) -> str:
    """Markdown: a row a party; each cell milliseconds, how many times gpt2np's time in the same rounds, and share."""
    heads = [f"{work} positions" if work.isdecimal() else f"token {work}" for work in shown]
    lines = [
        f"| bits | party | {' | '.join(heads)} | error |".replace("| 1 positions", "| 1 position"),
        "|---" * (len(shown) + 3) + "|",
    ]
    for bits, rounds in sorted(race.results["rounds"].items(), key=lambda item: -int(item[0])):
        read, fma = (max(r["limits"][name] for r in rounds) for name in ("read", "fma"))
        for name in (name for name in PARTIES if any(name in r["1"] for r in rounds)):
            kv_bytes = 4 if bits == "32" else PARTIES[name][0].kv_bytes
            cells = []
            for work in shown:
                measured = [r[work] for r in rounds if name in r.get(work, {})]
                if not measured:
                    cells.append("")
                    continue
                seconds = statistics.median(r[name] for r in measured)
                share = limit_seconds(race.config, int(bits), kv_bytes, work, read, fma) / seconds
                ratios = [r[name] / r["gpt2np"] for r in measured if "gpt2np" in r]
                times = f", {statistics.median(ratios):.2f}x" if ratios and name != "gpt2np" else ""
                cells.append(f"{seconds * 1e3:.1f}{times} ({share:.0%})")
            error = race.results["errors"][f"{name}/{bits}"]
            lines.append(f"| {bits} | {name} | {' | '.join(cells)} | {error:.1e} |")
    return "\n".join(lines)


def report(race: Race, shown: Sequence[str]) -> str:
    rounds = [r for group in race.results["rounds"].values() for r in group]
    rates = {name: [r["limits"][name] for r in rounds] for name in ("read", "fma")}
    counts = ", ".join(f"{len(group)} in {bits} bits" for bits, group in race.results["rounds"].items())
    absent: dict[str, list[str]] = {}
    for party, why in race.results["absent"].items():
        absent.setdefault(why, []).append(party.replace("/", " in "))
    left_out = "; ".join(f"{', '.join(parties)} ({why})" for why, parties in absent.items())
    notes = [
        "Milliseconds (median), how many times gpt2np's time of the same bits (median of the rounds' ratios; above 1x "
        "gpt2np is faster), and in brackets the share of what the machine allows at so many bits a weight: read once, "
        "or all multiply-adds in float32.",
        f"Error: |scores - float64's| / |float64's| for {PROMPTS} prompts, all from the same float32 weights: "
        f"{race.results['weights']}.",
        f"Limits, GB/s and GFLOP/s, least to most: read {spread(rates['read'], 1)}, fma {spread(rates['fma'], 1)}.",
        f"Rounds: {counts}; {THREADS} threads each; {race.results['date']}, {race.results['machine']}.",
        NOT_TRIED,
        *([f"Left out: {left_out}."] if left_out else []),
    ]
    return "\n".join([table(race, shown), "", *(f"{note}  " for note in notes)]).rstrip()


def versions(python: str) -> str:
    names = ["torch", "transformers", "openvino", "nncf", "llama-cpp-python", "ctranslate2"]
    code = f"""from importlib.metadata import version, PackageNotFoundError
for name in {names}:
    try: print(f', {{name}} {{version(name)}}', end='')
    except PackageNotFoundError: pass"""
    return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--python", default=sys.executable, help="an interpreter that has the peers")
    parser.add_argument("--bits", default="32,16,8,4")
    parser.add_argument("--parties", default=",".join(PARTIES), help="only these; rounds may have different ones")
    parser.add_argument("--rounds", type=int, default=5, help="0: files and errors alone")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--work", type=Path, default=Path("build/peers"))
    parser.add_argument("--readme", type=Path, help="put the short table between its <!-- peers:begin/end --> marks")
    for hidden in ("--serve", "--file"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        name, _, bits = arguments.serve.partition("/")
        made = ceilings_party if name == "ceilings" else lambda file: open_party(file, name, int(bits))
        return serve(arguments.serve, arguments.file, {arguments.serve: made})

    parties = arguments.parties.split(",")
    if unknown := set(parties) - set(PARTIES):
        parser.error(f"parties are {', '.join(PARTIES)}; there is none called {', '.join(unknown)}")
    make_files(arguments.model, arguments.work)
    race = Race(arguments.work, arguments.python, parties)
    race.results["machine"] = machine() + versions(arguments.python)
    race.results.setdefault("weights", str(arguments.model or RANDOM))
    for bits in map(int, arguments.bits.split(",")):
        race.measure_errors(bits)
        if arguments.rounds:
            race.measure_times(bits, arguments.rounds, arguments.seconds)
    if not any(race.results["rounds"].values()):
        print("\n".join(f"{party}: error {error:.1e}" for party, error in race.results["errors"].items()))
        return None
    works = [*map(str, LENGTHS), *(f"after {length}" for length in CACHED)]
    print(report(race, works))
    if arguments.readme:
        put_between(arguments.readme, "peers", report(race, SHORT))
    return None


if __name__ == "__main__":
    main()
