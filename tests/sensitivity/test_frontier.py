"""The frontier: what every budget would cost, allocated and by one ratio, predicted and measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import DDIMScheduler, DDPMScheduler, DiTPipeline
from PIL import Image
from tiny import make_unet
from tiny_transformers import make

import diffprune_plugin as dp
from diffprune_plugin.adapters.unet_2d import UNET_2D
from diffprune_plugin.config.pruning import PruningConfig
from diffprune_plugin.data.loading import load_samples
from diffprune_plugin.sensitivity.frontier import Frontier, Point, verified
from diffprune_plugin.workflow import frontier_of, prune


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
        (["data=null"], "frontier: needs 'data' and a pipeline directory as 'model'"),
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


@pytest.mark.parametrize(("reachable", "asked"), [(5, 8), (5, 5), (6, 2), (1, 8)])
def test_as_many_budgets_are_verified_as_are_asked_for_and_can_be_met(
    reachable: int, asked: int, images: np.ndarray
) -> None:
    unet = make_unet()
    plan = dp.make_plan(unet, "magnitude", pruning_ratio=0.3)
    points = [Point("linear", 0.9 - 0.1 * i, 0.5, 0.5, 0.1) for i in range(reachable)]
    found = Frontier("macs_target", tuple(points), (plan,) * reachable)
    given = unet, DDPMScheduler(num_train_timesteps=20), load_samples(images), UNET_2D, 0, None
    measured = [point.measured is not None for point in verified(found, asked, *given).points]
    assert sum(measured) == min(reachable, asked)


@pytest.mark.parametrize("compensate", [True, False])
def test_what_is_verified_is_repaired_as_a_prune_would(
    run: Any, config_file: Path, monkeypatch: pytest.MonkeyPatch, compensate: bool
) -> None:
    asked = list[Any]()
    monkeypatch.setattr("diffprune_plugin.recovery.repairing.passes_that_fit", lambda *_: "layer")
    monkeypatch.setattr("diffprune_plugin.recovery.repairing.compensate_", lambda *_, **given: asked.append(given))
    code, _, err = run("frontier", config_file, *FEW, "--verify", 1, "--set", f"compensate={str(compensate).lower()}")
    assert code == 0, err
    assert [(given["passes"], given["batch_size"]) for given in asked] == [("layer", 4)] * 2 * compensate


@pytest.mark.parametrize("preset", [None, "obs-diff"])
def test_a_point_is_the_plan_that_a_prune_to_its_budget_makes(preset: str | None, tmp_path: Path) -> None:
    model = make("DiT", num_layers=4, in_channels=3, out_channels=3)
    dp.save(DiTPipeline(model, None, DDIMScheduler()), tmp_path / "dense")
    pictures = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "data.npz", images=pictures, class_labels=np.arange(8))
    values: dict[str, Any] = {"model": str(tmp_path / "dense"), "data": str(tmp_path / "data.npz")}
    values |= {"output": str(tmp_path / "out"), "importance": "magnitude", "preset": preset}
    values |= {"sensitivity_samples": 2, "sensitivity_probes": 1}
    found = frontier_of(PruningConfig(**values), progress=False)
    plans = {(point.allocation, point.asked): plan for point, plan in zip(found.points, found.plans, strict=True)}
    for way in ("linear", "uniform"):
        config = PruningConfig(**values, macs_target=0.9, allocation=way)
        assert plans[way, 0.9].removed_units() == prune(config, dry_run=True, progress=False).plan.removed_units()


def test_a_pattern_is_told_by_the_key_that_the_user_gave(run: Any, tmp_path: Path, dense_dir: Path, npz: Path) -> None:
    params = {"filter_importance": "L2", "pruning_target": 0.3}
    compression = {"algorithm": "filter_pruning", "params": params, "ignored_scopes": ["{re}conv_inn"]}
    (tmp_path / "nncf.json").write_text(json.dumps({"compression": compression}))
    given = ["--model", dense_dir, "--data", npz]
    lines = [run(command, tmp_path / "nncf.json", *given) for command in ("prune", "frontier")]
    assert [code for code, _, _ in lines] == [2, 2]
    assert all("nncf.json: compression.ignored_scopes:" in err for _, _, err in lines)
