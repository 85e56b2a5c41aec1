"""Parity of many models on many prompts, cut into shards, each of which makes a report of its own."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import chdir, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..errors import Gpt2npError
from ..onnx.read.reader import open_model
from ..parity.budgets import parse_budgets
from ..parity.capture import Options
from ..parity.explain.problem import Clock
from ..parity.report import VERDICTS as VERDICTS_OF_ONE
from ..parity.report import plain
from ..parity.run import parity
from ..parity.text import lines_of
from ..parity.trace import versions
from .models import check_same, hash_of_files, program
from .store import Shard, Store

PROMPTS = 50  # of a shard
COUNTS: dict[str, Callable[[list[dict[str, Any]]], int]] = {  # of a model, over the comparisons of its reports
    "inputs": lambda compared: len({c["case"] for c in compared}),
    "comparisons": len,
    "failing": lambda compared: sum(not c["ok"] for c in compared),
    "numbers": lambda compared: sum(c["metrics"]["elements"] for c in compared if c["metrics"]),
    "outside": lambda compared: sum(c["metrics"]["failing"] for c in compared if c["metrics"]),
}
VERDICTS = VERDICTS_OF_ONE | {2: "error"}
SEVERITY = 0, 3, 2, 1  # exit codes, the worst last


def report_shards(options: Options, models: Sequence[Path], search_time: float) -> list[Shard]:
    """Each model on all that was asked for; random prompts PROMPTS to a shard.

    Raises
    ------
    Gpt2npError
        If an option is wrong or a file is missing.
    """
    parse_budgets(options.preset, options.rtol, options.atol)
    shards = []
    for model in models:
        whole = replace(options, model=model)
        files = _files(whole)
        content = _hashes(model, files) | {"versions": versions(), "search_time": search_time}
        content["options"] = {k: v for k, v in asdict(whole).items() if k not in ("model", "data", "random", "skip")}
        if any(":" in text for text in options.against):
            content["now"] = time.time_ns()  # what a function computes has no hash: it is never taken over
        for first in range(0, max(1, options.random), PROMPTS):
            last = min(first + PROMPTS, options.random)
            part = replace(whole, skip=first, random=last)
            if first:  # what is not random is compared with the first of the random prompts
                part = replace(part, data=[], prompts=[], ids=[])
            where = {"options": part, "files": files, "folder": Path.cwd()}
            shards.append(Shard(compare, content | {"range": (first, last)}, where, max(1, last - first)))
    return shards


def _files(options: Options) -> list[Path]:
    """What a report depends on beside the model: data sets, other models, recorded arrays."""
    # os.path, not Path: names of parties, and many ids, are no paths, and these are longer than one can be
    places = [*options.data, *(Path(text) for text in (*options.against, *options.ids) if os.path.exists(text))]
    if not (options.data or options.prompts or options.ids or options.random):  # the data sets beside the model
        places += options.model.parent.glob("test_data_set_*")
    return sorted(path for place in places for path in (place, *place.rglob("*")) if path.is_file())


def _hashes(model: Path, files: Sequence[Path]) -> dict[str, str]:
    return {"model": hash_of_files(open_model(model).files), "files": hash_of_files(files), "program": program()}


def compare(shard: Shard, store: Store) -> bytes:
    """One report, as JSON and as people read it; or why there is none, while other models are compared."""
    options, files, folder = (shard.where[name] for name in ("options", "files", "folder"))
    try:
        with chdir(folder) if folder.is_dir() else nullcontext():  # paths may be given from here
            check_same(shard.content, _hashes(options.model, files), options.model)
            found = parity(options, None, Clock(shard.content["search_time"]))
        report, lines = found.as_dict(), [text for text, _ in lines_of(found)]
    except Gpt2npError as error:
        report, lines = {"exit_code": 2, "comparisons": [], "error": str(error)}, [f"error: {error}"]
    return json.dumps(plain({"report": report, "lines": lines}), allow_nan=False).encode()


def merged(shards: Sequence[Shard], store: Store) -> tuple[dict[str, Any], list[str]]:
    """One report of all shards, as JSON; and the first failing one of each model, as people read it.

    An error is not kept once it is told: the same command tries again.
    """
    models: dict[str, dict[str, Any]] = {}
    reports, lines = [], []
    for shard in shards:
        made = json.loads(store.result(shard.name))
        report, shown = made["report"], str(shard.where["options"].model)
        reports.append(report)
        row = models.setdefault(shown, {"model": shown, "exit_code": 0} | dict.fromkeys(COUNTS, 0))
        if report["exit_code"] and not row["exit_code"]:
            lines += ["", f"{shown}: the first report that is no pass", "", *made["lines"]]
        row["exit_code"] = max(row["exit_code"], report["exit_code"], key=SEVERITY.index)
        for name, count in COUNTS.items():
            row[name] += count(report["comparisons"])
    for name in {shard.name for shard, report in zip(shards, reports, strict=True) if report["exit_code"] == 2}:
        (store.folder / name).unlink(missing_ok=True)
    code = max((row["exit_code"] for row in models.values()), key=SEVERITY.index)
    whole = {"verdict": VERDICTS[code], "exit_code": code, "models": list(models.values())}
    return whole | {"reports": reports}, lines
