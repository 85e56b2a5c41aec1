"""All blocks in one call: the kernels of `loops.py` one after another, by threads that wait for each other.

After a kernel has streamed its weights through the caches, what Python does until the next one takes 20 microseconds,
and waking threads takes about as long again. At seven calls a block that is a tenth of the time of a single token.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
# (numba infers the types of compiled functions from their arguments)

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import prange
from numba.core import types
from numba.extending import intrinsic

from ..arrays import Array
from ..weights import Blocks, BlockWeights, GPT2Weights, LayerNorm, Linear
from .jit import config, jit
from .loops import append_range, attend_range, layer_norm_range, linear_range
from .products import TERMS
from .threads import call_at, count, next_chunk, wait_for
from .vectors import ACTIVATION_CODES

STEPS = ("ln_1", "c_attn", "append", "attend", "c_proj", "ln_2", "c_fc", "c_proj")  # of a block
HEAD = len(STEPS)  # the steps after those of the last block, ln_f and lm_head, are numbered on
ATTEND = STEPS.index("attend")
PARTS = (0, 3), (3, 5), (5, 7), (7, 8)  # of these, with one linear map each


class Table(NamedTuple):
    """The weights of all blocks, for `block_steps`; it is as long as the blocks live.

    A last row has ln_f in the place of ln_1 and ln_2, and lm_head in the place of all linear maps.
    """

    addresses: Array  # (L + 1, 16) int64: weight and bias of ln_1, ln_2; data, scales, biases of four linear maps each
    epsilons: Array  # (L + 1, 2)
    factors: Array  # (L,), of the scores
    activations: Array  # (L,) int64, ACTIVATION_CODES
    alike: bool  # whether each block has the forms and shapes of the first, and its matrices one form
    head_alike: bool  # whether lm_head has that form, too
    arrays: list[list[Array]]  # what is at the addresses
    head: tuple[LayerNorm, Any, Array]  # what the last row was made of


def linear_maps(b: BlockWeights) -> tuple[Linear, ...]:
    return b.attn.c_attn, b.attn.c_proj, b.mlp.c_fc, b.mlp.c_proj


def tabulate(w: GPT2Weights) -> Table:
    """The Table of a model, which is kept with its blocks if they are Blocks."""
    kept: Table | None = getattr(w.h, "table", None)
    head = w.ln_f, w.lm_head, w.lm_head_bias
    if kept is None or any(one is not other for one, other in zip(kept.head, head, strict=True)):
        norms = [(*b.ln_1[:2], *b.ln_2[:2]) for b in w.h] + [w.ln_f[:2] * 2]
        maps = [linear_maps(b) for b in w.h] + [(Linear(w.lm_head, w.lm_head_bias),) * 4]
        arrays = []
        for norm, linears in zip(norms, maps, strict=True):
            weights, biases = zip(*linears, strict=True)
            given = [*norm, *(m.data for m in weights), *(m.scales for m in weights), *biases]
            arrays.append([np.require(array, requirements=["C", "A"]) for array in given])
        shapes = {tuple((array.shape, array.dtype) for array in row) for row in arrays[:-1]}
        *forms, of_head = [{(row[i].dtype, row[i + 4].ndim) for i in range(4, 8)} for row in arrays]
        alike = len(shapes) == 1 and len(forms[0]) == 1
        kept = Table(
            np.array([[array.ctypes.data for array in row] for row in arrays], np.int64),
            np.array([(b.ln_1.epsilon, b.ln_2.epsilon) for b in w.h] + [(w.ln_f.epsilon,) * 2], np.float64),
            np.array([b.attn.scale for b in w.h], np.float64),
            np.array([ACTIVATION_CODES[b.mlp.activation] for b in w.h], np.int64),
            alike,
            alike and forms[0] == of_head,
            arrays,
            head,
        )
        if isinstance(w.h, Blocks):
            w.h.table = kept
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
    """One thread's part of some STEPS of some blocks, on the residual stream in place.

    counters: (blocks, STEPS + 2, 2, 8) zeros, of each step the tickets given out and the pieces that are done, on
    cache lines of their own. pieces, smallest: (STEPS + 2,), see `threads.run_pieces`. blocks: first and last + 1;
    steps: first, last + 1, and last + 1 in the last of these blocks. norm, weights, scales, biases, cache: arrays that
    those at `addresses` (see Table) and `cached` (L,) are like.
    rows: (R, C), the stream. inputs, outputs: of the four linear maps and lm_head.

    A step begins when all pieces of the last one are done, whoever did them: a thread that comes late, or never, is
    not waited for.
    """
    for block in range(blocks[0], blocks[1]):
        keys_and_values = moved(cache, cached[block])
        for step in range(steps[0], steps[1] if block + 1 < blocks[1] else steps[2]):
            ticket, done = counters[block, step, 0], counters[block, step, 1]
            row = block + (1 if step >= HEAD else 0)
            place = addresses[row]
            begin, end = next_chunk(ticket, workers, pieces[step], smallest[step])
            while begin < pieces[step]:
                if step == 0 or step == 5 or step == HEAD:
                    n = 2 if step == 5 else 0
                    weight, shift = moved(norm, place[n]), moved(norm, place[n + 1])
                    layer_norm_range(begin, end, scratch, rows, weight, shift, epsilons[row, n // 2], inputs[0])
                elif step == 2:
                    append_range(begin, end, outputs[0], keys_and_values, start)
                elif step == 3:
                    attend_range(
                        begin, end, scratch, outputs[0], keys_and_values, keys_and_values.reshape(-1), factors[block],
                        visible, inputs[1], no_probs,
                    )  # fmt: skip
                else:
                    i = 0 if step == 1 else 1 if step == 4 else 4 if step == HEAD + 1 else step - 4
                    p = 4 + i % 4
                    linear_range(
                        begin, end, scratch, inputs[i], moved(weights[i], place[p]), moved(scales[i], place[p + 4]),
                        moved(biases[i], place[p + 8]), activations[block] if i == 2 else 0, i % 2 == 1, TERMS, group,
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
