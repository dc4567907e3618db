"""What a sensitivity says of whole blocks, against the block itself turned down; and depth chosen by it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from tiny_transformers import COUNT, make, samples_for
from torch import nn

import diffprune_plugin as dp
from diffprune_plugin.config.pruning import PruningConfig
from diffprune_plugin.errors import BadInput
from diffprune_plugin.planning.report import plan_text
from diffprune_plugin.plugins import find_adapter
from diffprune_plugin.sensitivity.depth import check_choosable
from diffprune_plugin.sensitivity.linear import Noisy, measure_sensitivity
from diffprune_plugin.sensitivity.sensitivity import Sensitivity
from diffprune_plugin.workflow import frontier_of, prune

LAST = "transformer_blocks.2"  # of SD 3: it gives no text
ONE_OF_EACH = [("DiT", "transformer_blocks.1"), ("Flux", "transformer_blocks.0"), ("SD 3", LAST)]


@pytest.mark.parametrize(("name", "block"), ONE_OF_EACH)
def test_the_error_of_a_block_is_what_the_output_moves_when_its_branch_is_turned_down(name: str, block: str) -> None:
    model, by = make(name), 1e-3
    adapter, (samples, scheduler) = find_adapter(model), samples_for(model)
    found = measure_sensitivity(model, scheduler, samples, samples=COUNT, probes=100, batch_size=4, progress=False)
    inputs = Noisy(samples, scheduler, COUNT, 0, adapter).batch(range(COUNT), model)

    def turned_down(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        given = (kwargs.get("encoder_hidden_states"), kwargs.get("hidden_states", args[0] if args else None))
        outputs = output if isinstance(output, tuple) else (None, output)
        moved = []
        for before, after in zip(given, outputs, strict=True):
            if after is not None:
                added = after - before
                after = after - by * (added - added.mean((0, 1)))
            moved.append(after)
        return tuple(moved) if isinstance(output, tuple) else moved[1]

    with torch.no_grad():
        expected = adapter.denoise(model, inputs)
        with model.get_submodule(block).register_forward_hook(turned_down, with_kwargs=True):
            moved = (adapter.denoise(model, inputs) - expected) / by
    assert found.blocks[block] == pytest.approx(float(moved.square().mean()), rel=0.25)


def test_of_dit_the_first_block_has_no_error_since_the_output_reads_its_embedding() -> None:
    model = make("DiT", num_layers=3)
    samples, scheduler = samples_for(model)
    found = measure_sensitivity(model, scheduler, samples, samples=2, probes=1, progress=False)
    assert list(found.blocks) == ["transformer_blocks.1", "transformer_blocks.2"]


def test_a_sensitivity_without_blocks_has_the_hash_that_it_had_and_one_with_them_is_read_again(tmp_path: Path) -> None:
    plain = Sensitivity({"a": (1.0,)}, 1.0, 2, 3, 0, "w", "i", {})
    assert plain.sha256 == "3b727365da00255bae30e5ad61840f2f77ea80f20925d1f49d25b24f9be7df23"
    with_blocks = Sensitivity(**{**plain.__dict__, "blocks": {"a.0": 0.5}})
    assert with_blocks.sha256 != plain.sha256
    with_blocks.save(tmp_path / "s.json")
    assert Sensitivity.load(tmp_path / "s.json") == with_blocks


# by a config


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A config of a DiT in pixels whose third block does nothing, its gates being closed."""
    folder = tmp_path_factory.mktemp("dit")
    model = make("DiT", num_layers=4, in_channels=3, out_channels=3)
    idle = model.transformer_blocks[2].norm1.linear
    nn.init.zeros_(idle.weight)
    nn.init.zeros_(idle.bias)
    dp.save(DiTPipeline(model, None, DDIMScheduler()), folder / "dense")
    pictures = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), np.uint8)
    np.savez(folder / "data.npz", images=pictures, class_labels=np.arange(8))
    few = {"sensitivity_samples": 4, "sensitivity_probes": 1, "compensate": False, "importance": "magnitude"}
    return {"model": str(folder / "dense"), "data": str(folder / "data.npz"), "depth": "auto", **few}


def test_the_planted_idle_block_goes_and_the_widths_meet_what_is_left(values: dict[str, Any], tmp_path: Path) -> None:
    plan = prune(PruningConfig(**values, output=str(tmp_path / "out"), macs_target=0.7), progress=False).plan
    assert plan.blocks is not None
    assert plan.depth == plan.blocks.gone == ("transformer_blocks.2",)
    assert plan.blocks.errors["transformer_blocks.2"] == min(plan.blocks.errors.values()) == 0
    assert plan.macs[0] < plan.blocks.macs
    assert plan.macs[1] / plan.blocks.macs == pytest.approx(0.7, rel=0.01)
    assert plan.target["macs_target"] == pytest.approx(0.7 * plan.blocks.macs / plan.macs[0])
    assert dp.load(tmp_path / "out").config.num_layers == 3
    told = plan_text(plan, 80).splitlines()
    assert told[0].startswith("depth: 1 blocks go first")
    assert "chosen of a model of" in told[1]
    assert "transformer_blocks.2 0," in told[1]


def test_depth_alone_leaves_a_stock_model_within_the_target(values: dict[str, Any], tmp_path: Path) -> None:
    config = PruningConfig(**values, output=str(tmp_path / "out"), params_target=0.6, max_pruning_ratio=0)
    plan = prune(config, progress=False).plan
    assert plan.blocks is not None
    assert "transformer_blocks.2" in plan.blocks.gone
    assert len(plan.blocks.gone) == 2
    assert plan.params[1] <= 0.6 * plan.blocks.params
    assert not any(group.removed for group in plan.groups)
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path / "out" / "transformer")
    assert type(loaded) is DiTTransformer2DModel
    assert loaded.config.num_layers == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "depth: auto spends a target; add macs_target or params_target"),
        ({"macs_target": 0.5, "allocation": "uniform"}, "allocation: does not go with depth: auto; blocks are weighed"),
        ({"macs_target": 0.5, "global_pruning": True}, "global_pruning: does not go with depth: auto"),
        ({"macs_target": 0.5, "head_pruning_ratio": 0.5}, "head_pruning_ratio: does not go with depth: auto"),
        ({"macs_target": 0.5, "ignored_layers": ["proj_out_1"]}, "ignored_layers: does not go .* name the blocks"),
        ({"macs_target": 0.5, "preset": "obs-diff"}, "preset: does not go with depth: auto"),
        ({"max_pruning_ratio": 0, "depth": []}, "max_pruning_ratio: 0 takes no channels, and no blocks go"),
        ({"latency_target": 0.5}, "latency_target: does not go with depth: auto; blocks are chosen by a size"),
        ({"macs_target": 0.5, "depth": ["auto", "transformer_blocks.1"]}, "depth: auto stands alone"),
    ],
)
def test_what_does_not_go_with_it_is_refused_by_key(values: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        PruningConfig.make({**values, **changes})


def test_where_there_is_nothing_to_choose_or_to_choose_by_it_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    given = {**values, "output": str(tmp_path / "out"), "macs_target": 0.5}
    toy = make("DiT")
    none = replace(find_adapter(toy), model_class="Toy", blocks=())
    with pytest.raises(BadInput, match="depth: auto chooses among blocks, a Toy has none that may go; drop it"):
        check_choosable(PruningConfig(**given), toy, none, DDIMScheduler())
    for changes, words in (
        ({"data": None}, "depth: auto needs 'data'"),
        ({"macs_target": 0.01}, r"macs_target: 0.01 cannot be reached: it is below 0\.\d+ of the dense"),
    ):
        with pytest.raises(BadInput, match=words):
            prune(PruningConfig(**{**given, **changes}), progress=False)
    with pytest.raises(BadInput, match="depth: auto has one budget, a frontier many"):
        frontier_of(PruningConfig(**given), progress=False)
