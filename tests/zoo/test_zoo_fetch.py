"""`gpt2np fetch` against a local server: whatever goes wrong, no wrong file takes its final name."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from fault_server import Fault, FaultServer
from gpt2np import zoo
from gpt2np.commands.fetch import fetch as fetch_command
from gpt2np.commands.list_models import list_models
from gpt2np.errors import DownloadError, ModelFileError
from gpt2np.zoo import manifest, transfer
from gpt2np.zoo.transfer import ATTEMPTS, CONNECT_ATTEMPTS, Mirror, Unreachable, Wanted, download

CONTENT = bytes(range(256)) * 1000 + b"the end"  # 256,007 bytes
SHA256 = hashlib.sha256(CONTENT).hexdigest()
CUT = 100_000


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as server:
        server.files["/model"] = CONTENT
        server.files["/second"] = CONTENT
        yield server


class Case:
    """One download and what it did."""

    def __init__(self, server: FaultServer, folder: Path, **wanted: Any) -> None:
        self.server = server
        self.wanted = Wanted(folder / "model.onnx", wanted.get("bytes", len(CONTENT)), wanted.get("sha256", SHA256))
        self.path = self.wanted.path
        self.part = folder / "model.onnx.part"
        self.slept: list[float] = []
        self.notes: list[str] = []
        self.arrived = 0

    def run(self, *paths: str, timeout: float = 30, md5: str | None = None) -> None:
        mirrors = [Mirror(self.server.url(path), md5) for path in paths or ("/model",)]
        self.arrived = 0
        download(self.wanted, mirrors, self.notes.append, self.advance, self.slept.append, timeout)

    def advance(self, amount: int) -> None:
        self.arrived += amount

    def fails(self, match: str, *paths: str, timeout: float = 30) -> None:
        """The download fails, the final name is not taken, and the progress bar tells what is kept."""
        with pytest.raises(DownloadError, match=match):
            self.run(*paths, timeout=timeout)
        assert not self.path.exists()
        assert self.arrived == (self.part.stat().st_size if self.part.exists() else 0)

    def succeeds(self, *paths: str, timeout: float = 30) -> None:
        """The file is there, right, and alone."""
        self.run(*paths, timeout=timeout)
        assert self.path.read_bytes() == CONTENT
        assert sorted(path.name for path in self.path.parent.iterdir()) == ["model.onnx"]
        assert self.arrived == len(CONTENT)


@pytest.fixture
def case(server: FaultServer, tmp_path: Path) -> Case:
    return Case(server, tmp_path)


def test_a_good_server_is_asked_once(case: Case) -> None:
    case.succeeds()
    assert case.server.statuses("/model") == [200]
    assert case.server.log[0].accept_encoding == "identity"
    assert case.slept == []
    assert case.notes == []


def test_redirects_are_followed(case: Case) -> None:
    case.server.faults["/moved"] = [Fault(redirect="/model")]
    case.succeeds("/moved")
    assert case.server.statuses("/moved") == [302]


def test_a_redirect_keeps_the_range(case: Case) -> None:
    case.server.faults = {"/moved": [Fault(redirect="/model")] * 2, "/model": [Fault(cut=CUT)]}
    case.succeeds("/moved")
    assert case.server.ranges("/model") == [None, f"bytes={CUT}-"]


def test_a_circle_of_redirects_is_left_for_the_next_mirror(case: Case) -> None:
    case.server.faults["/circle"] = [Fault(redirect="/circle")] * 100
    case.succeeds("/circle", "/second")


# What one response does wrong, and what the client must do about it within the same run.
RECOVERED = {
    "cut off": (Fault(cut=CUT), [200, 206]),
    "cut off before the first byte": (Fault(cut=0), [200, 200]),
    "cut off without a Content-Length": (Fault(cut=CUT, no_length=True), [200, 206]),
    "stalled": (Fault(stall=CUT), [200, 206]),
    "server error": (Fault(status=500), [500, 200]),
    "bad gateway": (Fault(status=502), [502, 200]),
    "unavailable": (Fault(status=503), [503, 200]),
    "request timeout": (Fault(status=408), [408, 200]),
    "piece by piece": (Fault(slow=0.001), [200]),
    "no Content-Length": (Fault(no_length=True), [200]),
    "compressed though not asked for": (Fault(compress=True), [200]),
}


@pytest.mark.parametrize("name", RECOVERED)
def test_a_fault_is_survived_in_the_same_run(case: Case, name: str) -> None:
    fault, statuses = RECOVERED[name]
    case.server.faults["/model"] = [fault]
    case.succeeds(timeout=1.5 if name == "stalled" else 30)
    assert case.server.statuses("/model") == statuses
    assert len(case.slept) == len(statuses) - 1


# The same, for the response that should complete a part file.
RESUMED = {
    "range honoured": (Fault(), [206]),
    "range ignored": (Fault(ignore_range=True), [200]),
    "another range": (Fault(shift_range=1000), [206, 200]),
    "an earlier range": (Fault(shift_range=-1000), [206, 200]),
    "compressed": (Fault(compress=True), [206, 200]),
    "cut off again": (Fault(cut=5000), [206, 206]),
    "range ignored and cut off": (Fault(ignore_range=True, cut=5000), [200, 206]),
    "wrong bytes once": (Fault(flip=CUT + 1), [206, 200]),
}


@pytest.mark.parametrize("name", RESUMED)
def test_the_next_run_resumes_or_restarts(case: Case, name: str) -> None:
    fault, statuses = RESUMED[name]
    case.server.faults["/model"] = [Fault(cut=CUT), Fault(status=404)]
    case.fails("404")
    assert case.part.read_bytes() == CONTENT[:CUT]
    before = len(case.server.log)
    case.server.faults["/model"] = [fault]
    case.succeeds()
    assert [request.status for request in case.server.log[before:]] == statuses


def test_a_part_that_is_already_whole_needs_no_body(case: Case) -> None:
    case.part.write_bytes(CONTENT)
    case.succeeds()
    assert case.server.log == []


@pytest.mark.parametrize("junk", [b"?" * 1000, b"?" * len(CONTENT), b"?" * (len(CONTENT) + 5)])
def test_a_foreign_part_file_is_found_out(case: Case, junk: bytes) -> None:
    case.part.write_bytes(junk)
    case.succeeds()


def test_a_part_goes_on_from_another_mirror(case: Case) -> None:
    case.server.faults["/model"] = [Fault(cut=CUT), *[Fault(status=503)] * ATTEMPTS]
    case.succeeds("/model", "/second")
    assert case.server.ranges("/second") == [f"bytes={CUT}-"]


def test_wrong_bytes_at_one_mirror_and_right_ones_at_the_next(case: Case) -> None:
    case.server.faults["/model"] = [Fault(flip=7)]
    case.succeeds("/model", "/second")
    assert any("SHA-256" in note for note in case.notes)


def test_wrong_bytes_in_the_first_half_are_thrown_away_too(case: Case) -> None:
    case.server.faults["/model"] = [Fault(flip=7, cut=CUT)]
    case.succeeds()
    assert case.server.statuses("/model") == [200, 206, 200]


REFUSED = {
    "wrong bytes": (Fault(flip=1234), "SHA-256", 1),
    "another size": (Fault(offer=CONTENT[:-1]), "offers 256,006 bytes", 1),
    "an LFS pointer": (Fault(offer=b"version https://git-lfs..."), "LFS pointer", 1),
    "more than announced": (Fault(extra=b"more"), "sends more", 1),
    "not found": (Fault(status=404), "HTTP 404", 1),
    "forbidden": (Fault(status=403), "HTTP 403", 1),
    "too many requests, for an hour": (Fault(status=429, headers={"Retry-After": "3600"}), "3,600 s", 1),
    "too many requests, always": (Fault(status=429), "HTTP 429", ATTEMPTS),
    "always cut off": (Fault(cut=0), "connection broke", ATTEMPTS),
    "always unavailable": (Fault(status=503), "HTTP 503", ATTEMPTS),
    "always another range": (Fault(shift_range=1), "", 0),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_stays_wrong_never_takes_the_final_name(case: Case, name: str) -> None:
    fault, message, requests = REFUSED[name]
    case.server.faults["/model"] = [fault] * 50
    if name == "always another range":
        case.part.write_bytes(CONTENT[:CUT])  # the first answer is refused, the whole file then taken
        case.succeeds()
        return
    case.fails(message)
    assert len(case.server.log) == requests
    case.server.faults["/model"] = []
    case.succeeds()  # the next run


def test_a_cut_after_every_few_bytes_is_outlasted(case: Case) -> None:
    case.server.faults["/model"] = [Fault(cut=10_000)] * 25
    case.succeeds()
    assert case.slept == [1.0] * 25  # every attempt brought something


def test_wrong_bytes_and_cuts_together_come_to_an_end(case: Case) -> None:
    case.server.faults["/model"] = [Fault(cut=CUT, flip=3)] * 50
    case.server.faults["/model"][1::2] = [Fault(flip=CUT + 3)] * 25
    case.fails("SHA-256")
    assert len(case.server.log) < 10


def test_back_off_doubles(case: Case) -> None:
    case.server.faults["/model"] = [Fault(status=500)] * (ATTEMPTS - 1)
    case.succeeds()
    assert case.slept == [1, 2, 4, 8]


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_in_seconds(case: Case, status: int) -> None:
    case.server.faults["/model"] = [Fault(status=status, headers={"Retry-After": "17"})]
    case.succeeds()
    assert case.slept == [17]


def test_retry_after_as_a_date(case: Case) -> None:
    moment = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 100))
    case.server.faults["/model"] = [Fault(status=429, headers={"Retry-After": moment})]
    case.succeeds()
    assert 90 < case.slept[0] <= 100


@pytest.mark.parametrize("text", ["", "soon", "-5", "1e3"])
def test_a_senseless_retry_after_is_not_believed(case: Case, text: str) -> None:
    case.server.faults["/model"] = [Fault(status=429, headers={"Retry-After": text})]
    case.succeeds()
    assert case.slept == [1]


def test_a_file_that_changes_between_two_runs_is_fetched_anew(case: Case) -> None:
    case.server.files["/model"] = b"old" + CONTENT[3:]
    case.server.faults["/model"] = [Fault(cut=CUT), Fault(status=404)]
    case.fails("404")
    case.server.files["/model"] = CONTENT
    case.succeeds()
    last = case.server.log[-1]
    assert last.range == f"bytes={CUT}-"
    assert last.if_range is not None
    assert last.status == 200  # If-Range did its work


def test_a_changed_file_without_etag_is_found_out_by_its_hash(case: Case) -> None:
    case.server.files["/model"] = b"old" + CONTENT[3:]
    case.server.faults["/model"] = [Fault(cut=CUT, no_validator=True), Fault(status=404)]
    case.fails("404")
    case.server.files["/model"] = CONTENT
    case.succeeds()
    assert case.server.statuses("/model")[2:] == [206, 200]


def test_without_a_hash_halves_of_two_versions_are_never_joined(case: Case) -> None:
    case = Case(case.server, case.path.parent, sha256=None)
    case.server.files["/model"] = b"old" + CONTENT[3:]
    case.server.faults["/model"] = [Fault(cut=CUT, no_validator=True), Fault(status=404)]
    case.fails("404")
    case.server.files["/model"] = CONTENT
    case.succeeds()
    assert case.server.ranges("/model")[-1] is None
    assert any("no hash of model.onnx is known; only its size" in note for note in case.notes)


@pytest.mark.parametrize("no_validator", [False, True])
def test_without_a_hash_a_server_that_does_not_know_if_range_is_not_believed(case: Case, no_validator: bool) -> None:
    """It sends the rest of the new version, with another ETag or none."""
    case = Case(case.server, case.path.parent, sha256=None)
    case.server.files["/model"] = b"old" + CONTENT[3:]
    case.server.faults["/model"] = [Fault(cut=CUT), Fault(status=404)]
    case.fails("404")
    case.server.files["/model"] = CONTENT
    case.server.faults["/model"] = [Fault(ignore_if_range=True, no_validator=no_validator)]
    case.succeeds()
    assert case.server.statuses("/model")[2:] == [206, 200]
    assert case.server.ranges("/model")[2:] == [f"bytes={CUT}-", None]


def test_without_a_hash_a_part_is_not_continued_from_another_mirror(case: Case) -> None:
    case = Case(case.server, case.path.parent, sha256=None)
    case.server.faults["/model"] = [Fault(cut=CUT), Fault(status=404)]
    case.succeeds("/model", "/second")
    assert case.server.ranges("/second") == [None]


def test_without_hash_and_size_the_servers_length_must_be_reached(case: Case) -> None:
    case = Case(case.server, case.path.parent, sha256=None, bytes=None)
    case.server.faults["/model"] = [Fault(cut=CUT)]
    case.succeeds()
    assert case.server.statuses("/model") == [200, 206]
    assert any("nothing could be checked" in note for note in case.notes)


def test_without_hash_size_and_length_nothing_is_taken(case: Case) -> None:
    case = Case(case.server, case.path.parent, sha256=None, bytes=None)
    case.server.faults["/model"] = [Fault(no_length=True)]
    case.fails("does not say how long")


@pytest.mark.parametrize("right", [True, False])
def test_an_md5_decides_where_no_sha256_is_known(case: Case, right: bool) -> None:
    case = Case(case.server, case.path.parent, sha256=None)
    md5 = hashlib.md5(CONTENT if right else b"other").hexdigest()
    case.server.files["/md5.txt"] = f"{md5.upper()}  model.onnx\n".encode()
    if right:
        case.run(md5=case.server.url("/md5.txt"))
        assert case.path.read_bytes() == CONTENT
        assert case.notes == []
    else:
        with pytest.raises(DownloadError, match="MD5"):
            case.run(md5=case.server.url("/md5.txt"))
        assert list(case.path.parent.iterdir()) == []


def test_of_an_md5_text_only_the_beginning_is_read(case: Case) -> None:
    case = Case(case.server, case.path.parent, sha256=None)
    case.server.files["/md5.txt"] = b" " * 5000 + hashlib.md5(b"other").hexdigest().encode() + bytes(50 << 20)
    case.run(md5=case.server.url("/md5.txt"))
    assert case.path.read_bytes() == CONTENT
    assert any("no hash" in note for note in case.notes)


def test_a_stale_md5_does_not_outvote_the_sha256(case: Case) -> None:
    case.server.files["/md5.txt"] = hashlib.md5(b"other").hexdigest().encode()
    case.run(md5=case.server.url("/md5.txt"))
    assert case.path.read_bytes() == CONTENT
    assert any("MD5" in note for note in case.notes)


def test_connection_refused(tmp_path: Path) -> None:
    with FaultServer() as gone:
        url = gone.url("/model")
    slept: list[float] = []
    with pytest.raises(Unreachable, match="no server of m could be reached.*nothing was kept"):
        download(Wanted(tmp_path / "m", 5, SHA256), [Mirror(url)], sleep=slept.append)
    assert len(slept) == CONNECT_ATTEMPTS - 1
    assert list(tmp_path.iterdir()) == []


def test_a_part_outlives_the_loss_of_the_network(case: Case, tmp_path: Path) -> None:
    case.server.faults["/model"] = [Fault(cut=CUT), Fault(status=404)]
    case.fails(f"{CUT:,} of {len(CONTENT):,} bytes are kept")
    with FaultServer() as gone:
        url = gone.url("/model")
    with pytest.raises(Unreachable, match=f"no network.*{CUT:,} of"):
        download(case.wanted, [Mirror(url)], sleep=case.slept.append)
    case.succeeds()
    assert case.server.ranges("/model")[-1] == f"bytes={CUT}-"


def test_proxies_of_the_environment_are_used(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", case.server.url(""))
    case.server.files["http://models.example/model.onnx"] = CONTENT
    download(case.wanted, [Mirror("http://models.example/model.onnx")])
    assert case.path.read_bytes() == CONTENT


@pytest.mark.parametrize("proxy", ["gopher://127.0.0.1:1", "http://[", "socks5://127.0.0.1:1"])
def test_a_proxy_that_cannot_be_used(case: Case, monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    monkeypatch.setenv("HTTP_PROXY", proxy)
    case.fails("the proxy that the environment names cannot be used|no server")


def test_disk_full_keeps_what_came(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    written = 0

    class NearlyFull(io.FileIO):
        def write(self, data: Any) -> int:
            nonlocal written
            room = CUT - written
            if room <= 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            done = super().write(memoryview(data)[:room])
            written += done
            return done

    def open_nearly_full(self: Any) -> Any:
        self._file = NearlyFull(self._path, "ab")
        return self._write

    with monkeypatch.context() as patch:
        patch.setattr(transfer._Writer, "__enter__", open_nearly_full)
        case.fails("the disk is full: 100,000 of 256,007 bytes are kept in .*model.onnx.part; make room")
    assert case.part.read_bytes() == CONTENT[:CUT]
    case.succeeds()
    assert case.server.statuses("/model") == [200, 206]


def test_a_disk_that_takes_little_at_a_time(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(memoryview(data)[:10_000])

    def open_slow(self: Any) -> Any:
        self._file = Slow(self._path, "ab")
        return self._write

    monkeypatch.setattr(transfer._Writer, "__enter__", open_slow)
    case.succeeds()
    assert case.server.statuses("/model") == [200]


def test_too_little_room_is_said_before_anything_is_asked(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer.shutil, "disk_usage", lambda _: _Usage())
    case.fails("256,007 bytes are needed for .*, and 1,000 are free")
    assert case.server.log == []


class _Usage:
    free = 1000


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(case: Case) -> None:
    case.path.parent.chmod(0o500)
    case.fails("cannot write")
    case.path.parent.chmod(0o700)


# --- whole entries -------------------------------------------------------------------------------------------


def remote(server: FaultServer, path: str, content: bytes, name: str | None = None, **known: Any) -> zoo.RemoteFile:
    name = name or path
    server.files[f"/{name}"] = content
    facts = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), **known}
    return zoo.RemoteFile(path, name, mirrors=(Mirror(server.url(f"/{name}")),), **facts)


def tar_gz(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


VOCABULARY = b'{"a": 0}'
PB = b"input"


@pytest.fixture
def entry(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> zoo.Entry:
    """A manifest with one model, its tokenizer and its archive."""
    archive = tar_gz({"x/model.onnx": CONTENT, "x/test_data_set_0/input_0.pb": PB, "x/README": b"words"})
    made = zoo.Entry(
        name="tiny",
        title="a tiny one",
        licence="none",
        files=(remote(server, "model.onnx", CONTENT, "tiny-10.onnx"),),
        extras=(remote(server, "vocab.bpe", VOCABULARY),),
        archive=remote(server, "tiny-10.tar.gz", archive),
        convert=False,
    )
    monkeypatch.setattr(manifest, "entries", lambda: {"tiny": made})
    return made


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


WHOLE = {"model.onnx": CONTENT, "vocab.bpe": VOCABULARY}
WITH_DATA = {**WHOLE, "test_data_set_0/input_0.pb": PB}


def test_the_archive_gives_model_and_test_data(server: FaultServer, entry: zoo.Entry, tmp_path: Path) -> None:
    assert zoo.fetch("tiny", tmp_path) == tmp_path / "tiny"
    assert content_of(tmp_path / "tiny") == WITH_DATA
    asked = len(server.log)
    zoo.fetch("tiny", tmp_path)
    assert len(server.log) == asked  # all is here: nothing is asked


def test_without_the_archive_the_model_comes_alone(server: FaultServer, entry: zoo.Entry, tmp_path: Path) -> None:
    del server.files["/tiny-10.tar.gz"]
    notes: list[str] = []
    zoo.fetch("tiny", tmp_path, note=notes.append)
    assert content_of(tmp_path / "tiny") == WHOLE
    assert any("test data" in note for note in notes)


def test_an_archive_with_another_model_does_not_give_its_model(
    server: FaultServer, entry: zoo.Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tar_gz({"x/model.onnx": CONTENT[::-1], "x/test_data_set_0/input_0.pb": PB})
    changed = zoo.Entry(**{**vars(entry), "archive": remote(server, "tiny-10.tar.gz", archive)})
    monkeypatch.setattr(manifest, "entries", lambda: {"tiny": changed})
    zoo.fetch("tiny", tmp_path)
    assert content_of(tmp_path / "tiny") == WITH_DATA


def test_without_a_network_one_file_is_enough_to_know(entry: zoo.Entry, tmp_path: Path) -> None:
    with FaultServer() as gone:
        url = gone.url("")
    notes: list[str] = []
    with pytest.raises(Unreachable, match="tiny-10.tar.gz could be reached"):
        zoo.fetch("tiny", tmp_path, mirror=url, note=notes.append, sleep=lambda _: None)
    assert len(notes) == CONNECT_ATTEMPTS


def test_a_begun_model_goes_before_the_archive(server: FaultServer, entry: zoo.Entry, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "model.onnx.part").write_bytes(CONTENT[:CUT])
    zoo.fetch("tiny", tmp_path)
    assert content_of(tmp_path / "tiny") == WHOLE
    assert server.ranges("/tiny-10.onnx") == [f"bytes={CUT}-"]


def test_a_wrong_file_in_place_is_not_overwritten(server: FaultServer, entry: zoo.Entry, tmp_path: Path) -> None:
    for wrong in (b"mine", CONTENT[::-1]):
        (tmp_path / "tiny").mkdir(exist_ok=True)
        (tmp_path / "tiny" / "model.onnx").write_bytes(wrong)
        with pytest.raises(DownloadError, match="is not the published tiny-10.onnx; move it away"):
            zoo.fetch("tiny", tmp_path)
        assert content_of(tmp_path / "tiny") == {"model.onnx": wrong}
    assert server.log == []


def test_mirror(server: FaultServer, entry: zoo.Entry, tmp_path: Path) -> None:
    for name in ("tiny-10.onnx", "tiny-10.tar.gz", "vocab.bpe"):
        server.files[f"/mine/{name}"] = server.files.pop(f"/{name}")
    zoo.fetch("tiny", tmp_path, mirror=server.url("/mine/"))
    assert content_of(tmp_path / "tiny") == WITH_DATA
    assert {request.path.split("/")[1] for request in server.log} == {"mine"}


def test_offline_asks_nobody(server: FaultServer, entry: zoo.Entry, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"model.onnx is not here; it can be had from\n  http://127.0.0.1"):
        zoo.fetch("tiny", tmp_path, offline=True)
    assert not (tmp_path / "tiny").exists()
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "model.onnx").write_bytes(CONTENT)
    notes: list[str] = []
    zoo.fetch("tiny", tmp_path, offline=True, note=notes.append)
    assert any("vocab.bpe is not here" in note for note in notes)
    assert server.log == []


@pytest.mark.parametrize("given", ["anything.bin", "data.tar.gz", "folder"])
def test_from_a_file_got_by_other_means(server: FaultServer, entry: zoo.Entry, tmp_path: Path, given: str) -> None:
    source = tmp_path / given
    expected = WHOLE
    if given == "folder":
        source.mkdir()
        (source / "a").write_bytes(CONTENT)
        (source / "b").write_bytes(VOCABULARY)
    elif given == "data.tar.gz":
        assert entry.archive is not None
        source.write_bytes(bytes(server.files[f"/{entry.archive.name}"]))  # type: ignore[arg-type]
        expected = {"model.onnx": CONTENT, "test_data_set_0/input_0.pb": PB}
    else:
        source.write_bytes(CONTENT)
        expected = {"model.onnx": CONTENT}
    zoo.fetch("tiny", tmp_path / "weights", source=source)
    assert content_of(tmp_path / "weights" / "tiny") == expected
    assert source.exists()
    assert server.log == []


def test_test_data_can_be_taken_later(server: FaultServer, entry: zoo.Entry, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(CONTENT)
    zoo.fetch("tiny", tmp_path / "weights", source=tmp_path / "model.onnx")
    (tmp_path / "a.tar.gz").write_bytes(bytes(server.files["/tiny-10.tar.gz"]))  # type: ignore[arg-type]
    zoo.fetch("tiny", tmp_path / "weights", source=tmp_path / "a.tar.gz")
    assert content_of(tmp_path / "weights" / "tiny") == {
        "model.onnx": CONTENT,
        "test_data_set_0/input_0.pb": PB,
    }


def test_a_password_in_a_url_is_neither_printed_nor_stored(case: Case) -> None:
    case.server.faults["/model"] = [Fault(cut=CUT), Fault(status=404)]
    url = case.server.url("/model").replace("http://", "http://user:secret@")
    with pytest.raises(DownloadError) as error:
        download(case.wanted, [Mirror(url)], case.notes.append, sleep=case.slept.append)
    left = "".join(path.read_text("latin1") for path in case.path.parent.iterdir())
    assert "secret" not in f"{error.value}{case.notes}{left}"
    assert "127.0.0.1" in str(error.value)


def test_from_another_file_is_refused(server: FaultServer, entry: zoo.Entry, tmp_path: Path) -> None:
    source = tmp_path / "model.onnx"
    source.write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(DownloadError, match="none of these is a file that tiny lacks") as error:
        zoo.fetch("tiny", tmp_path / "weights", source=source)
    assert SHA256 in str(error.value)
    assert not (tmp_path / "weights" / "tiny").exists()
    with pytest.raises(DownloadError, match="no such file"):
        zoo.fetch("tiny", tmp_path / "weights", source=tmp_path / "nothing")


def test_from_a_file_without_published_hash_goes_by_its_name_and_warns(
    server: FaultServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = remote(server, "model.safetensors", CONTENT, "big/model.safetensors", bytes=None, sha256=None)
    monkeypatch.setattr(manifest, "entries", lambda: {"big": zoo.Entry("big", "", "", (file,), (), None, False)})
    for name, taken in (("other.bin", False), ("model.safetensors", True)):
        (tmp_path / name).write_bytes(CONTENT)
        notes: list[str] = []
        if taken:
            zoo.fetch("big", tmp_path / "weights", source=tmp_path / name, note=notes.append)
            assert content_of(tmp_path / "weights" / "big") == {"model.safetensors": CONTENT}
            assert "warning: no hash" in notes[0]
        else:
            with pytest.raises(DownloadError, match="none of these"):
                zoo.fetch("big", tmp_path / "weights", source=tmp_path / name)


def test_an_unknown_name_says_what_is_known() -> None:
    with pytest.raises(DownloadError, match="gpt2-10, gpt2-lm-head-10"):
        zoo.fetch("gpt-3")
    with pytest.raises(ModelFileError, match="no such file or folder"):
        zoo.find("gpt-3")


# --- several processes, and the ends that a process may come to ----------------------------------------------

PROGRAM = """
import sys, typer
from gpt2np import zoo
from gpt2np.zoo import manifest
from gpt2np.zoo.manifest import Mirror
from gpt2np.commands.fetch import fetch
url, size, sha256, limit = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
file = zoo.RemoteFile("model.onnx", "model.onnx", size, sha256, (Mirror(url),))
manifest.entries = lambda: {"tiny": zoo.Entry("tiny", "a tiny one", "none", (file,), (), None, False)}
if limit:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
app = typer.Typer(pretty_exceptions_enable=False)
app.command()(fetch)
app(sys.argv[5:])
"""


def start(server: FaultServer, to: Path, limit: int = 0) -> subprocess.Popen[str]:
    arguments = [server.url("/model"), str(len(CONTENT)), SHA256, str(limit), "tiny", "--to", str(to)]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(path: Path, size: int) -> None:
    for _ in range(3000):
        if path.exists() and path.stat().st_size >= size:
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} did not grow")


def test_two_processes_at_once_fetch_once(server: FaultServer, tmp_path: Path) -> None:
    server.faults["/model"] = [Fault(slow=0.1)]
    processes = [start(server, tmp_path) for _ in range(3)]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], errors
    assert server.statuses("/model") == [200]
    assert content_of(tmp_path / "tiny") == {"model.onnx": CONTENT}


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_download_is_resumed(server: FaultServer, tmp_path: Path, end: signal.Signals) -> None:
    server.faults["/model"] = [Fault(slow=0.05, piece=2048)]
    process = start(server, tmp_path)
    wait_for(tmp_path / "tiny" / "model.onnx.part", 2048)
    process.send_signal(end)
    error = process.communicate(timeout=120)[1]
    if end == signal.SIGINT:
        assert process.returncode == 130
        assert "error: stopped; what has come so far is kept" in error
        assert "Traceback" not in error
    kept = (tmp_path / "tiny" / "model.onnx.part").stat().st_size
    assert not (tmp_path / "tiny" / "model.onnx").exists()
    process = start(server, tmp_path)
    assert (process.communicate(timeout=120)[1], process.returncode) == ("", 0)
    assert server.ranges("/model") == [None, f"bytes={kept}-"]
    assert content_of(tmp_path / "tiny") == {"model.onnx": CONTENT}


@pytest.mark.skipif(os.name != "posix", reason="POSIX resource limits")
def test_a_disk_that_is_really_full(server: FaultServer, tmp_path: Path) -> None:
    process = start(server, tmp_path, limit=150_000)
    error = process.communicate(timeout=120)[1]
    assert process.returncode != 0
    assert "the disk is full: 150,000 of 256,007 bytes are kept" in error
    process = start(server, tmp_path)
    assert (process.communicate(timeout=120)[1], process.returncode) == ("", 0)
    assert server.ranges("/model") == [None, "bytes=150000-"]


@pytest.mark.slow
def test_a_full_size_file_takes_no_memory(server: FaultServer, tmp_path: Path) -> None:
    size = 548_227_537
    with (tmp_path / "big").open("wb") as file:
        file.truncate(size)
    with (tmp_path / "big").open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    server.files["/big"] = tmp_path / "big"
    program = (
        "import resource, sys; from pathlib import Path; from gpt2np.zoo.transfer import *; import httpx2\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "download(Wanted(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]), [Mirror(sys.argv[4])])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    arguments = [str(tmp_path / "copy"), str(size), sha256, server.url("/big")]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 32_000  # KiB on Linux
    assert (tmp_path / "copy").stat().st_size == size


# --- the commands --------------------------------------------------------------------------------------------

APP = typer.Typer()
APP.command("fetch")(fetch_command)
APP.command("list")(list_models)


def test_the_fetch_command(server: FaultServer, entry: zoo.Entry, tmp_path: Path) -> None:
    result = CliRunner().invoke(APP, ["fetch", "tiny", "--to", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "model.onnx" in result.output
    assert "256,007" in result.output
    assert "SHA-256 is the published one" in result.output
    assert content_of(tmp_path / "tiny") == WITH_DATA


def test_the_list_command(server: FaultServer, entry: zoo.Entry, tmp_path: Path) -> None:
    def listed() -> str:
        result = CliRunner().invoke(APP, ["list", "--in", str(tmp_path)])
        assert result.exit_code == 0, result.output
        return result.output

    assert "a tiny one" in listed()
    assert "gpt2np fetch NAME" in listed()
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "model.onnx.part").write_bytes(b"half")
    assert "unfinished" in listed()
    (folder / "model.onnx").write_bytes(CONTENT)
    assert "verified: SHA-256" in listed()
    (folder / "model.onnx").write_bytes(CONTENT[:-1] + b"?")
    assert "NOT the published file" in listed()
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "model.onnx").write_bytes(b"")
    assert "own" in listed()


# --- the manifest --------------------------------------------------------------------------------------------


def test_the_manifest_is_complete() -> None:
    entries = manifest.entries()
    assert set(entries) == {
        *("gpt2-10", "gpt2-lm-head-10", "gpt2-lm-head-bs-12"),
        *("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "tokenizer"),
    }
    for entry in entries.values():
        assert entry.title
        assert entry.licence
        archive = (entry.archive,) if entry.archive else ()
        for file in (*entry.files, *entry.extras, *archive):
            assert file.mirrors
            assert all(mirror.url.startswith("https://") for mirror in file.mirrors)
            assert file.sha256 is None or len(bytes.fromhex(file.sha256)) == 32
            assert "/" not in file.path
        if entry.convert:
            assert entry.files[0].path == "model.safetensors"
            assert entry.archive is None
    zoo_model = entries["gpt2-10"].files[0]
    assert (zoo_model.path, zoo_model.bytes) == ("model.onnx", 548_227_537)


def test_published_names_are_unique() -> None:
    """`--mirror URL` looks for URL/name."""
    files = {file for entry in manifest.entries().values() for file in (*entry.files, *entry.extras)}
    assert len({file.name for file in files}) == len(files)


def test_a_name_finds_what_was_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "default_folder", lambda: tmp_path)
    with pytest.raises(ModelFileError, match="gpt2np fetch gpt2-10"):
        zoo.find("gpt2-10")
    (tmp_path / "gpt2-10").mkdir()
    (tmp_path / "gpt2-10" / "model.onnx").write_bytes(b"")
    assert zoo.find("gpt2-10") == tmp_path / "gpt2-10"
    assert zoo.find(tmp_path) == tmp_path
