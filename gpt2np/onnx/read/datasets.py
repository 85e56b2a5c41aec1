"""Recorded sample data in the layout of the ONNX Model Zoo: test_data_set_N/{input,output}_i.pb."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...errors import ComparisonError, ModelFileError
from ...weights import Array
from .reader import open_tensor


class DataSet(NamedTuple):
    """One recorded call: what went in and what came out, by tensor name."""

    path: Path
    inputs: dict[str, Array]
    outputs: dict[str, Array]

    @property
    def name(self) -> str:
        return self.path.name


def find_sets(model: Path) -> list[Path]:
    """The test_data_set_* folders beside a model.onnx, in numeric order (set_10 comes after set_2)."""
    folder = model if model.is_dir() else model.parent
    found = [p for p in folder.glob("test_data_set_*") if p.is_dir()]
    return sorted(found, key=lambda p: (_number(p.name), p.name))


def expand(folders: Sequence[Path]) -> list[Path]:
    """Data folders as a user gives them: a test_data_set itself, or a folder that holds some."""
    sets: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise ComparisonError(f"{folder}: no such folder of sample data")
        inside = find_sets(folder)
        if not inside and not list(folder.glob("input_*.pb")):
            raise ComparisonError(f"{folder}: holds neither input_*.pb files nor test_data_set_* folders")
        sets += inside or [folder]
    return sets


def load_set(path: Path, input_names: Sequence[str] = (), output_names: Sequence[str] = ()) -> DataSet:
    """Read one set.

    Tensors are matched by the name stored in the file. A file without one (some older zoo models) takes the
    declared name at its index, which is the convention of onnx's own test runner.

    Raises
    ------
    ModelFileError
        If a .pb file cannot be read, or an index is missing.
    ComparisonError
        If two files carry one name, or a nameless file has no declared name to take.
    """
    return DataSet(path, _load(path, "input", input_names), _load(path, "output", output_names))


def _load(folder: Path, kind: str, declared: Sequence[str]) -> dict[str, Array]:
    files = sorted(folder.glob(f"{kind}_*.pb"), key=lambda p: _number(p.stem))
    if [_number(p.stem) for p in files] != list(range(len(files))):
        raise ModelFileError(f"{folder}: {kind}_*.pb are not numbered 0..{len(files) - 1}: {[p.name for p in files]}")
    arrays: dict[str, Array] = {}
    for i, file in enumerate(files):
        tensor = open_tensor(file)
        if not tensor.name and i >= len(declared):
            raise ComparisonError(
                f"{file}: the tensor has no name, and the model declares only {len(declared)} {kind}s"
            )
        name = tensor.name or declared[i]
        if name in arrays:
            raise ComparisonError(f"{file}: a second {kind} called {name!r}")
        arrays[name] = tensor.load()
    return arrays


def save_set(folder: Path, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
    """Write one set; files count from 0 in the order of the dictionaries."""
    from onnx import numpy_helper

    folder.mkdir(parents=True, exist_ok=True)
    for kind, arrays in (("input", inputs), ("output", outputs)):
        for i, (name, array) in enumerate(arrays.items()):
            tensor = numpy_helper.from_array(np.ascontiguousarray(array), name)
            (folder / f"{kind}_{i}.pb").write_bytes(tensor.SerializeToString())


def _number(name: str) -> int:
    digits = re.search(r"(\d+)$", name)
    return int(digits.group(1)) if digits else -1
