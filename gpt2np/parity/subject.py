"""A model file under test, opened and recognised once, and which arrays are its outputs and taps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..call import Call
from ..config import GPT2Config
from ..errors import ComparisonError, Gpt2npError, UnsupportedModelError
from ..signature import Feeds, Signature
from ..weights import Array
from .forms import as_array, nearest
from .operations import OPERATIONS, split_tap, tap_names, tap_shape
from .program import Program

if TYPE_CHECKING:
    from ..onnx.emulate.literal import Literally
    from ..onnx.read.reader import ModelFile
    from ..onnx.recognise import Port, Recognised
    from ..session import InferenceSession


@dataclass
class Subject:
    """A model file under test: what was recognised in it, or why it was not.

    Reading starts at the first use of `recognised`; what ONNX Runtime alone needs works without it.
    """

    path: Path
    problem: Gpt2npError | None = None  # why gpt2np cannot place the graph at all
    refusals: list[UnsupportedModelError] = field(default_factory=list)  # what in it is no GPT-2's

    @cached_property
    def file(self) -> ModelFile:
        """The opened file; its weights are read when they are asked for."""
        from ..onnx.read.reader import open_model

        return open_model(self.path)

    @cached_property
    def found(self) -> Recognised | None:
        """The recognised GPT-2, or None (then `problem` says why)."""
        from ..onnx.recognise import recognise

        try:
            return recognise(self.file, self.refusals)
        except UnsupportedModelError as error:
            self.problem = error
            return None

    @property
    def whole(self) -> bool:
        """Whether gpt2np can run the file: nothing in it was left unplaced."""
        return self.found is not None and not self.refusals

    @cached_property
    def input_names(self) -> list[str]:
        """The file's declared inputs."""
        initializers = {t.name for t in self.file.proto.graph.initializer}
        return [i.name for i in self.file.proto.graph.input if i.name not in initializers]

    @cached_property
    def output_names(self) -> list[str]:
        """The file's declared outputs."""
        return [o.name for o in self.file.proto.graph.output]

    @cached_property
    def is_float16(self) -> bool:
        """Whether the file computes in 16 bits: its own nodes round every result."""
        return any(t.dtype.name in ("float16", "bfloat16") for t in self.file.tensors.values())

    def session(
        self, engine: str, dtype: str = "float32", rounding: Literally = False, weights: str | None = None
    ) -> InferenceSession:
        """gpt2np's session over what was read and recognised here."""
        from ..session import InferenceSession

        return InferenceSession(
            self.path, engine=engine, dtype=dtype, weights=weights, emulate_rounding=rounding,
            read=(self.file, self.recognised),
        )  # fmt: skip

    @property
    def recognised(self) -> Recognised:
        if self.found is None:
            assert self.problem is not None
            raise self.problem
        return self.found

    @property
    def config(self) -> GPT2Config:
        return self.recognised.config

    @cached_property
    def program(self) -> Program:
        """The forward pass as operations over this file's weights."""
        return Program.of(self.config, self.recognised.sources)

    def call(self, feeds: Feeds) -> Call:
        """The file's inputs as what our operations take."""
        return Signature(self.recognised).call(feeds)

    def has_logits(self) -> bool:
        return any(port.role == "logits" for port in self.recognised.outputs)

    def taps(self) -> list[str]:
        """Every tap of this file, in order; without logits where it has no head."""
        names = tap_names(self.config)
        return names if self.has_logits() else names[:-1]

    def outputs_as_taps(self, outputs: Mapping[str, Array], call: Call) -> dict[str, Array]:
        """The taps that the file's own outputs hold: keys and values of the new positions, and the last one.

        An output of another shape holds none: comparing it says so.
        """
        taps: dict[str, Array] = {}
        for port in self.recognised.outputs:
            value, names = outputs.get(port.name), taps_of(port)
            if value is None or not names:
                continue
            if names[0].endswith(("attn.k", "attn.v")) and value.ndim > 1:
                value = value[..., call.start :, :]
            parts = value if port.role == "present" and value.ndim else [value]
            if len(parts) == len(names):
                shaped = {name: as_tap(part, name, self.config, call) for name, part in zip(names, parts, strict=True)}
                taps |= {name: part for name, part in shaped.items() if part is not None}
        return taps


def taps_of(port: Port) -> tuple[str, ...]:
    """The taps that an output of the file holds."""
    key, value = f"h.{port.layer}.attn.k", f"h.{port.layer}.attn.v"
    held = {
        "last_hidden_state": ("ln_f",), "logits": ("logits",),
        "present": (key, value), "present_key": (key,), "present_value": (value,),
    }  # fmt: skip
    return held.get(port.role, ())


def as_tap(value: Array, tap: str, config: GPT2Config, call: Call) -> Array | None:
    """A party's array in its tap's shape, or None if it cannot be: leading dimensions may be split or left out."""
    shape = tap_shape(tap, config, call)
    inner = shape[1:] if len(shape) == 4 else shape[2:]  # what follows the batch, or batch and positions
    if value.dtype.kind in "cOSUM" or value.size != math.prod(shape):
        return None
    if value.ndim < len(inner) or value.shape[value.ndim - len(inner) :] != inner:
        return None
    return value.reshape(shape)


Layouts = tuple[tuple[str, Callable[[Array], Array]], ...]
# How else an array of some shape may be laid out, and what turns it into that shape but for joined or split axes.
LAYOUTS: dict[str, Layouts] = {
    "B H T D": (
        ("B T H D", lambda x: x.swapaxes(1, 2)), ("B T HD", lambda x: x),
        ("B H D T", lambda x: x.swapaxes(2, 3)), ("BH T D", lambda x: x),
    ),
    "B H T S": (("BH T S", lambda x: x), ("B T H S", lambda x: x.swapaxes(1, 2))),
    "B T HD": (("B T H D", lambda x: x), ("B H T D", lambda x: x.swapaxes(1, 2))),
}  # fmt: skip


def in_another_layout(value: Array, tap: str, config: GPT2Config, call: Call) -> tuple[Array, str] | None:
    """A tap that is laid out as other programs do, in our layout, and which one it has; None where it has none."""
    shape, own = tap_shape(tap, config, call), OPERATIONS[split_tap(tap)[1]].shape
    (B, T), H, D = call.input_ids.shape, config.n_head, config.head_size
    sizes = {"B": B, "T": T, "S": call.start + T, "H": H, "D": D, "HD": H * D, "BH": B * H}
    if value.size != math.prod(shape):
        return None
    for letters, turn in LAYOUTS.get(own, ()):
        theirs = tuple(sizes[letter] for letter in letters.split())
        if [n for n in value.shape if n != 1] == [n for n in theirs if n != 1]:
            split = letters == "B T HD"  # the heads are to be told apart before they change places with the positions
            moved = value.reshape(B, T, H, D).swapaxes(1, 2) if split else turn(value.reshape(theirs))
            return moved.reshape(shape), f"is ({letters.replace(' ', ', ')}), read as ({own.replace(' ', ', ')})"
    return None


def misfit(value: Array, tap: str, config: GPT2Config, call: Call) -> str:
    """What is wrong with a tap's shape."""
    letters = OPERATIONS[split_tap(tap)[1]].shape.replace(" ", ", ")
    return f"shape {value.shape}, where ({letters}) is {tap_shape(tap, config, call)}: it could not be compared"


def aliases(recognised: Recognised) -> dict[str, str]:
    """Names of roles, whatever the file calls them, to its outputs: logits, last_hidden_state, present.0.key ..."""
    found: dict[str, str] = {}
    for port in recognised.outputs:
        layer = "" if port.layer is None else f".{port.layer}"
        kind = {"present_key": ".key", "present_value": ".value"}.get(port.role, "")
        name = f"present{layer}{kind}" if port.role.startswith("present") else port.role
        found.setdefault(name, port.name)
        if port.role == "last_hidden_state":
            found.setdefault("ln_f", port.name)
    return found


def _pairs(given: Mapping[str, Array], recognised: Recognised) -> dict[str, Array]:
    """Keys and values put together, or taken apart, as the file's presents hold them."""
    arrays = dict(given)
    for port in recognised.outputs:
        both, key, value = f"present.{port.layer}", f"present.{port.layer}.key", f"present.{port.layer}.value"
        if port.role == "present" and key in arrays and value in arrays and arrays[key].shape == arrays[value].shape:
            arrays[both] = np.stack([arrays.pop(key), arrays.pop(value)])
        elif port.role == "present_key" and both in arrays and len(arrays[both]) == 2:
            arrays[key], arrays[value] = arrays.pop(both)
    return arrays


def _check_twin(who: str, name: str, array: Array, output: str, twin: Array) -> None:
    """Raise unless what has the place of an output under two names is the same under both: one alone is compared."""
    if array.size != twin.size or not np.array_equal(array.reshape(-1), twin.reshape(-1), equal_nan=True):
        raise ComparisonError(f"{who} {output!r} and {name!r}, which are one output, with other numbers in each")


def sort_arrays(
    model: Subject, call: Call, given: Mapping[Any, Any], who: str
) -> tuple[dict[str, Array], dict[str, Array], list[str]]:
    """Arrays under the file's outputs' names, or their roles', and under tap names, told apart and checked.

    What is an output and a tap at once ("logits") is both. `who` begins a complaint. A tap in another layout is
    turned into ours, which the notes say; one of a shape that is none of the known ones stays among the outputs.

    Raises
    ------
    ComparisonError
        If one is no array of numbers, or under an unknown name; if one output is given twice, with other numbers.
    """
    names, known, roles = model.output_names, tap_names(model.config), aliases(model.recognised)
    arrays = _pairs({str(name): as_array(value, f"{who} {name!r}") for name, value in given.items()}, model.recognised)
    if "last_hidden_state" in arrays and "last_hidden_state" not in {*names, *roles}:
        arrays.setdefault("ln_f", arrays.pop("last_hidden_state"))  # a file with a head does not put it out
    made: dict[str, Array] = {}
    found: dict[str, Array] = {}
    odd: dict[str, list[str]] = {}  # what is to be said of taps -> those taps
    own_first = sorted(arrays.items(), key=lambda item: (item[0] not in names, item[0] in known))
    for name, array in own_first:
        output = name if name in names else roles.get(name)
        tap = as_tap(array, name, model.config, call) if name in known else None
        if output is not None:
            twin = made.setdefault(output, array)
            if tap is None:
                _check_twin(who, name, array, output, twin)
        if name in known and name not in names:
            if tap is None and output is None:
                other = in_another_layout(array, name, model.config, call)
                if other is None:
                    made[name] = array
                else:
                    tap = other[0]
                    odd.setdefault(other[1], []).append(name)
            if tap is not None:
                found[name] = tap
        elif output is None:
            valid = nearest(name, [*names, *roles, *known])
            raise ComparisonError(f"{who} {name!r}, neither an output of {model.path} nor a tap; names are {valid}")
    return made, found, [
        f"{taps[0]}{f' (and {len(taps) - 1} more)' if len(taps) > 1 else ''} {text}" for text, taps in odd.items()
    ]  # fmt: skip
