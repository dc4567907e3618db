"""Commands that only read answer without torch, diffusers or torch-pruning."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from diffprune_plugin.criteria import BUILT_IN

# Plugins of other packages may import what they like: none is loaded here. Each line of the input is a command.
ALONE = """
import importlib, importlib.metadata, json, sys
installed = importlib.metadata.entry_points
importlib.metadata.entry_points = lambda **asked: () if asked == {"group": "diffprune"} else installed(**asked)
heavy, commands = json.loads(sys.argv[1])
for program, *words in commands:
    try:
        importlib.import_module(program).main(words)
    except SystemExit as end:
        assert not end.code, (words, end.code)
    print("HEAVY", words, [name for name in heavy if name in sys.modules])
"""
COMMANDS = ("prune", "finetune", "config", "inspect", "sample", "evaluate", "plugins", "demo", "bench", "frontier")
PROGRAM = "diffprune_plugin.cli"
HEAVY = ("torch", "diffusers", "torch_pruning")


def assert_light(*commands: list[str], heavy: tuple[str, ...] = HEAVY) -> None:
    """Run commands in one process, one after the other; none may import a heavy package."""
    result = subprocess.run(
        [sys.executable, "-c", ALONE, json.dumps([heavy, commands])], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    told = [line for line in result.stdout.splitlines() if line.startswith("HEAVY")]
    assert told == [f"HEAVY {words} []" for _, *words in commands]


def test_help_needs_neither_torch_nor_numpy() -> None:
    helps = [[PROGRAM, "--help"], *([PROGRAM, command, "--help"] for command in COMMANDS)]
    assert_light(
        *helps,
        ["diffprune_plugin.export.cli", "--help"],
        ["diffprune_plugin.__main__", "--help"],
        heavy=(*HEAVY, "numpy"),
    )


def test_the_list_of_plugins_needs_no_torch() -> None:
    assert_light([PROGRAM, "plugins"], [PROGRAM, "plugins", "--json"], ["diffprune_plugin.__main__", "plugins"])


def test_a_config_is_read_and_its_criterion_checked_without_torch(tmp_path: Path) -> None:
    for criterion in BUILT_IN:
        (tmp_path / f"{criterion}.yaml").write_text(f"model: my-ddpm\nimportance: {criterion}\n")
    assert_light(*([PROGRAM, "config", str(file)] for file in tmp_path.iterdir()))


@pytest.mark.parametrize("folder", [".", "unet"])
def test_a_pruned_model_is_inspected_without_torch_or_numpy(
    run, config_file: Path, tmp_path: Path, folder: str
) -> None:
    assert run("prune", config_file, "--set", "importance=magnitude", "--set", "compensate=false")[0] == 0
    assert_light([PROGRAM, "inspect", str(tmp_path / "pruned" / folder)], heavy=(*HEAVY, "numpy"))


def test_a_pruned_model_is_inspected_without_loading_a_plugin(
    run, config_file: Path, tmp_path: Path, monkeypatch
) -> None:
    assert run("prune", config_file, "--set", "importance=magnitude", "--set", "compensate=false")[0] == 0
    monkeypatch.setattr("diffprune_plugin.pruning.directory.plugin_manager", lambda: pytest.fail("loaded"))
    monkeypatch.setattr("diffprune_plugin.pruning.directory.components", lambda: pytest.fail("loaded"))
    for folder in (".", "unet"):
        assert run("inspect", tmp_path / "pruned" / folder)[0] == 0
