"""Mutants of the files beside a model: checkpoints, tokenizers, traces, sample data, published facts.

    python tests/support/file_mutants.py --seed 1 --count 5000          one line for each finding, then a table

Each is read, and used as far as it can be; the answer is a result or one of gpt2np's own errors.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import gpt2np.tokenizer
from gpt2np.convert.huggingface import read_checkpoint
from gpt2np.errors import Gpt2npError
from gpt2np.onnx.read.datasets import load_set, save_set
from gpt2np.parity import trace
from gpt2np.weights import weight_shapes
from gpt2np.zoo.facts import load_facts
from hostile_campaign import last_place
from structural_mutants import Random, change_bytes, pick
from tiny import tiny_config, tiny_sources

ODD: list[Any] = [
    None, True, -1, 0, 1.5, 2**31, 2**63, 1e300, float("inf"), float("nan"), "", "x", "\ud800", "\x1b[0m", [], {}, [[]],
    {"a": 1}, [1, 2], ["a"], [None],
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in a JSON value something can be changed; of long lists and objects, at their beginning."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, v in list(inside)[:40] for p in places(v, (*path, key)))]


def change_json(text: bytes, rng: Random) -> bytes:
    """A value becomes an odd one, or goes, or comes again under another name."""
    root = {"": json.loads(text)}
    for _ in range(int(pick(rng, [1, 1, 2]))):
        path = ("", *pick(rng, places(root[""])))
        holder: Any = root
        for key in path[:-1]:
            holder = holder[key]
        what = int(rng.integers(4))
        if what == 0 and len(path) > 1:
            del holder[path[-1]]
        elif what == 1 and isinstance(holder, dict) and len(path) > 1:
            holder[pick(rng, ["", "x", "\ud800", "dtype", "wte.weight"])] = holder[path[-1]]
        else:
            holder[path[-1]] = pick(rng, ODD)
    return json.dumps(root[""]).encode("utf-8", "surrogatepass")


def changed(text: bytes, rng: Random) -> bytes:
    return change_json(text, rng) if rng.random() < 0.8 else change_bytes(text, rng)


# ------------------------------------------------------------------------------------------------------- kinds of file
class Files:
    """Sound files of each kind, and how a mutant of one is made and used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = tiny_config(n_layer=1)
        names = {"n_layer": 1, "n_head": 3, "n_embd": 12, "n_positions": 20, "vocab_size": 37, "n_inner": 48}
        self.config = json.dumps({**names, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}).encode()
        weights = {n: s.load() for n, s in tiny_sources(config).items()}
        header, start = {}, 0
        for name in weight_shapes(config):
            end = start + weights[name].nbytes
            header[name] = {"dtype": "F32", "shape": list(weights[name].shape), "data_offsets": [start, end]}
            start = end
        self.header, self.payload = json.dumps(header).encode(), b"".join(w.tobytes() for w in weights.values())
        self.tokenizer = (Path(__file__).parents[2] / "weights" / "mini" / "tokenizer.json").read_bytes()
        manifest = {"model_sha256": "0" * 64, "runner": "ours"}
        made = trace.Trace({"x": np.arange(3)}, {"y": np.ones((2, 3))}, {"embed": np.zeros((1, 3, 4))}, manifest)
        trace.save(folder / "sound.npz", made)
        self.trace = (folder / "sound.npz").read_bytes()
        save_set(folder / "set", {"x": np.arange(300)}, {"y": np.ones((2, 3), np.float32)})
        self.tensor = (folder / "set" / "input_0.pb").read_bytes()
        facts = Path(gpt2np.__file__).parent / "facts.json"
        self.facts = json.dumps({"models": json.loads(facts.read_text("utf-8"))["models"][:1]}).encode()

    def checkpoint(self, rng: Random) -> None:
        config, header = self.config, self.header
        if rng.random() < 0.5:
            config = changed(config, rng)
        else:
            header = changed(header, rng)
        length = len(header) if rng.random() < 0.9 else int(pick(rng, [0, 1, 2**40, 2**63]))
        (self.folder / "config.json").write_bytes(config)
        (self.folder / "model.safetensors").write_bytes(length.to_bytes(8, "little") + header + self.payload)
        for source in read_checkpoint(self.folder / "model.safetensors")[1].values():
            source.load()

    def index(self, rng: Random) -> None:
        sound = {"metadata": {}, "weight_map": {"wte.weight": "a.safetensors", "wpe.weight": "b.safetensors"}}
        (self.folder / "model.safetensors.index.json").write_bytes(changed(json.dumps(sound).encode(), rng))
        read_checkpoint(self.folder / "model.safetensors.index.json")

    def tokens(self, rng: Random) -> None:
        path = self.folder / "tokenizer.json"
        path.write_bytes(changed(self.tokenizer, rng))
        made = gpt2np.tokenizer.load(path)
        ids = gpt2np.tokenizer.encode(made, "Once upon a time <|endoftext|>")
        gpt2np.tokenizer.decode(made, ids)
        stream = gpt2np.tokenizer.StreamDecoder(made)
        "".join(stream.push(i) for i in [*ids, 10**6]) + stream.flush()

    def vocabulary(self, rng: Random) -> None:
        model = json.loads(self.tokenizer)["model"]
        folder = self.folder / "vocabulary"
        folder.mkdir(exist_ok=True)
        vocab = json.dumps(model["vocab"]).encode()
        merges = "\n".join(pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]).encode()
        first = rng.random() < 0.5
        (folder / "vocab.json").write_bytes(changed(vocab, rng) if first else vocab)
        (folder / "merges.txt").write_bytes(merges if first else change_bytes(merges, rng))
        gpt2np.tokenizer.encode(gpt2np.tokenizer.load(folder), "Once upon a time")

    def traces(self, rng: Random) -> None:
        path = self.folder / "mutant.npz"
        if rng.random() < 0.5:
            path.write_bytes(change_bytes(self.trace, rng))
        else:
            with np.load(self.folder / "sound.npz") as file:
                arrays = dict(file)
            arrays["manifest"] = np.frombuffer(changed(arrays["manifest"].tobytes(), rng), np.uint8)
            np.savez_compressed(path, **arrays)
        str(trace.load(path).runner)

    def data(self, rng: Random) -> None:
        (self.folder / "set" / "input_0.pb").write_bytes(change_bytes(self.tensor, rng))
        load_set(self.folder / "set", ["x"], ["y"])

    def published(self, rng: Random) -> None:
        path = self.folder / "facts.json"
        path.write_bytes(changed(self.facts, rng))
        load_facts(path)


KINDS: tuple[Callable[[Files, Random], None], ...] = (
    Files.checkpoint, Files.index, Files.tokens, Files.vocabulary, Files.traces, Files.data, Files.published,
)  # fmt: skip


def run(folder: Path, seed: int, count: int) -> tuple[Counter[str], list[str]]:
    """What came of the mutants, and those that ended in an error of another's."""
    files, counts, findings = Files(folder), Counter[str](), []
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                kind(files, np.random.default_rng([seed, number]))
            counts[f"{kind.__name__}: read"] += 1
        except Gpt2npError:
            counts[f"{kind.__name__}: refused"] += 1
        except BaseException as error:  # the tokenizers library's panics are no Exceptions
            if isinstance(error, KeyboardInterrupt):
                raise
            counts[f"{kind.__name__}: UNTYPED"] += 1
            findings.append(f"UNTYPED {seed}:{number} {kind.__name__}: {last_place(error)}")
    return counts, findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=5000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts, findings = run(Path(folder), args.seed, args.count)
    print(*findings, *(f"{count:6d} {word}" for word, count in sorted(counts.items())), sep="\n")
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
