"""pruna's algorithm beside stand-ins of pruna's classes; with pruna itself: test_hosts.py."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import diffprune_plugin as dp
from diffprune_plugin.errors import BadInput
from diffprune_plugin.pruning.loading import load_pipeline

DEMO = Path(dp.__file__).parent / "demo" / "model"


@pytest.fixture
def algorithm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Our algorithm as pruna would hold it, where pruna is not installed."""
    stand_in: dict[str, Any] = {
        "ConfigSpace": {"CategoricalHyperparameter": tuple, "UniformFloatHyperparameter": tuple},
        "pruna.algorithms.base.pruna_base": {"PrunaAlgorithmBase": object},
        "pruna.algorithms.base.registry": {"AlgorithmRegistry": SimpleNamespace(register_algorithm=lambda _: None)},
        "pruna.algorithms.base.tags": {"AlgorithmTag": SimpleNamespace(PRUNER="pruner")},
        "pruna.config.hyperparameters": {"UnconstrainedHyperparameter": tuple},
    }
    for name, values in stand_in.items():
        for end in (i for i, letter in enumerate(f"{name}.") if letter == "."):
            monkeypatch.setitem(sys.modules, name[:end], sys.modules.get(name[:end]) or ModuleType(name[:end]))
        vars(sys.modules[name]).update(values)
    name = "diffprune_plugin.integrations.pruna_algorithm"
    monkeypatch.delitem(sys.modules, name, raising=False)
    found = importlib.import_module(name).DiffPrune()
    monkeypatch.delitem(sys.modules, name)
    return found


@pytest.mark.parametrize("importance", ["magnitude", "output_error"])
def test_prunas_algorithm_prunes_by_any_criterion_and_its_plan_says_which(importance: str, algorithm: Any) -> None:
    pipeline = load_pipeline(DEMO)
    assert algorithm.model_check_fn(pipeline)
    given = {"importance": importance, "pruning_ratio": 0.5, "data": None}
    if importance == "output_error":
        with pytest.raises(BadInput, match="diffprune_data is missing: output_error needs images"):
            algorithm._apply(pipeline, given)
        given["data"] = np.zeros((4, 32, 32, 1), np.uint8)
    plan = algorithm._apply(pipeline, given).unet.pruning_plan
    assert plan.criterion == {"name": importance}
    assert plan.params[1] < 0.5 * plan.params[0]


def test_prunas_algorithm_leaves_pipelines_alone_whose_skips_get_something_added(algorithm: Any) -> None:
    pipeline = load_pipeline(DEMO)
    pipeline.controlnet = torch.nn.Identity()
    assert not algorithm.model_check_fn(pipeline)
