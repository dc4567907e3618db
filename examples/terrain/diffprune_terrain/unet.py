"""The consistency UNet of adaptive-terrain-diffusion in torch, written so that its channels can go.

It is the UNet of guided diffusion (arXiv 2105.05233) with two changes that leave what it computes as it is. Queries,
keys and values are layers of their own. The norm inside a block is cut into as many parts as its groups have channels,
the first channels of all groups before all second ones, so that a group can go whole and no other notices; its weights
are in the embedding's layer behind it.
"""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import Timesteps
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn
from torch.nn import functional as F

SIGMA_MIN, SIGMA_DATA = 0.002, 0.5


def normed(x, parts):
    """Each group, a channel of every part, with mean 0 and variance 1.

    torch-pruning follows a chunk whose parts are used once each: hence two of them.
    """
    mean = sum(piece.mean((2, 3), keepdim=True) for piece in x.chunk(parts, dim=1)) / parts
    centred = [piece - mean for piece in x.chunk(parts, dim=1)]
    variance = sum(piece.square().mean((2, 3), keepdim=True) for piece in centred) / parts
    return torch.cat([piece * torch.rsqrt(variance + 1e-5) for piece in centred], dim=1)


def same(x):
    return x


def halved(x):
    return F.avg_pool2d(x, 2)


def doubled(x):
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Block(nn.Module):
    """Two convolutions; the embedding scales and shifts what is between them."""

    def __init__(self, into, out, embedding, groups, resize=same):
        super().__init__()
        self.parts, self.resize = out // groups, resize
        self.norm, self.conv1 = nn.GroupNorm(groups, into), nn.Conv2d(into, out, 3, padding=1)
        self.embedding, self.conv2 = nn.Linear(embedding, 2 * out), nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Conv2d(into, out, 1) if into != out else nn.Identity()

    def forward(self, x, embedding):
        scale, shift = self.embedding(embedding)[:, :, None, None].chunk(2, dim=1)
        inner = normed(self.conv1(self.resize(F.silu(self.norm(x)))), self.parts)
        return self.shortcut(self.resize(x)) + self.conv2(F.silu(inner * scale + shift))


class SelfAttention(nn.Module):
    """Between the pixels, with heads of 32 channels."""

    def __init__(self, width, groups, head):
        super().__init__()
        self.heads, self.norm = width // head, nn.GroupNorm(groups, width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x, _):
        batch, channels, height, width = x.shape
        flat = self.norm(x).flatten(2).transpose(1, 2)
        split = [
            layer(flat).reshape(batch, height * width, self.heads, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        ]
        mixed = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
        return x + self.out(mixed).transpose(1, 2).reshape(batch, channels, height, width)


class Stage(nn.ModuleList):
    """Blocks and attentions one after the other."""

    def forward(self, x, embedding):
        for layer in self:
            x = layer(x, embedding)
        return x


class TerrainUNet(ModelMixin, ConfigMixin):
    """Terrain (batch, 1, height, width) in [-1, 1] from noisy terrain, the noise's sigma (batch,) and the difficulty
    (batch,) in [0, 1]."""

    @register_to_config
    def __init__(
        self,
        sample_size=128,
        block_out_channels=(32, 32, 64, 96, 128),
        blocks=4,
        attention_levels=(2, 3, 4),
        groups=32,
        head=32,
    ):
        super().__init__()
        first, wide, last = block_out_channels[0], 4 * block_out_channels[0], len(block_out_channels) - 1
        self.sigmas = Timesteps(first, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.sigma_in, self.sigma_out = nn.Linear(first, wide), nn.Linear(wide, wide)
        self.difficulty_in, self.difficulty_out = nn.Linear(1, wide), nn.Linear(wide, wide)
        self.conv_in = nn.Conv2d(1, first, 3, padding=1)

        def stage(level, into, resize=None):
            width = block_out_channels[level]
            layers = [Block(into, width, wide, groups)]
            if level in attention_levels:
                layers.append(SelfAttention(width, groups, head))
            if resize:
                layers.append(Block(width, width, wide, groups, resize))
            return Stage(layers)

        self.down, self.up, skips = nn.ModuleList(), nn.ModuleList(), [first]
        for level, width in enumerate(block_out_channels):
            for _ in range(blocks):
                self.down.append(stage(level, skips[-1]))
                skips.append(width)
            if level < last:
                self.down.append(Stage([Block(width, width, wide, groups, halved)]))
                skips.append(width)
        middle = [Block(width, width, wide, groups) for _ in range(2)]
        self.middle = Stage([middle[0], SelfAttention(width, groups, head), middle[1]])
        for level in reversed(range(last + 1)):
            for number in range(blocks + 1):
                resize = doubled if level and number == blocks else None
                self.up.append(stage(level, width + skips.pop(), resize))
                width = block_out_channels[level]
        self.norm_out, self.conv_out = nn.GroupNorm(groups, first), nn.Conv2d(first, 1, 3, padding=1)

    def forward(self, noisy, sigma, difficulty, return_dict=True):
        # The boundary condition of consistency models, arXiv 2303.01469, appendix C.
        sigma = sigma.clamp(min=SIGMA_MIN)
        above, total = sigma - SIGMA_MIN, (sigma**2 + SIGMA_DATA**2).sqrt()
        skip, out = SIGMA_DATA**2 / (above**2 + SIGMA_DATA**2), above * SIGMA_DATA / total
        steps = (250 * sigma.double().log()).to(sigma.dtype)  # in double: 250 times a float's last digit would be seen
        time = self.sigma_out(F.silu(self.sigma_in(self.sigmas(steps).to(noisy.dtype))))
        embedding = F.silu(time + self.difficulty_out(F.silu(self.difficulty_in(difficulty[:, None]))))
        x = self.conv_in(noisy / total[:, None, None, None])
        skips = [x]
        for stage in self.down:
            x = stage(x, embedding)
            skips.append(x)
        x = self.middle(x, embedding)
        for stage in self.up:
            x = stage(torch.cat([x, skips.pop()], dim=1), embedding)
        x = self.conv_out(F.silu(self.norm_out(x)))
        x = (out[:, None, None, None] * x + skip[:, None, None, None] * noisy).clamp(-1, 1)
        return UNet2DOutput(sample=x) if return_dict else (x,)
