"""Texts cut into shards: windows and passages to score, lines to embed; and results put together again."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..embed import embed
from ..errors import InputError
from ..files import File, write_arrays
from ..score import LastWords, LastWordScoring, Score, check_text, last_word, read_passages, score_windows, windows
from ..tokenizer import decode, encode_for
from ..weights import Array
from .models import Described, open_described
from .store import Shard, Store

WINDOWS = 16  # of a shard: work beside which what the scheduler does for it is little, and few wait for the last
LINES = 256
CUT = ("window", "stride", "first", "last")


def token_shard(path: Path, described: Described) -> Shard:
    """A text to be tokenized: as a whole, because where one may be cut only its tokenizer knows."""
    content, where = described
    file = _file(path)
    place = {"text": path.resolve(), "begin": 0, "bytes": file.size}
    return Shard("tokens", content | {"text": file.sha256()}, where | place)


def _file(path: Path) -> File:
    if str(path) == "-":
        raise InputError("other processes cannot read this one's standard input: give a file to cut into shards")
    return File(path, InputError)


def tokenize(shard: Shard, store: Store) -> bytes:
    """Token ids of a text; first, how many words and bytes they stand for."""
    model = open_described(shard)
    assert model.tokenizer is not None
    raw = _read(shard)
    with _placed(shard):
        ids = encode_for(model.config.vocab_size, model.tokenizer, raw.decode())
        check_text(ids)
    text = decode(model.tokenizer, ids)
    return np.array([len(text.split()), len(text.encode()), *ids], "<i8").tobytes()


def window_shards(text: Shard, store: Store, window: int, stride: int, batch_size: int) -> list[Shard]:
    """The windows of a tokenized text."""
    cut = _windows(len(_tokens(store.folder, text.name)) - 2, window, stride)
    shards = []
    for first in range(0, len(cut), WINDOWS):
        group = cut[first : first + WINDOWS]
        content = text.content | dict(zip(CUT, (window, stride, first, first + len(group)), strict=True))
        where = text.where | {"tokens": text.name, "batch_size": batch_size}
        shards.append(Shard("windows", content, where, sum(end - start for _, start, end in group)))
    return shards


def score(shard: Shard, store: Store) -> bytes:
    """What a shard of windows or of passages scores."""
    return (_score_windows if shard.kind == "windows" else _score_passages)(shard, store)


def _score_windows(shard: Shard, store: Store) -> bytes:
    """The log-likelihood of each window."""
    window, stride, first, last = (shard.content[name] for name in CUT)
    ids = _tokens(store.folder, shard.where["tokens"])[2:]
    group = _windows(len(ids), window, stride)[first:last]
    batch = shard.where["batch_size"]
    model = open_described(shard)
    found = [x for i in range(0, len(group), batch) for x in score_windows(model, ids, group[i : i + batch])]
    return np.array(found, "<f8").tobytes()


def text_score(text: Shard, shards: Sequence[Shard], store: Store) -> Score:
    """The score of a text, once its shards are computed: one exact sum over all windows."""
    words, nbytes, *ids = _tokens(store.folder, text.name)
    values = np.concatenate([np.frombuffer(store.result(shard.name), "<f8") for shard in shards])
    return Score(len(ids), sum(shard.size for shard in shards), words, nbytes, math.fsum(values))


def line_shards(kind: str, path: Path, described: Described, options: dict[str, Any], batch_size: int) -> list[Shard]:
    """The lines of a file, LINES to a shard; a shard is named by its lines, so that a longer file keeps its shards.

    Raises
    ------
    InputError
        If the file cannot be read, or what is seen without a tokenizer says that a line cannot be used.
    """
    content, where = described
    where |= {"text": path.resolve(), "batch_size": batch_size}
    shards, begin, line = [], 0, 1
    with _file(path).path.open("rb") as file:
        while piece := b"".join(islice(file, LINES)):
            place = {"begin": begin, "bytes": len(piece), "line": line}
            what = {"text": hashlib.sha256(piece).hexdigest()}
            shard = Shard(kind, content | options | what, where | place)
            if size := len(_lines(shard, piece)):
                shards.append(replace(shard, size=size))
            begin, line = begin + len(piece), line + LINES
    if not shards:
        raise InputError(f"{path} is empty: there is no line in it")
    return shards


def _score_passages(shard: Shard, store: Store) -> bytes:
    """For each passage of some lines the log-likelihood of its last word, and 1 where that was guessed."""
    lines = _lines(shard, _read(shard))
    with _placed(shard):
        scoring = LastWordScoring(open_described(shard), lines, shard.where["batch_size"])
    for _ in scoring:
        pass
    return np.array(scoring.outcomes, "<f8").tobytes()


def passages_score(shards: Iterable[Shard], store: Store) -> LastWords:
    """The score of all passages, once their shards are computed."""
    values = np.concatenate([np.frombuffer(store.result(shard.name), "<f8").reshape(-1, 2) for shard in shards])
    return LastWords(len(values), int(values[:, 1].sum()), math.fsum(values[:, 0]))


def embed_lines(shard: Shard, store: Store) -> bytes:
    """The arrays of each line, as an .npz."""
    lines = _lines(shard, _read(shard))
    options = shard.content["taps"], shard.content["pool"], shard.where["batch_size"]
    with _placed(shard):
        found = embed(open_described(shard), lines, *options)
    packed = BytesIO()
    write_arrays(packed, ((f"{i}/{n}", value) for i, states in enumerate(found) for n, value in states.items()))
    return packed.getvalue()


def embedded(shards: Iterable[Shard], store: Store) -> Iterator[dict[str, Array]]:
    """What `embed` yields, line by line, once the shards are computed."""
    for shard in shards:
        states: list[dict[str, Array]] = [{} for _ in range(shard.size)]
        with np.load(BytesIO(store.result(shard.name))) as arrays:
            for key in arrays.files:
                i, name = key.split("/", 1)
                states[int(i)][name] = arrays[key]
        yield from states


@lru_cache(maxsize=1)
def _tokens(folder: Path, name: str) -> list[int]:
    return np.frombuffer(Store(folder).result(name), "<i8").tolist()


_windows = lru_cache(maxsize=1)(windows)


@contextmanager
def _placed(shard: Shard) -> Iterator[None]:
    """Errors of a text say which it is, and where in it they are."""
    place = (
        f"{shard.where['text']}, from line {shard.where['line']} on" if "line" in shard.where else shard.where["text"]
    )
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: not UTF-8 text: {error}") from None
    except InputError as error:
        raise InputError(f"{place}: {error}") from None


def _read(shard: Shard) -> bytes:
    """The bytes of a shard's text, which must be those that it is named by."""
    raw = np.empty(shard.where["bytes"], np.uint8)
    File(shard.where["text"], InputError).read_into(raw, [(shard.where["begin"], raw.size)])
    if hashlib.sha256(raw.data).hexdigest() != shard.content["text"]:
        raise InputError(f"{shard.where['text']} has changed since the work was cut")
    return raw.tobytes()


def _lines(shard: Shard, piece: bytes) -> list[str]:
    """Whole lines to texts: passages of JSON, or every line as it is."""
    with _placed(shard):
        text = piece.decode()
        if shard.kind == "passages":
            passages = read_passages(text)
            for i, passage in enumerate(passages, 1):
                last_word(passage, f"passage {i} of these")
            return passages
        lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
        if "" in lines:
            raise InputError(f"line {lines.index('') + 1} of these is empty: it has no tokens")
        return lines
