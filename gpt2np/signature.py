"""A file's own inputs and outputs, and what the model takes and gives for them: one reading, for session and debugger.

Files differ in the names, ranks and types of what they take; in whether there is a past and where its length
stands; in what a mask looks like and who counts positions. All of it is read here into a `Call`, and the model's
`Output` is laid out here as the file's outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from .arguments import strings
from .call import Call, as_rectangle, check_ids, checked_call
from .errors import InputError
from .onnx.recognise.masks import per_query
from .weights import Array

if TYPE_CHECKING:
    from .model import Output
    from .onnx.recognise import Port, Recognised

Feeds = Mapping[str, Array]
LOGITS = {"logits", "last_logits"}
USUAL_OUTPUTS = LOGITS | {"last_hidden_state", "present", "present_key", "present_value"}


def checked_feeds(ports: Sequence[Port], given: Mapping[str, Any]) -> dict[str, Array]:
    """The inputs as arrays: each that is declared, no other, of the declared type, rank and fixed sizes.

    Raises
    ------
    InputError
        An input is missing or unknown, or of another type, rank or size.
    """
    if not isinstance(given, Mapping):
        raise InputError(f"expected a dictionary of inputs by name, got {type(given).__name__}")
    names = {port.name for port in ports}
    missing = [port.name for port in ports if port.name not in given]
    unknown = [str(name) for name in given if name not in names]
    if missing or unknown:
        parts = [f"{what}: {', '.join(some)}" for what, some in (("missing", missing), ("unknown", unknown)) if some]
        known = ", ".join(port.name for port in ports)
        raise InputError(f"wrong input names ({'; '.join(parts)}); this file's inputs are {known}")
    feeds = {}
    for port in ports:
        array = as_rectangle(f"input {port.name!r}", given[port.name])
        expected = f"{port.dtype} [{', '.join('?' if s is None else str(s) for s in port.shape)}]"
        told = f"{array.dtype} {list(array.shape)}"
        if array.dtype != port.dtype or array.ndim != len(port.shape):
            raise InputError(f"input {port.name!r}: got {told}, expected {expected}")
        if any(isinstance(s, int) and s != n for s, n in zip(port.shape, array.shape, strict=True)):
            raise InputError(f"input {port.name!r}: got {told}, expected {expected}")
        feeds[port.name] = array
    return feeds


def wanted_outputs(ports: Sequence[Port], names: Sequence[str] | None) -> list[Port]:
    """The outputs of these names, in their order; all for None or nothing.

    Raises
    ------
    InputError
        There is no output of a name; or these are no names.
    """
    names = () if names is None else strings("output_names", names)
    outputs = {port.name: port for port in ports}
    for name in names:
        if name not in outputs:
            raise InputError(f"no output {name!r}; this file's outputs are {', '.join(outputs)}")
    return [outputs[name] for name in names] if names else list(ports)  # a file may list one of them twice


class Signature:
    """What a recognised GPT-2's inputs and outputs mean."""

    def __init__(self, recognised: Recognised) -> None:
        self.recognised = recognised

    # ------------------------------------------------------------------------------------------------------ inputs
    def fed(self, feeds: Feeds, role: str, layer: int | None = None) -> Array | None:
        """The input of this role, or None where the file has none or it was not given."""
        ports = self.recognised.inputs
        return next((feeds.get(p.name) for p in ports if (p.role, p.layer) == (role, layer)), None)

    def call(self, feeds: Feeds) -> Call:
        """What the model takes for these inputs.

        Negative token ids and positions are counted from the end, as ONNX's Gather does.

        Raises
        ------
        InputError, TokenRangeError, ContextOverflowError
            No token ids are given; an id or position is out of range; an input's shape does not fit the others.
        """
        config = self.recognised.config
        given = self.fed(feeds, "input_ids")
        if given is None:
            raise InputError(f"no token ids among the inputs {sorted(feeds)}")
        ids = check_ids(self._rows(given, "input_ids", config.vocab_size), config)
        B, T = ids.shape
        P, past = self._past(feeds, B, T)
        mask = self._mask(feeds, B, T, P + T)
        types = self.fed(feeds, "token_type_ids")
        return checked_call(
            config,
            ids,
            start=P,
            past=past,
            attention_mask=mask,
            position_ids=self._positions(feeds, mask, P),
            token_type_ids=None if types is None else self._rows(types, "token_type_ids", config.vocab_size),
        )

    def _past(self, feeds: Feeds, B: int, T: int) -> tuple[int, list[tuple[Array, Array]] | None]:
        """P, and L x (keys, values), each (B, H, P, D)."""
        config, recognised = self.recognised.config, self.recognised
        pasts = [p for p in recognised.inputs if p.role.startswith("past") and p.name in feeds]
        switch = self.fed(feeds, "use_cache_branch")
        if not pasts or (switch is not None and not switch.all()):  # the branch that looks at no past
            return 0, None
        held = feeds[pasts[0].name].shape[-2]
        count = recognised.past_length(feeds, T)
        P = held if count is None else count
        if P > held:
            raise InputError(f"the past inputs hold {held} positions; {P} are asked for")
        if P + T > held and "cached_length" in recognised.lengths.values():
            raise InputError(f"the past inputs hold {held} positions: behind {P} there is no room for {T} new ones")
        for port in pasts:
            expected = (*(2,) * (port.role == "past"), B, config.n_head, held, config.head_size)
            if feeds[port.name].shape != expected:
                raise InputError(
                    f"input {port.name!r}: got shape {feeds[port.name].shape}, expected {expected} "
                    f"for a batch of {B} after {P} cached positions"
                )
        beams = self._beams(feeds, B, P)
        found: dict[tuple[int, int], Array] = {}  # by layer; keys 0, values 1
        for port in pasts:
            assert port.layer is not None
            given = feeds[port.name]
            value = given[..., :P, :] if beams is None else given[..., *beams, :]
            parts = value if port.role == "past" else [value]
            first = int(port.role == "past_value")
            found |= {(port.layer, first + k): part for k, part in enumerate(parts)}
        lacking = next(((i, k) for i in range(config.n_layer) for k in (0, 1) if (i, k) not in found), None)
        if lacking is not None:
            raise InputError(f"the past {('keys', 'values')[lacking[1]]} of layer {lacking[0]} are not given")
        return P, [(found[i, 0], found[i, 1]) for i in range(config.n_layer)]

    def _beams(self, feeds: Feeds, B: int, P: int) -> tuple[Array, Array, Array] | None:
        """Which sequence, head and position of the past each sequence, head and position sees, (B, H, P).

        In a beam search cache_indirection (B / W, W, M) says in which of the W beams of its group a past token lies.
        """
        table, width = self.fed(feeds, "cache_indirection"), self.fed(feeds, "beam_width")
        if table is None:
            return None
        W = 1 if width is None else int(width.ravel()[0])
        fits = W > 0 and table.shape[:2] == (B // W, W) and B % W == 0 and table.shape[2] >= P
        if not fits or (table < 0).any() or (table >= W).any():
            raise InputError(f"cache_indirection {table.shape} does not name beams of {B} sequences, {W} to a group")
        rows = np.arange(B)[:, None] // W * W + table.reshape(B, -1)[:, :P]
        return rows[:, None], np.arange(self.recognised.config.n_head)[:, None], np.arange(P)

    def _mask(self, feeds: Feeds, B: int, T: int, S: int) -> Array | None:
        """The attention_mask among a file's inputs as GPT2 takes it, or None.

        Raises
        ------
        InputError
            If it has not an element for each cached and new position, or says neither 0 nor 1.
        """
        cut = self.recognised.mask_cut
        for port in self.recognised.inputs:
            if port.role not in ("attention_mask", "attention_bias") or port.name not in feeds:
                continue
            given = feeds[port.name]
            sizes: dict[int, tuple[int, ...]] = {2: (B, S), 3: (B, T, S), 4: (B, 1, T, S)}
            if given.ndim not in sizes:
                raise InputError(f"input {port.name!r}: got shape {given.shape}, expected {sizes[len(port.shape)]}")
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
            if mask.dtype.kind != "b" and not ((mask == 0) | (mask == 1)).all():
                raise InputError(
                    f"input {port.name!r} says 1 for keys that are seen and 0 for others; got other numbers"
                )
            return mask if mask.ndim == 2 else mask != 0
        return None

    def _positions(self, feeds: Feeds, mask: Array | None, P: int) -> Array | None:
        """Rows of wpe, where they do not simply follow the cached ones."""
        if self.recognised.positions.startswith("mask") and mask is not None:
            return self.recognised.positions_from_mask(mask)[:, P:]
        given = self.fed(feeds, "position_ids")
        if given is None:
            return None
        config = self.recognised.config
        return self._rows(given + config.position_offset, "position_ids", config.n_ctx) - config.position_offset

    def _rows(self, index: Array, role: str, size: int) -> Array:
        """Indices of rows; those of -size..-1 are counted from the end where the graph looks them up so."""
        index = np.asarray(index)
        if role not in self.recognised.from_the_end or index.dtype.kind != "i":
            return index
        return np.where((index < 0) & (index >= -size), index + size, index)

    # ----------------------------------------------------------------------------------------------------- outputs
    def results(self, ports: Sequence[Port], feeds: Feeds, call: Call, out: Output, tapped: Feeds) -> list[Array]:
        """The file's outputs, in the types and ranks that it declares; `tapped` holds those that are other taps."""
        given = self.fed(feeds, "input_ids")
        assert given is not None

        def in_rank_of(port: Port, array: Array) -> Array:
            if array.ndim == 3 and len(port.shape) == given.ndim + 1:  # the zoo's two batch axes, or none
                return array.reshape(*given.shape, array.shape[-1])
            return array

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
            return present if self.recognised.graph is None else self._in_buffer(port, present, feeds, call.start)

        return [np.ascontiguousarray(value(port), port.dtype) for port in ports]

    @cached_property
    def _head_padding(self) -> Array | None:
        """The head's rows beyond the vocabulary, (E, C)."""
        source = self.recognised.head_padding
        return None if source is None else source.load()

    def _with_head_padding(self, logits: Array, hidden: Array) -> Array:
        """(B, T, V) -> (B, T, V + E), where the file's head has rows that stand for no token."""
        if self._head_padding is None:
            return logits
        return np.concatenate([logits, hidden @ self._head_padding.T.astype(hidden.dtype)], axis=-1)

    def _in_buffer(self, port: Port, present: Array, feeds: Feeds, P: int) -> Array:
        """The buffer of the past with the new positions' keys or values written into it."""
        role, S = port.role.replace("present", "past"), present.shape[-2]
        past = self.fed(feeds, role, port.layer)
        assert past is not None
        if past.shape[-2] < S:
            return present
        buffer = np.array(past)
        buffer[..., P:S, :] = present[..., P:, :]
        if "total_sequence_length" in self.recognised.lengths.values():
            buffer[..., S:, :] = 0  # so does ONNX Runtime's GroupQueryAttention
        return buffer
