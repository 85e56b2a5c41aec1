"""Fetch a file over HTTP so that it is whole and right, or not there.

Bytes are written to `NAME.part`, which later runs, and other mirrors, go on from; what is known about its
origin lies in `NAME.part.json`. Only a file of the right size and SHA-256 is moved to its final name.
HTTP itself (redirects, proxies from the environment, TLS) is httpx's; this adds resuming, retries and checks.
huggingface_hub's download (2.4, itself on httpx2) was tried in its place: it sends no If-Range, so that halves of two
versions can be joined, tries 5xx answers only once, loses up to 10 MB at a cut, and knows no mirrors.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DownloadError
from .manifest import Mirror, file_hash

if TYPE_CHECKING:
    import httpx2 as httpx

ATTEMPTS = 5  # in a row without a single new byte, before the next mirror is tried
CONNECT_ATTEMPTS = 2  # the same where no connection comes about at all
LONGEST_BACK_OFF = 60.0  # seconds
LONGEST_RETRY_AFTER = 300.0  # seconds; a server that asks for more is left for the next mirror
TIMEOUT = 30.0  # seconds without a byte
MD5_TEXT = 4096  # bytes of a text with an MD5 in it that are looked at
TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Wanted:
    """Where a file goes and what it must be; None where that is not known."""

    path: Path
    bytes: int | None
    sha256: str | None


class Unreachable(DownloadError):
    """No server could be connected to: there is no network, or a proxy is missing."""


class _GiveUp(Exception):
    """This mirror will not do."""


class _NoConnection(_GiveUp):
    """It cannot be reached at all."""


class _Corrupt(Exception):
    """The file is whole, but is not the one that was asked for."""


class _Transient(Exception):
    """Worth another attempt: after `wait` seconds, or after a growing back-off."""

    def __init__(self, message: str, wait: float | None = None, attempts: int = ATTEMPTS) -> None:
        super().__init__(message)
        self.wait = wait
        self.attempts = attempts


def nothing(*_: object) -> None:
    """The default `note` and `advance`."""


def download(
    wanted: Wanted,
    mirrors: Sequence[Mirror],
    note: Callable[[str], None] = nothing,
    advance: Callable[[int], None] = nothing,
    sleep: Callable[[float], None] = time.sleep,
    timeout: float = TIMEOUT,
) -> None:
    """Bring `wanted` to its place from the first mirror that has it.

    note: told in words about retries and about what could not be verified. advance: told how many bytes have
    come (or, with a negative number, have been thrown away), those of an earlier run included.

    Raises
    ------
    Unreachable
        If no mirror can be connected to.
    DownloadError
        If no mirror has the file, or the disk is full. In all cases, what has come so far is kept.
    """
    import httpx2 as httpx

    from .. import __version__

    part = _Part(wanted, advance)
    try:
        wanted.path.parent.mkdir(parents=True, exist_ok=True)
        part.check_room(wanted.bytes)
        advance(part.length)
        headers = {"User-Agent": f"gpt2np/{__version__}", "Accept-Encoding": "identity"}
        try:
            opened = httpx.Client(follow_redirects=True, timeout=timeout, headers=headers)
        except (ValueError, ImportError, httpx.InvalidURL) as error:  # ImportError: SOCKS needs a package
            raise DownloadError(f"the proxy that the environment names cannot be used: {error}") from error
        with opened as client:
            failures: list[tuple[str, _GiveUp]] = []
            for mirror in mirrors:
                try:
                    _from_mirror(client, mirror, part, note, sleep)
                    part.finish()
                    return
                except _GiveUp as failure:
                    failures.append((mirror.shown, failure))
                    note(f"{mirror.shown}: {failure}")
    except OSError as error:
        if error.errno in DISK_FULL:
            raise DownloadError(f"the disk is full: {part.kept()}; make room and run the same command again") from error
        raise DownloadError(f"cannot write {part.path}: {error.strerror}") from error
    if failures and all(isinstance(failure, _NoConnection) for _, failure in failures):
        raise Unreachable(
            f"no server of {wanted.path.name} could be reached, so there may be no network, or a proxy is needed "
            f"(HTTPS_PROXY); {part.kept()}; the same command goes on from there"
        )
    reasons = [f"{url}: {failure}" for url, failure in failures] or ["no mirror is known"]
    raise DownloadError(f"could not fetch {wanted.path.name}; {part.kept()}\n  " + "\n  ".join(reasons))


def _from_mirror(
    client: httpx.Client, mirror: Mirror, part: _Part, note: Callable[[str], None], sleep: Callable[[float], None]
) -> None:
    """Complete and check the part file from one mirror, with retries; raises _GiveUp."""
    failures, longest, restarted = 0, part.length, False
    resumed = False  # whether bytes of several requests were joined
    while True:
        try:
            resumed = resumed or part.length > 0
            _transfer(client, mirror, part)
            _check(client, mirror, part, note)
            return
        except _Corrupt as corrupt:
            part.discard()
            if restarted or not resumed:
                raise _GiveUp(str(corrupt)) from corrupt
            note(f"{corrupt}; starting again from nothing")
            restarted = True
        except _Transient as failure:
            if part.length > longest:
                longest, failures = part.length, 0
            failures += 1
            if failures >= failure.attempts:
                raise (_NoConnection if failure.attempts == CONNECT_ATTEMPTS else _GiveUp)(str(failure)) from failure
            wait = min(2.0 ** (failures - 1), LONGEST_BACK_OFF) if failure.wait is None else failure.wait
            note(f"{failure}; {part.kept()}; trying again in {wait:.0f} s")
            sleep(wait)


def _transfer(client: httpx.Client, mirror: Mirror, part: _Part) -> None:
    """One request: append what the part file lacks; returns when the server has sent all of it."""
    import httpx2 as httpx

    size, have = part.wanted.bytes, part.length
    if size is not None and have == size:
        return
    headers = {}
    if have:
        headers["Range"] = f"bytes={have}-"
        if validator := part.validator_of(mirror.shown):
            headers["If-Range"] = validator
        elif part.wanted.sha256 is None:  # nothing would tell that the two halves belong together
            part.discard()
            have, headers = 0, {}
    try:
        with client.stream("GET", mirror.url, headers=headers) as response:
            _body(response, mirror.shown, part, have)
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
        raise _Transient(f"no connection: {error}", attempts=CONNECT_ATTEMPTS) from error
    except (httpx.UnsupportedProtocol, httpx.TooManyRedirects, httpx.InvalidURL) as error:
        raise _GiveUp(str(error)) from error
    except httpx.HTTPError as error:
        raise _Transient(f"the connection broke: {error or type(error).__name__}") from error
    if size is not None and part.length < size:
        raise _Transient("the server ended the file too early")


def _body(response: httpx.Response, url: str, part: _Part, have: int) -> None:
    """Check one response's status and headers, then write its body to the part file."""
    size, status = part.wanted.bytes, response.status_code
    if status in TRANSIENT_STATUS:
        raise _Transient(f"HTTP {status}", _retry_after(response))
    if status == 416:  # the part is longer than the file
        part.discard()
        raise _Transient("HTTP 416, the part file does not fit", wait=0)
    if status not in (200, 206):
        raise _GiveUp(f"HTTP {status}")

    encoded = response.headers.get("Content-Encoding", "identity") != "identity"
    length = None if encoded else _number(response.headers.get("Content-Length"))
    if status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        total = _number(match[2]) if match else None
        if match is None or int(match[1]) != have or encoded:
            part.discard()
            raise _Transient("the server sent another range than the one asked for", wait=0)
        # A server that does not know If-Range gives the rest of a file that has changed meanwhile.
        first, now = part.validator_of(url), _validator(response)
        if first != now and (part.wanted.sha256 is None or (first and now)):
            part.discard()
            raise _Transient("the file is not surely the same as when the download began", wait=0)
    else:
        have, total = 0, length
    if size is not None and total is not None and total != size:
        hint = " (a Git LFS pointer or an error page?)" if total < 4096 else ""
        raise _GiveUp(f"the server offers {total:,} bytes{hint}, the published file has {size:,}")
    if size is None and part.wanted.sha256 is None and total is None:
        raise _GiveUp("the server does not say how long the file is, so that nothing would tell whether it is whole")

    part.check_room(total)
    body = response.iter_bytes() if encoded else response.iter_raw()
    with part.open(have, url, None if encoded else _validator(response)) as write:
        for chunk in body:
            have += len(chunk)
            if size is not None and have > size:
                part.discard()
                raise _GiveUp(f"the server sends more than the {size:,} bytes of the published file")
            write(chunk)
    if total is not None and have < total:
        raise _Transient("the server ended the file too early")


def _check(client: httpx.Client, mirror: Mirror, part: _Part, note: Callable[[str], None]) -> None:
    """Compare the complete part file with its published SHA-256, or else MD5, or else warn."""
    wanted, md5 = part.wanted, _published_md5(client, mirror)
    found_md5 = file_hash(part.path, "md5") if md5 else None
    if wanted.sha256 is not None:
        found = file_hash(part.path)
        if found != wanted.sha256:
            raise _Corrupt(f"the SHA-256 of what came is {found}, the published file's is {wanted.sha256}")
        if found_md5 != md5:
            note(f"the SHA-256 is right, though the MD5 at {mirror.md5_url} is that of another file")
    elif found_md5 != md5:
        raise _Corrupt(f"the MD5 of what came is {found_md5}, the published one is {md5}")
    elif md5 is None:
        known = "only its size" if wanted.bytes is not None else "nothing"
        note(f"warning: no hash of {wanted.path.name} is known; {known} could be checked")


def _published_md5(client: httpx.Client, mirror: Mirror) -> str | None:
    import httpx2 as httpx

    if mirror.md5_url is None:
        return None
    text, began = b"", time.monotonic()
    try:
        with client.stream("GET", mirror.md5_url) as response:
            if response.status_code != 200:
                return None
            for chunk in response.iter_raw():
                text += chunk[:MD5_TEXT]
                if len(text) >= MD5_TEXT or time.monotonic() - began > TIMEOUT:
                    break
    except httpx.HTTPError:
        return None
    found = re.search(rb"\b[0-9a-fA-F]{32}\b", text[:MD5_TEXT])
    return found[0].decode().lower() if found else None


class _Part:
    """The unfinished file beside the wanted one, and where its bytes came from."""

    def __init__(self, wanted: Wanted, advance: Callable[[int], None]) -> None:
        self.wanted = wanted
        self.path = wanted.path.with_name(wanted.path.name + ".part")
        self._origin = wanted.path.with_name(wanted.path.name + ".part.json")
        self._advance = advance

    @property
    def length(self) -> int:
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0

    def kept(self) -> str:
        """What the user should know about the state that is left behind."""
        if not self.length:
            return "nothing was kept"
        of = "" if self.wanted.bytes is None else f" of {self.wanted.bytes:,}"
        return f"{self.length:,}{of} bytes are kept in {self.path}"

    def check_room(self, total: int | None) -> None:
        free = shutil.disk_usage(self.path.parent).free
        if total is not None and free < (missing := total - self.length):
            raise DownloadError(
                f"{missing:,} bytes are needed for {self.wanted.path}, and {free:,} are free there; {self.kept()}"
            )

    def validator_of(self, url: str) -> str | None:
        """The ETag or date that `url` gave for the bytes that are here, if they came from there."""
        try:
            origin = json.loads(self._origin.read_text())
        except (FileNotFoundError, ValueError):
            return None
        validator = origin.get("validator") if isinstance(origin, dict) and origin.get("url") == url else None
        return validator if isinstance(validator, str) else None

    def open(self, have: int, url: str, validator: str | None) -> _Writer:
        """Open for writing behind the first `have` bytes, which is all of them or none."""
        if not have:
            self.discard()
            self._origin.write_text(json.dumps({"url": url, "validator": validator}))
        return _Writer(self.path, self._advance)

    def discard(self) -> None:
        self._advance(-self.length)
        self.path.unlink(missing_ok=True)
        self._origin.unlink(missing_ok=True)

    def finish(self) -> None:
        """Move the checked file to its final name."""
        os.replace(self.path, self.wanted.path)
        self._origin.unlink(missing_ok=True)


class _Writer:
    """Appends to a file without a buffer of its own: what `write` returned from is in the file, come what may."""

    def __init__(self, path: Path, advance: Callable[[int], None]) -> None:
        self._path, self._advance = path, advance

    def __enter__(self) -> Callable[[bytes], None]:
        self._file = self._path.open("ab", buffering=0)
        return self._write

    def __exit__(self, *_: object) -> None:
        with self._file:
            os.fsync(self._file.fileno())

    def _write(self, chunk: bytes) -> None:
        rest = memoryview(chunk)
        while rest:  # a nearly full disk takes a part of it
            written = self._file.write(rest)
            self._advance(written)
            rest = rest[written:]


def _validator(response: httpx.Response) -> str | None:
    """What If-Range may carry: a strong ETag, else the date of the last change (RFC 9110, section 13.1.5)."""
    etag: str | None = response.headers.get("ETag")
    if etag and not etag.startswith("W/"):
        return etag
    date: str | None = response.headers.get("Last-Modified")
    return date


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or as a date."""
    text = response.headers.get("Retry-After", "")
    seconds = float(number) if (number := _number(text)) is not None else None
    if seconds is None and text:
        try:
            seconds = max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
        except (ValueError, TypeError):
            return None
    if seconds is not None and seconds > LONGEST_RETRY_AFTER:
        raise _GiveUp(f"HTTP {response.status_code}, to be tried again in {seconds:,.0f} s")
    return seconds
