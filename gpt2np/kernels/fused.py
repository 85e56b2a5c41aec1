"""All blocks in one call: the kernels of `loops.py` one after another, by threads that wait for each other.

After a kernel has streamed its weights through the caches, what Python does until the next one takes 20 microseconds,
and waking threads takes about as long again. At seven calls a block that is a tenth of the time of a single token.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
# (numba infers the types of compiled functions from their arguments)

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numba import prange
from numba.core import types
from numba.extending import intrinsic

from ..arrays import Array
from ..weights import Blocks, BlockWeights, Linear
from .jit import config, jit
from .loops import append_range, attend_range, layer_norm_range, linear_range
from .products import TERMS
from .threads import call_at, count, next_chunk, wait_for
from .vectors import ACTIVATION_CODES

STEPS = ("ln_1", "c_attn", "append", "attend", "c_proj", "ln_2", "c_fc", "c_proj")  # of a block
ATTEND = STEPS.index("attend")
PARTS = (0, 3), (3, 5), (5, 7), (7, 8)  # of these, with one linear map each


class Table(NamedTuple):
    """The weights of all blocks, for `block_steps`; it is as long as the blocks live."""

    addresses: Array  # (L, 16) int64: weight and bias of ln_1, of ln_2; data, scales, biases of four linear maps each
    epsilons: Array  # (L, 2)
    factors: Array  # (L,), of the scores
    activations: Array  # (L,) int64, ACTIVATION_CODES
    alike: bool  # whether each block has the forms and shapes of the first, and its matrices one form
    arrays: list[list[Array]]  # what is at the addresses


def linear_maps(b: BlockWeights) -> tuple[Linear, ...]:
    return b.attn.c_attn, b.attn.c_proj, b.mlp.c_fc, b.mlp.c_proj


def tabulate(blocks: tuple[BlockWeights, ...]) -> Table:
    """The Table of some blocks, which is kept with them if they are Blocks."""
    kept: Table | None = getattr(blocks, "table", None)
    if kept is None:
        arrays = []
        for b in blocks:
            weights, biases = zip(*linear_maps(b), strict=True)
            given = [*b.ln_1[:2], *b.ln_2[:2], *(w.data for w in weights), *(w.scales for w in weights), *biases]
            arrays.append([np.require(array, requirements=["C", "A"]) for array in given])
        forms = {tuple((array.shape, array.dtype) for array in row) for row in arrays}
        matrices = {(row[i].dtype, row[i + 4].ndim) for row in arrays for i in range(4, 8)}
        kept = Table(
            np.array([[array.ctypes.data for array in row] for row in arrays], np.int64),
            np.array([(b.ln_1.epsilon, b.ln_2.epsilon) for b in blocks], np.float64),
            np.array([b.attn.scale for b in blocks], np.float64),
            np.array([ACTIVATION_CODES[b.mlp.activation] for b in blocks], np.int64),
            len(forms) == 1 and len(matrices) == 1,
            arrays,
        )
        if isinstance(blocks, Blocks):
            blocks.table = kept
    return kept


@intrinsic
def _moved(_, like, address):
    def generate(context, builder, _, values):
        array = context.make_array(like)(context, builder, values[0])
        moved = context.make_array(like)(context, builder)
        for field in ("nitems", "itemsize", "shape", "strides"):
            setattr(moved, field, getattr(array, field))
        moved.data = builder.inttoptr(values[1], array.data.type)
        moved.meminfo, moved.parent = array.meminfo.type(None), array.parent.type(None)
        return moved._getvalue()

    return like(like, types.int64), generate


def _moved_in_python(like: Array, address: int) -> Array:
    memory = (ctypes.c_char * like.nbytes).from_address(int(address))
    return np.frombuffer(memoryview(memory), like.dtype).reshape(like.shape)


# moved(like, address): the array of that type and shape at another address, which someone else keeps alive
moved: Callable[..., Array] = _moved_in_python if config.DISABLE_JIT else _moved


@jit()
def block_steps(
    counters, workers, pieces, smallest, blocks, steps, scratch, addresses, epsilons, factors, activations, norm,
    weights, scales, biases, rows, inputs, outputs, group, cache, cached, start, visible, no_probs,
):  # fmt: skip
    """One thread's part of some STEPS of some blocks, first and last + 1 of each, on the residual stream in place.

    counters: (blocks, STEPS, 2, 8) zeros, of each step the tickets given out and the pieces that are done, on cache
    lines of their own. pieces, smallest: (STEPS,), see `threads.run_pieces`. norm, weights, scales, biases, cache:
    arrays that those at `addresses` (see Table) and `cached` (L,) are like.
    rows: (R, C), the stream. inputs, outputs: of the four linear maps.

    A step begins when all pieces of the last one are done, whoever did them: a thread that comes late, or never, is
    not waited for.
    """
    for block in range(blocks[0], blocks[1]):
        place = addresses[block]
        keys_and_values = moved(cache, cached[block])
        for step in range(steps[0], steps[1]):
            ticket, done = counters[block, step, 0], counters[block, step, 1]
            begin, end = next_chunk(ticket, workers, pieces[step], smallest[step])
            while begin < pieces[step]:
                if step == 0 or step == 5:
                    n = 0 if step == 0 else 1
                    weight, shift = moved(norm, place[2 * n]), moved(norm, place[2 * n + 1])
                    layer_norm_range(begin, end, scratch, rows, weight, shift, epsilons[block, n], inputs[0])
                elif step == 2:
                    append_range(begin, end, outputs[0], keys_and_values, start)
                elif step == 3:
                    attend_range(
                        begin, end, scratch, outputs[0], keys_and_values, keys_and_values.reshape(-1), factors[block],
                        visible, inputs[1], no_probs,
                    )  # fmt: skip
                else:
                    i = 0 if step == 1 else 1 if step == 4 else step - 4
                    linear_range(
                        begin, end, scratch, inputs[i], moved(weights[i], place[4 + i]), moved(scales[i], place[8 + i]),
                        moved(biases[i], place[12 + i]), activations[block] if i == 2 else 0, i % 2 == 1, TERMS, group,
                        outputs[i],
                    )  # fmt: skip
                count(done, end - begin)
                begin, end = next_chunk(ticket, workers, pieces[step], smallest[step])
            wait_for(done, pieces[step])


@jit(parallel=True)
def block_parallel(
    address, counters, workers, pieces, smallest, blocks, steps, scratch, addresses, epsilons, factors, activations,
    norm, weights, scales, biases, rows, inputs, outputs, group, cache, cached, start, visible, no_probs,
):  # fmt: skip
    for worker in prange(workers):
        call_at(
            address,
            (counters, workers, pieces, smallest, blocks, steps, scratch[worker], addresses, epsilons, factors,
             activations, norm, weights, scales, biases, rows, inputs, outputs, group, cache, cached, start, visible,
             no_probs),
        )  # fmt: skip
