"""Parity of many models on many prompts, cut into shards, each of which makes a report of its own."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..errors import Gpt2npError
from ..onnx.read.reader import open_model
from ..parity.budgets import parse_budgets
from ..parity.capture import Options
from ..parity.explain.problem import Clock
from ..parity.report import plain
from ..parity.run import check_options, parity
from ..parity.text import lines_of
from ..parity.trace import versions
from .models import hash_of_files, program
from .store import NoResult, Shard, Store

PROMPTS = 50  # of a shard
COUNTS: dict[str, Callable[[list[dict[str, Any]]], int]] = {  # of a model, over the comparisons of its reports
    "inputs": lambda compared: len({c["case"] for c in compared}),
    "comparisons": len,
    "failing": lambda compared: sum(not c["ok"] for c in compared),
    "numbers": lambda compared: sum(c["metrics"]["elements"] for c in compared if c["metrics"]),
    "outside": lambda compared: sum(c["metrics"]["failing"] for c in compared if c["metrics"]),
}
VERDICTS = {1: "FAIL", 2: "ERROR", 3: "NOTHING COMPARED", 0: "PASS"}  # the worst first


def report_shards(options: Options, models: Sequence[Path], search_time: float) -> list[Shard]:
    """Each model on all that was asked for; random prompts PROMPTS to a shard.

    Raises
    ------
    Gpt2npError
        If an option is wrong or a file is missing.
    """
    parse_budgets(options.preset, options.rtol, options.atol)
    check_options(options)
    shards = []
    for model in models:
        content = _content(options, model) | {"search_time": search_time}
        parts = [(first, min(first + PROMPTS, options.random)) for first in range(0, options.random, PROMPTS)]
        for first, last in parts or [(0, 0)]:
            part = replace(options, model=model.resolve(), data=[path.resolve() for path in options.data])
            part.skip, part.random = first, last
            if first:  # what is not random is compared with the first of the random prompts
                part.data, part.prompts, part.ids = [], [], []
            where = {"options": part, "shown": str(model)}
            shards.append(Shard("report", content | {"first": first, "last": last}, where, max(1, last - first)))
    return shards


def _content(options: Options, model: Path) -> dict[str, Any]:
    """All that a report depends on, but for the range of random prompts."""
    given = {k: v for k, v in asdict(options).items() if k not in ("model", "data", "random", "skip")}
    named = [Path(text) for text in (*options.against, *options.ids)]
    files = [file for path in (*options.data, *named) for file in _files_of(path)]
    if not (options.data or options.prompts or options.ids or options.random):  # the data sets beside the model
        files += [file for folder in sorted(model.parent.glob("test_data_set_*")) for file in _files_of(folder)]
    content = {"model": hash_of_files(open_model(model).files), "files": hash_of_files(files), "program": program()}
    if any(":" in text for text in options.against):
        content["now"] = str(time.time_ns())  # what a function computes has no hash: it is never taken over
    return content | {"options": given, "versions": versions()}


def _files_of(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] if path.is_file() else []


def compare(shard: Shard, store: Store) -> bytes:
    """One report, as JSON and as people read it."""
    try:
        report = parity(shard.where["options"], None, Clock(shard.content["search_time"]))
    except Gpt2npError as error:  # of this model; the others go on
        raise NoResult(*error.args) from None
    made = {"report": report.as_dict(), "lines": [text for text, _ in lines_of(report)]}
    return json.dumps(plain(made), allow_nan=False).encode()


def merged(shards: Sequence[Shard], store: Store, without: Mapping[str, NoResult]) -> tuple[dict[str, Any], list[str]]:
    """One report of all shards, as JSON; and the first failing one of each model, as people read it.

    without: why shards have no report, by their names.
    """
    models: dict[str, dict[str, Any]] = {}
    reports, lines = [], []
    for shard in shards:
        if error := without.get(shard.name):
            failed = {"exit_code": 2, "comparisons": [], "error": str(error)}
            made: dict[str, Any] = {"report": failed, "lines": [f"error: {error}"]}
        else:
            made = json.loads(store.result(shard.name))
        report, shown = made["report"], shard.where["shown"]
        reports.append(report)
        row = models.setdefault(shown, {"model": shown, "exit_code": 0} | dict.fromkeys(COUNTS, 0))
        if report["exit_code"] and not row["exit_code"]:
            lines += ["", f"{shown}: the first report that is no pass", "", *made["lines"]]
        row["exit_code"] = worst([row["exit_code"], report["exit_code"]])
        for name, count in COUNTS.items():
            row[name] += count(report["comparisons"])
    code = worst([row["exit_code"] for row in models.values()])
    whole = {"verdict": VERDICTS[code].lower(), "exit_code": code, "models": list(models.values())}
    return whole | {"reports": reports}, lines


def worst(codes: Sequence[int]) -> int:
    """The exit code of several."""
    return next(code for code in VERDICTS if code in codes)


def rows(whole: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """The merged report's table, model by model."""
    for row in whole["models"]:
        yield row["model"], *(f"{row[name]:,}" for name in COUNTS), VERDICTS[row["exit_code"]]
