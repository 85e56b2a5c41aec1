"""Sparse initializers as the dense tensors that they stand for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...arrays import empty_aligned
from ...errors import ModelFileError
from ...files import allowance
from .reader import ModelFile
from .tensors import Tensor

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True, eq=False)
class SparseTensor(Tensor):
    """A tensor of which the file holds the elements that are not zero."""

    values: Tensor | None = None  # (n,)
    indices: Tensor | None = None  # (n,) into the flattened tensor, or (n, rank)

    def load(self) -> np.ndarray:
        """The dense tensor: a new, aligned, C-contiguous array.

        Raises
        ------
        ModelFileError
            If an index lies outside the tensor.
        """
        assert self.values is not None
        assert self.indices is not None
        indices, values = self.indices.load(), self.values.load()
        array = empty_aligned(self.shape, self.dtype)
        array[...] = 0
        if not values.size:
            return array
        limits = self.shape if indices.ndim == 2 else (array.size,)
        if indices.min() < 0 or (indices.reshape(len(values), -1).max(0) >= limits).any():
            raise ModelFileError(f"sparse tensor {self.name!r} {list(self.shape)} has an index outside of it")
        if indices.ndim == 2:
            array[tuple(indices.T)] = values
        else:
            array.reshape(-1)[indices] = values
        return array


def sparse_tensor(file: ModelFile, proto: onnx.SparseTensorProto, name: str = "") -> SparseTensor:
    """A SparseTensorProto of the file, checked but not yet read.

    Raises
    ------
    ModelFileError
        If its parts contradict each other, or the dense tensor is out of proportion to the file.
    """
    name = name or proto.values.name
    values = file.tensor(proto.values, name)
    indices = file.tensor(proto.indices, f"{name} indices")
    shape = tuple(proto.dims)
    count = values.shape[0] if len(values.shape) == 1 else -1
    sound = indices.dtype == np.int64 and indices.shape in ((count,), (count, len(shape)))
    if not sound or any(d < 0 for d in shape) or not shape or count > math.prod(shape):
        raise ModelFileError(
            f"{file.path}: sparse tensor {name!r} {list(shape)} has {list(values.shape)} values and "
            f"{indices.dtype} {list(indices.shape)} indices"
        )
    nbytes = math.prod(shape) * values.dtype.itemsize
    if nbytes > allowance(file.nbytes):
        raise ModelFileError(
            f"{file.path}: sparse tensor {name!r} {list(shape)} would take {nbytes:,} bytes; "
            f"a file of this size gets {allowance(file.nbytes):,}"
        )
    origin = "sparse_initializer"
    return SparseTensor(name, values.dtype, shape, values.nbytes, origin, values=values, indices=indices)
