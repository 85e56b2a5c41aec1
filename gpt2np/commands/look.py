"""`gpt2np look`: one text on its way through a model, as a page of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._model import EngineOption, TokenizerOption, WeightsOption, load_model


def look(
    arguments: Annotated[
        list[str], typer.Argument(metavar="[MODEL] TEXT", help="the text, and before it the model [default: embedded]")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="the page to write")] = Path("look.html"),
    png: Annotated[Path | None, typer.Option(metavar="FOLDER", help="also write each picture there as .png")] = None,
    svg: Annotated[Path | None, typer.Option(metavar="FOLDER", help="also write each picture there as .svg")] = None,
    tokenizer: TokenizerOption = None,
    engine: EngineOption = "numpy",
    weights: WeightsOption = None,
) -> None:
    """Show what happens to a text inside the model: one page that opens in a browser, without network.

    Attention of every head, what each layer would say next, the residual stream, the next token with the knobs of
    sampling, similarity of tokens and positions, and the way through the machine with its shapes. Needs
    `pip install altair vl-convert-python`.

    Examples:

    - `gpt2np look "Once upon a time"`
    - `gpt2np look gpt2-10 "Alan Turing was" -o turing.html --svg pictures/`
    """
    from html import escape

    from .. import pictures
    from ..errors import InputError
    from ..files import write_text
    from ..html import page
    from ._terminal import check_writable, console

    if len(arguments) > 2:
        raise InputError(f"give a text, or a model and a text; got {len(arguments)} arguments (quote the text)")
    check_writable(output)
    model = load_model(arguments[0] if len(arguments) == 2 else None, tokenizer, engine, weights=weights)
    reading = pictures.read(model, arguments[-1])
    made = [picture(reading) for picture in pictures.PICTURES]
    c = model.config
    introduction = (
        f"<h1>{escape(arguments[-1])}</h1><p>{len(reading.ids)} tokens in a GPT-2 of {c.n_layer} layers, {c.n_head} "
        f"heads and width {c.n_embd}. Every number comes from <code>model.trace</code>; below each picture they stand "
        "as a table. On a narrow screen a picture can be moved sideways.</p>"
    )
    write_text(output, page(f"gpt2np look: {arguments[-1]}", [introduction, *made]))
    for folder, suffix in ((png, "png"), (svg, "svg")):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for picture in made:
                picture.save(folder / f"{picture.name}.{suffix}")
    console().print(f"{output}: {len(made)} pictures of {len(reading.ids)} tokens, {output.stat().st_size:,} bytes")
