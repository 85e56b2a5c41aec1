"""Places: intervals from outputs alone, a graph whose wiring changed, two files' weights, what lies behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from typer.testing import CliRunner

from gpt2np.cli import app
from gpt2np.errors import InputError
from gpt2np.onnx.read.datasets import save_set
from gpt2np.parity.capture import Options
from gpt2np.parity.cases import Case, case_from_ids
from gpt2np.parity.diff import diff
from gpt2np.parity.digits import significant_digits
from gpt2np.parity.parties import Ours
from gpt2np.parity.places import interval, next_tap
from gpt2np.parity.report import Report
from gpt2np.parity.run import parity, parse_checks
from gpt2np.parity.subject import Subject
from gpt2np.parity.text import lines_of
from wiring_mutants import WIRINGS

IDS = np.array([[5, 17, 30, 2, 7, 7, 19, 34]])
Proto = onnx.ModelProto
Names = dict[str, str]  # tap -> tensor


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = tmp_path_factory.mktemp("places") / "sound"
    result = CliRunner().invoke(app, ["synth", "--size", "3,3,12,20,37", "-o", str(folder), "--seed", "2"])
    assert result.exit_code == 0, result.output
    return Subject(folder / "model.onnx")


def said(report: Report) -> str:
    return " ".join(" ".join(text for text, _ in lines_of(report)).split())


def changed(sound: Subject, folder: Path, change: Callable[[Proto, Names], None]) -> Path:
    proto = onnx.load(str(sound.path))
    change(proto, {tap: place.tensor for tap, place in sound.recognised.taps.items()})
    folder.mkdir(exist_ok=True)
    onnx.save(proto, str(folder / "model.onnx"))
    return folder / "model.onnx"


def ids_alone(model: Subject) -> list[Case]:
    return [case_from_ids(model, "ids", IDS)]


# ----------------------------------------------------------------------------------------------- intervals


def test_the_interval_is_what_no_good_output_vouches_for(sound: Subject) -> None:
    good = ["h.0.attn.k", "h.0.attn.v"]
    suspects = interval(sound.config, good, ["h.1.attn.k", "h.1.attn.v", "h.2.attn.k", "ln_f"])
    assert suspects[0] == "h.0.attn.q"
    assert suspects[-1] == "h.1.attn.k"
    assert "h.0.ln_1" not in suspects
    middle = next_tap(suspects, sound.config)
    assert middle in suspects
    assert next_tap(["h.1.mlp.gelu"], sound.config) is None


def test_outputs_alone_give_an_interval_and_the_next_array(sound: Subject, tmp_path: Path) -> None:
    program = sound.program.with_(runs={"h.1.mlp.gelu": lambda p, call, tap, x, dtype: x[0] * np.sin(5 * x[0])})
    case = ids_alone(sound)[0]
    taps = dict(program.walk(sound.call(case.feeds), np.float32, until="ln_f"))
    arrays = {"output1": taps["ln_f"][None]}
    arrays |= {f"output{i + 2}": np.stack([taps[f"h.{i}.attn.k"], taps[f"h.{i}.attn.v"]]) for i in range(3)}
    np.savez(tmp_path / "port.npz", **arrays)
    report = diff(str(sound.path), str(tmp_path / "port.npz"), ids_alone)
    assert report.exit_code == 1
    assert report.place is not None
    assert (report.place.first, report.place.last) == ("h.1.attn.q", "h.2.attn.k")
    assert "h.1's keys and values agree" in said(report)
    assert report.place.next is not None
    np.savez(tmp_path / "port.npz", **arrays, **{report.place.next: taps[report.place.next]})
    second = diff(str(sound.path), str(tmp_path / "port.npz"), ids_alone)
    assert second.place is not None
    assert len(second.place.suspects) < len(report.place.suspects)


# -------------------------------------------------------------------------------------------------- wiring


def test_a_graph_that_cannot_be_placed_is_held_against_its_own_weights_or_gets_an_interval(
    sound: Subject, tmp_path: Path
) -> None:
    path = changed(sound, tmp_path / "bad", WIRINGS["residual after the norm"].change)
    case = ids_alone(sound)[0]
    save_set(path.parent / "test_data_set_0", case.feeds, Ours(sound, "numpy").run(case.feeds).outputs)
    report = parity(Options(path, engine="numpy"))
    assert report.exit_code == 1
    assert "most likely other_input: bad behaves as if h.1.resid_mid read h.1.ln_1" in said(report)
    assert "the file's weights, wired as a GPT-2's, give the recorded outputs" in said(report)
    proto = onnx.load(str(path))
    renamed = {t.name: f"w{i}" for i, t in enumerate(proto.graph.initializer)}  # nothing tells which weight is which
    for tensor in proto.graph.initializer:
        tensor.name = renamed[tensor.name]
    for node in proto.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    onnx.save(proto, str(path))
    report = parity(Options(path, engine="numpy"))
    assert report.exit_code == 1
    assert report.place is not None
    assert "h.1.resid_mid" in report.place.suspects
    assert "h.0.attn.out" not in report.place.suspects


# ----------------------------------------------------------------------------------------------- two files


def edit(suffix: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Proto, Names], None]:
    def apply(proto: Proto, names: Names) -> None:
        for tensor in proto.graph.initializer:
            if tensor.name.endswith(suffix):
                value = np.ascontiguousarray(change(np.array(numpy_helper.to_array(tensor))))
                tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))

    return apply


def one_number(w: np.ndarray) -> np.ndarray:
    w[3, 4] += 1
    return w


def one_row(w: np.ndarray) -> np.ndarray:
    w[5] += np.arange(w.shape[1], dtype=w.dtype)
    return w


FACTS: dict[str, tuple[Callable[[Proto, Names], None], str]] = {
    "one number": (edit("h.1.mlp.c_fc.weight", one_number), "h.1.mlp.c_fc.weight[3,4] is"),
    "one row": (edit("h.1.mlp.c_fc.weight", one_row), "h.1.mlp.c_fc.weight row 5"),
    "halved": (edit("h.1.ln_2.weight", lambda w: w / 2), "h.1.ln_2.weight is multiplied by 0.5"),
    "float16": (
        edit("h.1.mlp.c_fc.weight", lambda w: w.astype(np.float16).astype(np.float32)), "is rounded to float16",
    ),
    "nan": (edit("h.1.mlp.c_fc.bias", lambda b: np.where(np.arange(len(b)) == 7, np.nan, b).astype(b.dtype)), "is nan"),
    "transposed": (edit("h.1.attn.c_proj.weight", lambda w: w.T), "is transposed in B"),
}  # fmt: skip


@pytest.mark.parametrize("name", FACTS)
def test_what_two_files_differ_in_is_read_from_them(name: str, sound: Subject, tmp_path: Path) -> None:
    change, words = FACTS[name]
    path = changed(sound, tmp_path / "bad", change)
    report = diff(str(sound.path), str(path), ids_alone)
    assert report.facts, said(report)
    assert words in report.facts[0]


# ------------------------------------------------------------------------------------- behind the first mistake


def both(*changes: Callable[[Proto, Names], None]) -> Callable[[Proto, Names], None]:
    def apply(proto: Proto, names: Names) -> None:
        for change in changes:
            change(proto, names)

    return apply


def test_a_second_mistake_is_found_behind_the_first(sound: Subject, tmp_path: Path) -> None:
    first, second = edit("h.0.mlp.c_fc.bias", lambda b: b + 1), edit("h.2.mlp.c_fc.bias", lambda b: b - 1)
    one = changed(sound, tmp_path / "one", first)
    report = diff(str(sound.path), str(one), ids_alone, replace=["h.0.mlp.c_fc"])
    assert "with h.0.mlp.c_fc put right, everything after agrees" in said(report)
    two = changed(sound, tmp_path / "two", both(first, second))
    report = diff(str(sound.path), str(two), ids_alone, replace=["h.0.mlp.c_fc"])
    assert "h.0.mlp.c_fc is not all: h.2.mlp.c_fc" in said(report)
    assert "with h.0.mlp.c_fc put right, h.2.mlp.c_fc is the next that differs" in said(report)
    with pytest.raises(InputError, match=r"h\.0\.mlp\.c_fc"):
        diff(str(sound.path), str(two), ids_alone, replace=["h.0.mlp.c_fcc"])


def test_random_rounding_tells_how_many_digits_are_significant(sound: Subject) -> None:
    call = sound.call(ids_alone(sound)[0].feeds)
    found = {d.tap: d for d in significant_digits(sound.program, call, sound.taps())}
    assert set(found) == set(sound.taps())
    assert all(5 < d.digits < 9 for d in found.values())
    exact = dict(sound.program.walk(call, np.float64, until="ln_f"))["ln_f"]
    low = dict(sound.program.walk(call, np.float32, until="ln_f"))["ln_f"]
    error = float(np.sqrt(np.mean((low - exact) ** 2)))
    assert error / 10 < found["ln_f"].spread < error * 10


def test_invariances_are_checked_for_every_party(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["synth", "--size", "2,3,12,20,37", "--with-past", "-o", str(tmp_path / "past")])
    assert result.exit_code == 0, result.output
    options = Options(tmp_path / "past" / "model.onnx", random=1, engine="numpy", checks=parse_checks("all"))
    report = parity(options)
    assert report.exit_code == 0, said(report)
    made = {(c.name.split(" ")[0], c.party): c.ok for c in report.checks if c.party}
    names = ("cache", "chunk", "prefix", "batch", "order", "causal", "determinism", "finite")
    assert all(made[name, party] for name in names for party in ("ours", "ort"))
