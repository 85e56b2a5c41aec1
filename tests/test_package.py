"""The package as a whole: what it exports, how light it is, what the command line does with errors."""

import os
import platform
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import gpt2np


def test_every_public_name_is_there():
    public = {
        *("load", "GPT2", "Output", "GPT2Config", "GPT2Weights", "KVCache", "InferenceSession"),
        *("set_num_threads", "get_num_threads", "Gpt2npError"),
    }
    assert set(gpt2np.__all__) == public
    for name in public:
        assert getattr(gpt2np, name) is not None
    assert gpt2np.tokenizer.load
    assert not hasattr(gpt2np, "no_such_name")


def test_importing_is_light():
    heavy = {
        "numba",
        "llvmlite",
        "onnx",
        "onnxruntime",
        "tokenizers",
        "altair",
        "rich",
        "typer",
        "httpx2",
        "google.protobuf",
    }
    code = f"import sys, gpt2np; print(sorted({heavy!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has rules of its own")
def test_the_memory_of_freed_arrays_is_used_again():
    code = """
        import resource
        import numpy as np
        from gpt2np.arrays import keep_freed_memory

        keep_freed_memory()
        faults = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
        for _ in range(100):
            np.ones(1_000_000, np.uint8)
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        print(faults[-1] - faults[1])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100  # 24,000 where the system clears every page of every array


def test_the_command_line_is_light_and_lists_every_command():
    heavy = {"numba", "llvmlite", "onnx", "onnxruntime", "tokenizers", "altair", "httpx2"}
    code = f"import sys, gpt2np.cli; print(sorted({heavy!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    done = command("--help")
    assert done.returncode == 0
    for name in (
        "parity",
        "diff",
        "trace",
        "info",
        "generate",
        "score",
        "embed",
        "look",
        "exercises",
        "convert",
        "synth",
        "fetch",
        "verify",
    ):
        assert name in done.stdout


def test_errors_are_one_line_and_exit_code_2():
    done = command("info", "nowhere.onnx")
    assert (done.returncode, done.stdout) == (2, "")
    assert "nowhere.onnx" in done.stderr
    assert "Traceback" not in done.stderr
    assert command("no-such-command").returncode == 2


def test_the_version_is_the_same_everywhere():
    assert command("--version").stdout.split() == ["gpt2np", gpt2np.__version__]


@pytest.mark.skipif(sys.platform == "win32", reason="no such pipes")
def test_a_pipe_that_is_closed_early_is_no_failed_comparison():
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-m", "gpt2np", "--help"], stdout=write_end, stderr=subprocess.PIPE, check=False
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (141, b"")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gpt2np", *arguments], capture_output=True, text=True, check=False, cwd=Path.home()
    )
