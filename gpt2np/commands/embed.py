"""`gpt2np embed`: lines of text to hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from ..errors import InputError
from ..files import located, replacing, write_arrays
from ..weights import Array
from ._model import EngineOption, ModelOption, TokenizerOption, WeightsOption, load_model, read_text
from ._shards import ClusterOption, ResultsOption, WorkersOption, open_shards, wanted
from ._terminal import console, note, print_json, progress


def embed(
    file: Annotated[Path, typer.Argument(help="Lines of text; - is standard input.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .npz or .npy file to write.")],
    tap: Annotated[
        list[str] | None,
        typer.Option(help="Any intermediate result, such as h.5.resid_post. Repeatable. [default: last_hidden_state]"),
    ] = None,
    pool: Annotated[
        str | None, typer.Option(help="One vector for each line: last (its last token's) or mean. [default: all]")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Lines that are run together.")] = 8,
    model: ModelOption = None,
    tokenizer: TokenizerOption = None,
    engine: EngineOption = "numba",
    weights: WeightsOption = None,
    workers: WorkersOption = None,
    cluster: ClusterOption = None,
    results: ResultsOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print a summary as one line of JSON.")] = False,
) -> None:
    """Write the model's last hidden state, or any tap, for each line of a text.

    An .npz file holds, for line i, `last_hidden_state/i` (tokens, C) and `input_ids/i` (tokens,). With --pool it
    holds one array `last_hidden_state` (lines, C). An .npy file holds that one array alone, or without --pool an
    array (lines, tokens, C), which needs lines of equally many tokens.

    Examples:

    - `gpt2np embed lines.txt -o states.npz`

    - `echo "Hello world" | gpt2np embed - -o hello.npy`

    - `gpt2np embed lines.txt -o vectors.npy --pool mean -m gpt2-10`

    - `gpt2np embed lines.txt -o attention.npz --tap h.0.attn.probs --tap h.1.attn.probs`

    - `gpt2np embed lines.txt -o vectors.npy --pool last --workers 4` (the same bits: docs/scale.md)
    """
    from ..embed import LAST_HIDDEN_STATE, check_taps, read_lines
    from ..embed import embed as states_of

    taps = tuple(dict.fromkeys(tap or [LAST_HIDDEN_STATE]))
    if output.suffix not in (".npz", ".npy"):
        raise InputError(f"the output must be an .npz or .npy file, got {output}")
    if output.suffix == ".npy" and len(taps) > 1:
        raise InputError("an .npy file holds one array: give one --tap, or write an .npz file")
    done: dict[str, Any] = {"output": str(output), "taps": list(taps)}
    gpt2 = load_model(model, tokenizer, engine, weights=weights)
    if wanted(workers, cluster, results):
        from ..cluster import text
        from ..cluster.models import describe

        check_taps(gpt2, taps, pool, batch_size)
        options = {"taps": taps, "pool": pool}
        pieces = text.line_shards(text.embed_lines, file, describe(gpt2, tokenizer, batch_size), options)
        with open_shards(workers, cluster, results) as shards:
            shards.compute(pieces, "embedding", "lines")
            done |= {"lines": sum(shard.size for shard in pieces), "cluster": shards.summary()}
            _save(output, text.embedded(pieces, shards.store), taps, pooled=pool is not None)
    else:
        given = read_text(file)
        with located(file):
            lines = read_lines(given)
            found = states_of(gpt2, lines, taps, pool, batch_size)
        with progress(str(file), len(lines), "lines") as advance:
            _save(output, _counted(found, advance), taps, pooled=pool is not None)
        done["lines"] = len(lines)
    if json:
        print_json("embed", done)
    else:
        console().print(f"{output}: {', '.join(taps)} of {done['lines']:,} lines")


def _save(output: Path, found: Iterator[dict[str, Array]], taps: Sequence[str], pooled: bool) -> None:
    """Write the file, as a whole or not at all."""
    try:
        with replacing(output) as draft:
            _write(draft, output.suffix, found, taps, pooled)
    except KeyboardInterrupt:
        note(f"stopped; {output} is not written")
        raise typer.Exit(130) from None
    except OSError as error:
        raise InputError(f"cannot write {output}: {error.strerror}") from None


def _counted(found: Iterator[dict[str, Array]], advance: Callable[[float], None]) -> Iterator[dict[str, Array]]:
    for states in found:
        yield states
        advance(1)


def _write(path: Path, suffix: str, found: Iterator[dict[str, Array]], taps: Sequence[str], pooled: bool) -> None:
    if suffix == ".npy":
        with path.open("wb") as file:
            np.save(file, _stack([states[taps[0]] for states in found]))
        return
    if pooled:
        rows = list(found)
        write_arrays(path, ((tap, _stack([states[tap] for states in rows])) for tap in taps))
    else:  # one by one: all of them may not fit in memory
        write_arrays(path, ((f"{name}/{i}", value) for i, states in enumerate(found) for name, value in states.items()))


def _stack(rows: list[Array]) -> Array:
    shapes = {row.shape for row in rows}
    if len(shapes) > 1:
        raise InputError(
            f"the lines have different numbers of tokens (shapes {', '.join(map(str, sorted(shapes)[:3]))}, ...), "
            "which one array cannot hold: write an .npz file, or choose --pool"
        )
    return np.stack(rows)
