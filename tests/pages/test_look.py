"""Pictures: their numbers are the trace's, their functions can be read, and their page works in a browser."""

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import gpt2np
from browser import Page, chromium, needs_chromium
from gpt2np.cli import app
from gpt2np.errors import ContextOverflowError, InputError, TokenizerError

pytest.importorskip("altair", reason="the extra [html] is not installed")
pytest.importorskip("vl_convert", reason="the extra [html] is not installed")
from gpt2np import html, pictures


@pytest.fixture(scope="module")
def tab():
    with chromium() as page:
        yield page


NASTY = "</script><b>bold</b> <!-- \"quoted\" &amp; 'single'\n\u2028☺"


@pytest.fixture(scope="module")
def model():
    return gpt2np.load(engine="numpy")


@pytest.fixture(scope="module")
def reading(model):
    return pictures.read(model, "Once upon a time there was a little girl")


@pytest.fixture(scope="module")
def made(reading):
    return {picture.name: picture for picture in (make(reading) for make in pictures.PICTURES)}


def test_each_picture_is_made_by_a_function_that_can_be_read():
    for make in pictures.PICTURES:
        assert make.__doc__
        assert len(inspect.getsource(make).splitlines()) <= 48, make.__name__


def test_the_numbers_of_attention_are_the_traces(reading, made):
    rows = made["attention"].rows
    T, labels = len(reading.ids), reading.labels
    assert len(rows) == 6 * 6 * T * (T + 1) // 2
    for row in rows[::17]:
        i, j = labels.index(row["query"]), labels.index(row["key"])
        expected = reading.taps[f"h.{row['layer']}.attn.probs"][0, row["head"], i, j]
        assert row["probability"] == pytest.approx(expected, rel=1e-3)


def test_the_last_row_of_the_logit_lens_is_the_models_answer(reading, made):
    top = [row for row in made["logit_lens"].rows if row["after"] == "h.5"]
    best = reading.taps["logits"][0].argmax(axis=-1)
    assert [row["says next"] for row in top] == [pictures.show(reading.model, int(i)) for i in best]


def test_the_logit_lens_names_what_comes_next_in_rank(reading, made):
    row = [row for row in made["logit_lens"].rows if row["after"] == "h.5"][-1]
    best = np.argsort(-reading.taps["logits"][0, -1])[:4]
    names = [row["says next"], *(text.rpartition(" ")[0] for text in row["then"].split(", "))]
    assert [name for name in names if name] == [pictures.show(reading.model, int(i)) for i in best]


def test_the_groups_of_the_next_token_carry_what_is_left_of_the_probability(reading, made):
    rows = made["next_token"].rows
    scores = reading.taps["logits"][0, -1].astype(np.float64)
    assert sum(row["tokens"] for row in rows) == len(scores)
    total = sum(row["tokens"] * np.exp(row["logit"]) for row in rows)
    assert total == pytest.approx(np.exp(scores).sum(), rel=1e-4)


def test_the_residual_stream_is_the_traces(reading, made):
    last = [row for row in made["residual"].rows if row["place"] == "h.5.mlp" and row["what"] == "the stream"][-1]
    assert last["norm"] == pytest.approx(np.linalg.norm(reading.taps["h.5.resid_post"][0, -1]), rel=1e-3)


def test_the_flow_names_every_tap_of_a_layer(reading, made):
    taps = [tap for tap in reading.taps if tap.startswith("h.0.") or not tap.startswith("h.")]
    assert [row["tap"] for row in made["flow"].rows] == taps
    assert [row["shape"] for row in made["flow"].rows] == [str(reading.taps[tap].shape) for tap in taps]


def test_similar_is_1_on_the_diagonal(made):
    for name in ("similar_tokens", "similar_positions"):
        assert all(row["cosine"] == 1 for row in made[name].rows if row["one"] == row["other"])


def test_a_text_that_cannot_be_read_is_a_clear_error(model):
    with pytest.raises(InputError, match="empty"):
        pictures.read(model, "")
    with pytest.raises(ContextOverflowError):
        pictures.read(model, "one " * 300)
    mute = gpt2np.GPT2(model.config, model.recognised.sources, "numpy")
    with pytest.raises(TokenizerError):
        pictures.read(mute, "one")


def test_the_flow_of_a_layer_that_is_not_there_is_an_error(reading):
    with pytest.raises(InputError, match="layer must be one of 0, 1, 2, 3, 4, 5, got 6"):
        pictures.flow(reading, layer=6)


def test_a_picture_is_written_alone(made, tmp_path: Path):
    for suffix in ("svg", "png"):
        made["residual"].save(str(tmp_path / f"r.{suffix}"))
    assert "<svg" in (tmp_path / "r.svg").read_text("utf-8")
    assert "currentColor" not in (tmp_path / "r.svg").read_text("utf-8")
    with pytest.raises(InputError, match=r"\.svg or \.png"):
        made["residual"].save(tmp_path / "r.pdf")


def test_a_notebook_gets_the_specification_and_a_page_of_its_own(made):
    bundle = made["flow"]._repr_mimebundle_()
    assert any("vegalite" in kind for kind in bundle)
    assert "The numbers" in bundle["text/html"]
    json.dumps(bundle)


def look(folder: Path, text: str) -> Path:
    page = folder / "look.html"
    done = CliRunner().invoke(app, ["look", text, "-o", str(page)])
    assert done.exit_code == 0, done.output
    return page


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return look(tmp_path_factory.mktemp("look"), "Once upon a time")


def test_one_file_that_fetches_nothing(page: Path):
    text = page.read_text("utf-8")
    assert len(text) < 700_000
    assert html.POLICY in text
    for fetch in ('src="http', 'href="http', "@import", "url(http"):
        assert fetch not in text


@needs_chromium
def test_every_picture_is_drawn_and_every_table_holds_its_numbers(page: Path, tab: Page):
    rows = 'JSON.parse(figure.querySelector("script").textContent).datasets.rows'
    found = tab.open(page).pictures('[figure.querySelectorAll("svg path").length > 8]', rows)
    assert list(found) == [make.__name__ for make in pictures.PICTURES]
    assert all(rest == ["yes", True, True] for rest in found.values()), found


@needs_chromium
def test_clicks_choices_and_sliders_do_what_they_say(page: Path, tab: Page):
    script = """
const wait = () => new Promise(done => setTimeout(done, 100));
const set = (input, value) => { input.value = value; input.dispatchEvent(new Event("input", {bubbles: true}));
                                input.dispatchEvent(new Event("change", {bubbles: true})); };
const attention = document.querySelector("#attention"), next = document.querySelector("#next_token");
const [head, layer] = attention.querySelectorAll("select");
const drawn = () => Array.from(attention.querySelectorAll("path[aria-label*='probability']"), p => p.outerHTML).join();
const first = drawn();
set(head, "3"); await wait();
const second = drawn();
const cell = Array.from(attention.querySelectorAll("path[aria-label]")).find(
  p => /layer: 4/.test(p.getAttribute("aria-label")) && /head: 2/.test(p.getAttribute("aria-label")));
const box = cell.getBoundingClientRect();
for (const kind of ["mousedown", "mouseup", "click"])
  cell.dispatchEvent(new MouseEvent(kind, {bubbles: true, clientX: box.x + 2, clientY: box.y + 2, view: window}));
await wait();
const chosen = [head.value, layer.value];
const [temperature, topk] = next.querySelectorAll("input[type=range]");
const bars = () => Array.from(next.querySelectorAll("path[aria-roledescription=bar]"),
                              p => p.getAttribute("aria-label")).sort();
const warm = bars(); set(temperature, "0.5"); await wait(); const cold = bars();
set(topk, "1"); await wait();
return {changed: first !== second, chosen, cooled: warm.join() !== cold.join(), greedy: bars()};"""
    found = tab.open(page).run(script)
    assert found["changed"]
    assert found["chosen"] == ["2", "4"]
    assert found["cooled"]
    assert sum("100.00%" in bar or "probability: 1" in bar for bar in found["greedy"]) == 1


@needs_chromium
@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_wider_than_the_screen(page: Path, tab: Page, width: int):
    tab.open(page, width)
    assert tab.run("return document.documentElement.scrollWidth;") <= width


@needs_chromium
def test_text_is_text_whatever_is_in_it(tmp_path: Path, tab: Page):
    page = look(tmp_path, NASTY)
    found = tab.open(page).run(
        "return [document.querySelector('h1').textContent, document.querySelectorAll('b').length];"
    )
    assert found == [NASTY, len(pictures.PICTURES)]


@needs_chromium
def test_what_the_mouse_can_reach_the_keyboard_can_and_everything_has_a_name(page: Path, tab: Page):
    script = """
const named = e => e.ariaLabel || e.closest("label")?.textContent.trim() || e.textContent.trim() || e.title;
return {
  inputs: Array.from(document.querySelectorAll("select, input, summary, [tabindex], [role=region]"), named),
  language: document.documentElement.lang,
  drawings: Array.from(document.querySelectorAll("[role=graphics-document]"), s => s.ariaLabel),
  colour: getComputedStyle(document.querySelector("svg.marks text")).fill === getComputedStyle(document.body).color,
};"""
    found = tab.open(page).run(script)
    assert found["language"] == "en"
    assert found["colour"]
    assert all(found["inputs"])
    assert [len(text) > 40 for text in found["drawings"]] == [True] * len(pictures.PICTURES)
