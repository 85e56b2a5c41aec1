"""What a malformed file makes gpt2np raise, as an error that names the node."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from ..errors import Gpt2npError, UnsupportedModelError
from .graph import Node


@contextmanager
def typed_errors(where: str = "a part of the graph") -> Iterator[None]:
    """Turn any exception of Python's own into an UnsupportedModelError; also as a decorator.

    A graph from a stranger can lack whatever its operators ask for, and in combinations that no list of checks
    foresees. So nothing that looks at one needs to check more than it wants to explain: what is raised in the body
    is put into one form here, with the node that was looked at, or `where` if there was none.
    """
    try:
        with np.errstate(all="ignore"):  # probes hold NaN and infinities on purpose
            yield
    except Gpt2npError:
        raise
    except MemoryError as error:
        raise UnsupportedModelError(f"{_place(error, where)} asks for more memory than there is") from error
    except RecursionError as error:
        raise UnsupportedModelError(f"{_place(error, where)} is nested too deeply") from error
    except Exception as error:
        what = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise UnsupportedModelError(f"{_place(error, where)} is not what gpt2np can read ({what})") from error


def _place(error: Exception, found: str) -> str:
    """The node that was looked at: that of the innermost frame which has one among its variables."""
    trace = error.__traceback__
    while trace is not None:
        variables = trace.tb_frame.f_locals
        for value in (*variables.values(), variables.get("node")):
            node = value if isinstance(value, Node) else getattr(value, "__dict__", {}).get("node")
            if isinstance(node, Node):
                found = node.describe()
        trace = trace.tb_next
    return found
