"""GPT-2's byte-level BPE in plain Python: text to token ids and back.

Text is cut into words (`split`); a word is written as its bytes, each as one printable character
(`bytes_to_unicode`); the pair of neighbours that was learned first is joined, again and again (`merge`); what is
left are the tokens. Nothing is ever unknown, because every byte is a token.

The twin of the `tokenizers` library, which is faster; gpt2np uses this one where that is not installed.
Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units"; Radford et al. 2019, section
2.2, for the bytes; the pattern of `split` is OpenAI's, from encoder.py.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import pairwise

# What Unicode calls white space. Python's own \s has four control characters more.
SPACES = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B))))
# 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+  over the stand-ins of `kind`
WORD = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[a-z]+| ?0+| ?['.]+|[ \n]+(?![^ \n])|[ \n]+")


def kind(character: str) -> str:
    """A stand-in that says what a character is: a letter, 0 a number, space or line end, or . anything else.

    The apostrophe and the letters that may follow it in "it's" or "we'll" stand for themselves.
    """
    if character in SPACES:
        return " " if character == " " else "\n"
    if character in "'stremvld":
        return character
    return {"L": "a", "N": "0"}.get(unicodedata.category(character)[0], ".")


def split(text: str) -> list[str]:
    """Cut a text into words, numbers, punctuation and spaces; a space goes with the word after it."""
    return [text[word.start() : word.end()] for word in WORD.finditer("".join(map(kind, text)))]


@cache
def bytes_to_unicode() -> dict[int, str]:
    """A printable character for each of the 256 bytes: itself where Latin-1 prints it, else one from 256 up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def merge(word: str, ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Join neighbours until no pair of them is in the list of merges; `ranks` says which pair was learned first."""
    parts = list(word)
    while len(parts) > 1:
        pairs = [ranks.get(pair, math.inf) for pair in pairwise(parts)]
        first = min(range(len(pairs)), key=pairs.__getitem__)  # the lowest rank; of equal ones the leftmost
        if pairs[first] == math.inf:
            break
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts


class BPE:
    """A vocabulary {token: id} with its merges, in the order in which they were learned.

    `special` are tokens that stand for themselves, as "<|endoftext|>"; `encode` finds them only when asked to.
    """

    def __init__(self, vocab: Mapping[str, int], merges: Iterable[Sequence[str]], special: Iterable[str] = ()) -> None:
        self.vocab, self.special = dict(vocab), frozenset(special)
        self.ranks = {(left, right): rank for rank, (left, right) in enumerate(merges)}
        self.tokens = {index: token for token, index in self.vocab.items()}
        self.byte_of = {character: byte for byte, character in bytes_to_unicode().items()}

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Text to token ids. KeyError for a byte that the vocabulary does not have (GPT-2's has all 256)."""
        if special and self.special:
            pieces = re.split(f"({'|'.join(map(re.escape, sorted(self.special, key=len, reverse=True)))})", text)
        else:
            pieces = [text]
        ids = []
        for piece in pieces:
            if special and piece in self.special:
                ids.append(self.vocab[piece])
                continue
            for word in split(piece):
                letters = "".join(bytes_to_unicode()[byte] for byte in word.encode())
                ids += [self.vocab[token] for token in merge(letters, self.ranks)]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Token ids to text; bytes that make up no character become U+FFFD, unknown ids nothing."""
        raw = b""
        for token in (self.tokens.get(index, "") for index in ids):
            raw += token.encode() if token in self.special else bytes(map(self.byte_of.__getitem__, token))
        return raw.decode("utf-8", "replace")
