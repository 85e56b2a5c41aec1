"""A shard of work, named by everything that its result depends on, and the folder that keeps results by these names."""

from __future__ import annotations

import hashlib
import json
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from ..files import replacing

DIGEST = hashlib.sha256().digest_size  # bytes at the end of a file: SHA-256 of those before
WAIT = 60.0  # seconds until a network's disk surely shows what another machine has written: NFS remembers what it lacks


Work = Callable[["Shard", "Store"], bytes]


class Store(NamedTuple):
    """A folder of results, one file for each shard: it is there as a whole, or it is not there."""

    folder: Path

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
        """The result of a shard that was computed; InputError where it is lost, or was damaged since."""
        until = time.monotonic() + WAIT
        while (found := self.read(name)) is None:
            if time.monotonic() > until:
                here = f"as {socket.gethostname()} sees it; do all machines see this folder?"
                raise InputError(f"{self.folder / name} is missing or damaged, {here} The same command makes it anew")
            time.sleep(0.2)
        return found

    def write(self, name: str, result: bytes) -> None:
        """Keep the result of the shard of that name; InputError where it cannot be written, and then nothing is."""
        try:
            with replacing(self.folder / name) as draft:
                draft.write_bytes(result + hashlib.sha256(result).digest())
        except OSError as error:
            if isinstance(error, FileNotFoundError) and self.read(name) is not None:
                return  # another command was first with this shard, and has tidied up
            raise InputError(f"cannot write {self.folder / name}: {error.strerror}") from None

    def tidy(self, shards: Iterable[Shard]) -> None:
        """Remove what was killed while it wrote results of some shards, all of which are here now."""
        names = {shard.name for shard in shards}
        for draft in self.folder.glob(".*.part"):  # see `replacing`
            if draft.name.split(".")[1] in names:
                draft.unlink(missing_ok=True)

    def missing(self, shards: Iterable[Shard]) -> list[Shard]:
        """Those of some shards that have no sound result here, each of them once."""
        return list({shard.name: shard for shard in shards if self.read(shard.name) is None}.values())


@dataclass(frozen=True)
class Shard:
    """A piece of work.

    Parameters
    ----------
    work : function (shard, store) -> bytes
        What computes the result: a function that each process finds by its name in its module.
    content : dict
        All that the result depends on, as JSON: hashes of the model and of the text, a range, options.
    where : dict
        Where a worker finds these: paths, the same on every machine. Not a part of the name.
    size : int
        How much work it is, in the unit that progress is counted in.
    """

    work: Work
    content: dict[str, Any]
    where: dict[str, Any] = field(default_factory=dict)
    size: int = 1

    @cached_property
    def name(self) -> str:
        """The same for the same result, on every machine."""
        text = json.dumps(self.content, sort_keys=True, allow_nan=False)
        return f"{self.work.__name__}-{hashlib.sha256(text.encode()).hexdigest()[:40]}"
