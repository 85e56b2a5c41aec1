"""The exercises of the book that ask for a function, each with a check that says what is wrong with an answer.

    from gpt2np import exercises
    exercises.check("layer_norm", my_layer_norm)

`check` runs the reader's function beside the textbook's on several inputs, in float64 so that rounding hides nothing,
and answers in the debugger's words: where it differs, by how much, and which mistake it looks like.
"""

from __future__ import annotations

from .check import Answer, check
from .tasks import EXERCISES, Exercise

__all__ = ["EXERCISES", "Answer", "Exercise", "check"]
