"""A denoiser that is no UNet and names everything differently, with the plugin that describes it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.nn import functional

from diffprune_plugin import hookimpl
from diffprune_plugin.adapters import ModelAdapter, Port


class Mixer(ModelMixin, ConfigMixin):
    """Two residual convolutions at one resolution; the time goes in as a number between 0 and 1."""

    @register_to_config
    def __init__(self, side: int = 8, colours: int = 1, width: int = 16) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(colours, width, 3, padding=1), nn.Conv2d(width, colours, 3, padding=1)
        self.inner, self.outer = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(2 * width, width, 1)
        self.time, self.norm = nn.Linear(1, 2 * width), nn.GroupNorm(4, width)

    def forward(self, x: torch.Tensor, t: torch.Tensor, return_dict: bool = True) -> Any:
        hidden = self.first(x)
        shift = self.time(t.to(x).reshape(-1, 1) / 1000)[:, :, None, None]
        hidden = self.norm(hidden + self.outer(functional.silu(self.inner(hidden) + shift)))
        output = self.last(hidden)
        return {"output": output} if return_dict else (output,)


class MixerPipeline(DiffusionPipeline):
    """Draws as DDPMPipeline does, from a component that is called ``denoiser``."""

    def __init__(self, denoiser: Mixer, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(denoiser=denoiser, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self, batch_size: int = 1, generator: Any = None, num_inference_steps: int = 50, output_type: str = "np"
    ) -> ImagePipelineOutput:
        config = self.denoiser.config
        image = torch.randn((batch_size, config.colours, config.side, config.side), generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for step in self.scheduler.timesteps:
            prediction = self.denoiser(x=image, t=step.expand(batch_size), return_dict=False)[0]
            image = self.scheduler.step(prediction, step, image, generator=generator).prev_sample
        return ImagePipelineOutput((image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy())


MIXER = ModelAdapter(
    model_class="Mixer",
    module="toy",
    component="denoiser",
    sample="x",
    timestep="t",
    size=lambda config: (config["side"], config["side"]),
    smallest=lambda config: (4, 4),
    inputs=(Port("x", ("batch", "{colours}", "height", "width")), Port("t", "batch", torch.int64)),
    outputs=(Port("e", "batch {colours} height width"),),
    keep=("last",),
)


@hookimpl
def diffprune_register_adapters(register: Any) -> None:
    register(MIXER)
