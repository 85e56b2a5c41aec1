"""`gpt2np parity` of a file that searches: its sequences token by token, and its GPT-2 by itself, as a file of its own.

A search chooses; so a sequence is right or wrong, and no budget can excuse one. How near the scores are that it
chooses by is seen in the GPT-2 inside, which is compared as any other file is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..errors import Gpt2npError, InputError
from ..onnx.read.datasets import expand, find_sets, load_set
from ..onnx.recognise.search import Search, decoder_model
from ..weights import Array
from .budgets import parse_budgets
from .capture import Options, run_case
from .cases import Case, cases_from_data, prompt_ids
from .compare import compare_case, parties, tell_outputs_of_one_file
from .metrics import Budget
from .parties import Ours, Runner, runner_of
from .report import Report
from .subject import Subject
from .trace import versions

Outputs = Mapping[str, Mapping[str, Array] | Gpt2npError]  # of each party
EXACT = Budget(0, 0, "tokens are the same or not")
NEW_TOKENS = 8  # at most, of a random case
ANY_FILE = {"ort", "ort-off", "ort-1t", "onnxref", "numpy", "numba", "float64"}  # parties that run any file


def search_parity(model: Subject, search: Search, options: Options, plain: Callable[[Options], Report]) -> Report:
    """Compare sequences exactly, and the decoder by `plain`, the comparison of a file that does not search."""
    budgets = parse_budgets(options.preset, options.rtol, options.atol)
    for port in search.outputs:
        if port.role == "sequences":
            budgets.measured[port.name] = EXACT
    cases = _cases(model, search, options)
    asked = options.against or ["ort"]
    runners: list[Runner] = [Ours(model, options.engine), *(runner_of(model, text, options.engine) for text in asked)]
    report = Report(str(model.path), parties(runners, cases), str(budgets.default), versions=versions())
    if "outputs" in options.checks:
        tell_outputs_of_one_file(report, model, runners)
        for case in cases:
            case, outputs = _ended(search, case, run_case(case, runners))
            report.comparisons += compare_case(case, model, runners, budgets, outputs)
    if not cases:
        report.not_compared.append(f"no test_data_set_* beside {model.path}: give --data, --prompt or --random")
    if any(not c.ok and c.budget is EXACT for c in report.comparisons):
        report.headline = "the searches choose other tokens; see how far apart the scores of the GPT-2 inside are"
    others = [text for text in asked if text in ANY_FILE]
    if not others:
        report.not_compared.append(f"the GPT-2 inside: {', '.join(asked)} cannot run it by itself")
        return report
    with tempfile.TemporaryDirectory(prefix="gpt2np-") as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(decoder_model(model.path))
        rtol, atol = ([t for t in given if ":" not in t] for given in (options.rtol, options.atol))
        options = replace(options, rtol=rtol, atol=atol)  # the ones for single outputs are the sequences'
        inner = plain(replace(options, model=path, against=others, data=[], prompts=[], random=max(1, options.random)))
    for found in inner.comparisons:
        found.case = f"inside, {found.case}"
    report.comparisons += inner.comparisons
    report.checks += inner.checks
    report.tables += inner.tables
    report.details |= inner.details
    report.not_compared += [f"of the GPT-2 inside: {text}" for text in inner.not_compared]
    report.headline = inner.headline or report.headline
    return report


def _ended(search: Search, case: Case, given: Outputs) -> tuple[Case, Outputs]:
    """The same up to where the last sequence ends: behind it ONNX Runtime's greedy search leaves what was in memory."""
    name = next((port.name for port in search.outputs if port.role == "sequences"), "")
    eos, pad = (int(search.attribute(f"{what}_token_id", -1)) for what in ("eos", "pad"))
    ours = given.get("ours")
    if search.kind not in ("GreedySearch", "Sampling") or not isinstance(ours, Mapping) or name not in ours:
        return case, given
    start = next(case.feeds[port.name].shape[1] for port in search.inputs if port.role == "input_ids")
    over = np.flatnonzero(np.isin(ours[name][:, start:], (eos, pad)).all(axis=0))
    stop = start + int(over[0]) + 1 if over.size else ours[name].shape[1]

    def cut(outputs: Mapping[str, Array]) -> dict[str, Array]:
        return {key: value[:, :stop] if key == name else value for key, value in outputs.items()}

    data = case.data and case.data._replace(outputs=cut(case.data.outputs))
    return case._replace(data=data), {n: o if isinstance(o, Gpt2npError) else cut(o) for n, o in given.items()}


def _cases(model: Subject, search: Search, options: Options) -> list[Case]:
    """Recorded data, prompts and random tokens, with everything else that the search is told."""
    given = bool(options.prompts or options.random)
    folders = expand(options.data) if options.data else [] if given else find_sets(model.path)
    names = [p.name for p in search.inputs], [p.name for p in search.outputs]
    cases = cases_from_data([load_set(folder, *names) for folder in folders])
    for i, prompt in enumerate(options.prompts):
        cases.append(_case(model, search, f"prompt_{i}", prompt_ids(model, prompt), NEW_TOKENS))
    return cases + random_search_cases(model, search, options.random, options.seed)


def random_search_cases(model: Subject, search: Search, count: int, seed: int) -> list[Case]:
    """`count` prompts of random tokens, each with a few tokens to come."""
    rng = np.random.default_rng(seed)
    config = model.config
    declared = next((p.shape for p in search.inputs if p.role == "input_ids"), ())
    B, size = (n if isinstance(n, int) else 0 for n in (*declared, None, None)[:2])
    cases = []
    for i in range(count):
        new = int(rng.integers(1, NEW_TOKENS + 1))
        T = size or int(rng.integers(1, min(32, config.n_ctx - new) + 1))
        cases.append(_case(model, search, f"random_{i}", rng.integers(0, config.vocab_size, (B or 1, T)), new))
    return cases


def _case(model: Subject, search: Search, name: str, ids: Array, new: int) -> Case:
    (B, T), V = ids.shape, model.config.vocab_size
    made: dict[str, Array] = {
        "input_ids": ids,
        "attention_mask": np.ones((B, T)),
        "new_tokens": np.array(new),
        "max_length": np.array([T + new]),
        "min_length": np.array([T]),
        "num_beams": np.array([4]),
        "num_return_sequences": np.array([2]),
        "length_penalty": np.array([1.0]),
        "repetition_penalty": np.array([1.0]),
        "seed": np.array([new]),
        "presence_mask": np.zeros((B, V)),
        "vocab_mask": np.ones(V),
        "prefix_vocab_mask": np.ones((B, V)),
    }
    feeds: dict[str, Array] = {}
    for port in search.inputs:
        if port.role not in made:
            raise InputError(f"do not know what to give the input {port.name!r} ({port.role}) of {model.path}")
        value = made[port.role]
        shape = value.shape if value.size > 1 or port.role == "input_ids" else [1] * len(port.shape)
        feeds[port.name] = value.reshape(shape).astype(port.dtype)
    return Case(name, feeds, None)
