"""A shard of work, named by everything that its result depends on, and the folder that keeps results by these names."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import Gpt2npError, InputError
from ..files import replacing

DIGEST = hashlib.sha256().digest_size  # bytes at the end of a file: SHA-256 of those before


@dataclass(frozen=True)
class Shard:
    """A piece of work.

    Parameters
    ----------
    kind : str
        What is computed: the beginning of the name.
    content : dict
        All that the result depends on, as JSON: hashes of the model and of the text, a range, options.
    where : dict
        Where a worker finds these: paths, the same on every machine. Not a part of the name.
    size : int
        How much work it is, in the unit that progress is counted in.
    """

    kind: str
    content: dict[str, Any]
    where: dict[str, Any] = field(default_factory=dict)
    size: int = 1

    @property
    def name(self) -> str:
        """The same for the same result, on every machine."""
        text = json.dumps(self.content, sort_keys=True, allow_nan=False)
        return f"{self.kind}-{hashlib.sha256(text.encode()).hexdigest()[:40]}"


class NoResult(Gpt2npError):
    """Why a shard has no result. Others are computed nevertheless, and the same command tries this one again."""


class Store:
    """A folder of results, one file for each shard: it is there as a whole, or it is not there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, name: str) -> bytes | None:
        """The result of the shard of that name; None where there is none, or its checksum says that it is damaged.

        Raises
        ------
        InputError
            If it cannot be read, or there is no such folder on this machine.
        """
        try:
            whole = (self.folder / name).read_bytes()
        except FileNotFoundError:
            if self.folder.is_dir():
                return None
            host = socket.gethostname()
            raise InputError(f"{host} has no folder {self.folder}: results need one that all machines see") from None
        except OSError as error:
            raise InputError(f"cannot read {self.folder / name}: {error.strerror}") from None
        result = whole[:-DIGEST]
        return result if hashlib.sha256(result).digest() == whole[-DIGEST:] else None

    def result(self, name: str) -> bytes:
        """The result of a shard that was computed; InputError where it is lost or was damaged since."""
        found = self.read(name)
        if found is None:
            raise InputError(f"{self.folder / name} was removed or damaged; the same command makes it anew")
        return found

    def write(self, name: str, result: bytes) -> None:
        """Keep the result of the shard of that name; InputError where it cannot be written, and then nothing is."""
        try:
            with replacing(self.folder / name) as draft:
                draft.write_bytes(result + hashlib.sha256(result).digest())
        except OSError as error:
            raise InputError(f"cannot write {self.folder / name}: {error.strerror}") from None

    def remove_drafts(self, shards: Iterable[Shard]) -> None:
        """Remove what killed workers left of these shards."""
        names = {shard.name for shard in shards}
        for draft in self.folder.glob(".*.part"):
            if draft.name.split(".")[1] in names:
                draft.unlink(missing_ok=True)
