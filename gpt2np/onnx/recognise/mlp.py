"""An MLP: two linear maps with an activation between them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from ...activations import ACTIVATIONS
from ...errors import UnsupportedModelError
from .blocks import Branch
from .forms import Likeness
from .probe import Probe
from .recognised import TapLocation
from .sources import Source
from .taps import stream, widest

Array = np.ndarray

# Where the activation is compared: densely where it bends, and over all of float32 on both sides.
_BEND = np.linspace(-8, 8, 1537)
_FAR = np.concatenate([np.logspace(-30, 0.9, 96), np.logspace(0.91, 3, 96), np.logspace(3.05, 38.5, 63)])
POINTS = np.concatenate([_BEND, _FAR, -_FAR])


@dataclass(frozen=True)
class MLPFound:
    """What was found of an MLP."""

    i: int
    branch: Branch
    taps: dict[str, TapLocation]
    activation: str
    error: float  # how far its values are off, at most

    @property
    def sources(self) -> dict[str, Source]:
        """The weights."""
        (fc,) = self.branch.maps
        return {**fc.sources(f"h.{self.i}.mlp.c_fc"), **self.branch.out.sources(f"h.{self.i}.mlp.c_proj")}

    @property
    def notes(self) -> tuple[str, ...]:
        """Anything odd."""
        (fc,) = self.branch.maps
        what = f"{fc.node.describe()}: the {self.activation} behind it is off by up to {self.error:.1e}"
        return (what,) if self.error > 1e-6 else ()

    def again(self, like: Likeness, branch: Branch) -> MLPFound:
        """The MLP of a layer that is written like this one's."""
        return replace(self, i=like.layer, branch=branch, taps=like.taps(self.taps))


def read_mlp(probe: Probe, i: int, branch: Branch) -> MLPFound:
    """The MLP of layer i."""
    (fc,) = branch.maps
    name = f"h.{i}.mlp"
    taps = {f"{name}.c_fc": stream(widest(probe, fc.out)), f"{name}.gelu": stream(widest(probe, branch.out.x))}
    if not branch.out.bias_later:
        taps[f"{name}.out"] = stream(widest(probe, branch.out.out))
    return MLPFound(i, branch, taps, *read_activation(probe, branch))


def read_activation(probe: Probe, branch: Branch) -> tuple[str, float]:
    """Which function lies between the two maps of an MLP: that whose values come out; and how far off it is."""
    (fc,), out = branch.maps, branch.out
    shape = probe.known[fc.out].shape
    size = math.prod(shape)
    points = POINTS[:: -(-len(POINTS) // size)]
    (got,) = probe.run_with({fc.out: np.resize(points, shape)}, out.x)
    got = got.ravel()[: len(points)]
    near = np.abs(points) <= 8
    errors: dict[str, float] = {}
    with np.errstate(all="ignore"):
        for name, function in ACTIVATIONS.items():
            error = np.abs(got - function(points))
            # far from 0 all of them are straight: what is off there is off by much
            errors[name] = float(np.max(np.where(near, error, 100 * error / np.abs(points))))
    errors = {name: error if np.isfinite(error) else np.inf for name, error in errors.items()}
    best = min(errors, key=lambda n: errors[n])
    # GELU by erf and by tanh lie 4.7e-4 apart; its constants are off by up to 4e-4 in bfloat16, by less in float16,
    # and in float32 by no more than its decimals are
    rivals = sorted(errors.values())
    bfloat16 = probe.half and errors[best] < 4e-4 and errors[best] < 0.75 * rivals[1]
    if not errors[best] < (2e-4 if probe.half else 3e-5) and not bfloat16:
        node = probe.graph.producers.get(probe.graph.strip(out.x)) or out.node
        what = f"{node.describe()} ends an activation that is none of {', '.join(errors)}; "
        what += f"nearest is {best}, off by up to {errors[best]:.2g}"
        probe.graph.object(UnsupportedModelError(what))
    return best, errors[best]
