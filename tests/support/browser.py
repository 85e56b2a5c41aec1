"""A page as Chromium sees it: opened from its file, without network, with what it said on its console."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian's package: chromium)")


def visit(page: Path, script: str, width: int = 1280) -> Any:
    """Open a page, wait until its pictures are drawn, and return the value of a JavaScript function body.

    Fails if the page writes a warning or an error to the console, or if the script does not end.
    """
    assert CHROMIUM is not None
    probe = f"""<script>
window.gpt2npDrawn.then(async () => {{ {script} }}).then(value => {{
  const place = document.createElement("pre");
  place.id = "found";
  place.textContent = JSON.stringify(value);
  document.body.append(place);
}});
</script></body>"""
    copy = page.with_name(f"{page.stem}.visited.html")
    before, after = page.read_text("utf-8").rsplit("</body>", 1)
    copy.write_text(before + probe + after, "utf-8")
    flags = "--headless=new --no-sandbox --disable-gpu --hide-scrollbars --host-resolver-rules=MAP\t*\t~NOTFOUND"
    flags += f" --window-size={width},900 --enable-logging=stderr --virtual-time-budget=30000 --dump-dom"
    command = [CHROMIUM, *(flag.replace("\t", " ") for flag in flags.split(" ")), copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    said = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    assert not said, said
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(unescape(found[1]))
