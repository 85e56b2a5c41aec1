"""`gpt2np generate`, `score` and `embed` as they are typed."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import gpt2np
from gpt2np.commands.embed import embed
from gpt2np.commands.generate import generate
from gpt2np.commands.score import score
from gpt2np.errors import Gpt2npError, InputError, TokenizerError
from gpt2np.score import TextScoring
from gpt2np.tokenizer import encode
from toy_model import TOY, toy_model, write_toy

app = typer.Typer()
for command in (generate, score, embed):
    app.command(command.__name__)(command)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def run(toy):
    def run(*arguments, stdin=None, code=0, model=toy):
        result = CliRunner().invoke(app, [*arguments, "-m", str(model), "--engine", "numpy"], input=stdin)
        if isinstance(result.exception, Gpt2npError):
            raise result.exception
        assert result.exit_code == code, result.output
        return result

    return run


def continuation(text, n, **options):
    return "".join(step.text for step in toy_model().generate(text, n, **options))


# -------------------------------------------------------------------------------------------- generate


def test_the_text_goes_on(run):
    expected = continuation("Once upon", 12)
    assert run("generate", "Once upon", "-n", "12").stdout == f"Once upon{expected}\n"
    assert run("generate", "Once upon", "-n", "12", "--no-echo").stdout == f"{expected}\n"


def test_by_default_it_goes_on_as_long_as_fits(run):
    room = 60 + 1 - len(encode(TOY, "Once upon"))
    assert run("generate", "Once upon", "--no-echo").stdout == continuation("Once upon", room) + "\n"
    endless = json.loads(run("generate", "Once upon", "--window", "--json").stdout)
    assert len(endless["token_ids"]) == 128


def test_several_prompts_come_in_order(run):
    prompts = ["The king", "x", "Once upon a time"]
    both = {"temperature": 1.0, "seed": 4}
    expected = "\n\n".join(p + continuation(p, 7, **both) for p in prompts) + "\n"
    assert run("generate", *prompts, "-n", "7", "-t", "1", "--seed", "4").stdout == expected


def test_prompts_from_files_and_standard_input(run, tmp_path: Path):
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"The king\r\nand the queen\n")
    records = run("generate", "-f", str(file), "-f", "-", "-n", "2", "--json", stdin="The sea\n").stdout.splitlines()
    assert [json.loads(r)["prompt"] for r in records] == ["The king\r\nand the queen", "The sea"]
    records = run("generate", "--lines", "-n", "2", "--json", stdin="The sea\nThe king\n").stdout.splitlines()
    assert [json.loads(r)["prompt"] for r in records] == ["The sea", "The king"]


def test_json_holds_everything(run):
    options = {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1, "seed": 7}
    steps = list(toy_model().generate("Once", 9, logprobs=2, **options))
    flags = [f for name, value in options.items() for f in (f"--{name.replace('_', '-')}", str(value))]
    (line,) = run("generate", "Once", "-n", "9", "--json", "--logprobs", "2", *flags).stdout.splitlines()
    record = json.loads(line)
    assert record == {
        "kind": "generate",
        "schema_version": 1,
        "gpt2np": gpt2np.__version__,
        "prompt": "Once",
        "text": "".join(s.text for s in steps),
        "token_ids": [s.token_id for s in steps],
        "logprobs": [s.logprob for s in steps],
        "top_logprobs": [[list(pair) for pair in s.top] for s in steps],
        "finish": "length",
        "seed": 7,
    }


def test_the_seed_that_was_drawn_is_told(run):
    first = json.loads(run("generate", "Once", "-n", "9", "--json", "-t", "1").stdout)
    again = json.loads(run("generate", "Once", "-n", "9", "--json", "-t", "1", "--seed", str(first["seed"])).stdout)
    assert again == first


def test_beams_and_stop(run):
    beams = run("generate", "Once", "-n", "6", "--no-echo", "--beams", "3", "--length-penalty", "0.5").stdout
    assert beams == continuation("Once", 6, num_beams=3, length_penalty=0.5) + "\n"
    text = continuation("Once", 20, temperature=1.0, seed=1)
    stop = text[5:7]
    stopped = json.loads(run("generate", "Once", "-n", "20", "-t", "1", "--seed", "1", "--stop", stop, "--json").stdout)
    assert (stopped["text"], stopped["finish"]) == (text[: text.index(stop)], "stop")


def test_the_end_of_a_text_ends_it_unless_ignored(toy, run, monkeypatch):
    end = TOY.token_to_id("<|endoftext|>")
    real = gpt2np.reference.logits

    def ends_at_once(*arguments, **options):
        scores = real(*arguments, **options)
        scores[..., end] = 99
        return scores

    monkeypatch.setattr(gpt2np.reference, "logits", ends_at_once)
    ended = json.loads(run("generate", "Once", "-n", "4", "--json").stdout)
    assert (ended["token_ids"], ended["text"], ended["finish"]) == ([end], "", "eos")
    ignored = json.loads(run("generate", "Once", "-n", "4", "--json", "--ignore-eos").stdout)
    assert (ignored["token_ids"], ignored["text"]) == ([end] * 4, "<|endoftext|>" * 4)


def test_special_tokens_in_a_prompt_only_when_asked(run, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "gpt2np.model.GPT2.generate", lambda self, ids, *args, **options: (seen.extend(ids), iter(()))[1]
    )
    for flags in ([], ["--special"]):
        run("generate", "<|endoftext|>x", "-n", "1", *flags)
    assert seen == [encode(TOY, "<|endoftext|>x"), encode(TOY, "<|endoftext|>x", special=True)]
    assert len(seen[1]) < len(seen[0])


def test_a_table_of_log_probabilities(run):
    lines = run("generate", "Once", "-n", "3", "--logprobs", "2").stdout.splitlines()
    steps = list(toy_model().generate("Once", 3, logprobs=2))
    assert len(lines) >= 5
    for line, step in zip(lines[-3:], steps, strict=True):
        assert f"{step.logprob:.3f}" in line
        assert all(f"{p:.3f}" in line for _, p in step.top)


def test_interactive_goes_on_from_the_text_so_far(run):
    output = run("generate", "-i", "-n", "5", stdin="Once\nThe king\n\n/reset\nThe king\n").stdout
    model = toy_model()
    first = continuation("Once", 5)
    ids = [*encode(TOY, "Once"), *[s.token_id for s in model.generate("Once", 5)], *encode(TOY, "\nThe king")]
    second = "".join(s.text for s in model.generate(ids, 5))
    assert output == "".join(f"{text}\n" for text in (first, second, continuation("The king", 5)))


def test_interactive_says_when_the_context_is_full_and_can_slide(run):
    full = run("generate", "-i", "-n", "50", stdin="Once\nThe king\n/reset\nOnce\n")
    assert "n_ctx is 60" in full.output
    assert full.stdout.count(continuation("Once", 50)) == 2
    sliding = run("generate", "-i", "-n", "50", "--window", stdin="Once\nThe king\nThe sea\n")
    assert "n_ctx" not in sliding.output
    ids, expected = [], ""
    for line in ("Once", "\nThe king", "\nThe sea"):
        ids = [*ids, *encode(TOY, line)][-60 + 49 :]  # what leaves room for 49 tokens more; "Once" is shorter
        steps = list(toy_model().generate(ids, 50))
        ids += [step.token_id for step in steps]
        expected += "".join(step.text for step in steps) + "\n"
    assert sliding.stdout == expected


def test_interactive_goes_on_after_a_line_that_is_not_text_and_after_a_failure(run, monkeypatch):
    real = gpt2np.reference.logits
    lengths = []

    def fails_once(hidden, *arguments, **options):
        lengths.append(hidden.shape[1])
        return real(hidden * (np.nan if len(lengths) == 5 else 1), *arguments, **options)

    monkeypatch.setattr(gpt2np.reference, "logits", fails_once)
    # "The king" fails when it is run; "The sea" then follows "Once" and its continuation
    result = run("generate", "-i", "-n", "4", stdin=b"Once\nn\xe9\nThe king\nThe sea\n")
    assert "not valid Unicode" in result.output
    assert "no token can be chosen" in result.output
    monkeypatch.undo()
    ids = [*encode(TOY, "Once"), *[s.token_id for s in toy_model().generate("Once", 4)], *encode(TOY, "\nThe sea")]
    third = "".join(s.text for s in toy_model().generate(ids, 4))
    assert result.stdout.splitlines()[-1] == third
    assert result.stdout.splitlines()[0] == continuation("Once", 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", ""], "empty"),
        (["generate", "-f", "nowhere.txt"], "cannot read nowhere.txt"),
        (["generate", "a", "b", ""], "prompt 3 of 3 is empty"),
        (["generate", "x", "-n", "1000"], "--window"),
        (["generate", "x", "-n", "0"], "max_new_tokens must be a whole number of at least 1, got 0"),
        (["generate", "x", "--beams", "2", "--length-penalty", "nan"], "length_penalty"),
        (["score", "-", "--resume", "no/such/folder/p.json"], "cannot keep progress"),
        (["generate", "x", "--top-p", "0"], "top_p"),
        (["generate", "x", "-t", "1", "--beams", "2"], "num_beams"),
        (["generate", "x", "-i"], "--interactive takes no"),
        (["score", "nowhere.txt"], "cannot read nowhere.txt"),
        (["embed", "nowhere.txt", "-o", "x.npz"], "cannot read nowhere.txt"),
        (["embed", "-", "-o", "x.txt"], "npz or .npy"),
        (["embed", "-", "-o", "no/such/folder/x.npz"], "cannot write"),
    ],
)
def test_usage_errors(run, arguments, message):
    with pytest.raises(InputError, match=re.escape(message)):
        run(*arguments, stdin="some text")


def test_without_a_tokenizer_the_error_says_what_to_do(run, tmp_path: Path):
    bare = write_toy(tmp_path, tokenizer=False)
    with pytest.raises(TokenizerError, match=r"no tokenizer beside .*--tokenizer PATH.*gpt2np fetch tokenizer"):
        run("generate", "Once", model=bare)
    TOY.save(str(tmp_path / "elsewhere.json"))
    elsewhere = ["--tokenizer", str(tmp_path / "elsewhere.json")]
    assert run("generate", "Once", "-n", "5", *elsewhere, model=bare).stdout == f"Once{continuation('Once', 5)}\n"


def test_text_that_is_not_utf8_is_an_error(run, tmp_path: Path):
    file = tmp_path / "latin1.txt"
    file.write_bytes("né".encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8"):
        run("score", str(file))


# ------------------------------------------------------------------------------------ as real processes

SCRIPT = """
import sys, typer, gpt2np.reference
from importlib import import_module
from time import sleep
name, pause = sys.argv[1], float(sys.argv.pop(2))
real = gpt2np.reference.transformer
calls = []
def slow(*arguments, **options):
    calls.append(sleep(pause))
    if len(calls) == 5:
        print("running", file=sys.stderr, flush=True)
    return real(*arguments, **options)
gpt2np.reference.transformer = slow
app = typer.Typer()
app.command()(getattr(import_module("gpt2np.commands." + name), name))
sys.argv.pop(1)
app()
"""


def start(*arguments, pause=0.02, **options):
    name, *rest = arguments
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, name, str(pause), *rest, "--engine", "numpy"],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )


def test_text_streams_and_ctrl_c_keeps_what_is_there(toy):
    process = start("generate", "Once upon", "-m", str(toy), "--window", "-n", "100000", pause=0.05)
    head = process.stdout.read(len("Once upon") + 3)  # there long before the end
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    text = (head + rest).decode()
    assert process.returncode == 130
    assert text.endswith("\n")
    assert len(text) < 5000
    assert continuation("Once upon", 2000, window=True).startswith(text.removeprefix("Once upon")[:-1].rstrip("�"))
    assert b"Traceback" not in errors


def test_ctrl_c_with_json_prints_what_it_has(toy, tmp_path: Path):
    process = start("generate", "Once", "The", "-m", str(toy), "--window", "-n", "100000", "--json", pause=0.01)
    assert process.stderr.readline() == b"running\n"
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    for record, prompt in zip(map(json.loads, output.splitlines()), ("Once", "The"), strict=True):
        assert (record["prompt"], record["finish"]) == (prompt, "interrupted")


def test_on_a_terminal_prompts_are_bold_and_control_characters_harmless(toy, tmp_path: Path):
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80"}
    environment.pop("NO_COLOR", None)
    process = start("generate", "Hi\x1b[2J", "-n", "3", "-m", str(toy), stdout=theirs, env=environment, pause=0)
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux: the other side is closed
            break
        if not part:
            break
        seen += part
    os.close(ours)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert b"\x1b[1m" in seen
    assert b"\x1b[2J" not in seen
    assert rb"Hi\u001b[2J" in seen


# ----------------------------------------------------------------------------------------------- score


def test_score_prints_a_table(run, tmp_path: Path):
    text, words = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text("Once upon a time " * 20)
    words.write_text('{"text": "Once upon a time"}\n{"text": "the king and the queen"}\n')
    output = run("score", str(text), str(words), "--window", "20", "--stride", "5").stdout
    expected = TextScoring(toy_model(), text.read_text(), 20, 5)
    list(expected)
    assert "window 20, stride 5" in output
    for value in (expected.result.perplexity, expected.result.bits_per_byte):
        assert f"{value:,.4f}" in output
    assert re.search(r"b\.jsonl +2 +0 +0\.00%", output)


def test_score_prints_json_lines_and_goes_on(run, tmp_path: Path):
    text = tmp_path / "a.txt"
    text.write_text("Once upon a time " * 20)
    arguments = ["score", str(text), "--json", "--resume", str(tmp_path / "p.json")]
    record = json.loads(run(*arguments).stdout)
    assert record["complete"]
    assert record["scored"] == record["tokens"] - 1
    assert (record["window"], record["stride"]) == (60, 30)
    assert record["per_second"] > 0
    again = json.loads(run(*arguments).stdout)
    assert again.pop("per_second") is None  # nothing was left to do
    assert again == {k: v for k, v in record.items() if k != "per_second"}


def test_ctrl_c_prints_the_score_so_far_and_the_next_run_goes_on(toy, run, tmp_path: Path):
    text = tmp_path / "a.txt"
    text.write_text("Once upon a time there was a king. " * 60)
    whole = json.loads(run("score", str(text), "--json", "--stride", "10").stdout)
    arguments = ["score", str(text), "--json", "--stride", "10", "--resume", str(tmp_path / "p.json")]
    process = start(*arguments, "-m", str(toy), pause=0.3)
    deadline = time.monotonic() + 60
    while not (tmp_path / "p.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    part = json.loads(output)
    assert not part["complete"]
    assert 0 < part["scored"] < whole["scored"]
    assert b"stopped in" in errors
    rest = json.loads(run(*arguments).stdout)
    assert {**rest, "per_second": 0} == {**whole, "per_second": 0}


# ----------------------------------------------------------------------------------------------- embed

LINES = "Once upon a time\nx\nthe king\n"


def test_embed_writes_an_array_for_each_line(run, tmp_path: Path):
    output = tmp_path / "states.npz"
    flags = ["--tap", "last_hidden_state", "--tap", "h.1.attn.probs"]
    run("embed", "-", "-o", str(output), *flags, stdin=LINES)
    model = toy_model()
    with np.load(output) as found:
        assert len(found) == 9
        for i, line in enumerate(LINES.splitlines()):
            trace = model.trace(encode(TOY, line))
            assert found[f"input_ids/{i}"].tolist() == encode(TOY, line)
            np.testing.assert_allclose(found[f"last_hidden_state/{i}"], trace["ln_f"][0], atol=1e-5)
            np.testing.assert_allclose(found[f"h.1.attn.probs/{i}"], trace["h.1.attn.probs"][0], atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["states.npz"]


def test_embed_pools(run, tmp_path: Path):
    model = toy_model()
    last = [model(encode(TOY, line)).last_hidden_state[0, -1] for line in LINES.splitlines()]
    run("embed", "-", "-o", str(tmp_path / "v.npy"), "--pool", "last", stdin=LINES)
    run("embed", "-", "-o", str(tmp_path / "v.npz"), "--pool", "last", stdin=LINES)
    with np.load(tmp_path / "v.npz") as archive:
        (in_archive,) = archive.values()
    for found in (np.load(tmp_path / "v.npy"), in_archive):
        assert found.shape == (3, 12)
        np.testing.assert_allclose(found, last, atol=1e-5)


def test_embed_one_array(run, tmp_path: Path):
    output = tmp_path / "one.npy"
    run("embed", "-", "-o", str(output), stdin="Once upon a time")
    expected = toy_model()(encode(TOY, "Once upon a time")).last_hidden_state
    np.testing.assert_allclose(np.load(output), expected, atol=1e-5)
    output.unlink()
    with pytest.raises(InputError, match="--pool"):
        run("embed", "-", "-o", str(output), stdin=LINES)
    with pytest.raises(InputError, match="line 2"):
        run("embed", "-", "-o", str(output), stdin="a\n\nb")
    with pytest.raises(InputError, match="one --tap"):
        run("embed", "-", "-o", str(output), "--tap", "ln_f", "--tap", "embed", stdin="a")
    assert list(tmp_path.iterdir()) == []  # nothing half written
