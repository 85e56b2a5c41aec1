"""The search that a file holds, run around the GPT-2 that it holds.

A Loop of plain operators is run as it stands: its nodes one by one, but those of the GPT-2, in whose place the model
is called. ONNX Runtime's search nodes are written out here, as onnxruntime/contrib_ops/cpu/transformers has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import InputError, UnsupportedModelError
from .onnx.evaluate.evaluator import Evaluator
from .onnx.evaluate.operators import OPERATORS
from .onnx.graph import Graph
from .onnx.normalise.build import build_graph
from .onnx.recognise.recognised import Recognised
from .onnx.recognise.search import SEARCH_INPUTS, SEARCH_OUTPUTS, Search
from .weights import Array

Decode = Callable[[Mapping[str, Array]], dict[str, Array]]  # the decoder's outputs for its inputs, by their names
LOWEST = np.finfo(np.float32).min
WIDEST = 128  # beams; ONNX Runtime takes no more
MODULUS = 2**31 - 1  # of std::minstd_rand0


def _known(graph: Graph) -> Graph:
    """The graph, if every node of it can be run.

    Raises
    ------
    UnsupportedModelError
        A node has an operator that is not known.
    """
    strange = next((node for node in graph.nodes if node.op not in OPERATORS), None)
    if strange is not None:
        raise UnsupportedModelError(f"{strange.describe()} around the GPT-2: gpt2np does not know what it means here")
    return graph


class SearchRunner:
    """Runs a file's search: the file's inputs to its outputs, by a function that runs the decoder inside.

    Raises
    ------
    UnsupportedModelError
        Where the search has a part that is not known.
    """

    def __init__(self, recognised: Recognised) -> None:
        assert recognised.search is not None
        self.search: Search = recognised.search
        self.decoder = recognised
        self.around = _known(build_graph(self.search.around))
        self.step = None
        if self.search.body is not None:
            self.step = _known(build_graph(self.search.body.step))
        elif "filtered_logits" in {port.role for port in self.search.outputs}:
            raise UnsupportedModelError(f"{self.search.kind} node: gpt2np does not give its output filtered_logits")
        elif self.search.kind == "Sampling" and any(
            self.search.attribute(n, 0) for n in ("custom", "presence_penalty")
        ):
            raise UnsupportedModelError(
                f"Sampling node {self.search.node.name!r}: gpt2np does not know `custom` and `presence_penalty`"
            )
        elif recognised.lengths or any(p.role in ("beam_width", "cache_indirection") for p in recognised.inputs):
            raise UnsupportedModelError(
                f"{self.search.kind} node {self.search.node.name!r}: its decoder shares one buffer between the past "
                "and the new positions; gpt2np runs such a decoder by itself, not the search around it"
            )

    def run(self, feeds: Mapping[str, Array], decode: Decode) -> dict[str, Array]:
        """Every output of the file, by name."""
        before = Evaluator(self.around, dict(feeds))
        node = self.search.node
        given = [before(name) if name else None for name in node.input]
        if self.step is not None:
            found = dict(zip(node.output, self._loop(given, decode), strict=True))
        else:
            names = SEARCH_INPUTS[self.search.kind]
            made = self._node(dict(zip(names, given, strict=False)), decode)
            found = {
                name: made[role]
                for role, name in zip(SEARCH_OUTPUTS[self.search.kind], node.output, strict=False)
                if name
            }
        after = Evaluator(self.around, {**feeds, **found})
        return {port.name: after(port.name).astype(port.dtype) for port in self.search.outputs}

    # -------------------------------------------------------------------------------------------------------- Loop
    def _loop(self, given: Sequence[Array | None], decode: Decode) -> list[Array]:
        """What a Loop gives: its carried values after the last turn."""
        body = self.search.body
        assert body is not None
        assert self.step is not None
        turns = None if given[0] is None else int(given[0].reshape(-1)[0])
        going = given[1] is None or bool(given[1].all())
        state: list[Any] = list(given[2:])
        ports = {port.name: port.dtype for port in self.decoder.inputs}
        n = 0
        while going and (turns is None or n < turns):
            start = dict(zip(body.carried, state, strict=True))
            start |= {body.number: np.asarray(n, np.int64), body.condition[0]: np.asarray(going)}
            turn = Evaluator(self.step, start)
            turn.values |= decode({name: turn(name).astype(ports[name]) for name in body.fed if name in ports})
            state = [turn(name) for name in body.given]
            going, n = bool(turn(body.condition[1]).all()), n + 1
        return state

    # ------------------------------------------------------------------------------------------------ search nodes
    def _node(self, given: Mapping[str, Array | None], decode: Decode) -> dict[str, Array]:
        settings = Settings.of(self.search, given, self.decoder.config.n_ctx)
        model = _Decoder(decode, self.decoder, settings)
        if self.search.kind == "BeamSearch":
            return beam_search(settings, model)
        choose = Sampler(self.search, given) if self.search.kind == "Sampling" else _most_likely
        return one_by_one(settings, model, choose)


@dataclass
class Settings:
    """What a search node is told, checked."""

    ids: Array  # (B, T)
    keep: Array  # (B, T), what of the prompts is no padding
    max_length: int
    min_length: int
    beams: int
    returned: int
    length_penalty: float
    repetition_penalty: float
    no_repeat: int  # tokens of which no run comes twice, or 0
    early_stopping: bool
    eos: int
    pad: int
    vocab_mask: Array | None  # (V,), 0 for tokens that must not come
    first_mask: Array | None  # (B, V), the same for the first new token

    @classmethod
    def of(cls, search: Search, given: Mapping[str, Array | None], n_ctx: int) -> Settings:
        """The inputs and attributes of a search node.

        Raises
        ------
        InputError
            A number is out of its range, or an array of another shape.
        """

        def number(name: str, default: float, low: float = -np.inf, high: float = np.inf) -> Any:
            value = given.get(name)
            found = default if value is None or not value.size else value.reshape(-1)[0].item()
            if not low <= found <= high:
                raise InputError(f"{name} is {found}; expected {low:g} to {high:g}")
            return found

        ids = given["input_ids"]
        if ids is None or ids.ndim != 2 or not ids.size:
            raise InputError(f"input_ids must be (B, T), got {None if ids is None else ids.shape}")
        T = ids.shape[1]
        pad = int(search.attribute("pad_token_id", -1))
        mask = given.get("attention_mask")
        if mask is not None and mask.shape != ids.shape:
            raise InputError(f"attention_mask must be {ids.shape}, got {mask.shape}")
        max_length = number("max_length", 4096, T + 1, n_ctx + 1)
        beams = number("num_beams", 1, 1, WIDEST)
        return cls(
            ids.astype(np.int64),
            (ids != pad) if mask is None else mask != 0,
            max_length,
            number("min_length", 0, 0, max_length - 1),
            beams,
            number("num_return_sequences", 1, 1, beams),
            number("length_penalty", 1.0),
            number("repetition_penalty", 1.0, 1e-6),
            int(search.attribute("no_repeat_ngram_size", 0)),
            bool(search.attribute("early_stopping", 0)),
            int(search.attribute("eos_token_id", -1)),
            pad,
            given.get("vocab_mask"),
            given.get("prefix_vocab_mask"),
        )

    def judged(self, scores: Array, sequences: Array, first: bool) -> Array:
        """Scores (R, V) of the token after each of R sequences (R, S), with what is unwanted made unlikely."""
        scores = scores.copy()
        R, S = sequences.shape
        rows = np.arange(R)[:, None]
        if self.repetition_penalty != 1:
            penalty = np.float32(self.repetition_penalty)
            found = scores[rows, sequences]
            with np.errstate(over="ignore"):  # the least likely of all, as in ONNX Runtime
                scores[rows, sequences] = np.where(found < 0, found * penalty, found / penalty)
        if 0 < self.no_repeat <= S:
            n = self.no_repeat - 1
            for row, sequence in enumerate(sequences):
                last = sequence[S - n :]
                again = [sequence[j + n] for j in range(S - n) if np.array_equal(sequence[j : j + n], last)]
                scores[row, again] = LOWEST
        if self.vocab_mask is not None:
            scores[:, self.vocab_mask == 0] = LOWEST
        if self.first_mask is not None and first:
            scores[np.repeat(self.first_mask == 0, R // len(self.first_mask), axis=0)] = LOWEST
        if self.min_length > S and 0 <= self.eos < scores.shape[1]:
            scores[:, self.eos] = LOWEST
        return scores


class _Decoder:
    """The GPT-2 of a search node, which keeps the past of each sequence."""

    def __init__(self, decode: Decode, found: Recognised, settings: Settings) -> None:
        self.decode, self.found = decode, found
        self.keep = settings.keep
        self.next = np.maximum(np.cumsum(self.keep, axis=1) - 1, 0) * self.keep  # positions (R, T)
        config = found.config
        empty = (len(self.keep), config.n_head, 0, config.head_size)
        self.past: dict[tuple[str, int | None], Array] = {}
        for port in found.inputs:
            if port.role.startswith("past"):
                shape = (2, *empty) if port.role == "past" else empty
                self.past[port.role, port.layer] = np.zeros(shape, port.dtype)

    def __call__(self, ids: Array) -> Array:
        """float32 scores (R, V) of the token after each sequence, whose new tokens are `ids` (R, T)."""
        plain = {"input_ids": ids, "position_ids": self.next, "attention_mask": self.keep}
        feeds = {
            port.name: (plain[port.role] if port.role in plain else self.past[port.role, port.layer]).astype(port.dtype)
            for port in self.found.inputs
        }
        made = self.decode(feeds)
        for port in self.found.outputs:
            if port.role.startswith("present"):
                self.past[port.role.replace("present", "past"), port.layer] = made[port.name]
        logits = next(made[p.name] for p in self.found.outputs if p.role in ("logits", "last_logits"))
        self.next = self.keep.sum(axis=1, keepdims=True)
        self.keep = np.pad(self.keep, [(0, 0), (0, 1)], constant_values=True)
        scores: Array = logits.reshape(len(ids), -1, logits.shape[-1])[:, -1].astype(np.float32)
        return scores

    def choose(self, rows: Array) -> None:
        """Go on with these of the sequences, (R',)."""
        self.keep, self.next = self.keep[rows], self.next[rows]
        self.past = {
            (role, layer): np.take(past, rows, axis=int(role == "past")) for (role, layer), past in self.past.items()
        }


def _log_softmax(logits: Array) -> Array:
    low = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(low - np.log(np.exp(low).sum(axis=-1, keepdims=True)))


@dataclass
class _Hypotheses:
    """The best finished continuations of one prompt: (score, tokens), the best first."""

    room: int
    length_penalty: float
    kept: list[tuple[float, Array]] = field(default_factory=list)
    done: bool = False

    def add(self, tokens: Array, log_prob: float) -> None:
        score = self._judged(log_prob, len(tokens))
        at = next((k for k, (other, _) in enumerate(self.kept) if score > other), len(self.kept))
        self.kept.insert(at, (score, tokens))
        del self.kept[self.room :]

    def can_improve(self, log_prob: float, length: int) -> bool:
        return self.kept[-1][0] < self._judged(log_prob, length)

    def _judged(self, log_prob: float, length: int) -> float:
        """As ONNX Runtime's float32 has it: a power may be infinite or 0, and a judgement then 0 or minus infinity."""
        with np.errstate(all="ignore"):
            return float(np.float32(log_prob) / np.float32(np.float64(length) ** self.length_penalty))


def beam_search(settings: Settings, model: _Decoder) -> dict[str, Array]:
    """ONNX Runtime's BeamSearch: "sequences" (B, R, max_length), "sequences_scores" (B, R), and each step's "scores".

    A continuation is judged by its log-probability / length ** length_penalty, the prompt counted in its length.
    """
    (B, T), W = settings.ids.shape, settings.beams
    logits = np.repeat(model(settings.ids), W, axis=0)  # (BW, V)
    model.choose(np.repeat(np.arange(B), W))
    V = logits.shape[-1]
    sequences = np.repeat(settings.ids, W, axis=0)
    totals = np.where(np.arange(B * W) % W == 0, 0, -1e9).astype(np.float32)
    finished = [_Hypotheses(W, settings.length_penalty) for _ in range(B)]
    steps = np.zeros((settings.max_length - T, B, W, V), np.float32)
    while True:
        S = sequences.shape[1]
        scores = settings.judged(_log_softmax(logits), sequences, S == T) + totals[:, None]
        steps[S - T] = scores.reshape(B, W, V)
        rows, tokens, totals = _best(scores.reshape(B, W * V), V, sequences, finished, settings)
        sequences = np.concatenate([sequences[rows], tokens[:, None]], axis=1)
        if all(f.done for f in finished) or S + 1 == settings.max_length:
            break
        model.choose(rows)
        logits = model(tokens[:, None])
    for b, kept in enumerate(finished):
        if not kept.done:
            for w in range(W):
                kept.add(sequences[b * W + w], float(totals[b * W + w]))
    found = np.full((B, settings.returned, settings.max_length), settings.pad, np.int64)
    judged = np.zeros((B, settings.returned), np.float32)
    for b, kept in enumerate(finished):
        for r, (score, tokens) in enumerate(kept.kept[: settings.returned]):
            found[b, r, : len(tokens)] = tokens
            judged[b, r] = score
    return {"sequences": found, "sequences_scores": judged, "scores": steps}


def _best(
    scores: Array, V: int, sequences: Array, finished: Sequence[_Hypotheses], settings: Settings
) -> tuple[Array, Array, Array]:
    """For each beam of the next step its row among the beams of this one, its token, and its log-probability: (BW,)."""
    W, S = settings.beams, sequences.shape[1]
    chosen: list[tuple[int, int, float]] = []
    for b, row in enumerate(scores):
        order = np.argsort(-row, kind="stable")[: 2 * W]
        if finished[b].done:
            chosen += [(b * W, settings.pad, 0.0)] * W
            continue
        following: list[tuple[int, int, float]] = []
        for rank, index in enumerate(order):
            beam, token = b * W + int(index) // V, int(index) % V
            if token == settings.eos:
                if rank < W:
                    finished[b].add(sequences[beam], float(row[index]))
            else:
                following.append((beam, token, float(row[index])))
            if len(following) == W:
                break
        chosen += following
        if len(finished[b].kept) == W:
            best = float(row[order[0]])
            finished[b].done = settings.early_stopping or not finished[b].can_improve(best, S)
    rows, tokens, totals = zip(*chosen, strict=True)
    return np.array(rows), np.array(tokens), np.array(totals, np.float32)


def one_by_one(settings: Settings, model: _Decoder, choose: Callable[[Array], Array]) -> dict[str, Array]:
    """ONNX Runtime's GreedySearch and Sampling: "sequences" (B, max_length), padded from the token on that ends one."""
    B, T = settings.ids.shape
    found = np.full((B, settings.max_length), settings.pad, np.int64)
    found[:, :T] = settings.ids
    over = np.zeros(B, bool)
    tokens = settings.ids
    for S in range(T, settings.max_length):
        chosen = choose(settings.judged(model(tokens), found[:, :S], S == T))
        over |= chosen == settings.eos
        found[:, S] = np.where(over, settings.pad, chosen)
        if over.all():
            break
        tokens = found[:, S : S + 1]
    return {"sequences": found}


def _most_likely(scores: Array) -> Array:
    return scores.argmax(axis=-1)


class Sampler:
    """Draws tokens as ONNX Runtime's Sampling does, from its seed on.

    Random numbers are those of std::default_random_engine and std::uniform_real_distribution in GNU's C++ library,
    with which ONNX Runtime is built for Linux; elsewhere it draws other ones. (Where all sequences end before
    max_length, it leaves the rest of its output undefined; here that is padding.)
    """

    def __init__(self, search: Search, given: Mapping[str, Array | None]) -> None:
        self.temperature = np.float32(search.attribute("temperature", 1.0))
        self.top_p = np.float32(search.attribute("top_p", 0.0))
        self.filtered = np.float32(search.attribute("filter_value", -1e20))
        self.kept = int(search.attribute("min_tokens_to_keep", 0))
        seed = given.get("seed")
        self.state = (0 if seed is None else int(seed.reshape(-1)[0])) % MODULUS or 1

    @np.errstate(over="ignore")  # of scores that forbid a token, which are as low as float32 goes
    def __call__(self, scores: Array) -> Array:
        """One token for each row of scores (B, V); InputError where these cannot be divided by so low a temperature."""
        scores = scores / self.temperature if self.temperature > 0 else scores.copy()
        if not np.isfinite(scores.max(axis=-1)).all():
            raise InputError(f"a temperature of {self.temperature:g} makes scores beyond the numbers of float32")
        tokens = []
        for row in scores:
            order = np.argsort(row, kind="stable")  # the least likely first
            running = np.cumsum(np.exp(_log_softmax(row[order])), dtype=np.float32)
            count = max(1, len(row) - self.kept)
            row[order[:count][running[:count] <= 1 - self.top_p]] = self.filtered
            weights = np.cumsum(np.exp(row.astype(np.float64) - float(row.max())))
            tokens.append(int(np.searchsorted(weights, self._uniform() * weights[-1], side="right")))
        return np.array(tokens)

    def _uniform(self) -> float:
        """A number in [0, 1) of two draws, each in 0..MODULUS - 2."""
        span = float(MODULUS - 1)
        draws = []
        for _ in range(2):
            self.state = self.state * 16807 % MODULUS
            draws.append(self.state - 1)
        return (draws[0] + draws[1] * span) / (span * span)
