"""Inputs for any recognised file, and ONNX Runtime's answer to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from gpt2np.onnx.recognise import LENGTHS, Port, Recognised

Array = np.ndarray
DATA = Path(__file__).parents[1] / "data"


def is_older(version: str) -> bool:
    """Whether ONNX Runtime is older than `version`."""
    ours, wanted = (tuple(map(int, text.split(".")[:2])) for text in (onnxruntime.__version__, version))
    return ours < wanted


def since(version: str, what: str) -> pytest.MarkDecorator:
    """Skip a test where ONNX Runtime is older than `version`, the first with `what`."""
    return pytest.mark.skipif(is_older(version), reason=f"{what}: ONNX Runtime {version} or newer")


DYNAMO_23 = pytest.param("dynamo_23", marks=since("1.23", "operators of opset 23"))
HALF = since("1.32", "a converter to float16 whose Cast nodes load")


def feeds_for(
    found: Recognised, B: int, T: int, P: int = 0, mask: Array | None = None, seed: int = 0
) -> dict[str, Array]:
    """Random inputs of the file's own names, ranks and types: T new positions after P cached ones."""
    rng = np.random.default_rng(seed)
    config = found.config
    keep = np.ones((B, P + T), int) if mask is None else mask
    feeds: dict[str, Array] = {}
    fixed = (port.shape[-2] for port in found.inputs if port.role.startswith("past") and found.lengths)
    held = next((rows for rows in fixed if isinstance(rows, int)), P)
    for port in found.inputs:
        if port.role == "input_ids":
            shape = {1: (T,), 2: (B, T), 3: (1, B, T)}[len(port.shape)]
            value: Any = rng.integers(0, config.vocab_size, shape)
        elif port.role in ("attention_mask", "attention_bias"):
            value = mask_for(port, keep, T, config.n_ctx, found.mask_cut)
        elif port.role == "token_type_ids":
            value = rng.integers(0, config.vocab_size, (B, T))
        elif port.role == "position_ids":
            value = np.maximum(np.cumsum(keep, axis=-1) - 1, 0)[:, P:]
        elif port.role == "use_cache_branch":
            value = np.array([P > 0])
        elif port.role in LENGTHS:
            shape = {1: (B if port.role == "seqlens_k" else 1,), 0: ()}[len(port.shape)]
            value = np.full(shape, P - LENGTHS[port.role](T))
        elif port.role in ("beam_width", "cache_indirection"):
            value = np.ones(1) if port.role == "beam_width" else np.zeros((B, 1, held))
        elif port.role.startswith("past"):
            shape = (B, config.n_head, held, config.head_size)
            value = rng.standard_normal((2, *shape) if port.role == "past" else shape)
        else:
            raise AssertionError(port)
        feeds[port.name] = value.astype(port.dtype)
    return feeds


def mask_for(port: Port, keep: Array, T: int, N: int, cut: bool) -> Array:
    """attention_mask as the file wants it: of keys (B, S), or for each query what it sees of them, itself included."""
    B, S = keep.shape
    visible = keep.astype(bool)
    if len(port.shape) > 2 and port.shape[-2] == 1:
        visible = visible[:, None, None, :]
    elif len(port.shape) > 2:
        visible = visible[:, None, None, :] & (np.arange(S) <= np.arange(S - T, S)[:, None])
    if cut:
        rows, columns = (d if isinstance(d, int) else N for d in port.shape[-2:])
        buffer = np.zeros((B, 1, rows, columns), bool)
        buffer[:, :, S - T : S, :S] = visible
        visible = buffer
    if port.role == "attention_bias":
        return np.where(visible, 0.0, -1e4)
    return visible[:, 0] if len(port.shape) == 3 else visible


def runtime(path: Path, extra: list[str] | None = None, scratch: Path | None = None) -> onnxruntime.InferenceSession:
    """ONNX Runtime without optimisations; `extra` values of the graph become outputs, in a copy in `scratch`."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if extra:
        assert scratch is not None
        model = onnx.load(path)
        have = {o.name for o in model.graph.output}
        model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n) for n in extra if n not in have)
        path = scratch / "with_more_outputs.onnx"
        onnx.save(model, path)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def assert_close(got: Array, expected: Array, what: str, rtol: float = 1e-3, atol: float = 1e-5) -> None:
    """Same shape, type and NaNs, and close."""
    assert got.shape == expected.shape, what
    assert got.dtype == expected.dtype, what
    np.testing.assert_allclose(got, expected, rtol, atol, equal_nan=True, err_msg=what)
