"""What Python and the compiled kernels have to agree on: sizes, forms of matrices, and the table of a model's steps."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..arrays import Array
from .machine import FLOAT16, has

# -------------------------------------------------------------------------------------------------------- sizes

# A full tile leaves registers for b[k] and a[r, k]: 8 x 32 float32 sums take 16 of AVX-512's 32 registers,
# 6 x 16 take 12 of AVX2's 16 and 24 of arm64's 32. More rows than these bring no speed.
PANEL, ROWS = (32, 8) if has("avx512f") else (16, 6)
# A product of so few rows takes as long as it takes to read b, and a Zen 3 reads several panels at once a fifth sooner
# than one after another: a processor's own prefetching begins anew at each page of each stream, and only that.
# STREAMS[rows] panels for less than len(STREAMS) rows; other machines, where this was not measured, read one.
STREAMS = (1, 4, 2, 2) if has("avx2") and not has("avx512f") else (1,)
LANES = 64  # running sums over a row: element i goes to sum i % LANES; enough to hide how long one addition takes
TERMS = 128  # terms of one chain; shorter chains round less, longer ones read and write the totals less often
PIECE_ROWS = 48  # rows that share one pass over a panel of weights; a multiple of every ROWS
PIECE_PANELS = 4  # panels that share one pass over these rows, at most
PIECE_QUERIES = 96  # queries that share one transposition of the keys; likewise

# ---------------------------------------------------------------------------------------------- forms of matrices

FORMS = ("bfloat16", "float16") if FLOAT16 else ("bfloat16",)  # of 16 bits, see `arrays.NARROW`
LEVELS: dict[str, np.dtype] = {"int8": np.dtype(np.int8), "int4": np.dtype(np.uint32)}  # see `levels`
STEP = 8  # rows of a panel of levels that are made at once
TOP = 28  # bits below a level of 4 bits at the top of a word


def per_element(dtype: Any) -> int:
    """How many levels of a column one element of a packed matrix holds."""
    return 8 if dtype == LEVELS["int4"] else 1


# ------------------------------------------------------------------------------------------------- table of steps

ACTIVATION_CODES = {"none": 0, "gelu_tanh": 1, "gelu_erf": 2, "gelu_quick": 3, "relu": 4, "silu": 5, "tanh": 6}

# Kinds of steps
EMBED, NORM, LINEAR, APPEND, ATTEND = range(5)

# Columns of a row: numbers, and where arrays begin, which are an address and as many lengths as they have dimensions.
KIND, PIECES, SMALLEST, ACTIVATION, ADDED = range(5)  # for pieces and smallest see `threads.run_pieces`
# of 2, 2, 3, 3 or 4, 1, 1, 5 and 1 dimensions; FLAT is the cache as one row of numbers
INPUT, OUTPUT, WEIGHT, SCALES, BIAS, GAIN, CACHE, FLAT = 5, 8, 11, 15, 20, 22, 24, 30
COLUMNS = 32


class VisibleKeys(NamedTuple):
    """Which keys the queries may see, and what is added to their scores."""

    mask: Array  # (B, 1, T, S), added to the scores; empty for the causal mask
    kept: Array  # (B, T): 0 where the scores of a query are 0 before that; empty for the causal mask
    keys: Array  # (B, S or more): positions of the keys that any query of a sequence may see, in order
    limits: Array  # (B, T): how many of that list each query looks at
    safe: Array  # (2,): between these two, the highest score of a query leaves hidden keys without weight
    unsafe: Array  # (1,): 1 once a query's highest score was outside
    hidden: Array  # (B, S): keys hidden from some query whose scores matter all the same; empty if there are none
    lowest: float  # what `safe` starts at, whatever hidden scores are
    added: float  # to hidden scores, above which `safe` starts


# --------------------------------------------------------------------------------------- calls that threads share

# What is offered to other threads, int64 numbers, on cache lines of their own: who came (the number of the call times
# CALL, plus how many threads came, plus CLOSED once it is over); how many of them left; and the call, which is the
# addresses of its code and its record (see `entries`), how many threads it is for, and whether one of them failed.
CALL, CLOSED = 1 << 32, 1 << 31
LEFT, CODE, RECORD, WORKERS, FAILED, OFFER = 8, 16, 17, 18, 19, 24  # places, and the size of all
