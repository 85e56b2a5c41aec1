"""Two model files: what their weights and constants differ in, as facts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from ..config import GPT2Config
from ..weights import Array
from .report import Report
from .subject import Subject

NARROW = {"float16": np.float16}


def compare_files(report: Report, model: Subject, other: Subject, b_is_other: bool) -> None:
    """What the two files hold that differs, into the report: it is read, not guessed."""
    a, b = (model, other) if b_is_other else (other, model)
    facts = list(weight_facts(a, b))
    if a.found is not None and b.found is not None:
        facts += config_facts(a.config, b.config)
    report.facts += [text for _, text in facts]


def weight_facts(a: Subject, b: Subject) -> list[tuple[str, str]]:
    """(weight, what differs), by canonical names where both files are placed, else by the initializers' own."""
    if a.found is not None and b.found is not None:
        x: Mapping[str, Any] = a.found.sources
        y: Mapping[str, Any] = b.found.sources
    else:
        x, y = a.file.tensors, b.file.tensors
    found: list[tuple[str, str, str]] = []
    for name in [n for n in x if n in y]:
        left, right = x[name].load(), y[name].load()
        words = difference_in_words(name, left, right, a.found.config if a.found is not None else None)
        if words is not None:
            found.append((name, *(other_weight(name, right, x) or words)))
    only = [n for n in x if n not in y], [n for n in y if n not in x]
    merged = list(_merged(found))
    if a.found is not None and b.found is not None:
        merged += [(n, f"{n} is in A alone") for n in only[0]] + [(n, f"{n} is in B alone") for n in only[1]]
    return merged


def _merged(found: list[tuple[str, str, str]]) -> Iterator[tuple[str, str]]:
    """One sentence for what many weights have in common, as that they are rounded."""
    kinds: dict[str, list[str]] = {}
    for name, kind, _ in found:
        kinds.setdefault(kind, []).append(name)
    said = set()
    for name, kind, text in found:
        if len(kinds[kind]) > 3 and kind:
            if kind not in said:
                said.add(kind)
                yield name, f"{len(kinds[kind])} weights, from {name} on: {kind}"
        else:
            yield name, text


def difference_in_words(name: str, x: Array, y: Array, config: GPT2Config | None) -> tuple[str, str] | None:
    """(what many weights may share, the sentence), or None where both hold the same."""
    if x.shape != y.shape:
        return "", f"{name} has shape {x.shape} in A and {y.shape} in B"
    if x.dtype.kind not in "biuf" or y.dtype.kind not in "biuf":
        return None
    apart = ~((x == y) | ((x != x) & (y != y)))
    count = int(apart.sum())
    if not count:
        return None
    at = tuple(int(i) for i in np.argwhere(apart)[0])
    place = f"{name}[{','.join(map(str, at))}]"
    if not np.isfinite(y).all() and np.isfinite(x).all():
        bad = tuple(int(i) for i in np.argwhere(~np.isfinite(y))[0])
        return "", f"{name}[{','.join(map(str, bad))}] is {y[bad]:g} in B, {x[bad]:.7g} in A"
    if count == 1:
        return "", f"{place} is {x[at]:.7g} in A and {y[at]:.7g} in B; all other numbers of {name} are equal"
    for kind, narrow in NARROW.items():
        with np.errstate(over="ignore"):
            if np.array_equal(x.astype(narrow).astype(x.dtype), y):
                return f"rounded to {kind} in B", f"{name} is rounded to {kind} in B"
            if np.array_equal(y.astype(narrow).astype(y.dtype), x):
                return f"rounded to {kind} in A", f"{name} is rounded to {kind} in A"
    if x.ndim == 2 and x.shape[0] == x.shape[1] and np.array_equal(x.T, y):
        return "transposed in B", f"{name} is transposed in B"
    where = _rows_and_columns(name, apart, config)
    if not y.any():
        return "zeros in B", f"{name} is all zeros in B"
    flat_x, flat_y = x[apart].astype(np.float64), y[apart].astype(np.float64)
    square = float(flat_x @ flat_x)
    factor = float(flat_x @ flat_y) / square if square else 0.0
    if abs(factor) > 1e-6 and np.allclose(flat_y, factor * flat_x, rtol=1e-5, atol=0):
        return f"multiplied by {factor:.6g} in B", f"{name}{where} is multiplied by {factor:.6g} in B"
    rms = float(np.sqrt(np.mean((flat_y - flat_x) ** 2)) / max(float(np.sqrt(np.mean(flat_x**2))), 1e-30))
    text = f"{name}{where} differs: {count:,} of {x.size:,} numbers, by {rms:.2g} of their size (rms)"
    return ("" if rms > 0.05 else "slightly different numbers in B"), text


def _rows_and_columns(name: str, apart: Array, config: GPT2Config | None) -> str:
    """ " row 5", " column 7", " head 2 of k": where all differing elements lie."""
    if apart.ndim == 1 and config is None:
        return ""
    axes = [np.flatnonzero(apart.any(axis=tuple(j for j in range(apart.ndim) if j != i))) for i in range(apart.ndim)]
    if apart.ndim == 2 and len(axes[0]) == 1:
        return f" row {axes[0][0]}"
    if len(axes[-1]) == 1:
        return f" column {axes[-1][0]}" if apart.ndim == 2 else f" element {axes[-1][0]}"
    if "attn.c_attn" in name and config is not None:
        width, D = config.n_head * config.head_size, config.head_size
        parts, heads = {int(c) // width for c in axes[-1]}, {int(c) % width // D for c in axes[-1]}
        if len(parts) == 1:
            part = f" {'qkv'[parts.pop()]}"
            return f" head {heads.pop()} of{part}" if len(heads) == 1 else f" {part.strip()}"
    if apart.ndim == 2 and 1 < len(axes[0]) < apart.shape[0]:
        return f" rows {axes[0][0]} to {axes[0][-1]}"
    return ""


def other_weight(name: str, value: Array, weights: Mapping[str, Any]) -> tuple[str, str] | None:
    """Whether B's weight is another one of A's: another layer's, another norm's."""
    stem = name.rsplit(".", 1)[-1]
    for other, source in weights.items():
        if other != name and other.rsplit(".", 1)[-1] == stem and tuple(source.shape) == value.shape:
            held = source.load()
            if held.any() and (held != held.flat[0]).any() and np.array_equal(held, value):
                return "", f"{name} is A's {other} in B"
    return None


def config_facts(a: GPT2Config, b: GPT2Config) -> Iterator[tuple[str, str]]:
    """Constants of the graph: epsilon, scale, activation, mask."""
    resolved: dict[str, tuple[Any, Any]] = {}
    for i in range(min(a.n_layer, b.n_layer)):
        resolved[f"h.{i}.attn.scores scale"] = (a.layer_scale(i), b.layer_scale(i))
        resolved[f"h.{i}.mlp.gelu activation"] = (a.layer_activation(i), b.layer_activation(i))
        for norm in ("ln_1", "ln_2"):
            resolved[f"h.{i}.{norm} epsilon"] = (a.epsilon(f"h.{i}.{norm}"), b.epsilon(f"h.{i}.{norm}"))
    resolved["ln_f epsilon"] = (a.epsilon("ln_f"), b.epsilon("ln_f"))
    for field in fields(a):
        if field.name not in ("overrides", "layer_norm_epsilon", "activation", "attn_scale", "mask"):
            resolved[field.name] = (getattr(a, field.name), getattr(b, field.name))
    if a.mask != b.mask:
        resolved["mask"] = (a.mask.describe(), b.mask.describe())
    for name, (x, y) in resolved.items():
        if x != y:
            yield name.split(" ")[0], f"{name}: {x} in A, {y} in B"
