"""The parties of a comparison. Each takes the file's own inputs by name and gives outputs and taps by name."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from ..call import Call
from ..errors import ComparisonError, InputError, TraceError
from ..onnx.read.datasets import DataSet
from ..optional import needs
from ..paths import shown
from ..signature import Feeds
from ..weights import Array
from .forms import as_array, form_of, named, nearest
from .subject import Subject, sort_arrays
from .trace import is_trace, load

if TYPE_CHECKING:
    from ..model import GPT2, Output
    from ..onnx.recognise import Port
    from ..reference import Tap
    from ..session import InferenceSession


ENGINES = ("numba", "numpy")


class Captured(NamedTuple):
    """What a party gave: outputs under the file's names, taps under ours."""

    outputs: dict[str, Array]
    taps: dict[str, Array]
    notes: tuple[str, ...] = ()  # what is odd about their form, as "logits is bfloat16"
    left_out: tuple[str, ...] = ()  # what it gave and cannot be compared


class Runner(Protocol):
    """A party."""

    name: str

    def run(self, feeds: Feeds, outputs: bool = True, taps: Sequence[str] = ()) -> Captured:
        """Outputs, and those of the taps asked for that this party can give."""
        ...


class Ours:
    """gpt2np itself."""

    def __init__(
        self, model: Subject, engine: str = "numba", dtype: str = "float32", name: str = "ours",
        weights: str | None = None,
    ) -> None:  # fmt: skip
        self.model, self.engine, self.dtype, self.name, self.weights = model, engine, dtype, name, weights

    @cached_property
    def session(self) -> InferenceSession:
        return self.model.session(self.engine, self.dtype, weights=self.weights)

    @property
    def gpt2(self) -> GPT2:
        return self.session.model

    def run(self, feeds: Feeds, outputs: bool = True, taps: Sequence[str] = ()) -> Captured:
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
        return Captured(made, found)

    def call(self, call: Call, tap: Tap | None = None, logits: bool = False) -> Output:
        """One call of the model, past and padding included."""
        return self.gpt2.run(call, tap=tap, logits=logits)


class Ort:
    """ONNX Runtime on the CPU.

    Outputs come from a session with or without its optimisations. Taps come from a copy of the model to which
    they are added as outputs; it always runs with optimisations off, because added outputs block fusions and
    would make an optimised graph another program than the one that gives the outputs.
    """

    def __init__(self, model: Subject, optimise: bool = True, threads: int | None = None) -> None:
        self.model, self.optimise, self.threads = model, optimise, threads
        self.name = "ort" if optimise else "ort-off"
        if threads is not None:
            self.name += f"-{threads}t"
        self.other_things: dict[str, str] = {}  # outputs that are another thing in the file this is compared with

    def open(self, source: str | bytes, optimise: bool) -> Any:
        """A session over the file, or over a changed copy of it."""
        with needs("onnxruntime", "ONNX Runtime as a party"):
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
        return self.open(str(self.model.path), self.optimise)

    @cached_property
    def tap_session(self) -> Any:
        return self.open(with_tap_outputs(self.model), False)

    def run(self, feeds: Feeds, outputs: bool = True, taps: Sequence[str] = ()) -> Captured:
        made: dict[str, Array] = {}
        found: dict[str, Array] = {}
        if outputs:
            names = [o.name for o in self.session.get_outputs()]
            made = dict(zip(map(self.shown, names), self.call(self.session, names, feeds), strict=True))
        places = {t: self.model.recognised.taps[t] for t in taps if t in self.model.recognised.taps}
        if places:
            tensors = list(dict.fromkeys(place.tensor for place in places.values()))
            got = dict(zip(tensors, self.call(self.tap_session, tensors, feeds), strict=True))
            batch = self.model.call(feeds).input_ids.shape[0]
            for tap, place in places.items():
                found[tap] = place.to_tap(got[place.tensor], self.model.config, batch)
        notes = [
            f"{name} is {role} here, and another thing in the first file" for name, role in self.other_things.items()
        ]
        return Captured(made, found, tuple(notes))

    def shown(self, output: str) -> str:
        """The name that an output is compared by."""
        return f"{output} ({self.other_things[output]})" if output in self.other_things else output

    def call(self, session: Any, names: list[str], feeds: Feeds) -> list[Array]:
        """These tensors of a session."""
        try:
            return list(session.run(names, dict(feeds)))
        except Exception as error:
            raise ComparisonError(f"ONNX Runtime cannot run {self.model.path}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def with_tap_outputs(model: Subject) -> bytes:
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

    def __init__(self, model: Subject) -> None:
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

    def run(self, feeds: Feeds, outputs: bool = True, taps: Sequence[str] = ()) -> Captured:
        places = {}
        if taps:
            places = {t: self.model.recognised.taps[t] for t in taps if t in self.model.recognised.taps}
        own = self.model.output_names if outputs else []
        names = list(dict.fromkeys([*own, *(p.tensor for p in places.values())]))
        try:
            with np.errstate(all="ignore"):
                got = dict(zip(names, self.evaluator.run(names, dict(feeds)), strict=True))
        except Exception as error:
            raise ComparisonError(f"onnx.reference cannot run {self.model.path}: {_first_line(error)}") from error
        batch = self.model.call(feeds).input_ids.shape[0] if places else 1
        found = {t: p.to_tap(got[p.tensor], self.model.config, batch) for t, p in places.items()}
        return Captured({n: got[n] for n in own}, found)


class Recorded:
    """The recorded outputs of one data set."""

    name = "recorded"

    def __init__(self, model: Subject, data: DataSet) -> None:
        self.model, self.data = model, data

    def run(self, feeds: Feeds, outputs: bool = True, taps: Sequence[str] = ()) -> Captured:
        found: dict[str, Array] = {}
        if taps:
            held = self.model.outputs_as_taps(self.data.outputs, self.model.call(feeds))
            found = {tap: held[tap] for tap in taps if tap in held}
        return Captured(dict(self.data.outputs) if outputs else {}, found)


class TraceRunner:
    """A saved trace, or plain arrays in an .npz: it gives what it holds, for the inputs that it was recorded on."""

    def __init__(self, model: Subject, path: Path) -> None:
        self.model, self.path, self.trace = model, path, load(path)
        self.name = path.stem
        if self.trace.manifest["stats_only"]:
            raise TraceError(f"{path}: holds statistics of taps only, not the taps")
        if self.trace.plain:  # inputs among the arrays say what they were recorded on
            taps = self.trace.taps
            for port in model.recognised.inputs:
                role = ("input_ids",) if port.role == "input_ids" else ()  # where the file has another name for them
                for held in (port.name, f"input/{port.name}", *role):
                    if held in taps and port.name not in self.trace.inputs:
                        value = as_array(taps.pop(held), f"{path} holds {held!r}")
                        self.trace.inputs[port.name] = as_declared(value, port)

    def run(self, feeds: Feeds, outputs: bool = True, taps: Sequence[str] = ()) -> Captured:
        for name, value in feeds.items():
            held = self.trace.inputs.get(name)
            if (held is None and not self.trace.plain) or (held is not None and not np.array_equal(value, held)):
                raise TraceError(f"{self.path}: recorded on other inputs ({name!r} differs)")
        given = {**self.trace.outputs, **self.trace.taps}
        return sorted_out(self.model, feeds, given, f"{self.path} holds", outputs, taps)


def as_declared(value: Array, port: Port) -> Array:
    """An input that a port wrote, in the file's type and number of axes: int32 for int64, (T,) for (1, B, T)."""
    wanted, more = np.dtype(port.dtype), len(port.shape) - value.ndim
    if {value.dtype.kind, wanted.kind} <= {"i", "u"} or value.dtype.kind == wanted.kind:
        value = value.astype(wanted)
    if more < 0 and value.shape[:-more] == (1,) * -more:
        return value.reshape(value.shape[-more:])
    return value.reshape((1,) * more + value.shape)


class Function:
    """A user's function, `package.module:function` or `path/to/file.py:function`, the port under test.

    It takes the file's inputs as a dictionary and returns outputs (under the file's names or their roles') and
    taps by name, a tuple in the order of the file's outputs, or one array: the first output. Modules are looked
    for in the current folder too.
    """

    def __init__(self, model: Subject | None, target: str) -> None:
        self.model, self.name = model, target
        module, _, attribute = target.rpartition(":")
        if not module or not attribute:
            raise InputError(f"a callable is given as package.module:function or file.py:function, got {target!r}")
        try:
            value: Any = _module(module)
            for part in attribute.split("."):
                value = getattr(value, part)
        except AttributeError:
            functions = [n for n, v in vars(value).items() if callable(v) and not n.startswith("_")]
            raise InputError(f"{module} has no {attribute!r}; it has {nearest(attribute, functions)}") from None
        except (Exception, SystemExit) as error:  # whatever an import of a user's code raises
            raise InputError(f"cannot import {target!r}: {where_raised(error)}") from error
        if not callable(value):
            raise InputError(f"{target!r} is no function but a {type(value).__name__}")
        self.function = value

    @property
    def location(self) -> tuple[str, int] | None:
        """File and line of the function, relative to the current folder; None for what is not written in Python."""
        code = getattr(inspect.unwrap(self.function), "__code__", None)
        return None if code is None else (str(shown(Path(code.co_filename))), code.co_firstlineno)

    def call(self, feeds: Feeds, **more: Any) -> Any:
        """What the function returns for these inputs."""
        try:
            return self.function({name: np.array(value) for name, value in feeds.items()}, **more)
        except (Exception, SystemExit) as error:  # whatever a user's code raises is its failure, not ours
            raise ComparisonError(f"{self.name} raised {where_raised(error)}") from error

    def run(self, feeds: Feeds, outputs: bool = True, taps: Sequence[str] = ()) -> Captured:
        assert self.model is not None
        given = self.call(feeds)
        arrays = named(given, self.model.output_names, self.name)
        found = sorted_out(self.model, feeds, arrays, f"{self.name} returned", outputs, taps)
        # copies: a port may write the results of its next call into the same memory
        made, held = ({name: np.array(v) for name, v in some.items()} for some in (found.outputs, found.taps))
        return found._replace(outputs=made, taps=held)


def _module(name: str) -> Any:
    """A module by its dotted name, or by the path of its file."""
    folder = os.getcwd()
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise InputError(f"{name}: no such file")
        folder, name = str(path.resolve().parent), path.stem
    sys.path.insert(0, folder)
    try:
        found = sys.modules.get(name)
        own = Path(folder, *name.split("."))
        there = own.is_dir() or own.with_name(f"{own.name}.py").is_file()
        if found is not None and there and not str(getattr(found, "__file__", folder)).startswith(folder):
            del sys.modules[name]  # another file of that name was imported before
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)


def where_raised(error: BaseException) -> str:
    """ "ZeroDivisionError: oh no (port.py, line 14)": the innermost line that is neither gpt2np's nor Python's own."""
    text = f"{type(error).__name__}: {error}".strip().removesuffix(":")
    frames = traceback.extract_tb(error.__traceback__)
    own = str(Path(__file__).parents[1])
    users = [f for f in frames if not f.filename.startswith((own, "<frozen"))]
    users = [f for f in users if "site-packages" not in f.filename] or users
    if isinstance(error, SyntaxError) and error.filename:
        return f"{text.splitlines()[0]}"
    return f"{text} ({users[-1].filename}, line {users[-1].lineno})" if users else text


def sorted_out(
    model: Subject, feeds: Feeds, given: Mapping[str, Any], who: str, outputs: bool, taps: Sequence[str]
) -> Captured:
    """A port's arrays as outputs and taps, with a note on each type that NumPy does not have."""
    call = model.call(feeds)
    made, found, layouts = sort_arrays(model, call, given, who)
    held = {**model.outputs_as_taps(made, call), **found} if taps else {}
    forms = [f"{name} is {form}" for name, value in given.items() if (form := form_of(value))]
    left_out = ("logits: the file has no head",) if "logits" in found and not model.has_logits() else ()
    return Captured(made if outputs else {}, {t: held[t] for t in taps if t in held}, (*forms, *layouts), left_out)


def runner_of(model: Subject, text: str, engine: str) -> Runner:
    """A party by its name on the command line."""
    simple: dict[str, Callable[[], Runner]] = {
        "ours": lambda: Ours(model, engine),
        "numpy": lambda: Ours(model, "numpy", name="numpy"),
        "numba": lambda: Ours(model, "numba", name="numba"),
        "float64": lambda: Ours(model, "numpy", "float64", name="float64"),
        "ort": lambda: Ort(model),
        "ort-off": lambda: Ort(model, optimise=False),
        "onnxref": lambda: OnnxRef(model),
    }
    if text in simple:
        return simple[text]()
    threads = re.fullmatch(r"(ort|ort-off)-(\d+)t", text)
    if threads:
        return Ort(model, optimise=threads[1] == "ort", threads=int(threads[2]))
    if is_trace(text):
        return TraceRunner(model, Path(text))
    if text.endswith(".onnx") or Path(text).is_dir():
        path = model_path(Path(text))
        if not path.is_file():
            raise InputError(f"{text}: no such model")
        other = of_another_file(model, Subject(path))
        other.name = path.parent.name if path.name == "model.onnx" else path.stem
        return other
    if ":" in text:
        return Function(model, text)
    raise InputError(
        f"a party is {', '.join(simple)}, ort-1t (threads), a model.onnx, a trace.npz, or package.module:function;"
        f" got {text!r}"
    )


def of_another_file(model: Subject, other: Subject) -> Ort:
    """ONNX Runtime, without its optimisations, on another file that is compared with the first.

    An output with the name of one that is another thing in the first file, as the zoo's output1 is the last hidden
    state in gpt2-10 and the logits in gpt2-lm-head-10, is not compared with it.

    Raises
    ------
    InputError
        If it cannot be run on the inputs of the first.
    """
    missing = [name for name in other.input_names if name not in model.input_names]
    if missing:
        few = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise InputError(
            f"{other.path} takes {few}, and {model.path} takes {', '.join(model.input_names[:3])}: both must take the"
            " same inputs; gpt2np convert writes a file in another form"
        )
    runner = Ort(other, optimise=False)
    if model.found is not None and other.found is not None:
        things = {port.name: port.role for port in model.found.outputs}
        last = [port for port in other.found.outputs if port.role in ("last_hidden_state", "logits")]
        runner.other_things = {p.name: p.role for p in last if things.get(p.name, p.role) != p.role}
    return runner


def model_path(given: Path | None) -> Path:
    """The file of a MODEL argument: itself, the model.onnx in a folder, or the embedded model."""
    from ..paths import embedded_model_path

    place = embedded_model_path() if given is None else given
    return place / "model.onnx" if place.is_dir() else place


def model_of(text: str) -> Path | None:
    """The model file that a party's name stands for, if it is one."""
    if text.endswith(".onnx") or (text and Path(text).is_dir() and not is_trace(text)):
        path = model_path(Path(text))
        if not path.is_file():
            raise InputError(f"{text}: no such model")
        return path
    return None


def port_of(runners: Sequence[Runner]) -> tuple[str, int] | None:
    """File and line of the function under test, where there is one."""
    return next((runner.location for runner in runners if isinstance(runner, Function)), None)
