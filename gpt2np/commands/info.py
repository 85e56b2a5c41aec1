"""gpt2np info: what a model file holds, and where each weight comes from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..onnx.read.reader import ModelFile
    from ..onnx.recognise import Port, Recognised
    from ..onnx.recognise.sources import Source


ROWS_AT_ONCE = 256  # of a matrix, looked at for numbers that 16 bits hold
KEPT = {
    **{form: f"of {form} numbers: kept in 16 bits, with the same results" for form in ("bfloat16", "float16")},
    **{f"int{n}": f"of whole numbers with scales: kept in {n} bits, with the same results" for n in (8, 4)},
    "float32": "of whole numbers with scales of another form than the kernels have: kept in float32",
}


def info(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="model.onnx, its folder, or a fetched model's name. Default: embedded."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one line of JSON.")] = False,
    nodes: Annotated[
        bool, typer.Option("--nodes", help="Print each node of the graph with its role, its tap and its line of code.")
    ] = False,
    graph: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Write that as a page, from the blocks down to the code."),
    ] = None,
) -> None:
    """Explain a model file: configuration, inputs and outputs, and the source of every weight."""
    from ..onnx.read.reader import open_model
    from ..onnx.recognise import recognise
    from ..pages import nodes as ledger
    from ._model import named_model
    from ._terminal import check_writable, print_json, print_table

    check_writable(graph)
    file = open_model(named_model(model))
    found = recognise(file)
    if graph is not None:
        from ..files import write_text
        from ..pages.graph_page import graph_page

        write_text(graph, graph_page(str(file.path), found))
    if as_json:
        print_json("info", {**describe(file, found), **({"nodes": ledger.rows(found)} if nodes else {})})
    elif nodes:
        print_table(("node", "operator", "role", "tap", "line"), ledger.table(found))
    else:
        print_info(file, found)


def describe(file: ModelFile, found: Recognised) -> dict[str, Any]:
    """Everything that `--json` prints."""
    from dataclasses import asdict

    from ..arrays import NARROW

    proto, kept = file.proto, kept_forms(found)
    return {
        "path": str(file.path),
        "bytes": file.nbytes,
        "sha256": file.sha256,
        "producer": f"{proto.producer_name} {proto.producer_version}".strip(),
        "ir_version": proto.ir_version,
        "opset": {o.domain or "ai.onnx": o.version for o in proto.opset_import},
        "variant": variant(file, found),
        "operators": operators(file),
        "config": _finite(asdict(found.config)),
        "parameters": parameters(found),
        "positions": found.positions,
        "inputs": [_port(p) for p in (found.search or found).inputs],
        "outputs": [_port(p) for p in (found.search or found).outputs],
        "search": _search(found),
        "weights": {
            name: {
                "shape": list(source.shape),
                "from": list(source.origin),
                "stored": stored(file, source),
                "through": list(source.through),
            }
            for name, source in found.sources.items()
        },
        "bytes_by_dtype": bytes_by_dtype(file),
        "sixteen_bits": {name: form for name, form in kept.items() if form in NARROW},
        "levels": {name: form for name, form in kept.items() if form not in NARROW},
        "ignored": dict(found.ignored),
        "taps": {name: tap.tensor for name, tap in found.taps.items()},
        "notes": list(found.notes),
    }


def _finite(value: Any) -> Any:
    """JSON has no infinities."""
    import math

    if isinstance(value, tuple | list):
        return [_finite(v) for v in value]
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _search(found: Recognised) -> dict[str, Any] | None:
    """Of a file that searches: how, and what goes into the GPT-2 inside and comes out of it."""
    if found.search is None:
        return None
    return {
        "kind": found.search.kind,
        "described": found.search.describe(),
        "decoder_inputs": [_port(p) for p in found.inputs],
        "decoder_outputs": [_port(p) for p in found.outputs],
    }


def _port(port: Port) -> dict[str, Any]:
    return {
        "name": port.name,
        "dtype": port.dtype.name,
        "shape": list(port.shape),
        "role": port.role,
        "layer": port.layer,
    }


def parameters(found: Recognised) -> int:
    """Number of weights, the head counted only where it is not wte."""
    import math

    return sum(math.prod(s.shape) for s in found.sources.values() if s.origin)


def operators(file: ModelFile) -> dict[str, int]:
    """{operator: nodes} of the main graph, the most frequent first."""
    from collections import Counter

    names = (f"{n.domain}.{n.op_type}" if n.domain else n.op_type for n in file.proto.graph.node)
    return dict(Counter(names).most_common())


def variant(file: ModelFile, found: Recognised) -> list[str]:
    """What kind of export this is, in words."""
    roles = {p.role for p in (*found.inputs, *found.outputs)}
    words = [] if found.search is None else [found.search.describe(), "the GPT-2 inside"]
    if "logits" in roles or "last_logits" in roles:
        where = "" if "logits" in roles else " of the last position"
        words.append(f"logits{where}, {'head tied to wte' if found.config.tied else 'separate head'}")
    if "last_hidden_state" in roles:
        words.append("hidden states")
    if "past" in roles:
        words.append("past and present as pairs")
    elif "past_key" in roles:
        words.append("past and present as keys and values")
    elif roles & {"present", "present_key"}:
        words.append("present, but no past")
    if "attention_mask" in roles:
        words.append("attention_mask")
    if "position_ids" in roles:
        words.append("position_ids")
    if len(file.files) > 1:
        words.append(f"external data in {len(file.files) - 1} file{'s' if len(file.files) > 2 else ''}")
    special = [f"{name} x{count}" for name, count in operators(file).items() if "." in name]
    if special:
        words.append(f"special operators: {', '.join(special)}")
    return words


def stored(file: ModelFile, source: Source) -> str:
    """Element type and place of a weight's main tensor in the file."""
    tensor = file.tensors.get(source.origin[0]) if source.origin else None
    return f"{tensor.dtype.name}, {tensor.origin}" if tensor else ("in the graph" if source.origin else "nowhere")


def bytes_by_dtype(file: ModelFile) -> dict[str, int]:
    """Bytes of all initializers and large constants, by element type."""
    totals: dict[str, int] = {}
    for tensor in file.tensors.values():
        totals[tensor.dtype.name] = totals.get(tensor.dtype.name, 0) + tensor.nbytes
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def kept_forms(found: Recognised) -> dict[str, str]:
    """What the kernels keep matrices in, {name: form}: all in fewer bits, and others that are whole numbers."""
    from ..arrays import narrow_form
    from ..quantised import as_stored
    from ..weights import is_matrix

    forms = {}
    for name, source in found.sources.items():
        if is_matrix(name):
            levels = as_stored(name, source)
            form = narrow_form(source.blocks(ROWS_AT_ONCE)) if levels is None else levels.form
            if form is not None or source.scales is not None:
                forms[name] = form or "float32"
    return forms


def print_info(file: ModelFile, found: Recognised) -> None:
    """For reading: a head, then tables."""
    from ..activations import ACTIVATIONS
    from ._terminal import console, print_table

    out, proto, c = console(), file.proto, found.config
    opsets = ", ".join(f"{o.domain or 'ONNX'} opset {o.version}" for o in proto.opset_import)
    producer = f"{proto.producer_name} {proto.producer_version}".strip() or "an unnamed exporter"
    out.print(str(file.path), style="bold")
    out.print(f"{file.nbytes:,} bytes, made by {producer}, {opsets}, {len(proto.graph.node):,} nodes", style="dim")
    out.print("; ".join(variant(file, found)), style="dim")
    out.print()
    out.print(
        f"GPT-2 with {parameters(found):,} parameters: {c.n_layer} layers, {c.n_head} heads of {c.head_size}, "
        f"width {c.n_embd}, MLP {c.n_inner}, {c.vocab_size:,} tokens, {c.n_ctx:,} positions",
        style="bold",
    )
    out.print(
        f"{ACTIVATIONS[c.activation].title}; layer norm epsilon {c.layer_norm_epsilon:g}; "
        f"scores times {c.attn_scale:g}; {c.mask.describe()}"
    )
    for note in found.notes:
        out.print(f"note: {note}", style="yellow")
    out.print()
    for what, holder in (("", found.search), ("of the GPT-2 inside:", found)) if found.search else (("", found),):
        ports = [("in", p) for p in holder.inputs] + [("out", p) for p in holder.outputs]
        if what:
            out.print(what, style="dim")
        print_table(("", "name", "type", "shape", "role"), (_port_row(d, p) for d, p in _folded_ports(ports)))
    out.print()
    columns = ("weight", "shape", "from", "stored as", "seen through")
    print_table(columns, _weight_rows(file, found))
    out.print()
    sizes = ", ".join(f"{size:,} {name}" for name, size in bytes_by_dtype(file).items())
    out.print(f"bytes by type: {sizes}")
    for form, names in sorted(_by_value(kept_forms(found)).items()):
        out.print(f"{len(names)} matri{'x' if len(names) == 1 else 'ces'} {KEPT[form]}")
    for why, names in _by_value(dict(found.ignored)).items():
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        out.print(f"not a weight: {shown} ({why})", style="dim")


def _by_value(values: dict[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(value, []).append(name)
    return groups


def _folded_ports(ports: list[tuple[str, Port]]) -> list[tuple[str, Port]]:
    """One row for what every layer has: the first and the last layer's names stand for all."""
    from dataclasses import replace

    rows: list[tuple[str, Port]] = []
    groups: dict[tuple[str, str], list[Port]] = {}
    for direction, port in ports:
        if port.layer is None:
            rows.append((direction, port))
            continue
        group = groups.setdefault((direction, port.role), [])
        group.append(port)
        if len(group) == 1:
            rows.append((direction, port))
    folded = []
    for direction, port in rows:
        group = groups.get((direction, port.role), [port])
        if port.layer is not None and len(group) > 1:
            port = replace(port, name=f"{port.name} ... {group[-1].name}")
        folded.append((direction, port))
    return folded


def _port_row(direction: str, port: Port) -> tuple[str, ...]:
    shape = ", ".join("?" if s is None else str(s) for s in port.shape)
    return direction, port.name, port.dtype.name, f"({shape})", port.role


def _weight_rows(file: ModelFile, found: Recognised) -> list[tuple[str, ...]]:
    """One row for each weight; for those that all layers have alike, one row for all layers."""
    L = found.config.n_layer
    rows: list[tuple[str, ...]] = []
    seen: set[str] = set()
    for name, source in found.sources.items():
        if name in seen:
            continue
        group = [name]
        if name.startswith("h.0.") and L > 1:
            group = [f"h.{i}.{name[4:]}" for i in range(L)]
            looks = {
                (found.sources[n].shape, stored(file, found.sources[n]).split(",")[0], found.sources[n].through)
                for n in group
            }
            if len(looks) > 1:
                group = [name]
        seen.update(group)
        more = f" + {len(source.origin) - 1}" if len(source.origin) > 1 else ""  # scales and zero points
        origins = [found.sources[n].origin[0] if source.origin else "-" for n in group]
        origin = origins[0]
        if len(group) > 1:
            starred = {o.replace(f"h.{i}.", "h.*.", 1) for i, o in enumerate(origins)}
            same = len(starred) == 1
            origin = starred.pop() if same else f"{origins[0]} ... {origins[-1]}"
        origin += more
        label = f"h.0-{L - 1}.{name[4:]}" if len(group) > 1 else name
        kind = stored(file, source)
        rows.append((label, str(source.shape), origin, kind.split(",")[0], ", ".join(source.through)))
    return rows
