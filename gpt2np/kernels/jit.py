"""How functions are compiled, and where compiled code is kept."""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
# (numba infers the types of compiled functions from their arguments)

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba.core import config as numba_config
from numba.core.caching import FunctionCache, IndexDataCacheFile

config: Any = numba_config  # its fields are made at run time, from NUMBA_... in the environment

FOLDER = Path(__file__).parent
_said: list[str] = []  # why compiled code cannot be kept, once it was said
KNOWN_NUMBA = (0, 68)  # the newest version of which it is known that cached code runs without `CPUContext.refresh`


@functools.cache
def sources_stamp(folder: Path) -> str:
    """A hash of the Python files in a folder."""
    total = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()


class CodeFiles(IndexDataCacheFile):
    """numba's files of one function's compiled code, where each code has a file of its own name.

    numba numbers them, anew for new sources, and writes the index first: code of older sources, or for other types,
    is what a process may then find under a number while another one writes, or ever after, if that one is killed.
    """

    def save(self, key: Any, data: Any) -> None:
        codes = self._load_index()
        name = f"{Path(self._index_name).stem}.{self._digest(key)}.nbc"
        if not codes:  # what is there belongs to older sources
            for path in Path(self._cache_path).glob(f"{Path(self._index_name).stem}.*.nbc"):
                path.unlink(missing_ok=True)
        self._save_data(name, data)
        self._save_index(self._load_index() | {key: name})

    def _digest(self, key: Any) -> str:
        return hashlib.sha256(repr((self._version, self._source_stamp, key)).encode()).hexdigest()[:24]


class DiskCache(FunctionCache):
    """numba's cache of compiled code, which also sees changes of the other files here and never fails a call.

    The folder is numba's choice: NUMBA_CACHE_DIR, else __pycache__ beside the function's file, else the user's own
    cache.
    """

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        # compiled code holds what it calls, and that may stand in another file of this folder
        stamp = self._cache_file._source_stamp, sources_stamp(FOLDER)
        self._cache_file = CodeFiles(self._cache_path, self._impl.filename_base, stamp)

    def load_overload(self, signature: Any, context: Any) -> Any:
        try:
            if numba.version_info.short > KNOWN_NUMBA:
                return super().load_overload(signature, context)
            # numba's own method first prepares it to compile, which takes 0.2 s and 45 MB
            return self._load_overload(signature, context)
        except Exception:  # a damaged file, of which pickle may raise anything: compile anew
            return None

    def save_overload(self, signature: Any, data: Any) -> None:
        try:
            try:
                super().save_overload(signature, data)
            except OSError:
                raise
            except Exception:  # a damaged index: begin it anew
                self._cache_file.flush()
                super().save_overload(signature, data)
        except Exception as error:  # a full or write-protected disk
            say_not_kept(f"cannot write to {self.cache_path}: {getattr(error, 'strerror', None) or error}")

    def holds(self, machine: Any) -> bool:
        """Whether there is compiled code for this kind of machine."""
        try:
            return any(key[1] == machine for key in self._cache_file._load_index())
        except Exception:
            return False


def say_not_kept(why: str) -> None:
    """Warn, once in a process, that compiled code cannot be kept: each process will compile it anew."""
    if not _said:
        _said.append(why)
        warnings.warn(
            "compiled kernels cannot be kept, so every process compiles them anew, which takes half a minute or so: "
            f"{why}. Set NUMBA_CACHE_DIR to a folder that can be written to, and fill it once with: gpt2np warmup",
            RuntimeWarning,
            stacklevel=2,
        )


def jit(parallel: bool = False, inline: Any = "never") -> Callable[[Any], Any]:
    """numba.njit with the settings that all kernels share; compiled code is kept on disk where that is possible.

    No kernel makes an array or keeps one, so none counts who holds them (`_nrt`): each slice would be counted twice,
    by an instruction for which threads wait for each other.
    """
    options = {"nogil": True, "parallel": parallel, "error_model": "numpy", "inline": inline, "_nrt": False}

    def decorate(function: Any) -> Any:
        kernel: Any = numba.njit(**options)(function)
        if not config.DISABLE_JIT:
            try:
                kernel._cache = DiskCache(function)
            except RuntimeError:
                say_not_kept("there is no folder to write to")
        return kernel

    return decorate
