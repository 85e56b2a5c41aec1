"""`gpt2np template`: a small GPT-2 to begin a port with."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

if TYPE_CHECKING:
    from ..model import GPT2

FOLDER = Path(__file__).parents[1] / "templates"
FILES = {"numpy": "port.py", "pytorch": "port.py", "c": "port.c"}


def template(
    kind: Annotated[str, typer.Argument(metavar="numpy|pytorch|c", help="what the port is written in")],
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="MODEL", help="model.onnx, its folder, or a name: gpt2-10, mini")
    ] = "mini",
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="where to write it")] = Path(),
    force: Annotated[bool, typer.Option("--force", help="replace files that are there already")] = False,
) -> None:
    """Write a small GPT-2 that computes the model's outputs and passes `gpt2np diff`, to begin a port with.

    It gives every intermediate result, so that the first comparison shows where things stand. Change it into your
    port piece by piece, and run `gpt2np diff` after every piece. For C, the weights are written as one flat file.

    Examples:

    - `gpt2np template numpy`
    - `gpt2np template c -m model.onnx -o port/`
    """
    from ..errors import InputError
    from ..files import replacing, write_text
    from ..model import load
    from ..paths import embedded_model_path
    from ._model import named_model
    from ._terminal import console

    if kind not in FILES:
        raise InputError(f"a template is one of {', '.join(FILES)}, got {kind!r}")
    target, weights = output / FILES[kind], output / "weights.bin"
    present = [str(path) for path in ([target, weights] if kind == "c" else [target]) if path.exists()]
    if present and not force:
        raise InputError(f"{' and '.join(present)}: there already; --force replaces what is there")
    path = named_model(model)
    gpt2 = load(path, engine="numpy")
    assert gpt2.recognised is not None
    check_plain(gpt2)
    own = None if path.absolute() == embedded_model_path().parent.absolute() else str(path)  # what gpt2np.load takes
    ids = next(port.name for port in gpt2.recognised.inputs if port.role == "input_ids")
    text = (FOLDER / f"{'port.c' if kind == 'c' else f'port_{kind}.py'}.txt").read_text(encoding="utf-8")
    loaded = "None" if own is None else json.dumps(own)
    for mark, value in (("@MODEL@", shlex.quote(model)), ("@LOADED@", loaded), ("@IDS@", json.dumps(ids))):
        text = text.replace(mark, value)
    output.mkdir(parents=True, exist_ok=True)
    if kind == "c":
        with replacing(weights) as draft:
            write_weights(draft, gpt2)
    write_text(target, text)
    first = f"gpt2np diff {shlex.quote(model)} {shlex.quote(str(target))}:forward"
    if kind == "c":
        place, dump = shlex.quote(str(output)), shlex.quote(str(output / "port.json"))
        build = "cc -O2 -o port port.c -lm && ./port 1 2 3 4"
        first = f"(cd {place} && {build}) && gpt2np diff {shlex.quote(model)} {dump}"
    console().print(f"{', '.join(map(str, [target, weights] if kind == 'c' else [target]))}\nnext: {first}")


def check_plain(gpt2: GPT2) -> None:
    """Refuse a file whose GPT-2 is not the paper's: a starter that does not pass would start nothing."""
    from ..errors import UnsupportedModelError

    config = gpt2.config
    odd = {
        f"the activation {config.activation}": config.activation != "gelu_tanh",
        "layers of their own kind": bool(config.overrides),
        f"positions that begin at {config.position_offset}": config.position_offset != 0,
        "a head with a bias": gpt2.weights.lm_head_bias.size > 0,
    }
    found = [what for what, here in odd.items() if here]
    if found:
        raise UnsupportedModelError(f"the templates are of the usual GPT-2; {gpt2.path} has {', '.join(found)}")


def write_weights(path: Path, gpt2: GPT2) -> None:
    """Sizes, constants and weights one after another, as the head of port.c describes them."""
    c, w = gpt2.config, gpt2.weights
    sizes = [c.n_layer, c.n_head, c.n_embd, c.n_ctx, c.vocab_size, c.n_inner, c.head_size, int(not c.tied)]
    arrays = [w.wte, w.wpe]
    for h in w.h:
        linears = (h.attn.c_attn, h.attn.c_proj, h.mlp.c_fc, h.mlp.c_proj)
        for part in (h.ln_1, *linears[:2], h.ln_2, *linears[2:]):
            arrays += [part.weight, part.bias]
    arrays += [w.ln_f.weight, w.ln_f.bias, *([] if c.tied else [w.lm_head])]
    with path.open("wb") as file:
        file.write(np.array(sizes, "<i4").tobytes() + np.array([c.layer_norm_epsilon, c.attn_scale], "<f4").tobytes())
        for array in arrays:
            file.write(np.ascontiguousarray(array, "<f4").data)
