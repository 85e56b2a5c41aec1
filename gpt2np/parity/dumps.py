"""Arrays as ports, chips and other languages write them: .npz, a folder of .npy, .safetensors, raw bytes and a JSON.

And a page that `--html` wrote, which holds a trace.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import TraceError
from ..files import json_object, read_arrays
from ..weights import Array

SAFETENSORS = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<V2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U8": "u1", "BOOL": "?",
}  # fmt: skip
RAW = {"bfloat16": "<V2", "bool": "?"}  # besides NumPy's own names


def is_dump(text: str) -> bool:
    """Whether a party's name is a file or a folder of arrays."""
    path = Path(text)
    if path.is_dir():
        return not (path / "model.onnx").exists() and any(path.glob("*.npy"))
    return text.endswith((".npz", ".safetensors", ".json", ".html"))


def read_dump(path: Path) -> dict[str, Array]:
    """The arrays of a folder of NAME.npy, a .safetensors, or a .json that describes raw files, by name.

    The JSON says {"NAME": {"shape": [..], "dtype": "float32", "file": "NAME.bin", "offset": 0}, ...}; file and
    offset may be left out. Numbers are little-endian, rows first.

    Raises
    ------
    TraceError
        If something is missing, damaged, or not as long as its shape says.
    """
    if path.is_dir():
        return {file.stem: _npy(file) for file in sorted(path.glob("*.npy"))}
    if not path.is_file():
        raise TraceError(f"{path}: No such file or directory")
    if path.suffix == ".safetensors":
        return _safetensors(path)
    if path.suffix == ".json":
        return _raw(path)
    if path.suffix == ".html":
        return _page(path)
    return read_arrays(path, TraceError)


def _page(path: Path) -> dict[str, Array]:
    """The trace that a page of `--html` holds; see `trace.embedded`."""
    text = path.read_bytes()
    found = re.search(rb'<script type="application/json" id="gpt2np-trace">(.*?)</script>', text, re.DOTALL)
    if found is None:
        raise TraceError(f"{path}: no page that --html wrote, or one without taps: there is no trace in it")
    held = json_object(found[1], f"{path}: its trace", TraceError)
    manifest, arrays = held.get("manifest"), held.get("arrays")
    listed = manifest.get("arrays") if isinstance(manifest, dict) else None
    if not isinstance(listed, dict) or not isinstance(arrays, dict) or listed.keys() != arrays.keys():
        raise TraceError(f"{path}: its trace does not say what arrays it holds")
    made = {"manifest": np.frombuffer(json.dumps(manifest).encode(), np.uint8)}
    for name, data in arrays.items():
        try:
            content = base64.b64decode(str(data), validate=True)
        except binascii.Error as error:
            raise TraceError(f"{path}: {name!r} in its trace is damaged: {error}") from None
        dtype = str(listed[name].get("dtype") if isinstance(listed[name], dict) else "")
        made[name] = _cut(content, dtype, _numbers(listed[name], "shape", path, name), path, name)
    return made


def _npy(file: Path) -> Array:
    try:
        value = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise TraceError(f"{file}: no readable .npy file: {error}") from error
    return np.asarray(value)


def _safetensors(path: Path) -> dict[str, Array]:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise TraceError(f"{path}: truncated, or no .safetensors file")
    header = json_object(data[8 : 8 + size], f"{path}: its header", TraceError)
    arrays = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = _numbers(entry, "data_offsets", path, name)[:2]
            dtype = SAFETENSORS.get(str(entry.get("dtype")), "")
            arrays[name] = _cut(data[8 + size :][first:last], dtype, _numbers(entry, "shape", path, name), path, name)
    return arrays


def _raw(path: Path) -> dict[str, Array]:
    entries = json_object(path.read_bytes(), str(path), TraceError)
    arrays = {}
    for name, entry in entries.items():
        shape = _numbers(entry, "shape", path, name)
        file = path.parent / str(entry.get("file", f"{name}.bin"))
        dtype = str(entry.get("dtype", "float32"))
        if not file.is_file():
            raise TraceError(f"{path}: {name!r} lies in {file}, which is not there")
        offset = entry.get("offset", 0)
        if not isinstance(offset, int) or offset < 0:
            raise TraceError(f"{path}: {name!r} has the offset {offset!r}, which is no number from 0 up")
        with file.open("rb") as opened:
            opened.seek(offset)
            data = opened.read(math.prod(shape) * 8 + 1)  # enough for any type, and to see that there is more
        arrays[name] = _cut(data, RAW.get(dtype, dtype), shape, path, name, "offset" in entry)
    return arrays


def _numbers(entry: Any, key: str, path: Path, name: str) -> list[int]:
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, list) or not all(isinstance(n, int) and n >= 0 for n in value):
        raise TraceError(f"{path}: {name!r} has no {key}, a list of numbers, but {json.dumps(value)[:60]}")
    return value


def _cut(data: bytes, dtype: str, shape: list[int], path: Path, name: str, more: bool = False) -> Array:
    """The array of these bytes; `more`: others may follow it."""
    try:
        kind = np.dtype(dtype).newbyteorder("<")
    except TypeError:
        raise TraceError(f"{path}: {name!r} is of a type that cannot be read: {dtype!r}") from None
    if not dtype or kind.kind not in "biufV":
        raise TraceError(f"{path}: {name!r} is of a type that cannot be read: {dtype!r}")
    wanted = math.prod(shape) * kind.itemsize
    if len(data) < wanted or (len(data) > wanted and not more):
        raise TraceError(f"{path}: {name!r} has {len(data):,} bytes; {kind.name} {shape} are {wanted:,}")
    return np.frombuffer(data[:wanted], kind).reshape(shape).copy()
