#!/bin/sh
# The tests as other machines would run them: tests/machines/run.sh MACHINE ... (default: all of x86-64).
#   x86-64-v3 haswell   the kernels compiled for these, with AVX2 and fused multiply-add
#   no-fma              the kernels compiled for the oldest x86-64, with SSE2 alone
#   one-core            on one core
#   one-thread          with one thread for the kernels
#   many-threads        with four times as many threads as there are cores
#   lowest newest       with the lowest and the newest versions of what pyproject.toml asks for, in a new environment
# PYTHON chooses the interpreter, TESTS what is run (default: tests/kernels and the tests of whole models).
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")/../.." && pwd)
cd "$here"
python=${PYTHON:-python3}
tests=${TESTS:-tests/kernels tests/test_model.py tests/test_masks.py tests/test_fingerprint.py tests/test_reference.py}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# run [VARIABLE=value ...] COMMAND ...: the tests by that Python, with compiled code in a folder of its own
run() {
    # shellcheck disable=SC2086  # several words are meant
    env NUMBA_CACHE_DIR="$scratch/cache" PYTHONPATH="$here" "$@" -m pytest -q $tests
}

# environment NAME: a new one; lowest puts the bounds of pyproject.toml in the place of "or newer"
environment() {
    "$python" -m venv "$scratch/$1"
    "$python" - "$1" >"$scratch/wanted.txt" <<'PYTHON'
import re
import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"]
wanted = project["dependencies"] + extras["test"]
for line in wanted:  # grows: an extra may name others of this project
    if own := re.fullmatch(r"gpt2np\[(.*)\]", line):
        wanted += [each for extra in own[1].split(",") for each in extras[extra]]
    else:
        print(re.sub(r">=([\w.]+).*", r"==\1", line) if sys.argv[1] == "lowest" else line)
PYTHON
    "$scratch/$1/bin/python" -m pip install -q -r "$scratch/wanted.txt"
    "$scratch/$1/bin/python" -m pip install -q --no-deps -e .  # its version, which Dask's newer releases look up there
}

[ $# -gt 0 ] || set -- x86-64-v3 haswell no-fma one-core one-thread many-threads
for machine in "$@"; do
    echo "== $machine"
    case $machine in
    x86-64-v3 | haswell) run NUMBA_CPU_NAME="$machine" NUMBA_CPU_FEATURES=+avx2,+fma "$python" ;;
    no-fma) run NUMBA_CPU_NAME=x86-64 NUMBA_CPU_FEATURES=+sse2 "$python" ;;
    one-core) run taskset -c 0 "$python" ;;
    one-thread) run NUMBA_NUM_THREADS=1 "$python" ;;
    many-threads) run NUMBA_NUM_THREADS=$(($(nproc) * 4)) "$python" ;;
    lowest | newest)
        environment "$machine"
        run "$scratch/$machine/bin/python"
        ;;
    *)
        echo "$machine: no such machine; see the first lines of $0" >&2
        exit 2
        ;;
    esac
done
