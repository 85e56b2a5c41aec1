"""Which part of a graph is which part of a GPT-2: `recognise` is the entrance."""

from .recognise import merged_condition, recognise
from .recognised import LENGTHS, Port, Recognised, TapLocation

__all__ = ["LENGTHS", "Port", "Recognised", "TapLocation", "merged_condition", "recognise"]
