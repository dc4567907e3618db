from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler

import diffprune_plugin
from diffprune_plugin.errors import BadInput
from diffprune_plugin.export import ORTUNet
from diffprune_plugin.export.ort_unet import flattened


@pytest.fixture(scope="module")
def unet(models):
    return ORTUNet(models.pruned_onnx)


def test_ddim_draws_the_same_uint8_images_as_pytorch_from_the_same_seed(models, unet):
    def images(denoiser: torch.nn.Module) -> np.ndarray:
        pipeline = DDIMPipeline(unet=denoiser, scheduler=DDIMScheduler()).to("cpu")
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        drawn = pipeline(batch_size=2, generator=generator, num_inference_steps=3, output_type="np")
        return np.round(drawn.images * 255).astype(np.uint8)

    assert np.array_equal(images(unet), images(diffprune_plugin.load(models.pruned)))


def test_it_looks_like_a_unet_to_a_pipeline(unet):
    assert unet.config.sample_size == 16
    assert unet.dtype is torch.float32
    assert unet.device == torch.device("cpu")
    assert unet.to("cpu") is unet
    with unet.cache_context("cond"):  # as FLUX's pipeline does at every step
        pass


def test_a_scalar_timestep_counts_for_the_whole_batch(unet):
    sample = torch.randn(3, 3, 16, 16)
    one = unet(sample, 7).sample
    assert torch.equal(one, unet(sample, torch.tensor([7, 7, 7]), return_dict=False)[0])
    assert one.shape == sample.shape


def test_a_timestep_between_two_is_refused_and_not_cut_off(unet):
    sample = torch.randn(1, 3, 16, 16)
    assert torch.equal(unet(sample, torch.tensor(7.0)).sample, unet(sample, 7).sample)
    with pytest.raises(BadInput, match=r"timestep 7.5 is no whole number"):
        unet(sample, torch.tensor(7.5))


def test_an_argument_that_the_graph_lacks_is_refused_and_none_is_not_an_argument(unet):
    sample = torch.randn(1, 3, 16, 16)
    unet(sample, 1, class_labels=None, cross_attention_kwargs=None)
    with pytest.raises(BadInput, match=r"the graph takes sample, timestep; it has no cross_attention_kwargs"):
        unet(sample, 1, cross_attention_kwargs=0.5)
    with pytest.raises(BadInput, match="the graph takes sample, timestep"):
        unet(sample, 1, torch.zeros(1))


@pytest.mark.parametrize("target", ["cuda", torch.float16])
def test_it_does_not_pretend_to_move(unet, target):
    with pytest.raises(BadInput, match=r"instead of \.to\(\)"):
        unet.to(target)


def test_arguments_inside_dicts_are_inputs_of_their_own():
    assert flattened({"added_cond_kwargs": {"time_ids": 1}, "mask": 2}) == {"time_ids": 1, "mask": 2}
