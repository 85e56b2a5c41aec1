"""`gpt2np generate`: continue a text."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import Gpt2npError, InputError
from ..escape import escaped
from ..tokenizer import decode, encode_for, end_of_text_id
from ._model import EngineOption, ModelOption, TokenizerOption, WeightsOption, load_model, read_text
from ._terminal import console, note, print_json, print_table

if TYPE_CHECKING:
    import tokenizers

    from ..cache import KVCache
    from ..decoding import Step
    from ..model import GPT2

NEW_TOKENS = 128


def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="Texts to continue. [default: standard input]")
    ] = None,
    file: Annotated[
        list[Path] | None, typer.Option("--file", "-f", help="A file to continue; - is standard input. Repeatable.")
    ] = None,
    lines: Annotated[bool, typer.Option("--lines", help="Each line of a file or of the input is a prompt.")] = False,
    interactive: Annotated[
        bool, typer.Option("--interactive", "-i", help="Read prompt after prompt; each goes on from what is there.")
    ] = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", "-n", help=f"Tokens to add to each. [default: {NEW_TOKENS}, or what fits]"),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature",
            "-t",
            help="0: always the most probable token. [default: 0; with --top-k, --top-p or --min-p: 1]",
        ),
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k most probable tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the fewest tokens of probability p.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Sample from tokens at least p times as probable as the best.")
    ] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: avoid tokens seen before.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A string that ends the text. Repeatable.")] = None,
    beams: Annotated[int, typer.Option(help="Above 1: beam search of this width.")] = 1,
    length_penalty: Annotated[float, typer.Option(help="For beams: above 0 favours long texts, below 0 short.")] = 1.0,
    logprobs: Annotated[int, typer.Option(help="Show log-probabilities, and this many alternatives.")] = 0,
    window: Annotated[
        bool,
        typer.Option("--window", help="Where the context is full, go on from the latter half of it, recomputed."),
    ] = False,
    lookup: Annotated[
        bool,
        typer.Option("--lookup", help="Guess tokens from the text so far and check several at once: the same text."),
    ] = False,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Do not end at <|endoftext|>.")] = False,
    special: Annotated[
        bool, typer.Option("--special", help="<|endoftext|> in a prompt is the token, not the text.")
    ] = False,
    no_echo: Annotated[bool, typer.Option("--no-echo", help="Print the continuation only.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one line of JSON for each prompt.")] = False,
    model: ModelOption = None,
    tokenizer: TokenizerOption = None,
    engine: EngineOption = "numba",
    weights: WeightsOption = None,
) -> None:
    """Continue a text.

    Text appears as it is made; several prompts run together and appear one after the other. Ctrl-C stops, and what
    is there stays (exit code 130).

    Examples:

    - `gpt2np generate "Once upon a time"`

    - `gpt2np generate "Once upon a time" -t 0.4 --top-p 0.9 --repetition-penalty 1.1 --seed 1 -n 240`

    - `gpt2np generate "The king" "The queen" --stop . --json`

    - `cat story.txt | gpt2np generate --no-echo --window -n 2000`

    - `gpt2np generate -i -t 0.8`

    - `gpt2np generate "Alan Turing theorized that" -m gpt2-lm-head-10`
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal may know fewer characters than a model
    if interactive and (prompts or file or lines or json or logprobs or beams > 1):
        raise InputError("--interactive takes no PROMPT, --file, --lines, --json, --logprobs or --beams")
    texts = [] if interactive else _read_prompts(prompts or [], file or [], lines)
    seed = secrets.randbits(32) if seed is None else seed
    options: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": tuple(stop or ()),
        "lookup": lookup,
    }
    try:
        gpt2 = load_model(model, tokenizer, engine, weights=weights)
        assert gpt2.tokenizer is not None
        end = None if ignore_eos else end_of_text_id(gpt2.tokenizer)
        options["eos_token_id"] = end if end is None or end < gpt2.config.vocab_size else None
        if interactive:
            _talk(gpt2, max_new_tokens, window, special, options)
            return
        ids = [encode_for(gpt2.config.vocab_size, gpt2.tokenizer, text, special) for text in texts]
        fits = NEW_TOKENS if window else min(NEW_TOKENS, max(gpt2.config.n_ctx + 1 - max(map(len, ids)), 1))
        steps = gpt2.generate(
            ids,
            fits if max_new_tokens is None else max_new_tokens,
            num_beams=beams,
            length_penalty=length_penalty,
            logprobs=logprobs,
            window=window,
            **options,
        )
        made: list[list[Step]] = [[] for _ in texts]
        try:
            if json:
                for step in steps:
                    made[step.row].append(step)
            else:
                _show(steps, ["" if no_echo else text for text in texts], made)
        finally:
            if json:
                for text, row in zip(texts, made, strict=True):
                    print_json("generate", _record(text, row, seed, logprobs))
            elif logprobs:
                _print_logprobs(gpt2.tokenizer, made)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _read_prompts(prompts: list[str], files: list[Path], lines: bool) -> list[str]:
    if not prompts and not files:
        if sys.stdin.isatty():
            raise InputError('nothing to continue: give a PROMPT (as in gpt2np generate "Once upon a time"), or -i')
        files = [Path("-")]
    texts = list(prompts)
    for path in files:
        text = read_text(path)
        # The last line's end is the file's, not the text's: a story goes on after it, not in a new paragraph.
        text = text.removesuffix("\n").removesuffix("\r")
        texts += text.split("\n") if lines else [text]
    if "" in texts:
        raise InputError(f"prompt {texts.index('') + 1} of {len(texts)} is empty: there is nothing to continue")
    return texts


def _show(steps: Iterator[Step], prompts: list[str], made: list[list[Step]]) -> None:
    """Print prompts and continuations in order, each as soon as the ones before it have ended.

    Steps are put into `made` as they come; when the loop is interrupted, what has come is printed.
    """
    shown = [0] * len(prompts)  # steps of each row that have been printed
    current, last = 0, len(prompts) - 1

    def print_what_can_be(all_rows: bool = False) -> None:
        nonlocal current
        while True:
            _write("".join(step.text for step in made[current][shown[current] :]))
            shown[current] = len(made[current])
            ended = made[current] and made[current][-1].finish
            if current == last or not (ended or all_rows):
                return
            current += 1
            _write("\n\n")
            _write(prompts[current], style="bold")

    _write(prompts[0], style="bold")
    try:
        for step in steps:
            made[step.row].append(step)
            if step.row == current:
                print_what_can_be()
    finally:
        print_what_can_be(all_rows=True)
        _write("\n")


def _write(text: str, style: str = "") -> None:
    """Print a piece of text at once; on a terminal nothing in it is obeyed as a control sequence."""
    if not sys.stdout.isatty():
        sys.stdout.write(text)
    elif style:
        console().print(text, style=style, end="", soft_wrap=True)
    else:
        sys.stdout.write(escaped(text, keep="\n\t"))
    sys.stdout.flush()


def _record(prompt: str, steps: list[Step], seed: int, logprobs: int) -> dict[str, Any]:
    record = {
        "prompt": prompt,
        "text": "".join(step.text for step in steps),
        "token_ids": [step.token_id for step in steps],
        "logprobs": [step.logprob for step in steps],
        "finish": (steps[-1].finish if steps else None) or "interrupted",
        "seed": seed,
    }
    if logprobs:
        record["top_logprobs"] = [step.top for step in steps]
    return record


def _print_logprobs(tokenizer: tokenizers.Tokenizer, made: list[list[Step]]) -> None:
    def name(token_id: int) -> str:
        return repr(decode(tokenizer, [token_id]))

    for row in made:
        print_table(
            ("token", ">logprob", "most probable"),
            [
                (name(step.token_id), f"{step.logprob:.3f}", "  ".join(f"{name(i)} {p:.3f}" for i, p in step.top))
                for step in row
            ],
        )


def _talk(gpt2: GPT2, max_new_tokens: int | None, window: bool, special: bool, options: dict[str, Any]) -> None:
    """Read lines and continue the text that they and their continuations make, with its keys and values kept."""
    with suppress(ImportError):
        import readline  # noqa: F401 - gives input() editing and history
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are not UTF-8 are one line's error
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        note("Each line goes on from the text so far. /reset starts afresh, Ctrl-C stops a text, Ctrl-D leaves.")
    assert gpt2.tokenizer is not None
    cache, ids = gpt2.new_cache(), list[int]()
    while True:
        try:
            line = input("> " if at_terminal else "")
        except EOFError:
            _write("\n" if at_terminal else "")
            return
        if line.strip() == "/reset":
            cache, ids = gpt2.new_cache(), []
        elif line:
            try:
                added = encode_for(gpt2.config.vocab_size, gpt2.tokenizer, f"\n{line}" if ids else line, special)
                cache, ids = _turn(gpt2, cache, [*ids, *added], max_new_tokens, window, options)
            except Gpt2npError as error:
                note(f"{error} (/reset starts afresh)")
                cache.crop(min(cache.length, len(ids)))  # where it failed on the way


def _turn(
    gpt2: GPT2, cache: KVCache, ids: list[int], max_new_tokens: int | None, window: bool, options: dict[str, Any]
) -> tuple[KVCache, list[int]]:
    """Continue the text once and print it; the cache and the ids with the new tokens."""
    n_ctx = gpt2.config.n_ctx
    new = NEW_TOKENS if max_new_tokens is None else max_new_tokens
    if window and len(ids) + new - 1 > n_ctx:
        kept = min(n_ctx // 2, n_ctx - new + 1)
        if kept < 1:
            raise InputError(f"{new} new tokens leave no room for a prompt in a context of {n_ctx}")
        cache, ids = gpt2.new_cache(), ids[-kept:]
    elif max_new_tokens is None:
        new = min(new, max(n_ctx + 1 - len(ids), 1))
    try:
        for step in gpt2.generate(list(ids), new, cache=cache, **options):
            ids.append(step.token_id)
            _write(step.text)
    except KeyboardInterrupt:
        note("stopped")
    _write("\n")
    return cache, ids
