"""A graph that is no GPT-2 any more: its tensors beside the taps of a sound one, by name and by values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..config import GPT2Config
from ..errors import Gpt2npError
from ..weights import Array
from .cases import Case
from .explain.diagnose import from_taps
from .explain.problem import Guess
from .localise import TapRow
from .operations import tap_inputs, tap_names
from .parties import Ort
from .places import interval, interval_words
from .report import Place, Report, Table, add_once
from .search import settle
from .subject import Subject

SAME = 1e-3  # two tensors are one tap if their values differ by at most so much of the tap's rms


class Tensors(NamedTuple):
    """Every floating-point tensor of a graph for one call, and the nodes that make them."""

    values: dict[str, Array]
    nodes: dict[str, Any]  # tensor -> node
    weights: set[str]  # initializers that live nodes read


def capture_tensors(model: Subject, case: Case) -> Tensors:
    """All intermediate tensors of a file, by ONNX Runtime without optimisations."""
    import onnx

    proto = onnx.load(str(model.path), load_external_data=False)
    declared = {o.name for o in proto.graph.output}
    nodes = {name: node for node in proto.graph.node for name in node.output if name}
    for name in nodes:
        if name not in declared:
            proto.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    runner = Ort(model, optimise=False)
    session = runner.open(bytes(proto.SerializeToString()), False)
    names = [n for n in nodes if n not in declared] + [n for n in declared if n in nodes]
    values = dict(zip(names, runner.call(session, names, case.feeds), strict=True))
    read = {name for node in proto.graph.node for name in node.input}
    floats = {
        n: np.asarray(v) for n, v in values.items() if getattr(v, "dtype", None) is not None and v.dtype.kind == "f"
    }
    return Tensors(floats, nodes, {t.name for t in proto.graph.initializer} & read)


def compare_wiring(report: Report, model: Subject, other: Subject, case: Case) -> None:
    """Where the other file leaves the sound one: the first tap without a partner, and what takes its place."""
    call = model.call(case.feeds)
    places = model.recognised.taps
    try:
        mine, theirs = capture_tensors(model, case), capture_tensors(other, case)
    except Gpt2npError as error:
        add_once(report.not_compared, f"the tensors inside: {error}")
        return
    batch = call.input_ids.shape[0]
    taps = {
        t: p.to_tap(mine.values[p.tensor], model.config, batch) for t, p in places.items() if p.tensor in mine.values
    }
    names = [t for t in tap_names(model.config) if t in taps]
    partners = align(taps, {t: places[t].tensor for t in names}, theirs.values)
    missing = [t for t in names if t not in partners]
    report.details["wiring"] = {"partners": partners, "without": missing}
    name = other.path.parent.name if other.path.name == "model.onnx" else other.path.stem
    message = f"{name} is no GPT-2 that gpt2np can place: {other.problem}"
    add_once(report.findings, message)
    if not missing:
        report.headline = report.headline or f"every tap has its partner in {name}: what differs comes after them"
        return
    first = next(
        (t for t in missing if all(i in partners or i not in taps for i in tap_inputs(t, model.config))), missing[0]
    )
    stand_in, words = in_its_place(model, first, partners, mine, theirs)
    text = f"{first}: the first tap whose values {name} does not hold; {words}"
    suspects = interval(model.config, list(partners), [first])
    report.place = Place(first, first, text, suspects)
    given = {t: taps[t] for t in partners if t in taps}
    value = None
    if stand_in is not None:
        tensor = theirs.values[stand_in]
        if tensor.size == taps[first].size:
            value = tensor.reshape(taps[first].shape)
            if tensor.shape == mine.values[places[first].tensor].shape:
                value = places[first].to_tap(tensor, model.config, batch)
    dropped = dropped_layer(model, first, theirs.weights)
    if dropped:
        report.facts.insert(0, dropped)
    if value is not None:
        row = TapRow(first, value.shape, 0, None, None, (), None, None, None, 0, 0, 2, None, None)
        diagnosis = from_taps(model.program, call, row, name, {**given, first: value})
        if "B makes it of" in words and not any(g.explains for g in diagnosis.guesses):
            guess = Guess("other_input", first, words.replace("it", first, 1), removed=1.0, explains=True, stated=True)
            guess.evidence = "read in the graph"
            diagnosis.guesses.insert(0, guess)
        settle(report, diagnosis, case.name)
    if report.diagnosis is None:
        report.headline = f"first divergence {first}" + (f"; {dropped}" if dropped else f"; {words}")
    shown = names[max(0, names.index(first) - 6) : names.index(first) + 6]
    rows = [(t, partners.get(t, ""), "" if t in partners else "FIRST" if t == first else "none") for t in shown]
    report.tables.append(Table(f"taps and the tensors of {name} that hold their values", ("tap", "tensor", ""), rows))


def align(taps: Mapping[str, Array], own_names: Mapping[str, str], tensors: Mapping[str, Array]) -> dict[str, str]:
    """The tensor that holds each tap's values, in whatever order of axes: the one of its own name, if it does."""
    by_size: dict[int, list[str]] = {}
    for name, value in tensors.items():
        by_size.setdefault(value.size, []).append(name)
    ordered: dict[str, Array] = {}

    def values(name: str) -> Array:
        if name not in ordered:
            ordered[name] = np.sort(tensors[name].reshape(-1).astype(np.float64))
        return ordered[name]

    found: dict[str, str] = {}
    for tap, value in taps.items():
        wanted = np.sort(value.reshape(-1).astype(np.float64))
        allowed = SAME * float(np.sqrt(np.mean(wanted**2))) if wanted.size else 0.0
        own = own_names.get(tap, "")
        candidates = by_size.get(value.size, [])
        for name in [own] * (own in candidates) + [n for n in candidates if n != own]:
            held = values(name)
            if np.isfinite(held).all() and float(np.abs(held - wanted).max(initial=0)) <= allowed:
                found[tap] = name
                break
    return found


def in_its_place(
    model: Subject, tap: str, partners: Mapping[str, str], mine: Tensors, theirs: Tensors
) -> tuple[str | None, str]:
    """The tensor of the other graph that stands where a tap would, and what it is computed from, in words."""
    tensor = model.recognised.taps[tap].tensor
    by_tensor = {name: t for t, name in partners.items()}
    stand_in = tensor if tensor in theirs.values else None
    for name, node in mine.nodes.items():  # who reads the tap here, and what does it read there?
        if stand_in is None and tensor in node.input and name in theirs.nodes:
            twin = theirs.nodes[name]
            read = twin.input[list(node.input).index(tensor)] if len(twin.input) == len(node.input) else ""
            stand_in = read if read in theirs.values else None
    if stand_in is None:
        return None, "nothing that could be it is there"
    if stand_in in by_tensor:
        return stand_in, f"what reads it in A reads {by_tensor[stand_in]} in B"
    expected = tap_inputs(tap, model.config)
    found = nearest_taps(stand_in, by_tensor, theirs)
    if sorted(set(found)) != sorted(expected) or len(found) != len(expected):
        return stand_in, f"B makes it of {' and '.join(found) or 'no tap'}, A of {' and '.join(expected)}"
    op = theirs.nodes[stand_in].op_type
    return stand_in, f"B makes it of {' and '.join(found)}, as A does, but by another computation (last node: {op})"


def nearest_taps(tensor: str, by_tensor: Mapping[str, str], graph: Tensors) -> list[str]:
    """The taps that a tensor is computed from: the first ones met on every way back."""
    found: list[str] = []
    seen: set[str] = set()
    pending = [tensor]
    while pending:
        node = graph.nodes.get(pending.pop())
        if node is None:
            continue
        for name in node.input:
            if name in by_tensor:
                once = by_tensor[name] not in found or node.op_type in ("Add", "Mul")
                found += [by_tensor[name]] if once else []
            elif name not in seen:
                seen.add(name)
                pending.append(name)
    return found


def dropped_layer(model: Subject, tap: str, weights: set[str]) -> str:
    """Whether the other graph reads no weight of the tap's layer."""
    if not tap.startswith("h."):
        return ""
    layer = tap.split(".")[1]
    tensors = [s.tensor for n, s in model.recognised.sources.items() if n.startswith(f"h.{layer}.")]
    own = {tensor.name for tensor in tensors if tensor is not None}
    return f"no weight of h.{layer} is read in the other file: the layer is dropped" if not own & weights else ""


def bracket_outputs(report: Report, model: Subject, cases: Sequence[Case], captured: Mapping[str, Any]) -> None:
    """A file that cannot be placed, against recorded outputs: the interval that right keys and values leave."""
    wrong = {c.output for c in report.comparisons if not c.ok and c.metrics is not None}
    right = {c.output for c in report.comparisons if c.metrics is not None} - wrong
    shapes = {c.output: c.metrics.shape for c in report.comparisons if c.metrics is not None}
    presents = [n for n in model.output_names if len(shapes.get(n, ())) == 5 and shapes[n][0] == 2]
    if not presents or not wrong:
        return
    config = GPT2Config(n_layer=len(presents), n_head=1, n_embd=1, n_ctx=1, vocab_size=1, n_inner=1, head_size=1)
    taps: dict[str, tuple[str, ...]] = {n: (f"h.{i}.attn.k", f"h.{i}.attn.v") for i, n in enumerate(presents)}
    taps |= {n: ("ln_f",) for n in model.output_names if n not in taps}  # hidden states, or logits
    good = [t for n in right if n in taps for t in taps[n]]
    bad = [t for n in wrong if n in taps for t in taps[n]]
    if not bad:
        return
    suspects = interval(config, good, bad)
    if suspects:
        report.place = Place(suspects[0], suspects[-1], interval_words(suspects, good, config), suspects)
        report.headline = f"first divergence {report.place.text}"
        report.next = "gpt2np diff ORIGINAL.onnx THIS.onnx names the operation: it compares the tensors inside"
