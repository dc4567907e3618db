"""Paths as people write them, and results that would take each other's place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffprune_plugin.errors import BadInput
from diffprune_plugin.utils.files import check_picture, check_place
from diffprune_plugin.utils.written_paths import as_written, check_different


@pytest.mark.parametrize("path", ["", "~", "~/a", "~somebody/a", "$HOME/a", "a/$USER", "a${B}", "-o", "--dry-run"])
def test_what_a_shell_did_not_fill_in_is_no_path(path: str) -> None:
    with pytest.raises(ValueError, match=r"write|give"):
        as_written(path)


@pytest.mark.parametrize("path", [".", "a b/c", "a$b", "a~", "/-a", "model-1", "ö"])
def test_other_paths_stay_as_they_are(path: str) -> None:
    assert as_written(path) == path


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("prune", "c.yaml", "--plot", "--dry-run"), "'--dry-run'"),
        (("prune", "c.yaml", "--output", "~/small"), "'~/small'"),
        (("prune", "c.yaml", "--model="), "--model"),
        (("frontier", "c.yaml", "--data", "$DATA"), "$DATA"),
        (("finetune", "c.yaml", "--output", ""), "--output"),
        (("evaluate", "pruned", "--reference", ""), "--reference"),
        (("sample", "", "-o", "a.png"), "'' no path"),
        (("card", "pruned", "--verdict", "--evaluation"), "--verdict"),
        (("bench", "a.onnx", "b.onnx", "--json", "--nhwc"), "--nhwc"),
    ],
)
def test_every_command_refuses_them(words: tuple[str, ...], told: str, run: Any, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*words)
    assert code == 2
    assert told in err
    assert not list(tmp_path.iterdir())


def test_results_are_different_files_outside_the_output(tmp_path: Path) -> None:
    check_different({"--plot": tmp_path / "a.png", "--report": tmp_path / "a.html", "--json": None}, tmp_path / "out")
    check_different({"--plot": tmp_path / "out.png"}, tmp_path / "out")
    with pytest.raises(BadInput, match=r"--report .*/\./a: is --plot too"):
        check_different({"--plot": tmp_path / "a", "--report": f"{tmp_path}/./a"})
    for inside in ("out", "out/a.png", "out/b/a.png"):
        with pytest.raises(BadInput, match="the output too"):
            check_different({"--plot": tmp_path / inside}, tmp_path / "out")


def test_only_what_we_would_write_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_text("model: dense")
    with pytest.raises(BadInput, match="another kind of file"):
        check_picture(path, overwrite=True)
    path.write_bytes(b"\x89PNG and so on")
    check_picture(path, overwrite=True)
    with pytest.raises(BadInput, match=r"a PNG; name it grid\.png"):
        check_picture(tmp_path / "grid.jpg")


def test_a_name_too_long_for_what_is_written_beside_it_is_told_at_once(tmp_path: Path) -> None:
    check_place(tmp_path / ("x" * 230))
    with pytest.raises(BadInput, match="File name too long; choose a shorter output"):
        check_place(tmp_path / ("x" * 245))
