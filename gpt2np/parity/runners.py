"""The parties of a comparison. Each takes the file's own inputs by name and gives outputs and taps by name."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from ..config import GPT2Config
from ..errors import ComparisonError, Gpt2npError, InputError, TraceError, UnsupportedModelError
from ..onnx.read.datasets import DataSet
from ..weights import Array
from .operations import Call, Program, tap_names, tap_shape

if TYPE_CHECKING:
    from ..model import GPT2, Output
    from ..onnx.recognise import Port, Recognised
    from ..reference import Tap
    from ..session import InferenceSession

Feeds = Mapping[str, Array]


class Run(NamedTuple):
    """What a party gave: outputs under the file's names, taps under ours."""

    outputs: dict[str, Array]
    taps: dict[str, Array]


class Runner(Protocol):
    """A party."""

    name: str

    def run(self, feeds: Feeds, outputs: bool = True, taps: Sequence[str] = ()) -> Run:
        """Outputs, and those of the taps asked for that this party can give."""
        ...


@dataclass
class Model:
    """A model file under test: what was recognised in it, or why it was not.

    Reading starts at the first use of `recognised`; what ONNX Runtime alone needs works without it.
    """

    path: Path
    problem: Gpt2npError | None = None  # why gpt2np cannot place the graph at all
    objections: list[UnsupportedModelError] = field(default_factory=list)  # what in it is no GPT-2's
    _calls: dict[int, Call] = field(default_factory=dict, repr=False)

    @cached_property
    def found(self) -> Recognised | None:
        """The recognised GPT-2, or None (then `problem` says why)."""
        from ..onnx.read.reader import open_model
        from ..onnx.recognise import recognise

        file = open_model(self.path)
        try:
            return recognise(file, self.objections)
        except UnsupportedModelError as error:
            self.problem = error
            return None

    @property
    def recognised(self) -> Recognised:
        if self.found is None:
            assert self.problem is not None
            raise self.problem
        return self.found

    @property
    def config(self) -> GPT2Config:
        return self.recognised.config

    @cached_property
    def program(self) -> Program:
        """The forward pass as operations over this file's weights."""
        return Program.of(self.config, self.recognised.sources)

    def call(self, feeds: Feeds) -> Call:
        """The file's inputs as what our operations take."""
        return call_of(self.recognised, feeds)

    def has_logits(self) -> bool:
        return any(port.role == "logits" for port in self.recognised.outputs)

    def taps(self) -> list[str]:
        """Every tap of this file, in order; without logits where it has no head."""
        names = tap_names(self.config)
        return names if self.has_logits() else names[:-1]

    def outputs_as_taps(self, outputs: Mapping[str, Array], call: Call) -> dict[str, Array]:
        """The taps that the file's own outputs hold: keys and values of the new positions, and the last one.

        An output of another shape holds none: comparing it says so.
        """
        taps: dict[str, Array] = {}
        for port in self.recognised.outputs:
            value, names = outputs.get(port.name), taps_of(port)
            if value is None or not names:
                continue
            if names[0].endswith(("attn.k", "attn.v")) and value.ndim > 1:
                value = value[..., call.start :, :]
            parts = value if port.role == "present" and value.ndim else [value]
            if len(parts) == len(names):
                shaped = {name: as_tap(part, name, self.config, call) for name, part in zip(names, parts, strict=True)}
                taps |= {name: part for name, part in shaped.items() if part is not None}
        return taps


def taps_of(port: Port) -> tuple[str, ...]:
    """The taps that an output of the file holds."""
    key, value = f"h.{port.layer}.attn.k", f"h.{port.layer}.attn.v"
    held = {
        "last_hidden_state": ("ln_f",), "logits": ("logits",),
        "present": (key, value), "present_key": (key,), "present_value": (value,),
    }  # fmt: skip
    return held.get(port.role, ())


def as_tap(value: Array, tap: str, config: GPT2Config, call: Call) -> Array | None:
    """A party's array in its tap's shape, or None if it cannot be: leading dimensions may be split or left out."""
    shape = tap_shape(tap, config, call)
    inner = shape[1:] if len(shape) == 4 else shape[2:]  # what follows the batch, or batch and positions
    if value.dtype.kind in "cOSUM" or value.size != math.prod(shape):
        return None
    if value.ndim < len(inner) or value.shape[value.ndim - len(inner) :] != inner:
        return None
    return value.reshape(shape)


def call_of(recognised: Recognised, feeds: Feeds) -> Call:
    """Token ids, positions, past and mask as the operations take them, from the file's own inputs."""
    from ..model import additive_mask, check_ids, check_positions
    from ..session import given_mask

    config = recognised.config
    by_role: dict[str, Array] = {}
    keys: dict[int, Array] = {}
    values: dict[int, Array] = {}
    for port in recognised.inputs:
        if port.name not in feeds:
            continue
        value = feeds[port.name]
        if port.role == "past" and port.layer is not None:
            keys[port.layer], values[port.layer] = value
        elif port.role == "past_key" and port.layer is not None:
            keys[port.layer] = value
        elif port.role == "past_value" and port.layer is not None:
            values[port.layer] = value
        else:
            by_role[port.role] = value
    if "input_ids" not in by_role:
        raise InputError(f"no token ids among the inputs {sorted(feeds)}")
    ids = check_ids(by_role["input_ids"], config)
    B, T = ids.shape
    past = None
    start = 0
    if keys:
        held = keys[0].shape[2]
        count = recognised.past_length(feeds, T)
        start = held if count is None else min(count, held)
        past = [np.stack([keys[i], values[i]])[..., :start, :].astype(np.float32) for i in range(config.n_layer)]
    attention_mask = given_mask(recognised, feeds, B, T, start + T)
    rows = by_role.get("position_ids")
    if recognised.positions.startswith("mask") and attention_mask is not None:
        rows = recognised.positions_from_mask(attention_mask)[:, start:]
    positions = check_positions(rows, config, B, T, start)
    additive_mask(attention_mask, config, B, T, start + T, np.dtype(np.float32))  # checks it
    return Call(ids, positions, past if start else None, attention_mask, by_role.get("token_type_ids"))


class Ours:
    """gpt2np itself."""

    def __init__(self, model: Model, engine: str = "numba", dtype: str = "float32", name: str = "ours") -> None:
        self.model, self.engine, self.dtype, self.name = model, engine, dtype, name

    @cached_property
    def session(self) -> InferenceSession:
        from ..session import InferenceSession

        return InferenceSession(self.model.path, self.engine, self.dtype)

    @property
    def gpt2(self) -> GPT2:
        return self.session.model

    def run(self, feeds: Feeds, outputs: bool = True, taps: Sequence[str] = ()) -> Run:
        made: dict[str, Array] = {}
        found: dict[str, Array] = {}
        if outputs:
            names = [o.name for o in self.session.get_outputs()]
            made = dict(zip(names, self.session.run(names, feeds), strict=True))
        if taps:
            wanted = set(taps)

            def tap(name: str, value: Array) -> None:
                if name in wanted:
                    found[name] = np.array(value)

            self.call(self.model.call(feeds), tap, "logits" in wanted)
        return Run(made, found)

    def call(self, call: Call, tap: Tap | None = None, logits: bool = False) -> Output:
        """One call of the model, past and padding included."""
        B, T = call.input_ids.shape
        cache = self.gpt2.new_cache(B, call.start + T)
        if call.past is not None:
            for layer, past in zip(cache.layers, call.past, strict=True):
                layer[:, :, :, : call.start] = past
            cache.advance(call.start)
        positions = call.position_ids - self.gpt2.config.position_offset  # the model adds it again
        return self.gpt2(call.input_ids, cache, tap, logits, call.attention_mask, positions, call.token_type_ids)


class Ort:
    """ONNX Runtime on the CPU.

    Outputs come from a session with or without its optimisations. Taps come from a copy of the model to which
    they are added as outputs; it always runs with optimisations off, because added outputs block fusions and
    would make an optimised graph another program than the one that gives the outputs.
    """

    def __init__(self, model: Model, optimise: bool = True, threads: int | None = None) -> None:
        self.model, self.optimise, self.threads = model, optimise, threads
        self.name = "ort" if optimise else "ort-off"
        if threads is not None:
            self.name += f"-{threads}t"

    def _session(self, source: str | bytes, optimise: bool) -> Any:
        import onnxruntime as ort

        options = ort.SessionOptions()
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
        options.log_severity_level = 4  # what is wrong comes as an exception
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        if isinstance(source, bytes):  # the copy with taps: all of them are alive at once, and must not stay so
            options.enable_cpu_mem_arena = False
            folder = str(self.model.path.parent)
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        try:
            return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises a dozen kinds of its own
            raise ComparisonError(f"ONNX Runtime cannot load {self.model.path}: {_first_line(error)}") from error

    @cached_property
    def session(self) -> Any:
        return self._session(str(self.model.path), self.optimise)

    @cached_property
    def tap_session(self) -> Any:
        return self._session(with_tap_outputs(self.model), False)

    def run(self, feeds: Feeds, outputs: bool = True, taps: Sequence[str] = ()) -> Run:
        made: dict[str, Array] = {}
        found: dict[str, Array] = {}
        if outputs:
            names = [o.name for o in self.session.get_outputs()]
            made = dict(zip(names, self._run(self.session, names, feeds), strict=True))
        places = {t: self.model.recognised.taps[t] for t in taps if t in self.model.recognised.taps}
        if places:
            tensors = list(dict.fromkeys(place.tensor for place in places.values()))
            got = dict(zip(tensors, self._run(self.tap_session, tensors, feeds), strict=True))
            batch = self.model.call(feeds).input_ids.shape[0]
            for tap, place in places.items():
                found[tap] = place.to_tap(got[place.tensor], self.model.config, batch)
        return Run(made, found)

    def _run(self, session: Any, names: list[str], feeds: Feeds) -> list[Array]:
        try:
            return list(session.run(names, dict(feeds)))
        except Exception as error:
            raise ComparisonError(f"ONNX Runtime cannot run {self.model.path}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def with_tap_outputs(model: Model) -> bytes:
    """A copy of the model with every located tap among its outputs, serialised."""
    import onnx

    proto = onnx.load(str(model.path), load_external_data=False)
    present = {o.name for o in proto.graph.output}
    for place in model.recognised.taps.values():
        if place.tensor not in present:
            present.add(place.tensor)
            proto.graph.output.append(onnx.helper.make_empty_tensor_value_info(place.tensor))
    return bytes(proto.SerializeToString())


class OnnxRef:
    """onnx.reference.ReferenceEvaluator: onnx's own, in NumPy; slow."""

    name = "onnxref"

    def __init__(self, model: Model) -> None:
        self.model = model

    @cached_property
    def evaluator(self) -> Any:
        import onnx
        from onnx.reference import ReferenceEvaluator

        proto = onnx.load(str(self.model.path))
        if self.model.found is not None:
            present = {o.name for o in proto.graph.output}
            for place in self.model.found.taps.values():
                if place.tensor not in present:
                    present.add(place.tensor)
                    proto.graph.output.append(onnx.helper.make_empty_tensor_value_info(place.tensor))
        try:
            return ReferenceEvaluator(proto)
        except Exception as error:
            raise ComparisonError(f"onnx.reference cannot load {self.model.path}: {_first_line(error)}") from error

    def run(self, feeds: Feeds, outputs: bool = True, taps: Sequence[str] = ()) -> Run:
        places = {}
        if taps:
            places = {t: self.model.recognised.taps[t] for t in taps if t in self.model.recognised.taps}
        own = output_names(self.model) if outputs else []
        names = list(dict.fromkeys([*own, *(p.tensor for p in places.values())]))
        try:
            with np.errstate(all="ignore"):
                got = dict(zip(names, self.evaluator.run(names, dict(feeds)), strict=True))
        except Exception as error:
            raise ComparisonError(f"onnx.reference cannot run {self.model.path}: {_first_line(error)}") from error
        batch = self.model.call(feeds).input_ids.shape[0] if places else 1
        found = {t: p.to_tap(got[p.tensor], self.model.config, batch) for t, p in places.items()}
        return Run({n: got[n] for n in own}, found)


def output_names(model: Model) -> list[str]:
    """The file's declared outputs."""
    from ..onnx.read.reader import open_model

    return [o.name for o in open_model(model.path).proto.graph.output]


class Recorded:
    """The recorded outputs of one data set."""

    name = "recorded"

    def __init__(self, model: Model, data: DataSet) -> None:
        self.model, self.data = model, data

    def run(self, feeds: Feeds, outputs: bool = True, taps: Sequence[str] = ()) -> Run:
        found: dict[str, Array] = {}
        if taps:
            held = self.model.outputs_as_taps(self.data.outputs, self.model.call(feeds))
            found = {tap: held[tap] for tap in taps if tap in held}
        return Run(dict(self.data.outputs) if outputs else {}, found)


class TraceRunner:
    """A saved trace, or plain arrays in an .npz: it gives what it holds, for the inputs that it was recorded on."""

    def __init__(self, model: Model, path: Path) -> None:
        from .trace import load

        self.model, self.path, self.trace = model, path, load(path)
        self.name = path.stem
        if self.trace.manifest["stats_only"]:
            raise TraceError(f"{path}: holds statistics of taps only, not the taps")

    def run(self, feeds: Feeds, outputs: bool = True, taps: Sequence[str] = ()) -> Run:
        for name, value in feeds.items():
            if not self.trace.plain and (
                name not in self.trace.inputs or not np.array_equal(value, self.trace.inputs[name])
            ):
                raise TraceError(f"{self.path}: recorded on other inputs ({name!r} differs)")
        call = self.model.call(feeds)
        given = {**self.trace.outputs, **self.trace.taps}
        made, found = sort_arrays(self.model, call, given, f"{self.path} holds")
        held = {**self.model.outputs_as_taps(made, call), **found} if taps else {}
        return Run(made if outputs else {}, {t: held[t] for t in taps if t in held})


class Function:
    """A user's function `package.module:function`, the port under test.

    It takes the file's inputs as a dictionary and returns a dictionary of outputs (the file's names) and taps
    (our names), or one array: the file's first output. A function with a `taps` parameter is told which are
    wanted. Modules are looked for in the current folder too.
    """

    def __init__(self, model: Model, target: str) -> None:
        self.model, self.name = model, target
        module, _, attribute = target.partition(":")
        if not module or not attribute:
            raise InputError(f"a callable is given as package.module:function, got {target!r}")
        folder = os.getcwd()
        sys.path.insert(0, folder)
        try:
            value: Any = importlib.import_module(module)
            for part in attribute.split("."):
                value = getattr(value, part)
        except (ImportError, AttributeError) as error:
            raise InputError(f"cannot import {target!r}: {error}") from error
        finally:
            sys.path.remove(folder)
        if not callable(value):
            raise InputError(f"{target!r} is no function but a {type(value).__name__}")
        self.function = value

    def run(self, feeds: Feeds, outputs: bool = True, taps: Sequence[str] = ()) -> Run:
        try:
            given = self.function({name: np.array(value) for name, value in feeds.items()})
        except (Exception, SystemExit) as error:  # whatever a user's code raises is its failure, not ours
            raise ComparisonError(f"{self.name} raised {type(error).__name__}: {error}") from error
        names = output_names(self.model)
        if not isinstance(given, Mapping):
            given = {names[0]: given}
        call = self.model.call(feeds)
        made, found = sort_arrays(self.model, call, given, f"{self.name} returned")
        held = {**self.model.outputs_as_taps(made, call), **found}
        return Run(made if outputs else {}, {t: held[t] for t in taps if t in held})


def sort_arrays(
    model: Model, call: Call, given: Mapping[Any, Any], who: str
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Arrays under the file's output names and under tap names, told apart and checked. `who` begins a complaint."""
    names, known = output_names(model), set(tap_names(model.config))
    made: dict[str, Array] = {}
    found: dict[str, Array] = {}
    for name, value in given.items():
        array = np.asarray(value)
        if array.dtype.kind in "cOSUM":
            raise ComparisonError(f"{who} {name!r} as {type(value).__name__}, which is no array of real numbers")
        if name in names:
            made[name] = array
        elif name in known:
            tap = as_tap(array, name, model.config, call)
            if tap is None:
                expected = tap_shape(name, model.config, call)
                raise ComparisonError(f"{who} tap {name!r} with shape {array.shape}, expected {expected}")
            found[name] = tap
        else:
            raise ComparisonError(f"{who} {name!r}, which is neither an output of {model.path} nor a tap")
    return made, found
