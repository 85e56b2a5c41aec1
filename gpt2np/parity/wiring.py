"""A graph that is no GPT-2 any more: its tensors beside the taps of a sound one, by name and by values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..call import Call
from ..config import GPT2Config
from ..errors import Gpt2npError
from ..weights import Array
from .cases import Case
from .explain.diagnose import from_taps
from .explain.problem import Clock, Guess
from .localise import F32, F64, LOCAL_FACTOR, TapRow
from .operations import split_tap, tap_inputs, tap_names
from .parties import Ort
from .places import interval, interval_words, kept
from .program import Program
from .report import Place, Report, Table, add_once
from .search import settle
from .subject import Subject

NARROW = 5e-3  # of a tap's rms: what float16 arithmetic leaves of it


class Tensors(NamedTuple):
    """Every floating-point tensor of a graph for one call, in the graph's order, and the nodes that make them."""

    values: dict[str, Array]
    nodes: dict[str, Any]  # tensor -> node
    used: frozenset[str]  # initializers that the outputs come from


class Sound(NamedTuple):
    """The GPT-2 that the other graph ought to be."""

    program: Program
    call: Call
    taps: dict[str, Array]  # in order
    own_names: Mapping[str, str]  # tap -> the tensor that holds it in a file of the same making
    # what stands where a tap would in the other graph: the tensor, and its value in the tap's shape
    stand_in: Callable[[str, Tensors], tuple[str | None, Array | None]]
    read: Callable[[int], set[str]]  # layer -> initializers of its MLP
    who: tuple[str, str] = ("A", "B")  # what this one and the other are called


def capture_tensors(model: Subject, case: Case) -> Tensors:
    """All intermediate tensors of a file, by ONNX Runtime without optimisations."""
    import onnx

    proto = onnx.load(str(model.path), load_external_data=False)
    declared = [o.name for o in proto.graph.output]
    nodes = {name: node for node in proto.graph.node for name in node.output if name}
    for name in nodes:
        if name not in declared:
            proto.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    runner = Ort(model, optimise=False)
    session = runner.open(bytes(proto.SerializeToString()), False)
    values = dict(zip(nodes, runner.call(session, list(nodes), case.feeds), strict=True))
    live, pending = set[str](), list(declared)
    while pending:
        name = pending.pop()
        if name not in live:
            live.add(name)
            pending += nodes[name].input if name in nodes else ()
    floats = {
        n: np.asarray(v) for n, v in values.items() if getattr(v, "dtype", None) is not None and v.dtype.kind == "f"
    }
    return Tensors(floats, nodes, frozenset(live & {t.name for t in proto.graph.initializer}))


def compare_wiring(report: Report, model: Subject, other: Subject, case: Case, clock: Clock | None = None) -> None:
    """Where the other file leaves the sound one: the first tap without a partner, and what takes its place."""
    try:
        mine, theirs = capture_tensors(model, case), capture_tensors(other, case)
    except Gpt2npError as error:
        add_once(report.not_compared, f"the tensors inside: {error}")
        return
    call, places = model.call(case.feeds), model.recognised.taps
    batch = call.input_ids.shape[0]
    taps = {
        t: places[t].to_tap(mine.values[places[t].tensor], model.config, batch)
        for t in tap_names(model.config)
        if t in places and places[t].tensor in mine.values
    }

    def stand_in(tap: str, graph: Tensors) -> tuple[str | None, Array | None]:
        own = places[tap].tensor
        name = in_its_place(own, mine, graph)
        value = None if name is None else graph.values[name]
        if value is not None and value.shape == mine.values[own].shape:
            return name, places[tap].to_tap(value, model.config, batch)
        return name, value.reshape(taps[tap].shape) if value is not None and value.size == taps[tap].size else None

    def read(layer: int) -> set[str]:
        sources = model.recognised.sources.items()
        return {s.tensor.name for n, s in sources if n.startswith(f"h.{layer}.mlp.") and s.tensor is not None}

    add_once(report.findings, f"{name_of(other)} is no GPT-2 that gpt2np can place: {other.problem}")
    sound = Sound(model.program, call, taps, {t: places[t].tensor for t in taps}, stand_in, read)
    place_wiring(report, sound, other, theirs, case.name, clock)
    if report.place is None:
        name = name_of(other)
        report.headline = report.headline or f"every tap has its partner in {name}: what differs comes after them"


def name_of(model: Subject) -> str:
    return model.path.parent.name if model.path.name == "model.onnx" else model.path.stem


def place_wiring(
    report: Report, sound: Sound, other: Subject, theirs: Tensors, case: str, clock: Clock | None = None
) -> None:
    """The first tap of the sound one whose values the other graph does not hold, and why, into the report."""
    config, taps, name = sound.program.config, sound.taps, name_of(other)
    partners = align(taps, allowances(sound, other.is_float16), sound.own_names, theirs.values)
    missing = [t for t in taps if t not in partners]
    report.details["wiring"] = {"partners": partners, "without": missing}
    report.facts[:0] = dropped_layers(sound, theirs)
    if not missing:
        return
    first = next((t for t in missing if all(i in partners or i not in taps for i in tap_inputs(t, config))), missing[0])
    by_tensor = {tensor: t for t, tensor in partners.items()}
    stand_in, value = sound.stand_in(first, theirs)
    words, shown_by_graph = what_stands_there(first, stand_in, by_tensor, theirs, sound)
    text = f"{first}: the first tap whose values {name} does not hold; {words}"
    report.place = Place(first, first, text, interval(config, list(partners), [first]))
    if value is not None:
        row = TapRow(first, value.shape, 0, None, None, (), None, None, None, 0, 0, 2, None, None)
        given = {**{t: taps[t] for t in partners}, first: value}
        diagnosis = from_taps(sound.program, sound.call, row, name, given, clock)
        if shown_by_graph and not any(g.explains or g.likely for g in diagnosis.guesses):
            guess = Guess(shown_by_graph, first, words.replace("it", first, 1), removed=1.0, explains=True, stated=True,
                          evidence="read in the graph")  # fmt: skip
            diagnosis.guesses.insert(0, guess)
        settle(report, diagnosis, case)
    if report.diagnosis is None:
        report.headline = f"first divergence {first}; none of the usual mistakes explains it"
    order = list(taps)
    shown = order[max(0, order.index(first) - 6) : order.index(first) + 6]
    rows = [(t, partners.get(t, ""), "" if t in partners else "FIRST" if t == first else "none") for t in shown]
    report.tables.append(Table(f"taps and the tensors of {name} that hold their values", ("tap", "tensor", ""), rows))


def allowances(sound: Sound, narrow: bool) -> dict[str, float]:
    """By how much a tensor may differ from each tap and still be it: a multiple of float32's own error."""
    found = {}
    low = sound.program.walk(sound.call, F32)
    for (tap, exact), (_, value) in zip(sound.program.walk(sound.call, F64), low, strict=True):
        mask, scale = kept(tap, sound.call), float(np.sqrt(np.mean(np.square(exact)))) if exact.size else 0.0
        with np.errstate(invalid="ignore"):
            error = np.nan_to_num(np.abs(value - exact))
        error = error if mask is None else np.where(mask, error, 0)
        floor = float(error.max(initial=0))
        found[tap] = max(LOCAL_FACTOR * floor, 1e-6 * scale, NARROW * scale if narrow else 0.0)
    return found


def align(
    taps: Mapping[str, Array], allowed: Mapping[str, float], own_names: Mapping[str, str], tensors: Mapping[str, Array]
) -> dict[str, str]:
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
        own = own_names.get(tap, "")
        candidates = by_size.get(value.size, [])
        for name in [own] * (own in candidates) + [n for n in candidates if n != own]:
            held = values(name)
            if np.isfinite(held).all() and float(np.abs(held - wanted).max(initial=0)) <= allowed[tap]:
                found[tap] = name
                break
    return found


def in_its_place(tensor: str, mine: Tensors, theirs: Tensors) -> str | None:
    """The tensor of the other graph that has the name, or is read by the node, that the tap's own has or is read by."""
    if tensor in theirs.values:
        return tensor
    for name, node in mine.nodes.items():  # who reads the tap here, and what does it read there?
        if tensor in node.input and name in theirs.nodes:
            twin = theirs.nodes[name]
            read = twin.input[list(node.input).index(tensor)] if len(twin.input) == len(node.input) else ""
            if read in theirs.values:
                return str(read)
    return None


def what_stands_there(
    tap: str, stand_in: str | None, by_tensor: Mapping[str, str], theirs: Tensors, sound: Sound
) -> tuple[str, str]:
    """What the other graph has in a tap's place, in words, and the cause that this alone shows ("" where none)."""
    a, b = sound.who
    if stand_in is None:
        return "nothing that could be it is there", ""
    if stand_in in by_tensor:
        return f"what reads it in {a} reads {by_tensor[stand_in]} in {b}", ""
    expected = tap_inputs(tap, sound.program.config)
    found, made = nearest_taps(stand_in, by_tensor, theirs)
    if sorted(set(found)) != sorted(expected) or len(found) != len(expected):
        return f"{b} makes it of {' and '.join(found) or 'no tap'}, {a} of {' and '.join(expected)}", "other_input"
    part = split_tap(tap)[1]
    twins = [tensor for tensor, t in by_tensor.items() if split_tap(t)[1] == part]  # the same part of right layers
    usual = {op for tensor in twins for op in nearest_taps(tensor, by_tensor, theirs)[1]}
    besides = [op for op in made if op not in usual] if twins else []
    how = f"with {' and '.join(besides)} besides" if besides else f"by another computation ({', '.join(made)})"
    return f"{b} makes it of {' and '.join(found)}, as {a} does, {'' if besides else 'but '}{how}", "other_computation"


def nearest_taps(tensor: str, by_tensor: Mapping[str, str], graph: Tensors) -> tuple[list[str], list[str]]:
    """The taps that a tensor is computed from, the first ones met on every way back; the operators on these ways."""
    found: list[str] = []
    made: list[str] = []
    seen: set[str] = set()
    pending = [tensor]
    while pending:
        node = graph.nodes.get(pending.pop())
        if node is None or node.op_type == "Shape":  # sizes are no values
            continue
        made += [] if node.op_type in made else [node.op_type]
        taps = [by_tensor[name] for name in node.input if name in by_tensor]
        found += taps if len(set(taps)) < len(taps) else [t for t in taps if t not in found]  # x + x reads x twice
        for name in node.input:
            if name not in by_tensor and name not in seen:
                seen.add(name)
                pending.append(name)
    return found, made


def dropped_layers(sound: Sound, graph: Tensors) -> list[str]:
    """Layers whose MLP reaches no output of the other graph."""
    layers = range(sound.program.config.n_layer)
    return [f"no output of {sound.who[1]} comes from the MLP of h.{i}: the layer is dropped"
            for i in layers if sound.read(i) and not sound.read(i) & graph.used]  # fmt: skip


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
