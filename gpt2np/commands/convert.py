"""`gpt2np convert`: any GPT-2 that gpt2np reads -> a folder with model.onnx and recorded sample data."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from ..errors import InputError, UnsupportedModelError
from ..onnx.read.datasets import save_set

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ..config import GPT2Config
    from ..weights import Array, BlockWeights, WeightSource

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "encoder.json",
    "vocab.bpe",
)


class Options(NamedTuple):
    """What kind of file to write; see `onnx.writer.write_model`."""

    opset: int
    lm_head: bool
    with_past: bool
    external_data: bool
    max_file_size: int | None


def convert(
    source: Annotated[
        Path, typer.Argument(help="A Hugging Face folder, a .safetensors file beside its config.json, or an ONNX file.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write; it must not hold a model yet.")],
    lm_head: Annotated[bool, typer.Option("--lm-head", help="Put out logits, not the last hidden state.")] = False,
    with_past: Annotated[
        bool, typer.Option("--with-past", help="Take and return keys and values (implies --lm-head, opset 17).")
    ] = False,
    external_data: Annotated[
        bool, typer.Option("--external-data", help="Keep the weights in files beside model.onnx; chosen above 2 GB.")
    ] = False,
    max_file_size: Annotated[
        str | None, typer.Option(help="Spread external data over files of at most this size, such as 2GB.")
    ] = None,
    opset: Annotated[
        int | None, typer.Option(help="10 to 16: the zoo's graph (default 10); 17 and newer: a modern one.")
    ] = None,
) -> None:
    """Write a GPT-2 as model.onnx, in the ONNX Model Zoo's form or a modern one, with recorded sample data.

    The sample data (test_data_set_0 ...) is computed in float64 by the textbook. Tokenizer files beside the
    source are copied. Weights become float32. Where a query sees padding alone the result is that of the written
    graph, not of the source's: graphs differ there.
    """
    options = choose(opset, lm_head, with_past, external_data, max_file_size)
    check_output(output)
    config, weights, folder = open_source(source)
    tokenizer = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    write_folder(output, config, weights, options, tokenizer)


def choose(
    opset: int | None, lm_head: bool, with_past: bool, external_data: bool, max_file_size: str | None
) -> Options:
    """Options from the command line, with their defaults filled in."""
    size = None if max_file_size is None else parse_size(max_file_size)
    return Options(
        opset=(17 if with_past else 10) if opset is None else opset,
        lm_head=lm_head or with_past,
        with_past=with_past,
        external_data=external_data or size is not None,
        max_file_size=size,
    )


def parse_size(text: str) -> int:
    """Bytes from "2GB", "500 MB" or "1000000"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip().upper())
    if not match or not float(match[1]):
        raise InputError(f"a size such as 2GB or 500MB is expected, got {text!r}")
    return int(float(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[match[2]])


def check_output(output: Path) -> None:
    """Raise InputError if the folder cannot take a model, before any work."""
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is not a folder")
    taken = [p.name for p in (*output.glob("model.onnx*"), *output.glob("test_data_set_*"))]
    if taken:
        raise InputError(f"{output} already holds {taken[0]}: remove it, or name another folder")


def open_source(source: Path) -> tuple[GPT2Config, Mapping[str, WeightSource], Path]:
    """Configuration, weights and folder of a model in any format."""
    from ..convert.huggingface import read_checkpoint

    names = {p.suffix for p in source.iterdir()} if source.is_dir() else {source.suffix}
    if ".onnx" not in names and (source.is_dir() or names & {".safetensors", ".json"}):
        return (*read_checkpoint(source), source if source.is_dir() else source.parent)
    from ..onnx.read.reader import open_model
    from ..onnx.recognise import recognise

    file = open_model(source)
    recognised = recognise(file)
    return recognised.config, recognised.sources, file.path.parent


def write_folder(
    output: Path,
    config: GPT2Config,
    weights: Mapping[str, WeightSource],
    options: Options,
    copies: list[Path],
) -> None:
    """Write model.onnx, its sample data and copies of other files; all of it, or nothing."""
    import numpy as np

    from ..onnx import writer
    from ._terminal import console, note

    modern = options.opset >= writer.FIRST_MODERN_OPSET
    # What a sound GPT-2 masks with makes no difference to its outputs, but for queries that see padding alone: take
    # what each kind of file customarily has.
    if config.mask.value > -1e3:
        raise UnsupportedModelError(f"{config.mask.describe()}, which does not hide them")
    customary = float(np.finfo(np.float32).min) if modern else -1e4
    config = replace(config, mask=replace(config.mask, value=customary))
    arguments = options._asdict()
    graph = writer.build_graph(
        config, weights, opset=options.opset, lm_head=options.lm_head, with_past=options.with_past
    )
    if not options.external_data and writer.graph_nbytes(graph) > writer.MAX_SINGLE_FILE:
        note(f"{writer.graph_nbytes(graph) / 1e9:.1f} GB do not fit into one ONNX file: writing external data")
        arguments["external_data"] = True

    output.mkdir(parents=True, exist_ok=True)
    with _or_nothing(output), tempfile.TemporaryDirectory(prefix=".converting-", dir=output) as folder:
        temporary = Path(folder)
        writer.write_model(temporary / "model.onnx", config, weights, **arguments)
        record(temporary, config, weights, options.lm_head, modern, options.with_past)
        for path in copies:
            if not (output / path.name).exists():
                shutil.copyfile(path, temporary / path.name)
        files = sorted(p.name for p in temporary.iterdir())
        files.sort(key=lambda name: name == "model.onnx")  # last: when it is there, everything is
        for name in files:
            os.replace(temporary / name, output / name)
    out = console()
    for name in sorted(files):
        if (output / name).is_file():
            out.print(f"{(output / name).stat().st_size:>14,}  {output / name}")
    out.print(f"Check it: gpt2np parity {output}")


@contextmanager
def _or_nothing(output: Path) -> Iterator[None]:
    """Leave no empty folder behind when the work inside fails."""
    try:
        yield
    except BaseException:
        with suppress(OSError):  # it was there before, with something in it
            output.rmdir()
        raise


# --- sample data -----------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """One call of the model, in the textbook's terms."""

    input_ids: Array  # (B, P + T)
    real: Array  # (B, P + T), 1 for tokens, 0 for padding
    past: int  # P, positions that the file takes as past keys and values


def samples(vocab_size: int, n_ctx: int, modern: bool, with_past: bool) -> list[Sample]:
    """Random calls that fit the model: several lengths, batches, and padding where the file knows it."""
    import numpy as np

    rng = np.random.default_rng(7)
    shapes = [(1, 8, 0), (3, 5, 0), (1, min(64, n_ctx), 0), (1, 1, 0)]  # (B, P + T, P)
    if with_past:
        shapes = [(1, 8, 0), (2, 4, 3), (2, 7, 4)]
    made = []
    for B, S, P in shapes:
        S, P = min(S, n_ctx), min(P, n_ctx - 1)
        made.append(Sample(rng.integers(0, vocab_size, (B, S)), np.ones((B, S), np.int64), P))
    if modern:
        last = made[-1] if with_past else made[1]
        if with_past and last.past > 2:
            last.real[0, :2] = 0  # on the left, inside the past
        elif not with_past and last.real.shape[1] > 2:
            last.real[0, -2:] = 0  # on the right
    return made


def record(
    folder: Path,
    config: GPT2Config,
    weights: Mapping[str, WeightSource],
    lm_head: bool,
    modern: bool,
    with_past: bool,
) -> None:
    """Write test_data_set_0 ... with the textbook's outputs, computed in float64 and stored in float32."""
    import numpy as np

    calls = samples(config.vocab_size, config.n_ctx, modern, with_past)
    results = run_textbook(config, weights, calls, lm_head)
    for i, (call, (output, caches)) in enumerate(zip(calls, results, strict=True)):
        P = call.past
        inputs: dict[str, Array] = {}
        outputs: dict[str, Array] = {}
        if not modern:
            inputs["input1"] = call.input_ids[None]  # (1, B, T)
            outputs["output1"] = output[None]
            outputs |= {f"output{layer + 2}": cache for layer, cache in enumerate(caches)}
        else:
            inputs["input_ids"] = call.input_ids[:, P:]
            inputs["attention_mask"] = call.real
            inputs["position_ids"] = positions(call)[:, P:]
            outputs["logits" if lm_head else "last_hidden_state"] = output[:, P:]
            if with_past:
                for layer, cache in enumerate(caches):
                    for part, name in enumerate(("key", "value")):
                        inputs[f"past_key_values.{layer}.{name}"] = cache[part, :, :, :P].astype(np.float32)
                        outputs[f"present.{layer}.{name}"] = cache[part]
        save_set(folder / f"test_data_set_{i}", inputs, outputs)


def positions(call: Sample) -> Array:
    """Row of wpe for each token: padding on the left does not count."""
    import numpy as np

    places: Array = np.maximum(call.real.cumsum(axis=1) - 1, 0)
    return places


def run_textbook(
    config: GPT2Config, weights: Mapping[str, WeightSource], calls: list[Sample], lm_head: bool
) -> list[tuple[Array, list[Array]]]:
    """`reference.transformer` in float64 for several calls at once, with only one layer's weights in memory.

    Returns the hidden states (B, T, C) or logits (B, T, V) and the caches (2, B, H, T, D) of each call.
    """
    import numpy as np

    from .. import reference
    from ..masks import Mask

    def read(name: str) -> Array:
        return weights[name].load().astype(np.float64)

    streams, masks = [], []
    wte, wpe = weights["wte.weight"].load(), weights["wpe.weight"].load()
    for call in calls:
        T = call.input_ids.shape[1]
        rows = positions(call) + config.position_offset
        streams.append(wte[call.input_ids].astype(np.float64) + wpe[rows].astype(np.float64))  # reference.embed
        allowed = np.tri(T, T, config.mask.shift, bool) & call.real[:, None, None].astype(bool)  # (B, 1, T, T)
        # finite, as in the files: a query that sees padding alone averages it, and no NaN comes up
        masks.append(Mask(np.where(allowed, 0.0, float(np.finfo(np.float32).min))))
    del wte, wpe
    caches: list[list[Array]] = [[] for _ in calls]
    for i in range(config.n_layer):
        layer = block_weights(config, i, read)
        for k, (x, mask) in enumerate(zip(streams, masks, strict=True)):
            B, T, _ = x.shape
            cache = np.zeros((2, B, config.n_head, T, config.head_size))
            streams[k] = reference.block(x, layer, cache, 0, mask, reference.no_tap, f"h.{i}")
            caches[k].append(cache.astype(np.float32))
    ln_f = read("ln_f.weight"), read("ln_f.bias"), config.epsilon("ln_f")
    streams = [reference.layer_norm(x, *ln_f) for x in streams]
    if lm_head:
        table = read("wte.weight" if config.tied else "lm_head.weight")
        bias = read("lm_head.bias") if "lm_head.bias" in weights else np.zeros(0)
        streams = [reference.logits(x, table, bias) for x in streams]
    return [(x.astype(np.float32), cache) for x, cache in zip(streams, caches, strict=True)]


def block_weights(config: GPT2Config, i: int, read: Callable[[str], Array]) -> BlockWeights:
    """One layer's part of `weights.assemble`."""
    from ..weights import MLP, Attention, BlockWeights, LayerNorm, Linear

    def layer_norm(name: str) -> LayerNorm:
        return LayerNorm(read(f"h.{i}.{name}.weight"), read(f"h.{i}.{name}.bias"), config.epsilon(f"h.{i}.{name}"))

    def linear(name: str) -> Linear:
        return Linear(read(f"h.{i}.{name}.weight"), read(f"h.{i}.{name}.bias"))

    return BlockWeights(
        layer_norm("ln_1"),
        Attention(linear("attn.c_attn"), linear("attn.c_proj"), config.n_head, config.layer_scale(i)),
        layer_norm("ln_2"),
        MLP(linear("mlp.c_fc"), linear("mlp.c_proj"), config.layer_activation(i)),
    )
