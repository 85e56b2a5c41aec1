#!/bin/sh
# The published hashes of the embedded model on an emulated arm64 machine: tests/machines/arm64.sh [FOLDER]
# FOLDER (default: a new one in /tmp) keeps an arm64 Python from Debian's packages, and its wheels. Needs a Debian
# with root for apt-get and dpkg, and half an hour, since the kernels are compiled under emulation.
set -eu
project=$(CDPATH= cd -- "$(dirname -- "$0")/../.." && pwd)
folder=${1:-$(mktemp -d)}
mkdir -p "$folder"
cd "$folder"
if ! command -v qemu-aarch64-static >/dev/null || ! command -v debootstrap >/dev/null; then
    apt-get update -qq
    apt-get install -y -qq qemu-user-static debootstrap
fi
if [ ! -x root/usr/bin/python3.11 ]; then
    debootstrap --foreign --arch=arm64 --variant=minbase \
        --include=python3.11,python3,libgomp1,libstdc++6,zlib1g,libexpat1,libssl3,libffi8,liblzma5,libbz2-1.0 bookworm root
    for package in root/var/cache/apt/archives/*.deb; do dpkg -x "$package" root; done
fi
if [ ! -d site/numba ]; then
    platforms=$(for p in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014; do echo "--platform ${p}_aarch64"; done)
    # shellcheck disable=SC2086  # several words are meant
    python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.11 --implementation cp --abi cp311 \
        $platforms -d wheels numpy numba llvmlite onnx protobuf ml_dtypes typing_extensions
    mkdir -p site
    for wheel in wheels/*.whl; do python3 -m zipfile -e "$wheel" site; done
fi
NUMBA_CACHE_DIR=$PWD/cache NUMBA_NUM_THREADS=2 PYTHONPATH=$PWD/site:$project \
    qemu-aarch64-static -cpu max -L root root/usr/bin/python3.11 "$project/tests/support/published.py"
