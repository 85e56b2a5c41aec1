"""With NumPy and onnx alone gpt2np imports, loads, traces and generates; what needs more says so."""

import subprocess
import sys

import pytest

import gpt2np

BLOCK = """
import sys
for name in ("numba", "llvmlite", "onnxruntime", "tokenizers", "rich", "typer", "httpx2", "filelock", "altair"):
    sys.modules[name] = None
import gpt2np
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", BLOCK + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_load_trace_and_generate_from_ids_and_text():
    code = """
model = gpt2np.load(engine="numpy")
ids = gpt2np.tokenizer.encode(model.tokenizer, "Once upon a time")
print(ids)
print(model.trace([ids])["logits"].argmax(axis=-1)[0].tolist())
print("".join(step.text for step in model.generate("Once upon a time", max_new_tokens=6)))
print([step.token_id for step in model.generate(ids, max_new_tokens=6)])
print([step.token_id for step in model.generate(ids, max_new_tokens=6, temperature=0.8, top_p=0.9, seed=3)])
print(gpt2np.InferenceSession(model.path, engine="numpy").run(None, {"input1": [[ids]]})[0].shape)
"""
    model = gpt2np.load(engine="numpy")
    ids = gpt2np.tokenizer.encode(model.tokenizer, "Once upon a time")
    expected = [
        ids,
        model.trace([ids])["logits"].argmax(axis=-1)[0].tolist(),
        "".join(step.text for step in model.generate("Once upon a time", max_new_tokens=6)),
        [step.token_id for step in model.generate(ids, max_new_tokens=6)],
        [step.token_id for step in model.generate(ids, max_new_tokens=6, temperature=0.8, top_p=0.9, seed=3)],
        (1, 1, len(ids), model.config.n_embd),
    ]
    assert run(code).splitlines() == [str(value) for value in expected]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("gpt2np.load()", ["numba", "pip install numba", 'engine="numpy"']),
        ("gpt2np.InferenceSession(gpt2np.load(engine='numpy').path)", ["numba", 'engine="numpy"']),
        ("gpt2np.set_num_threads(2)", ["numba"]),
        ("gpt2np.kernels", ["numba"]),
        ("import gpt2np.pictures", ["pip install altair vl-convert-python"]),
        ("sys.modules.update(onnx=None); gpt2np.load(engine='numpy')", ["onnx", "pip install onnx"]),
    ],
)
def test_what_needs_more_says_so(asked: str, words: list[str]):
    out = run(f"""
try:
    {asked}
except gpt2np.Gpt2npError as error:
    print(type(error).__name__, error)
""")
    assert out.startswith("MissingPackageError")
    for word in words:
        assert word in out


def test_parity_lists_a_party_that_cannot_run():
    code = """
from gpt2np.parity import capture, run
report = run.parity(capture.Options(gpt2np.load(engine="numpy").path, engine="numpy"))
print(report.exit_code, "needs onnxruntime, which is not installed: pip install onnxruntime" in str(report))
"""
    assert run(code) == "1 True\n"
