"""The book's sources: every chapter has its parts, and every exercise stands in its chapter."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT

from gpt2np.exercises import EXERCISES

BOOK = ROOT / "docs" / "book"
CHAPTERS = {int(path.name[:2]): path.read_text("utf-8") for path in sorted(BOOK.glob("[0-9][0-9]_*.md"))}


def test_there_are_sixteen_and_the_index_names_them_in_order():
    assert list(CHAPTERS) == list(range(16))
    names = re.findall(r"^\d\d_\w+$", (BOOK / "index.md").read_text("utf-8"), re.MULTILINE)
    assert [f"{name}.md" for name in names] == [path.name for path in sorted(BOOK.glob("[0-9][0-9]_*.md"))]


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_has_its_parts(chapter: int):
    text = CHAPTERS[chapter]
    assert re.search(rf"^# {chapter} · .+\n\n\*\*.+\?\*\*$", text, re.MULTILINE | re.DOTALL)  # its question
    for part in ("## Exercise", "## What people get wrong", "## Where to read on", ":tags: [hide-input]", "pictures."):
        assert part in text
    if 0 <= chapter <= 8:
        assert "{literalinclude} ../../gpt2np/" in text


def test_every_exercise_stands_in_its_chapter_with_a_wrong_answer_and_a_right_one():
    for name, exercise in EXERCISES.items():
        text = CHAPTERS[exercise.chapter]
        assert f'"{name}"' in text, name
        assert "assert answer" in text or "assert all(answers)" in text


def test_every_term_of_the_glossary_is_explained_where_it_first_stands():
    glossary = (BOOK / "glossary.md").read_text("utf-8")
    terms = re.findall(r"^([\w\- ]+)\n  \S", glossary, re.MULTILINE)
    used = {
        (match[2] or match[1]).strip().lower()
        for text in CHAPTERS.values()
        for match in re.finditer(r"\{term\}`([^`<]+?)(?:<([^>]+)>)?`", text)
    }
    assert len(terms) > 40
    assert used == {term.lower() for term in terms}
