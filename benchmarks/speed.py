"""How fast gpt2np is beside ONNX Runtime and PyTorch, on one full-size GPT-2, in one run.

    python benchmarks/speed.py [--zoo FOLDER] [--past FOLDER] [--torch PYTHON] [--parts prefill,decode,...]
                               [--rounds 5] [--json FILE] [--plot FILE] [--readme README.md]

Every party is a process of its own with two threads; they take turns within each round, so that what disturbs the
machine disturbs all of them. Numbers are medians, with the least and the greatest; a ratio is the median of the
ratios within each round. "at least" is what no program can beat on this machine: the longer of reading all weights
and the cache once, at the rate of a plain loop over four places at once in each thread, and of doing all
multiply-adds, at the rate that the tile reaches with its operands in the nearest cache: the best rates of all rounds.
The model files are made by
`gpt2np synth` where no folder is given (--zoo: the zoo's graph, --past: one that takes keys and values). PyTorch is
run by the interpreter that --torch names, and left out by name where it cannot be imported. Parts that were
measured before are kept in the --json file, so that one part can be measured again alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

THREADS = 2
LENGTHS = (1, 8, 32, 128, 512, 1024)
CACHED = (32, 128, 512, 960)
NEW = 64
V, C, L = 50257, 768, 12
BLOCKS = 12 * L * C * C  # weights of all blocks

# ------------------------------------------------------------------------------------------- inside a party


def ids_of(length: int, batch: int = 1) -> Any:
    import numpy as np

    return np.random.default_rng(length).integers(0, V, (batch, length))


def gpt2np_party(file: str) -> dict[str, Callable[..., Any]]:
    import gpt2np

    gpt2np.set_num_threads(min(THREADS, gpt2np.get_num_threads()))
    model = gpt2np.load(file)

    def decode(prompt: int, new: int, batch: int = 1) -> float:
        cache = model.new_cache(batch, prompt + new)
        step = model(ids_of(prompt, batch), cache=cache, logits="last").logits[:, -1].argmax(-1)
        began = time.perf_counter()
        for _ in range(new):
            step = model(step[:, None], cache=cache, logits="last").logits[:, -1].argmax(-1)
        return time.perf_counter() - began

    def generate(prompt: int, new: int) -> float:
        cache = model.new_cache(1, prompt + new)
        began = time.perf_counter()
        step = model(ids_of(prompt), cache=cache, logits="last").logits[:, -1].argmax(-1)
        for _ in range(new - 1):
            step = model(step[:, None], cache=cache, logits="last").logits[:, -1].argmax(-1)
        return time.perf_counter() - began

    return {
        "prefill": lambda length: timed(lambda: model(ids_of(length), logits=False)),
        "decode": decode,
        "generate": generate,
    }


def onnxruntime_session(file: str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def onnxruntime_zoo_party(file: str) -> dict[str, Callable[..., Any]]:
    import numpy as np

    session = onnxruntime_session(file)
    name, output = session.get_inputs()[0].name, session.get_outputs()[0].name
    from gpt2np.onnx.read.reader import open_model
    from gpt2np.onnx.recognise import recognise

    wte = recognise(open_model(file)).sources["wte.weight"].load()

    def generate(prompt: int, new: int) -> float:
        tokens = ids_of(prompt)
        began = time.perf_counter()
        for _ in range(new):  # the file takes no keys and values: everything is computed anew
            hidden = session.run([output], {name: tokens[None]})
            token = (hidden[0].reshape(-1, wte.shape[1])[-1] @ wte.T).argmax()
            tokens = np.append(tokens, [[token]], axis=1)
        return time.perf_counter() - began

    return {
        "prefill": lambda length: timed(lambda: session.run(None, {name: ids_of(length)[None]})),
        "generate": generate,
    }


def onnxruntime_past_party(file: str) -> dict[str, Callable[..., Any]]:
    import numpy as np

    session = onnxruntime_session(file)
    inputs = {i.name: i for i in session.get_inputs()}
    outputs = [o.name for o in session.get_outputs()]

    def feed(ids: Any, start: int, past: dict[str, Any]) -> dict[str, Any]:
        values: dict[str, Any] = {"input_ids": ids}
        B, T = ids.shape
        if "attention_mask" in inputs:
            values["attention_mask"] = np.ones((B, start + T), np.int64)
        if "position_ids" in inputs:
            values["position_ids"] = np.arange(start, start + T)[None].repeat(B, 0)
        return {**values, **past}

    def run(ids: Any, start: int, past: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        results = dict(zip(outputs, session.run(outputs, feed(ids, start, past)), strict=True))
        new_past = {
            name: results[name.replace("past_key_values", "present").replace("past_", "present_")] for name in past
        }
        return results["logits"][:, -1].argmax(-1)[:, None], new_past

    def empty(batch: int) -> dict[str, Any]:
        shapes = {n: i.shape for n, i in inputs.items() if n.startswith("past")}
        return {
            n: np.zeros([d if isinstance(d, int) else (batch if "batch" in str(d) else 0) for d in s], np.float32)
            for n, s in shapes.items()
        }

    def decode(prompt: int, new: int, batch: int = 1) -> float:
        step, past = run(ids_of(prompt, batch), 0, empty(batch))
        began = time.perf_counter()
        for i in range(new):
            step, past = run(step, prompt + i, past)
        return time.perf_counter() - began

    return {"decode": decode}


def torch_party(_: str) -> dict[str, Callable[..., Any]]:
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()

    def decode(prompt: int, new: int, batch: int = 1) -> float:
        with torch.inference_mode():
            out = model(torch.from_numpy(ids_of(prompt, batch)), use_cache=True, logits_to_keep=1)
            began = time.perf_counter()
            for _ in range(new):
                step = out.logits[:, -1].argmax(-1, keepdim=True)
                out = model(step, past_key_values=out.past_key_values, use_cache=True)
        return time.perf_counter() - began

    def prefill(length: int) -> float:
        with torch.inference_mode():
            return timed(lambda: model.transformer(torch.from_numpy(ids_of(length)), use_cache=True))

    return {"prefill": prefill, "decode": decode}


def ceilings_party(_: str) -> dict[str, Callable[..., Any]]:
    """What the machine can do: reading memory in a plain loop, multiply-adds in the cache, and OpenBLAS's sgemm."""
    import numba
    import numpy as np
    import threadpoolctl

    from gpt2np.arrays import empty_aligned
    from gpt2np.kernels.layout import PANEL, ROWS
    from gpt2np.kernels.products import tile_full

    @numba.njit(parallel=True, fastmath=True)
    def read(x):  # type: ignore[no-untyped-def]
        """Four places at once in each thread: processors read several streams sooner than one."""
        sums, quarter = np.zeros(THREADS, np.float32), x.size // (4 * THREADS)
        for thread in numba.prange(THREADS):
            part = x[4 * thread * quarter : 4 * (thread + 1) * quarter]
            a, b, c, d = (
                part[:quarter],
                part[quarter : 2 * quarter],
                part[2 * quarter : 3 * quarter],
                part[3 * quarter :],
            )
            total = np.float32(0)
            for i in range(quarter):
                total += (a[i] + b[i]) + (c[i] + d[i])
            sums[thread] = total
        return sums.sum()

    @numba.njit(parallel=True)
    def multiply(a, b, out):  # type: ignore[no-untyped-def]
        for thread in numba.prange(len(out)):
            for _ in range(100_000):
                tile_full(a, 0, 128, b, 0, PANEL, 0, 128, 128, out[thread], 0, PANEL)

    def fma() -> float:
        work = 2 * 128 * 100_000 * sums.size
        return work / timed(lambda: multiply(a, b, sums)) / 1e9

    # on cache lines of their own: numbers that share one between two threads took half of the rate
    a, b, sums = (empty_aligned(shape, np.float32) for shape in ((ROWS, 128), (128, PANEL), (THREADS, ROWS, PANEL)))
    for array in (a, b, sums):
        array[:] = 0
    multiply(a, b, sums)
    numbers = np.ones(500_000_000 // 4, np.float32)
    matrix = np.ones((2048, 2048), np.float32)
    read(numbers)

    def sgemm() -> float:
        with threadpoolctl.threadpool_limits(THREADS):
            return 2 * 2048**3 / min(timed(lambda: matrix @ matrix) for _ in range(3)) / 1e9

    return {"read": lambda: numbers.nbytes / timed(lambda: read(numbers)) / 1e9, "fma": fma, "sgemm": sgemm}


PARTIES = {
    "gpt2np": gpt2np_party,
    "onnxruntime zoo": onnxruntime_zoo_party,
    "onnxruntime past": onnxruntime_past_party,
    "pytorch": torch_party,
    "ceilings": ceilings_party,
}


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def serve(party: str, file: str, parties: dict[str, Callable[[str], dict[str, Callable[..., Any]]]]) -> None:
    """Run one party: a line of JSON [name, *arguments] in, the result as a line out."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not end up between the results
    began = time.perf_counter()
    calls = parties[party](file)
    print(json.dumps(time.perf_counter() - began), file=out, flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(calls[name](*arguments)), file=out, flush=True)


def first_token(party: str, file: str) -> None:
    """Load, predict the token after 32, and say so: to be timed from outside, as a fresh process."""
    PARTIES[party](file)["decode"](32, 1)
    print("done", flush=True)


def peak(file: str) -> None:
    """Peak memory of loading, a 512-token prompt and 64 tokens."""
    import onnx  # noqa: F401  the imports that loading needs are counted apart

    import gpt2np
    from gpt2np import kernels  # noqa: F401
    from gpt2np.onnx import recognise  # noqa: F401
    from gpt2np.onnx.read import reader  # noqa: F401

    before = memory("VmRSS")
    model = gpt2np.load(file)
    cache = model.new_cache(1, 512 + NEW)
    step = model(ids_of(512), cache=cache, logits="last").logits[:, -1].argmax(-1)
    for _ in range(NEW):
        step = model(step[:, None], cache=cache, logits="last").logits[:, -1].argmax(-1)
    print(json.dumps({"imports": before, "peak": memory("VmHWM")}))


def memory(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    text = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in text.splitlines() if line.startswith(key))


# ------------------------------------------------------------------------------------------- the measurements


class Party:
    """A party's process: the script that is given serves it (`serve`)."""

    def __init__(
        self, name: str, file: Path | str, python: str = sys.executable, script: Path | str = __file__
    ) -> None:
        self.name, self.errors = name, tempfile.TemporaryFile("w+")  # noqa: SIM115  a pipe would fill up
        command = [python, str(script), "--serve", name, "--file", str(file)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise RuntimeError(f"{self.name} does not run: {(self.errors.read().strip().splitlines() or [''])[-1]}")
        return json.loads(line)

    def __call__(self, name: str, *arguments: Any) -> Any:
        assert self.process.stdin is not None
        print(json.dumps([name, *arguments]), file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def in_turns(calls: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Each call once to warm up, then all of them in turn, `rounds` times; after a pause in which threads go idle."""
    results: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            time.sleep(0.05)
            value = call()
            if i:
                results[name].append(value)
    return results


def rates(ceilings: Party) -> dict[str, Callable[[], float]]:
    """The machine's rates, to be measured in turn with the parties: GB/s and GFLOP/s."""
    return {name: (lambda name=name: ceilings(name)) for name in ("read", "fma")}


def measure_prefill(files: dict[str, Path], torch: str | None, rounds: int) -> dict[str, Any]:
    parties = {"gpt2np": Party("gpt2np", files["zoo"]), "onnxruntime": Party("onnxruntime zoo", files["zoo"])}
    if torch:
        parties["pytorch"] = Party("pytorch", "", torch)
    ceilings = Party("ceilings", "")
    results: dict[str, Any] = {}
    for length in LENGTHS:
        calls: dict[str, Callable[[], float]] = {
            name: (lambda party=party, length=length: party("prefill", length)) for name, party in parties.items()
        }
        calls |= rates(ceilings)
        if length == 512:
            calls["sgemm"] = lambda: ceilings("sgemm")
        results[str(length)] = in_turns(calls, rounds * 3 if length <= 32 else rounds)
    for party in (*parties.values(), ceilings):
        party.close()
    return results


def measure_decode(files: dict[str, Path], torch: str | None, rounds: int) -> dict[str, Any]:
    ours, ceilings = Party("gpt2np", files["zoo"]), Party("ceilings", "")
    parties = {"gpt2np": ours, "onnxruntime": Party("onnxruntime past", files["past"])}
    if torch:
        parties["pytorch"] = Party("pytorch", "", torch)
    results: dict[str, Any] = {}
    for prompt in CACHED:
        calls: dict[str, Callable[[], float]] = {
            name: (lambda party=party, prompt=prompt: party("decode", prompt, NEW)) for name, party in parties.items()
        }
        calls |= rates(ceilings)
        results[str(prompt)] = in_turns(calls, rounds)
    results["batch 8"] = in_turns(
        {"batch 8": lambda: ours("decode", 32, NEW, 8), "batch 1": lambda: ours("decode", 32, NEW)}, rounds
    )
    for party in (*parties.values(), ceilings):
        party.close()
    return results


def measure_generate(files: dict[str, Path], torch: str | None, rounds: int) -> dict[str, Any]:
    parties = {"gpt2np": Party("gpt2np", files["zoo"]), "onnxruntime": Party("onnxruntime zoo", files["zoo"])}
    calls: dict[str, Callable[[], float]] = {
        name: (lambda party=party: party("generate", 32, NEW)) for name, party in parties.items()
    }
    results = in_turns(calls, rounds)
    for party in parties.values():
        party.close()
    return results


def fresh(*arguments: str | Path) -> tuple[str, float]:
    """What a new Python process prints, and the seconds until its first line was there.

    It finds compiled kernels on disk, and bytecode as by default.
    """
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, *map(str, arguments)]
    began = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - began
        text = line + process.stdout.read()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return text, seconds


def measure_first_token(files: dict[str, Path], torch: str | None, rounds: int) -> dict[str, Any]:
    def start(party: str) -> Callable[[], float]:
        return lambda: fresh(__file__, "--first-token", party, "--file", files["past"])[1]

    return in_turns({"gpt2np": start("gpt2np"), "onnxruntime": start("onnxruntime past")}, rounds)


def measure_first_answer(files: dict[str, Path], torch: str | None, rounds: int) -> dict[str, Any]:
    """The embedded model in a new process."""
    took = "import time; began = time.perf_counter(); import gpt2np; print(time.perf_counter() - began)"
    answer = "import gpt2np; print(gpt2np.load()([[1, 2, 3]]).logits.argmax(), flush=True)"
    generate = ["-m", "gpt2np", "generate", "Once upon a time", "-n", "1"]
    return in_turns(
        {
            "import": lambda: float(fresh("-c", took)[0]),
            "answer": lambda: fresh("-c", answer)[1],
            "generate": lambda: fresh(*generate)[1],
        },
        rounds,
    )


def measure_memory(files: dict[str, Path], torch: str | None, rounds: int) -> dict[str, Any]:
    for _ in range(2):  # the first time, kernels may have to be compiled
        result: dict[str, Any] = json.loads(fresh(__file__, "--peak", "--file", files["zoo"])[0])
    from gpt2np.onnx.read.reader import open_model
    from gpt2np.onnx.recognise import recognise
    from gpt2np.weights import weight_shapes

    config = recognise(open_model(files["zoo"])).config
    result["weights"] = sum(4 * math.prod(shape) for shape in weight_shapes(config).values())
    return result


PARTS = {
    "prefill": measure_prefill,
    "generate": measure_generate,
    "decode": measure_decode,
    "first token": measure_first_token,
    "first answer": measure_first_answer,
    "memory": measure_memory,
}

# ------------------------------------------------------------------------------------------------- the report


def spread(values: list[float], scale: float = 1e3) -> str:
    return f"{statistics.median(values) * scale:.1f} ({min(values) * scale:.1f}-{max(values) * scale:.1f})"


def ratio(theirs: list[float], ours: list[float]) -> str:
    return f"{statistics.median(a / b for a, b in zip(theirs, ours, strict=True)):.2f}x"


def at_least(results: dict[str, Any], positions: int, cached: int = 0, logits: bool = False) -> float:
    """Seconds for reading everything once, or for all multiply-adds, at the best rates of all rounds."""
    rows = [row for part in ("prefill", "decode") for row in results.get(part, {}).values() if "fma" in row]
    read, fma = (max(max(row[name]) for row in rows) for name in ("read", "fma"))
    weights = BLOCKS + V * C * logits
    reads = 4 * (weights + 2 * L * C * (cached + positions))
    keys = positions * cached + positions * (positions + 1) / 2  # that are looked at, all queries together
    flop = 2 * (positions * weights + 2 * L * C * keys)
    return max(reads / read, flop / fma) / 1e9


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table; a ratio says how many times faster gpt2np is."""
    lines = ["| work | at least | gpt2np | ONNX Runtime | PyTorch | faster than |", "|---|---|---|---|---|---|"]

    def add(work: str, row: dict[str, list[float]], floor: float | None = None, scale: float = 1e3) -> None:
        cells = [spread(row[party], scale) if party in row else "-" for party in ("gpt2np", "onnxruntime", "pytorch")]
        faster = [
            f"{label} {ratio(row[party], row['gpt2np'])}"
            for party, label in (("onnxruntime", "ONNX Runtime"), ("pytorch", "PyTorch"))
            if party in row
        ]
        least = "" if floor is None else f"{floor * scale:.1f}"
        lines.append(f"| {work} | {least} | {' | '.join(cells)} | {', '.join(faster)} |")

    if "prefill" in results:
        for length in LENGTHS:
            row = results["prefill"][str(length)]
            add(f"{length} position{'s' if length > 1 else ''}, ms", row, at_least(results, length))
    if "generate" in results:
        add(f"{NEW} tokens after 32, from the zoo's file, ms", results["generate"])
    if "decode" in results:
        for prompt in CACHED:
            measured = results["decode"][str(prompt)]
            row = {party: [v / NEW for v in measured[party]] for party in measured if party not in ("read", "fma")}
            floor = at_least(results, 1, prompt + NEW // 2, logits=True)
            add(f"one token with a cache, after {prompt}, ms", row, floor)
    if "first token" in results:
        add("fresh process to first token, s", results["first token"], scale=1)
    notes = []
    if "prefill" in results:
        row = results["prefill"]["512"]
        flop = 2 * (512 * BLOCKS + 2 * L * C * 512 * 513 / 2)
        rate = flop / statistics.median(row["gpt2np"]) / 1e9
        sgemm, fma = statistics.median(row["sgemm"]), max(row["fma"])
        notes.append(
            f"512 positions: {rate:.0f} GFLOP/s, {rate / sgemm:.0%} of OpenBLAS sgemm 2048 ({sgemm:.0f}), "
            f"{rate / fma:.0%} of the machine's multiply-adds ({fma:.0f})."
        )
    if "decode" in results:
        row = results["decode"]["32"]
        per_token, read = statistics.median(row["gpt2np"]) / NEW, statistics.median(row["read"])
        rate = (BLOCKS + V * C) * 4 / per_token / 1e9
        notes.append(f"One token: {rate:.1f} GB/s of weights, {rate / read:.0%} of a plain read loop ({read:.1f}).")
        batch = results["decode"]["batch 8"]
        gain = 8 * statistics.median(batch["batch 1"]) / statistics.median(batch["batch 8"])
        notes.append(f"Batch 8: {gain:.1f} times the tokens of batch 1.")
    if "first answer" in results:
        row = {name: statistics.median(values) for name, values in results["first answer"].items()}
        notes.append(
            f"The embedded model in a new process: imported after {row['import']:.2f} s, first answer after "
            f"{row['answer']:.2f} s, first word of `gpt2np generate` after {row['generate']:.2f} s."
        )
    if "memory" in results:
        m = results["memory"]
        notes.append(
            f"Peak memory of load, 512-token prompt and {NEW} tokens: {m['peak'] / m['weights']:.2f} x the weights "
            f"({(m['peak'] - m['imports']) / m['weights']:.2f} x without Python and its imports)."
        )
    machine = results["machine"]
    notes.append(f"Medians (least-greatest); {THREADS} threads each; {machine}.")
    return "\n".join([*lines, "", *(f"{note}  " for note in notes)]).rstrip()


def put_between(page: Path, name: str, text: str) -> None:
    """Put text between a page's marks <!-- name:begin --> and <!-- name:end -->."""
    head, rest = page.read_text().split(f"<!-- {name}:begin -->", 1)
    tail = rest.split(f"<!-- {name}:end -->", 1)[1]
    page.write_text(f"{head}<!-- {name}:begin -->\n{text}\n<!-- {name}:end -->{tail}")


def find_torch(python: str) -> tuple[str | None, str]:
    """The interpreter if it has PyTorch, and the versions."""
    code = "import torch, transformers; print(f', torch {torch.__version__}, transformers {transformers.__version__}')"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    if done.returncode:
        print(f"PyTorch is left out: {python} cannot import torch and transformers", file=sys.stderr)
        return None, ""
    return python, done.stdout.strip("\n")


def machine() -> str:
    from importlib.metadata import version

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        cpu = f"{names[0]}, {len(names)} cores" if names else cpu
    import llvmlite.binding

    import gpt2np

    parts = [f"{cpu} ({llvmlite.binding.get_host_cpu_name()})", f"gpt2np {gpt2np.__version__}"]
    parts.append(f"Python {platform.python_version()}")
    parts += [f"{name} {version(name)}" for name in ("numpy", "numba", "onnxruntime")]
    return ", ".join(parts)


def plot(results: dict[str, Any], target: Path) -> None:
    """Time against length, for all parties."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for party, label in (("gpt2np", "gpt2np"), ("onnxruntime", "ONNX Runtime"), ("pytorch", "PyTorch")):
        if party in results["prefill"]["1"]:
            times = [1e3 * statistics.median(results["prefill"][str(length)][party]) for length in LENGTHS]
            axes.loglog(LENGTHS, times, marker="o", label=label)
    floors = [1e3 * at_least(results, length) for length in LENGTHS]
    axes.loglog(LENGTHS, floors, "k:", label="at least, on this machine")
    axes.set(xlabel="positions", ylabel="milliseconds", title="GPT-2 124M, float32, forward pass")
    axes.set_xticks(LENGTHS, [str(length) for length in LENGTHS])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(target)


def make_files(arguments: argparse.Namespace) -> dict[str, Path]:
    """The two model files, made by `gpt2np synth` where no folder was given."""
    files: dict[str, Path] = {}
    for name, given, options in (("zoo", arguments.zoo, []), ("past", arguments.past, ["--with-past"])):
        folder = given or Path("build") / f"speed-{name}"
        if not (folder / "model.onnx").exists():
            command = [sys.executable, "-m", "gpt2np", "synth", "--size", "gpt2", "-o", str(folder), *options]
            subprocess.run(command, check=True)
        files[name] = folder / "model.onnx"
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path)
    parser.add_argument("--past", type=Path)
    parser.add_argument("--torch", help="a Python interpreter that has torch and transformers")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path("build/speed.json"))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--readme", type=Path, help="put the table between its <!-- speed:begin/end --> marks")
    for hidden in ("--serve", "--first-token", "--file"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(arguments.serve, arguments.file, PARTIES)
    if arguments.first_token:
        return first_token(arguments.first_token, arguments.file)
    if arguments.peak:
        return peak(arguments.file)

    results: dict[str, Any] = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    torch, torch_version = find_torch(arguments.torch or sys.executable)
    results["machine"] = machine() + torch_version
    files = make_files(arguments)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    for part in filter(None, arguments.parts.split(",")):
        results[part] = PARTS[part](files, torch, arguments.rounds)
        arguments.json.write_text(json.dumps(results, indent=1))
    print(table(results))
    if arguments.plot and "prefill" in results:
        plot(results, arguments.plot)
    if arguments.readme:
        put_between(arguments.readme, "speed", table(results))
    return None


if __name__ == "__main__":
    main()
