"""How probable a model finds a text: log-likelihood, perplexity, and the accuracy of guessing last words.

A text longer than the context is cut into windows of `window` tokens that begin `stride` tokens apart. Each
window scores the tokens that no earlier one has, given those before them in the window; so the very first token
of a text is not scored, and with stride < window every other one is, with at least window - stride tokens of
context. This is the recipe of "Perplexity of fixed-length models" in the documentation of Hugging Face
transformers, with exact sums over tokens in the place of averages over windows.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .arguments import as_path, strings, whole_number
from .errors import InputError, TokenizerError
from .files import read_all
from .tokenizer import HOW_TO_GET_ONE, chosen_tokenizer, decode, encode_for
from .weights import Array

if TYPE_CHECKING:
    import tokenizers

    from .cache import KVCache
    from .model import GPT2

SECONDS = 2.0  # between one writing of the progress and the next
HEADING = "gpt2np score"  # what a progress file begins with
CHUNK = 2**24  # logits that are in memory at once, about: 64 MB in float32


@dataclass(frozen=True)
class Score:
    """The log-likelihood of a text."""

    tokens: int  # in the text
    scored: int  # of these, how many were predicted
    words: int  # separated by white space
    bytes: int  # in UTF-8
    log_likelihood: float  # natural log, sum over the scored tokens

    @property
    def log_likelihood_per_token(self) -> float:
        return self.log_likelihood / self.scored

    @property
    def perplexity(self) -> float:
        """Per token."""
        return _exp(-self.log_likelihood / self.scored)

    @property
    def perplexity_per_word(self) -> float:
        return _exp(-self.log_likelihood / max(self.words, 1))

    @property
    def perplexity_per_byte(self) -> float:
        return _exp(-self.log_likelihood / self.bytes)

    @property
    def bits_per_byte(self) -> float:
        return -self.log_likelihood / self.bytes / math.log(2)


@dataclass(frozen=True)
class LastWords:
    """How well the last words of passages are guessed."""

    passages: int
    correct: int  # no token is more probable than the word's, given the passage and the word's tokens before
    log_likelihood: float  # natural log, sum over the last words

    @property
    def accuracy(self) -> float:
        return self.correct / self.passages

    @property
    def perplexity(self) -> float:
        """Per word."""
        return _exp(-self.log_likelihood / self.passages)


def _exp(x: float) -> float:
    return math.exp(x) if x < 709 else math.inf


class Progress:
    """Results so far in a file that is always whole: it is replaced, never written into.

    Results are filed under a key that changes with everything they depend on, so that a file can be kept and
    given again whatever has changed meanwhile.

    Raises
    ------
    InputError
        If the file exists and is not a progress file, or cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._written = -math.inf
        self._runs: dict[str, list[Any]] = {}
        if path is None:
            return
        path = self._path = as_path(path)
        try:
            if path.exists():
                self._runs = {key: list(done) for key, done in json.loads(read_all(path))[HEADING].items()}
            self._draft().touch()  # an error now, not after the first batch
            self._draft().unlink()
        except (OSError, InputError) as error:  # InputError: a folder, or a device
            raise InputError(f"cannot keep progress in {path}: {getattr(error, 'strerror', error)}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is not a progress file of `gpt2np score`: {error}") from None

    def key(self, model: GPT2, ids: Sequence[int], *what: object) -> str:
        """Identifies a run: what is scored and how, and what this model with this engine answers to some of it."""
        if self._path is None:
            return ""
        answer = model(ids, logits="last").logits
        assert answer is not None
        return hashlib.sha256(answer.tobytes() + repr(what).encode()).hexdigest()

    def get(self, key: str) -> list[Any]:
        return [] if self._path is None else list(self._runs.get(key, []))

    def put(self, key: str, results: list[Any], now: bool = False) -> None:
        """Keep the results so far: in the file `now`, or where the last time was some seconds ago."""
        self._runs[key] = results
        if self._path is not None and (now or time.monotonic() > self._written + SECONDS):
            self._written = time.monotonic()
            try:
                self._draft().write_text(json.dumps({HEADING: self._runs}), "utf-8")
                self._draft().replace(self._path)
            except OSError as error:
                self._draft().unlink(missing_ok=True)
                raise InputError(f"cannot keep progress in {self._path}: {error.strerror}") from None

    def _draft(self) -> Path:
        assert self._path is not None
        return self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp")


def _progress(given: Progress | None) -> Progress:
    """The progress that a caller gave, by default one that nothing keeps; InputError if it is none."""
    if not isinstance(given, Progress | None):
        raise InputError(f"progress must be a Progress, got {type(given).__name__}")
    return given or Progress(None)


def windows(tokens: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, first, end) of each window: tokens first..end-1 are scored, given begin..first-1.

    >>> windows(10, window=4, stride=3)
    [(0, 1, 4), (3, 4, 7), (6, 7, 10)]
    """
    found = []
    end = 0
    for begin in range(0, tokens, stride):
        first, end = max(end, begin + 1), min(begin + window, tokens)
        if first < end:
            found.append((begin, first, end))
        if end == tokens:
            break
    return found


def check_cut(n_ctx: int, window: int | None, stride: int | None) -> tuple[int, int]:
    """Window and stride in tokens, as `TextScoring` takes them; InputError if they are out of range."""
    window = n_ctx if window is None else whole_number("window", window, 0)
    if not 2 <= window <= n_ctx:
        raise InputError(f"window must be in 2..{n_ctx} (n_ctx), got {window}")
    stride = window // 2 if stride is None else whole_number("stride", stride, 0)
    if not 1 <= stride <= window:
        raise InputError(f"stride must be in 1..{window} (window), got {stride}")
    return window, stride


def check_text(ids: Sequence[int]) -> None:
    """InputError for a text in which there is nothing to score."""
    if len(ids) < 2:
        raise InputError(f"a text needs two tokens, of which the second is scored; this one has {len(ids)}")


def score_windows(model: GPT2, ids: Sequence[int] | Array, group: Sequence[tuple[int, int, int]]) -> list[float]:
    """The log-likelihood of each of some windows of a text, which are run together: an exact sum over its tokens."""
    rows = [(ids[begin:end], first - begin) for begin, first, end in group]
    return [math.fsum(logs) for logs, _ in predictions(model, rows)]


class TextScoring:
    """Scores one text, batch after batch of windows.

    Parameters
    ----------
    model : GPT2
    text : str
    window : int, optional
        Tokens that a prediction may look at, itself included; at most (and by default) n_ctx.
    stride : int, optional
        Tokens from window to window; at most window, by default half of it.
    batch_size : int
        Windows that are run together.
    tokenizer : tokenizers.Tokenizer, optional
        Default: the one beside the model.
    progress : Progress, optional
        Where finished windows are kept and looked for.

    Raises
    ------
    InputError, TokenizerError, TokenRangeError
        If an argument is out of range, there is no tokenizer, or the text has fewer than two tokens.

    Examples
    --------
    >>> import gpt2np
    >>> from gpt2np.score import TextScoring
    >>> scoring = TextScoring(gpt2np.load(), "Once upon a time there was a king.")
    >>> for scored in scoring: pass
    >>> scoring.result.scored == scoring.result.tokens - 1
    True
    """

    def __init__(
        self,
        model: GPT2,
        text: str,
        window: int | None = None,
        stride: int | None = None,
        batch_size: int = 8,
        tokenizer: tokenizers.Tokenizer | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.window, self.stride = check_cut(model.config.n_ctx, window, stride)
        self._model = model
        self._batch_size = whole_number("batch_size", batch_size, 1)
        self._tokenizer = _tokenizer(model, tokenizer)
        self._ids = encode_for(model.config.vocab_size, self._tokenizer, text)
        check_text(self._ids)
        self._windows = windows(len(self._ids), self.window, self.stride)
        self._progress = _progress(progress)
        self._key = self._progress.key(model, self._ids[: self.window], text, self.window, self.stride)
        self._done: list[float] = self._progress.get(self._key)  # log-likelihood of each finished window

    @property
    def total(self) -> int:
        """Number of tokens to score."""
        return self._scored(len(self._windows))

    @property
    def done(self) -> int:
        """Of these, how many have been scored, in this run or in one that is gone on with."""
        return self._scored(len(self._done))

    def __iter__(self) -> Iterator[int]:
        """Run what is left; yields after each batch the number of tokens that it scored."""
        try:
            while (start := len(self._done)) < len(self._windows):
                group = self._windows[start : start + self._batch_size]
                self._done += score_windows(self._model, self._ids, group)
                self._progress.put(self._key, self._done)
                yield sum(end - first for _, first, end in group)
        finally:
            self._progress.put(self._key, self._done, now=True)

    @property
    def result(self) -> Score:
        """The score of the windows that are done: of the whole text, or of its beginning."""
        end = self._windows[len(self._done) - 1][2] if self._done else 0
        text = decode(self._tokenizer, self._ids[:end])
        return Score(
            tokens=end,
            scored=self._scored(len(self._done)),
            words=len(text.split()),
            bytes=len(text.encode()),
            log_likelihood=math.fsum(self._done),
        )

    def _scored(self, count: int) -> int:
        return sum(end - first for _, first, end in self._windows[:count])


class LastWordScoring:
    """Scores the last words of passages, as LAMBADA does (Paperno et al. 2016).

    The last word, with the space before it, is what is predicted; the passage before is given. Passages longer
    than the context lose their beginning.

    Parameters
    ----------
    model : GPT2
    passages : sequence of str
    batch_size, tokenizer, progress
        As for `TextScoring`.

    Raises
    ------
    InputError
        If there is no passage, or one has a single word.
    """

    def __init__(
        self,
        model: GPT2,
        passages: Sequence[str],
        batch_size: int = 8,
        tokenizer: tokenizers.Tokenizer | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._model = model
        self._batch_size = whole_number("batch_size", batch_size, 1)
        tokenizer = _tokenizer(model, tokenizer)
        passages = strings("passages", passages)
        if not passages:
            raise InputError("there is no passage")
        self._rows = []
        V = model.config.vocab_size
        for i, passage in enumerate(passages, 1):
            place = f"passage {i} of {len(passages)}"
            given, word = last_word(passage, place)
            target = encode_for(V, tokenizer, f" {word}")
            if len(target) >= model.config.n_ctx:
                raise InputError(f"the last word of {place} has {len(target)} tokens, n_ctx is {model.config.n_ctx}")
            ids = [*encode_for(V, tokenizer, given), *target][-model.config.n_ctx :]
            self._rows.append((ids, len(ids) - len(target)))
        self._rows.sort(key=lambda row: len(row[0]))  # little padding
        self._progress = _progress(progress)
        self._key = self._progress.key(model, self._rows[-1][0], *passages)
        self._done: list[tuple[float, bool]] = self._progress.get(self._key)

    @property
    def total(self) -> int:
        """Number of passages."""
        return len(self._rows)

    @property
    def done(self) -> int:
        """Of these, how many have been scored, in this run or in one that is gone on with."""
        return len(self._done)

    def __iter__(self) -> Iterator[int]:
        """Run what is left; yields after each batch its number of passages."""
        try:
            while (start := len(self._done)) < len(self._rows):
                group = self._rows[start : start + self._batch_size]
                self._done += [(math.fsum(logs), bool(best.all())) for logs, best in predictions(self._model, group)]
                self._progress.put(self._key, self._done)
                yield len(group)
        finally:
            self._progress.put(self._key, self._done, now=True)

    @property
    def outcomes(self) -> list[tuple[float, bool]]:
        """Of each passage that is done its last word's log-likelihood, and whether it was guessed; shortest first."""
        return self._done

    @property
    def result(self) -> LastWords:
        """The score of the passages that are done, which are the shortest ones while there are others."""
        return LastWords(
            len(self._done), sum(right for _, right in self._done), math.fsum(log for log, _ in self._done)
        )


def last_word(passage: str, place: str) -> tuple[str, str]:
    """What is given of a passage, and its last word; InputError, which `place` begins, if it has a single word."""
    *_, word = passage.split() or [""]
    given = passage.rstrip().removesuffix(word).rstrip()
    if not given:
        raise InputError(f"{place} has no words before its last one: {passage[:60]!r}")
    return given, word


def read_passages(text: str) -> list[str]:
    """The "text" of each line of a JSON Lines file, as in LAMBADA's; InputError for one with a single word."""
    passages = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                passage = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                passage = None
            if not isinstance(passage, str):
                raise InputError(f'line {number} is not a JSON object with a "text": {line[:60]!r}')
            last_word(passage, f"line {number}")
            passages.append(passage)
    return passages


def predictions(model: GPT2, rows: Sequence[tuple[Sequence[int] | Array, int]]) -> list[tuple[Array, Array]]:
    """What a model predicts for the ends of some sequences; a beginning that all share is run once.

    Parameters
    ----------
    rows : sequence of (ids, first)
        Tokens first..len(ids)-1 of each are looked at; first >= 1.

    Returns
    -------
    list of (log-probabilities float64 (n,), bool (n,))
        Of each token looked at, and whether none is more probable.
    """
    T = max(len(ids) for ids, _ in rows) - 1  # the last token is only predicted
    inputs = np.zeros((len(rows), T), np.int64)  # padding on the right is seen by nothing that is looked at
    targets = np.zeros((len(rows), T), np.int64)
    for row, (ids, _) in enumerate(rows):
        inputs[row, : len(ids) - 1] = ids[:-1]
        targets[row, : len(ids) - 1] = ids[1:]
    logs = np.zeros((len(rows), T))
    best = np.zeros((len(rows), T), bool)

    start = min(first for _, first in rows) - 1
    step = max(1, CHUNK // (len(rows) * model.config.vocab_size))
    cache = model.new_cache(len(rows), T)
    if start:
        _read_beginning(model, inputs[:, :start], cache)
    for begin in range(start, T, step):
        part = slice(begin, begin + step)
        logits = model(inputs[:, part], cache=cache).logits  # (B, step, V)
        assert logits is not None
        found = model.log_probabilities(logits, targets[:, part, None])
        logs[:, part], best[:, part] = (each[..., 0] for each in found)
    return [
        (logs[i, first - 1 : len(ids) - 1], best[i, first - 1 : len(ids) - 1]) for i, (ids, first) in enumerate(rows)
    ]


def _read_beginning(model: GPT2, ids: Array, cache: KVCache) -> None:
    """Run ids (B, T), those that all rows begin with only once."""
    same = (ids == ids[:1]).all(axis=0)
    common = len(same) if same.all() else int(same.argmin())
    if len(ids) > 1 and common and model.exact_in_parts:
        alone = model.new_cache(1, common)
        model(ids[:1, :common], cache=alone, logits=False)
        cache.fill(alone)
    if cache.length < ids.shape[1]:
        model(ids[:, cache.length :], cache=cache, logits=False)


def _tokenizer(model: GPT2, given: tokenizers.Tokenizer | None) -> tokenizers.Tokenizer:
    found = chosen_tokenizer(given, model.tokenizer)
    if found is None:
        raise TokenizerError(f"a text needs a tokenizer; {HOW_TO_GET_ONE}")
    return found
