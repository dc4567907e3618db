"""Only what this tool wrote is replaced, and what a killed run left is cleared away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from diffprune_plugin.errors import BadInput
from diffprune_plugin.utils import files
from diffprune_plugin.utils.files import LIST_FILE, check_absent, new_directory, new_file, relative


def write(path: Path, text: str = "ours", kind: str = "result", overwrite: bool = False) -> Path:
    with new_directory(path, overwrite, kind) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file.txt").write_text(text)
    return path


def test_what_we_wrote_is_replaced_also_through_a_link(tmp_path) -> None:
    output = write(tmp_path / "out")
    write(output, "again", overwrite=True)
    (tmp_path / "link").symlink_to(output)
    write(tmp_path / "link", "once more", overwrite=True)
    assert (output / "inner" / "file.txt").read_text() == "once more"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]


def test_an_empty_directory_is_filled(tmp_path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / LIST_FILE).exists()


def add(name: str):
    def added(output: Path) -> None:
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_text("years of work")

    return added


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (add("thesis.txt"), "holds other files: thesis.txt"),
        (add("inner/thesis.txt"), "holds other files: inner/thesis.txt"),
        (add("mine/thesis.txt"), "holds other files: mine"),
        (lambda output: (output / "mine").mkdir(), "holds other files: mine"),
        (lambda output: (output / "mine").symlink_to("/"), "holds other files: mine"),
        (add("inner/file.txt"), "inner/file.txt was changed since diffprune wrote it"),
        (lambda output: (output / LIST_FILE).unlink(), f"no {LIST_FILE}, so diffprune did not write it"),
        (add(LIST_FILE), f"no {LIST_FILE}"),
        (lambda output: (output / LIST_FILE).write_text("[" * 100_000), f"no {LIST_FILE}"),
    ],
)
@pytest.mark.parametrize("through", ["out", "link"])
def test_what_we_did_not_write_is_named_and_stays(damage, words, through, tmp_path) -> None:
    output = write(tmp_path / "out")
    (tmp_path / "link").symlink_to(output)
    damage(output)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    with pytest.raises(BadInput, match=words):
        write(tmp_path / through, overwrite=True)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_a_directory_is_replaced_by_its_like_only(tmp_path) -> None:
    write(tmp_path / "out", kind="dense model")
    with pytest.raises(BadInput, match="holds a dense model, which a pruned model does not replace"):
        write(tmp_path / "out", kind="pruned model", overwrite=True)


def test_a_dense_models_directory_is_never_taken_for_an_output(run, config_file, pipeline, tmp_path) -> None:
    pipeline.save_pretrained(tmp_path / "by diffusers")
    for name in ("by diffusers", "dense"):
        other = tmp_path / f"copy of {name}"
        (tmp_path / name).rename(other)
        settings = ("--overwrite", "--set", "importance=magnitude", "--model", tmp_path / "none", "--output", other)
        code, _, err = run("prune", config_file, *settings)
        assert code == 2
        assert "did not write it" in err or "holds a dense model" in err
        assert (other / "model_index.json").exists()


@pytest.mark.parametrize("path", ["loop", "a\0b"])
def test_a_path_that_is_none_is_a_line(path, tmp_path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(BadInput):
        check_absent(tmp_path / path, overwrite=True)


WRITER = """
import sys, time
from pathlib import Path
from diffprune_plugin.utils.files import new_directory, new_file
with new_directory(Path("out")) as folder, new_file(Path("file")) as file:
    (folder / "half").write_text("half")
    print("writing", flush=True)
    time.sleep(600)
"""


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path) -> None:
    def writer() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", WRITER]
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
        assert process.stdout.readline() == "writing\n"
        return process

    def left() -> list[str]:
        return sorted(path.name for path in tmp_path.iterdir() if path.name.endswith(files.ENDING))

    dead = writer()
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    assert len(left()) == 2
    (tmp_path / ".out.mine").write_text("a user's")
    alive = writer()
    try:
        assert len(left()) == 2, "the dead one's are gone"
        write(tmp_path / "out")
        with new_file(tmp_path / "file") as file:
            file.write_text("whole")
        assert len(left()) == 2, "the living one's stay"
    finally:
        alive.kill()
        alive.wait()
    write(tmp_path / "out", overwrite=True)
    assert [name.split(".")[1] for name in left()] == ["file"]
    assert (tmp_path / ".out.mine").exists()


def test_a_path_inside_a_mapping_names_no_folder_of_this_machine_either(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"table": str(tmp_path / "pieces.json"), "provider": "cpu", "options": {"n": 1}}
    assert relative(given) == {"table": "pieces.json", "provider": "cpu", "options": {"n": 1}}
