"""gpt2np: GPT-2 from model.onnx in NumPy and numba, checked against ONNX Runtime.

Importing this package loads neither numba, onnx nor onnxruntime; each comes in when first used.
"""

from __future__ import annotations

from contextlib import nullcontext
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .optional import needs

__version__ = "0.1.0"

# public name -> the module that defines it
_PUBLIC = {
    "load": "model",
    "GPT2": "model",
    "Output": "model",
    "GPT2Config": "config",
    "GPT2Weights": "weights",
    "KVCache": "cache",
    "InferenceSession": "session",
    "set_num_threads": "kernels",
    "get_num_threads": "kernels",
    "Gpt2npError": "errors",
}
_MODULES = (
    "bpe",
    "errors",
    "exercises",
    "generate",
    "kernels",
    "parity",
    "pictures",
    "reference",
    "sampling",
    "schema",
    "testing",
    "tokenizer",
    "zoo",
)

if TYPE_CHECKING:
    from . import bpe as bpe
    from . import errors as errors
    from . import exercises as exercises
    from . import generate as generate
    from . import kernels as kernels
    from . import parity as parity
    from . import pictures as pictures
    from . import reference as reference
    from . import sampling as sampling
    from . import schema as schema
    from . import testing as testing
    from . import tokenizer as tokenizer
    from . import zoo as zoo
    from .cache import KVCache as KVCache
    from .config import GPT2Config as GPT2Config
    from .errors import Gpt2npError as Gpt2npError
    from .kernels import get_num_threads as get_num_threads
    from .kernels import set_num_threads as set_num_threads
    from .model import GPT2 as GPT2
    from .model import Output as Output
    from .model import load as load
    from .session import InferenceSession as InferenceSession
    from .weights import GPT2Weights as GPT2Weights

__all__ = list(_PUBLIC)


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one of these

    def __getattr__(name: str) -> Any:
        if name not in _PUBLIC and name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = _PUBLIC.get(name, name)
        # `from . import kernels` of any module comes through here, too
        with (
            needs("numba", "the compiled engine", 'or use engine="numpy", the textbook')
            if module == "kernels"
            else nullcontext()
        ):
            found = import_module(f".{module}", __name__)
        return getattr(found, name) if name in _PUBLIC else found


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES, "__version__"])
