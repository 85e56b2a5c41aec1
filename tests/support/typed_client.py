"""A caller's code, checked with the package by mypy --strict: an `ignore` is a mistake that it has to see.

mypy fails where one is not needed, so each of them shows that misspelt names and options are caught.
"""

from __future__ import annotations

import numpy as np

import gpt2np
from gpt2np.testing import assert_parity


def use() -> str:
    """What a porter writes."""
    model = gpt2np.load(engine="numpy")
    cache = model.new_cache(batch_size=1)
    hidden: np.ndarray = model([[1, 2, 3]], cache=cache, logits=False).last_hidden_state
    taps = model.trace([[1, 2, 3]], logits="last")
    assert_parity({"ln_f": hidden}, {"ln_f": taps["ln_f"]}, budget=(1e-3, 1e-5))
    assert model.path is not None
    session = gpt2np.InferenceSession(model.path, engine="numpy")
    names = [port.name for port in session.get_inputs()]
    session.run(None, {names[0]: np.array([[[1, 2, 3]]])})
    return "".join(step.text for step in model.generate("Once", 2, temperature=0.5, top_k=5, seed=1))


def misuse(model: gpt2np.GPT2) -> None:
    """What a porter misspells."""
    gpt2np.loads()  # type: ignore[attr-defined]
    gpt2np.load(engines="numpy")  # type: ignore[call-arg]
    model.trace([1], attention_masks=None)  # type: ignore[call-arg]
    model.generate("Once", temperatures=0.5)  # type: ignore[call-arg]
    model.generate("Once", temperature="hot")  # type: ignore[arg-type]
    assert_parity(1, 1, budgets="zoo")  # type: ignore[call-arg]
