"""Print docs/taps.md from the table of operations: `python docs/taps.py > docs/taps.md`."""

from __future__ import annotations

from pathlib import Path

from gpt2np import reference
from gpt2np.parity.operations import LAYER_PARTS, OPERATIONS

HEAD = """# Taps: the name of every intermediate result

One spelling for code, traces, reports and plots, whatever an exporter called the tensor. `model(ids, tap=f)` calls
`f(name, array)` at each of them in this order; `model.trace(ids)` returns them all; `gpt2np trace` saves them.

B batch, T new positions, S cached + new positions, C width, H heads, D head size, F MLP width, V vocabulary.

| tap | shape | what it is | reads | weights | line of reference.py |
|---|---|---|---|---|---|
"""
TAIL = """
A fused node keeps some of these inside (ONNX Runtime's `Attention` has no scores to show): a report then says which
taps it could not see.
"""


def page() -> str:
    """docs/taps.md, whole."""
    source = Path(reference.__file__).read_text(encoding="utf-8").splitlines()
    rows = []
    for part, op in OPERATIONS.items():
        names = {"h": "h.i", "x": "the stream", "t": f"h.i.{part}" if part in LAYER_PARTS else part, "head": "wte"}
        reads = ", ".join(
            "the stream" if name == "{x}" else f"`{name.format(**names)}`" for name in op.inputs
        ) or "ids, positions"  # fmt: skip
        weights = ", ".join(f"`{name.format(**names)}`" for name in op.weights if name != "lm_head.bias") or "-"
        number = next(i for i, line in enumerate(source, 1) if op.line in line)
        shape = f"({', '.join(op.shape.split())})"
        where = f"[{number}](../gpt2np/reference.py#L{number})"
        rows.append(f"| `{names['t']}` | {shape} | {op.formula} | {reads} | {weights} | {where} |\n")
    return HEAD + "".join(rows) + TAIL


if __name__ == "__main__":
    print(page(), end="")
