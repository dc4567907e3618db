"""A report in one HTML file: pictures inside, nothing fetched, light and dark as the reader has it."""

from __future__ import annotations

import base64
import html
import re
from pathlib import Path
from typing import TYPE_CHECKING

from diffprune_plugin.errors import BadInput
from diffprune_plugin.utils.files import check_file, new_file
from diffprune_plugin.utils.optional import need

if TYPE_CHECKING:
    from rich.table import Table

TYPES = {".png": "image/png", ".svg": "image/svg+xml"}  # of pictures, by the ending of their files
FOLD = re.compile("&lt;/?(details|summary)&gt;")
STYLE = """
:root { color-scheme: light dark; --line: #d0d7de; --soft: #f6f8fa; }
@media (prefers-color-scheme: dark) { :root { --line: #3d444d; --soft: #1c2128; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0; }
td { font-variant-numeric: tabular-nums; }
th, td { border: 1px solid var(--line); padding: .25rem .6rem; text-align: left; vertical-align: top; }
th, pre, code { background: var(--soft); }
pre { padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; }
img { max-width: 100%; background: #fff; border: 1px solid var(--line); }
""".strip()
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}
</style>
<body>
{body}
</body>
</html>
"""


def html_page(title: str, markdown: str, folder: Path) -> str:
    """Markdown as a page of its own; pictures that it shows lie in ``folder``. Of raw HTML in it only what folds a part
    away is taken; the rest, in the name of a layer say, is shown as text.

    Raises MissingExtra without Python-Markdown, BadInput for a picture that is not there.
    """
    converter = need("markdown").Markdown(extensions=["tables", "fenced_code"])
    converter.preprocessors.deregister("html_block")
    converter.inlinePatterns.deregister("html")
    body = FOLD.sub(lambda tag: html.unescape(tag[0]), converter.convert(markdown))
    inside = re.sub(r'(?<= src=")[^"]+(?=")', lambda name: inlined(folder / html.unescape(name[0])), body)
    return PAGE.format(title=html.escape(title), style=STYLE, body=inside)


def inlined(picture: Path) -> str:
    """A picture as a data URI."""
    if picture.suffix not in TYPES or not picture.is_file():
        raise BadInput(f"report: {picture}: no such picture ({', '.join(TYPES)})")
    return f"data:{TYPES[picture.suffix]};base64,{base64.b64encode(picture.read_bytes()).decode()}"


def markdown_of(table: Table) -> str:
    """A terminal's table as a Markdown table."""
    columns = [[str(cell).replace("\n", " ") for cell in (c.header, "---", *c.cells)] for c in table.columns]
    return "\n".join(f"| {' | '.join(row)} |" for row in zip(*columns, strict=True))


def check_report(path: Path, overwrite: bool) -> None:
    """Raises BadInput or MissingExtra, before anything is done, if the report could not be written at the end."""
    need("markdown")
    check_file(path, overwrite, begins=PAGE[:9].encode())
    if not path.parent.is_dir():
        raise BadInput(f"{path}: no directory {path.parent}; make it or choose another file")


def write_report(path: Path, title: str, markdown: str, folder: Path) -> None:
    """Write `html_page` to a file, whole or not at all."""
    page = html_page(title, markdown, folder)
    with new_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
