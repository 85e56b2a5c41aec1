"""A folder with a written model, in any of FORMATS, and its tokenizer; all of it, or nothing."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..config import GPT2Config
from ..errors import InputError, UnsupportedModelError
from ..weights import WeightSource
from . import writer
from .builder import FIRST_MODERN_OPSET
from .checkpoint import write_checkpoint, write_gguf
from .sample_data import record

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "encoder.json",
    "vocab.bpe",
)


# What a model can be written as, and the files of each kind.
FORMATS = {
    "onnx": ("model.onnx*", "test_data_set_*"),
    "huggingface": ("model.safetensors*", "config.json"),
    "gguf": ("model.gguf",),
}
MODEL_FILES = ("model.onnx", "model.safetensors", "model.gguf")


class FileForm(NamedTuple):
    """What kind of file to write; see `writer.write_model`."""

    opset: int
    lm_head: bool
    with_past: bool
    external_data: bool
    max_file_size: int | None


def choose(
    opset: int | None, lm_head: bool, with_past: bool, external_data: bool, max_file_size: str | None
) -> FileForm:
    """FileForm from the command line, with their defaults filled in."""
    size = None if max_file_size is None else parse_size(max_file_size)
    return FileForm(
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


def check_output(output: Path, to: str = "onnx") -> None:
    """Raise InputError if the folder cannot take a model of that format, before any work."""
    if to not in FORMATS:
        raise InputError(f"a model is written as one of {', '.join(FORMATS)}, got {to!r}")
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is not a folder")
    taken = [p.name for pattern in FORMATS[to] for p in output.glob(pattern)]
    if taken:
        raise InputError(f"{output} already holds {taken[0]}: remove it, or name another folder")


def open_source(source: Path) -> tuple[GPT2Config, Mapping[str, WeightSource], Path]:
    """Configuration, weights and folder of a model in any format."""
    from .huggingface import read_checkpoint

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
    options: FileForm,
    copies: list[Path],
    note: Callable[[str], None] = lambda text: None,
) -> list[Path]:
    """Write model.onnx, its sample data and copies of other files; all of it, or nothing.

    `note` is told what is done otherwise than `options` say. Returns what was written.

    Raises
    ------
    UnsupportedModelError
        If the graphs that are written cannot hide later keys as this configuration does.
    """
    modern = options.opset >= FIRST_MODERN_OPSET
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

    def write(folder: Path) -> None:
        writer.write_model(folder / "model.onnx", config, weights, **arguments)
        record(folder, config, weights, options.lm_head, modern, options.with_past)

    return _fill(output, write, copies)


def write_for_others(
    output: Path, to: str, config: GPT2Config, weights: Mapping[str, WeightSource], source: Path
) -> list[Path]:
    """Write a Hugging Face checkpoint or a GGUF file, with the tokenizer of the folder `source`; or nothing.

    Returns what was written. Raises UnsupportedModelError if that format cannot say what the configuration asks for.
    """
    if to == "gguf":
        return _fill(output, lambda folder: write_gguf(folder, config, weights, source))
    return _fill(output, lambda folder: write_checkpoint(folder, config, weights), tokenizer_files(source))


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer that lie in a folder."""
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]


def _fill(output: Path, write: Callable[[Path], None], copies: Iterable[Path] = ()) -> list[Path]:
    """Have `write` write into a temporary folder, then move its files and the copies to where they belong."""
    output.mkdir(parents=True, exist_ok=True)
    with _or_nothing(output), tempfile.TemporaryDirectory(prefix=".converting-", dir=output) as folder:
        temporary = Path(folder)
        write(temporary)
        for path in copies:
            if not (output / path.name).exists():
                shutil.copyfile(path, temporary / path.name)
        files = sorted(p.name for p in temporary.iterdir())
        files.sort(key=lambda name: name in MODEL_FILES)  # last: when it is there, everything is
        for name in files:
            os.replace(temporary / name, output / name)
    return [output / name for name in sorted(files)]


@contextmanager
def _or_nothing(output: Path) -> Iterator[None]:
    """Leave no empty folder behind when the work inside fails."""
    try:
        yield
    except BaseException:
        with suppress(OSError):  # it was there before, with something in it
            output.rmdir()
        raise
