"""The page of a report: what the terminal says first, pictures with their numbers, and a trace to judge again by."""

from __future__ import annotations

import inspect
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import ROOT
from typer.testing import CliRunner

from browser import Page, chromium, needs_chromium
from gpt2np.cli import app
from gpt2np.errors import Gpt2npError
from gpt2np.parity.localise import Seen, TapRow
from gpt2np.parity.operations import tap_names
from gpt2np.parity.report import Check, Report
from mutants import gelu
from tiny import tiny_config

pytest.importorskip("altair", reason="the extra [html] is not installed")
pytest.importorskip("vl_convert", reason="the extra [html] is not installed")
from gpt2np.pages import drawings
from gpt2np.pages.evidence import Evidence, Summary, Witness, Worst, errors
from gpt2np.pages.report_page import chosen, report_page, tap_data

MODEL = ROOT / "weights" / "mini" / "model.onnx"
NASTY = '</script><b>bold</b> <!-- "quoted" &amp; \u2028☺'
AXE = Path(os.environ.get("AXE_CORE", ""))  # axe.min.js of the npm package axe-core, a tool and no dependency


@pytest.fixture(scope="module")
def tab():
    with chromium() as page:
        yield page


def run(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    if isinstance(done.exception, Gpt2npError):  # which `main` turns into one line and exit code 2
        return 2, str(done.exception)
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, " ".join(done.output.split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with another GELU in layer 2, its page against the sound file, and traces of both."""
    place = tmp_path_factory.mktemp("report")
    model = onnx.load(str(MODEL))
    assert gelu(2, "erf")(model)
    onnx.save(model, str(place / "erf.onnx"))
    code, said = run("diff", MODEL, place / "erf.onnx", "--ids", "5,9,2,7,1,4", "--html", place / "page.html")
    assert code == 1, said
    (place / "said.txt").write_text(said)
    for name, file in (("same", MODEL), ("erf", place / "erf.onnx")):
        words = ["trace", file, "--ids", "5,9,2,7,1,4", "--runner", "ort-off", "-o", place / f"{name}.npz"]
        assert run(*words, *(["--html", place / "trace.html"] if name == "erf" else []))[0] == 0
    return place


def test_each_picture_is_made_by_a_function_that_can_be_read():
    for name, make in inspect.getmembers(drawings, inspect.isfunction):
        if make.__module__ == drawings.__name__:
            assert make.__doc__, name
            assert len(inspect.getsource(make).splitlines()) <= 48, name


# ------------------------------------------------------------------------------------------------ numbers


def seen(tap: str, shape: tuple[int, ...], keep: np.ndarray | None = None) -> Seen:
    rng = np.random.default_rng(len(tap))
    a, exact = rng.standard_normal(shape).astype(np.float32), rng.standard_normal(shape)
    b = a.copy()
    b[:, -1] += 1e-3 * rng.standard_normal(b[:, -1].shape).astype(np.float32)
    return Seen(tap, 0, a, b, a.astype(np.float64), b.astype(np.float64), exact, keep)


@pytest.mark.parametrize(("tap", "shape"), [("h.0.attn.scores", (2, 3, 5, 7)), ("h.0.mlp.c_fc", (2, 5, 48))])
def test_cells_ulps_and_worst_numbers_are_the_errors(tap: str, shape: tuple[int, ...]):
    evidence = Evidence()
    evidence.begin("A", "B", {})
    one = seen(tap, shape)
    evidence.see(one)
    found = evidence.pairs[0].taps[tap]
    distance = np.abs(one.a.astype(np.float64) - one.b)
    rows, cells = found.grid("total")
    by_head = distance.ndim == 4
    assert rows == [f"{b}:{t}" for b in range(2) for t in range(5)]
    assert found.columns[-1] == ("head 2" if by_head else "channels 44-47")
    last = distance[:, 2] if by_head else distance[..., 44:]
    np.testing.assert_allclose(np.array(cells)[:, -1], np.sqrt(np.square(last).mean(axis=-1)).reshape(-1), rtol=1e-12)
    assert found.ulps.sum() == distance.size
    assert found.ulps[0] == (distance == 0).sum()
    worst = found.worst[0]
    assert (worst.error, worst.b) == (distance.max(), float(one.b[worst.at]))
    assert [w.error for w in found.worst] == sorted(distance[distance > 0].tolist(), reverse=True)[:10]
    assert (np.array(found.grid("local B")[1]) == 0).all()


def test_what_is_not_finite_and_what_is_padding_are_told_apart():
    keep = np.ones((1, 5, 1), bool)
    keep[0, 0] = False
    one = seen("ln_f", (1, 5, 24), keep)
    one.b[0, 0], one.b[0, 4, 3] = 99, np.nan
    evidence = Evidence()
    evidence.begin("A", "B", {})
    evidence.see(one)
    cells = evidence.pairs[0].taps["ln_f"].grid("total")[1]
    assert cells[0] == [None] * 12
    assert cells[4][1] == np.inf
    assert dict(errors(one))["total"][0, 0].max() == 0


def test_a_flip_is_told_from_rounding():
    a = np.zeros((1, 3, 8), np.float32)
    a[0, :, 2], a[0, :, 5] = [1, 1, 1], [0.5, 0.999999, 0]
    b = a.copy()
    b[0, 0, 5], b[0, 1, 5] = 2, 1.000001
    evidence = Evidence()
    evidence.begin("A", "B", {})
    evidence.see(Seen("logits", 0, a, b, exact=a))
    budget = drawings.Budget(1e-3, 1e-5)
    rows = drawings.token_rows(evidence.pairs[0].tokens, str, np.zeros((1, 3), int), budget)
    assert [row["top-1"] for row in rows] == ["B flips", "within the budget", "same"]
    evidence.pairs[0].tokens = [t._replace(exact=t.b) for t in evidence.pairs[0].tokens]
    rows = drawings.token_rows(evidence.pairs[0].tokens, str, np.zeros((1, 3), int), budget)
    assert [row["top-1"] for row in rows] == ["A flips", "within the budget", "same"]
    assert [(row["A says"], row["B says"]) for row in rows] == [("2", "5"), ("2", "5"), ("2", "2")]


def test_a_page_of_the_largest_zoo_model_stays_below_2_megabytes():
    rng, config = np.random.default_rng(0), tiny_config(n_layer=12, n_head=12, head_size=64, n_embd=768)
    names = tap_names(config)
    witness = Witness("ours", "ort")
    for tap in names:
        sums = {kind: [rng.random((1, 1024, 12)) for _ in range(1)] for kind in ("total", "local A", "local B")}
        worst = [Worst(x, (0, 1023, 50000), x, x, x, x) for x in rng.random(10)]
        columns = [f"channels {i}-{i}" for i in range(12)]
        witness.taps[tap] = Summary(tap, (1, 1024, 768), columns, sums, [np.ones((1, 1024, 12))], worst=worst)
        witness.samples[tap] = rng.random(128, np.float32)
    some = rng.random(9).tolist()
    rows = [TapRow(tap, (1, 1024, 768), *some[:3], (0, 1023, 767), *some[:7], *some[:2]) for tap in names]
    report = Report("a model", {"ours": "", "ort": ""}, "", rows={"ours - ort": rows})
    report.details["taps"] = {"ours - ort": [row.as_dict() for row in rows]}
    evidence = Evidence()
    evidence.pairs.append(witness)
    text = report_page(report, evidence, "gpt2np parity")
    assert len(tap_data(report, witness, None)["taps"]) == len(names)
    assert 700_000 < len(text.encode()) < 2_000_000


# ------------------------------------------------------------------------------------------- judged again


def test_the_page_judges_other_arrays(folder: Path):
    code, said = run("diff", folder / "page.html", folder / "same.npz")
    assert code == 0, said
    assert "holds the rms, the largest and a few of each" in said
    code, said = run("diff", folder / "page.html", folder / "erf.npz")
    assert code == 1
    assert "first tap out of budget: h.2.mlp.gelu" in said
    arrays = {name.split("/")[1]: value for name, value in np.load(folder / "erf.npz").items() if "/" in name}
    np.savez(folder / "plain.npz", output1=arrays["output1"])
    assert run("diff", folder / "page.html", folder / "plain.npz")[0] == 1


def test_a_page_without_a_sound_trace_is_refused(folder: Path):
    text = (folder / "page.html").read_text("utf-8")
    trace = re.search('id="gpt2np-trace">(.*?)</script>', text, re.DOTALL)[1]
    broken = [
        text.replace('id="gpt2np-trace"', 'id="other"'), text.replace(trace, trace[:-9]), text.replace(trace, "[]"),
        text.replace(trace, '{"manifest":{"arrays":{"x":1}},"arrays":{"x":"AAAA"}}'),
        text.replace(trace, '{"manifest":{"arrays":{"x":{"dtype":"<f4","shape":[1]}}},"arrays":{"x":"A"}}'),
    ]  # fmt: skip
    for content in broken:
        (folder / "broken.html").write_text(content, "utf-8")
        code, said = run("diff", folder / "broken.html", folder / "same.npz")
        assert (code, "broken.html" in said) == (2, True), said


def test_the_report_lies_in_the_page_as_json(folder: Path):
    text = (folder / "page.html").read_text("utf-8")
    held = json.loads(re.search('id="gpt2np-report">(.*?)</script>', text, re.DOTALL)[1])
    assert held["verdict"] == "fail"
    assert held["diagnosis"]["tap"] == "h.2.mlp.gelu"
    assert len(held["taps"]["mini - erf"]) == 86


# ------------------------------------------------------------------------------------------- in a browser


@needs_chromium
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (400, 900)])
def test_the_first_screen_names_place_and_cause(folder: Path, tab: Page, width: int, height: int):
    script = """
const seen = e => {
  const b = e.getBoundingClientRect();
  return b.top >= 0 && b.bottom <= innerHeight && b.right <= innerWidth;
};
return Object.fromEntries(["p.verdict", "dd.where", "dd.why", "dd.who", "dd.next"].map(s => {
  const e = document.querySelector(s); return [s, [e.textContent, seen(e)]]; }));"""
    found = tab.open(folder / "page.html", width, height).run(script)
    assert all(shown for _, shown in found.values()), found
    assert "FAIL" in found["p.verdict"][0]
    assert "h.2.mlp.gelu" in found["dd.where"][0]
    assert "GELU by erf" in found["dd.why"][0]
    said = (folder / "said.txt").read_text()
    for text, _ in found.values():
        assert " ".join(text.removeprefix("✗").split()) in said
    assert tab.run("return document.documentElement.scrollWidth;") <= width
    assert [url for url in tab.asked if not url.startswith("file:")] == []


@needs_chromium
def test_every_picture_is_drawn_and_every_table_holds_its_numbers(folder: Path, tab: Page):
    marks = 'figure.querySelectorAll("path[aria-roledescription], text[aria-roledescription]").length'
    found = tab.open(folder / "page.html").pictures(f"[figure.rows.length, {marks}]")
    assert list(found) == ["drift", "heat", "ulps", "tokens"]
    assert all(drawn == "yes" and same for drawn, same, *_ in found.values()), found
    assert found["heat"][2] == 6 * 12  # six positions, twelve blocks of channels
    assert found["heat"][3] == 2 * 6 * 12  # a cell and its number each
    rows = tab.run("return document.querySelector('#drift').rows")
    held = json.loads(tab.run("return document.querySelector('#gpt2np-report').textContent"))["taps"]["mini - erf"]
    totals = {row["tap"]: row["rms"] for row in rows if row["error"] == "erf - mini"}
    assert totals == {row["tap"]: drawings.rounded(row["total"]) for row in held}


@needs_chromium
def test_a_click_and_the_keyboard_choose_a_tap(folder: Path, tab: Page):
    tab.open(folder / "page.html")
    state = "return [document.querySelector('#tap').value, document.querySelector('#tap-facts').innerText];"
    assert tab.run(state)[0] == "h.2.mlp.gelu"
    assert "ACTIVATIONS[w.activation]" in tab.run(state)[1]
    tab.click("#drift path[aria-label*='tap: h.4.attn.probs'][aria-roledescription=point]")
    tap, facts = tab.run(state)
    assert tap == "h.4.attn.probs"
    assert "softmax" in facts
    assert "/h.4/attn/Softmax (Softmax)" in facts
    assert tab.run("return document.querySelector('#heat').rows[0].column") == "head 0"
    tab.run("document.querySelector('#tap').focus()")
    tab.press("ArrowDown", 40)
    tab.run("await new Promise(done => setTimeout(done, 200))")
    assert tab.run(state)[0] == "h.4.attn.heads"
    tab.run("const k = document.querySelector('#kind'); k.value = 'local B'; k.dispatchEvent(new Event('change'));"
            "await new Promise(done => setTimeout(done, 200))")  # fmt: skip
    local = tab.run("return document.querySelector('#heat').rows.map(row => row.error)")
    assert max(local) < 1e-5


@needs_chromium
def test_text_is_text_whatever_is_in_it(tmp_path: Path, tab: Page):
    report = Report(NASTY, {NASTY: NASTY}, NASTY, findings=[NASTY])
    report.checks = [Check(f"batch {NASTY}", False, NASTY, party=NASTY, worst=1.0)]
    evidence = Evidence()
    evidence.begin(NASTY, "B", {})
    broken = seen("ln_f", (1, 5, 24))
    broken.b[0, 3, 7] = np.nan
    evidence.see(broken)
    none = [float("inf")] * 9
    report.rows[f"{NASTY} - B"] = [TapRow("ln_f", (1, 5, 24), *none[:3], (0, 3, 7), *none[:7], 1e-3, math.inf)]
    assert chosen(report, evidence) is evidence.pairs[0]
    (tmp_path / "n.html").write_text(report_page(report, evidence, NASTY, NASTY), "utf-8")
    found = tab.open(tmp_path / "n.html").run(
        "return [document.querySelector('h1').textContent, document.querySelectorAll('b').length,"
        "        document.querySelectorAll('figure').length, document.querySelector('#matrix').dataset.drawn]"
    )
    assert found == [NASTY, found[2], found[2], "yes"]
    assert "∞" in tab.run("return document.querySelector('#heat svg').textContent")
    assert tab.run("return document.querySelector('#worst tbody').rows[0].cells[4].textContent") == "inf"


@needs_chromium
def test_the_page_of_a_trace_shows_one_party_against_float64(folder: Path, tab: Page):
    tab.open(folder / "trace.html")
    kinds = tab.run("return [...new Set(document.querySelector('#drift').rows.map(row => row.error))]")
    assert kinds == ["ort-off - float64", "local ort-off", drawings.FLOOR]
    assert "PASS" in tab.run("return document.querySelector('.verdict').textContent")


@needs_chromium
def test_two_traces_have_a_page_too(folder: Path, tab: Page):
    words = ("diff", folder / "same.npz", folder / "erf.npz", "--html", folder / "traces.html")
    assert run(*words)[0] == 1
    tab.open(folder / "traces.html")
    assert tab.run("return document.querySelector('#tap').value") == "h.2.mlp.gelu"
    assert tab.run("return new Set(document.querySelector('#drift').rows.map(row => row.error)).size") == 1


@needs_chromium
@pytest.mark.skipif(not AXE.is_file(), reason="AXE_CORE does not name axe.min.js of the npm package axe-core")
@pytest.mark.parametrize("dark", [False, True])
def test_axe_finds_nothing_serious(folder: Path, tab: Page, dark: bool):
    tab.open(folder / "page.html", dark=dark)
    tab.call("Runtime.evaluate", expression=AXE.read_text("utf-8"))
    found = tab.run("return (await axe.run(document)).violations.map(v => [v.id, v.impact])")
    assert [name for name, impact in found if impact in ("serious", "critical")] == []


@needs_chromium
def test_everything_has_a_name_and_tables_that_scroll_take_the_focus(folder: Path, tab: Page):
    script = """
const named = e => e.ariaLabel || e.closest("label")?.textContent.trim() || e.textContent.trim() || e.title;
const wide = Array.from(document.querySelectorAll("main *")).filter(e => e.scrollWidth > e.clientWidth + 1
  && ["auto", "scroll"].includes(getComputedStyle(e).overflowX));
return {inputs: Array.from(document.querySelectorAll("select, input, summary, [tabindex], [role=region]"), named),
        wide: wide.map(e => e.tabIndex), language: document.documentElement.lang};"""
    found = tab.open(folder / "page.html", 400).run(script)
    assert all(found["inputs"])
    assert set(found["wide"]) == {0}
    assert found["language"] == "en"
