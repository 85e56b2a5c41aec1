"""GPT2: a model that is ready to run, with either engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np

from . import reference
from .cache import KVCache
from .config import GPT2Config
from .errors import ContextOverflowError, InputError, ModelFileError, TokenRangeError, WeightError
from .weights import Array, GPT2Weights, WeightSources, assemble, weight_shapes

if TYPE_CHECKING:
    import tokenizers

    from .generate import Step
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
        What the graph said, see `onnx/recognise.py`.

    Raises
    ------
    InputError
        If engine or dtype is not one of those above.
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
    ) -> None:
        if engine not in ("numba", "numpy"):
            raise InputError(f'engine must be "numba" or "numpy", got {engine!r}')
        if dtype not in ("float32", "float64"):
            raise InputError(f'dtype must be "float32" or "float64", got {dtype!r}')
        check_sources(config, sources)
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
            Called with every intermediate result in order; the names are listed in docs/taps.md.
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
            more positions than n_ctx or the cache's max_length.
        """
        config = self.config
        ids = check_ids(input_ids, config)
        B, T = ids.shape
        if cache is None:
            cache = self.new_cache(B, T)
        start = cache.length
        self._check_cache(cache, B, T)
        positions = check_positions(position_ids, config, B, T, start)
        mask = additive_mask(attention_mask, config, B, T, start + T, self.dtype)
        types = None if token_type_ids is None else check_ids(token_type_ids, config)
        if types is not None and types.shape != (B, T):
            raise InputError(f"token_type_ids must have the shape of input_ids, ({B}, {T}), got {types.shape}")

        # The compiled kernels are the fast path for a call without `tap`; with one they stop at every tap.
        watch = reference.no_tap if tap is None else tap
        kernels, w = self._kernels, self._weights
        if isinstance(mask, ReplacingMask) or (mask is not None and np.isnan(mask).any()):
            kernels, w = reference, self.weights
        scores = None
        # A NaN or infinity in the weights shows in the result; NumPy's warnings would say it once for each operation.
        with np.errstate(invalid="ignore", over="ignore"):
            if types is not None:  # the rows of both, summed, in the place of wpe
                rows = kernels.embed(types, positions, w.wte, w.wpe).reshape(B * T, -1)
                w, positions = w._replace(wpe=rows), np.arange(B * T).reshape(B, T)
            hidden = kernels.transformer(ids, positions, w, cache.layers, start, mask, watch)
            cache.advance(T)
            if logits:
                last = hidden[:, -1:] if logits == "last" else hidden
                scores = kernels.logits(last, w.lm_head, w.lm_head_bias, watch)
        return Output(hidden, scores, cache.views())

    def next_logits(self, tokens: Sequence[int], cache: KVCache) -> Array:
        """Run one new position of each row; the scores of what follows, (B, V).

        The same as `self([[t] for t in tokens], cache, logits="last").logits[:, 0]`, for loops: what such a call
        does for any input, and what it returns besides, takes a noticeable part of the time of a single token.

        Raises
        ------
        TokenRangeError, InputError, ContextOverflowError
            As a call does.
        """
        ids = np.array(tokens)[:, None]
        if ids.dtype.kind not in "iu" or min(tokens) < 0 or max(tokens) >= self.config.vocab_size:
            check_ids(ids, self.config)
        B, start = len(ids), cache.length
        self._check_cache(cache, B, 1)
        positions = check_positions(None, self.config, B, 1, start)
        if additive_mask(None, self.config, B, 1, start + 1, self.dtype) is not None:  # an unusual graph
            logits = self(ids, cache, logits="last").logits
            assert logits is not None
            return logits[:, 0]
        w = self._weights
        with np.errstate(invalid="ignore", over="ignore"):
            hidden = self._kernels.transformer(ids, positions, w, cache.layers, start)
            cache.advance(1)
            scores: Array = self._kernels.logits(hidden, w.lm_head, w.lm_head_bias)
        return scores[:, 0]

    def _check_cache(self, cache: KVCache, B: int, T: int) -> None:
        """Raise unless the cache is of this model's form and T new positions of B rows fit in."""
        config = self.config
        L, _, held, H, _, D = cache.array.shape
        made_for = held, cache.array.dtype, L, H, D
        wanted = B, self.dtype, config.n_layer, config.n_head, config.head_size
        if made_for != wanted:
            form = "batch {}, {}, {} layers, {} heads of {}"
            raise InputError(f"the cache was made for {form.format(*made_for)}; needed: {form.format(*wanted)}")
        if cache.length + T > config.n_ctx:
            raise ContextOverflowError(
                f"{T} new positions after {cache.length} cached ones exceed the model's n_ctx of {config.n_ctx}"
            )
        cache.check_room(T)

    def trace(self, input_ids: Any, **kwargs: Any) -> dict[str, Array]:
        """Every intermediate result of one call, {tap name: array}, in the order of computation."""
        taps: dict[str, Array] = {}
        self(input_ids, tap=lambda name, value: taps.__setitem__(name, np.array(value)), **kwargs)
        return taps

    def generate(self, prompt: Any, max_new_tokens: int | None = 64, **options: Any) -> Iterator[Step]:
        """Continue a text or token ids, one step at a time; see `gpt2np.generate.generate` for the options."""
        from .generate import generate

        return generate(self, prompt, max_new_tokens=max_new_tokens, **options)

    def __repr__(self) -> str:
        c = self.config
        return (
            f"GPT2({str(self.path) if self.path else 'from arrays'}: L={c.n_layer} H={c.n_head} C={c.n_embd} "
            f"V={c.vocab_size} n_ctx={c.n_ctx}, engine={self.engine}, {self.dtype})"
        )


def check_sources(config: GPT2Config, sources: Mapping[str, Any]) -> None:
    """Raise WeightError unless every weight of the config is there in its shape."""
    shapes = weight_shapes(config)
    if "lm_head.bias" in sources:
        shapes["lm_head.bias"] = (config.vocab_size,)
    for name, shape in shapes.items():
        if name not in sources:
            raise WeightError(f"weight {name} {shape} is missing")
        if tuple(sources[name].shape) != shape:
            raise WeightError(f"weight {name} has shape {tuple(sources[name].shape)}, expected {shape}")
    for name in sources:
        if name not in shapes:
            raise WeightError(f"weight {name} {tuple(sources[name].shape)} is left over: no place for it in this GPT-2")


def check_ids(input_ids: Any, config: GPT2Config) -> Array:
    """Token ids of any accepted rank as a checked int64 array (B, T)."""
    ids = np.asarray(input_ids)
    if ids.dtype.kind not in "iu":
        raise InputError(f"input_ids must be integers, got dtype {ids.dtype}")
    if ids.ndim not in (1, 2, 3):
        raise InputError(f"input_ids must have shape (T,), (B, T) or (d1, d2, T), got {ids.shape}")
    if ids.size == 0:
        raise InputError(f"input_ids must hold at least one token, got shape {ids.shape}")
    values = ids.ravel().tolist()  # faster than NumPy for one token, and next to nothing beside the work for many
    if min(values) < 0 or max(values) >= config.vocab_size:
        where = np.argwhere((ids < 0) | (ids >= config.vocab_size))[0]
        raise TokenRangeError(
            f"token id {int(ids[tuple(where)])} at {tuple(map(int, where))} is outside 0..{config.vocab_size - 1}"
        )
    if ids.shape[-1] > config.n_ctx:
        raise ContextOverflowError(f"{ids.shape[-1]} positions exceed the model's n_ctx of {config.n_ctx}")
    return np.ascontiguousarray(ids.reshape(-1, ids.shape[-1]), np.int64)


def check_positions(position_ids: Any, config: GPT2Config, B: int, T: int, start: int) -> Array:
    """Rows of wpe for each new position: int64 (B, T)."""
    if position_ids is None:
        low = start + config.position_offset
        high = low + T - 1
        rows = np.arange(low, high + 1)[None].repeat(B, axis=0)
    else:
        rows = np.asarray(position_ids)
        if rows.dtype.kind not in "iu" or rows.size == 0 or rows.shape[-1] != T or rows.size not in (T, B * T):
            raise InputError(f"position_ids must be integers ({B}, {T}), got {rows.dtype} {rows.shape}")
        rows = np.broadcast_to(rows.reshape(-1, T), (B, T)).astype(np.int64) + config.position_offset
        low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= config.n_ctx:
        raise ContextOverflowError(f"positions {low}..{high} outside 0..{config.n_ctx - 1}")
    return rows


NEGLIGIBLE = -9000.0  # a score that much below others has probability exp(-9000) = 0, in float64 too


@dataclass(frozen=True, eq=False)
class ReplacingMask:
    """A mask that takes the place of scores where `keep` is False, and is added to them elsewhere.

    Only `scores + mask` means this; it is for graphs whose replaced scores can be noticed in the result, which
    the compiled kernels leave to the textbook. (So they do NaN in a mask, which also hidden keys pass on.)
    """

    keep: Array  # (B, 1, T, S), bool
    mask: Array  # (B, 1, T, S)
    __array_ufunc__: ClassVar[None] = None  # so that NumPy leaves `scores + self` to __radd__

    def __radd__(self, scores: Array) -> Array:
        return np.where(self.keep, scores, 0) + self.mask


def additive_mask(
    attention_mask: Any, config: GPT2Config, B: int, T: int, S: int, dtype: np.dtype[Any]
) -> Array | ReplacingMask | None:
    """What is added to the scores, (B, 1, T, S), or None where that is the causal mask alone.

    It is what the file's graph does, as the config describes it, with -inf for every hidden score that cannot
    be noticed in the result. A row of -inf alone gives zeros.
    """
    plain = config.mask_kind != "none" and config.mask_value < NEGLIGIBLE and config.causal_shift == 0
    if plain and attention_mask is None:
        return None
    padded = np.zeros((B, 1, 1, S), bool)
    bias: Array | None = None
    if attention_mask is not None:
        given = np.asarray(attention_mask)
        shapes = [(B, S)] + [(b, 1, t, S) for b in (1, B) for t in (1, T)]
        if given.dtype.kind not in "iufb" or given.shape not in shapes:
            raise InputError(
                f"attention_mask must be numbers ({B}, {S}) or ({B}, 1, {T}, {S}), got {given.dtype} {given.shape}"
            )
        plain = plain and given.ndim == 2
        if given.ndim == 4 and given.dtype.kind == "f":
            bias = given
        else:
            padded = given == 0 if given.ndim == 4 else (given == 0)[:, None, None, :]
    if plain and not padded.any():
        return None
    later = np.arange(S) > np.arange(S - T, S)[:, None] + config.causal_shift  # (T, S)
    if config.mask_kind == "none" or (config.mask_kind == "given" and attention_mask is not None and given.ndim == 4):
        later = np.zeros_like(later)
    factor, mask = np.ones((B, 1, T, S)), np.zeros((B, 1, T, S))
    for where, (f, added) in (
        (later & ~padded, (float(config.mask_kind == "added"), config.mask_value)),
        (padded & ~later, config.padding),
        (padded & later, config.padding_later),
    ):
        where = np.broadcast_to(where, mask.shape)
        factor[where], mask[where] = f, added
    if bias is not None:
        mask += bias
    hidden = (later | padded | (mask < NEGLIGIBLE)) & np.ones_like(mask, bool)
    blind = hidden.all(axis=-1, keepdims=True) & np.ones_like(hidden)
    unseen = blind if bias is None else blind & np.isneginf(mask).all(axis=-1, keepdims=True)
    if config.blind_rows == "zeros":
        mask[unseen] = -np.inf
    elif config.blind_rows == "nan":
        mask[unseen] = np.nan
    elif config.blind_rows == "unmasked":
        factor[unseen], mask[unseen] = 1, 0
    mask[~blind & (mask < NEGLIGIBLE)] = -np.inf
    mask[np.isfinite(mask) & (mask < -1e300)] = np.finfo(dtype).min  # the lowest number in a float64 file
    with np.errstate(over="ignore"):  # twice float32's lowest number is -inf, in the graph too
        mask = mask.astype(dtype)
    keep = (factor == 1) | np.isinf(mask) | (mask < -1e30)  # a score vanishes beside such a number
    return mask if keep.all() else ReplacingMask(keep, mask)


def weights_folder() -> Path:
    """The folder with the embedded model and the manifest: in the installed package, or in the clone."""
    installed = Path(__file__).parent / "_weights"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "weights"


def embedded_model_path() -> Path:
    """The embedded model's file, weights/mini/model.onnx."""
    return weights_folder() / "mini" / "model.onnx"


def load(path: str | Path | None = None, engine: str = "numba", dtype: str = "float32") -> GPT2:
    """Load a GPT-2 from an ONNX file.

    Parameters
    ----------
    path : path, optional
        A model.onnx, or a folder with one in it. Default: the embedded model.
    engine : "numba" or "numpy"
        The compiled kernels, or the textbook.
    dtype : "float32" or "float64"
        float64 is the oracle.

    Raises
    ------
    ModelFileError
        If there is no such file, or it is not a readable ONNX model.
    UnsupportedModelError, WeightError
        If the graph is not a GPT-2 that can be placed, or a weight is missing, left over or misshapen.

    Examples
    --------
    >>> import gpt2np
    >>> model = gpt2np.load(engine="numpy")
    >>> model([[1, 2, 3]]).last_hidden_state.shape[:2]
    (1, 3)
    """
    place = embedded_model_path() if path is None else Path(path)
    if not place.exists():
        raise ModelFileError(f"{place}: no such file or folder")

    from .onnx.read.reader import open_model
    from .onnx.recognise import recognise

    file = open_model(place)
    recognised = recognise(file)
    return GPT2(recognised.config, recognised.sources, engine, dtype, file.path, recognised)
