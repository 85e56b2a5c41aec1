"""The plain-Python BPE is the twin of the `tokenizers` library."""

import json
import unicodedata
from pathlib import Path

import pytest
from conftest import ROOT, SHARED
from hypothesis import given
from hypothesis import strategies as st

from gpt2np import tokenizer as tok
from gpt2np.bpe import BPE, SPACES, bytes_to_unicode, kind, merge, split
from gpt2np.errors import TokenizerError
from toy_tokenizer import save_as_gpt2_files, train

TOY = train()
GPT2_FILES = SHARED / "gpt2_bpe"
# What the splitting looks at, and anything else. Unassigned characters may be letters in a newer Unicode.
texts = st.text(
    st.one_of(
        st.sampled_from(" \n\t'stremvldXYZ09.,!\u00a0\u2003é一٣½🙂\x1c\x85\u200d\u0301"),
        st.characters(exclude_categories=["Cs", "Cn"]),
    )
)


def plain(folder: Path) -> BPE:
    found = tok.locate(folder)
    assert found is not None
    return tok._plain(found)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> BPE:
    folder = tmp_path_factory.mktemp("toy")
    TOY.save(str(folder / "tokenizer.json"))
    return plain(folder)


MINI = plain(ROOT / "weights" / "mini")
MINI_TWIN = tok.load(ROOT / "weights" / "mini")


@pytest.mark.skipif(not GPT2_FILES.is_dir(), reason="GPT-2's vocabulary is not on this machine")
def test_every_published_case():
    gpt2 = plain(GPT2_FILES)
    for case in json.loads((GPT2_FILES / "cases.json").read_text("utf-8")):
        assert gpt2.encode(case["text"]) == case["ids"], case
        assert gpt2.decode(case["ids"]) == case["text"]


@given(texts)
def test_any_text_is_cut_and_merged_as_the_library_does(text):
    for special in (False, True):
        written = f"{text}{tok.END_OF_TEXT}{text}"
        ids = MINI.encode(written, special)
        assert ids == tok.encode(MINI_TWIN, written, special)
        assert MINI.decode(ids) == written


@given(st.lists(st.integers(0, 2060), max_size=40))
def test_any_ids_are_decoded_as_the_library_does(ids):
    assert MINI.decode(ids) == tok.decode(MINI_TWIN, ids)


def test_every_character_is_of_the_kind_that_the_library_takes_it_for():
    """Between two letters and two digits a letter, a number, a space and anything else are cut differently."""
    from tokenizers.pre_tokenizers import ByteLevel

    cut = ByteLevel(add_prefix_space=False)
    for code in range(0x110000):
        character = chr(code)
        if unicodedata.category(character) in ("Cs", "Cn") or (0x3400 < code < 0xD7A0 and code % 97):
            continue  # surrogates, unassigned; of the many ideographs some
        text = f"a{character}1 {character}a"
        there = [text[start:end] for _, (start, end) in cut.pre_tokenize_str(text)]
        assert split(text) == there, hex(code)


def test_spaces_are_unicodes_white_space():
    assert {c for c in map(chr, range(0x3100)) if c.isspace()} - SPACES == set("\x1c\x1d\x1e\x1f")
    assert kind("\x1c") == "."


def test_the_pair_that_was_learned_first_is_joined_first():
    ranks = {("b", "c"): 0, ("a", "b"): 1, ("a", "bc"): 2}
    assert merge("abcab", ranks) == ["abc", "ab"]
    assert merge("aaaaa", {("a", "a"): 0}) == ["aa", "aa", "a"]
    assert merge("", ranks) == []


def test_a_byte_is_one_printable_character():
    table = bytes_to_unicode()
    assert len(set(table.values())) == 256
    assert all(c.isprintable() and not c.isspace() for c in table.values())


def test_every_way_of_storing_it_is_read(tmp_path: Path, toy: BPE):
    text = "Once upon a time, 12 naïve 🙂s said:\n\n  'we'll see'<|endoftext|>"
    expected = tok.encode(TOY, text)
    assert toy.encode(text) == expected
    for vocabulary, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        save_as_gpt2_files(TOY, tmp_path / vocabulary, vocabulary, merges)
        made = plain(tmp_path / vocabulary)
        assert made.encode(text) == expected
        assert made.encode(text, special=True) == tok.encode(TOY, text, special=True)


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"model": {"dropout": 0.5}},
        {"model": {"vocab": {"a": 0}}},
    ],
)
def test_what_only_the_library_can_do_is_refused(tmp_path: Path, change):
    state = json.loads(TOY.to_str())
    for key, value in change.items():
        state[key] = {**state[key], **value} if key == "model" else value
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(TokenizerError):
        plain(tmp_path)
