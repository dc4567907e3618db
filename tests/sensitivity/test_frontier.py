"""The frontier: what every budget would cost, allocated and by one ratio, predicted and measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
