"""GPT-2's byte-level BPE: find it, load it, and turn tokens back into text one at a time.

The merging itself is the `tokenizers` library's, or `bpe.py`'s where that is not installed.
"""

from __future__ import annotations

import codecs
import json
import threading
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from .arguments import as_path
from .bpe import BPE, bytes_to_unicode
from .errors import InputError, TokenizerError, TokenRangeError
from .files import File

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
# Hugging Face's and OpenAI's names of the same two files.
VOCABULARIES = ("vocab.json", "encoder.json")
MERGES = ("merges.txt", "vocab.bpe")

HOW_TO_GET_ONE = (
    "give one with --tokenizer PATH (a tokenizer.json, or a folder with vocab.json or encoder.json and merges.txt "
    "or vocab.bpe), or put it beside the model; `gpt2np fetch tokenizer` downloads GPT-2's"
)

_switch = threading.Lock()  # held while a tokenizer's encode_special_tokens is not what its owner set


def load(path: str | Path) -> tokenizers.Tokenizer:
    """Load a tokenizer.

    Parameters
    ----------
    path : path
        A tokenizer.json; a folder with one; or a folder with vocab.json or encoder.json and merges.txt or
        vocab.bpe, which hold GPT-2's vocabulary and merges.

    Returns
    -------
    tokenizers.Tokenizer
        `tokenizer.encode(text).ids` and `tokenizer.decode(ids)`. The text "<|endoftext|>" is text like any
        other; after `tokenizer.encode_special_tokens = False` it is the special token (see also `encode`).

    Raises
    ------
    TokenizerError
        If nothing of the kind is there, or a file cannot be read.
    InputError
        If it is no path, or empty.
    """
    found = locate(as_path(path))
    if found is None:
        problem = "has no tokenizer in it" if Path(path).is_dir() else "is not a tokenizer.json or a folder with one"
        raise TokenizerError(f"{path} {problem}; {HOW_TO_GET_ONE}")
    for file in found:
        File(file, TokenizerError).check_size()
    try:
        tokenizer = _from_files(found)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exceptions, and its panics are not even those
        raise TokenizerError(f"cannot read {' and '.join(map(str, found))}: {error}") from error
    # A tokenizer.json may carry the limits of somebody's training run; they would cut texts in silence.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # as the text they are
    return tokenizer


def locate(path: str | Path) -> tuple[Path, ...] | None:
    """The files that `load(path)` reads: (tokenizer.json,), (vocabulary, merges), or None."""
    path = Path(path)
    if path.is_file():
        return (path,) if path.suffix == ".json" and path.name not in VOCABULARIES else None
    if (path / "tokenizer.json").is_file():
        return (path / "tokenizer.json",)
    vocabulary = next((path / name for name in VOCABULARIES if (path / name).is_file()), None)
    merges = next((path / name for name in MERGES if (path / name).is_file()), None)
    return (vocabulary, merges) if vocabulary and merges else None


def find_beside(model_path: str | Path) -> tokenizers.Tokenizer | None:
    """The tokenizer in the folder of a model's file (or in the folder given), or None where there is none."""
    folder = Path(model_path)
    folder = folder if folder.is_dir() else folder.parent
    return None if locate(folder) is None else load(folder)


def _from_files(found: tuple[Path, ...]) -> tokenizers.Tokenizer:
    try:
        import tokenizers
    except ModuleNotFoundError:
        return cast("tokenizers.Tokenizer", PlainTokenizer(_plain(found)))
    return tokenizers.Tokenizer.from_file(str(found[0])) if len(found) == 1 else _from_vocabulary(*found)


def _from_vocabulary(vocabulary: Path, merges: Path) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.BPE(*_read_vocabulary(vocabulary, merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if tokenizer.token_to_id(END_OF_TEXT) is not None:
        tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def _read_vocabulary(vocabulary: Path, merges: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token ids and merges; a byte-order mark, which editors on Windows write, is no part of the text."""
    lines = merges.read_text("utf-8-sig").split("\n")
    pairs = [tuple(line.rstrip("\r").split(" ")) for line in lines if line.strip() and not line.startswith("#version")]
    wrong = next((pair for pair in pairs if len(pair) != 2), None)
    if wrong:
        raise ValueError(f"{' '.join(wrong)!r} is not two tokens")
    return json.loads(vocabulary.read_text("utf-8-sig")), cast("list[tuple[str, str]]", pairs)


def _plain(found: tuple[Path, ...]) -> BPE:
    """The textbook's BPE from the same files; an error where a tokenizer.json is of another kind than GPT-2's."""
    if len(found) == 2:
        vocab, merges = _read_vocabulary(*found)
        return _sound(BPE(vocab, merges, {END_OF_TEXT} & set(vocab)))
    state = json.loads(found[0].read_text("utf-8-sig"))
    model, before, added = state["model"], state["pre_tokenizer"] or {}, state["added_tokens"]
    unusual = [
        key for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
        if model.get(key)
    ]  # fmt: skip
    unusual += [] if model.get("type", "BPE") == "BPE" and "merges" in model else ["model"]
    unusual += ["normalizer"] if state.get("normalizer") else []
    plain = before.get("type") == "ByteLevel" and not before.get("add_prefix_space") and before.get("use_regex", True)
    unusual += [] if plain else ["pre_tokenizer"]
    unusual += [
        t["content"] for t in added if not t["special"] or any(t.get(k) for k in ("single_word", "lstrip", "rstrip"))
    ]
    if unusual:
        raise TokenizerError(f"{', '.join(unusual)}: only the tokenizers package can do this; pip install tokenizers")
    vocab = model["vocab"] | {t["content"]: t["id"] for t in added}
    merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    return _sound(BPE(vocab, merges, [t["content"] for t in added]))


def _sound(made: BPE) -> BPE:
    for pair in made.ranks:
        if "".join(pair) not in made.vocab:
            raise TokenizerError(
                f"the merge of {pair[0]!r} and {pair[1]!r} gives a token that is not in the vocabulary"
            )
    return made


class PlainTokenizer:
    """`bpe.BPE` behind the methods of tokenizers.Tokenizer that gpt2np calls; see there."""

    encode_special_tokens = True

    def __init__(self, bpe: BPE) -> None:
        self.bpe = bpe

    def encode(self, text: str, add_special_tokens: bool = True) -> Any:
        return SimpleNamespace(ids=self.bpe.encode(text, special=not self.encode_special_tokens))

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        special = {self.bpe.vocab[token] for token in self.bpe.special} if skip_special_tokens else set()
        return self.bpe.decode(i for i in ids if i not in special)

    def token_to_id(self, token: str) -> int | None:
        return self.bpe.vocab.get(token)

    def id_to_token(self, index: int) -> str | None:
        return self.bpe.tokens.get(index)

    def get_vocab_size(self) -> int:
        return len(self.bpe.vocab)

    def get_added_tokens_decoder(self) -> dict[int, Any]:
        return {self.bpe.vocab[token]: SimpleNamespace(content=token) for token in self.bpe.special}

    def no_truncation(self) -> None:
        """There are no limits to take off."""

    no_padding = no_truncation


def encode(tokenizer: tokenizers.Tokenizer, text: str, special: bool = False) -> list[int]:
    """Text to token ids; with `special`, "<|endoftext|>" and its like in the text become those tokens.

    Raises
    ------
    InputError
        If `text` is no text, or holds half of a surrogate pair, which is not Unicode text.
    TokenizerError
        If the vocabulary has no token for one of the text's bytes (GPT-2's has all 256).
    """
    if not isinstance(text, str):
        raise InputError(f"expected a text, got {type(text).__name__}")
    try:
        raw = text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"text is not valid Unicode: {error}") from None
    missing = {byte for byte in set(raw) if tokenizer.token_to_id(bytes_to_unicode()[byte]) is None}
    if missing:  # tokenizers would leave such bytes out
        raise TokenizerError(f"the vocabulary has no token for the byte {min(missing):#04x}, which the text needs")
    with _switch:
        before = tokenizer.encode_special_tokens
        tokenizer.encode_special_tokens = not special
        try:
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        finally:
            tokenizer.encode_special_tokens = before
    return ids


def encode_for(vocab_size: int, tokenizer: tokenizers.Tokenizer, text: str, special: bool = False) -> list[int]:
    """`encode` for a model of this vocabulary.

    Raises
    ------
    TokenRangeError
        If it does not have one of the tokens.
    InputError, TokenizerError
        As `encode` does.
    """
    ids = encode(tokenizer, text, special)
    if ids and max(ids) >= vocab_size:
        raise TokenRangeError(
            f"the tokenizer gives token {max(ids)}, the model knows 0..{vocab_size - 1}: "
            "it is not this model's tokenizer"
        )
    return ids


def chosen_tokenizer(
    given: tokenizers.Tokenizer | None, beside: tokenizers.Tokenizer | None
) -> tokenizers.Tokenizer | None:
    """The tokenizer that a caller gave, by default the one beside the model; InputError if it is none."""
    if given is not None and not hasattr(given, "encode_special_tokens"):
        raise InputError(f"a tokenizer is what gpt2np.tokenizer.load gives, got {type(given).__name__}")
    return beside if given is None else given


def end_of_text_id(tokenizer: tokenizers.Tokenizer | None) -> int | None:
    """The id of "<|endoftext|>", or None."""
    found: int | None = None if tokenizer is None else tokenizer.token_to_id(END_OF_TEXT)
    return found


@cache
def _unicode_to_bytes() -> dict[str, int]:
    return {character: byte for byte, character in bytes_to_unicode().items()}


class StreamDecoder:
    """Tokens to text, one token at a time, in constant time for each.

    A token may end in the middle of a UTF-8 character; its bytes are held back until the character is
    complete. The pieces and `flush()` joined are the text of the whole, where bytes that can belong to no
    character are U+FFFD, as `tokenizer.decode(ids, skip_special_tokens=False)` has them.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes: dict[int, bytes] = {  # of added tokens, and of every token met so far
            index: token.content.encode() for index, token in tokenizer.get_added_tokens_decoder().items()
        }
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for; none for an id that the vocabulary does not have."""
        known = self._bytes.get(token_id)
        if known is not None:
            return known
        token = self._tokenizer.id_to_token(token_id) or ""
        alphabet = _unicode_to_bytes()
        try:
            found = self._bytes[token_id] = bytes([alphabet[character] for character in token])
        except KeyError:
            raise TokenizerError(
                f"token {token_id} {token!r} is not byte-level BPE, which GPT-2's tokens are"
            ) from None
        return found

    def push(self, token_id: int) -> str:
        """The text that has become complete with this token."""
        return self._utf8.decode(self.token_bytes(token_id))

    def flush(self) -> str:
        """What was held back, as U+FFFD; the decoder is then as new."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def decode(tokenizer: tokenizers.Tokenizer, ids: Iterable[int]) -> str:
    """Token ids to text, special tokens included; InputError for what can be no token id."""
    try:
        text: str = tokenizer.decode(list(ids), skip_special_tokens=False)
    except (TypeError, OverflowError) as error:
        raise InputError(f"expected token ids, got {ids!r:.60}: {error}") from None
    return text
