"""The published hashes of the embedded model in float32, and a command that compares this machine's with them.

    python tests/support/published.py

It needs NumPy, numba and onnx alone. The exit code is 1 if a hash differs, as without fused multiply-add all do.
"""

import hashlib
import platform
import sys

import gpt2np
from gpt2np import fingerprint
from gpt2np.generate import generate

# What `gpt2np fingerprint` says of weights/mini, by the rounding of its matrices; docs/scale.md names the machines.
MINI = {
    None: "96bf90efba7d8f304c9b49483974c2d04cd424100ab681836375f4bc0b0bc113",
    "int8": "c4a1d181cd9c9fbc36b13ce78de455b7bd611878673d24da65cb66834a6f77db",
    "int4": "972d742e0b5c5e1bff4ec052ce358a6d75084ca4596b4804c0bf03e2061affa1",
}
DRAWS = "b88b6d6ac52a5fc69176d7fe476b3cab4e1271a4ca7d06c471f2a8dcefed01b5"  # see `draws`


def draws(model):
    """SHA-256 of tokens and log-probabilities that are drawn, drawn from few, and found by beams."""
    chosen = {"temperature": 1.0, "logprobs": 3}, {"temperature": 0.8, "top_k": 40, "top_p": 0.9}, {"num_beams": 3}
    text = fingerprint.texts(model)[0].tolist()
    steps = [list(generate(model, text, 40, seed=5, length_penalty=0.7, **options)) for options in chosen]
    return hashlib.sha256(repr([step[1:2] + step[3:] for way in steps for step in way]).encode()).hexdigest()


def main():
    print(platform.machine(), platform.python_version(), "NumPy", sys.modules["numpy"].__version__)
    different = 0
    for weights, expected in MINI.items():
        for found in fingerprint.fingerprints(gpt2np.load(weights=weights)):
            different += found.sha256 != expected
            print(found.sha256 == expected, found.sha256, weights or "float32", found.way, flush=True)
    found = draws(gpt2np.load())
    print(found == DRAWS, found, "draws and beams")
    return different > 0 or found != DRAWS


if __name__ == "__main__":
    sys.exit(main())
