"""Clean the texts, train the tokenizer, and write the training and validation tokens.

    python prepare.py TEXTS OUT

TEXTS is a folder with three plain-text files (README.md's model card says where each comes from):
  tinystories_train.txt   stories separated by <|endoftext|>
  tinystories_val.txt     stories one after the other, paragraphs separated by blank lines
  fairytales_all.txt      Project Gutenberg's books one after the other, one paragraph a line
OUT receives tokenizer.json and {stories,tales}_{train,val}.npy: uint16 token ids, <|endoftext|> before every text.
"""

import re
import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXTS = ("tinystories_train.txt", "tinystories_val.txt", "fairytales_all.txt")
VOCABULARY = 2048
END = "<|endoftext|>"

# Where each book that is used begins (the first line of its first tale) and where it is left; what stands between two
# books (title pages, tables of contents, prefaces, notes, glossaries) is dropped, and so are whole books whose prose is
# scholarly, archaic or verse. Anchors are whole lines; each is looked for after the one before it.
BOOKS = [
    ("THE FOX AND THE GRAPES@3", "ILLUSTRATIONS"),  # Aesop's Fables, tr. V. S. Vernon Jones
    ("THE GOLDEN BIRD", "The Brothers Grimm, Jacob (1785-1863)*"),  # Grimms' Fairy Tales, tr. Taylor and Edwardes
    ("1 The Frog-King, or Iron Henry", "ENGLISH FAIRY TALES"),  # Household Tales, tr. Margaret Hunt
    ("TOM TIT TOT", "OYEZ-OYEZ-OYEZ"),  # English Fairy Tales, Joseph Jacobs
    ("* * * * *", "Notes and References"),  # Indian Fairy Tales, Joseph Jacobs
    ("THE BRONZE RING", "THE YELLOW FAIRY BOOK"),  # The Blue Fairy Book, Andrew Lang
    ("THE CAT AND THE MOUSE IN PARTNERSHIP", "THE TALES OF MOTHER GOOSE*"),  # The Yellow Fairy Book, Andrew Lang
    ("CINDERELLA, OR THE LITTLE GLASS SLIPPER.", "NOTE."),  # The Tales of Mother Goose, tr. Charles Welsh
    ("Little Red Riding-Hood", "Uniform with this Volume"),  # The Fairy Tales of Charles Perrault, ill. Harry Clarke
    ("THE TINDER-BOX", "ALICE'S ADVENTURES IN WONDERLAND"),  # Hans Christian Andersen's tales
    ("CHAPTER I", "THE END*"),  # Alice's Adventures in Wonderland, Lewis Carroll
    ("Dorothy lived in the midst of the great Kansas*", ""),  # The Wonderful Wizard of Oz, L. Frank Baum
]

OPENING = re.compile(
    r"Once upon a time|Once,? there|There once|There was once|Long ago|One (sunny )?day, (a|an|there|two)\b"
    r"|[A-Z]\w+ and ([A-Z]\w+|(his|her) \w+) (were|are|liked?|loved?|went|had)\b"
    r"|[A-Z]\w+ (liked|likes|loved|loves|was a|is a)\b"
)
TITLE = re.compile(r"(CHAPTER|PART|BOOK) [IVXLC\d]+\b|[IVXLC\d]+\.?$|\d+\.? [A-Z]")
NOTE = re.compile(r"\(\d+\)|\[\d+\]|\[[A-Z*]\]|\[Illustration[^\]]*\]|\[Transcriber[^\]]*\]|\[Footnote[^\]]*\]")


def tidy(paragraph: str) -> str:
    """One paragraph on one line, speech in straight double quotes, no note marks, no marks of emphasis."""
    paragraph = NOTE.sub("", paragraph).replace("``", '"').replace("`", "'").replace("_", "").replace("--", " - ")
    if '"' not in paragraph:  # 'speech' in single quotes: at the start of a word, or after a stop
        paragraph = re.sub(r"(?<!\w)'(?=\w)(?!(tis|twas|em|twill)\b)|(?<=[.,!?;-])'(?!\w)", '"', paragraph)
    return re.sub(r"\s+", " ", paragraph).strip()


def stories(train: str, val: str) -> list[str]:
    """TinyStories, one string a story, one line a paragraph; texts damaged by a lost encoding are left out."""
    texts = train.split(END)[:-1]  # what follows the last mark is cut off in the middle
    current: list[str] = []
    for paragraph in re.split(r"\n\s*\n", val)[1:]:  # the first one begins in the middle
        # this file has no marks: a story ends where a paragraph opens another one
        if OPENING.match(paragraph.strip()) and sum(map(len, current)) > 400:
            texts.append("\n".join(current))
            current = []
        current.append(paragraph)
    texts.append("\n".join(current))
    damaged = re.compile(r"TM|\b(dont|didnt|wasnt|cant|couldnt|isnt|Im|aI|aThe)\b|[$/{}=<>|]")
    kept = {}
    for text in texts:
        text = "\n".join(filter(None, map(tidy, text.splitlines())))
        if 200 < len(text) < 3000 and not damaged.search(text):
            kept.setdefault(text[:120], text)  # the first of those that open alike
    return list(kept.values())


def book(lines: list[str], begin: str, end: str, at: int) -> tuple[list[str], int]:
    """The lines of one book, searched from line `at`, and the line where the search for the next goes on."""

    def find(anchor: str, start: int) -> int:
        anchor, _, nth = anchor.partition("@")
        for i in range(start, len(lines)):
            if lines[i].startswith(anchor[:-1]) if anchor.endswith("*") else lines[i] == anchor.strip():
                nth = str(int(nth or 1) - 1)
                if nth == "0":
                    return i
        raise SystemExit(f"fairytales_all.txt: no line {anchor!r} after line {start + 1}")

    first = find(begin, at)
    last = find(end, first) if end else len(lines)
    return lines[first:last], last


def is_title(line: str) -> bool:
    words = line.split()
    capitals = sum(word[0].isupper() for word in words)
    spoken = line[-1] in "\"'!?,;:-" or "." in line[:-1] or (line[-1] == "." and capitals < len(words))
    return bool(line.isupper() or TITLE.match(line) or (2 * capitals > len(words) and len(words) < 10 and not spoken))


def tales(text: str) -> list[str]:
    """The fairy tales, one string a tale, one line a paragraph, titles left out."""
    lines = [line.strip() for line in text.split("\n")]
    found, at = [], 0
    for begin, end in BOOKS:
        body, at = book(lines, begin, end, at)
        current: list[str] = []
        for line in map(tidy, body):
            if line and is_title(line):
                found.append(current)
                current = []
            # catalogues, verse and play-scripts are short on full stops or letters
            elif line and line[0] not in "[*" and line[-1] in ".!?\"':;,-)":
                current.append(line)
        found.append(current)
    return [joined for tale in found if len(joined := "\n".join(tale)) > 300]


def main(texts: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    train, val, books = ((texts / name).read_text("utf-8") for name in TEXTS)
    sources = {"stories": stories(train, val), "tales": tales(books)}
    parts = {}
    for name, documents in sources.items():
        order = np.random.default_rng(0).permutation(len(documents))
        held_out = max(1, len(documents) // 20)
        parts[name + "_val"] = [documents[i] for i in order[:held_out]]
        parts[name + "_train"] = [documents[i] for i in order[held_out:]]

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # GPT-2's own pre-tokenisation
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    # the stories count double: their words are the ones that a reader will type
    tokenizer.train_from_iterator(parts["stories_train"] * 2 + parts["tales_train"], trainer)
    tokenizer.save(str(out / "tokenizer.json"))

    for name, documents in parts.items():
        ids = [np.array([tokenizer.token_to_id(END), *e.ids], np.uint16) for e in tokenizer.encode_batch(documents)]
        np.save(out / f"{name}.npy", np.concatenate(ids))
        (out / f"{name}.txt").write_text(END.join(documents), encoding="utf-8")
        size = sum(len(d.encode()) for d in documents)
        tokens = sum(map(len, ids))
        print(f"{name}: {len(documents)} texts, {size} bytes, {tokens} tokens, {size / tokens:.2f} bytes per token")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
