"""The functions between the two linear maps of an MLP: GPT-2's GELU, and the others that its files may have.

To add one: its formula and its row in ACTIVATIONS here, and its loop in the kernels; everything else (recognising,
converting, writing and explaining files) reads the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .arrays import Array


def gelu_tanh(x: Array) -> Array:
    """GELU as GPT-2 computes it, by tanh. Hendrycks & Gimpel 2016, section 2."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def gelu_erf(x: Array) -> Array:
    """GELU exactly, x times the normal distribution's cumulative probability. Hendrycks & Gimpel 2016."""
    erf = np.vectorize(math.erf, otypes=[x.dtype])(x * math.sqrt(0.5))
    return 0.5 * x * (1 + erf)


def gelu_quick(x: Array) -> Array:
    """GELU by a sigmoid, x * sigmoid(1.702 x). Hendrycks & Gimpel 2016, section 2."""
    with np.errstate(over="ignore"):  # exp may reach inf for very negative x: x / inf is the right 0
        return x / (1 + np.exp(-1.702 * x))


def relu(x: Array) -> Array:
    """max(x, 0); a NaN stays a NaN."""
    return np.maximum(x, 0)


def silu(x: Array) -> Array:
    """x * sigmoid(x). Elfwing et al. 2017, "Sigmoid-weighted linear units", section 2."""
    with np.errstate(over="ignore"):  # as in gelu_quick
        return x / (1 + np.exp(-x))


def tanh(x: Array) -> Array:
    """The hyperbolic tangent."""
    return np.tanh(x)


class Op(Protocol):
    """Writes one ONNX node and gives the name of its output; a number among the inputs becomes a constant."""

    def __call__(self, op_type: str, *inputs: str | float) -> str: ...


@dataclass(frozen=True)
class Activation:
    """One activation in every form that the package needs."""

    function: Callable[[Array], Array]
    title: str  # as `gpt2np info` calls it
    checkpoint_names: tuple[str, ...]  # its names as activation_function in a Hugging Face config.json
    onnx: Callable[[Op, str], str]  # the formula as ONNX nodes, in the pieces that PyTorch's exporter makes of it
    onnx_gelu: str | None = None  # `approximate` of ONNX's Gelu (opset 20 and newer), where that is the same

    def __call__(self, x: Array) -> Array:
        """The activation of each element, in the dtype of x."""
        return self.function(x)


def _gelu_tanh_onnx(op: Op, x: str) -> str:
    half = op("Mul", x, 0.5)
    cube = op("Pow", x, 3.0)
    inner = op("Add", x, op("Mul", cube, 0.044715))
    bent = op("Tanh", op("Mul", inner, math.sqrt(2 / math.pi)))
    return op("Mul", half, op("Add", bent, 1.0))


def _gelu_erf_onnx(op: Op, x: str) -> str:
    erf = op("Erf", op("Div", x, math.sqrt(2)))
    return op("Mul", op("Mul", x, op("Add", erf, 1.0)), 0.5)


# What Hugging Face's GPT2Config offers, and the quick form.
ACTIVATIONS = {
    "gelu_tanh": Activation(
        gelu_tanh, "GELU by tanh", ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_accurate"),
        _gelu_tanh_onnx, onnx_gelu="tanh",
    ),
    "gelu_erf": Activation(gelu_erf, "GELU by erf", ("gelu", "gelu_python"), _gelu_erf_onnx, onnx_gelu="none"),
    "gelu_quick": Activation(
        gelu_quick, "GELU by sigmoid", ("quick_gelu",),
        lambda op, x: op("Mul", x, op("Sigmoid", op("Mul", x, 1.702))),
    ),
    "relu": Activation(relu, "ReLU", ("relu",), lambda op, x: op("Relu", x)),
    "silu": Activation(silu, "SiLU", ("silu", "swish"), lambda op, x: op("Mul", x, op("Sigmoid", x))),
    "tanh": Activation(tanh, "tanh", ("tanh",), lambda op, x: op("Tanh", x)),
}  # fmt: skip
