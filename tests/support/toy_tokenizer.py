"""A small byte-level BPE, trained in memory on a few sentences."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SENTENCES = [
    "Once upon a time there was a little girl who lived in a house by the sea.",
    "She said: 'we'll see what the time is!' and it was 12 o'clock — naïve, déjà vu, Übung.",
    "The king and the queen had a son and a daughter; the son was little and the daughter was tall.",
]


def train(vocab_size: int = 320) -> Tokenizer:
    """256 bytes, merges from SENTENCES, and <|endoftext|> as the last token, as in GPT-2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.encode_special_tokens = True
    return tokenizer


def save_as_gpt2_files(tokenizer: Tokenizer, folder: Path, vocabulary: str, merges: str) -> None:
    """Write the two files that GPT-2's tokenizer is published as."""
    folder.mkdir(parents=True, exist_ok=True)
    state = json.loads(tokenizer.to_str())
    (folder / vocabulary).write_text(json.dumps(tokenizer.get_vocab(with_added_tokens=True)))
    lines = [" ".join(pair) for pair in state["model"]["merges"]]
    (folder / merges).write_text("\n".join(["#version: 0.2", *lines, ""]), "utf-8")
