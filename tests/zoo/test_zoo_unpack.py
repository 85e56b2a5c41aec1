"""Archives from strangers: nothing lands outside, nothing but plain files comes out, nothing bursts."""

from __future__ import annotations

import gzip
import io
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt2np.errors import DownloadError
from gpt2np.zoo.unpack import unpack


def member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, link: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.size, made.linkname = kind, size, link
    return made


def write(path: Path, *members: tarfile.TarInfo | tuple[str, bytes], form: int = tarfile.PAX_FORMAT) -> None:
    with tarfile.open(path, "w:gz", format=form) as tar:
        for made in members:
            if isinstance(made, tuple):
                name, content = made
                tar.addfile(member(name, size=len(content)), io.BytesIO(content))
            else:
                tar.addfile(made)


GOOD = ("good.pb", b"good")


def test_a_good_archive(tmp_path: Path) -> None:
    long_name = "d/" * 40 + "x" * 90  # needs an extended header
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        archive = tmp_path / f"{form}.tar.gz"
        write(archive, member("m", tarfile.DIRTYPE), ("./m/model.onnx", b"x" * 3_000_000), (long_name, b"y"), form=form)
        folder = tmp_path / "out" / str(form)
        files = unpack(archive, folder)
        assert [str(path.relative_to(folder)) for path in files] == [long_name, "m/model.onnx"]
        assert (folder / "m" / "model.onnx").read_bytes() == b"x" * 3_000_000
        assert (folder / "m" / "model.onnx").stat().st_mode & 0o111 == 0


HOSTILE: dict[str, tuple[tarfile.TarInfo | tuple[str, bytes], ...]] = {
    "a way up": (("../outside", b"x"),),
    "a way up in the middle": (("a/../../outside", b"x"),),
    "an absolute path": (("ABSOLUTE/outside", b"x"),),
    "a drive": (("C:/outside", b"x"),),
    "backslashes": (("..\\outside", b"x"),),
    "a folder outside": (member("../outside", tarfile.DIRTYPE),),
    "a symbolic link": (member("link", tarfile.SYMTYPE, link="/etc"),),
    "a way through a link": (member("link", tarfile.SYMTYPE, link=".."), ("link/outside", b"x")),
    "a hard link": (GOOD, member("link", tarfile.LNKTYPE, link="good.pb")),
    "a hard link outside": (member("link", tarfile.LNKTYPE, link="../../outside"),),
    "a character device": (member("device", tarfile.CHRTYPE),),
    "a block device": (member("device", tarfile.BLKTYPE),),
    "a pipe": (member("pipe", tarfile.FIFOTYPE),),
    "an old sparse file": (member("sparse", tarfile.GNUTYPE_SPARSE),),
    "an unknown type": (member("odd", b"Z"),),
    "the same name twice": (GOOD, GOOD),
    "a file as a folder": (GOOD, ("good.pb/below", b"x")),
    "a file in a file in a file": (GOOD, ("good.pb/below/more", b"x")),
    "a folder as a file": (member("m", tarfile.DIRTYPE), ("m", b"x")),
    "no name": ((".", b"x"),),
    "too many": tuple((f"{i}.pb", b"") for i in range(11)),
    "too large": (("large", b"\0" * 2_000_000),),
    "too large together": tuple((f"{i}.pb", b"\0" * 300_000) for i in range(5)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_leaves_nothing_behind(tmp_path: Path, name: str) -> None:
    members = [
        (made[0].replace("ABSOLUTE", str(tmp_path)), made[1]) if isinstance(made, tuple) else made
        for made in HOSTILE[name]
    ]
    write(tmp_path / "a.tar.gz", GOOD, *members)
    reason = "more bytes than allowed" if name.startswith("too large") else "refused|more than 10 members"
    with pytest.raises(DownloadError, match=reason):
        unpack(tmp_path / "a.tar.gz", tmp_path / "in" / "out", max_files=10, max_bytes=1_000_000)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar.gz", "in"]


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_a_huge_extended_header_is_not_read_into_memory(tmp_path: Path, kind: bytes) -> None:
    content = member("x", kind, 8 << 30).tobuf(tarfile.GNU_FORMAT) + b"\0" * (8 << 20)
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(content, 1))
    with pytest.raises(DownloadError, match="refused"):
        unpack(tmp_path / "a.tar.gz", tmp_path / "out")


def test_a_pax_header_cannot_make_a_sparse_file(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz", format=tarfile.PAX_FORMAT) as tar:
        sparse = member("sparse.pb", size=512)
        sparse.pax_headers = {
            "GNU.sparse.major": "1",
            "GNU.sparse.minor": "0",
            "GNU.sparse.name": "sparse.pb",
            "GNU.sparse.realsize": str(1 << 50),
        }
        tar.addfile(sparse, io.BytesIO(b"0\n".ljust(512, b"\0")))
    with pytest.raises(DownloadError, match="no plain file"):
        unpack(tmp_path / "a.tar.gz", tmp_path / "out")


def test_a_pax_header_cannot_hide_a_way_out(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz", format=tarfile.PAX_FORMAT) as tar:
        innocent = member("innocent")
        innocent.pax_headers = {"path": "../outside"}
        tar.addfile(innocent)
    with pytest.raises(DownloadError, match="leads outside"):
        unpack(tmp_path / "a.tar.gz", tmp_path / "out")


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut off": lambda data: data[: len(data) // 2],
    "a flipped byte": lambda data: data[:5000] + bytes([data[5000] ^ 0xFF]) + data[5001:],
    "a wrong checksum": lambda data: data[:-8] + b"\0\0\0\0" + data[-4:],
    "no gzip at all": lambda data: b"<html>not found</html>",
    "empty": lambda data: b"",
    "gzip, but no tar": lambda data: gzip.compress(b"words" * 1000),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_archive_leaves_nothing_behind(tmp_path: Path, name: str) -> None:
    archive = tmp_path / "a.tar.gz"
    write(archive, ("model.onnx", random.Random(0).randbytes(100_000)))
    archive.write_bytes(DAMAGE[name](archive.read_bytes()))
    with pytest.raises(DownloadError, match="is damaged"):
        unpack(archive, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar.gz"]
