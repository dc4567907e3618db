"""The criterion `output_error` against a hand-written loop, on a UNet with and without paired channels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from tiny import make_unet
from tiny_conditional import SD

import diffprune_plugin as dp
from diffprune_plugin.data.loading import load_samples
from diffprune_plugin.data.samples import Samples
from diffprune_plugin.errors import BadInput, MissingGradients
from diffprune_plugin.graph.groups import trace_groups
from diffprune_plugin.plugins import find_adapter
from diffprune_plugin.pruning.directory import read_plan
from diffprune_plugin.sensitivity import linear
from diffprune_plugin.sensitivity.blocks import Branches
from diffprune_plugin.sensitivity.linear import Noisy, Run, measure_sensitivity
from diffprune_plugin.sensitivity.norms import Norms
from diffprune_plugin.sensitivity.sensitivity import Sensitivity
from diffprune_plugin.workflow import prune

SCHEDULER = DDPMScheduler(num_train_timesteps=20)
COUNT, PROBES = 2, 2


def inputs_of_layers(unet: Any, layers: list[str], inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """The output, and a clone of what goes into each layer, by which alone the layer is reached; what queries give."""
    own: dict[str, torch.Tensor] = {}
    handles = []
    for name in layers:

        def through(_: Any, args: tuple[Any, ...], name: str = name) -> tuple[Any, ...]:
            own[name] = args[0].clone()
            return (own[name], *args[1:])

        handles.append(unet.get_submodule(name).register_forward_pre_hook(through))
    for name in find_adapter(unet).queries(unet):

        def gives(_: Any, __: Any, output: torch.Tensor, name: str = name) -> None:
            own[f"{name} gives"] = output

        handles.append(unet.get_submodule(name).register_forward_hook(gives))
    output = find_adapter(unet).denoise(unet, inputs)
    for handle in handles:
        handle.remove()
    return output, own


def channels_first(tensor: torch.Tensor) -> torch.Tensor:
    """One sample's activations as (channels, positions)."""
    return tensor[0].flatten(1) if tensor.ndim == 4 else tensor[0].reshape(-1, tensor.shape[-1]).T


def by_hand(unet: Any, samples: Samples) -> dict[str, torch.Tensor]:
    """For each sample and probe: v . y backward, sum (x - mean) dx over positions and layers, squared, averaged; and
    the same of q dq."""
    adapter = find_adapter(unet)
    groups = trace_groups(unet, adapter)
    layers = sorted({m.layer for group in groups for m in group.members if m.side == "in"})
    noisy = Noisy(samples, SCHEDULER, COUNT, 0, adapter)
    batches = [noisy.batch([row], unet) for row in range(COUNT)]
    run = Run(unet, adapter, groups, noisy, 1, 0, None, Branches(unet, {}), Norms(unet, ()))  # type: ignore[arg-type]
    seen = [inputs_of_layers(unet, layers, batch) for batch in batches]
    means = {name: sum(channels_first(own[name]).mean(1) for _, own in seen) / COUNT for name in layers}
    score = {group.root: torch.zeros(group.units) for group in groups}
    for row, (output, own) in enumerate(seen):
        for probe in range(PROBES):
            v = run.noise(row, probe, output.shape[1:])
            found = torch.autograd.grad((v * output[0]).sum(), list(own.values()), retain_graph=True, allow_unused=True)
            gradients = dict(zip(own, found, strict=True))
            for group in groups:
                moved = torch.zeros(group.channels)
                for member in group.members:
                    if member.side == "in" and gradients[member.layer] is not None:
                        x, g = channels_first(own[member.layer]), channels_first(gradients[member.layer])
                        s = ((x - means[member.layer][:, None]) * g).sum(1).detach()
                        for root, channel in zip(member.roots, member.channels, strict=True):
                            moved[root] += s[channel]
                logits = torch.zeros(group.channels)
                for member in group.members:
                    if member.side == "out" and (name := f"{member.layer} gives") in own:
                        s = (channels_first(own[name]) * channels_first(gradients[name])).sum(1).detach()
                        for root, channel in zip(member.roots, member.channels, strict=True):
                            logits[root] += s[channel]
                for channel, (s, q) in enumerate(zip(moved, logits, strict=True)):
                    score[group.root][channel % group.units] += (s**2 + q**2) / output.numel() / (COUNT * PROBES)
    return score


@pytest.mark.parametrize("kind", ["plain", "paired"])
def test_the_score_is_that_of_the_hand_written_loop(images: np.ndarray, kind: str) -> None:
    if kind == "plain":
        unet, samples = make_unet(), load_samples(images)
    else:
        torch.manual_seed(0)
        from diffusers import UNet2DConditionModel

        unet = UNet2DConditionModel(**SD).eval()
        inputs = find_adapter(unet).flat_inputs(unet, 3, None, 0)
        del inputs["timestep"]
        samples = Samples(inputs.pop("sample"), inputs)
    options: Any = {"samples": COUNT, "probes": PROBES, "batch_size": 2, "progress": False}
    found = measure_sensitivity(unet, SCHEDULER, samples, **options)
    criterion, expected = dp.importance("output_error", sensitivity=found.unrefitted()), by_hand(unet, samples)
    groups = trace_groups(unet, find_adapter(unet))
    assert any(group.pairs == 2 for group in groups) == (kind == "paired")
    for group in groups:
        score = criterion(group.graph_group)
        assert score is not None
        assert score.shape == (group.channels,)
        by_channel = expected[group.root].repeat(group.pairs) / group.pairs
        torch.testing.assert_close(score.float(), by_channel, rtol=1e-3, atol=1e-5 * float(by_channel.max()))


def test_channels_that_move_the_output_least_go_first(images: np.ndarray) -> None:
    unet = make_unet()
    options: Any = {"samples": 2, "probes": 1, "progress": False}
    found = measure_sensitivity(unet, SCHEDULER, images, **options)
    plan = dp.make_plan(unet, dp.importance("output_error", sensitivity=found), pruning_ratio=0.5)
    group = next(g for g in plan.groups if g.root == "mid_block.resnets.0.conv1")
    scores, gone = np.array(found.scores[group.root]), list(group.removed)
    for part in np.split(np.arange(group.units), group.units // ((len(gone) and group.units // group.step) or 1)):
        lost = [unit for unit in part if unit in gone]
        kept = [unit for unit in part if unit not in gone]
        assert scores[lost].max() <= scores[kept].min()


def test_without_a_sensitivity_or_with_that_of_another_model_it_says_so(images: np.ndarray) -> None:
    with pytest.raises(MissingGradients, match="output_error has no sensitivity; pass importance"):
        dp.make_plan(make_unet(), "output_error", pruning_ratio=0.5)
    with pytest.raises(BadInput, match="sensitivity 'file' is not what measure_sensitivity returns"):
        dp.importance("output_error", sensitivity="file")
    small = make_unet(block_out_channels=(16, 16))
    found = measure_sensitivity(small, SCHEDULER, images, samples=1, probes=1, progress=False)
    with pytest.raises(BadInput, match="measure it with this model"):
        dp.make_plan(make_unet(), dp.importance("output_error", sensitivity=found), pruning_ratio=0.5)


def test_a_config_that_names_it_has_it_measured_once(
    dense_dir: Path, npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "sensitivity.json"
    values: dict[str, Any] = {"model": str(dense_dir), "data": str(npz), "output": str(tmp_path / "pruned")}
    values |= {"importance": "output_error", "macs_target": 0.6, "compensate": False, "sensitivity": str(file)}
    values |= {"sensitivity_samples": 2, "sensitivity_probes": 1, "allocation": "uniform"}
    made = prune(dp.PruningConfig.make(values), progress=False).plan
    assert made.criterion["name"] == "output_error"
    assert made.allocation is None
    assert read_plan(tmp_path / "pruned") == made
    monkeypatch.setattr(linear.Run, "passes", None)  # what is stored is read
    assert prune(dp.PruningConfig.make(values), dry_run=True, overwrite=True, progress=False).plan == made
    with pytest.raises(BadInput, match="importance: it needs 'data'"):
        prune(dp.PruningConfig.make({**values, "data": None}), dry_run=True, overwrite=True)


def test_what_is_not_compensated_is_spent_by_what_no_refit_mends_and_an_older_file_is_refused(
    dense_dir: Path, npz: Path, tmp_path: Path
) -> None:
    file = tmp_path / "sensitivity.json"
    values: dict[str, Any] = {"model": str(dense_dir), "data": str(npz), "output": str(tmp_path / "pruned")}
    values |= {"importance": "output_error", "macs_target": 0.6, "compensate": False, "sensitivity": str(file)}
    values |= {"sensitivity_samples": 2, "sensitivity_probes": 1, "allocation": "linear"}
    plan = prune(dp.PruningConfig.make(values), progress=False).plan
    found = Sensitivity.load(file)
    assert plan.allocation is not None
    assert plan.allocation.sensitivity == found.unrefitted().sha256 != found.sha256
    replace(found, estimate=0).save(file)
    with pytest.raises(BadInput, match=r"sensitivity\.json: by the formulas of another version; remove it"):
        prune(dp.PruningConfig.make(values), dry_run=True, overwrite=True, progress=False)
