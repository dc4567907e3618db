"""Models without some blocks are trained as any pruned one, with the dense model as teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding
from tiny_transformers import make

import diffprune_plugin as dp
from diffprune_plugin.config.pruning import PruningConfig
from diffprune_plugin.errors import BadInput
from diffprune_plugin.pruning.directory import read_plan
from diffprune_plugin.recovery.finetune import FinetuneReport, finetune
from diffprune_plugin.workflow import prune


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dense, one without a block (shallow), and one that is narrower too (both)."""
    folder = tmp_path_factory.mktemp("depth")
    size = {"in_channels": 3, "out_channels": 3}
    dp.save(DiTPipeline(make("DiT", num_layers=3, **size), None, DDIMScheduler()), folder / "dense")
    dp.save(DiTPipeline(make("DiT", in_channels=4, out_channels=4), None, DDIMScheduler()), folder / "other")
    pictures = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), np.uint8)
    np.savez(folder / "data.npz", images=pictures, class_labels=np.arange(8))
    values = {"model": str(folder / "dense"), "importance": "magnitude", "depth": "transformer_blocks.1"}
    for name, ratio in (("shallow", 0.0), ("both", 0.5)):
        config = PruningConfig(**values, output=str(folder / name), pruning_ratio=ratio)
        for _ in range(2):  # the second in place of the first
            prune(config, overwrite=True, progress=False)
    return folder


def tune(place: Path, **changes: Any) -> FinetuneReport:
    values = {"model": str(place / "shallow"), "teacher": str(place / "dense"), "data": str(place / "data.npz")}
    values |= {"output": str(place / "tuned"), "steps": 3, "batch_size": 2, "learning_rate": 1e-3, "tracker": "none"}
    values |= {"warmup_steps": 0, "ema_decay": 0.0}
    return finetune(dp.FinetuneConfig.make({**values, **changes}), progress=False, overwrite=True)


@pytest.mark.parametrize("name", ["shallow", "both"])
def test_it_learns_from_the_dense_model_and_stays_what_it_is(place: Path, name: str) -> None:
    report = tune(place, model=str(place / name))
    assert {"task", "output"} < set(report.curve)
    before, after = dp.load(place / name), dp.load(place / "tuned")
    assert type(before) is type(after)
    assert (type(after) is DiTTransformer2DModel) == (name == "shallow")
    assert not torch.equal(before.proj_out_2.weight, after.proj_out_2.weight)
    assert read_plan(place / "tuned") == read_plan(place / name)
    assert read_plan(place / name).depth == ("transformer_blocks.1",)
    card = (place / "tuned" / "README.md").read_text()
    assert "| blocks gone | transformer_blocks.1 |" in card
    assert "dense, without those blocks" in card
    assert ("import diffprune_plugin" in card) == (name == "both")
    again = tune(place, model=str(place / "tuned"), output=str(place / "again"))
    assert again.curve["loss"][0] < report.curve["loss"][0]


def test_labels_are_dropped_by_the_config_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block of a DiT would drop a tenth of them, by itself and once more, in training mode."""
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(LabelEmbedding, "token_drop", lambda self, labels, *_: seen.append(labels) or labels)
    tune(place, condition_dropout=0.0)
    assert not seen


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "dense"}, "dense is not pruned; prune it first"),
        ({"teacher": "other"}, "teacher: .*other is not the dense model that this one came from"),
        ({"teacher": "both", "model": "both"}, "both"),
        ({"feature_weight": 1.0}, "feature_weight: whole blocks are gone, and the others have new numbers"),
    ],
)
def test_what_does_not_fit_is_refused(place: Path, changes: dict[str, Any], words: str) -> None:
    given = {key: str(place / value) if key in ("model", "teacher") else value for key, value in changes.items()}
    with pytest.raises(BadInput, match=words):
        tune(place, **{**given, "output": str(place / "none")})
    assert not (place / "none").exists()
