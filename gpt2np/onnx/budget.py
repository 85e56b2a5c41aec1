"""How much the nodes of a file may make while gpt2np looks at it: in proportion to the bytes of the file."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import UnsupportedModelError
from ..files import allowance


class OverBudget(UnsupportedModelError):
    """A file asks for more than one of its size gets."""


class Budget:
    """Bytes that may be made from a file, all together.

    A few nodes can ask for any size: a dimension that is only declared, a Range, a Concat of a value with itself,
    over and over. What is made to find a GPT-2 in its file is bounded by what the file holds, so that time and
    memory are, too.
    """

    def __init__(self, nbytes: int) -> None:
        self.total = self.left = allowance(nbytes)
        self.more = 3 * self.total  # so much can be given back: time is bounded, too

    def check(self, nbytes: int, what: Callable[[], str]) -> None:
        """Raise if so much more cannot be had; `what` tells what asks for it."""
        if nbytes > self.left:
            raise OverBudget(
                f"{what()} asks for {nbytes:,} bytes; a file of this size gets {self.total:,}, of which "
                f"{self.left:,} are left"
            )

    def spend(self, nbytes: int, what: Callable[[], str]) -> None:
        """Take so much; raises as `check` does."""
        self.check(nbytes, what)
        self.left -= nbytes

    def give_back(self, left: int) -> None:
        """What was made since so much was left has been dropped again."""
        nbytes = min(left - self.left, self.more)
        self.left += nbytes
        self.more -= nbytes
