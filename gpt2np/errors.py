"""Every exception that a caller of gpt2np may want to catch, under one base class."""

from __future__ import annotations

from .escape import escaped


class Gpt2npError(Exception):
    """Base class of all errors that gpt2np raises on purpose.

    Its text may quote names from files, so it is shown escaped: by the command line, and by Python's traceback.
    """

    def __str__(self) -> str:
        return escaped(super().__str__(), keep="\n")


class ModelFileError(Gpt2npError):
    """A file is missing, truncated, malformed, or not what its name or header promises."""


class UnsupportedModelError(Gpt2npError):
    """The file is sound ONNX, but its graph is not a GPT-2 that gpt2np can place; the message names the node."""


class WeightError(UnsupportedModelError):
    """A weight is missing, left over, of the wrong shape, or of the wrong type; the message names it."""


class InputError(Gpt2npError, ValueError):
    """The caller's arrays or arguments do not fit: wrong name, rank, dtype, shape or range."""


class TokenRangeError(InputError):
    """A token id lies outside 0..V-1."""


class ContextOverflowError(InputError):
    """More positions are asked for than the context (or the cache) can hold."""


class TokenizerError(Gpt2npError):
    """No tokenizer was found, or its files cannot be read."""


class ComparisonError(Gpt2npError):
    """Two sets of outputs cannot be compared: a missing or unmatched name, a wrong shape, nothing to compare."""


class TraceError(Gpt2npError):
    """A saved trace is truncated, foreign, of another schema, or of another model."""


class DownloadError(Gpt2npError):
    """A file could not be fetched, or what arrived is not the file that was asked for."""


class MissingPackageError(Gpt2npError):
    """What was asked for needs a package that is not installed; the message names it and what does without."""
