"""A page as Chromium sees it: opened from its file, without network; driven by the DevTools protocol over a pipe."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian's package: chromium)")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe",
         "--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND")  # fmt: skip

# The protocol is spoken on file descriptors 3 and 4.
LAUNCH = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]]
for fd, number in zip(ends, (3, 4)):
    os.dup2(fd, number)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Page:
    """One tab. `said` is what came on its console, `asked` the addresses that it tried to fetch."""

    def __init__(self, to: int, back: int) -> None:
        self.to, self.back = to, back
        self.held, self.count, self.session = b"", 0, ""
        self.said: list[str] = []
        self.asked: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Page", "Network"):
            self.call(f"{domain}.enable")
        self.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol; events that come meanwhile are noted."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        os.write(self.to, json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode() + b"\0")
        while True:
            while b"\0" not in self.held:
                got = os.read(self.back, 1 << 20)
                assert got, "Chromium has gone"
                self.held += got
            text, _, self.held = self.held.partition(b"\0")
            answer = json.loads(text)
            if answer.get("id") == self.count:
                assert "error" not in answer, (method, answer)
                return dict(answer["result"])
            self._note(answer.get("method"), answer.get("params", {}))

    def _note(self, event: str | None, told: dict[str, Any]) -> None:
        if event == "Runtime.exceptionThrown":
            self.said.append(json.dumps(told["exceptionDetails"])[:2000])
        elif event == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.said.append(json.dumps(told["args"])[:2000])
        elif event == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.said.append(told["entry"]["text"])
        elif event == "Network.requestWillBeSent":
            self.asked.append(told["request"]["url"])

    def open(self, path: Path, width: int = 1280, height: int = 900, dark: bool = False) -> Page:
        """Open a file, and wait until its pictures are drawn."""
        self.said, self.asked = [], []
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.look(dark)
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.run("""while (document.readyState !== "complete") await new Promise(done => setTimeout(done, 20));
                    await window.gpt2npDrawn;""")  # fmt: skip
        return self

    def look(self, dark: bool) -> None:
        """The colour scheme that the reader prefers."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media="screen", features=[scheme])

    def run(self, script: str) -> Any:
        """The value of a JavaScript function body, which may await; an error on the console fails."""
        while True:
            done = self.call(
                "Runtime.evaluate", expression=f"(async () => {{ {script} }})()", awaitPromise=True, returnByValue=True
            )
            if "exceptionDetails" not in done or "navigat" not in json.dumps(done["exceptionDetails"]):
                break
        assert "exceptionDetails" not in done, done
        assert not self.said, self.said
        return done["result"].get("value")

    def pictures(self, more: str, rows: str = "figure.rows") -> dict[str, list[Any]]:
        """Each picture by its id: "yes" if it was drawn, whether its table holds its rows, and what `more` gives.

        `more` and `rows` are JavaScript of `figure`; the tables are opened.
        """
        script = f"""return await Promise.all(Array.from(document.querySelectorAll("figure.picture"), async figure => {{
            figure.querySelector("figure > details").open = true;
            await new Promise(done => setTimeout(done, 50));
            const cells = Array.from(figure.querySelectorAll("tbody tr"), r => Array.from(r.cells, c => c.textContent));
            const numbers = ({rows}).map(row => Object.values(row).map(String));
            return [figure.id, figure.dataset.drawn, JSON.stringify(cells) === JSON.stringify(numbers), ...({more})];
        }}));"""
        return {name: rest for name, *rest in self.run(script)}

    def click(self, selector: str) -> None:
        """A real click on the middle of what a selector finds."""
        box = self.run(f"""const e = document.querySelector({json.dumps(selector)});
            e.scrollIntoView({{block: "center"}}); const b = e.getBoundingClientRect();
            return [b.x + b.width / 2, b.y + b.height / 2];""")
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)
        self.run("await new Promise(done => setTimeout(done, 150));")

    def press(self, key: str, code: int) -> None:
        """A key of the keyboard."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def picture(self, path: Path, whole: bool = False) -> None:
        """A screenshot of what the window shows, or of the whole page."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]))

    def printed(self, path: Path) -> None:
        """The page as PDF."""
        self.call("Emulation.setEmulatedMedia", media="")
        path.write_bytes(base64.b64decode(self.call("Page.printToPDF", printBackground=False)["data"]))


@contextmanager
def chromium() -> Iterator[Page]:
    """A tab of a Chromium of its own, which ends with it."""
    assert CHROMIUM is not None
    (theirs_in, to), (back, theirs_out) = os.pipe(), os.pipe()
    command = [sys.executable, "-c", LAUNCH, str(theirs_in), str(theirs_out), CHROMIUM, *FLAGS, "about:blank"]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, pass_fds=(theirs_in, theirs_out), stdout=quiet, stderr=quiet) as process:
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            yield Page(to, back)
        finally:
            os.close(to)
            os.close(back)
            process.terminate()
            process.wait(20)
