"""How Sphinx builds the book: every cell runs, every picture is drawn by the code on the page, nothing is fetched."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from gpt2np import html

HERE = Path(__file__).parent

project = "GPT-2, understood in one evening"
author = "the gpt2np authors"
project_copyright = author
extensions = ["myst_nb"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_show_search_summary = False  # the summaries are fetched, which pages opened as files may not do
html_title = project
html_show_sphinx = False
html_copy_source = False
html_static_path = ["_made"]
html_css_files = ["figure.css"]
html_js_files = [("vega.js", {"defer": "defer"}), ("draw.js", {"defer": "defer"})]
nitpicky = True

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_code_prompt_show = "Show the solution"
nb_code_prompt_hide = "Hide the solution"
myst_enable_extensions = ["deflist", "smartquotes"]
suppress_warnings = ["mystnb.unknown_mime_type"]  # a picture offers its specification besides its HTML

# What the pictures need, from the package itself, so that a page works from its file and without network.
made = HERE / "_made"
made.mkdir(exist_ok=True)
(made / "vega.js").write_text(html.javascript(), "utf-8")
(made / "draw.js").write_text(html.DRAW, "utf-8")
(made / "figure.css").write_text(html.FIGURE_STYLE + (HERE / "book.css").read_text("utf-8"), "utf-8")
