"""A plugin's way to repair: named in the config, run in its place, and told of where it fails."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import diffprune_plugin as dp
from diffprune_plugin import hookimpl
from diffprune_plugin.recovery.compensate import CompensationReport
from diffprune_plugin.recovery.ridge import Repair

BIAS = 7.0


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Install a plugin with this way to repair, called "mine"."""

    def install(way: Any) -> None:
        @hookimpl
        def diffprune_register_compensations(register: Any) -> None:
            register("mine", way)

        plugin = SimpleNamespace(diffprune_register_compensations=diffprune_register_compensations)
        monkeypatch.setitem(sys.modules, "offered", plugin)
        found = importlib.metadata.EntryPoint("offered", "offered", "diffprune")
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [found] if group == "diffprune" else [])

    return install


def marks(model: Any, dense: Any, plan: Any, scheduler: Any, samples: Any, **given: Any) -> CompensationReport:
    """Refits nothing; leaves a mark."""
    assert {"batch_size": 4, "seed": 3}.items() <= given.items()
    assert model.num_parameters() < dense.num_parameters()
    assert len(samples) == 16
    with torch.no_grad():
        model.conv_out.bias.fill_(BIAS)
    repair = Repair(("conv_out",), "conv_out", 1, 1, 0.5, 0.25, 1.0)
    return CompensationReport((repair,), {}, 16, 0.1)


def test_the_named_way_repairs_in_the_place_of_ours(run: Any, offer: Any, config_file: Path, tmp_path: Path) -> None:
    offer(marks)
    code, _, err = run("prune", config_file, "--set", "compensate=mine", "--set", "seed=3")
    assert code == 0, err
    assert dp.load(tmp_path / "pruned").conv_out.bias.item() == BIAS
    assert json.loads((tmp_path / "pruned" / "compensation.json").read_text())["repairs"][0]["layers"] == ["conv_out"]


def test_an_unknown_way_is_told_of_before_any_work(
    run: Any, offer: Any, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(marks)
    monkeypatch.setattr("diffprune_plugin.calibration.settings.noise_prediction_loss", pytest.fail)
    code, _, err = run("prune", config_file, "--set", "compensate=mime")
    assert (code, err.strip()) == (2, "error: compensate: 'mime'; did you mean 'mine'?; known: mine")
    assert not (tmp_path / "pruned").exists()


@pytest.mark.parametrize(
    ("way", "why"),
    [
        (lambda *a, **k: None, "gives NoneType, not a CompensationReport"),
        (lambda *a, **k: 1 / 0, "fails: ZeroDivisionError: division by zero"),
    ],
)
def test_a_way_that_fails_is_named_with_its_plugin(run: Any, offer: Any, config_file: Path, way: Any, why: str) -> None:
    offer(way)
    words = [w for each in ("compensate=mine", "importance=magnitude", "timesteps=null") for w in ("--set", each)]
    code, _, err = run("prune", config_file, *words)
    assert (code, err.strip()) == (2, f"error: compensate: 'mine' of offered {why}; mend the plugin")


def test_plugins_lists_it(run: Any, offer: Any) -> None:
    offer(marks)
    rows = {row["plugin"]: row for row in json.loads(run("plugins", "--json")[1])}
    assert rows["offered"]["offers"] == ["compensation mine"]
