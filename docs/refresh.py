"""Run the commands whose output README.md shows, and put what they print in its place.

    python docs/refresh.py            rewrite README.md
    python docs/refresh.py --check    only run them; exit 1 if one ends with another exit code than 0

A shown output is a fenced block behind a comment that names its command: `<!-- output of: gpt2np parity -->`.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
SHOWN = re.compile(r"(<!-- output of: (?P<command>gpt2np .+?) -->\n```(?:text)?\n)(?P<output>.*?)(?=```\n)", re.DOTALL)


def run(command: str) -> str:
    """What a gpt2np command prints on standard output, as in a pipe; it has to succeed."""
    words = [sys.executable, "-m", *shlex.split(command)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    output = done.stdout.replace(f"{ROOT}/", "")  # paths as someone in a clone of their own would give them
    return "\n".join(line.rstrip() for line in output.strip("\n").splitlines()) + "\n"


def main() -> None:
    text = README.read_text(encoding="utf-8")
    commands = [match["command"] for match in SHOWN.finditer(text)]
    outputs = {command: run(command) for command in dict.fromkeys(commands)}
    print(f"{len(outputs)} commands ran: {', '.join(outputs)}")
    if "--check" not in sys.argv[1:]:
        README.write_text(SHOWN.sub(lambda m: m[1] + outputs[m["command"]], text), encoding="utf-8")


if __name__ == "__main__":
    main()
