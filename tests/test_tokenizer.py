"""The tokenizer: GPT-2's own cases where its vocabulary is present, a small BPE trained here everywhere."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, SHARED
from hypothesis import given
from hypothesis import strategies as st

from gpt2np import tokenizer as tok
from gpt2np.bpe import bytes_to_unicode
from gpt2np.errors import InputError, TokenizerError
from toy_tokenizer import save_as_gpt2_files, train

TOY = train()
texts = st.text(st.characters(exclude_categories=["Cs"]))
# ids of the toy, and two that it does not have
ids = st.lists(st.integers(0, TOY.get_vocab_size() + 1), max_size=40)

GPT2_FILES = SHARED / "gpt2_bpe"
with_gpt2 = pytest.mark.skipif(not GPT2_FILES.is_dir(), reason="GPT-2's vocabulary is not on this machine")


@with_gpt2
def test_every_published_case():
    gpt2 = tok.load(GPT2_FILES)
    cases = json.loads((GPT2_FILES / "cases.json").read_text("utf-8"))
    assert len(cases) >= 100
    for case in cases:
        assert tok.encode(gpt2, case["text"]) == case["ids"] == gpt2.encode(case["text"]).ids, case
        assert tok.decode(gpt2, case["ids"]) == case["text"]


@with_gpt2
@given(texts)
def test_gpt2_gives_any_text_back(text):
    gpt2 = _gpt2()
    encoded = gpt2.encode(text).ids
    assert gpt2.decode(encoded) == text
    assert _streamed(gpt2, encoded) == text


def _gpt2(loaded=[]):  # noqa: B006 - loaded once, and only where the files are
    if not loaded:
        loaded.append(tok.load(GPT2_FILES))
    return loaded[0]


@given(texts)
def test_any_text_comes_back(text):
    encoded = tok.encode(TOY, text)
    assert tok.decode(TOY, encoded) == text
    assert TOY.decode(encoded) == text
    assert _streamed(TOY, encoded) == text


@given(texts)
def test_special_tokens_come_only_when_asked(text):
    written = f"{text}{tok.END_OF_TEXT}{text}"
    end = tok.end_of_text_id(TOY)
    assert end not in tok.encode(TOY, written)
    assert tok.decode(TOY, tok.encode(TOY, written)) == written
    assert tok.encode(TOY, written, special=True) == [*tok.encode(TOY, text), end, *tok.encode(TOY, text)]
    assert TOY.encode_special_tokens  # asking once changes nothing for the next call


@given(ids)
def test_streaming_any_tokens_gives_the_text_of_the_whole(token_ids):
    assert _streamed(TOY, token_ids) == TOY.decode(token_ids, skip_special_tokens=False)


@given(ids)
def test_a_piece_is_never_taken_back(token_ids):
    """Every prefix of the stream is a prefix of the text, whatever comes later."""
    decoder = tok.StreamDecoder(TOY)
    shown = "".join(decoder.push(i) for i in token_ids)
    whole = shown + decoder.flush()
    assert TOY.decode(token_ids, skip_special_tokens=False) == whole
    for more in ("é", "a"):
        longer = [*token_ids, *tok.encode(TOY, more)]
        assert TOY.decode(longer, skip_special_tokens=False).startswith(shown)


def test_an_incomplete_character_is_held_back():
    decoder = tok.StreamDecoder(TOY)
    byte_tokens = [TOY.token_to_id(bytes_to_unicode()[b]) for b in "é🙂".encode()]
    assert [decoder.push(i) for i in byte_tokens] == ["", "é", "", "", "", "🙂"]
    assert decoder.flush() == ""
    assert decoder.push(byte_tokens[2]) == ""
    assert decoder.flush() == "�"
    assert decoder.push(byte_tokens[0]) == ""  # as new after a flush
    assert decoder.push(byte_tokens[1]) == "é"


def test_the_byte_alphabet_is_that_of_the_library():
    from tokenizers.pre_tokenizers import ByteLevel

    assert sorted(bytes_to_unicode().values()) == sorted(ByteLevel.alphabet())
    for byte, character in bytes_to_unicode().items():
        assert tok.StreamDecoder(TOY).token_bytes(TOY.token_to_id(character)) == bytes([byte])


def test_json_and_both_spellings_of_the_two_files_are_one_tokenizer(tmp_path: Path):
    text = "Once upon a time, 12 naïve 🙂s said:\n\n  'we'll see'<|endoftext|>"
    expected = tok.encode(TOY, text)
    TOY.save(str(tmp_path / "tokenizer.json"))
    assert tok.encode(tok.load(tmp_path), text) == expected
    assert tok.encode(tok.load(tmp_path / "tokenizer.json"), text) == expected
    for vocabulary, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        folder = tmp_path / vocabulary
        save_as_gpt2_files(TOY, folder, vocabulary, merges)
        loaded = tok.load(folder)
        assert tok.encode(loaded, text) == expected
        assert tok.end_of_text_id(loaded) == tok.end_of_text_id(TOY)
        assert tok.encode(loaded, text, special=True) == tok.encode(TOY, text, special=True)


def test_limits_written_into_a_tokenizer_json_do_not_cut(tmp_path: Path):
    limited = train()
    limited.enable_truncation(4)
    limited.enable_padding(length=8)
    limited.save(str(tmp_path / "tokenizer.json"))
    text = "many more words than four tokens can hold"
    assert tok.load(tmp_path).encode(text).ids == tok.encode(TOY, text)


def test_found_beside_a_model(tmp_path: Path):
    model = tmp_path / "model.onnx"
    model.touch()
    assert tok.find_beside(model) is None
    save_as_gpt2_files(TOY, tmp_path, "vocab.json", "merges.txt")
    for place in (model, tmp_path):
        found = tok.find_beside(place)
        assert found is not None
        assert tok.encode(found, "time") == tok.encode(TOY, "time")


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"vocab.json": "{}"},
        {"tokenizer.json": "not json"},
        {"tokenizer.json": '{"version": "1.0"}'},
        {"vocab.json": "[1, 2]", "merges.txt": ""},
        {"vocab.json": '{"a": 0}', "merges.txt": "#version: 0.2\na b c d\n"},
    ],
)
def test_what_cannot_be_loaded_is_a_clear_error(tmp_path: Path, files):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(TokenizerError, match=str(tmp_path)):
        tok.load(tmp_path)


def test_a_missing_path_says_what_to_do(tmp_path: Path):
    with pytest.raises(TokenizerError, match=r"--tokenizer PATH.*gpt2np fetch"):
        tok.load(tmp_path / "nowhere")


def test_text_that_cannot_be_encoded_is_a_clear_error(tmp_path: Path):
    with pytest.raises(InputError, match="not valid Unicode"):
        tok.encode(TOY, "\ud83d")
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    two_letters = tok.load(tmp_path)
    assert tok.encode(two_letters, "abba") == [2, 1, 0]
    with pytest.raises(TokenizerError, match="byte 0x63"):
        tok.encode(two_letters, "abc")


def test_tokens_that_are_not_byte_level_are_a_clear_error():
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"日本": 0}, unk_token="日本"))
    with pytest.raises(TokenizerError, match="not byte-level"):
        tok.StreamDecoder(words).push(0)


def _streamed(tokenizer, token_ids):
    decoder = tok.StreamDecoder(tokenizer)
    return "".join(decoder.push(i) for i in token_ids) + decoder.flush()


@pytest.mark.parametrize("mark", ["vocab.json", "merges.txt"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, mark):
    model = json.loads((ROOT / "weights/mini/tokenizer.json").read_text("utf-8"))["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    texts = {"vocab.json": json.dumps(model["vocab"]), "merges.txt": "\r\n".join(["#version: 0.2", *merges, ""])}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, "utf-8-sig" if name == mark else "utf-8", newline="")
    text = "Once upon a time, there was a dog"
    expected = tok.encode(tok.load(ROOT / "weights/mini"), text)
    assert tok.encode(tok.load(tmp_path), text) == expected


def test_encoding_in_many_threads_leaves_the_special_token_switch_as_it_was():
    shared = tok.load(ROOT / "weights/mini")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: tok.encode(shared, "a<|endoftext|>b" * 20, special=bool(i % 2)), range(400)))
    assert shared.encode_special_tokens
    assert all(found[i] == found[i % 2] for i in range(400))
    assert found[0] != found[1]
