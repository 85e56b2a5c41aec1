"""GPT2: a model that is ready to run, with either engine.

`load` makes one from a file. A call of it is checked (`call.py`), given a mask (`masks.py`) and a cache (`cache.py`),
and run by the textbook (`reference.py`) or by its compiled twins (`kernels/`): the same numbers up to rounding.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Unpack

import numpy as np

from . import reference
from .arguments import as_path, one_of
from .cache import FORM, KVCache, as_cache
from .call import Call, check_positions, check_scores, check_tokens, checked_call
from .config import GPT2Config
from .errors import ContextOverflowError, InputError, ModelFileError, TokenizerError, UnsupportedModelError
from .masks import SafeScores, ScoresReachMask, mask_for
from .paths import embedded_model_path
from .quantised import rounded
from .weights import Array, GPT2Weights, WeightSources, assemble, check_sources

if TYPE_CHECKING:
    import tokenizers

    from .decoding import Decoder, Step
    from .generate import GenerateOptions
    from .onnx.recognise import Recognised


class Output(NamedTuple):
    """What one call of a model returns."""

    last_hidden_state: Array  # (B, T, C), after ln_f
    logits: Array | None  # (B, T, V); (B, 1, V) with logits="last"; None with logits=False
    past: list[Array]  # L views into the cache, (2, B, H, S, D): [0] keys, [1] values


class GPT2:
    """A GPT-2 with its weights in memory.

    Parameters
    ----------
    config : GPT2Config
    sources : mapping of name to WeightSource
        Every weight of `weights.weight_shapes(config)`, and "lm_head.bias" if the head has one.
    engine : "numba" or "numpy"
        The compiled kernels, or the textbook in `reference.py`.
    dtype : "float32" or "float64"
        float64 makes the model an oracle: the error of a float32 run can be measured against it.
    path : Path, optional
        The file that the weights come from; a tokenizer is looked for beside it.
    recognised : optional
        What the graph said, see `onnx/recognise/`.
    weights : one of `quantised.FORMS`, optional
        See `load`.

    Raises
    ------
    InputError
        If engine, dtype or weights is not one of those above.
    WeightError
        If a weight is missing or does not have the shape that the config asks for.
    """

    def __init__(
        self,
        config: GPT2Config,
        sources: WeightSources,
        engine: str = "numba",
        dtype: str = "float32",
        path: Path | None = None,
        recognised: Recognised | None = None,
        weights: str | None = None,
    ) -> None:
        one_of("engine", engine, ("numba", "numpy"))
        one_of("dtype", dtype, ("float32", "float64"))
        check_sources(config, sources)
        if weights is not None:
            sources = rounded(sources, weights)
        self.rounded_to = weights
        self.config = config
        self.engine = engine
        self.dtype = np.dtype(dtype)
        self.path = path
        self.recognised = recognised
        self._sources = sources
        self._head_bias = "lm_head.bias" in sources
        if engine == "numba":
            from . import kernels

            self._kernels: ModuleType = kernels
            self._weights = assemble(config, kernels.pack(sources, self.dtype).__getitem__, self._head_bias)
        else:
            self._kernels = reference
            self._weights = self.weights

    @cached_property
    def weights(self) -> GPT2Weights:
        """The weights as plain arrays under OpenAI's names.

        The numba engine keeps its own packed copy only, so with it the first use reads the file again.
        """
        return assemble(
            self.config,
            lambda name: np.ascontiguousarray(self._sources[name].load(), self.dtype),
            self._head_bias,
        )

    @cached_property
    def tokenizer(self) -> tokenizers.Tokenizer | None:
        """The tokenizer that lies beside the model's file, or None."""
        from . import tokenizer

        return None if self.path is None else tokenizer.find_beside(self.path)

    def new_cache(self, batch_size: int = 1, max_length: int | None = None) -> KVCache:
        """An empty KVCache for `batch_size` sequences of up to `max_length` (default n_ctx) positions."""
        return KVCache(self.config, batch_size, max_length, self.dtype)

    def __call__(
        self,
        input_ids: Any,
        cache: KVCache | None = None,
        tap: reference.Tap | None = None,
        logits: bool | Literal["last"] = True,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        token_type_ids: Array | None = None,
    ) -> Output:
        """Run T new positions after those that the cache holds.

        Parameters
        ----------
        input_ids : integers (T,), (B, T) or (d1, d2, T)
            Token ids, each in 0..V-1; the zoo's two batch dimensions become B = d1 * d2.
        cache : KVCache, optional
            From `new_cache`; the new keys and values are added to it. Without one, nothing came before.
        tap : callable (name, array), optional
            Called with every intermediate result in order; the names are listed in docs/taps.md. Where scores come
            near the file's mask value, the numba engine begins anew with the textbook, and with the first name.
        logits : bool or "last"
            Whether to compute the scores over the vocabulary, for all new positions or for the last one.
        attention_mask : integers (B, S), or integers or floats (B, 1, T, S), optional
            1 for keys that may be attended to, 0 for padding, over cached and new positions, or for each query.
            Floats for each query are added to its scores.
        position_ids : integers (B, T), optional
            Rows of wpe; default the positions after those in the cache.
        token_type_ids : integers (B, T), optional
            Rows of wte that are added to the embeddings, as Hugging Face's GPT2Model does.

        Raises
        ------
        InputError, TokenRangeError, ContextOverflowError
            Before any work is done: an input of the wrong type or shape, an id or position out of range, or
            more positions than n_ctx or the cache's max_length. What `tap` raises is raised, with the cache as it was.
        """
        call = checked_call(
            self.config,
            input_ids,
            start=0 if cache is None else as_cache(cache).length,
            attention_mask=attention_mask,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
        )
        return self.run(call, cache, tap, logits)

    def run(
        self,
        call: Call,
        cache: KVCache | None = None,
        tap: reference.Tap | None = None,
        logits: bool | Literal["last"] = True,
    ) -> Output:
        """What `__call__` does with a call that is checked already; without a cache, `call.past` came before.

        Raises
        ------
        InputError, ContextOverflowError
            Before any work is done: the cache is not of this model's form, or has no room; tap or logits is none.
        """
        (B, T), start = call.input_ids.shape, call.start
        if not (tap is None or callable(tap)):
            raise InputError(f"tap must be a function of a name and an array, got {tap!r:.60}")
        one_of("logits", logits, (True, False, "last"))
        if cache is None:
            cache = self._filled_cache(call)
        self._check_cache(cache, B, T)
        rule, hidden = self.config.mask, call.attention_mask
        watch = reference.no_tap if tap is None else tap
        if self.engine == "numba":
            mask = mask_for(rule, hidden, B, T, start + T, self.dtype)
            if mask is None or mask.is_additive:
                safe = rule.safe_scores(hidden, self.dtype)
                # without a tap the compiled kernels are at their fastest; with one they stop at every tap
                with suppress(ScoresReachMask):
                    return self._computed(self._kernels, self._weights, call, cache, logits, mask, watch, safe)
        mask = mask_for(rule, hidden, B, T, start + T, self.dtype, whole=rule.can_be_noticed(hidden))
        textbook = reference if self.engine == "numba" else self._kernels
        try:
            return self._computed(textbook, self.weights, call, cache, logits, mask or reference.causal_mask, watch)
        except ScoresReachMask:
            values = ", ".join(f"{value:g}" for value in (rule.value, *rule.others))
            raise UnsupportedModelError(
                f"scores come near the numbers that hide keys ({values}): what the file does there is not computed"
            ) from None

    def _computed(
        self, kernels: ModuleType, w: GPT2Weights, call: Call, cache: KVCache, logits: bool | Literal["last"], *how: Any
    ) -> Output:
        """Run the functions of `reference.py`, or their twins; how: mask, tap, and what `transformer` takes besides."""
        (B, T), start = call.input_ids.shape, call.start
        positions, scores = call.position_ids, None
        # A NaN or infinity in the weights shows in the result; NumPy's warnings would say it once for each operation.
        with np.errstate(invalid="ignore", over="ignore"):
            if call.token_type_ids is not None:  # the rows of both, summed, in the place of wpe
                rows = kernels.embed(call.token_type_ids, positions, w.wte, w.wpe).reshape(B * T, -1)
                w, positions = w._replace(wpe=rows), np.arange(B * T).reshape(B, T)
            hidden = kernels.transformer(call.input_ids, positions, w, cache.layers, start, *how)
            if logits:
                last = hidden[:, -1:] if logits == "last" else hidden
                scores = kernels.logits(last, w.lm_head, w.lm_head_bias, how[1])
        cache.advance(T, start)  # only now: a call that fails leaves the cache as it was
        return Output(hidden, scores, cache.views())

    def _filled_cache(self, call: Call) -> KVCache:
        """A cache that holds the call's past, with room for its new positions."""
        B, T = call.input_ids.shape
        cache = self.new_cache(B, call.start + T)
        for layer, pair in zip(cache.layers, call.past or (), strict=call.past is not None):
            for held, past in zip(layer, pair, strict=True):  # keys, values
                held[:, :, : call.start] = past
        cache.advance(call.start)
        return cache

    def next_logits(self, tokens: Sequence[int], cache: KVCache) -> Array:
        """Run one new position of each row; the scores of what follows, (B, V).

        The same as `self([[t] for t in tokens], cache, logits="last").logits[:, 0]`, for loops: what such a call
        does for any input, and what it returns besides, takes a noticeable part of the time of a single token.

        Raises
        ------
        TokenRangeError, InputError, ContextOverflowError
            As a call does.
        """
        ids = check_tokens(tokens, self.config, "tokens", {1: "(B,)"})[:, None]
        scores = self._causal_logits(ids, cache)
        if scores is None:
            scores = self(ids, cache, logits="last").logits
            assert scores is not None
        return scores[:, 0]

    def logits_of_each(self, tokens: Sequence[int], cache: KVCache) -> Array | None:
        """Run T new positions of one row; the scores of what follows each, (T, V).

        They are, bit for bit, what `next_logits` gives for one token after the other. None, and nothing done, where
        that cannot be promised: scores near a file's mask value are left to the textbook, whose last bits depend on T.

        Raises
        ------
        TokenRangeError, InputError, ContextOverflowError
            As a call does.
        """
        ids = check_tokens(tokens, self.config, "tokens", {1: "(T,)"})
        scores = self._causal_logits(ids[None], cache)
        return None if scores is None else scores[0]

    def _causal_logits(self, ids: Array, cache: KVCache) -> Array | None:
        """Run ids (B, T) by the kernels and the causal mask; the scores (B, T, V), None where that is not enough."""
        B, T = ids.shape
        self._check_cache(cache, B, T)
        start = cache.length
        positions = check_positions(None, self.config, B, T, start)
        if self.engine == "numba" and self.config.mask.is_causal:
            layers, safe = cache.layers, self._safe_scores
            try:
                scores: Array = self._kernels.causal_logits(ids, positions, self._weights, layers, start, safe)
            except ScoresReachMask:
                return None
            cache.advance(T, start)
            return scores
        return None

    def log_probabilities(self, scores: Array, targets: Array) -> tuple[Array, Array]:
        """What scores (..., V) say of tokens (..., n); `score` and the steps of `generate` have the same bits.

        Returns
        -------
        natural logarithms of probabilities, float64 (..., n); bool (..., n): whether no token has a higher score

        Raises
        ------
        TokenRangeError, InputError
            If the tokens are none of this model, or the shapes or the scores' dtype are others.
        """
        checked = check_scores(scores, targets, self.config, self.dtype)
        found: tuple[Array, Array] = self._kernels.log_probabilities(*checked)
        return found

    @cached_property
    def _safe_scores(self) -> SafeScores:
        return self.config.mask.safe_scores(None, self.dtype)

    def _check_cache(self, cache: KVCache, B: int, T: int) -> None:
        """Raise unless the cache is of this model's form and T new positions of B rows fit in; make it writable."""
        config = self.config
        made_for = as_cache(cache).batch_size, *cache.form
        wanted = B, self.dtype, config.n_layer, config.n_head, config.head_size
        if made_for != wanted:
            form = f"batch {{}}, {FORM}"
            raise InputError(f"the cache was made for {form.format(*made_for)}; needed: {form.format(*wanted)}")
        if cache.length + T > config.n_ctx:
            raise ContextOverflowError(
                f"{T} new positions after {cache.length} cached ones exceed the model's n_ctx of {config.n_ctx}"
            )
        cache.check_room(T)
        cache.make_writable()

    @property
    def exact_in_parts(self) -> bool:
        """Whether a position's numbers depend on nothing that is run along with it, nor on what comes later."""
        return self.engine == "numba" and self.config.mask.is_causal

    def encode(self, text: str) -> list[int]:
        """The token ids of a text; "<|endoftext|>" in it is text like any other.

        Raises
        ------
        TokenizerError, TokenRangeError
            There is no tokenizer beside the model, or it is another model's.
        """
        from .tokenizer import encode_for

        return encode_for(self.config.vocab_size, self._tokenizer(), text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, special tokens included.

        Raises
        ------
        TokenizerError, InputError, TokenRangeError
            There is no tokenizer beside the model; the ids are no integers, or outside 0..V-1.
        """
        from .prompts import prompt_ids
        from .tokenizer import decode

        tokenizer = self._tokenizer()
        try:
            given = list(ids)
        except TypeError:
            raise InputError(f"expected token ids, got {type(ids).__name__}") from None
        return decode(tokenizer, prompt_ids([given], self.config.vocab_size, None)[0]) if given else ""

    def _tokenizer(self) -> tokenizers.Tokenizer:
        from .tokenizer import HOW_TO_GET_ONE

        if self.tokenizer is None:
            raise TokenizerError(f"there is no tokenizer beside {self.path or 'a model from arrays'}; {HOW_TO_GET_ONE}")
        return self.tokenizer

    def trace(
        self,
        input_ids: Any,
        cache: KVCache | None = None,
        logits: bool | Literal["last"] = True,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        token_type_ids: Array | None = None,
    ) -> dict[str, Array]:
        """Every intermediate result of one call, {tap name: array}, in the order of computation.

        `input_ids` may be a text; all else is as in a call.
        """
        taps: dict[str, Array] = {}
        if isinstance(input_ids, str):
            input_ids = self.encode(input_ids)

        def tap(name: str, value: Array) -> None:
            taps[name] = np.array(value)

        self(input_ids, cache, tap, logits, attention_mask, position_ids, token_type_ids)
        return taps

    def decoder(
        self, rows: int, window: int | None = None, cache: KVCache | None = None, lookup: bool = False
    ) -> Decoder:
        """What `generate` runs its texts with, see `decoding.LanguageModel`."""
        from .decoding import SeparateCaches, SharedCache

        if cache is not None:
            self._check_cache(cache, 1, 1)
        # With the numpy engine a row's last bits depend on how many rows BLAS multiplies at once.
        if lookup and self.engine != "numba":
            raise InputError('lookup needs engine="numba": with numpy, drafts would change the last bits of the scores')
        if rows > 1 and cache is None and self.engine == "numba":
            return SharedCache(self, window)
        if lookup:
            from .drafts import Drafter, DraftingCache

            lengths = 1, 3, self._kernels.ROWS - 1  # the last one fills a tile
            return DraftingCache(self, window, cache, Drafter(lengths))
        return SeparateCaches(self, window, cache)

    def generate(
        self, prompt: Any, max_new_tokens: int | None = 64, **options: Unpack[GenerateOptions]
    ) -> Iterator[Step]:
        """Continue a text or token ids, one step at a time; see `gpt2np.generate.generate` for the options."""
        from .generate import generate

        return generate(self, prompt, max_new_tokens=max_new_tokens, **options)

    def __repr__(self) -> str:
        c = self.config
        return (
            f"GPT2({str(self.path) if self.path else 'from arrays'}: L={c.n_layer} H={c.n_head} C={c.n_embd} "
            f"V={c.vocab_size} n_ctx={c.n_ctx}, engine={self.engine}, {self.dtype}{self._kept()})"
        )

    def _kept(self) -> str:
        """What the matrices were rounded to, or which of them the kernels keep in fewer bits."""
        if self.rounded_to is not None:
            return f", weights rounded to {self.rounded_to}"
        w = self._weights
        matrices = [w.wte, *w.block_matrices, *([] if self.config.tied else [w.lm_head])]
        forms = [getattr(matrix, "form", "") for matrix in matrices]
        counts = {form: forms.count(form) for form in ("bfloat16", "float16", "int8", "int4") if form in forms}
        return "".join(
            f", weights in {form}" if count == len(forms) else f", {count} of {len(forms)} matrices in {form}"
            for form, count in counts.items()
        )


def load(
    path: str | Path | None = None, engine: str = "numba", dtype: str = "float32", weights: str | None = None
) -> GPT2:
    """Load a GPT-2 from an ONNX file.

    Parameters
    ----------
    path : path, optional
        A model.onnx, or a folder with one in it. Default: the embedded model.
    engine : "numba" or "numpy"
        The compiled kernels, or the textbook.
    dtype : "float32" or "float64"
        float64 is the oracle.
    weights : "float32", "bfloat16", "float16", "int8" or "int4", optional
        What the matrices are rounded to, and kept in by the kernels; both engines then compute with the rounded
        numbers. Scales and rounding: `quantised.py`. Default: the file's numbers, in as few bits as hold them all.

    Raises
    ------
    InputError
        If engine, dtype or weights is none of these, or path is no path, or empty.
    ModelFileError
        If there is no such file, or it is not a readable ONNX model.
    UnsupportedModelError, WeightError
        If the graph is not a GPT-2 that can be placed, or a weight is missing, left over or misshapen, or is not
        finite where it is to be rounded.

    Examples
    --------
    >>> import gpt2np
    >>> model = gpt2np.load(engine="numpy")
    >>> model([[1, 2, 3]]).last_hidden_state.shape[:2]
    (1, 3)
    """
    place = embedded_model_path() if path is None else as_path(path)
    if not place.exists():
        raise ModelFileError(f"{place}: no such file or folder")

    from .onnx.read.reader import open_model
    from .onnx.recognise import recognise

    with _collector_paused():
        file = open_model(place)
        recognised = recognise(file)
        return GPT2(recognised.config, recognised.sources, engine, dtype, file.path, recognised, weights)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Python's cycle collector off: most of what imports and loading make stays, and it would search it many times."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
