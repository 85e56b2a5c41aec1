"""`gpt2np score`: how probable a model finds texts."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..arguments import whole_number
from ..errors import InputError
from ..files import located
from ..score import (
    LastWords,
    LastWordScoring,
    Progress,
    Score,
    TextScoring,
    check_cut,
    read_passages,
)
from ._model import EngineOption, ModelOption, TokenizerOption, WeightsOption, load_model, read_text
from ._shards import ClusterOption, ResultsOption, WorkersOption, open_shards, wanted
from ._terminal import note, print_json, print_table, progress

if TYPE_CHECKING:
    from ..model import GPT2


def score(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Texts; .jsonl: passages whose last words are guessed.")
    ],
    window: Annotated[int | None, typer.Option(help="Tokens a prediction may look at. [default: n_ctx]")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens from window to window. [default: window / 2]")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows or passages that are run together.")] = 8,
    resume: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep progress in FILE, and go on from what is there.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one line of JSON for each file.")] = False,
    model: ModelOption = None,
    tokenizer: TokenizerOption = None,
    engine: EngineOption = "numba",
    dtype: Annotated[str, typer.Option(help="float32, or float64 for exact sums.")] = "float32",
    weights: WeightsOption = None,
    workers: WorkersOption = None,
    cluster: ClusterOption = None,
    results: ResultsOption = None,
) -> None:
    """Log-likelihood and perplexity of texts; accuracy of last words.

    A text is cut into windows of --window tokens, --stride apart; each scores the tokens that no earlier one has,
    so every token but the first is scored once, with at least window - stride tokens before it (where stride is
    window, the first token of each window is left out). Perplexity per word and per byte count the words and
    bytes of the text, which makes them comparable between tokenizers.

    A .jsonl file holds a passage in the "text" of each line, as LAMBADA does: its last word counts as guessed if
    each of the word's tokens is the most probable one.

    Ctrl-C prints the results so far (exit code 130); with --resume the same command goes on from there.

    Examples:

    - `gpt2np score story.txt`

    - `gpt2np score wikitext2_raw_test.txt -m gpt2-lm-head-10 --stride 512 --resume progress.json`

    - `gpt2np score lambada_test.jsonl --json`

    - `gpt2np score corpus/*.txt --workers 4` (the same bits by any number of workers: docs/scale.md)
    """
    if wanted(workers, cluster, results):
        if resume is not None:
            raise InputError("--resume is for one process; --results keeps what --workers and --cluster compute")
        gpt2 = load_model(model, tokenizer, engine, dtype, weights)
        how = *check_cut(gpt2.config.n_ctx, window, stride), whole_number("batch_size", batch_size, 1)
        _score_shards(gpt2, tokenizer, files, how, (workers, cluster, results), json)
        return
    kept = Progress(resume)
    texts = [read_text(path) for path in files]
    gpt2 = load_model(model, tokenizer, engine, dtype, weights)
    scorings: list[TextScoring | LastWordScoring] = []
    for path, text in zip(files, texts, strict=True):
        with located(path):
            if path.suffix == ".jsonl":
                scorings.append(LastWordScoring(gpt2, read_passages(text), batch_size, progress=kept))
            else:
                scorings.append(TextScoring(gpt2, text, window, stride, batch_size, progress=kept))
    records: list[dict[str, Any]] = []
    complete = True
    for path, scoring in zip(files, scorings, strict=True):
        rate = _run(path, scoring)
        complete = scoring.done == scoring.total
        if scoring.done:
            records.append(
                {"file": str(path), "complete": complete, **_record(scoring.result, _cut(scoring)), "per_second": rate}
            )
            if json:
                print_json("score", records[-1])
        if not complete:
            break
    if not json:
        _print(records)
    if not complete:
        raise typer.Exit(130)


def _run(path: Path, scoring: TextScoring | LastWordScoring) -> float | None:
    """Score one file with a progress bar; tokens or passages a second, None where there was nothing left to do."""
    unit = "passages" if isinstance(scoring, LastWordScoring) else "tokens"
    before, began = scoring.done, time.perf_counter()
    try:
        with progress(str(path), scoring.total, unit, before) as advance:
            for amount in scoring:
                advance(amount)
    except KeyboardInterrupt:
        note(f"stopped in {path} after {scoring.done:,} of {scoring.total:,} {unit}")
    new = scoring.done - before
    return round(new / (time.perf_counter() - began), 1) if new else None


def _score_shards(
    gpt2: GPT2,
    tokenizer: Path | None,
    files: list[Path],
    how: tuple[int, int, int],
    by: tuple[int | None, str | None, Path | None],
    json: bool,
) -> None:
    """Score files by shards: texts are tokenized first, then windows and passages are scored together."""
    from ..cluster import text
    from ..cluster.models import describe

    window, stride, batch_size = how
    described = describe(gpt2, tokenizer, batch_size)
    texts = {path: text.token_shard(path, described) for path in files if path.suffix != ".jsonl"}
    cut = {p: text.line_shards(text.score_passages, p, described, {}) for p in files if p not in texts}
    records: list[dict[str, Any]] = []
    with open_shards(*by) as shards:
        shards.compute(list(texts.values()), "tokenizing", "texts")
        for path, tokens in texts.items():
            cut[path] = text.window_shards(tokens, shards.store, window, stride)
        shards.compute([shard for path in files for shard in cut[path]], "scoring", "tokens")
        for path in files:
            result = (
                text.text_score(texts[path], cut[path], shards.store) if path in texts
                else text.passages_score(cut[path], shards.store)
            )  # fmt: skip
            sizes = {"window": window, "stride": stride} if path in texts else {}
            records.append({"file": str(path), "complete": True, **_record(result, sizes), "per_second": None})
            if json:
                print_json("score", records[-1])
        if json:
            print_json("shards", shards.summary())
        else:
            _print(records)
            shards.tell()


def _cut(scoring: TextScoring | LastWordScoring) -> dict[str, int]:
    return {"window": scoring.window, "stride": scoring.stride} if isinstance(scoring, TextScoring) else {}


def _record(result: Score | LastWords, cut: dict[str, int]) -> dict[str, Any]:
    if isinstance(result, LastWords):
        names = ["passages", "correct", "accuracy", "log_likelihood", "perplexity"]
    else:
        names = ["tokens", "scored", "words", "bytes", "log_likelihood", "log_likelihood_per_token"]
        names += ["perplexity", "perplexity_per_word", "perplexity_per_byte", "bits_per_byte"]
    values = {name: getattr(result, name) for name in names}
    return cut | {name: value if math.isfinite(value) else None for name, value in values.items()}


def _print(records: list[dict[str, Any]]) -> None:
    """One table for texts and one for passages."""
    texts = [r for r in records if "tokens" in r]
    passages = [r for r in records if "passages" in r]
    if texts:
        columns = (
            "file",
            ">tokens",
            ">log-lik./token",
            ">ppl/token",
            ">ppl/word",
            ">ppl/byte",
            ">bits/byte",
            ">tokens/s",
        )
        names = (
            "log_likelihood_per_token",
            "perplexity",
            "perplexity_per_word",
            "perplexity_per_byte",
            "bits_per_byte",
        )
        print_table(
            columns,
            [(_name(r), f"{r['scored']:,}", *(_number(r[n]) for n in names), _rate(r)) for r in texts],
            title=f"window {texts[0]['window']}, stride {texts[0]['stride']}",
        )
    if passages:
        print_table(
            ("file", ">passages", ">last words right", ">accuracy", ">ppl/word", ">passages/s"),
            [
                (
                    _name(r),
                    f"{r['passages']:,}",
                    f"{r['correct']:,}",
                    f"{r['accuracy']:.2%}",
                    _number(r["perplexity"]),
                    _rate(r),
                )
                for r in passages
            ],
        )


def _name(record: dict[str, Any]) -> str:
    return str(record["file"]) + ("" if record["complete"] else " (part)")


def _number(value: float | None) -> str:
    return "inf" if value is None else f"{value:,.4f}" if abs(value) < 1e6 else f"{value:.4e}"


def _rate(record: dict[str, Any]) -> str:
    return "" if record["per_second"] is None else f"{record['per_second']:,.0f}"
