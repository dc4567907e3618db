"""One file: pictures inside, nothing fetched, nothing of a model's names taken for HTML."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest
from PIL import Image

from diffprune_plugin.cli.reports import write_frontier
from diffprune_plugin.errors import BadInput, MissingExtra
from diffprune_plugin.sensitivity.frontier import Frontier, Point
from diffprune_plugin.utils import html_report
from diffprune_plugin.utils.html_report import check_report, html_page, write_report

MARKDOWN = """# A report

| layer | error |
|---|---|
| `conv_in` | 1 < 2 & 3 |

![samples](a picture.png)

<script>alert(1)</script>

<details><summary>JSON</summary>

```json
{"a": "<b>"}
```
</details>
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("L", (3, 2), 7).save(tmp_path / "a picture.png")
    return tmp_path


def test_pictures_are_inside_and_nothing_is_fetched(folder: Path) -> None:
    page = html_page("<t>", MARKDOWN.replace("a picture", "a%20picture").replace("%20", "_"), renamed(folder))
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert [source.partition(",")[0] for source in sources] == ["data:image/png;base64"]
    (folder / "back.png").write_bytes(base64.b64decode(sources[0].partition(",")[2]))
    assert Image.open(folder / "back.png").size == (3, 2)
    assert "<td>1 &lt; 2 &amp; 3</td>" in page
    assert "<title>&lt;t&gt;</title>" in page


def renamed(folder: Path) -> Path:
    (folder / "a picture.png").rename(folder / "a_picture.png")
    return folder


def test_of_raw_html_only_what_folds_away_is_taken(folder: Path) -> None:
    page = html_page("t", MARKDOWN.replace("a picture", "a_picture"), renamed(folder))
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "<details><summary>JSON</summary>" in page
    assert "&lt;b&gt;" in page
    assert "&amp;lt;" not in page


def test_a_picture_that_is_not_there_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such picture"):
        write_report(tmp_path / "report.html", "t", "![x](gone.png)", tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_could_not_be_written_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there.html").touch()
    with pytest.raises(BadInput, match="exists; use --overwrite"):
        check_report(tmp_path / "there.html", overwrite=False)
    check_report(tmp_path / "there.html", overwrite=True)
    with pytest.raises(BadInput, match="no directory"):
        check_report(tmp_path / "no" / "report.html", overwrite=False)
    monkeypatch.setattr(html_report, "need", lambda module: (_ for _ in ()).throw(MissingExtra(module, "eval")))
    with pytest.raises(MissingExtra):
        check_report(tmp_path / "report.html", overwrite=False)


@pytest.mark.parametrize("words", [(), ("--dry-run",)])
def test_a_pruning_is_told_in_one_file(run, config_file: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    report = tmp_path / "report.html"
    fast = ("--set", "importance=magnitude", "--set", "compensate=false")
    assert run("prune", config_file, *fast, *words, "--report", report)[0] == 0
    page = report.read_text()
    assert "<h2>Layers</h2>" in page
    assert "conv_in" in page
    assert str(tmp_path) not in page.replace(f"{tmp_path}/dense", "")
    assert run("prune", config_file, *fast, *words, "--report", report)[0] == 2


@pytest.mark.parametrize(("dense_ms", "told"), [(None, "uniform"), (12.5, "ms")])
def test_a_frontier_says_in_its_report_what_it_says_on_the_terminal(
    tmp_path: Path, dense_ms: float | None, told: str
) -> None:
    point = Point("linear", 0.5, 0.5, 0.4, 0.01, None, latency=0.6, latency_measured=None)
    found = Frontier("macs_target", (point,), (), dense_ms, (point.asked,))
    write_frontier(tmp_path / "f.html", found)
    page = (tmp_path / "f.html").read_text()
    assert f"<th>{told}</th>" in page
    assert ("<td>7.5</td>" in page) == (dense_ms is not None)
