"""Files beside a model, changed at random, are read or refused; longer runs are a command (see file_mutants)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import file_mutants
import gpt2np.tokenizer
from gpt2np.errors import TokenizerError
from gpt2np.files import MAX_JSON


def test_each_is_read_or_refused(tmp_path: Path) -> None:
    counts, findings = file_mutants.run(tmp_path, 2026, 20 * len(file_mutants.KINDS))
    assert findings == []
    assert sum(counts.values()) == 20 * len(file_mutants.KINDS)
    assert {word.split(": ")[1] for word in counts} == {"read", "refused"}


def test_the_campaign_notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def untyped(files: file_mutants.Files, rng: object) -> None:
        raise KeyError("k")

    monkeypatch.setattr(file_mutants, "KINDS", (untyped,))
    counts, findings = file_mutants.run(tmp_path, 0, 1)
    assert counts == {"untyped: UNTYPED": 1}
    assert "KeyError" in findings[0]


def test_a_tokenizer_that_panics_or_is_too_large(tmp_path: Path, mini: Path) -> None:
    """The library's panics are no Exceptions."""
    state = json.loads((mini / "tokenizer.json").read_text("utf-8"))
    state["model"]["continuing_subword_prefix"] = "longer than any token of it"
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(state))
    with pytest.raises(TokenizerError, match="cannot read"):
        gpt2np.tokenizer.load(path)
    with path.open("r+b") as file:
        file.truncate(MAX_JSON + 1)
    with pytest.raises(TokenizerError, match="at most"):
        gpt2np.tokenizer.load(path)
