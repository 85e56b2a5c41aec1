"""What is published of GPT-2 (weights/manifest.json), and what of it is here."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from ..arguments import as_path
from ..errors import ModelFileError
from ..paths import embedded_model_path, weights_folder
from .facts import KnownFile

MODEL = "model.onnx"
State = Literal["missing", "verified", "not verifiable", "wrong"]


@dataclass(frozen=True)
class Mirror:
    """One place to get a file from."""

    url: str
    md5_url: str | None = None  # a text with the file's MD5 in it, where the publisher gives one

    @property
    def shown(self) -> str:
        """The URL without a user's name and password."""
        parts = urlsplit(self.url)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


@dataclass(frozen=True)
class RemoteFile:
    """One published file."""

    path: str  # its name here, in the entry's folder
    name: str  # its published name, looked for under `fetch --mirror URL`
    bytes: int | None  # None where no published figure is known
    sha256: str | None
    mirrors: tuple[Mirror, ...]


@dataclass(frozen=True)
class Entry:
    """What `gpt2np fetch NAME` brings into weights/NAME/."""

    name: str
    title: str
    licence: str
    files: tuple[RemoteFile, ...]  # what it needs
    extras: tuple[RemoteFile, ...]  # what lies beside it: the tokenizer
    archive: RemoteFile | None  # a .tar.gz of the first of the files and of test_data_set_0
    convert: bool  # model.onnx is made from model.safetensors


@cache
def entries() -> dict[str, Entry]:
    """What can be fetched, by name, from weights/manifest.json."""
    models = json.loads((weights_folder() / "manifest.json").read_text(encoding="utf-8"))["models"]

    def remote(record: dict[str, Any]) -> RemoteFile:
        mirrors = tuple(Mirror(mirror["url"], mirror.get("md5_url")) for mirror in record["mirrors"])
        return RemoteFile(record["path"], record["name"], record["bytes"], record["sha256"], mirrors)

    return {
        name: Entry(
            name=name,
            title=record["title"],
            licence=record["licence"],
            files=tuple(map(remote, record["files"])),
            extras=tuple(remote(file) for other in record.get("with", ()) for file in models[other]["files"]),
            archive=remote(record["archive"]) if "archive" in record else None,
            convert=record.get("convert", False),
        )
        for name, record in models.items()
    }


def default_folder() -> Path:
    """Where downloads go: weights/ of the clone that this package runs from, else ./weights."""
    folder = weights_folder()
    return folder if folder.name == "weights" else Path("weights")


def find(model: str | Path) -> Path:
    """A model's path from its path, or from its name in the manifest where it has been fetched.

    Raises
    ------
    ModelFileError
        If there is neither; the message says how to fetch it.
    InputError
        If it is no path.
    """
    if not isinstance(model, str):
        as_path(model)
    if model and Path(model).exists():  # an empty text would be this folder
        return Path(model)
    if str(model) not in entries():
        raise ModelFileError(
            f"{model or repr(model)}: no such file or folder, and not the name of a model that can be fetched"
        )
    fetched = default_folder() / model
    if not (fetched / MODEL).is_file():
        raise ModelFileError(f"{fetched / MODEL} is not here; get it with: gpt2np fetch {model}")
    return fetched


def known_files() -> tuple[KnownFile, ...]:
    """The published ONNX files of GPT-2 124M, by which a file can be known."""
    first = (entry.files[0] for entry in entries().values())
    return tuple(
        KnownFile(file.name, file.bytes, file.sha256)
        for file in first
        if file.path == MODEL and file.bytes is not None and file.sha256 is not None
    )


def verified_checkpoint(model: Path) -> Path | None:
    """The model.safetensors beside a model, if it is a published one and verified."""
    folder = model if model.is_dir() else model.parent
    path = folder / "model.safetensors"
    published = [file for entry in entries().values() for file in entry.files if file.path == path.name]
    return path if any(state(path, file) == "verified" for file in published) else None


def state(path: Path, file: RemoteFile) -> State:
    """What `path` is, compared with the published file; reads all of it where a hash is known."""
    if not path.is_file():
        return "missing"
    if file.bytes is not None and path.stat().st_size != file.bytes:
        return "wrong"
    if file.sha256 is None:
        return "not verifiable"
    return "verified" if file_hash(path) == file.sha256 else "wrong"


class Item(NamedTuple):
    """One file that lies in a weights folder."""

    path: Path
    state: str  # in words


def inventory(folder: Path) -> list[Item]:
    """The models, tokenizers and unfinished downloads in `folder`; published files are hashed."""
    items = []
    for path in sorted(folder.glob("*/*")):
        entry = entries().get(path.parent.name)
        published = {file.path: file for file in entry.files + entry.extras} if entry else {}
        if path.name in published:
            found = state(path, published[path.name])
            words = {"verified": "verified: SHA-256", "wrong": "NOT the published file"}.get(found, found)
        elif path.suffix == ".part":
            words = "unfinished: the same fetch goes on"
        elif path.name == MODEL:
            words = "converted here" if entry else "the embedded model" if path == embedded_model_path() else "a model"
        else:
            continue
        items.append(Item(path, words))
    return items


def download_size(entry: Entry) -> str:
    """How much there is to fetch, in words."""
    sizes = [file.bytes for file in entry.files]
    return "unknown" if None in sizes else f"{sum(size for size in sizes if size is not None):,}"


def file_hash(path: Path, algorithm: str = "sha256") -> str:
    """Hexadecimal hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()
