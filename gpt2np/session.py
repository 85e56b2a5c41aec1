"""ONNX Runtime's calling convention over gpt2np's own engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .cache import KVCache
from .call import check_ids, check_positions
from .errors import ContextOverflowError, InputError
from .model import GPT2
from .onnx.recognise.masks import per_query
from .weights import Array

if TYPE_CHECKING:
    from .onnx.emulate.literal import Emulation, Literally
    from .onnx.recognise import Port, Recognised


class NodeArg:
    """One input or output as the file declares it; the same fields as onnxruntime.NodeArg."""

    def __init__(self, port: Port) -> None:
        self.name = port.name
        self.type = f"tensor({_ONNX_TYPES.get(port.dtype.name, port.dtype.name)})"
        self.shape: list[int | str | None] = list(port.shape)

    def __repr__(self) -> str:
        return f"NodeArg(name={self.name!r}, type={self.type!r}, shape={self.shape})"


_ONNX_TYPES = {"float32": "float", "float64": "double"}
LOGITS = {"logits", "last_logits"}
USUAL_OUTPUTS = LOGITS | {"last_hidden_state", "present", "present_key", "present_value"}


class InferenceSession:
    """Runs a GPT-2 file with the names, ranks, order and types that the file itself declares.

    A drop-in for onnxruntime.InferenceSession where a GPT-2 is run on the CPU.

    Parameters
    ----------
    path : path
        A model.onnx, or a folder with one in it.
    engine : "numba" or "numpy"
        The compiled kernels, or the textbook.
    dtype : "float32" or "float64"
        What is computed in; outputs have the file's own types.
    emulate_rounding : bool, "saturating", "optimised" or "unrounded"
        Instead of computing with the file's exact weights, run its nodes one by one in NumPy as ONNX Runtime does
        without optimisations, rounding included: activations to 8 bits where a quantised file asks for it, results
        to float16 in a float16 file. Slow; it shows how much of a difference to ONNX Runtime such rounding explains.
        "saturating": as on an x86 CPU with AVX2 but without VNNI, where sums of two products of uint8 with int8
        saturate at 16 bits: ONNX Runtime's outputs of int8 files differ by much more between CPUs than by rounding.
        "optimised": as with its optimisations, by which products with 4- and 8-bit weights behind DequantizeLinear
        round activations to 8 bits.
        "unrounded": node by node, too, but nothing is rounded.

    Raises
    ------
    ModelFileError, UnsupportedModelError, WeightError
        As `gpt2np.load` does.

    Examples
    --------
    >>> import gpt2np, numpy as np
    >>> from gpt2np.paths import embedded_model_path
    >>> session = gpt2np.InferenceSession(embedded_model_path(), engine="numpy")
    >>> session.get_inputs()[0].name
    'input1'
    >>> session.run(["output1"], {"input1": np.array([[[1, 2, 3]]])})[0].shape[:3]
    (1, 1, 3)
    """

    def __init__(
        self,
        path: str | Path,
        engine: str = "numba",
        dtype: str = "float32",
        emulate_rounding: Literally = False,
    ) -> None:
        from .onnx.emulate.literal import Emulation
        from .onnx.read.reader import open_model
        from .onnx.recognise import recognise

        file = open_model(path)
        self._recognised = recognise(file)
        self.model = GPT2(self._recognised.config, self._recognised.sources, engine, dtype, file.path, self._recognised)
        self._literally = partial(Emulation, file, way=emulate_rounding) if emulate_rounding else None
        self._emulations: dict[str, Emulation] = {}  # by the branch that is taken

    def get_inputs(self) -> list[NodeArg]:
        """The file's inputs, in its order."""
        return [NodeArg(port) for port in self._recognised.inputs]

    def get_outputs(self) -> list[NodeArg]:
        """The file's outputs, in its order."""
        return [NodeArg(port) for port in self._recognised.outputs]

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any]) -> list[Array]:
        """Compute outputs from inputs.

        Parameters
        ----------
        output_names : names or None
            The outputs wanted, in this order; None (or nothing) for all.
        input_feed : {name: array}
            Every input that the file declares, of its type and rank.

        Raises
        ------
        InputError, TokenRangeError, ContextOverflowError
            Before any work: an unknown output; an input that is missing, unknown, or of the wrong type, rank or
            shape; a token id or position out of range; more positions than n_ctx.
        """
        outputs = {port.name: port for port in self._recognised.outputs}
        wanted = list(output_names) if output_names else list(outputs)
        for name in wanted:
            if name not in outputs:
                raise InputError(f"no output {name!r}; this file's outputs are {', '.join(outputs)}")
        feeds = self._checked_feeds(input_feed)
        config = self.model.config

        given_ids = self._fed(feeds, "input_ids")
        assert given_ids is not None
        ids = check_ids(given_ids, config)
        B, T = ids.shape
        cache = self._cache(feeds, B, T)
        P = cache.length
        attention_mask = given_mask(self._recognised, feeds, B, T, P + T)
        position_ids = self._position_ids(feeds, attention_mask, B, T, P)

        if self._literally is not None:
            switch = self._fed(feeds, "use_cache_branch")
            branch = "" if switch is None else "then" if switch.all() else "else"
            if branch not in self._emulations:
                self._emulations[branch] = self._literally(branch)
            evaluator = self._emulations[branch].evaluator(feeds)
            return [np.ascontiguousarray(evaluator(name), outputs[name].dtype) for name in wanted]

        roles = {outputs[name].role for name in wanted}
        tapped: dict[str, Array] = {}  # further outputs: hidden states of the layers, attention probabilities
        tap = (lambda n, v: tapped.update({n: np.array(v)} if n in roles else {})) if roles - USUAL_OUTPUTS else None
        types = self._fed(feeds, "token_type_ids")
        out = self.model(ids, cache, tap, bool(roles & LOGITS), attention_mask, position_ids, types)

        def value(port: Port) -> Array:
            if port.role in LOGITS:
                assert out.logits is not None
                logits = self._with_head_padding(out.logits, out.last_hidden_state)
                if port.role == "last_logits":
                    return logits[:, -1:] if len(port.shape) == 3 else logits[:, -1]
                return in_rank_of(port, logits)
            if port.role == "last_hidden_state":
                return in_rank_of(port, out.last_hidden_state)
            if port.layer is None:
                return in_rank_of(port, tapped[port.role])
            past = out.past[port.layer]
            present = past if port.role == "present" else past[int(port.role == "present_value")]
            return present if self._recognised.graph is None else self._in_buffer(port, present, feeds, P)

        def in_rank_of(port: Port, array: Array) -> Array:
            if array.ndim == 3 and len(port.shape) == given_ids.ndim + 1:  # the zoo's two batch axes, or none
                return array.reshape(*given_ids.shape, array.shape[-1])
            return array

        return [np.ascontiguousarray(value(outputs[name]), outputs[name].dtype) for name in wanted]

    @cached_property
    def _head_padding(self) -> Array | None:
        """The head's rows beyond the vocabulary, (E, C)."""
        source = self._recognised.head_padding
        return None if source is None else source.load().astype(self.model.dtype)

    def _with_head_padding(self, logits: Array, hidden: Array) -> Array:
        """(B, T, V) -> (B, T, V + E), where the file's head has rows that stand for no token."""
        if self._head_padding is None:
            return logits
        return np.concatenate([logits, hidden @ self._head_padding.T], axis=-1)

    def _checked_feeds(self, input_feed: Mapping[str, Any]) -> dict[str, Array]:
        """The inputs as arrays: each that is declared, no other, of the declared type, rank and fixed sizes."""
        ports = {port.name: port for port in self._recognised.inputs}
        missing = [name for name in ports if name not in input_feed]
        unknown = [name for name in input_feed if name not in ports]
        if missing or unknown:
            parts = [f"missing: {', '.join(missing)}"] * bool(missing) + [f"unknown: {', '.join(unknown)}"] * bool(
                unknown
            )
            raise InputError(f"wrong input names ({'; '.join(parts)}); this file's inputs are {', '.join(ports)}")
        feeds = {}
        for name, port in ports.items():
            array = np.asarray(input_feed[name])
            expected = f"{port.dtype} [{', '.join('?' if s is None else str(s) for s in port.shape)}]"
            given = f"{array.dtype} {list(array.shape)}"
            if array.dtype != port.dtype or array.ndim != len(port.shape):
                raise InputError(f"input {name!r}: got {given}, expected {expected}")
            if any(isinstance(s, int) and s != n for s, n in zip(port.shape, array.shape, strict=True)):
                raise InputError(f"input {name!r}: got {given}, expected {expected}")
            feeds[name] = array
        return feeds

    def _fed(self, feeds: Mapping[str, Array], role: str, layer: int | None = None) -> Array | None:
        """The input of this role, or None where the file has none."""
        return next((feeds[p.name] for p in self._recognised.inputs if (p.role, p.layer) == (role, layer)), None)

    def _cache(self, feeds: Mapping[str, Array], B: int, T: int) -> KVCache:
        """A cache with room for the new positions, filled with the past that was fed."""
        config = self.model.config
        pasts = [port for port in self._recognised.inputs if port.role.startswith("past")]
        switch = self._fed(feeds, "use_cache_branch")
        if switch is not None and not switch.all():
            pasts = []  # the branch of a merged decoder that looks at no past
        held = feeds[pasts[0].name].shape[-2] if pasts else 0
        count = self._recognised.past_length(feeds, T) if pasts else None
        P = held if count is None else count
        if P > held:
            raise InputError(f"the past inputs hold {held} positions; {P} are asked for")
        if P + T > held and "cached_length" in self._recognised.lengths.values():
            raise InputError(f"the past inputs hold {held} positions: behind {P} there is no room for {T} new ones")
        for port in pasts:
            expected = (*(2,) * (port.role == "past"), B, config.n_head, held, config.head_size)
            if feeds[port.name].shape != expected:
                raise InputError(
                    f"input {port.name!r}: got shape {feeds[port.name].shape}, expected {expected} "
                    f"for a batch of {B} after {P} cached positions"
                )
        if P + T > config.n_ctx:
            raise ContextOverflowError(
                f"{T} new positions after {P} cached ones exceed the model's n_ctx of {config.n_ctx}"
            )
        beams = self._beams(feeds, B, P)
        cache = self.model.new_cache(B, P + T)
        for port in pasts:
            assert port.layer is not None
            layer = cache.layers[port.layer]
            part = layer if port.role == "past" else layer[int(port.role == "past_value")]
            part[..., :P, :] = feeds[port.name][..., :P, :] if beams is None else feeds[port.name][..., *beams, :]
        cache.advance(P)
        return cache

    def _beams(self, feeds: Mapping[str, Array], B: int, P: int) -> tuple[Array, Array, Array] | None:
        """Which sequence, head and position of the past each sequence, head and position sees, (B, H, P).

        In a beam search cache_indirection (B / W, W, M) says in which of the W beams of its group a past token lies.
        """
        table, width = self._fed(feeds, "cache_indirection"), self._fed(feeds, "beam_width")
        if table is None:
            return None
        W = 1 if width is None else int(width.ravel()[0])
        fits = W > 0 and table.shape[:2] == (B // W, W) and B % W == 0 and table.shape[2] >= P
        if not fits or (table < 0).any() or (table >= W).any():
            raise InputError(f"cache_indirection {table.shape} does not name beams of {B} sequences, {W} to a group")
        rows = np.arange(B)[:, None] // W * W + table.reshape(B, -1)[:, :P]
        return rows[:, None], np.arange(self.model.config.n_head)[:, None], np.arange(P)

    def _in_buffer(self, port: Port, present: Array, feeds: Mapping[str, Array], P: int) -> Array:
        """The buffer of the past with the new positions' keys or values written into it."""
        role, S = port.role.replace("present", "past"), present.shape[-2]
        past = self._fed(feeds, role, port.layer)
        assert past is not None
        if past.shape[-2] < S:
            return present
        buffer = np.array(past)
        buffer[..., P:S, :] = present[..., P:, :]
        if "total_sequence_length" in self._recognised.lengths.values():
            buffer[..., S:, :] = 0  # so does ONNX Runtime's GroupQueryAttention
        return buffer

    def _position_ids(self, feeds: Mapping[str, Array], mask: Array | None, B: int, T: int, P: int) -> Array | None:
        """Rows of wpe, where they do not simply follow the cached ones."""
        if self._recognised.positions.startswith("mask") and mask is not None:
            return self._recognised.positions_from_mask(mask)[:, P:]
        given = self._fed(feeds, "position_ids")
        if given is not None:
            check_positions(given, self.model.config, B, T, P)
        return given


def given_mask(recognised: Recognised, feeds: Mapping[str, Array], B: int, T: int, S: int) -> Array | None:
    """The attention_mask among a file's inputs as GPT2 takes it, or None.

    Raises
    ------
    InputError
        If it has not an element for each cached and new position, or says neither 0 nor 1.
    """
    for port in recognised.inputs:
        if port.role not in ("attention_mask", "attention_bias"):
            continue
        given = feeds[port.name]
        cut = recognised.mask_cut
        sizes: dict[int, tuple[int, ...]] = {2: (B, S), 3: (B, T, S), 4: (B, 1, T, S)}
        fits = all(n in (1, size) for n, size in zip(given.shape[:-1], sizes[given.ndim][:-1], strict=True))
        if cut and given.shape[-2] >= S and given.shape[-1] >= S:
            mask = per_query(given, T, S, cut)
        elif not cut and fits and given.shape[-1] == S and (given.ndim > 2 or given.shape == (B, S)):
            mask = given if given.ndim == 2 else per_query(given, T, S, cut)
        else:
            what = "at least a row and a column for each of the" if cut else f"expected {sizes[given.ndim]}:"
            raise InputError(f"input {port.name!r}: got shape {given.shape}, {what} cached and new positions")
        if port.role == "attention_bias":
            return mask if mask.ndim == 4 else mask[:, None, None, :]
        if mask.dtype.kind == "f" and not np.isin(mask, (0, 1)).all():
            raise InputError(f"input {port.name!r} says 1 for keys that are seen and 0 for others; got other numbers")
        return mask if mask.ndim == 2 else mask != 0
    return None
