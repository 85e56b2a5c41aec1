"""The model of a shard: described by what it is and by what it computes, and opened once in each process."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

from .. import __version__
from .. import tokenizer as tokenizers
from ..errors import InputError
from ..files import File
from ..fingerprint import WAYS, digest, texts
from ..model import GPT2, load
from ..onnx.read.reader import open_model
from .store import Shard

Described = tuple[dict[str, Any], dict[str, Any]]  # what a shard is of its model: `content` and `where`

NAMES = "model", "tokenizer", "program", "engine", "dtype", "weights", "fingerprint"  # in `content`, of the model
_opened: dict[str, GPT2] = {}  # the last model, by what `describe` says of it


@cache
def program() -> str:
    """The version of gpt2np, and a hash of its source: what results depend on, whatever a version number says."""
    folder = Path(__file__).parents[1]
    return f"{__version__} {hash_of_files(sorted(folder.rglob('*.py')))}"


def hash_of_files(paths: Iterable[Path]) -> str:
    """SHA-256 of the SHA-256s of some files."""
    return hashlib.sha256("".join(File(path).sha256() for path in paths).encode()).hexdigest()


def describe(model: GPT2, tokenizer: Path | None) -> Described:
    """What a model is, for shards that are computed with it; `tokenizer` is the path that its tokenizer is from.

    The fingerprint stands for the program that computes and for the machine: a worker that computes other bits
    than the machine that cut the work, because its program is another one or it cannot fuse, is refused.
    """
    assert model.path is not None
    with _alone() if model.engine == "numba" else nullcontext():
        computed = digest(WAYS["prompt"](model, texts(model)))
    content = {
        "model": hash_of_files(open_model(model.path).files),
        "tokenizer": hash_of_files(tokenizers.locate(tokenizer or model.path.parent) or ()),
        "program": program(),
        "engine": model.engine,
        "dtype": model.dtype.name,
        "weights": model.rounded_to,
        "fingerprint": computed,
    }
    where = {"model": str(model.path.resolve()), "tokenizer": str(tokenizer.resolve()) if tokenizer else None}
    _opened.clear()
    _opened[json.dumps([content, where])] = model
    return content, where


def _alone() -> AbstractContextManager[int]:
    """Kernels work on one thread: a pool that they start here would be lost to workers that are forked."""
    from ..kernels.threads import pool

    return pool()  # who finds it taken works alone


def open_described(shard: Shard) -> GPT2:
    """The model of a shard, which must be the one that `describe` saw; the last one is kept."""
    content = {name: shard.content[name] for name in NAMES}
    where = {name: shard.where[name] for name in ("model", "tokenizer")}
    model = _opened.get(json.dumps([content, where]))
    if model is not None:
        return model
    model = load(where["model"], content["engine"], content["dtype"], content["weights"])
    if where["tokenizer"] is not None:
        model.tokenizer = tokenizers.load(where["tokenizer"])
    found, _ = describe(model, where["tokenizer"] and Path(where["tokenizer"]))
    for name, value in content.items():
        if found[name] != value:
            what = "computes other bits with" if name == "fingerprint" else f"has another {name} at"
            raise InputError(f"{socket.gethostname()} {what} {where['model']} than the machine that cut the work")
    return model
