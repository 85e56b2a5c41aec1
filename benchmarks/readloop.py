"""How near a token with a cache comes to reading its bytes: a token and a plain loop over as many bytes, in turns.

    python benchmarks/readloop.py [MODEL] [--cached 32 512 960] [--pairs 500]

A token reads every weight, and the keys and values so far, once. The loop reads so many bytes of other memory, at four
places at once in each of two threads: a processor reads several streams sooner than one. A share is the loop's time
divided by the token's, the median of all pairs: what disturbs the machine disturbs both. Matrices must be float32.
"""

from __future__ import annotations

import argparse
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
import numpy as np
from speed import THREADS, timed

import gpt2np
from gpt2np.arrays import empty_aligned
from gpt2np.commands._terminal import print_table


@numba.njit(nogil=True, fastmath=True)
def read(x: Any) -> Any:
    quarter = x.size // 4
    a, b, c, d = x[:quarter], x[quarter : 2 * quarter], x[2 * quarter : 3 * quarter], x[3 * quarter :]
    total = np.float32(0)
    for i in range(quarter):
        total += (a[i] + b[i]) + (c[i] + d[i])
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--cached", nargs="+", type=int, default=[32, 512, 960])
    parser.add_argument("--pairs", type=int, default=500)
    arguments = parser.parse_args()

    gpt2np.set_num_threads(min(THREADS, gpt2np.get_num_threads()))
    model = gpt2np.load(arguments.model, weights="float32")
    config, cache, rows = model.config, model.new_cache(), []
    C, L = config.n_embd, config.n_layer
    weights = L * (4 * C * C + 2 * C * config.n_inner) + config.vocab_size * C
    with ThreadPoolExecutor(THREADS) as threads:
        for cached in arguments.cached:
            model(np.arange(cache.length, cached)[None] % config.vocab_size, cache=cache, logits="last")
            size = weights + 2 * L * C * (cached + 1)
            memory = empty_aligned((size // (4 * THREADS) * 4 * THREADS,), np.float32)
            memory[:] = 1
            parts = np.split(memory, THREADS)

            def loop(parts: Any = parts) -> None:
                list(threads.map(read, parts))

            def token(cached: int = cached) -> None:
                model.next_logits([7], cache)
                cache.crop(cached)

            pairs = [(timed(loop), timed(token)) for _ in range(arguments.pairs + 5)][5:]
            loops, tokens = (statistics.median(column) for column in zip(*pairs, strict=True))
            share = statistics.median(a / b for a, b in pairs)
            rate = memory.nbytes / loops / 1e9
            rows.append((str(cached), f"{rate:.1f}", f"{loops * 1e3:.2f}", f"{tokens * 1e3:.2f}", f"{share:.3f}"))
    columns = (">tokens cached", ">GB/s read", ">ms for the loop", ">for a token", ">share")
    print_table(columns, rows, title=str(model))


if __name__ == "__main__":
    main()
