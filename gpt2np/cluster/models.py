"""The model of a shard: described by what it is and by what it computes, and opened once in each process."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from .. import __version__
from .. import tokenizer as tokenizers
from ..arguments import as_path, whole_number
from ..errors import InputError
from ..files import File
from ..fingerprint import WAYS, digest, texts
from ..model import GPT2, load
from ..onnx.read.reader import open_model
from .store import Shard

Described = tuple[dict[str, Any], dict[str, Any]]  # what a shard is of its model: `content` and `where`

_last: list[Any] = []  # what `describe` said of the last model, and that model


@cache
def program() -> str:
    """The version of gpt2np, and a hash of its source: what results depend on, whatever a version number says."""
    folder = Path(__file__).parents[1]
    return f"{__version__} {hash_of_files(sorted(folder.rglob('*.py')))}"


def hash_of_files(paths: Iterable[Path]) -> str:
    """SHA-256 of the SHA-256s of some files."""
    return hashlib.sha256("".join(File(path).sha256() for path in paths).encode()).hexdigest()


def describe(model: GPT2, tokenizer: Path | None, batch_size: int) -> Described:
    """What a model is, for shards that are computed with it; `tokenizer` is the path that its tokenizer is from.

    The fingerprint stands for the program that computes and for the machine: a worker that computes other bits
    than the machine that cut the work, because its program is another one or it cannot fuse, is refused.
    """
    assert model.path is not None
    whole_number("batch_size", batch_size, 1)
    tokenizer = None if tokenizer is None else as_path(tokenizer)
    computed = digest(WAYS["prompt"](model, texts(model)))
    what = {
        "model": hash_of_files(open_model(model.path).files),
        "tokenizer": hash_of_files(tokenizers.locate(tokenizer or model.path.parent) or ()),
        "program": program(),
        "engine": model.engine,
        "dtype": model.dtype.name,
        "weights": model.rounded_to,
        "fingerprint": computed,
        "batch_size": None if model.engine == "numba" else batch_size,  # NumPy's last bits depend on it
    }
    paths = {"model": model.path.resolve(), "tokenizer": tokenizer and tokenizer.resolve()}
    _last[:] = what, paths, model
    return {"of": what}, {"of": paths, "batch_size": batch_size}


def open_described(shard: Shard) -> GPT2:
    """The model of a shard, which must be the one that `describe` saw; the last one is kept."""
    what, paths = shard.content["of"], shard.where["of"]
    if _last[:2] != [what, paths]:
        model = load(paths["model"], what["engine"], what["dtype"], what["weights"])
        if paths["tokenizer"] is not None:
            model.tokenizer = tokenizers.load(paths["tokenizer"])
        found, _ = describe(model, paths["tokenizer"], shard.where["batch_size"])
        check_same(what, found["of"], paths["model"])
    return _last[2]


def check_same(wanted: dict[str, Any], found: dict[str, Any], path: Path) -> None:
    """InputError, which names this machine, where something of the model at `path` is not as the work was cut with."""
    for name, value in found.items():
        if wanted[name] != value:
            machines = f"{socket.gethostname()} differs from the machine that cut the work"
            raise InputError(f"{machines} in the {name} of {path}")
