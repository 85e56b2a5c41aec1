"""Pages that open from a file, without network: pictures by Vega-Lite, each with its numbers as a table.

A `Picture` is a Vega-Lite specification with the rows that it draws. `page` puts pictures and text into one file, with
the JavaScript of Vega inside; a notebook shows a picture by itself. Text and axes take the page's own colour, so that
one picture suits a light and a dark page; data are told apart by size, shape or words, and by colour besides.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError
from .optional import needs

if TYPE_CHECKING:
    import altair

# What every picture shares. "currentColor" is the colour of the text around it.
INK = "currentColor"
CONFIG: dict[str, Any] = {
    "background": None,
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "text": {"fill": INK, "fontSize": 12},
    "rule": {"stroke": INK},
    "axis": {
        "labelColor": INK, "titleColor": INK, "tickColor": INK, "domainColor": INK, "gridColor": INK,
        "gridOpacity": 0.12, "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal",
    },
    "legend": {"labelColor": INK, "titleColor": INK, "labelFontSize": 12, "titleFontWeight": "normal",
               "symbolStrokeColor": INK},
    "header": {"labelColor": INK, "titleColor": INK, "titleFontWeight": "normal"},
    "title": {"color": INK, "fontSize": 13, "fontWeight": "normal", "anchor": "start"},
    "range": {"category": ["#2a7ae2", "#d1690a", "#3c9a5f", "#a05bc4"]},
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """One picture with its numbers.

    `name` is its file name and its place in a page; `title` and `caption` are plain text. `rows` are what the chart
    draws and what the table lists; `chart` finds them as the data set "rows".
    """

    name: str
    title: str
    caption: str
    rows: list[dict[str, Any]] = field(repr=False)
    chart: altair.TopLevelMixin = field(repr=False)

    @property
    def spec(self) -> dict[str, Any]:
        """The Vega-Lite specification, its data included."""
        made: dict[str, Any] = self.chart.to_dict()
        made["config"] = CONFIG
        made["data"] = {"name": "rows"}
        made["datasets"] = {"rows": self.rows}
        made["autosize"] = {"type": "fit-x" if made.get("width") == "container" else "pad", "contains": "padding"}
        made["description"] = f"{self.title}. {self.caption}"
        return made

    def save(self, path: str | Path) -> None:
        """Write the picture alone, as .svg or .png.

        Raises
        ------
        InputError
            If the name ends with anything else.
        """
        path = Path(path)
        if path.suffix not in (".svg", ".png"):
            raise InputError(f"a picture is written as .svg or .png, not as {path.name}")
        with needs("vl-convert-python", "writing a picture"):
            import vl_convert
        spec = json.loads(json.dumps(self.spec).replace(f'"{INK}"', '"#000000"'))
        spec["background"] = "#ffffff"
        version = _version()
        if path.suffix == ".svg":
            path.write_text(vl_convert.vegalite_to_svg(spec, vl_version=version), "utf-8")
        else:
            path.write_bytes(vl_convert.vegalite_to_png(spec, vl_version=version, scale=2))

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        """For notebooks: those that know Vega-Lite draw the specification, others run the HTML."""
        return {
            f"application/vnd.vegalite.v{_version().lstrip('v').split('.')[0]}+json": self.spec,
            "text/html": figure(self),
            "text/plain": f"{self.title}. {self.caption}",
        }


@cache
def javascript() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that may stand inside <script>, about 0.9 MB."""
    with needs("vl-convert-python", "a page with pictures"):
        import vl_convert
    libraries = "window.vegaEmbed = vegaEmbed; window.vegaLite = vegaLite; window.vega = vega;"
    bundle = vl_convert.javascript_bundle(libraries, vl_version=_version())
    bundle = re.sub("<(?=/script|!--)", r"\\x3c", bundle, flags=re.I)  # strings in it may not end the <script>
    return f"(() => {{{bundle}\n}})();"  # its short names are not to be the page's


def _version() -> str:
    with needs("altair", "a picture"):
        import altair
    return ".".join(altair.SCHEMA_VERSION.split(".")[:2])


def as_json(value: Any) -> str:
    """JSON that may stand inside <script>, whatever text is in it."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def packed(text: str) -> str:
    """Text compressed, as gpt2npUnpacked reads it: a third of Vega's size."""
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def figure(picture: Picture) -> str:
    """A picture and its table as HTML; DRAW, which a page has once, fills both from the one list of rows."""
    return (
        f'<figure class="picture" id="{escape(picture.name)}"><div class="chart" tabindex="0" role="region" '
        f'aria-label="{escape(picture.title)}"></div>'
        f"<figcaption><b>{escape(picture.title)}.</b> {escape(picture.caption)}</figcaption>"
        '<details><summary>The numbers</summary><div class="numbers" tabindex="0" role="region" '
        f'aria-label="The numbers of: {escape(picture.title)}"></div></details>'
        f'<script type="application/json">{as_json(picture.spec)}</script></figure>'
    )


def page(title: str, parts: Iterable[str | Picture], style: str = "", script: str = "") -> str:
    """One HTML file of pictures and of HTML fragments, which the caller has escaped.

    `script` may wait for `gpt2npDrawn`, and gives a picture other rows by `figure.show(rows)`.
    """
    parts = list(parts)
    body = "\n".join(part if isinstance(part, str) else figure(part) for part in parts)
    pictures = any(isinstance(part, Picture) for part in parts)
    run = "\n".join(f"<script>{code}</script>" for code in [*([UNPACK, DRAW] if pictures else []), script] if code)
    if pictures:
        run = f'<script type="text/plain" id="vega">{packed(javascript())}</script>\n{run}'
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{STYLE}{style}</style>
</head>
<body>
<main>
{body}
</main>
{run}
</body>
</html>
"""


# A page may run what it contains and fetch nothing. Vega compiles its expressions, hence 'unsafe-eval'.
POLICY = "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:"

FIGURE_STYLE = """
figure.picture { margin: 1.5rem 0; break-inside: avoid; }
figure.picture .chart.vega-embed { display: block; overflow-x: auto; color: inherit; font: inherit; padding: 2px; }
figure.picture .chart.vega-embed.has-actions { padding: 2px 38px 2px 2px; }
figure.picture .vega-bindings { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin-top: .4rem; }
figure.picture .vega-bind label { display: flex; align-items: center; gap: .5rem; }
figure.picture figcaption { max-width: 44rem; margin: .5rem 0; overflow-wrap: anywhere; }
figure.picture details > .numbers { max-height: 24rem; overflow: auto; }
figure.picture table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
figure.picture th, figure.picture td { padding: .1rem .7rem .1rem 0; text-align: left; white-space: pre; }
figure.picture td.number { text-align: right; }
figure.picture thead th { position: sticky; top: 0; border-bottom: 1px solid currentColor; }
figure.picture thead th { background: var(--color-background-primary, Canvas); }
.vega-embed .vega-actions a { color: #000; }
@media print {
  figure.picture summary, figure.picture .vega-embed details { display: none; }
  figure.picture .chart.vega-embed svg.marks { max-width: 100%; height: auto; }
}
"""

STYLE = f"""
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 0; background: #fff; color: #1b1b1b; }}
main {{ max-width: 64rem; margin: 0 auto; padding: 1rem; }}
h1 {{ font-size: 1.5rem; line-height: 1.2; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.2rem; margin-top: 2.5rem; }}
a {{ color: #0b57d0; }}
code {{ overflow-wrap: anywhere; }}
{FIGURE_STYLE}
@media screen and (prefers-color-scheme: dark) {{
  body {{ background: #16181c; color: #e4e4e4; }}
  a {{ color: #8ab4f8; }}
}}
@media print {{ body {{ background: #fff; color: #000; }} main {{ max-width: none; padding: 0; }} }}
"""

# Reads what `packed` wrote; Vega lies in a page so.
UNPACK = """
"use strict";
async function gpt2npUnpacked(id) {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), c => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).text();
}
window.gpt2npVega = gpt2npUnpacked("vega").then(code => { (0, eval)(code); });
"""

# Draws each picture, and makes its table when that is opened: the numbers are in the page once.
DRAW = """
"use strict";
function gpt2npTable(place, rows) {
  const table = document.createElement("table"), head = table.createTHead().insertRow(), body = table.createTBody();
  const names = Object.keys(rows[0] || {});
  for (const name of names) {
    const cell = document.createElement("th");
    cell.scope = "col";
    cell.textContent = name;
    head.append(cell);
  }
  for (const row of rows) {
    const line = body.insertRow();
    for (const name of names) {
      const cell = line.insertCell();
      cell.textContent = row[name];
      if (typeof row[name] === "number") cell.className = "number";
    }
  }
  place.replaceChildren(table);
}
// A picture without rows is drawn when `figure.show(rows)` gives it some.
function gpt2npDraw(figure) {
  const spec = JSON.parse(figure.querySelector("script[type='application/json']").textContent);
  const chart = figure.querySelector(".chart"), details = figure.querySelector("details");
  const list = () => gpt2npTable(details.querySelector(".numbers"), figure.rows);
  details.addEventListener("toggle", list);
  figure.show = async rows => {
    figure.rows = rows;
    if (details.open) list();
    if (figure.view) return figure.view.data("rows", rows).resize().runAsync();
    spec.datasets.rows = rows;
    const result = await vegaEmbed(chart, spec, {renderer: "svg", downloadFileName: figure.id,
      actions: {export: true, source: false, compiled: false, editor: false}});
    for (const summary of chart.querySelectorAll("summary")) summary.ariaLabel = "save the picture";
    figure.view = result.view;
    figure.dataset.drawn = "yes";
  };
  return spec.datasets.rows.length ? figure.show(spec.datasets.rows) : null;
}
window.gpt2npDrawn = Promise.resolve(window.gpt2npVega)
  .then(() => Promise.all(Array.from(document.querySelectorAll("figure.picture"), gpt2npDraw)))
  .then(() => { document.documentElement.dataset.drawn = "yes"; });
"""
