"""Bring what is published of GPT-2 into a folder: from the network, from the user's own files, out of an archive."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

from ..errors import DownloadError
from . import manifest
from .manifest import MODEL, Entry, Mirror, RemoteFile, file_hash, state
from .transfer import DISK_FULL, Unreachable, Wanted, download, nothing

# (description, total, unit) -> a context manager that gives `advance(amount)`
Progress = Callable[[str, float | None, str], AbstractContextManager[Callable[[float], None]]]


def fetch(
    name: str,
    to: Path | None = None,
    mirror: str | None = None,
    source: Path | None = None,
    offline: bool = False,
    convert: Callable[[Path], None] | None = None,
    note: Callable[[str], None] = nothing,
    progress: Progress = lambda *_: nullcontext(nothing),
    sleep: Callable[[float], None] = time.sleep,
) -> Path:
    """Bring a model, or the tokenizer, into the folder `to`/`name`, whole and verified; returns that folder.

    Files that are there already are verified and kept. An interrupted download goes on where it stopped.

    Parameters
    ----------
    name : str
        An entry of the manifest.
    to : Path, optional
        Default: `manifest.default_folder()`.
    mirror : str, optional
        A URL under which the files lie by their published names; used instead of the published mirrors.
    source : Path, optional
        A file, or a folder of files, that was got by other means; nothing is then fetched from the network.
    offline : bool
        Only verify what is there.
    convert : callable (folder), optional
        Makes model.onnx in a folder that has model.safetensors.

    Raises
    ------
    DownloadError
        If something is missing and cannot be had, or a file that is there is not the published one.
    """
    entry = _entry(name)
    folder = (manifest.default_folder() if to is None else to) / name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder, note):
            folder.mkdir(exist_ok=True)
            try:
                _fill(entry, folder, mirror, source, offline, note, progress, sleep)
                if entry.convert and convert is not None and not (folder / MODEL).is_file():
                    convert(folder)
            finally:
                with suppress(OSError):
                    folder.rmdir()  # where nothing came of it
    except OSError as error:
        problem = "the disk is full" if error.errno in DISK_FULL else error.strerror
        raise DownloadError(f"{folder}: {problem}") from error
    return folder


def _fill(
    entry: Entry,
    folder: Path,
    mirror: str | None,
    source: Path | None,
    offline: bool,
    note: Callable[[str], None],
    progress: Progress,
    sleep: Callable[[float], None],
) -> None:
    """Bring what is missing, or raise."""
    missing = [file for file in entry.files + entry.extras if _is_missing(folder / file.path, file)]
    if source is not None:
        _take(entry, missing, source, folder, note)
    elif missing and not offline:
        _get(entry, missing, mirror, folder, note, progress, sleep)
    _require(entry, folder, note)


def _entry(name: str) -> Entry:
    try:
        return manifest.entries()[name]
    except KeyError:
        raise DownloadError(
            f"nothing is known of {name!r}; what can be fetched is {', '.join(manifest.entries())}"
        ) from None


def _is_missing(path: Path, file: RemoteFile) -> bool:
    found = state(path, file)
    if found == "wrong":
        raise DownloadError(f"{path} is not the published {file.name}; move it away, and fetch again")
    return found == "missing"


def _require(entry: Entry, folder: Path, note: Callable[[str], None]) -> None:
    """Raise unless all that the entry needs is there; what only lies beside it is worth a note."""
    for file in entry.files:
        if not (folder / file.path).is_file():
            urls = "\n  ".join(mirror.shown for mirror in file.mirrors)
            raise DownloadError(f"{folder / file.path} is not here; it can be had from\n  {urls}")
    for file in entry.extras:
        if not (folder / file.path).is_file():
            note(f"{folder / file.path} is not here; text needs it (gpt2np fetch tokenizer)")


@contextmanager
def _lock(folder: Path, note: Callable[[str], None]) -> Iterator[None]:
    """Let one process at a time work on a folder."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        note(f"another process is fetching {folder.name}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _get(
    entry: Entry,
    missing: Sequence[RemoteFile],
    mirror: str | None,
    folder: Path,
    note: Callable[[str], None],
    progress: Progress,
    sleep: Callable[[float], None],
) -> None:
    def bring(file: RemoteFile) -> Path:
        wanted = Wanted(folder / file.path, file.bytes, file.sha256)
        mirrors = file.mirrors if mirror is None else (Mirror(f"{mirror.rstrip('/')}/{file.name}"),)
        with progress(file.name, file.bytes, "bytes") as advance:
            download(wanted, mirrors, note, advance, sleep)
        return wanted.path

    first = entry.files[0]
    begun = (folder / f"{first.path}.part").exists()
    if entry.archive is not None and first in missing and not begun:
        try:
            _open_archive(bring(entry.archive), folder, first, note)
        except Unreachable:
            raise
        except DownloadError as error:
            note(f"{str(error).splitlines()[0]}; going on with {first.name}, without the archive's test data")
    for file in missing:
        if not (folder / file.path).is_file():
            bring(file)


def _open_archive(archive: Path, folder: Path, model: RemoteFile, note: Callable[[str], None]) -> None:
    """Move the model and the test data out of a verified archive, which is then deleted."""
    from .unpack import unpack

    unpacked = folder / "unpacked"
    shutil.rmtree(unpacked, ignore_errors=True)  # of a run that was killed
    try:
        for path in unpack(archive, unpacked):
            if path.parent.name.startswith("test_data_set_") and path.suffix == ".pb":
                target = folder / path.parent.name / path.name
                target.parent.mkdir(exist_ok=True)
                os.replace(path, target)
            elif path.suffix == ".onnx" and state(path, model) in ("verified", "not verifiable"):
                os.replace(path, folder / model.path)
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    if not (folder / model.path).is_file():
        note(f"{archive.name} holds no file that is {model.name}")
    archive.unlink()


def _take(entry: Entry, missing: Sequence[RemoteFile], source: Path, folder: Path, note: Callable[[str], None]) -> None:
    """Copy what is missing from a file, or a folder of files, that the user has."""
    if not source.exists():
        raise DownloadError(f"{source}: no such file or folder")
    given = sorted(path for path in source.iterdir() if path.is_file()) if source.is_dir() else [source]
    wanted = list(missing)
    if entry.archive is not None and (entry.files[0] in missing or not any(folder.glob("test_data_set_*"))):
        wanted.append(entry.archive)
    taken = 0
    for file in wanted:
        for path in given:
            named = path.name == Path(file.name).name
            fits = state(path, file) if file.bytes is not None or file.sha256 is not None or named else "wrong"
            if fits == "verified" or (fits == "not verifiable" and named):
                if fits != "verified":
                    note(f"warning: no hash of {file.name} is known; {path} was taken for it by its name")
                _copy(path, folder / file.path, file)
                if file is entry.archive:
                    _open_archive(folder / file.path, folder, entry.files[0], note)
                taken += 1
                break
    if wanted and not taken:
        known = "\n  ".join(f"{file.name}: {file.bytes} bytes, SHA-256 {file.sha256}" for file in wanted)
        found = "\n  ".join(f"{path}: {path.stat().st_size} bytes, SHA-256 {file_hash(path)}" for path in given)
        raise DownloadError(f"none of these is a file that {entry.name} lacks:\n  {found}\nit lacks\n  {known}")


def _copy(path: Path, target: Path, file: RemoteFile) -> None:
    """Copy so that the target's name is taken by a whole and checked file only."""
    copy = target.with_name(target.name + ".copy")
    try:
        shutil.copyfile(path, copy)
        if state(copy, file) == "wrong":
            raise DownloadError(f"{path} changed while it was copied")
        os.replace(copy, target)
    finally:
        copy.unlink(missing_ok=True)
