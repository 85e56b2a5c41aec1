"""Packages that only a part of gpt2np needs: where one is missing, say which part, and what does without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .errors import MissingPackageError

ALL_FOR_PAGES = "pip install altair vl-convert-python brings all that pages need"


@contextmanager
def needs(package: str, what: str, instead: str = "") -> Iterator[None]:
    """Around an import: a package that is not installed becomes a MissingPackageError that says what to do.

    Parameters
    ----------
    package : str
        What pip calls it.
    what : str
        What was asked for, as the subject of a sentence: 'engine "numba"'.
    instead : str
        What does without the package, as the end of the sentence: 'or use engine="numpy"'.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("gpt2np"):
            raise
        end = f"; {instead}" if instead else ""
        raise MissingPackageError(
            f"{what} needs {package}, which is not installed: pip install {package}{end}"
        ) from None
