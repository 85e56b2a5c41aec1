"""Work cut into shards: the same bits as one process, whoever computes them and whatever happens on the way."""

import json
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info
from typer.testing import CliRunner

from gpt2np.cli import app
from gpt2np.cluster import engine, sweep, text
from gpt2np.cluster.models import describe, open_described
from gpt2np.cluster.store import Store
from gpt2np.errors import Gpt2npError, InputError, MissingPackageError
from gpt2np.model import load
from gpt2np.parity.capture import Options
from gpt2np.score import TextScoring
from toy_model import write_toy

ROOT = Path(__file__).parents[2]
TEXT = "Once upon a time there was a king, and the king had a daughter. " * 30
LINES = [f"The king said {word} to the queen" for word in ["one", "two", "three", "four", "five", "six", "seven"]]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def run(toy):
    """A command on the toy model by the textbook's engine; its JSON lines."""

    def run(*arguments, code=0, model=("-m", str(toy), "--engine", "numpy")):
        done = CliRunner().invoke(app, [*map(str, arguments), *model])
        if isinstance(done.exception, Gpt2npError):
            raise done.exception
        assert done.exit_code == code, done.output
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    return run


@pytest.fixture
def cut(tmp_path, toy, monkeypatch):
    """A text's windows, four to a shard; the store; and what one process says of the text."""
    monkeypatch.setattr(text, "WINDOWS", 4)
    file, store = tmp_path / "text.txt", Store(tmp_path / "results")
    file.write_text(TEXT)
    store.folder.mkdir()
    model = load(toy / "model.onnx", "numpy")
    tokens = text.token_shard(file, describe(model, None, 1))
    engine.compute([tokens], store)
    scoring = TextScoring(model, TEXT, 40, 10, batch_size=1)
    for _ in scoring:
        pass
    return tokens, text.window_shards(tokens, store, 40, 10), store, scoring.result


def test_shards_give_the_bits_of_one_process(cut):
    tokens, shards, store, expected = cut
    assert len(shards) > 10
    engine.compute(shards, store)
    assert text.text_score(tokens, shards, store) == expected


def test_a_worker_sends_back_what_it_has_not_begun_in_time(cut, monkeypatch):
    _, shards, store, _ = cut
    assert engine.make(shards[:3], store) == 3
    monkeypatch.setattr(engine, "SECONDS", 0)
    assert engine.make(shards[:5], store) == 1  # which was there
    assert store.missing(shards) == shards[3:]


def test_sums_of_sums_are_not_the_sum(cut):
    """Why there is one exact sum over all windows: sums of each worker's sums depend on who computed what."""
    _, shards, store, expected = cut
    engine.compute(shards, store)
    parts = [np.frombuffer(store.read(shard.name), "<f8") for shard in shards]
    workers = [[float(np.concatenate(parts[i::n]).sum()) for i in range(n)] for n in range(1, len(parts))]
    assert len({sum(sums) for sums in workers}) > 1
    assert math.fsum([math.fsum([2.0**53, 1]), 1]) != math.fsum([2.0**53, 1, 1])  # nor do exact sums help
    backwards = math.fsum(np.concatenate(parts[::-1]))
    assert backwards == math.fsum(np.concatenate(parts)) == expected.log_likelihood


def test_what_is_there_is_not_computed_again_and_what_is_damaged_is(cut, monkeypatch):
    tokens, shards, store, expected = cut
    engine.compute(shards, store)
    assert store.missing(shards) == []
    whole = {file.name: file.stat().st_mtime_ns for file in store.folder.iterdir()}
    engine.compute(shards, store)
    assert whole == {file.name: file.stat().st_mtime_ns for file in store.folder.iterdir()}
    damaged = store.folder / shards[3].name
    content = bytearray(damaged.read_bytes())
    content[5] ^= 1
    damaged.write_bytes(content)
    (store.folder / shards[4].name).write_bytes(b"")
    (store.folder / shards[5].name).unlink()
    monkeypatch.setattr("gpt2np.cluster.store.WAIT", 0)
    with pytest.raises(InputError, match="is missing or damaged, as .* sees it; do all machines see this folder"):
        text.text_score(tokens, shards, store)
    assert store.missing([*shards, *shards]) == shards[3:6]
    engine.compute(shards, store)
    assert text.text_score(tokens, shards, store) == expected


def test_a_name_changes_with_all_that_the_result_depends_on(cut, tmp_path, toy):
    tokens, shards, store, _ = cut
    names = {shard.name for shard in shards}
    assert len(names) == len(shards)
    for window, stride in ((41, 10), (40, 9)):
        assert not names & {s.name for s in text.window_shards(tokens, store, window, stride)}

    def named(folder, file, batch_size=1, engine="numpy"):
        return text.token_shard(file, describe(load(folder / "model.onnx", engine), None, batch_size)).name

    file, copy = tmp_path / "text.txt", tmp_path / "copy.txt"
    copy.write_text(TEXT)
    assert named(write_toy(tmp_path / "moved"), copy) == named(toy, file) == tokens.name
    assert named(toy, file, batch_size=8) != tokens.name  # NumPy's last bits may depend on it
    assert named(toy, file, batch_size=8, engine="numba") == named(toy, file, engine="numba") != tokens.name
    file.write_text("x" + TEXT)
    assert named(toy, file) != tokens.name
    with pytest.raises(InputError, match="has changed since the work was cut"):
        text.tokenize(tokens, store)


def test_another_model_or_program_at_the_place_is_refused(cut, tmp_path):
    tokens, _, _, _ = cut
    other = write_toy(tmp_path / "other", n_ctx=59)
    paths = {"model": other / "model.onnx", "tokenizer": None}
    with pytest.raises(InputError, match="differs from the machine that cut the work in the model of"):
        open_described(replace(tokens, where=tokens.where | {"of": paths}))
    with pytest.raises(InputError, match="in the fingerprint of"):
        open_described(replace(tokens, content={"of": tokens.content["of"] | {"fingerprint": "0"}}))


def test_a_full_disk_is_an_error_and_nothing_is_half_written(cut):
    tokens, shards, store, expected = cut
    engine.compute(shards[:3], store)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, limits[1]))
    try:
        with pytest.raises(InputError, match=r"cannot write .*windows-\w+: File too large"):
            engine.compute(shards, store)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {p.name for p in store.folder.iterdir()} == {tokens.name, *(shard.name for shard in shards[:3])}
    engine.compute(shards, store)
    assert text.text_score(tokens, shards, store) == expected


def test_what_was_killed_while_it_wrote_leaves_nothing_behind(run, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(TEXT)
    command = "score", tmp_path / "a.txt", "--json", "--results", tmp_path / "r"
    run(*command)
    results = sorted((tmp_path / "r").iterdir())
    left, other = (tmp_path / "r" / f".{name}.host.1.part" for name in (results[0].name, "of-another-command"))
    for draft in (left, other):
        draft.write_bytes(b"half of")
    run(*command)
    assert sorted((tmp_path / "r").iterdir()) == sorted([*results, other])
    monkeypatch.setattr(Path, "write_bytes", lambda *_: None)  # as if the end of another command had removed a draft
    store = Store(tmp_path / "r")
    store.write(results[0].name, b"the same")
    with pytest.raises(InputError, match="cannot write .*: No such file"):
        store.write("new", b"result")


def test_a_result_that_a_network_shows_late_is_waited_for(cut):
    """Another machine has written it, and NFS still says that there is no such file."""
    _, shards, store, _ = cut
    engine.compute(shards[:1], store)
    place, hidden = store.folder / shards[0].name, store.folder / "hidden"
    place.rename(hidden)
    late = threading.Timer(0.3, hidden.rename, [place])
    late.start()
    assert len(store.result(shards[0].name)) == 8 * 4
    late.join()


# ------------------------------------------------------------------------------------------ the commands


def test_score_by_shards(run, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    files = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    alone = run("score", *files, "--json", "--batch-size", 1)
    *found, summary = run("score", *files, "--json", "--batch-size", 1, "--results", tmp_path / "r")
    for one, other in zip(alone, found, strict=True):
        assert one | {"per_second": None} == other
    assert summary["computed"] == summary["shards"] > 2
    *again, summary = run("score", *files, "--json", "--batch-size", 1, "--results", tmp_path / "r")
    assert again == found
    assert summary["computed"] == 0
    assert summary["found"] == summary["shards"]


@pytest.mark.parametrize("options", [["--pool", "last"], ["--tap", "h.0.attn.probs", "--tap", "ln_f"]])
def test_embed_by_shards(run, tmp_path, monkeypatch, options):
    monkeypatch.setattr(text, "LINES", 3)
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(LINES) + "\r\n")
    run("embed", lines, "-o", tmp_path / "one.npz", "--batch-size", 1, *options)
    [done] = run(
        "embed", lines, "-o", tmp_path / "two.npz", "--batch-size", 1, *options, "--results", tmp_path / "r", "--json"
    )
    assert (done["lines"], done["cluster"]["shards"]) == (7, 3)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    lines.write_text("\n".join([*LINES, "and", "more"]) + "\r\n")
    [done] = run(
        "embed", lines, "-o", tmp_path / "two.npz", "--batch-size", 1, *options, "--results", tmp_path / "r", "--json"
    )
    assert (done["cluster"]["found"], done["cluster"]["computed"]) == (2, 1)  # a longer file keeps its shards


def test_parity_by_shards(tmp_path, monkeypatch, toy):
    monkeypatch.setattr("gpt2np.cluster.sweep.PROMPTS", 2)
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"no model")
    options = [
        "--random",
        "3",
        "--engine",
        "numpy",
        "--json",
        str(tmp_path / "p.json"),
        "--results",
        str(tmp_path / "r"),
    ]
    done = CliRunner().invoke(app, ["parity", str(toy), *options])
    assert done.exit_code == 0, done.output
    assert "verdict: PASS" in done.output
    found = json.loads((tmp_path / "p.json").read_text())
    assert found["cluster"]["computed"] == 2
    assert CliRunner().invoke(app, ["parity", str(toy), "--random", "3", *options[2:]]).exit_code == 0
    assert json.loads((tmp_path / "p.json").read_text())["cluster"]["computed"] == 0
    one = CliRunner().invoke(app, ["parity", str(toy), *options[:6]])
    assert one.exit_code == 0
    whole = json.loads((tmp_path / "p.json").read_text())
    assert [c for report in found["reports"] for c in report["comparisons"]] == whole["comparisons"]
    assert found["models"][0]["inputs"] == 3
    assert isinstance(CliRunner().invoke(app, ["parity", str(toy), str(bad)]).exception, Gpt2npError)


def test_a_sweep_finds_what_its_paths_mean_from_another_folder(tmp_path, toy, monkeypatch):
    """As a worker on another machine does, which was started elsewhere; and it sees that a file has changed."""
    (tmp_path / "here").mkdir()
    for name in ("one.onnx", "two.onnx"):
        (tmp_path / "here" / name).write_bytes((toy / "model.onnx").read_bytes())
    monkeypatch.chdir(tmp_path / "here")
    options = Options(Path("one.onnx"), against=["two.onnx"], random=1, engine="numpy")
    [shard] = sweep.report_shards(options, [Path("one.onnx")], 1.0)
    monkeypatch.chdir(tmp_path)
    assert json.loads(sweep.compare(shard, Store(tmp_path)))["report"]["exit_code"] == 0
    assert Path.cwd() == tmp_path
    write_toy(tmp_path / "other", n_ctx=59)
    (tmp_path / "other" / "model.onnx").rename(tmp_path / "here" / "two.onnx")
    assert "in the files of one.onnx" in json.loads(sweep.compare(shard, Store(tmp_path)))["report"]["error"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "2", "--results", "text.txt/r"], "cannot keep results in .*text.txt is no folder"),
        (["--workers", "2", "--cluster", "tcp://127.0.0.1:1"], "not both"),
        (["--results", "r", "--resume", "p"], "--resume is for one process"),
        (["--results", "text.txt"], "cannot keep results in .*text.txt is no folder"),
        (["--results", "r", "--window", "61"], r"window must be in 2\.\.60"),
        (["--results", "r", "--batch-size", "0"], "batch_size"),
    ],
)
def test_wrong_options(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "distributed", None)  # nothing is started
    Path("text.txt").write_text(TEXT)
    with pytest.raises(InputError, match=message):
        run("score", "text.txt", *arguments)
    assert [path.name for path in tmp_path.iterdir() if path.name != "r"] == ["text.txt"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "x", "a text needs two tokens"),
        ("a.jsonl", '{"text": "one two"}\nnothing', "from line 1 on: line 2 is not a JSON object"),
        ("a.jsonl", '{"text": "one"}', "has no words before its last one"),
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", "\n\n", "is empty"),
        ("-", None, "standard input"),
        ("missing.txt", None, "cannot read"),
        ("missing.jsonl", None, "cannot read"),
    ],
)
def test_texts_that_cannot_be_scored(run, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        run("score", "-" if name == "-" else tmp_path / name, "--results", tmp_path / "r")


def test_errors_of_one_text_among_several_name_it(run, tmp_path):
    (tmp_path / "long.txt").write_text(TEXT)
    (tmp_path / "short.txt").write_text("x")
    for options in ([], ["--results", tmp_path / "r"]):
        with pytest.raises(InputError, match=r"short\.txt: a text needs two tokens"):
            run("score", tmp_path / "long.txt", tmp_path / "short.txt", *options)


def test_what_is_given_twice_is_computed_once(run, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text(TEXT)
    *found, summary = run("score", tmp_path / "a.txt", tmp_path / "b.txt", "--json", "--results", tmp_path / "r")
    assert found[0] | {"file": ""} == found[1] | {"file": ""}
    assert 2 * summary["computed"] == 2 * summary["found"] == summary["shards"]


def test_without_dask_one_process_does_it_and_workers_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(MissingPackageError, match="pip install distributed"), engine.open_engine(2):
        pass
    with engine.open_engine() as alone:
        assert alone == engine.THIS_PROCESS


# -------------------------------------------------------------------------------------- several processes


def python(*arguments, timeout=None):
    where = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "support")))
    environment = {**os.environ, "PYTHONPATH": where}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)


@pytest.mark.parametrize("method", sorted({engine.METHOD, "spawn"}))  # the second is all there is but on Linux
def test_two_workers_give_the_bits_of_one_process(run, tmp_path, toy, method):
    file = tmp_path / "a.txt"
    file.write_text(TEXT)
    [alone] = run("score", file, "--json")
    options = ["--workers", 2, "--results", tmp_path / "r", "-m", toy, "--engine", "numpy", "--json"]
    # a forked worker, which has this from here, sends back all but the first shard of a message
    code = f"from gpt2np.cluster import engine; engine.METHOD = {method!r}; engine.SECONDS = 0"
    code += "; from gpt2np.cli import main; main()"
    done = python("-c", code, "score", file, *options)
    assert done.returncode == 0, done.stderr
    found, summary = map(json.loads, done.stdout.splitlines())
    assert found == alone | {"per_second": None}
    assert summary["workers"] == 2
    assert summary["computed"] == summary["shards"]
    assert done.stderr.startswith("2 workers; dashboard: ")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    [found, summary] = run("score", file, "--json", "--results", tmp_path / "r")  # by one process, from what is there
    assert found == alone | {"per_second": None}
    assert summary["computed"] == 0


def test_a_model_that_cannot_be_compared_is_told_and_tried_again(tmp_path, toy):
    """The others go on. What is wrong may be so for a moment only, so it is not kept."""
    value = [make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    graph = make_graph([make_node("Relu", ["x"], ["y"])], "no GPT-2", value[:1], value[1:])
    onnx.save(make_model(graph, opset_imports=[make_opsetid("", 17)]), tmp_path / "other.onnx")
    command = ["parity", tmp_path / "other.onnx", toy, "--random", 2, "--engine", "numpy", "--json", "-"]
    command = [*map(str, command), "--results", str(tmp_path / "r")]
    by_worker = python("-m", "gpt2np", *command, "--workers", 1)
    again = CliRunner().invoke(app, command)
    for code, output, computed in ((by_worker.returncode, by_worker.stdout, 2), (again.exit_code, again.stdout, 1)):
        found = json.loads(output)
        assert (code, found["exit_code"]) == (2, 2)
        assert [row["exit_code"] for row in found["models"]] == [2, 0]
        assert "no GPT-2 ends like this" in found["reports"][0]["error"]
        assert found["cluster"]["computed"] == computed


def test_no_scheduler_at_the_address(monkeypatch):
    monkeypatch.setattr(engine, "WAIT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as other:  # says nothing, as a server of pages does
        for address in ("tcp://127.0.0.1:1", "no address", f"127.0.0.1:{other.getsockname()[1]}"):
            with (
                pytest.raises(InputError, match=f"no Dask scheduler answers at {address}"),
                engine.open_engine(None, address),
            ):
                pass


@pytest.mark.parametrize(
    ("workers", "address", "message"),
    [
        (0, None, "workers must be a whole number of at least 1"),
        (-1, None, "workers must be"),
        (1.5, None, "workers must be"),
        (float("nan"), None, "workers must be"),
        ("2", None, "workers must be"),
        (True, None, "workers must be"),
        (1, "tcp://127.0.0.1:1", "not both"),
        (None, 3, "address is a text such as"),
        (None, "tls://127.0.0.1:1", "no Dask scheduler answers at tls"),
    ],
)
def test_an_engine_that_cannot_be_had(monkeypatch, workers, address, message):
    monkeypatch.setattr(engine, "WAIT", 0.1)
    with pytest.raises(InputError, match=message), engine.open_engine(workers, address):
        pass


def test_windows_and_batches_that_cannot_be_cut(cut, tmp_path, toy):
    tokens, _, store, _ = cut
    for window, stride in ((0, 1), (1, 1), (40, 0), (40, 41), (40.0, 10), ("40", 10)):
        with pytest.raises(InputError, match="window|stride"):
            text.window_shards(tokens, store, window, stride)
    for batch_size in (0, "8", 1.5):
        with pytest.raises(InputError, match="batch_size must be"):
            describe(load(toy / "model.onnx", "numpy"), None, batch_size)


def test_nothing_of_local_workers_is_open_to_other_machines():
    with engine.open_engine(1):
        here = psutil.Process()
        until = time.monotonic() + 300
        while len(workers := here.children(recursive=True)) < 2 or not workers[-1].net_connections():
            assert time.monotonic() < until
            time.sleep(0.05)
        open_here = {c.laddr.ip for p in (here, *workers) for c in p.net_connections() if c.status == "LISTEN"}
    assert open_here == {"127.0.0.1"}


def test_another_version_of_gpt2np_at_the_scheduler(monkeypatch):
    """Dask would end each worker without it, and the command would wait for ever."""
    monkeypatch.setattr(engine, "__version__", "0.0.1")
    with (
        pytest.raises(InputError, match=r"the scheduler at tcp://.* has gpt2np .*, where this machine has 0\.0\.1"),
        engine.open_engine(1),
    ):
        pass


def test_a_wrong_address_is_the_end(tmp_path, toy):
    """Dask's threads, which were begun for it, do not keep Python from ending."""
    (tmp_path / "a.txt").write_text(TEXT)
    done = python("-m", "gpt2np", "score", tmp_path / "a.txt", "-m", toy, "--cluster", "no address", timeout=300)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("gpt2np: no Dask scheduler answers at no address")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("options", [[], pytest.param(["--spawn"], marks=pytest.mark.slow)])
def test_killed_workers_lose_nothing(options):
    done = python(ROOT / "tests" / "support" / "kill_campaign.py", "--kills", 2, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok: 20 shards" in done.stdout


@pytest.mark.slow
def test_a_restarted_scheduler_loses_nothing():
    done = python(ROOT / "tests" / "support" / "kill_campaign.py", "--kills", 2, "--scheduler")
    assert done.returncode == 0, done.stdout + done.stderr
