"""Texts cut into shards: windows and passages to score, lines to embed; and results put together again."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from .. import score
from ..embed import embed, read_lines
from ..errors import InputError
from ..files import File, located, write_arrays
from ..tokenizer import decode, encode_for
from ..weights import Array
from .models import Described, open_described
from .store import Shard, Store, Work

WINDOWS = 16  # of a shard: work beside which what the scheduler does for it is little, and few wait for the last
LINES = 256

_all_windows = lru_cache(maxsize=1)(score.windows)


def token_shard(path: Path, described: Described) -> Shard:
    """A text to be tokenized: as a whole, because where one may be cut only its tokenizer knows."""
    content, where = described
    file = _file(path)
    place = {"text": path.resolve(), "begin": 0, "bytes": file.size, "shown": str(path)}
    return Shard(tokenize, content | {"text": file.sha256()}, where | place)


def tokenize(shard: Shard, store: Store) -> bytes:
    """Token ids of a text; first, how many words and bytes they stand for."""
    model, raw = open_described(shard), _read(shard)
    assert model.tokenizer is not None
    with located(shard.where["shown"]):
        ids = encode_for(model.config.vocab_size, model.tokenizer, raw.decode())
        score.check_text(ids)
    text = decode(model.tokenizer, ids)
    return np.array([len(text.split()), len(text.encode()), *ids], "<i8").tobytes()


def window_shards(text: Shard, store: Store, window: int, stride: int) -> list[Shard]:
    """The windows of a text, once it is tokenized; `window` and `stride` as `score.check_cut` gives them."""
    score.check_cut(window, window, stride)
    cut = score.windows(len(_tokens(store, text.name)) - 2, window, stride)
    where = text.where | {"tokens": text.name}
    shards = []
    for first in range(0, len(cut), WINDOWS):
        group = cut[first : first + WINDOWS]
        content = text.content | {"cut": (window, stride), "range": (first, first + len(group))}
        shards.append(Shard(score_windows, content, where, sum(end - start for _, start, end in group)))
    return shards


def score_windows(shard: Shard, store: Store) -> bytes:
    """The log-likelihood of each window."""
    model, batch = open_described(shard), shard.where["batch_size"]
    ids = _tokens(store, shard.where["tokens"])[2:]
    group = _all_windows(len(ids), *shard.content["cut"])[slice(*shard.content["range"])]
    found = [x for i in range(0, len(group), batch) for x in score.score_windows(model, ids, group[i : i + batch])]
    return np.array(found, "<f8").tobytes()


def text_score(text: Shard, shards: Iterable[Shard], store: Store) -> score.Score:
    """The score of a text, once its shards are computed: one exact sum over all windows."""
    found = _tokens(store, text.name)
    words, nbytes = map(int, found[:2])
    scored = sum(shard.size for shard in shards)
    return score.Score(len(found) - 2, scored, words, nbytes, math.fsum(_numbers(shards, store)))


def line_shards(work: Work, path: Path, described: Described, options: dict[str, Any]) -> list[Shard]:
    """The lines of a file, LINES to a shard; a shard is named by its lines, so that a longer file keeps its shards.

    Raises
    ------
    InputError
        If the file cannot be read, or what is seen without a tokenizer says that a line cannot be used.
    """
    content, where = described
    shards, begin, line = [], 0, 1
    with _file(path).path.open("rb") as file:
        while piece := b"".join(islice(file, LINES)):
            shown = f"{path}, from line {line} on"
            if size := len(_lines(work, shown, piece)):
                what = options | {"text": hashlib.sha256(piece).hexdigest()}
                place = {"text": path.resolve(), "begin": begin, "bytes": len(piece), "shown": shown}
                shards.append(Shard(work, content | what, where | place, size))
            begin, line = begin + len(piece), line + LINES
    if not shards:
        raise InputError(f"{path} is empty: there is no line in it")
    return shards


def score_passages(shard: Shard, store: Store) -> bytes:
    """For each passage of some lines the log-likelihood of its last word, and 1 where that was guessed."""
    model, passages = open_described(shard), _lines(shard.work, shard.where["shown"], _read(shard))
    with located(shard.where["shown"]):
        scoring = score.LastWordScoring(model, passages, shard.where["batch_size"])
    for _ in scoring:
        pass
    return np.array(scoring.outcomes, "<f8").tobytes()


def passages_score(shards: Iterable[Shard], store: Store) -> score.LastWords:
    """The score of all passages, once their shards are computed."""
    values = _numbers(shards, store).reshape(-1, 2)
    return score.LastWords(len(values), int(values[:, 1].sum()), math.fsum(values[:, 0]))


def embed_lines(shard: Shard, store: Store) -> bytes:
    """The arrays of each line, as an .npz."""
    model, lines = open_described(shard), _lines(shard.work, shard.where["shown"], _read(shard))
    options = shard.content["taps"], shard.content["pool"], shard.where["batch_size"]
    with located(shard.where["shown"]):
        found = embed(model, lines, *options)
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


_READERS: dict[Work, Callable[[str], list[str]]] = {score_passages: score.read_passages, embed_lines: read_lines}


def _lines(work: Work, shown: str, piece: bytes) -> list[str]:
    """Whole lines of a text as what a function works on: passages of JSON, or every line as it is."""
    with located(shown):
        return _READERS[work](piece.decode())


def _file(path: Path) -> File:
    if str(path) == "-":
        raise InputError("other processes cannot read this one's standard input: give a file to cut into shards")
    return File(path, InputError)


def _read(shard: Shard) -> bytes:
    """The bytes of a shard's text, which must be those that it is named by."""
    raw = np.empty(shard.where["bytes"], np.uint8)
    File(shard.where["text"], InputError).read_into(raw, [(shard.where["begin"], raw.size)])
    if hashlib.sha256(raw.data).hexdigest() != shard.content["text"]:
        raise InputError(f"{shard.where['text']} has changed since the work was cut")
    return raw.tobytes()


def _numbers(shards: Iterable[Shard], store: Store) -> Array:
    """The numbers of some shards, in their order, float64 (n,)."""
    return np.concatenate([np.frombuffer(store.result(shard.name), "<f8") for shard in shards])


@lru_cache(maxsize=1)
def _tokens(store: Store, name: str) -> Array:
    """What `tokenize` made, int64 (2 + tokens,)."""
    return np.frombuffer(store.result(name), "<i8")
