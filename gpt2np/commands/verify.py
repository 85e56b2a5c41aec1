"""gpt2np verify: is this file the real GPT-2, and does gpt2np run it right?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def verify(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model.onnx, its folder, or the name of a fetched model.")
    ] = "gpt2-10",
    facts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Facts about another model; see gpt2np/zoo/facts.py.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per check.")] = False,
) -> None:
    """Prove that a file is one of OpenAI's GPT-2s, and that gpt2np computes what is published about it.

    Compares SHA-256, configuration, weights, published results (each with its source), the sample data beside
    the file, and ONNX Runtime. Exit code 0: all agree; 1: something differs; 3: nothing could be compared.
    """
    from dataclasses import asdict

    from rich.text import Text

    from .. import zoo
    from ..zoo.facts import load_facts
    from ..zoo.verify import verdict
    from ..zoo.verify import verify as run_checks
    from ._model import named_model
    from ._terminal import console, print_json, print_table, progress

    path = named_model(model)
    known = load_facts(facts)
    published = [file for one in known for file in one.files] + ([] if facts else list(zoo.known_files()))
    checkpoint = zoo.verified_checkpoint(path) if facts is None else None
    checks = []
    with progress("verifying", None, "checks") as advance:
        for check in run_checks(path, known, published, checkpoint):
            checks.append(check)
            advance(1)
            if as_json:
                print_json("verify_check", asdict(check))
    results = [check.result for check in checks]
    if not as_json:
        colour = {"pass": "green", "FAIL": "red", "skip": "yellow"}
        rows = ((c.group, c.what, Text(c.result, colour[c.result]), c.found, c.source) for c in checks)
        print_table(("", "what", "result", "found", "source"), rows)
        out = console()
        out.print()
        out.print(verdict(checks))
    if "FAIL" in results:
        raise typer.Exit(1)
    if not any(check.result == "pass" and check.group in ("file", "weights", "facts") for check in checks):
        raise typer.Exit(3)  # ONNX Runtime alone cannot tell what model this is
