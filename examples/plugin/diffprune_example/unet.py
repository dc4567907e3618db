"""A small diffusion UNet that is none of diffusers': gated layers, attention, and a resampler that checks its width."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import Timesteps
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """Two convolutions around a norm; the time embedding is added between them."""

    def __init__(self, into, out, time, groups):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(into, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        self.norm, self.time = nn.GroupNorm(groups, out), nn.Linear(time, out)
        self.shortcut = nn.Conv2d(into, out, 1)

    def forward(self, x, time):
        inner = self.norm(self.conv1(x) + self.time(time)[:, :, None, None])
        return self.shortcut(x) + self.conv2(F.silu(inner))


class Shrink(nn.Module):
    """Half the height and width; refuses inputs of another width than it was made for."""

    def __init__(self, width):
        super().__init__()
        self.width, self.conv = width, nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x):
        assert x.shape[1] == self.width
        return self.conv(x)


class SelfAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x):
        batch, channels, height, width = x.shape
        flat = x.flatten(2).transpose(1, 2)
        split = [
            layer(flat).reshape(batch, height * width, self.heads, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        ]
        mixed = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
        return x + self.out(mixed).transpose(1, 2).reshape(batch, channels, height, width)


class Gated(nn.Module):
    """Half of the inner channels gate the other half."""

    def __init__(self, width):
        super().__init__()
        self.proj, self.out = nn.Conv2d(width, 4 * width, 1), nn.Conv2d(2 * width, width, 1)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=1)
        return x + self.out(value * torch.sigmoid(gate))


class GatedUNet(ModelMixin, ConfigMixin):
    """Predicts the noise in (batch, in_channels, height, width) at ``timestep`` (a number, or one per sample)."""

    @register_to_config
    def __init__(self, sample_size=16, in_channels=1, out_channels=1, block_out_channels=(16, 32), heads=4, groups=4):
        super().__init__()
        narrow, wide = block_out_channels
        self.time_proj = Timesteps(narrow, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_in, self.time_out = nn.Linear(narrow, 2 * wide), nn.Linear(2 * wide, 2 * wide)
        self.conv_in = nn.Conv2d(in_channels, narrow, 3, padding=1)
        self.down, self.shrink = Block(narrow, narrow, 2 * wide, groups), Shrink(narrow)
        self.middle, self.attention, self.gated = (
            Block(narrow, wide, 2 * wide, groups),
            SelfAttention(wide, heads),
            Gated(wide),
        )
        self.up = Block(wide + narrow, narrow, 2 * wide, groups)
        self.norm_out, self.conv_out = nn.GroupNorm(groups, narrow), nn.Conv2d(narrow, out_channels, 3, padding=1)

    def forward(self, sample, timestep, return_dict=True):
        timestep = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        time = F.silu(self.time_out(F.silu(self.time_in(self.time_proj(timestep).to(sample.dtype)))))
        skip = self.down(self.conv_in(sample), time)
        x = self.gated(self.attention(self.middle(self.shrink(skip), time)))
        x = self.up(torch.cat([F.interpolate(x, scale_factor=2.0), skip], dim=1), time)
        x = self.conv_out(F.silu(self.norm_out(x)))
        return UNet2DOutput(sample=x) if return_dict else (x,)
