"""The frontier: what every budget would cost, allocated and by one ratio, predicted and measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image


def test_allocated_costs_no_more_than_uniform_at_any_budget_and_some_are_measured(
    run: Any, config_file: Path, tmp_path: Path
) -> None:
    few = ["--set", "sensitivity_samples=4", "--set", "sensitivity_probes=2", "--set", "importance=magnitude"]
    code, out, err = run("frontier", config_file, *few, "--verify", 1, "--plot", tmp_path / "f.png", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["target"] == "macs_target"
    points = {(point["allocation"], point["asked"]): point for point in found["points"]}
    both = [share for way, share in points if way == "linear" and ("uniform", share) in points]
    assert len(both) >= 4
    for share in both:
        linear, uniform = points["linear", share], points["uniform", share]
        assert linear["macs"] <= share + 1e-3
        assert linear["predicted"] <= uniform["predicted"] * 1.001
    errors = [points["linear", share]["predicted"] for share in sorted(both)]
    assert errors == sorted(errors, reverse=True)
    measured = [point for point in found["points"] if point["measured"] is not None]
    assert [point["allocation"] for point in measured] == ["uniform", "linear"]
    assert all(0 < point["measured"] < 10 for point in measured)
    assert Image.open(tmp_path / "f.png").size[0] > 300
    assert not (tmp_path / "pruned").exists()


def test_the_table_shows_both_ways_and_a_plot_that_is_there_is_kept(
    run: Any, config_file: Path, tmp_path: Path
) -> None:
    few = ["--set", "sensitivity_samples=2", "--set", "sensitivity_probes=1", "--set", "importance=magnitude"]
    code, out, err = run("frontier", config_file, *few, "--set", "params_target=0.5")
    assert code == 0, err
    assert "params_target" in out
    assert "allocated" in out
    plot = tmp_path / "there.png"
    plot.touch()
    code, _, err = run("frontier", config_file, *few, "--plot", plot)
    assert (code, plot.stat().st_size) == (2, 0)
    assert "exists; use --overwrite" in err


FEW = ["--set", "sensitivity_samples=2", "--set", "sensitivity_probes=1", "--set", "importance=magnitude"]


def test_what_cannot_be_met_or_is_missed_is_said(run: Any, config_file: Path) -> None:
    code, out, err = run("frontier", config_file, *FEW, "--set", "max_pruning_ratio=0.3", "--set", "strict=true")
    assert code == 0, err
    rows = {line.split("│")[1].strip(): line for line in out.splitlines() if line.startswith("│")}
    assert set(rows) == {"0.9", "0.8", "0.7", "0.6", "0.5", "0.4", "0.3", "0.2"}
    assert rows["0.2"].count("cannot") == 2
    assert "cannot" not in rows["0.8"]
    code, out, err = run("frontier", config_file, *FEW, "--set", "pruning_ratio_dict={'*': 0.5}")
    assert code == 0, err
    assert out.count(" at ") >= 2
    code, out, err = run("frontier", config_file, *FEW, "--set", "ignored_layers=['*']")
    assert (code, out) == (2, "")
    assert "frontier: no budget can be met, not even 0.9: macs_target: 0.2" in err


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            ["global_pruning=true", "allocation=uniform"],
            "global_pruning: true ranks groups together, a frontier weighs",
        ),
        (["latency_target=0.5"], "a frontier is of sizes; add --latency"),
    ],
)
def test_what_a_frontier_does_not_do_is_refused_before_anything_is_measured(
    run: Any, config_file: Path, keys: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffprune_plugin.workflow.measured", lambda *_, **__: pytest.fail("measured"))
    code, _, err = run("frontier", config_file, *FEW, *(word for key in keys for word in ("--set", key)))
    assert code == 2
    assert words in err


def test_what_a_killed_prune_left_to_go_on_from_stays(run: Any, config_file: Path, tmp_path: Path) -> None:
    left = tmp_path / ".pruned.progress" / "compensate-0.safetensors"
    left.parent.mkdir()
    left.touch()
    code, _, err = run("frontier", config_file, *FEW)
    assert code == 0, err
    assert left.exists()
    assert [path.name for path in tmp_path.glob(".*")] == [".pruned.progress"]


@pytest.mark.parametrize("command", ["prune", "frontier"])
@pytest.mark.parametrize("word", ["--plot", "--report", "--set"])
def test_a_file_that_could_not_be_written_at_the_end_is_refused_at_the_beginning(
    run: Any, config_file: Path, tmp_path: Path, command: str, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffprune_plugin.workflow.calibration_for", lambda *_, **__: pytest.fail("measured"))
    (tmp_path / "file").touch()
    there = f"{tmp_path / 'file' / 'there'}"
    given = f"sensitivity={there}" if word == "--set" else there
    code, out, err = run(command, config_file, *FEW, "--set", "macs_target=0.5", word, given)
    assert (code, out) == (2, "")
    assert there in err
    assert not (tmp_path / "pruned").exists()
