"""Tiny random transformers of every class that has an adapter, their biases and norms away from zeros and ones; noise
for any model."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
)

from diffprune_plugin.data.samples import Samples
from diffprune_plugin.plugins import find_adapter
from diffprune_plugin.testing.tiny import unsettled_

SIZES: dict[str, Any] = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8}
DIT = {**SIZES, "in_channels": 4, "out_channels": 8, "num_embeds_ada_norm": 10}
PIXART = {**SIZES, "in_channels": 4, "out_channels": 8, "cross_attention_dim": 32, "caption_channels": 12}
ALPHA = {**PIXART, "num_layers": 1, "attention_head_dim": 6, "cross_attention_dim": 24}
ALPHA |= {"use_additional_conditions": True}
SD3 = {**SIZES, "in_channels": 4, "out_channels": 4, "joint_attention_dim": 24, "caption_projection_dim": 32}
SD3 |= {"num_layers": 3, "pooled_projection_dim": 20, "pos_embed_max_size": 8}
SD35 = {**SD3, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}
FLUX = {"in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16}
FLUX |= {"num_attention_heads": 4, "joint_attention_dim": 24, "pooled_projection_dim": 20}
FLUX |= {"axes_dims_rope": (4, 6, 6), "guidance_embeds": True}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "DiT": (DiTTransformer2DModel, DIT),
    "PixArt sigma": (PixArtTransformer2DModel, PIXART),
    "PixArt alpha": (PixArtTransformer2DModel, ALPHA),
    "SD 3": (SD3Transformer2DModel, SD3),
    "SD 3.5": (SD3Transformer2DModel, SD35),
    "Flux": (FluxTransformer2DModel, FLUX),
}


def make(name: str, seed: int = 0, **changes: Any) -> Any:
    """A model of some 0.1 M random parameters, in eval mode."""
    cls, config = MODELS[name]
    torch.manual_seed(seed)
    model = cls(**{**config, **changes})
    model.register_to_config(sample_size=8)  # Flux has none of its own
    return unsettled_(model).eval()


COUNT = 4


def samples_for(model: Any) -> tuple[Samples, Any]:
    """Noise with all that the model takes beside it, and a scheduler."""
    adapter, words = find_adapter(model), {"sequence": 5}
    given = adapter.flat_inputs(model, batch=COUNT, words=words)
    values = torch.randn(COUNT, *adapter.sample_shape(model), generator=torch.Generator().manual_seed(0))
    flow = adapter.objective == "flow_matching"
    extra = {port.name: given[port.name] for port in adapter.further_ports(model)}
    return Samples(values, extra=extra), FlowMatchEulerDiscreteScheduler() if flow else DDIMScheduler()
