"""Make what the documents show: run the commands whose output README.md has, and print the reference pages.

    python docs/refresh.py            rewrite README.md, docs/reference.md and docs/taps.md
    python docs/refresh.py --check    only run the commands; exit 1 if one ends with another exit code than 0

A shown output is a fenced block behind a comment that names its command: `<!-- output of: gpt2np parity -->`.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

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


def reference_page(outputs: dict[str, Any]) -> str:
    """docs/reference.md: exit codes, mistakes, operators and the JSON of commands, each from where it is defined."""
    from gpt2np.cli import EXIT_CODES
    from gpt2np.onnx.evaluate.operators import OPERATORS
    from gpt2np.onnx.normalise import fused, quantised

    def listed(names: Any) -> str:
        return ", ".join(f"`{name}`" for name in sorted(names)) + "\n"

    parts = [
        "# Reference\n\nMade by `python docs/refresh.py` from the code; [taps.md](taps.md) has the names of taps.\n",
        "\n## Exit codes\n\n| code | meaning |\n|---|---|\n",
        *(f"| {code} | {meaning} |\n" for code, meaning in EXIT_CODES.items()),
        "\n## Mistakes\n\nWhat `gpt2np diff` and `parity` try at the first divergence; the names are stable.\n\n",
        listed(mistakes()),
        "\n## Operators\n\nA graph may hold these, and what an optimiser or a quantiser makes of them:\n\n",
        listed(OPERATORS),
        "\nfused, rewritten as the plain ones: ",
        listed(fused.RULES),
        "\nquantised, rewritten with the weights that they stand for: ",
        listed(quantised.RULES),
        "\n## JSON\n\nFields of the embedded model's output; `[...]` is a list of such values, `{NAME}` any name.\n",
        *(f"\n`gpt2np {name} --json`\n\n```\n{tree(value)}```\n" for name, value in outputs.items()),
    ]
    return "".join(parts)


def mistakes() -> set[str]:
    """The causes that are named: the first argument of every Guess in parity/explain/, or a variable `cause`."""
    found = set()
    for path in (ROOT / "gpt2np" / "parity" / "explain").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Guess" and node.args:
                found |= texts(node.args[0])
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "cause":
                found |= texts(node.value)
    return found


def texts(value: ast.expr) -> set[str]:
    """The strings that an expression may be: a constant, or one of two."""
    if isinstance(value, ast.IfExp):
        return texts(value.body) | texts(value.orelse)
    return {value.value} if isinstance(value, ast.Constant) and isinstance(value.value, str) else set()


def outputs() -> dict[str, Any]:
    """What the commands write as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        run(f"gpt2np parity --json {folder}/parity.json")
        parity = json.loads(Path(folder, "parity.json").read_text(encoding="utf-8"))
    return {"info": json.loads(run("gpt2np info --json")), "parity": parity}


def tree(value: Any, indent: str = "") -> str:
    """The fields of a JSON value and their types, a line each."""
    if isinstance(value, list):
        return tree(value[0], indent) if value else ""
    if not isinstance(value, dict):
        return ""
    names = list(value)
    if len(names) > 3 and len({json.dumps(kind(v)) for v in value.values()}) == 1 and any("." in n for n in names):
        return f"{indent}{{NAME}}: {kind(value[names[0]])}\n" + tree(value[names[0]], indent + "    ")
    return "".join(f"{indent}{name}: {kind(v)}\n" + tree(v, indent + "    ") for name, v in value.items())


def kind(value: Any) -> str:
    """A JSON value's type in words."""
    if isinstance(value, list):
        return f"[{kind(value[0]) if value else ''}...]"
    names = {"dict": "object", "str": "text", "int": "integer", "float": "number", "bool": "true or false"}
    return names.get(type(value).__name__, "null")


def main() -> None:
    text = README.read_text(encoding="utf-8")
    commands = [match["command"] for match in SHOWN.finditer(text)]
    printed = {command: run(command) for command in dict.fromkeys(commands)}
    print(f"{len(printed)} commands ran: {', '.join(printed)}")
    page = reference_page(outputs())
    if "--check" not in sys.argv[1:]:
        README.write_text(SHOWN.sub(lambda m: m[1] + printed[m["command"]], text), encoding="utf-8")
        (ROOT / "docs" / "reference.md").write_text(page, encoding="utf-8")
        taps = subprocess.run([sys.executable, ROOT / "docs" / "taps.py"], capture_output=True, text=True, check=True)
        (ROOT / "docs" / "taps.md").write_text(taps.stdout, encoding="utf-8")


if __name__ == "__main__":
    main()
