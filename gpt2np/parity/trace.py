"""Golden traces: outputs and taps of one call in one .npz, with a manifest of where they come from.

The arrays lie in the file as `input/NAME`, `output/NAME` and `tap/NAME`; `manifest` is JSON. With statistics
only, each tap is replaced by its rms, largest value, and a few elements at fixed places, a row of `statistics` each;
the manifest keeps the taps' shapes.

What a port writes with `np.savez("port.npz", **arrays)` under the names of taps and outputs is read as well: a
trace without a manifest, of which nobody can say what input it was recorded on.
"""

from __future__ import annotations

import base64
import json
import os
import platform
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..arguments import as_path
from ..errors import TraceError
from ..files import json_object, replacing, write_arrays
from ..weights import Array
from .dumps import is_dump, read_dump

SCHEMA = 2  # 1 had statistics as arrays of their own
KIND = "gpt2np trace"


@dataclass
class Trace:
    """What one party gave for one call."""

    inputs: dict[str, Array]
    outputs: dict[str, Array]
    taps: dict[str, Array]
    manifest: dict[str, Any] = field(default_factory=dict)

    @property
    def runner(self) -> str:
        return str(self.manifest.get("runner", "trace"))

    @property
    def plain(self) -> bool:
        """Whether it is an .npz of plain arrays, all of them in `taps`, without inputs and provenance."""
        return self.manifest.get("kind") != KIND


def statistics(value: Array, samples: int = 14) -> Array:
    """rms, largest absolute value, and some elements spread over the array: (2 + samples,) float64; NaN of none."""
    if not value.size:
        return np.full(2 + samples, np.nan)
    with np.errstate(over="ignore"):
        flat = value.reshape(-1).astype(np.float64)
        places = np.linspace(0, flat.size - 1, samples).astype(int)
        return np.concatenate([[np.sqrt(np.mean(flat * flat)), np.abs(flat).max()], flat[places]])


def summed_up(trace: Trace) -> Trace:
    """The same trace with statistics of its taps in place of them, and their shapes in the manifest."""
    if trace.manifest.get("stats_only"):
        return trace
    taps = {name: statistics(value) for name, value in trace.taps.items()}
    manifest = {**trace.manifest, "stats_only": True, "shapes_of_taps": _shapes(trace.taps)}
    return Trace(trace.inputs, trace.outputs, taps, manifest)


def _shapes(arrays: Mapping[str, Array]) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in arrays.items()}


def alike(x: Trace, y: Trace) -> None:
    """Where one of two traces holds statistics, whole arrays of the other one become such statistics, too."""
    for one, other in ((x, y), (y, x)):
        if one.manifest.get("stats_only") and not other.manifest.get("stats_only"):
            whole = {**other.outputs, **other.taps}
            other.taps = {n: statistics(whole[n], v.size - 2) for n, v in one.taps.items() if n in whole}
            other.outputs = {n: v for n, v in other.outputs.items() if n not in other.taps}
            other.manifest = {**other.manifest, "shapes_of_taps": _shapes(whole)}


def shapes_apart(actual: Trace, expected: Trace, tap: str) -> str:
    """That statistics are of arrays of other shapes, in words; "" where they are not, or nobody knows."""
    mine, its = (trace.manifest.get("shapes_of_taps", {}).get(tap) for trace in (actual, expected))
    apart = tap in expected.taps and None not in (mine, its) and mine != its
    return f"shape {tuple(mine)}, expected {tuple(its)}: only statistics of both are known" if apart else ""


def save(path: str | Path, trace: Trace, stats_only: bool = False) -> None:
    """Write a trace whole or not at all; with `stats_only`, statistics of its taps in place of them."""
    path = as_path(path)
    manifest, arrays = described(summed_up(trace) if stats_only else trace)
    text = np.frombuffer(json.dumps(manifest).encode(), np.uint8)
    with replacing(path) as draft, open(draft, "wb") as file:
        write_arrays(file, {"manifest": text, **arrays}.items(), zipfile.ZIP_DEFLATED)
        file.flush()
        if draft != path:  # not a device, which keeps nothing
            os.fsync(file.fileno())


def described(trace: Trace) -> tuple[dict[str, Any], dict[str, Array]]:
    """The manifest, and the arrays by their names in the file."""
    arrays = {f"input/{n}": v for n, v in trace.inputs.items()}
    arrays |= {f"output/{n}": v for n, v in trace.outputs.items()}
    stats_only = bool(trace.manifest.get("stats_only"))
    manifest = {**trace.manifest, "kind": KIND, "schema": SCHEMA, "stats_only": stats_only}
    if stats_only and trace.taps:  # one array: each by itself would cost 300 bytes in the archive
        arrays["statistics"] = np.stack(list(trace.taps.values()))
        manifest["rows_of_statistics"] = list(trace.taps)
    else:
        arrays |= {f"tap/{n}": v for n, v in trace.taps.items()}
    listed = {name: {"shape": list(v.shape), "dtype": v.dtype.str} for name, v in arrays.items()}
    return manifest | {"arrays": listed}, arrays


def embedded(trace: Trace) -> dict[str, Any]:
    """A trace whose taps are statistics, as JSON that a page holds; `load` reads the page."""
    manifest, arrays = described(trace)
    return {
        "manifest": manifest,
        "arrays": {n: base64.b64encode(np.ascontiguousarray(v).tobytes()).decode() for n, v in arrays.items()},
    }


def load(path: str | Path, sha256: str | None = None) -> Trace:
    """Read a trace.

    Raises
    ------
    TraceError
        If the file is missing, truncated, no trace, of a newer schema, or its arrays do not match the manifest;
        with `sha256`, also if it was recorded from another model file.
    """
    path = as_path(path)
    arrays = read_dump(path)
    text = arrays.pop("manifest", None)
    if text is None and sha256 is None and not any("/" in name for name in arrays):
        return Trace({}, {}, arrays, {"kind": "arrays", "runner": "plain arrays", "stats_only": False})
    if text is None:
        raise TraceError(f"{path}: an .npz file, but no trace of gpt2np: it has no manifest")
    manifest = json_object(text.tobytes(), f"{path}: its manifest", TraceError)
    if manifest.get("kind") != KIND:
        raise TraceError(f"{path}: an .npz file, but no trace of gpt2np: its manifest is another's")
    if manifest.get("schema") not in (1, SCHEMA):
        raise TraceError(f"{path}: trace schema {manifest.get('schema')}, this version reads 1 to {SCHEMA}")
    declared = manifest.get("arrays")
    if not isinstance(declared, dict) or not isinstance(manifest.get("stats_only"), bool):
        raise TraceError(f"{path}: its manifest does not say what arrays there are, or whether they are statistics")
    for name in sorted({*declared, *arrays}):
        if name not in arrays or name not in declared:
            raise TraceError(f"{path}: array {name!r} is in {'the manifest' if name in declared else 'the file'} only")
        value = arrays[name]
        found = {"shape": list(value.shape), "dtype": value.dtype.str}
        if declared[name] != found:
            raise TraceError(f"{path}: {name!r} is {found}, its manifest says {declared[name]}")
    if sha256 is not None and manifest.get("model_sha256") != sha256:
        raise TraceError(
            f"{path}: recorded from another model file: SHA-256 {manifest.get('model_sha256')}, this one has {sha256}"
        )
    return _sorted(path, arrays, manifest)


def _sorted(path: Path, arrays: dict[str, Array], manifest: dict[str, Any]) -> Trace:
    """The arrays of a trace as inputs, outputs and taps; statistics are the taps' where there are such."""
    parts: dict[str, dict[str, Array]] = {"input": {}, "output": {}, "tap": {}}
    rows, names = arrays.pop("statistics", np.zeros((0, 16))), manifest.get("rows_of_statistics", [])
    if not isinstance(names, list) or rows.ndim != 2 or len(rows) != len(names):
        raise TraceError(f"{path}: statistics {list(rows.shape)}, of which its manifest names {names}")
    parts["tap"] = {str(name): row for name, row in zip(names, rows, strict=True)}
    for name, value in arrays.items():
        kind, _, rest = name.partition("/")
        if kind not in parts:
            raise TraceError(f"{path}: unexpected array {name!r}")
        parts[kind][rest] = value
    if len(parts["tap"]) != len(names) + sum(name.startswith("tap/") for name in arrays):
        raise TraceError(f"{path}: one tap is there twice")
    shapes = manifest.get("shapes_of_taps", {})
    odd = [n for n, v in parts["tap"].items() if v.dtype.kind != "f" or v.ndim != 1 or v.size < 3]
    if manifest["stats_only"] and (odd or not isinstance(shapes, dict)):
        what = f"{odd[0]!r} is no row of statistics" if odd else "its manifest holds no shapes of taps"
        raise TraceError(f"{path}: {what}")
    return Trace(parts["input"], parts["output"], parts["tap"], manifest)


def is_trace(text: str) -> bool:
    """Whether a party on the command line is a trace file, or arrays in another form."""
    return is_dump(text)


def provenance(inputs: Mapping[str, Array], **more: Any) -> dict[str, Any]:
    """What a manifest says besides the arrays: versions, CPU, and what the caller adds."""
    return {"versions": versions(), "input_shapes": {n: list(v.shape) for n, v in inputs.items()}, **more}


def versions() -> dict[str, str]:
    """What a comparison ran on: approximations inside the runtimes change from release to release."""
    from importlib.metadata import version

    found = {name: version(name) for name in ("numpy", "onnx", "onnxruntime", "numba")}
    return {"python": platform.python_version(), **found, "machine": platform.machine(), "cpu": _cpu()}


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()
