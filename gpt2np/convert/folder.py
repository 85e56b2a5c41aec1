"""A folder with a written model: model.onnx, its sample data and tokenizer; all of it, or nothing."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
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


def check_output(output: Path) -> None:
    """Raise InputError if the folder cannot take a model, before any work."""
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is not a folder")
    taken = [p.name for p in (*output.glob("model.onnx*"), *output.glob("test_data_set_*"))]
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
