"""Files that come from strangers: opened safely, read within limits, and never as a mixture of two versions."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import stat
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import IO, Any

import numpy as np

from .errors import Gpt2npError, InputError, ModelFileError, TokenizerError

PART = 1 << 21  # bytes that one thread reads at least; a large page, so that two threads never share one
MAX_JSON = 1 << 24  # bytes of a JSON text; GPT-2's tokenizer.json, the longest that is read here, has 2.1e6
# What the content of a file may take in memory, whatever it claims: so much, and so many times its own bytes.
# Weights of 4 bits become 8 times as large in float32, and deflate packs zeros a thousandfold.
FREE, FACTOR = 1 << 28, 64


def allowance(nbytes: int) -> int:
    """Bytes of memory that the content of a file of `nbytes` bytes may ask for."""
    return FREE + FACTOR * nbytes


class File:
    """A regular file that is opened for every read, and must not change from the first look to the last byte.

    Parameters
    ----------
    path : Path
    kind : type of Gpt2npError
        What is raised where something is wrong with it.

    Raises
    ------
    kind
        If there is no such file, if it is no regular file, or if it changes after the first look.
    """

    def __init__(self, path: Path, kind: type[Gpt2npError] = ModelFileError) -> None:
        self.path = path
        self.kind = kind
        try:
            state = path.stat()
            if stat.S_ISREG(state.st_mode):
                with path.open("rb"):
                    pass
        except (OSError, ValueError) as error:  # ValueError: a null character, or half of a surrogate pair
            raise kind(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
        if not stat.S_ISREG(state.st_mode):  # a pipe would block for ever, a device never end
            raise kind(f"{path} is not a regular file")
        self.size = state.st_size
        self._state = self._identity(state)

    @staticmethod
    def _identity(state: os.stat_result) -> tuple[int, ...]:
        return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns

    @contextmanager
    def open(self) -> Iterator[FileIO]:
        """The open file, unbuffered; when it is closed, it must still be as it was."""
        try:
            file = self.path.open("rb", buffering=0)
        except OSError as error:
            raise self.kind(f"cannot read {self.path}: {error.strerror}") from None
        with file:
            self.check(file)
            yield file
            self.check(file)

    def check(self, file: FileIO) -> None:
        """Raise if the open file is another one than at the first look, or has been written to since."""
        if self._identity(os.fstat(file.fileno())) != self._state:
            raise self.kind(f"{self.path} was changed or replaced since it was opened")

    def check_size(self, limit: int = MAX_JSON) -> None:
        """Raise if it has more than `limit` bytes."""
        if self.size > limit:
            raise self.kind(f"{self.path} has {self.size:,} bytes, where at most {limit:,} are read")

    def read(self, limit: int = MAX_JSON) -> bytes:
        """All of its bytes; an error if these are more than `limit`."""
        self.check_size(limit)
        content = np.empty(self.size, np.uint8)
        self.read_into(content, [(0, self.size)])
        return content.tobytes()

    def sha256(self) -> str:
        """SHA-256 of its bytes, in hexadecimal."""
        with self.open() as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

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
                raise self.kind(f"{self.path} ends early, at byte {file.tell()}")
            done += got

    def read_in_turn(self, target: np.ndarray, offset: int, nbytes: int) -> Iterator[np.ndarray]:
        """Read `nbytes` bytes from `offset` on through `target`: filled again and again, the last time in part."""
        with self.open() as file:
            for start in range(0, nbytes, len(target)):
                part = target[: nbytes - start]
                self._fill(part, file, offset + start)
                self.check(file)
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


def read_all(path: Path) -> bytes:
    """All bytes of a file, of a pipe, or of what is typed; InputError for another device, which may never end."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or file.isatty()):
                raise InputError(f"{path} is neither a file nor a pipe")
            return file.read()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A draft to write, beside `path`, that takes its place when all is written: never half of a file is there.

    What is no regular file (/dev/stdout, a pipe) is written itself.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    # other machines may write the same file, in a folder that they share
    draft = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.part")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A file in UTF-8, whole or not at all."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A draft of a folder, that takes the place of `path` when all is written; what was there goes then."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    draft.mkdir()
    try:
        yield draft
        shutil.rmtree(path, ignore_errors=True)
        os.replace(draft, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_arrays(
    target: Path | IO[bytes], arrays: Iterable[tuple[str, np.ndarray]], compression: int = zipfile.ZIP_STORED
) -> None:
    """Arrays as `np.savez` writes them, but one after the other, and of no date: the same arrays make the same file."""
    with zipfile.ZipFile(target, "w") as archive:
        for name, value in arrays:
            entry = zipfile.ZipInfo(f"{name}.npy")
            entry.compress_type = compression
            with archive.open(entry, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, value, allow_pickle=False)


def read_arrays(path: Path, kind: type[Gpt2npError] = ModelFileError) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, by name: writable, each the caller's own.

    `numpy.load` asks for memory before it has seen the bytes that fill it; here what the archive and each array's
    header claim is compared with what is there.

    Raises
    ------
    kind
        If the file is missing, truncated, no .npz, holds anything but numbers, or unpacks to more than `allowance`.
    """
    file = File(path, kind)
    arrays: dict[str, np.ndarray] = {}
    try:
        with file.open() as opened, zipfile.ZipFile(opened) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
            if unpacked > allowance(file.size):
                raise kind(f"{path} unpacks to {unpacked:,} bytes; one of its size may have {allowance(file.size):,}")
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # what NumPy writes
                    raise kind(f"{path}: array {name!r} is compressed in another way than NumPy does")
                with archive.open(member) as stream:
                    arrays[name] = _npy_array(stream)
    except Gpt2npError:
        raise
    except Exception as error:  # of zipfile, zlib and NumPy, each of their own kinds
        raise kind(f"{path}: truncated, damaged, or no .npz file: {error or type(error).__name__}") from error
    return arrays


def _npy_array(stream: IO[bytes]) -> np.ndarray:
    """The array of one .npy; ValueError if it is not of numbers, or its bytes do not fill its shape."""
    form = np.lib.format
    version = form.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of .npy")
    read_header = form.read_array_header_1_0 if version == (1, 0) else form.read_array_header_2_0
    shape, by_columns, dtype = read_header(stream)
    if dtype.kind not in "biufcV" or dtype.names or dtype.subdtype or not dtype.itemsize:
        raise ValueError(f"an array of {dtype}, not of numbers")
    content = bytearray(stream.read())
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(content):
        raise ValueError(f"{len(content)} bytes for {dtype} {list(shape)}")
    return np.ndarray(shape, dtype, content, order="F" if by_columns else "C")


@contextmanager
def located(place: object) -> Iterator[None]:
    """Errors of what stands in a text begin with its place: the file, and perhaps where in it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: not UTF-8 text: {error}") from None
    except (InputError, TokenizerError) as error:
        raise type(error)(f"{place}: {error}") from None


def json_object(text: bytes, where: str, kind: type[Gpt2npError] = ModelFileError) -> dict[str, Any]:
    """The JSON object that a text holds.

    Raises
    ------
    kind
        If it is not JSON, or not an object; `where` names it.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also what is not UTF-8, or a number of 5,000 digits
        raise kind(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise kind(f"{where} is no JSON object")
    return value
