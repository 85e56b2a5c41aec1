"""The forward pass as a program: the operations of `operations.py` over one file's weights, run one at a time.

`reference.py` is the textbook that a reader follows; here the same functions are cut at every tap, so that an
operation can be fed with somebody else's inputs (local error), swapped for a mistaken one (explain), run in
float32 and float64 side by side (the float32 floor), or written out alone (repro).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from .. import reference
from ..call import Call
from ..config import GPT2Config
from ..weights import Array, WeightSources
from .operations import OPERATIONS, Run, split_tap, tap_inputs, tap_names

SMALL = 1 << 24  # weights of a model from which on they are not all kept
Changes = Mapping[str, Array | Callable[[], Array]]  # by name: weights, or what makes one whenever it is read


class Parameters:
    """Weights by name in the dtype asked for, read when first used; `changed` take the place of the file's."""

    def __init__(self, sources: WeightSources, changed: Changes | None = None) -> None:
        self.sources = sources
        self.changed = dict(changed or {})
        numbers = sum(math.prod(source.shape) for source in sources.values())
        self._cached = lru_cache(maxsize=48 if numbers > SMALL else None)(self._cast)
        self._raw = lru_cache(maxsize=3)(lambda name: self.sources[name].load())

    def __call__(self, name: str, dtype: np.dtype[Any]) -> Array:
        """One weight; matrices of the vocabulary's size come as they are stored, to be cast where used."""
        if name in self.changed:
            value = self.changed[name]
            value = value() if callable(value) else value
            return value if name.startswith(("wte", "lm_head")) else value.astype(dtype)
        if name in ("wte.weight", "lm_head.weight"):
            return self._raw(name)
        return self._cached(name, dtype)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight, without reading it."""
        value = self.changed.get(name)
        return value.shape if isinstance(value, np.ndarray) else tuple(self.sources[name].shape)

    def __contains__(self, name: str) -> bool:
        return name in self.changed or name in self.sources

    def _cast(self, name: str, dtype: np.dtype[Any]) -> Array:
        return self.sources[name].load().astype(dtype)

    def with_(self, changed: Changes) -> Parameters:
        """The same with further weights replaced; what was read already is shared."""
        twin = object.__new__(Parameters)
        twin.sources, twin._cached, twin._raw = self.sources, self._cached, self._raw
        twin.changed = {**self.changed, **changed}
        return twin


@dataclass(frozen=True)
class Program:
    """A GPT-2 as operations: its config, its weights, and replaced operations by tap name."""

    config: GPT2Config
    weights: Parameters
    replaced: Mapping[str, Run]

    @classmethod
    def of(cls, config: GPT2Config, sources: WeightSources) -> Program:
        return cls(config, Parameters(sources), {})

    def with_(self, weights: Changes | None = None, runs: Mapping[str, Run] | None = None, **config: Any) -> Program:
        """The same with some weights, operations or config fields replaced."""
        return Program(
            replace(self.config, **config),
            self.weights.with_(weights) if weights else self.weights,
            {**self.replaced, **(runs or {})},
        )

    def run(self, tap: str, call: Call, inputs: list[Array], dtype: np.dtype[Any]) -> Array:
        """One operation on the given inputs, all cast to dtype."""
        given = [x.astype(dtype, copy=False) for x in inputs]
        run = self.replaced.get(tap) or OPERATIONS[split_tap(tap)[1]].run
        with np.errstate(all="ignore"):  # NaN and infinities are data here: they are looked for, not warned of
            return run(self, call, tap, given, dtype)

    def from_given(self, tap: str, call: Call, given: Mapping[str, Array], dtype: np.dtype[Any]) -> Array:
        """The operation of `tap` fed with `given`; inputs that are not given are computed from what is."""
        inputs = [
            given[name] if name in given else self.from_given(name, call, given, dtype)
            for name in tap_inputs(tap, self.config)
        ]
        return self.run(tap, call, inputs, dtype)

    def walk(
        self,
        call: Call,
        dtype: Any = np.float64,
        start: Mapping[str, Array] | None = None,
        until: str = "logits",
    ) -> Iterator[tuple[str, Array]]:
        """All taps in order, or the ones after those that `start` gives; only what is still needed is kept."""
        dtype = np.dtype(dtype)
        known = dict(start or {})
        names = tap_names(self.config)
        last_use = {name: after for after in names for name in tap_inputs(after, self.config)}
        first = max((names.index(name) for name in known), default=-1) + 1
        for name in names[first : names.index(until) + 1]:
            known[name] = self.run(name, call, [known[i] for i in tap_inputs(name, self.config)], dtype)
            yield name, known[name]
            for used in tap_inputs(name, self.config):
                if last_use[used] == name:
                    known.pop(used, None)

    def linear(self, name: str, x: Array, dtype: np.dtype[Any], columns: slice = slice(None)) -> Array:
        """x @ weight + bias of the linear map `name`, or some of its output columns."""
        weight, bias = self.weights(f"{name}.weight", dtype), self.weights(f"{name}.bias", dtype)
        return reference.linear(x, weight[:, columns], bias[columns])

    def norm(self, name: str, dtype: np.dtype[Any]) -> tuple[Array, Array, float]:
        """Weight, bias and epsilon of the layer norm `name`."""
        weight, bias = self.weights(f"{name}.weight", dtype), self.weights(f"{name}.bias", dtype)
        return weight, bias, self.config.epsilon(name)

    @property
    def head(self) -> str:
        """Name of the matrix that makes the logits."""
        return "wte.weight" if self.config.tied else "lm_head.weight"
