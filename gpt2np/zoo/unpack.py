"""Unpack a .tar.gz from the network: plain files only, all of them below one folder, within limits."""

from __future__ import annotations

import gzip
import io
import shutil
import tarfile
import tempfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Self, TypeVar, cast

from ..errors import DownloadError

MAX_FILES = 1000
MAX_BYTES = 8 << 30  # unpacked; the zoo's largest GPT-2 archive holds 0.7 GB

MAX_HEADER = 1 << 16
MemberT = TypeVar("MemberT", bound=tarfile.TarInfo)
EXTENDED_HEADERS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME)


def unpack(archive: Path, folder: Path, max_files: int = MAX_FILES, max_bytes: int = MAX_BYTES) -> list[Path]:
    """Unpack `archive` into the new folder `folder`; returns the files' paths.

    Everything is written to a temporary folder beside it, which takes its name when all is done: a refused or
    interrupted archive leaves nothing behind.

    Raises
    ------
    DownloadError
        If the archive is damaged, has more files or bytes than allowed, or has a member that is not a plain
        file or folder (a link, a device) or that would land outside `folder` or on another member.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=folder.parent) as temporary:
        root = Path(temporary) / "content"
        root.mkdir()
        try:
            with gzip.open(archive) as unzipped:
                limited = cast(BinaryIO, _Limited(unzipped, max_bytes))
                with tarfile.open(fileobj=limited, mode="r|", tarinfo=_Member) as tar:
                    for count, member in enumerate(tar, 1):
                        if count > max_files:
                            raise DownloadError(f"{archive.name}: more than {max_files} members")
                        _unpack_member(tar, member, root)
                while limited.read(1 << 20):  # to the end, where gzip's checksum is
                    pass
        except (FileExistsError, NotADirectoryError) as error:
            raise DownloadError(f"refused {archive.name}: two of its members are in each other's way") from error
        except (tarfile.TarError, zlib.error, gzip.BadGzipFile, EOFError, ValueError) as error:
            raise DownloadError(f"{archive.name} is damaged: {error}") from error
        root.rename(folder)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _unpack_member(tar: tarfile.TarFile, member: tarfile.TarInfo, root: Path) -> None:
    name = PurePosixPath(member.name)
    parts = [part for part in name.parts if part != "."]
    if name.is_absolute() or ".." in parts or any(set(part) & set("\\:\0") for part in parts):
        raise DownloadError(f"refused the archive: its member {member.name!r} leads outside the folder")
    path = root.joinpath(*parts)
    if member.isdir():
        path.mkdir(parents=True, exist_ok=True)
        return
    content = tar.extractfile(member) if member.isreg() and not member.issparse() and parts else None
    if content is None:
        raise DownloadError(f"refused the archive: its member {member.name!r} is no plain file")
    path.parent.mkdir(parents=True, exist_ok=True)
    with content, path.open("xb") as file:
        shutil.copyfileobj(content, file, 1 << 20)


class _Member(tarfile.TarInfo):
    """A member whose header is refused before tarfile acts on it, or reads a huge extended header into memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        return _admitted(super().frombuf(buf, encoding, errors))

    @classmethod
    def _frombuf(cls, *args: Any, **options: Any) -> Self:  # which tarfile calls in its place from Python 3.14 on
        return _admitted(super()._frombuf(*args, **options))  # type: ignore[misc]


def _admitted(member: MemberT) -> MemberT:
    if member.type in EXTENDED_HEADERS and member.size <= MAX_HEADER:
        return member
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE):
        raise DownloadError(f"refused the archive: its member {member.name!r} is neither a plain file nor a folder")
    return member


class _Limited(io.RawIOBase):
    """A stream that ends in an error after so many bytes, before a bomb can fill the memory or the disk."""

    def __init__(self, stream: gzip.GzipFile, limit: int) -> None:
        self._stream, self._left = stream, limit

    def read(self, size: int = -1, /) -> bytes:
        if size < 0 or size > self._left:
            size = self._left + 1
        data = self._stream.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise DownloadError("the archive unpacks to more bytes than allowed")
        return data
