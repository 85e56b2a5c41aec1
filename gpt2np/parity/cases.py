"""The inputs of a comparison: recorded data sets, prompts, and random tokens."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..call import check_ids
from ..errors import InputError, TokenizerError
from ..files import read_arrays
from ..onnx.read.datasets import DataSet, expand, find_sets, load_set
from ..onnx.recognise.recognised import LENGTHS
from ..signature import Feeds
from ..weights import Array
from .subject import Subject

if TYPE_CHECKING:
    from ..onnx.recognise import Port


DEFAULT_PROMPTS = 3
SEARCH_TOKENS = 64  # the search for a cause takes the largest input up to this size, or else the smallest


class Case(NamedTuple):
    """One call that every party makes, and the recorded result of it if there is one."""

    name: str
    feeds: dict[str, Array]
    data: DataSet | None

    @property
    def recorded(self) -> bool:
        return self.data is not None


def cases_from_data(sets: Sequence[DataSet]) -> list[Case]:
    """Data sets as cases; folders of one name, in two places, are told apart by a number: results are kept by name."""
    names = [s.name for s in sets]
    times = [names[:i].count(name) for i, name in enumerate(names)]
    return [Case(f"{s.name} ({n + 1})" if n else s.name, s.inputs, s) for s, n in zip(sets, times, strict=True)]


def case_from_ids(model: Subject, name: str, ids: Array, past: Feeds | None = None) -> Case:
    """A call on token ids (B, T), as the file declares its inputs.

    `past` holds its past inputs by name, (.., B, H, P, D) each; without it there is none, or zeros if it needs one.
    """
    B, T = ids.shape
    config, lengths = model.config, model.recognised.lengths
    pasts = [port for port in model.recognised.inputs if port.role in ("past_key", "past_value", "past")]
    held = next((length for port in pasts if isinstance(length := port.shape[-2], int)), 0)
    P = 0 if lengths else held  # a buffer may be empty, a past of fixed length may not
    P = next(iter(past.values())).shape[-2] if past else P
    feeds: dict[str, Array] = {}
    for port in model.recognised.inputs:
        if port.role == "input_ids":
            leading = {1: (), 2: (B,), 3: (1, B)}[len(port.shape)]
            if len(port.shape) == 1 and B != 1:
                raise InputError(f"{model.path} takes one sequence at a time, not {B}")
            feeds[port.name] = ids.reshape(*leading, T).astype(port.dtype)
        elif port.role == "position_ids":
            rows = np.broadcast_to(np.arange(P, P + T), (B, T))
            feeds[port.name] = (rows if len(port.shape) == 2 else rows[0]).astype(port.dtype)
        elif port.role in ("attention_mask", "attention_bias"):
            feeds[port.name] = _mask(port, B, T, P + T)
        elif port.role == "token_type_ids":
            feeds[port.name] = np.zeros((B, T), port.dtype)
        elif port.role in ("past_key", "past_value", "past"):
            shape = (B, config.n_head, held, config.head_size)
            feeds[port.name] = np.zeros((2, *shape) if port.role == "past" else shape, port.dtype)
        elif port.role == "use_cache_branch":
            feeds[port.name] = np.full(1, past is not None)
        elif port.role in LENGTHS:
            one = B if port.role == "seqlens_k" else 1
            feeds[port.name] = np.full([one] * len(port.shape), -LENGTHS[port.role](T), port.dtype)
        elif port.role == "beam_width":
            feeds[port.name] = np.ones(1, port.dtype)
        elif port.role == "cache_indirection":
            feeds[port.name] = np.zeros((B, 1, held), port.dtype)
        else:
            raise InputError(f"do not know what to give the input {port.name!r} ({port.role}) of {model.path}")
    return Case(name, feeds | dict(past or {}), None)


def _mask(port: Port, B: int, T: int, S: int) -> Array:
    """Attention to all keys or, where the file takes a mask for each query, to those up to its own."""
    rank = len(port.shape)
    if rank == 2:
        seen: Array = np.ones((B, S), bool)
    else:
        sizes = (d if isinstance(d, int) else n for d, n in zip(port.shape[-2:], (T, S), strict=True))
        rows, columns = sizes
        seen = np.tri(T, S, S - T, dtype=bool) if rows > 1 else np.ones((1, S), bool)
        seen = np.broadcast_to(seen, (B, 1, *seen.shape))
        seen = np.pad(seen, [(0, 0), (0, 0), (0, rows - seen.shape[2]), (0, columns - S)])
        seen = seen[:, 0] if rank == 3 else seen
    if port.role == "attention_bias":
        return np.where(seen, 0, np.finfo(port.dtype).min).astype(port.dtype)
    return seen.astype(port.dtype)


def random_cases(model: Subject, count: int, seed: int, longest: int = 48, full: bool = False) -> list[Case]:
    """`count` prompts of random tokens, of random lengths and one or two sequences each."""
    rng = np.random.default_rng(seed)
    config = model.config
    declared = next(p.shape for p in model.recognised.inputs if p.role == "input_ids")
    fixed = [size if isinstance(size, int) else 0 for size in declared]
    buffers = [p.shape[-2] for p in model.recognised.inputs if p.role.startswith("past") and model.recognised.lengths]
    rows = [size for size in buffers if isinstance(size, int)]
    room = min([config.n_ctx if full else longest, config.n_ctx - config.position_offset, *rows])
    cases = []
    for i in range(count):
        B = math.prod(fixed[:-1]) if all(fixed[:-1]) else 1 if full else int(rng.integers(1, 3))
        T = fixed[-1] or (room if full else int(rng.integers(1, room + 1)))
        cases.append(case_from_ids(model, f"random_{i}", rng.integers(0, config.vocab_size, (B, T))))
    return cases


def gather_cases(
    model: Subject, data: Sequence[Path], prompts: Sequence[str], count: int, seed: int, ids: Sequence[str] = (),
    skip: int = 0,
) -> list[Case]:  # fmt: skip
    """The inputs to compare on: data sets (by default those beside the model), prompts, random tokens.

    Of the `count` random prompts the first `skip` are left out.
    """
    folders = expand(data) if data else [] if prompts or count or ids else find_sets(model.path)
    cases = cases_from_data([load_set(folder, model.input_names, model.output_names) for folder in folders])
    for i, prompt in enumerate(prompts):
        cases.append(case_from_ids(model, f"prompt_{i}", prompt_ids(model, prompt)))
    for i, text in enumerate(ids):
        cases.append(case_from_ids(model, f"ids_{i}", given_ids(text, model)))
    if not cases and not data and not count:
        return default_cases(model, seed) if model.found is not None else []
    return cases + (random_cases(model, count, seed)[skip:] if count else [])


def given_ids(text: str, model: Subject) -> Array:
    """Token ids (B, T) of --ids: "1,2,3", or an .npy, an .npz or a text file of them.

    Raises
    ------
    InputError, TokenRangeError
        If there are none, they are no whole numbers, or one is no token of the model.
    """
    path = Path(text)
    try:
        if path.suffix == ".npy":
            value = np.load(path, allow_pickle=False)
        elif path.suffix == ".npz":
            arrays = read_arrays(path, InputError)
            wanted = [n for n in arrays if n.removeprefix("input/") in (*model.input_names, "ids", "input_ids")]
            if not wanted and len(arrays) != 1:
                raise InputError(f"--ids {text}: none of its arrays {', '.join(arrays)} is called ids")
            value = arrays[wanted[0] if wanted else next(iter(arrays))]
        else:
            # os.path, not Path: many ids are longer than a file's name can be
            words = (path.read_text(encoding="utf-8") if os.path.isfile(text) else text).strip().removesuffix(",")
            value = np.array([int(word) for word in re.split(r"\s*,\s*|\s+", words) if words], np.int64)
    except (OSError, ValueError, OverflowError, EOFError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"--ids takes whole numbers as 1,2,3, or a file of them; {text}: {error}") from None
    if value.dtype.kind not in "iu" or not value.size:
        raise InputError(f"--ids {text}: expected whole numbers, got {value.dtype} {value.shape}")
    return check_ids(np.atleast_2d(value).reshape(-1, value.shape[-1]), model.config)


def default_cases(model: Subject, seed: int = 0) -> list[Case]:
    """What is compared on where nobody says: a few random prompts, one of them as long as the context allows."""
    cases = random_cases(model, DEFAULT_PROMPTS, seed)
    longest = random_cases(model, 1, seed, full=True)[0]
    return [*cases, longest._replace(name="random_full_context")]


def prompt_ids(model: Subject, prompt: str) -> Array:
    """Token ids (1, T) of a text, by the tokenizer beside the model."""
    from .. import tokenizer

    found = tokenizer.find_beside(model.path)
    if found is None:
        raise TokenizerError(f"no tokenizer beside {model.path}: --prompt needs one, --random and --data do not")
    ids = found.encode(prompt).ids
    if not ids:
        raise InputError("the prompt is empty")
    return np.array([ids], np.int64)


def pick(cases: Sequence[Case], model: Subject, failing: set[str]) -> Case:
    """The input to search on: a failing one, large enough to tell and small enough to be quick."""
    wanted = [c for c in cases if c.name in failing] or list(cases)
    sizes = {c.name: model.call(c.feeds).input_ids.size for c in wanted}
    small = [c for c in wanted if sizes[c.name] <= SEARCH_TOKENS]
    return max(small, key=lambda c: sizes[c.name]) if small else min(wanted, key=lambda c: sizes[c.name])
