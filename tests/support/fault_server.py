"""A local HTTP server that behaves like the real ones on their bad days.

    with FaultServer() as server:
        server.files["/model.onnx"] = content              # bytes, or the path of a file
        server.faults["/model.onnx"] = [Fault(cut=1000)]   # one for each request in turn, then none
        url = server.url("/model.onnx")

Without a fault it answers as a good server does: Range, If-Range, ETag, Last-Modified, Content-Length.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

PIECE = 1 << 16


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one response; every field is independent of the others."""

    status: int | None = None  # an error without a body
    headers: dict[str, str] = field(default_factory=dict)  # added to the response
    redirect: str | None = None  # 302 to here
    cut: int | None = None  # the connection is closed after so many bytes of the body
    stall: int | None = None  # nothing more is sent after so many bytes of the body
    slow: float = 0.0  # seconds before each piece of the body
    piece: int = PIECE
    flip: int | None = None  # the byte at this position of the file comes out wrong
    offer: bytes | None = None  # quite another body, with its own Content-Length
    ignore_range: bool = False  # 200 and the whole file
    ignore_if_range: bool = False  # 206, whether the file is still the same or not
    shift_range: int = 0  # 206 from somewhere else
    extra: bytes = b""  # more than the file has
    no_length: bool = False  # no Content-Length; the end of the connection ends the body
    no_validator: bool = False  # neither ETag nor Last-Modified
    compress: bool = False  # Content-Encoding: gzip, whatever the client accepts


@dataclass(frozen=True)
class Request:
    path: str
    range: str | None
    if_range: str | None
    accept_encoding: str | None
    status: int


class FaultServer:
    """Serves `files` on 127.0.0.1, with `faults`; `log` has what was asked and answered."""

    def __init__(self) -> None:
        self.files: dict[str, bytes | Path] = {}
        self.faults: dict[str, list[Fault]] = {}
        self.log: list[Request] = []
        self._closing = threading.Event()
        self._http = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": self}))
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}{path}"

    def statuses(self, path: str) -> list[int]:
        return [request.status for request in self.log if request.path == path]

    def ranges(self, path: str) -> list[str | None]:
        return [request.range for request in self.log if request.path == path]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = True
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is part of the game."""


def _etag(content: bytes | Path) -> str:
    if isinstance(content, Path):
        content = str((content.stat().st_size, content.stat().st_mtime_ns)).encode()
    return f'"{hashlib.sha256(content).hexdigest()[:16]}"'


def _spoilt(content: bytes, start: int, fault: Fault) -> bytes:
    """A file from byte `start` on, as the fault has it."""
    body = bytearray(content[start:])
    if fault.flip is not None and fault.flip >= start:
        body[fault.flip - start] ^= 0xFF
    body += fault.extra
    return gzip.compress(bytes(body)) if fault.compress else bytes(body)


class _Handler(BaseHTTPRequestHandler):
    """Answers one connection; a subclass for each server says whose files it serves."""

    owner: FaultServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        queue = self.owner.faults.get(self.path, [])
        fault = queue.pop(0) if queue else Fault()
        content = self.owner.files.get(self.path)
        if fault.redirect is not None:
            self.begin(302, {"Location": fault.redirect, "Content-Length": "0"})
        elif fault.status is not None or content is None:
            status = 404 if fault.status is None else fault.status
            self.begin(status, {"Content-Length": "0", **fault.headers})
        elif fault.offer is not None:
            self.begin(200, {"Content-Length": str(len(fault.offer)), **fault.headers})
            self.wfile.write(fault.offer)
        else:
            self.serve(content, fault)

    def begin(self, status: int, headers: dict[str, str]) -> None:
        asked = (self.headers.get(name) for name in ("Range", "If-Range", "Accept-Encoding"))
        self.owner.log.append(Request(self.path, *asked, status))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def serve(self, content: bytes | Path, fault: Fault) -> None:
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        headers = {"Accept-Ranges": "bytes"}
        if not fault.no_validator:
            headers["ETag"] = _etag(content)
        start, status = self.first_byte(fault, headers.get("ETag")), 200
        if start is None:
            start = 0
        elif start >= size:
            self.begin(416, {"Content-Range": f"bytes */{size}", "Content-Length": "0"})
            return
        else:
            status = 206
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        body = b""
        if isinstance(content, bytes):
            body = _spoilt(content, start, fault)
            if fault.compress:
                headers["Content-Encoding"] = "gzip"
        if fault.no_length or fault.extra:
            headers["Connection"] = "close"
            self.close_connection = True
        else:
            headers["Content-Length"] = str(len(body) if isinstance(content, bytes) else size - start)
        self.begin(status, {**headers, **fault.headers})
        if isinstance(content, bytes):
            self.send(memoryview(body), fault)
        else:
            with content.open("rb") as file:
                file.seek(start)
                self.connection.sendfile(file)

    def first_byte(self, fault: Fault, etag: str | None) -> int | None:
        """Where the part that was asked for begins; None: the whole file is sent."""
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        unchanged = self.headers.get("If-Range", etag) == etag
        if wanted and (unchanged or fault.ignore_if_range) and not fault.ignore_range:
            return int(wanted[1]) + fault.shift_range
        return None

    def send(self, body: memoryview, fault: Fault) -> None:
        end = min(x for x in (fault.cut, fault.stall, len(body)) if x is not None)
        for i in range(0, end, fault.piece):
            if fault.slow:
                self.owner._closing.wait(fault.slow)
            self.wfile.write(body[i : min(i + fault.piece, end)])
        if fault.stall is not None:
            self.owner._closing.wait(10)
        if fault.stall is not None or fault.cut is not None:
            self.close_connection = True
