"""Compiled code: found on disk, or compiled and kept there. Only who compiles loads numba, which takes 0.4 s.

A file holds what LLVM made of one kernel for one kind of arguments, with everything that it calls. Its name tells of
which kernel, sources, machine and arguments, so no process finds code of others; it is written whole, or not at all.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import sys
import threading
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite
import llvmlite.binding as llvm

from ..files import replacing
from .machine import description

_spec = importlib.util.find_spec("numba")
if _spec is None or _spec.origin is None:
    raise ModuleNotFoundError("No module named 'numba'", name="numba")
NUMBA, SOURCES = Path(_spec.origin), Path(__file__).parent
_said: list[str] = []  # why compiled code cannot be kept, once it was said
_lock = threading.RLock()  # numba compiles one at a time
_loaded: dict[tuple[str, Any], Code] = {}
_engines: list[Any] = []  # which keep the code of _loaded in memory

if hasattr(os, "register_at_fork"):  # a child would wait for ever for a thread that was compiling just then
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


class Code(NamedTuple):
    """Compiled code of a kernel, see `entries`."""

    run: Any  # run(unused, unused, worker, record); 0 if all is well
    address: int


def find(name: str, kinds: Any) -> Code:
    """Code of a kernel ("loops.append_range") for arguments of these kinds (`calls.kind_of`)."""
    code = _loaded.get((name, kinds))
    if code is None:
        with _lock:
            code = _loaded[name, kinds] = _loaded.get((name, kinds)) or _from_disk(name, kinds) or _new(name, kinds)
    return code


def on_disk(name: str) -> bool:
    """Whether there is code of a kernel for this machine."""
    return any(any(folder.glob(f"{_file_name(name)}-*.o")) for folder in folders())


def is_loaded(name: str) -> bool:
    """Whether code of a kernel was used in this process."""
    return any(known == name for known, _ in _loaded)


def folders() -> list[Path]:
    """Where code may be, what comes first: NUMBA_CACHE_DIR alone, or __pycache__ here and the user's own cache."""
    own = f"gpt2np-{_digest(str(SOURCES))}"  # of this installation
    if os.environ.get("NUMBA_CACHE_DIR"):
        return [Path(os.environ["NUMBA_CACHE_DIR"]) / own]
    found = [SOURCES / "__pycache__"]
    caches = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or "~/.cache"
    with contextlib.suppress(RuntimeError):  # a user without a home
        found.append(Path(caches).expanduser() / own)
    return found


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@functools.cache
def versions(folder: Path) -> str:
    """A digest of what code is made from: the Python files of a folder, and the versions of numba, LLVM and Python."""
    files = *sorted(folder.glob("*.py")), NUMBA.with_name("_version.py")
    contents = [(path.name, path.read_bytes()) for path in files]
    return _digest(contents, llvmlite.__version__, sys.implementation.cache_tag)


def _file_name(name: str) -> str:
    return f"{name}-{versions(SOURCES)}-{_digest(description())}"


def _from_disk(name: str, kinds: Any) -> Code | None:
    for folder in folders():
        try:
            found = (folder / f"{_file_name(name)}-{_digest(kinds)}.o").read_bytes()
            check, symbol, machine_code = found.split(b"\n", 2)
            if hashlib.sha256(symbol + machine_code).hexdigest().encode() == check:
                return _load(symbol.decode(), machine_code)
        except Exception:  # no file, or a damaged one: compile anew
            continue
    return None


def _new(name: str, kinds: Any) -> Code:
    from .entries import compile_entry

    symbol, machine_code = compile_entry(name, kinds)
    _keep(name, kinds, symbol.encode(), machine_code)
    return _load(symbol, machine_code)


def _keep(name: str, kinds: Any, symbol: bytes, machine_code: bytes) -> None:
    check = hashlib.sha256(symbol + machine_code).hexdigest().encode()
    why: object = "there is no folder to write to"
    for folder in folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(folder / f"{_file_name(name)}-{_digest(kinds)}.o") as draft:
                draft.write_bytes(b"\n".join([check, symbol, machine_code]))
            for path in folder.glob(f"{name}-*.o"):
                if not path.name.startswith(f"{name}-{versions(SOURCES)}-"):
                    path.unlink(missing_ok=True)  # of older sources
            return
        except OSError as error:
            why = f"cannot write to {folder}: {error.strerror or error}"
    if not _said:
        _said.append(str(why))
        warnings.warn(
            "compiled kernels cannot be kept, so every process compiles them anew, which takes half a minute or so: "
            f"{why}. Set NUMBA_CACHE_DIR to a folder that can be written to, and fill it once with: gpt2np warmup",
            RuntimeWarning,
            stacklevel=2,
        )


def _load(symbol: str, machine_code: bytes) -> Code:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    # as numba loads what it finds on disk, which works on every system that it knows
    target = llvm.Target.from_default_triple().create_target_machine(codemodel="jitdefault", jit=True)
    module = llvm.parse_assembly("")
    module.triple, module.data_layout = target.triple, str(target.target_data)
    engine = llvm.create_mcjit_compiler(module, target)
    engine.add_object_file(llvm.ObjectFileRef.from_data(machine_code))
    engine.finalize_object()
    address = engine.get_function_address(symbol)
    if not address:
        raise LookupError(symbol)
    _engines.append(engine)
    pointer = ctypes.c_void_p
    # the first two are where numba would put a result and an exception
    kind = ctypes.CFUNCTYPE(ctypes.c_int32, pointer, pointer, ctypes.c_ssize_t, pointer)
    return Code(kind(address), address)
