"""A pruned model stays what it is wherever diffusers copies, rebuilds or saves it, or is not written at all."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.training_utils import EMAModel
from tiny import TINY, make_unet, output_of
from torch import nn

import diffprune_plugin as dp
from diffprune_plugin.errors import BadInput

EMA_KEYS = {"decay": 0.9999, "optimization_step": 7000, "power": 0.667, "some_later_option": None}


@pytest.fixture
def pruned() -> Any:
    unet = make_unet()
    dp.remove_(unet, dp.make_plan(unet, "magnitude", pruning_ratio=0.5))
    return unet


def sizes(model: nn.Module) -> list[torch.Size]:
    return [parameter.shape for parameter in model.parameters()]


def test_a_pipeline_made_before_the_removal_saves_what_diffusers_loads(pipeline, tmp_path) -> None:
    other = DDPMPipeline(pipeline.unet, pipeline.scheduler)
    dp.remove_(pipeline.unet, dp.make_plan(pipeline.unet, "magnitude", pruning_ratio=0.5))
    other.save_pretrained(tmp_path / "saved")
    assert torch.equal(output_of(DiffusionPipeline.from_pretrained(tmp_path / "saved").unet), output_of(pipeline.unet))


def test_a_moving_average_is_saved_and_loaded(pruned, tmp_path) -> None:
    ema = EMAModel(pruned.parameters(), model_cls=type(pruned), model_config=pruned.config)
    ema.step(pruned.parameters())
    ema.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["optimization_step"] == 1
    back = EMAModel.from_pretrained(tmp_path, type(pruned))
    assert back.optimization_step == 1
    assert all(torch.equal(a, b) for a, b in zip(back.shadow_params, ema.shadow_params, strict=True))


def test_a_config_rebuilds_the_pruned_sizes_and_without_its_plan_nothing(pruned, tmp_path) -> None:
    config = json.loads(json.dumps(dict(pruned.config)))
    assert sizes(type(pruned).from_config(config)) == sizes(pruned)
    pruned.save_pretrained(tmp_path)
    assert sizes(type(pruned).from_config(tmp_path)) == sizes(pruned)
    assert "_pruning_plan" not in (tmp_path / "config.json").read_text(), "it lies beside"
    config.pop("_pruning_plan")
    with pytest.raises(BadInput, match="does not say what was pruned"):
        type(pruned).from_config(config)
    with pytest.raises(BadInput, match="without a plan has the dense sizes"):
        type(pruned)(**TINY).save_pretrained(tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_a_copy_carries_the_plan(pruned, tmp_path) -> None:
    dp.save(copy.deepcopy(pruned), tmp_path / "copy")
    assert torch.equal(output_of(dp.load(tmp_path / "copy")), output_of(pruned))


def test_auto_is_the_dtype_of_the_file_and_the_loading_info_is_diffusers(pruned, tmp_path) -> None:
    dp.save(pruned.half(), tmp_path / "half")
    cls = type(pruned)
    assert cls.from_pretrained(tmp_path / "half", torch_dtype="auto").dtype is torch.float16
    assert cls.from_pretrained(tmp_path / "half").dtype is torch.float32
    model, info = cls.from_pretrained(tmp_path / "half", output_loading_info=True)
    assert isinstance(model, cls)
    UNet2DModel(**TINY).save_pretrained(tmp_path / "dense")
    assert info == UNet2DModel.from_pretrained(tmp_path / "dense", output_loading_info=True)[1]
    with pytest.raises(BadInput, match="torch_dtype: 'half'"):
        cls.from_pretrained(tmp_path / "half", torch_dtype="half")


def test_config_keys_that_diffusers_passes_over_are_passed_over_here(unet, tmp_path) -> None:
    unet.save_pretrained(tmp_path / "dense")
    path = tmp_path / "dense" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **EMA_KEYS}))
    model = dp.load(tmp_path / "dense")
    dp.remove_(model, dp.make_plan(unet, "magnitude", pruning_ratio=0.5))
    dp.save(model, tmp_path / "pruned")
    assert torch.equal(output_of(dp.load(tmp_path / "pruned")), output_of(model))
    assert dp.load(tmp_path / "pruned").config["decay"] == EMA_KEYS["decay"]


class Scaled(UNet2DModel):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (2 * super().forward(*args, **kwargs)[0],)


def test_a_class_of_ones_own_is_pruned_but_refused_before_it_is_written(tmp_path) -> None:
    unet = Scaled(**TINY)
    with pytest.raises(BadInput, match="Scaled is a class of your own"):
        dp.save(DDPMPipeline(unet, DDPMScheduler()), tmp_path / "saved")
    dp.remove_(unet, dp.make_plan(unet, "magnitude", pruning_ratio=0.5))
    for save in (dp.save, type(unet).save_pretrained):
        with pytest.raises(BadInput, match="register a ModelAdapter"):
            save(unet, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_a_subclass_of_the_pruned_class_is_refused_before_it_is_written(pruned, tmp_path) -> None:
    pruned.__class__ = type("Mine", (type(pruned),), {})
    for save in (dp.save, type(pruned).save_pretrained):
        with pytest.raises(BadInput, match="Mine is a class of your own"):
            save(pruned, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_a_model_that_no_adapter_knows_is_refused_before_it_is_written(tmp_path) -> None:
    with pytest.raises(BadInput, match="no adapter for AutoencoderKL"):
        dp.save(AutoencoderKL(block_out_channels=(32,), norm_num_groups=8), tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_a_pipeline_in_the_place_of_its_model_is_refused_with_its_name(images) -> None:
    pipeline = DDPMPipeline(make_unet(), DDPMScheduler(100))
    for call in (
        lambda: dp.make_plan(pipeline, "magnitude"),
        lambda: dp.calibrate(pipeline, pipeline.scheduler, images),
    ):
        with pytest.raises(BadInput, match=r"DDPMPipeline is a pipeline; give the model in it, its \.unet"):
            call()


@pytest.mark.parametrize(("wrap", "attribute"), [(nn.DataParallel, "module"), (torch.compile, "_orig_mod")])
def test_a_wrapped_model_is_refused_with_the_attribute_that_holds_it(wrap, attribute, unet, tmp_path) -> None:
    plan, wrapped = dp.make_plan(unet, "magnitude"), wrap(unet)
    for call in (
        lambda: dp.make_plan(wrapped, "magnitude"),
        lambda: dp.remove_(wrapped, plan),
        lambda: dp.save(wrapped, tmp_path / "saved"),
    ):
        with pytest.raises(BadInput, match=rf"wraps the model; give its \.{attribute}"):
            call()


def test_no_path_of_the_machine_is_written(dense_dir, tmp_path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(dense_dir)
    dp.remove_(pipeline.unet, dp.make_plan(pipeline.unet, "magnitude"))
    dp.save(pipeline, tmp_path / "pruned")
    dp.load(tmp_path / "pruned").save_pretrained(tmp_path / "again")
    for file in [*(tmp_path / "pruned").rglob("*.json"), *(tmp_path / "again").rglob("*.json")]:
        assert str(tmp_path) not in file.read_text(), file
