"""Files from strangers: what is no file, what changes while it is read, and what claims more than it holds."""

from __future__ import annotations

import io
import os
import socket
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import gpt2np.files
from gpt2np.errors import ModelFileError, TraceError
from gpt2np.files import File, json_object, read_arrays, write_arrays


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tmp_path / "s"))
    names = ["nowhere", "pipe", "link", "circle", "s", ".", "a\0b", "\ud800", "x" * 300]
    for path in [*(tmp_path / name for name in names), Path("/dev/zero")]:
        with pytest.raises(ModelFileError):
            File(path).read()


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="everything may be read here")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x")
    (tmp_path / "secret").chmod(0)
    with pytest.raises(ModelFileError, match="Permission denied"):
        File(tmp_path / "secret")


def test_a_file_that_changes_is_an_error_and_no_mixture(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1000))
    file = File(path)
    assert file.read() == bytes(1000)
    path.write_bytes(b"\1" * 1000)
    with pytest.raises(ModelFileError, match="changed or replaced"):
        file.read()
    other = tmp_path / "other"
    other.write_bytes(b"\1" * 1000)
    file = File(path)
    os.replace(other, path)
    with pytest.raises(ModelFileError, match="changed or replaced"):
        file.read()


def test_a_file_that_is_written_into_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its first and its last byte; what it is put back to by hand, its times, does not hide it."""
    path = tmp_path / "file"
    path.write_bytes(bytes(1000))
    honest = File._fill

    def overwritten(self: File, target: np.ndarray, file: io.FileIO, offset: int) -> None:
        honest(self, target, file, offset)
        state = path.stat()
        with path.open("r+b") as writer:
            writer.write(b"\1" * 1000)
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))

    file = File(path)
    monkeypatch.setattr(File, "_fill", overwritten)
    with pytest.raises(ModelFileError, match="changed or replaced"):
        file.read()
    file = File(path)
    parts = file.read_in_turn(np.empty(100, np.uint8), 0, 1000)
    with pytest.raises(ModelFileError, match="changed or replaced"):
        list(parts)
    with pytest.raises(ModelFileError, match="changed or replaced"):
        File(path).read_in_parts(np.empty(1000, np.uint8), 0)


def test_a_file_is_read_up_to_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(TraceError, match="at most"):
        File(path, TraceError).read()


@pytest.mark.parametrize("text", [b"", b"[]", b"3", b'{"a":', b"\xff{}", b"[" * 100_000, b"1" * 10_000, b'{"a": 1} x'])
def test_what_is_no_json_object(text: bytes) -> None:
    with pytest.raises(ModelFileError, match="JSON"):
        json_object(text, "it")


def test_arrays_come_back_as_numpy_wrote_them(tmp_path: Path) -> None:
    arrays = {
        "a/b": np.arange(6.0).reshape(2, 3),
        "columns": np.asfortranarray(np.arange(6, dtype=np.int32).reshape(2, 3)),
        "none": np.zeros((0, 3), np.float16),
        "one": np.array(True),
        "large": np.zeros(1_000_000),
    }
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", **arrays)
        found = read_arrays(tmp_path / "x.npz")
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype
            assert found[name].flags.writeable
            np.testing.assert_array_equal(found[name], array, strict=True)


def test_the_same_arrays_make_the_same_file(tmp_path: Path) -> None:
    """So that a recorded trace that did not change shows no change in git."""
    arrays = {"a/b": np.asfortranarray(np.ones((2, 3))), "c": np.array(1.5, np.float16)}
    for how in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        for name in ("x.npz", "y.npz"):
            write_arrays(tmp_path / name, arrays.items(), how)
        with zipfile.ZipFile(tmp_path / "x.npz") as archive:
            assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert (tmp_path / "x.npz").read_bytes() == (tmp_path / "y.npz").read_bytes()
        with np.load(tmp_path / "x.npz") as found:
            for name, array in arrays.items():
                np.testing.assert_array_equal(found[name], array, strict=True)


def npy(header: str, content: bytes = b"") -> bytes:
    padded = header.encode() + b"\n"
    return b"\x93NUMPY\1\0" + len(padded).to_bytes(2, "little") + padded + content


HEADERS = {
    "claims": "{'descr': '<f8', 'fortran_order': False, 'shape': (100000000000,)}",
    "negative": "{'descr': '<f8', 'fortran_order': False, 'shape': (-1, -1)}",
    "objects": "{'descr': '|O', 'fortran_order': False, 'shape': (1,)}",
    "text": "{'descr': '<U1', 'fortran_order': False, 'shape': (2,)}",
    "nothing": "{'descr': '|V0', 'fortran_order': False, 'shape': (1000000000000,)}",
    "fields": "{'descr': [('a', '<f4'), ('b', '<f4')], 'fortran_order': False, 'shape': (1,)}",
    "code": "__import__('os').system('true')",
    "short": "{'descr': '<f8'}",
    "kind": "{'descr': 3, 'fortran_order': 'x', 'shape': None}",
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_arrays_that_are_not_what_they_claim(tmp_path: Path, header: str) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("a.npy", npy(header, bytes(8)))
    with pytest.raises(TraceError, match=r"x\.npz"):
        read_arrays(tmp_path / "x.npz", TraceError)


def test_archives_that_are_no_npz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a.npy", npy(HEADERS["text"]))
    with pytest.raises(ModelFileError, match="another way"):
        read_arrays(path)
    for content in (b"", b"PK\3\4", b"\x93NUMPY"):
        path.write_bytes(content)
        with pytest.raises(ModelFileError):
            read_arrays(path)
    np.savez_compressed(path, a=np.zeros(1 << 20))  # a small bomb, under a small allowance
    monkeypatch.setattr(gpt2np.files, "FREE", 1 << 20)
    with pytest.raises(ModelFileError, match="unpacks to"):
        read_arrays(path)
