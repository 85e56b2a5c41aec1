"""Make what the documents show: run the commands whose output the pages have, and print the reference pages.

    python docs/refresh.py            rewrite README.md, docs/porting.md, docs/reference.md and docs/taps.md
    python docs/refresh.py --check    only run README.md's commands; exit 1 if one ends with another exit code than 0

A shown output is a fenced block behind a comment that names its command: `<!-- output of: gpt2np parity -->`. In
docs/porting.md it is a session, `<!-- session: COMMAND -->`: the commands of the page run one after the other in one
new folder, by bash, and the block shows each with what it printed and its exit code.
"""

from __future__ import annotations

import ast
import json
import os
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

PORTING = ROOT / "docs" / "porting.md"
SESSION = re.compile(r"(<!-- session: (?P<command>.+?) -->\n```(?:text)?\n)(?P<output>.*?)(?=```\n)", re.DOTALL)


def sessions(text: str) -> str:
    """A page with the outputs of its sessions, run anew."""
    with tempfile.TemporaryDirectory() as folder:

        def shown(match: re.Match[str]) -> str:
            command = match["command"].strip()
            script = f'gpt2np() {{ "{sys.executable}" -m gpt2np "$@"; }}\nset -o pipefail\n{command}\n'
            paths = {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
            done = subprocess.run(
                ["bash", "-c", script], capture_output=True, text=True, cwd=folder, check=False,
                env={**os.environ, **paths},
            )  # fmt: skip
            output = (done.stderr + done.stdout).replace(f"{ROOT}/", "")
            prompt = "$ " + command.replace("\n", "\n> " if "<<" in command else "\n$ ") + "\n"
            return f"{match[1]}{prompt}{output}exit code {done.returncode}\n"

        return SESSION.sub(shown, text)


def run(command: str) -> str:
    """What a gpt2np command prints on standard output, as in a pipe; it has to succeed."""
    words = [sys.executable, "-m", *shlex.split(command)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    output = done.stdout.replace(f"{ROOT}/", "")  # paths as someone in a clone of their own would give them
    return "\n".join(line.rstrip() for line in output.strip("\n").splitlines()) + "\n"


def reference_page() -> str:
    """docs/reference.md: exit codes, mistakes, operators and the JSON of commands, each from where it is defined."""
    from gpt2np.cli import EXIT_CODES
    from gpt2np.onnx.evaluate.operators import OPERATORS
    from gpt2np.onnx.normalise import fused, quantised

    def listed(names: Any) -> str:
        return ", ".join(f"`{name}`" for name in sorted(names)) + "\n"

    bar = r"\|"  # in a cell of a table
    parts = [
        "# Reference\n\nMade by `python docs/refresh.py` from the code; [taps.md](taps.md) has the names of taps.\n",
        "\n## Exit codes\n\n| code | meaning |\n|---|---|\n",
        *(f"| {code} | {meaning.replace('|', bar)} |\n" for code, meaning in EXIT_CODES.items()),
        "\n## Mistakes\n\nWhat `gpt2np diff` and `parity` try at the first divergence; the names are stable.\n\n",
        listed(mistakes()),
        "\n## Operators\n\nA graph may hold these, and what an optimiser or a quantiser makes of them:\n\n",
        listed(OPERATORS),
        "\nfused, rewritten as the plain ones: ",
        listed(fused.RULES),
        "\nquantised, rewritten with the weights that they stand for: ",
        listed(quantised.RULES),
        "\n## JSON\n\nWhat `--json` writes, as [the schema](../gpt2np/output.schema.json) in the package describes it "
        "(`gpt2np.schema.SCHEMA_FILE`). `[...]` is a list; a name stands for another object of this page. Files have "
        "paths relative to the current folder where they lie in it. Numbers may be the words inf, -inf and nan.\n",
        schema_tree(),
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


def schema_tree() -> str:
    """The fields of every command's JSON with what they mean, a line each, from the schema."""
    from gpt2np.schema import SCHEMA_FILE

    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    parts = []
    for name, definition in schema["$defs"].items():
        if "properties" in definition:
            parts.append(f"\n`{name}`: {definition['description']}\n\n```\n{fields(definition)}```\n")
    return "".join(parts)


def fields(definition: dict[str, Any], indent: str = "") -> str:
    """The fields of an object in the schema, those of objects inside further to the right."""
    lines = ""
    for name, field in definition["properties"].items():
        optional = "" if name in definition["required"] else " (not always)"
        lines += f"{indent}{name}: {kind(field)}{optional}: {field['description']}\n"
        inner = field
        while inner.keys() & {"items", "anyOf", "additionalProperties"}:
            below = inner.get("items") or inner.get("additionalProperties") or inner["anyOf"][0]
            if not isinstance(below, dict):
                break
            inner = below
        if "properties" in inner:
            lines += fields(inner, indent + "    ")
    return lines


def kind(field: dict[str, Any]) -> str:
    """A field's type in words."""
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    if "anyOf" in field:
        return " or ".join(kind(each) for each in field["anyOf"])
    if "enum" in field or "const" in field:
        return " or ".join(json.dumps(value) for value in field.get("enum", [field.get("const")]))
    names = {"string": "text", "boolean": "true or false"}
    if isinstance(field["type"], list):
        return " or ".join(names.get(name, name) for name in field["type"])
    if field["type"] == "array":
        return f"[{kind(field['items'])}...]" if "items" in field else "[...]"
    if isinstance(field.get("additionalProperties"), dict):
        return f"{{name: {kind(field['additionalProperties'])}}}"
    return names.get(field["type"], field["type"])


def main() -> None:
    text = README.read_text(encoding="utf-8")
    commands = [match["command"] for match in SHOWN.finditer(text)]
    printed = {command: run(command) for command in dict.fromkeys(commands)}
    print(f"{len(printed)} commands ran: {', '.join(printed)}")
    page = reference_page()
    if "--check" not in sys.argv[1:]:
        README.write_text(SHOWN.sub(lambda m: m[1] + printed[m["command"]], text), encoding="utf-8")
        PORTING.write_text(sessions(PORTING.read_text(encoding="utf-8")), encoding="utf-8")
        (ROOT / "docs" / "reference.md").write_text(page, encoding="utf-8")
        taps = subprocess.run([sys.executable, ROOT / "docs" / "taps.py"], capture_output=True, text=True, check=True)
        (ROOT / "docs" / "taps.md").write_text(taps.stdout, encoding="utf-8")


if __name__ == "__main__":
    main()
