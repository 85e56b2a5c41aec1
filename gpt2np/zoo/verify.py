"""Prove that a file is the model that facts are published about, and that gpt2np computes them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..errors import ComparisonError, Gpt2npError
from ..weights import Array, weight_shapes
from .facts import Facts, KnownFile
from .manifest import file_hash

if TYPE_CHECKING:
    from ..cache import KVCache
    from ..model import GPT2
    from ..onnx.recognise import Recognised
    from ..parity.metrics import Budget
    from ..parity.parties import Ours
    from ..parity.subject import Subject

Result = Literal["pass", "FAIL", "skip"]
NO_TOKENIZER = "needs a tokenizer beside the model; `gpt2np fetch tokenizer` gets GPT-2's two files"
Outputs = Mapping[str, Array]  # by the file's names
LISTED = 5  # how many of many differences are named


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    group: str  # "file", "config", "weights", "facts", "sample data", "ONNX Runtime"
    what: str
    result: Result
    found: str  # in words and numbers
    source: str = ""  # who says so


def verify(
    path: Path,
    facts: Sequence[Facts],
    known_files: Sequence[KnownFile] = (),
    checkpoint: Path | None = None,
    engine: str = "numba",
) -> Iterator[Finding]:
    """Yield check after check of a model file.

    Parameters
    ----------
    path : Path
        A model.onnx or a folder with one in it.
    facts : sequence of Facts
        What is known about the models that the file may be; it is compared with the one that has its
        configuration, or else with the first.
    known_files : sequence of KnownFile
        Published files whose hash proves the whole file.
    checkpoint : Path, optional
        A verified model.safetensors beside its config.json, with which the weights are compared bit by bit.
    engine : str
        The engine that computes.

    Raises
    ------
    ModelFileError, UnsupportedModelError, WeightError
        If the file cannot be read, or is no GPT-2 at all.
    """
    from ..onnx.read.reader import open_model
    from ..parity.parties import Ours
    from ..parity.subject import Subject

    model = Subject(open_model(path).path)
    yield check_file(model.path, known_files)
    if model.found is None:
        yield Finding("graph", facts[0].model, "FAIL", f"gpt2np cannot place the graph: {model.problem}")
        return
    wrong = {one.model: wrong_config(model.recognised, one) for one in facts}
    chosen = next((one for one in facts if not wrong[one.model]), facts[0])
    yield from check_config(chosen, wrong[chosen.model])
    yield from check_fingerprints(model.recognised, chosen)
    if checkpoint is not None:
        yield from check_against(model.recognised, checkpoint)
    ours = Ours(model, engine)
    if wrong[chosen.model]:
        words = f"they are about {chosen.model}, which this file is not"
        yield Finding("facts", f"{len(chosen.facts)} facts", "skip", words)
    else:
        yield check_tokenizer(ours.gpt2, chosen)
        for fact in chosen.facts:
            yield check_search(ours, fact) if fact["kind"] == "beam_search" else check_fact(ours.gpt2, fact)
    yield from check_runs(model, ours)


# --- is it that model? ---------------------------------------------------------------------------------------


def check_file(path: Path, known: Sequence[KnownFile]) -> Finding:
    """The SHA-256 of the whole file, against those of published files."""
    what = f"SHA-256 of {path.name}"
    size, found = path.stat().st_size, file_hash(path)
    for file in known:
        if found == file.sha256:
            return Finding("file", what, "pass", f"{found}: it is {file.name}", "published hash")
    for file in known:
        if size == file.bytes:
            words = f"{found}: as long as {file.name}, whose SHA-256 is {file.sha256}: altered or damaged"
            return Finding("file", what, "FAIL", words, "published hash")
    return Finding("file", what, "skip", f"{found}: no published file has it, so that the weights must decide")


def wrong_config(recognised: Recognised, facts: Facts) -> list[str]:
    """What of the configuration is not as known, in words."""
    config = recognised.config
    wrong = [
        f"{field} is {getattr(config, field, None)}, that of {facts.model} {expected}"
        for field, expected in facts.config.items()
        if not _same(getattr(config, field, None), expected)
    ]
    count = sum(math.prod(shape) for name, shape in weight_shapes(config).items() if name != "lm_head.weight")
    if facts.parameters not in (None, count):
        wrong.append(f"it has {count:,} parameters, {facts.model} {facts.parameters:,}")
    return wrong


def check_config(facts: Facts, wrong: list[str]) -> Iterator[Finding]:
    """The configuration; its checks carry the name of the model that all others are about."""
    for words in wrong:
        yield Finding("config", facts.model, "FAIL", words)
    if not wrong:
        yield Finding(
            "config", facts.model, "pass", f"{len(facts.config)} fields and the number of parameters are the same"
        )


def _same(found: Any, expected: Any) -> bool:
    if isinstance(found, float) and isinstance(expected, int | float):
        return math.isclose(found, expected, rel_tol=1e-5)  # the file may hold it as a float32
    return bool(found == (tuple(expected) if isinstance(expected, list) else expected))


def _short(value: Any) -> str:
    return ", ".join(f"{x:.7g}" for x in np.ravel(value))


def check_fingerprints(recognised: Recognised, facts: Facts) -> Iterator[Finding]:
    """Norm, largest value, first values and, where known, the bytes of single weights."""
    expected = facts.weights.get("fingerprints", {})
    if not expected:
        yield Finding("weights", "fingerprints", "skip", "none are known")
    else:
        wrong = {name: list(_differences(recognised, name, facts)) for name in expected}
        lines = [line for lines in wrong.values() for line in lines]
        for words in lines[:LISTED]:
            yield Finding("weights", "fingerprint", "FAIL", words)
        if len(lines) > LISTED:
            yield Finding("weights", "fingerprint", "FAIL", f"and {len(lines) - LISTED} more differences")
        matching, total = sum(not lines for lines in wrong.values()), len(weight_shapes(recognised.config))
        words = f"{matching} of {len(expected)} match; the file has {total} weights"
        if bitwise := sum("sha256" in known and name in recognised.sources for name, known in expected.items()):
            words += f"; {bitwise} were compared byte by byte"
        source = facts.weights.get("source", "")
        yield Finding("weights", "fingerprints", "FAIL" if lines else "pass", words, source)
    if facts.weights.get("tied") and not recognised.config.tied:
        same = np.array_equal(recognised.sources["lm_head.weight"].load(), recognised.sources["wte.weight"].load())
        yield Finding("weights", "LM head", "pass" if same else "FAIL", f"{'equal to' if same else 'NOT'} wte")


def _differences(recognised: Recognised, name: str, facts: Facts) -> Iterator[str]:
    """What differs between one weight and its published figures, in words."""
    expected = facts.weights["fingerprints"][name]
    if name not in recognised.sources:
        yield f"{name} is not there"
        return
    source = recognised.sources[name]
    if list(source.shape) != expected["shape"]:
        yield f"{name} has shape {source.shape}, expected {tuple(expected['shape'])}"
        return
    found = fingerprint(source.load())
    for key in ("l2", "max_abs", "first"):
        tolerance = facts.weights.get(key, {"rtol": 0, "atol": 0})
        if key in expected and not np.allclose(
            np.ravel(found[key])[: np.size(expected[key])], expected[key], **tolerance
        ):
            yield f"{name}: {key} is {_short(found[key])}, expected {_short(expected[key])}"
    if found["sha256"] != expected.get("sha256", found["sha256"]):
        yield f"{name}: its bytes differ from the published ones"


def fingerprint(weight: Array) -> dict[str, Any]:
    """What tells one weight from another: see `facts.py`."""
    flat = np.ascontiguousarray(weight, "<f4").ravel()
    return {
        "shape": list(weight.shape),
        "l2": float(np.linalg.norm(flat.astype(np.float64))),
        "max_abs": float(np.abs(flat).max()),
        "first": [float(x) for x in flat[:3]],
        "sha256": hashlib.sha256(flat.data).hexdigest(),
    }


def check_against(recognised: Recognised, checkpoint: Path) -> Iterator[Finding]:
    """Every weight, bit by bit, against a verified checkpoint."""
    from ..convert.huggingface import read_checkpoint

    config, sources = read_checkpoint(checkpoint)
    what = "bit by bit"
    if weight_shapes(config).keys() - {"lm_head.weight"} != weight_shapes(recognised.config).keys() - {
        "lm_head.weight"
    }:
        yield Finding("weights", what, "FAIL", f"{checkpoint} has other weights than this file", str(checkpoint))
        return
    wrong = []
    for name, source in sources.items():
        if name in recognised.sources and not np.array_equal(recognised.sources[name].load(), source.load()):
            wrong.append(name)
    if wrong:
        more = f" and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
        yield Finding("weights", what, "FAIL", f"{', '.join(wrong[:LISTED])}{more} differ", str(checkpoint))
    else:
        yield Finding(
            "weights", what, "pass", f"all {len(sources)} weights are those of the checkpoint", str(checkpoint)
        )


# --- does gpt2np compute what is published? ------------------------------------------------------------------


def check_tokenizer(gpt2: GPT2, facts: Facts) -> Finding:
    """The published prompts' token ids."""
    from ..tokenizer import encode

    prompts = [fact for fact in facts.facts if "prompt" in fact]
    if gpt2.tokenizer is None or not prompts:
        return Finding("facts", "tokenizer", "skip", NO_TOKENIZER if prompts else "no prompts are known")
    for fact in prompts:
        if (found := encode(gpt2.tokenizer, fact["prompt"])) != fact["ids"]:
            words = f"{fact['prompt']!r} gives {found}, published {fact['ids']}"
            return Finding("facts", "tokenizer", "FAIL", words, fact["source"])
    return Finding("facts", "tokenizer", "pass", f"{len(prompts)} prompts give the published tokens")


def check_fact(gpt2: GPT2, fact: dict[str, Any]) -> Finding:
    """One published result."""
    check = {"greedy": _greedy, "logits": _logits, "hidden": _hidden, "cross_entropy": _cross_entropy}[fact["kind"]]
    what = (
        f"{fact['kind'].replace('_', '-')} {fact['prompt']!r}" if "prompt" in fact else f"{fact['kind']} {fact['ids']}"
    )
    try:
        result, found = check(gpt2, fact)
    except Gpt2npError as error:
        result, found = "FAIL", str(error)
    except (IndexError, ValueError) as error:  # more tokens or values than the model has
        result, found = "FAIL", f"it does not fit this model: {error}"
    return Finding("facts", what, result, found, fact["source"])


def check_search(ours: Ours, fact: dict[str, Any]) -> Finding:
    """A published result of a beam search, by the search that the file holds."""
    search = ours.model.recognised.search
    what = f"beam search {fact['ids']}, {fact['new_tokens']} new tokens"
    if search is None or search.body is None or search.body.width != fact["width"]:
        return Finding("facts", what, "skip", f"the file holds no beam search of width {fact['width']}", fact["source"])
    ids = np.array([fact["ids"]])
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "new_tokens": np.array(fact["new_tokens"])}
    try:
        feeds = {port.name: given[port.role].astype(port.dtype) for port in search.inputs}
        feeds |= {p.name: feeds[p.name].reshape([1] * len(p.shape)) for p in search.inputs if p.role == "new_tokens"}
        found = ours.session.run(None, feeds)[0][0].tolist()
    except Gpt2npError as error:
        return Finding("facts", what, "FAIL", str(error), fact["source"])
    words = f"the best sequence is {found}" + ("" if found == fact["first"] else f", published {fact['first']}")
    return Finding("facts", what, "pass" if found == fact["first"] else "FAIL", words, fact["source"])


def _run_logits(gpt2: GPT2, ids: list[int], cache: KVCache | None = None) -> Array:
    logits = gpt2([ids], cache).logits
    assert logits is not None
    return np.asarray(logits[0])  # (T, V)


def _logits(gpt2: GPT2, fact: dict[str, Any]) -> tuple[Result, str]:
    logits = _run_logits(gpt2, fact["ids"])[-1]
    found, expected = logits[fact["tokens"]].astype(np.float64), np.array(fact["values"])
    allowed = fact.get("atol", 0.0) + fact.get("rtol", 0.0) * np.abs(expected)
    distance = np.abs(found - expected)
    words = f"largest difference {distance.max():.2g}, allowed {np.min(allowed):.2g}"
    ok = bool((distance <= allowed).all())
    if fact.get("top"):
        others = np.delete(logits, fact["tokens"])
        margin = float(expected.min() - others.max()) if others.size else math.inf
        ok = ok and margin >= -2 * float(np.max(allowed))
        words += f"; {'no other token is above' if margin >= 0 else 'another token is above by'} {abs(margin):.2g}"
    return ("pass" if ok else "FAIL"), words


def _hidden(gpt2: GPT2, fact: dict[str, Any]) -> tuple[Result, str]:
    hidden = gpt2([fact["ids"]], logits=False).last_hidden_state[0, -1].astype(np.float64)
    mean = float(np.abs(hidden[: len(fact["values"])] - fact["values"]).mean())
    words, ok = f"mean difference {mean:.2g}, allowed {fact['mean_abs']:.2g}", mean <= fact["mean_abs"]
    if "l2" in fact:
        distance = abs(float(np.linalg.norm(hidden)) - fact["l2"])
        words, ok = (
            f"{words}; of the norm {distance:.2g}, allowed {fact['l2_atol']:.2g}",
            ok and distance <= fact["l2_atol"],
        )
    return ("pass" if ok else "FAIL"), words


def _cross_entropy(gpt2: GPT2, fact: dict[str, Any]) -> tuple[Result, str]:
    ids = np.array(fact["ids"])
    logits = _run_logits(gpt2, fact["ids"])[:-1].astype(np.float64)
    top = logits.max(axis=-1, keepdims=True)
    log_sum = (top + np.log(np.exp(logits - top).sum(axis=-1, keepdims=True)))[:, 0]
    found = float((log_sum - logits[np.arange(len(ids) - 1), ids[1:]]).mean())
    distance = abs(found - fact["value"])
    return ("pass" if distance <= fact["atol"] else "FAIL"), f"{found:.7g}, published {fact['value']:.7g}"


def _greedy(gpt2: GPT2, fact: dict[str, Any]) -> tuple[Result, str]:
    return _greedy_ids(gpt2, fact) if "next" in fact else _greedy_text(gpt2, fact)


def _greedy_ids(gpt2: GPT2, fact: dict[str, Any]) -> tuple[Result, str]:
    """Is each published token the most likely one after those before it?"""
    ids, following = fact["ids"], fact["next"]
    logits = _run_logits(gpt2, ids + following[:-1])[len(ids) - 1 :]
    shortfall = (logits.max(axis=-1) - logits[np.arange(len(following)), following]).astype(np.float64)
    agree, worst = int((shortfall == 0).sum()), float(shortfall.max())
    words = f"{agree} of {len(following)} tokens"
    if worst:
        words += f"; another is more likely, by a logit of up to {worst:.2g}, a tie up to {2 * fact['atol']:g}"
    return ("pass" if worst <= 2 * fact["atol"] else "FAIL"), words


def _greedy_text(gpt2: GPT2, fact: dict[str, Any]) -> tuple[Result, str]:
    """Does the continuation begin with the published text?"""
    from ..tokenizer import decode

    if gpt2.tokenizer is None:
        return "skip", NO_TOKENIZER
    text, ids = "", list(fact["ids"])
    cache = gpt2.new_cache(1)
    new = ids
    while len(text) < len(fact["text"]) and len(ids) < gpt2.config.n_ctx:
        new = [int(_run_logits(gpt2, new, cache)[-1].argmax())]
        ids += new
        text = decode(gpt2.tokenizer, ids[len(fact["ids"]) :])
    if text.startswith(fact["text"]):
        return "pass", f"{len(fact['text'])} characters"
    same = next(i for i, pair in enumerate(zip(text + "\0", fact["text"] + "\0", strict=False)) if pair[0] != pair[1])
    return "FAIL", f"{text[same:]!r} after {same} characters, published {fact['text'][same:]!r}"


# --- do recorded data and ONNX Runtime agree? ----------------------------------------------------------------


def check_runs(model: Subject, ours: Ours) -> Iterator[Finding]:
    """The data sets beside the file, or random tokens where there are none, against ONNX Runtime too."""
    from ..onnx.read.datasets import find_sets, load_set
    from ..parity.capture import run_case
    from ..parity.cases import cases_from_data, random_cases
    from ..parity.metrics import PRESETS
    from ..parity.parties import Ort
    from ..parity.searched import EXACT, random_search_cases

    search = model.recognised.search
    zoo, own = (EXACT, EXACT) if search is not None else (PRESETS["zoo"], PRESETS["ort-gpt2"])
    inputs = [port.name for port in (search or model.recognised).inputs]
    sets = [load_set(folder, inputs, model.output_names) for folder in find_sets(model.path)]
    ort = Ort(model)
    drawn = random_search_cases(model, search, 2, seed=0) if search is not None else random_cases(model, 2, seed=0)
    for case in cases_from_data(sets) or drawn:
        outputs = run_case(case, [ours, ort])
        found, theirs = outputs[ours.name], outputs[ort.name]
        if case.data is not None:
            yield _compare("sample data", case.name, found, case.data.outputs, zoo)
        if isinstance(theirs, Gpt2npError):
            yield Finding("ONNX Runtime", case.name, "skip", str(theirs))
        else:
            yield _compare("ONNX Runtime", case.name, found, theirs, own)
    if not sets:
        yield Finding("sample data", "test_data_set_0", "skip", "none beside the file")


def _compare(group: str, what: str, found: Outputs | Gpt2npError, expected: Outputs, budget: Budget) -> Finding:
    from ..parity.metrics import measure

    if isinstance(found, Gpt2npError):
        return Finding(group, what, "FAIL", str(found))
    if found.keys() != expected.keys():
        return Finding(group, what, "FAIL", f"outputs {sorted(found)}, expected {sorted(expected)}")
    try:
        metrics = {name: measure(found[name], expected[name], budget) for name in expected}
    except ComparisonError as error:
        return Finding(group, what, "FAIL", str(error))
    worst = max(metrics, key=lambda name: (metrics[name].failing, metrics[name].max_abs))
    failing = sum(m.failing for m in metrics.values())
    words = f"{len(metrics)} outputs; largest difference {metrics[worst].max_abs:.2g} in {worst}"
    if failing:
        words += f"; {failing:,} values beyond the tolerance"
    return Finding(group, what, "FAIL" if failing else "pass", words, str(budget))


def verdict(checks: Sequence[Finding]) -> str:
    """All checks in one sentence."""
    model = next(check.what for check in checks if check.group in ("config", "graph"))
    failed = {check.group for check in checks if check.result == "FAIL"}
    passed = {check.group for check in checks if check.result == "pass"}
    runs = {"sample data", "ONNX Runtime"}
    if "graph" in failed and "file" in passed:
        return "This is a published file, but its graph is not one that gpt2np runs."
    if "graph" in failed:
        return f"This is not a GPT-2 that gpt2np knows, and so not {model}."
    if "config" in failed or ("weights" in failed and "file" not in failed):
        rest = " gpt2np computes what ONNX Runtime does with it." if runs & passed and not runs & failed else ""
        return f"This is not {model}, by its {' and '.join(sorted(failed & {'config', 'weights'}))}.{rest}"
    if "file" in failed or "weights" in failed:
        return f"This is {model} altered: the file is not the published one."
    if failed:
        return f"This is {model}, but these differ from what is expected: {', '.join(sorted(failed))}."
    if "file" in passed:
        return f"This is {model}, the published file bit by bit, and gpt2np computes what is known about it."
    if "weights" in passed:
        proof = "" if "facts" in passed else " (no published results are known)"
        return f"This has the weights of {model}, as far as they are known, and gpt2np computes what is known{proof}."
    return f"Too little is known to tell whether this is {model}."
