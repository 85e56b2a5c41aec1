"""Recorded data that is wrong while the file is right: what people do to a data set without noticing.

`RECORDS` maps a name to a Record: what is stored in place of the outputs, made from the right ones of the case and of
other inputs, and what the report must say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Array = np.ndarray
Outputs = dict[str, Array]
Runs = Callable[[Array], Outputs]  # token ids (B, T) -> what the file gives

PRESENTS = ("output2", "output3", "output4")
IDS = np.array([[5, 17, 30, 2, 7, 7, 19, 34], [2, 7, 7, 19, 34, 5, 17, 30], [33, 1, 4, 9, 16, 25, 36, 12]])
OTHER = np.roll(IDS, 3, axis=1)


class Record(NamedTuple):
    change: Callable[[Outputs, Runs, Array], Outputs]  # right outputs, the file itself, the ids that are stored
    said: tuple[str, ...]  # either of these must be in the report


def presents(change: Callable[[Array], Array], only: str = "") -> Callable[[Outputs, Runs, Array], Outputs]:
    return lambda o, run, ids: {n: change(v) if v.ndim == 5 and only in n else v for n, v in o.items()}


def every(change: Callable[[Array], Array]) -> Callable[[Outputs, Runs, Array], Outputs]:
    """Of outputs with the batch on axis 1, as the zoo's file has it."""
    return lambda o, run, ids: {n: change(v) for n, v in o.items()}


def put(name: str, at: tuple[int, ...], by: float) -> Callable[[Outputs, Runs, Array], Outputs]:
    def change(o: Outputs, run: Runs, ids: Array) -> Outputs:
        o[name][at] += by
        return o

    return change


def of_other_ids(change: Callable[[Array], Array]) -> Callable[[Outputs, Runs, Array], Outputs]:
    return lambda o, run, ids: run(change(ids.copy()))


def token(place: tuple[int, int], value: int) -> Callable[[Array], Array]:
    def change(ids: Array) -> Array:
        ids[place] = value
        return ids

    return change


RECORDS: dict[str, Record] = {
    "presents exchanged": Record(
        lambda o, run, ids: {**o, "output2": o["output3"], "output3": o["output2"]},
        ("output2 holds what belongs into output3",),
    ),
    "presents in reverse order": Record(
        lambda o, run, ids: {**o, **dict(zip(PRESENTS, [o[n] for n in PRESENTS[::-1]], strict=True))},
        ("output2 holds what belongs into output4",),
    ),
    "presents rolled": Record(
        lambda o, run, ids: {**o, **dict(zip(PRESENTS, [o[n] for n in (*PRESENTS[1:], PRESENTS[0])], strict=True))},
        ("output2 holds what belongs into output3",),
    ),
    "keys for values": Record(presents(lambda v: v[::-1]), ("values in place of keys",)),
    "keys for values in one layer": Record(presents(lambda v: v[::-1], "3"), ("values in place of keys",)),
    "one number": Record(put("output3", (0, 0, 1, 2, 3), 0.5), ("one number of",)),
    "one number of the hidden states": Record(put("output1", (0, 1, 4, 7), -0.25), ("one number of",)),
    "batch reversed": Record(every(lambda v: v[:, ::-1]), ("the sequences of its outputs are reversed",)),
    "batch rolled": Record(
        every(lambda v: np.roll(v, 1, axis=1)), ("the sequences of its outputs are rolled by 1", "rolled by")
    ),
    "batch of the hidden states alone": Record(
        lambda o, run, ids: {**o, "output1": o["output1"][:, ::-1]}, ("the sequences of output1 are reversed",)
    ),
    "positions reversed": Record(every(lambda v: np.flip(v, -2)), ("the positions of its outputs are reversed",)),
    "another token": Record(of_other_ids(token((0, 3), 11)), ("with token 11 at input_ids[0,3]",)),
    "another last token": Record(of_other_ids(token((1, -1), 9)), ("with token 9 at input_ids[1,",)),
    "two other tokens": Record(
        of_other_ids(lambda ids: token((0, 2), 8)(token((1, 5), 21)(ids))),
        ("8 at input_ids[0,2], 21 at input_ids[1,5]",),
    ),
    "tokens shifted": Record(of_other_ids(lambda ids: np.roll(ids, 1, axis=1)), ("shifted by one",)),
    "tokens reversed": Record(
        of_other_ids(lambda ids: ids[:, ::-1]), ("tokens came in reverse order", "reverse order")
    ),
    "other inputs": Record(lambda o, run, ids: run(OTHER), ("its outputs are those of the inputs of test_data_set_1",)),
    "tokens of another text": Record(
        lambda o, run, ids: run((ids * 5 + 3) % 37), ("it was recorded with other tokens",)
    ),
    "one present of other inputs": Record(
        lambda o, run, ids: {**o, "output3": run(OTHER)["output3"]},
        ("output3 is that of the inputs of test_data_set_1",),
    ),
    "one present of other tokens": Record(
        lambda o, run, ids: {**o, "output3": run((ids * 5 + 3) % 37)["output3"]}, ("output3 alone",)
    ),
    "three numbers": Record(
        lambda o, run, ids: put("output2", (1, 0, 2, 7, 0), 1)(
            put("output2", (0, 1, 1, 1, 1), -1)(put("output1", (0, 0, 0, 0), 1)(o, run, ids), run, ids), run, ids
        ),
        ("numbers of",),
    ),
    "one row": Record(
        lambda o, run, ids: put("output1", (0, 1, 4), 1)(o, run, ids), ("position 4", "where position 4")
    ),
    "NaN": Record(put("output3", (0, 0, 1, 2, 3), np.nan), ("holds nan",)),
    "one present of zeros": Record(presents(np.zeros_like, "3"), ("zeros: it was never written",)),
    "two sequences exchanged": Record(
        every(lambda v: v[:, [1, 0, 2]]), ("the sequences of its outputs are in the order 1, 0, 2",)
    ),
    "one sequence over again": Record(
        every(lambda v: v[:, [0, 0, 0]]), ("the sequences of its outputs are in the order 0, 0, 0",)
    ),
    "two positions exchanged": Record(
        every(lambda v: v[..., [0, 1, 3, 2, 4, 5, 6, 7], :]), ("positions of its outputs are in the order 0, 1, 3, 2",)
    ),
    "rounded to bfloat16": Record(
        every(lambda v: (v.view(np.uint32) & 0xFFFF0000).view(np.float32)), ("rounded to bfloat16",)
    ),
}
