"""GitHub Actions: annotations at a line of the user's code, and the summary of a job.

https://docs.github.com/en/actions/reference/workflows-and-actions/workflow-commands
"""

from __future__ import annotations

import os
from pathlib import Path

from .escape import escaped


def in_actions() -> bool:
    """Whether this process runs in a job of GitHub Actions."""
    return os.environ.get("GITHUB_ACTIONS") == "true"


def error(message: str, title: str, file: str | None = None, line: int | None = None) -> str:
    """The workflow command that shows an error at a line of a file of the repository."""
    root = os.environ.get("GITHUB_WORKSPACE", os.getcwd())
    places = {} if file is None else {"file": os.path.relpath(file, root), **({} if line is None else {"line": line})}
    properties = ",".join(f"{name}={_value(str(value))}" for name, value in {**places, "title": title}.items())
    return f"::error {properties}::{_data(message)}"


def has_summary() -> bool:
    """Whether there is a summary page of the job to write to."""
    return bool(os.environ.get("GITHUB_STEP_SUMMARY"))


def add_summary(markdown: str) -> None:
    """Add to the job's summary page, which `has_summary` has found."""
    with Path(os.environ["GITHUB_STEP_SUMMARY"]).open("a", encoding="utf-8") as file:
        file.write(markdown)


def _data(text: str) -> str:
    return escaped(text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A"))


def _value(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
