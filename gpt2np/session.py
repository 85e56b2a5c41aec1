"""ONNX Runtime's calling convention over gpt2np's own engines."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from .arguments import one_of
from .errors import InputError
from .model import GPT2
from .signature import LOGITS, USUAL_OUTPUTS, Signature, checked_feeds, wanted_outputs
from .weights import Array

if TYPE_CHECKING:
    from .onnx.emulate.literal import Emulation, Literally
    from .onnx.read.reader import ModelFile
    from .onnx.recognise import Port, Recognised


class NodeArg:
    """One input or output as the file declares it; the same fields as onnxruntime.NodeArg."""

    def __init__(self, port: Port) -> None:
        self.name = port.name
        self.type = f"tensor({_ONNX_TYPES.get(port.dtype.name, port.dtype.name)})"
        self.shape: list[int | str | None] = list(port.shape)

    def __repr__(self) -> str:
        return f"NodeArg(name={self.name!r}, type={self.type!r}, shape={self.shape})"


_ONNX_TYPES = {"float32": "float", "float64": "double"}
_CPU = "CPUExecutionProvider"


class InferenceSession:
    """Runs a GPT-2 file with the names, ranks, order and types that the file itself declares.

    A drop-in for onnxruntime.InferenceSession where a GPT-2 is run on the CPU.

    Parameters
    ----------
    path_or_bytes : path, or bytes
        A model.onnx, a folder with one in it, or the content of a model.onnx.
    sess_options, providers, provider_options
        As onnxruntime's, so that a client need not be changed. Nothing in them changes the numbers here: what runs is
        always gpt2np on the CPU.
    engine : "numba" or "numpy"
        The compiled kernels, or the textbook.
    dtype : "float32" or "float64", optional
        What is computed in; by default what the file computes in. Outputs have the file's own types.
    weights : str, optional
        What the matrices are rounded to, as `gpt2np.load` says.
    emulate_rounding : bool, "saturating", "optimised" or "unrounded"
        Instead of computing with the file's exact weights, run its nodes one by one in NumPy as ONNX Runtime does
        without optimisations, rounding included: activations to 8 bits where a quantised file asks for it, results
        to float16 in a float16 file. Slow; it shows how much of a difference to ONNX Runtime such rounding explains.
        "saturating": as on an x86 CPU with AVX2 but without VNNI, where sums of two products of uint8 with int8
        saturate at 16 bits: ONNX Runtime's outputs of int8 files differ by much more between CPUs than by rounding.
        "optimised": as with its optimisations, by which products with 4- and 8-bit weights behind DequantizeLinear
        round activations to 8 bits.
        "unrounded": node by node, too, but nothing is rounded.
    read : optional
        The same file as it was opened and recognised before, where a caller has done so.

    Raises
    ------
    ModelFileError, UnsupportedModelError, WeightError
        As `gpt2np.load` does; and where a file searches for a continuation in a way that is not known.
    InputError
        If `providers` are no names of providers, or engine, dtype, weights or emulate_rounding is none of those above.

    Examples
    --------
    >>> import gpt2np, numpy as np
    >>> from gpt2np.paths import embedded_model_path
    >>> session = gpt2np.InferenceSession(embedded_model_path(), engine="numpy")
    >>> session.get_inputs()[0].name
    'input1'
    >>> session.run(["output1"], {"input1": np.array([[[1, 2, 3]]])})[0].shape[:3]
    (1, 1, 3)
    """

    def __init__(
        self,
        path_or_bytes: str | Path | bytes,
        sess_options: Any = None,
        providers: Sequence[Any] | None = None,
        provider_options: Sequence[Any] | None = None,
        *,
        engine: str = "numba",
        dtype: str | None = None,
        weights: str | None = None,
        emulate_rounding: Literally = False,
        read: tuple[ModelFile, Recognised] | None = None,
    ) -> None:
        from .onnx.emulate.literal import Emulation
        from .onnx.read.reader import open_model
        from .onnx.recognise import recognise

        one_of("emulate_rounding", emulate_rounding, (True, False, "saturating", "optimised", "unrounded"))
        for provider in () if providers is None else providers if isinstance(providers, list | tuple) else [providers]:
            name = provider[0] if isinstance(provider, tuple) and provider else provider
            if not isinstance(name, str) or not name.endswith("ExecutionProvider"):
                raise InputError(f"providers must be names such as {_CPU!r}, got {provider!r}")
        self._options = sess_options
        file = open_model(self._as_path(path_or_bytes)) if read is None else read[0]
        self._model_path = str(file.path)  # under onnxruntime's name, by which Optimum asks for it
        recognised = recognise(file) if read is None else read[1]
        self.signature = Signature(recognised)
        self._proto = file.proto
        self._search = None
        self._ports = recognised.inputs, recognised.outputs
        if recognised.search is not None:
            from .search import SearchRunner

            self._search = SearchRunner(recognised)
            self._ports = recognised.search.inputs, recognised.search.outputs
            file = recognised.search.decoder
        wide = any(port.dtype == np.float64 for port in recognised.outputs)
        dtype = ("float64" if wide else "float32") if dtype is None else dtype
        self.model = GPT2(recognised.config, recognised.sources, engine, dtype, file.path, recognised, weights)
        self._literally = partial(Emulation, file, way=emulate_rounding) if emulate_rounding else None
        self._emulations: dict[str, Emulation] = {}  # by the branch that is taken

    def _as_path(self, given: str | Path | bytes) -> str | Path:
        """The file that is given or, for bytes, one that holds them as long as this session lives."""
        if not isinstance(given, bytes | bytearray | memoryview):
            return given
        folder = Path(tempfile.mkdtemp(prefix="gpt2np-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        (folder / "model.onnx").write_bytes(given)
        return folder / "model.onnx"

    def get_inputs(self) -> list[NodeArg]:
        """The file's inputs, in its order."""
        return [NodeArg(port) for port in self._ports[0]]

    def get_outputs(self) -> list[NodeArg]:
        """The file's outputs, in its order."""
        return [NodeArg(port) for port in self._ports[1]]

    def get_providers(self) -> list[str]:
        """What runs the model: the CPU, whatever was asked for."""
        return [_CPU]

    def get_provider_options(self) -> dict[str, dict[str, str]]:
        """Options of `get_providers`: none."""
        return {_CPU: {}}

    def get_session_options(self) -> Any:
        """The options that were given."""
        return self._options

    def get_modelmeta(self) -> SimpleNamespace:
        """What the file says about itself, under the names of onnxruntime.ModelMetadata."""
        proto = self._proto
        return SimpleNamespace(
            custom_metadata_map={entry.key: entry.value for entry in proto.metadata_props},
            description=proto.doc_string,
            domain=proto.domain,
            graph_description=proto.graph.doc_string,
            graph_name=proto.graph.name,
            producer_name=proto.producer_name,
            version=proto.model_version,
        )

    def run(
        self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any], run_options: Any = None
    ) -> list[Array]:
        """Compute outputs from inputs.

        Parameters
        ----------
        output_names : names or None
            The outputs wanted, in this order; None (or nothing) for all.
        input_feed : {name: array}
            Every input that the file declares, of its type and rank.
        run_options
            As onnxruntime's; nothing in them changes the numbers.

        Raises
        ------
        InputError, TokenRangeError, ContextOverflowError
            Before any work: an unknown output; an input that is missing, unknown, or of the wrong type, rank or
            shape; a token id or position out of range; more positions than n_ctx. A search finds the last one as
            it goes on.
        """
        inputs, outputs = self._ports
        wanted = wanted_outputs(outputs, output_names)
        feeds = checked_feeds(inputs, input_feed)
        if self._search is None:
            return self._run(wanted, feeds)
        found = self._search.run(feeds, self._decode)
        return [np.ascontiguousarray(found[port.name]) for port in wanted]

    def _decode(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The decoder inside a search: its outputs by name."""
        ports = self.signature.recognised.outputs
        return {port.name: value for port, value in zip(ports, self._run(ports, feeds), strict=True)}

    def _run(self, wanted: Sequence[Port], feeds: Mapping[str, Array]) -> list[Array]:
        call = self.signature.call(feeds)
        if self._literally is not None:
            switch = self.signature.fed(feeds, "use_cache_branch")
            branch = "" if switch is None else "then" if switch.all() else "else"
            if branch not in self._emulations:
                self._emulations[branch] = self._literally(branch)
            evaluator = self._emulations[branch].evaluator(feeds)
            return [np.ascontiguousarray(evaluator(port.name), port.dtype) for port in wanted]

        roles = {port.role for port in wanted}
        tapped: dict[str, Array] = {}  # further outputs: hidden states of the layers, attention probabilities

        def keep(name: str, value: Array) -> None:
            if name in roles:
                tapped[name] = np.array(value)

        out = self.model.run(call, tap=keep if roles - USUAL_OUTPUTS else None, logits=bool(roles & LOGITS))
        return self.signature.results(wanted, feeds, call, out, tapped)
