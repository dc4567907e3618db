"""The linear estimate against the channel itself turned down, resumed runs, processes, and what is stored."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from tiny import make_unet
from tiny_transformers import make, samples_for

import diffprune_plugin as dp
from diffprune_plugin.adapters.unet_2d import UNET_2D
from diffprune_plugin.data.loading import load_samples
from diffprune_plugin.errors import BadInput
from diffprune_plugin.graph.groups import trace_groups
from diffprune_plugin.sensitivity import linear
from diffprune_plugin.sensitivity.linear import Noisy, measure_sensitivity
from diffprune_plugin.sensitivity.sensitivity import Sensitivity

SCHEDULER = DDPMScheduler(num_train_timesteps=20)


def measured(images: np.ndarray, **options: Any) -> Sensitivity:
    settings = {"samples": 4, "probes": 2, "batch_size": 2, "progress": False, **options}
    return measure_sensitivity(make_unet(), SCHEDULER, images, **settings)


def turned_down(unet: Any, layer: str, channel: int, inputs: dict[str, Any], centre: float, by: float) -> torch.Tensor:
    """The output when one channel that goes into a layer comes nearer to its mean by a small share."""

    def pull(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        moved = args[0].clone()
        axis = 1 if moved.ndim == 4 else -1
        moved.select(axis, channel).lerp_(torch.tensor(centre), by)
        return (moved, *args[1:])

    handle = unet.get_submodule(layer).register_forward_pre_hook(pull)
    with torch.no_grad():
        output = UNET_2D.denoise(unet, inputs)
    handle.remove()
    return output


def test_a_score_is_what_the_output_moves_when_the_channel_is_turned_down(images: np.ndarray) -> None:
    unet, count, by = make_unet(), 4, 1e-3
    found = measure_sensitivity(unet, SCHEDULER, images, samples=count, probes=200, batch_size=4, progress=False)
    noisy = Noisy(load_samples(images), SCHEDULER, count, 0, UNET_2D)
    inputs = noisy.batch(range(count), unet)
    with torch.no_grad():
        expected = UNET_2D.denoise(unet, inputs)
    assert found.power == pytest.approx(float(expected.square().mean()), rel=1e-5)
    group = next(g for g in trace_groups(unet, UNET_2D) if g.root == "mid_block.resnets.0.conv1")
    (member,) = (m for m in group.members if m.side == "in")
    seen: list[torch.Tensor] = []
    handle = unet.get_submodule(member.layer).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        UNET_2D.denoise(unet, inputs)
    handle.remove()
    for channel in (0, 5, 11):
        centre = float(seen[0][:, channel].mean())
        moved = (turned_down(unet, member.layer, channel, inputs, centre, by) - expected) / by
        assert found.alone[group.root][channel] == pytest.approx(float(moved.square().mean()), rel=0.2)


def test_a_dimension_of_queries_costs_what_the_output_moves_when_it_is_turned_down(
    images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet, by = make_unet(), 1e-3
    options: dict[str, Any] = {"samples": 4, "probes": 200, "batch_size": 4, "progress": False}
    found = measure_sensitivity(unet, SCHEDULER, images, **options)
    inputs = Noisy(load_samples(images), SCHEDULER, 4, 0, UNET_2D).batch(range(4), unet)
    monkeypatch.setattr(type(UNET_2D), "queries", lambda *_: {})
    without = measure_sensitivity(unet, SCHEDULER, images, **options)
    root, query = "mid_block.attentions.0.to_v", unet.get_submodule("mid_block.attentions.0.to_q")
    assert found.alone["conv_in"] == without.alone["conv_in"]
    with torch.no_grad():
        expected = UNET_2D.denoise(unet, inputs)
        for channel in (0, 7, 31):

            def turn(_: Any, __: Any, output: torch.Tensor, channel: int = channel) -> torch.Tensor:
                output[..., channel] *= 1 - by
                return output

            handle = query.register_forward_hook(turn)
            moved = (UNET_2D.denoise(unet, inputs) - expected) / by
            handle.remove()
            for more, less in ((found.alone, without.alone), (found.scores, without.scores)):
                cost = more[root][channel] - less[root][channel]
                assert cost == pytest.approx(float(moved.square().mean()), rel=0.25)


def test_variances_that_a_model_tells_are_no_part_of_its_error() -> None:
    model = make("DiT")
    data, scheduler = samples_for(model)
    options: dict[str, Any] = {"samples": 4, "probes": 2, "batch_size": 2, "progress": False}
    found = measure_sensitivity(model, scheduler, data, **options)
    with torch.no_grad():
        model.proj_out_2.weight.view(-1, 8, model.inner_dim)[:, 4:] *= 10  # by pixel of a patch
    other = measure_sensitivity(model, scheduler, data, **options)
    assert (other.scores, other.alone, other.power) == (found.scores, found.alone, found.power)


def test_what_was_the_same_for_all_samples_is_kept_with_the_reason() -> None:
    """FLUX's guidance, which calibration gives one value: the bias behind would take all of that over."""
    model = make("Flux")
    data, scheduler = samples_for(model)
    found = measure_sensitivity(model, scheduler, data, samples=4, probes=1, batch_size=4, progress=False)
    assert found.unseen == ("time_text_embed.guidance_embedder.linear_1",)
    plan = dp.make_plan(model, "magnitude", macs_target=0.8, allocation="linear", sensitivity=found)
    group = next(group for group in plan.groups if group.root in found.unseen)
    assert not group.removed
    assert "the same for all samples" in group.reason
    wished = {"pruning_ratio_dict": {"*guidance_embedder*": 0.25}}
    plan = dp.make_plan(model, "magnitude", macs_target=0.8, allocation="linear", sensitivity=found, **wished)
    group = next(group for group in plan.groups if group.root in found.unseen)
    assert len(group.removed) == group.units // 4


def test_no_batch_leaves_its_graph_behind(images: np.ndarray) -> None:
    """A hook of the graph that leads back to it makes a ring that nothing frees: as much memory for each batch."""
    before = {id(found) for found in graphs()}
    measured(images)
    assert not [tuple(found.shape) for found in graphs() if id(found) not in before]


def graphs() -> list[torch.Tensor]:
    """The tensors that are alive and part of a graph."""
    gc.collect()
    return [found for found in gc.get_objects() if type(found) is torch.Tensor and found.grad_fn is not None]


def test_the_output_layer_has_no_score_and_the_model_is_left_as_it_was(images: np.ndarray) -> None:
    unet = make_unet().train()
    unet.conv_in.requires_grad_(False)
    before = {name: (p.requires_grad, p.clone()) for name, p in unet.named_parameters()}
    found = measure_sensitivity(unet, SCHEDULER, images, samples=2, probes=1, progress=False)
    for scores in (found.alone, found.scores):
        assert set(scores["conv_out"]) == {0.0}
        assert min(scores["conv_in"]) > 0
    assert found.unrefitted().scores == found.alone != found.scores
    assert unet.training
    assert all(
        p.grad is None and p.requires_grad == on and torch.equal(p, w)
        for (_, p), (on, w) in zip(unet.named_parameters(), before.values(), strict=True)
    )


def test_the_same_seed_gives_the_same_scores_another_does_not(images: np.ndarray) -> None:
    assert measured(images) == measured(images)
    assert measured(images).scores != measured(images, seed=1).scores


def test_interrupted_it_goes_on_to_the_same_bits(images: np.ndarray, tmp_path: Path, monkeypatch) -> None:
    whole, add, calls = measured(images, batch_size=1), linear.Run.add, iter(range(3))

    def until_the_third(run: linear.Run, *job: Any) -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        add(run, *job)

    storing = {"checkpoint": tmp_path, "checkpoint_seconds": 0.0, "batch_size": 1}
    with monkeypatch.context() as patch:
        patch.setattr(linear.Run, "add", until_the_third)
        with pytest.raises(KeyboardInterrupt):
            measured(images, **storing)
    jobs: list[Any] = []
    monkeypatch.setattr(linear.Run, "add", lambda run, *job: (jobs.append(job), add(run, *job)))
    assert measured(images, **storing) == whole
    assert len(jobs) == 1
    assert not list(tmp_path.iterdir())


def test_what_is_stored_is_read_back_and_a_changed_digit_refused(images: np.ndarray, tmp_path: Path) -> None:
    found, path = measured(images), tmp_path / "sensitivity.json"
    found.save(path)
    assert Sensitivity.load(path) == found
    content = json.loads(path.read_text())
    content["scores"]["conv_in"][3] *= 1.0001
    path.write_text(json.dumps(content))
    with pytest.raises(BadInput, match="altered since it was written"):
        Sensitivity.load(path)
    for text in ("", "[]", '{"sha256": 1}', "[" * 100_000):
        path.write_text(text)
        with pytest.raises(BadInput, match=r"sensitivity.json: (not valid json|nested|holds|not a sensitivity)"):
            Sensitivity.load(path)


def test_errors_of_units_add_up_and_count_for_more_the_fewer_units_stay(images: np.ndarray) -> None:
    found = dataclasses.replace(measured(images), scores={"conv": (1.0, 2.0, 4.0, 9.0)})
    assert found.error("conv", []) == 0.0
    assert found.error("conv", [0]) == pytest.approx(1 / math.sqrt(3 / 4))
    assert found.error("conv", [0, 1, 2]) == pytest.approx(7 / math.sqrt(1 / 4))
    assert found.error("conv", range(4)) == pytest.approx(16 / math.sqrt(1 / 4))  # none stays: as if one did


@pytest.mark.parametrize("key", ["samples", "probes", "batch_size"])
def test_nothing_to_measure_with_is_refused(key: str, images: np.ndarray) -> None:
    with pytest.raises(BadInput, match=f"{key} 0"):
        measured(images, **{key: 0})


@pytest.mark.parametrize(
    "change", [{"power": 0.0}, {"scores": {"conv_in": (math.nan,)}}, {"norms": {"conv_in": (-1.0,)}}]
)
def test_errors_that_cannot_be_are_refused_whatever_their_hash(
    images: np.ndarray, tmp_path: Path, change: dict[str, Any]
) -> None:
    dataclasses.replace(measured(images), **change).save(tmp_path / "s.json")
    with pytest.raises(BadInput, match="not a sensitivity, or damaged: an error in it is negative or not finite"):
        Sensitivity.load(tmp_path / "s.json")


def test_a_file_that_is_no_mapping_and_a_group_it_does_not_know_are_one_line(
    images: np.ndarray, tmp_path: Path
) -> None:
    (tmp_path / "s.json").write_text("null")
    with pytest.raises(BadInput, match="not a sensitivity, or damaged"):
        Sensitivity.load(tmp_path / "s.json")
    with pytest.raises(BadInput, match="it says nothing of elsewhere, as one of another version; measure again"):
        measured(images).error("elsewhere", [0])
