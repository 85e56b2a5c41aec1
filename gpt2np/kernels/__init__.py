"""GPT-2 in numba: the functions of `reference.py` under the same names and arguments, made for speed.

`reference.py` says what is computed; the files here say how, one job each. What numba compiles:

    loops     the kernels: linear maps, embedding, layer norm and attention; read this one first
    products  which tile multiplies what, by what the weights are kept as
    tile      the register tile, the one loop that takes the time; for AVX2 its instructions stand in avx2
    levels    the same for weights of 8 and 4 bits
    vectors   loops over one vector; exp, erfc and the activations
    fused     all steps of a model in one call of these kernels
    sharing   how threads share out the work of a call
    entries   where Python enters compiled code
    jit       the settings with which all of it is compiled

And what Python does; it loads numba only where compiled code is not on disk yet:

    forward   the functions of `reference.py`, by these kernels
    panels    weights in the order in which the tile reads them
    programs  what a call needs: memory, pieces of work, the table of steps
    calls     arguments written down for compiled code
    threads   who runs a call
    code      compiled code on disk
    layout    sizes and tables that both sides know
    machine   the processor, and what the environment asks for

Every number of a result is computed by one fixed chain of operations: sums over a long axis are cut into blocks of
TERMS terms, a block is one chain of fused multiply-adds from zero, and the blocks are added up in order. The chain
depends on neither the number of rows, nor the batch, nor the threads, nor how a text was cut into calls: one call
over a whole text, chunks, single tokens and padded batches give the same bits.
"""

from .forward import (
    activate,
    attention,
    block,
    causal_logits,
    chained_product,
    embed,
    layer_norm,
    linear,
    log_probabilities,
    logits,
    mlp,
    needs_compilation,
    transformer,
    warmup,
)
from .layout import ROWS
from .panels import Panels, pack, pack_matrix, unpack
from .threads import get_num_threads, set_num_threads

__all__ = [
    "ROWS",
    "Panels",
    "activate",
    "attention",
    "block",
    "causal_logits",
    "chained_product",
    "embed",
    "get_num_threads",
    "layer_norm",
    "linear",
    "log_probabilities",
    "logits",
    "mlp",
    "needs_compilation",
    "pack",
    "pack_matrix",
    "set_num_threads",
    "transformer",
    "unpack",
    "warmup",
]
