"""A model file under test, opened and recognised once, and which arrays are its outputs and taps."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
from .operations import tap_names, tap_shape
from .program import Program

if TYPE_CHECKING:
    from ..onnx.recognise import Port, Recognised


@dataclass
class Subject:
    """A model file under test: what was recognised in it, or why it was not.

    Reading starts at the first use of `recognised`; what ONNX Runtime alone needs works without it.
    """

    path: Path
    problem: Gpt2npError | None = None  # why gpt2np cannot place the graph at all
    objections: list[UnsupportedModelError] = field(default_factory=list)  # what in it is no GPT-2's
    _calls: dict[int, Call] = field(default_factory=dict, repr=False)

    @cached_property
    def found(self) -> Recognised | None:
        """The recognised GPT-2, or None (then `problem` says why)."""
        from ..onnx.read.reader import open_model
        from ..onnx.recognise import recognise

        file = open_model(self.path)
        try:
            return recognise(file, self.objections)
        except UnsupportedModelError as error:
            self.problem = error
            return None

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


def output_names(model: Subject) -> list[str]:
    """The file's declared outputs."""
    from ..onnx.read.reader import open_model

    return [o.name for o in open_model(model.path).proto.graph.output]


def sort_arrays(
    model: Subject, call: Call, given: Mapping[Any, Any], who: str
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Arrays under the file's output names and under tap names, told apart and checked. `who` begins a complaint."""
    names, known = output_names(model), set(tap_names(model.config))
    made: dict[str, Array] = {}
    found: dict[str, Array] = {}
    for name, value in given.items():
        array = np.asarray(value)
        if array.dtype.kind in "cOSUM":
            raise ComparisonError(f"{who} {name!r} as {type(value).__name__}, which is no array of real numbers")
        if name in names:
            made[name] = array
        elif name in known:
            tap = as_tap(array, name, model.config, call)
            if tap is None:
                expected = tap_shape(name, model.config, call)
                raise ComparisonError(f"{who} tap {name!r} with shape {array.shape}, expected {expected}")
            found[name] = tap
        else:
            raise ComparisonError(f"{who} {name!r}, which is neither an output of {model.path} nor a tap")
    return made, found
