"""Files that come from strangers: opened safely, and never read as a mixture of two versions."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path

import numpy as np

from .errors import ModelFileError

PART = 1 << 21  # bytes that one thread reads at least; a large page, so that two threads never share one


class File:
    """A regular file that is opened for every read, and must not change in between.

    Raises
    ------
    ModelFileError
        If there is no such file, if it is no regular file, or if it changes after the first look.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            state = path.stat()
            if stat.S_ISREG(state.st_mode):
                with path.open("rb"):
                    pass
        except (OSError, ValueError) as error:
            raise ModelFileError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
        if not stat.S_ISREG(state.st_mode):  # a pipe would block for ever, a device never end
            raise ModelFileError(f"{path} is not a regular file")
        self.size = state.st_size
        self._state = self._identity(state)

    @staticmethod
    def _identity(state: os.stat_result) -> tuple[int, ...]:
        return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns

    def open(self) -> FileIO:
        """The open file, unbuffered; the caller closes it."""
        try:
            file = self.path.open("rb", buffering=0)
        except OSError as error:
            raise ModelFileError(f"cannot read {self.path}: {error.strerror}") from None
        if self._identity(os.fstat(file.fileno())) != self._state:
            file.close()
            raise ModelFileError(f"{self.path} was changed or replaced since it was opened")
        return file

    def read_into(self, target: np.ndarray, pieces: Iterable[tuple[int, int]]) -> None:
        """Fill the one-dimensional uint8 array `target` with the bytes of all (offset, length) pieces."""
        done = 0
        with self.open() as file:
            for offset, length in pieces:
                self._fill(target[done : done + length], file, offset)
                done += length

    def _fill(self, target: np.ndarray, file: FileIO, offset: int) -> None:
        view, done = target.data, 0
        file.seek(offset)
        while done < len(view):
            got = file.readinto(view[done:])
            if not got:
                raise ModelFileError(f"{self.path} ends early, at byte {file.tell()}")
            done += got

    def read_in_turn(self, target: np.ndarray, offset: int, nbytes: int) -> Iterator[np.ndarray]:
        """Read `nbytes` bytes from `offset` on through `target`: filled again and again, the last time in part."""
        with self.open() as file:
            for start in range(0, nbytes, len(target)):
                part = target[: nbytes - start]
                self._fill(part, file, offset + start)
                yield part

    def read_in_parts(self, target: np.ndarray, offset: int) -> None:
        """Fill `target` with the bytes from `offset`, a large one in several threads.

        Half of the time goes to the system's clearing of new memory, which more cores do faster.
        """
        part = max(PART, -(-len(target) // (os.cpu_count() or 1) // PART) * PART)
        starts = range(0, len(target), part)
        if len(starts) == 1:
            self.read_into(target, [(offset, len(target))])
            return
        with ThreadPoolExecutor(len(starts)) as pool:
            parts = [target[start : start + part] for start in starts]
            list(pool.map(lambda start, view: self.read_into(view, [(offset + start, len(view))]), starts, parts))
