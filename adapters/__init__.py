"""What is known about each model class, as tables."""

from __future__ import annotations

from collections.abc import Callable

from diffprune_plugin.adapters.depth import Blocks, DepthPlan, Residual
from diffprune_plugin.adapters.dit import DIT
from diffprune_plugin.adapters.flux import FLUX
from diffprune_plugin.adapters.pixart import PIXART
from diffprune_plugin.adapters.ports import Port
from diffprune_plugin.adapters.sd3 import SD3
from diffprune_plugin.adapters.table import Heads, Keep, Known, Mirror, ModelAdapter, Pairs, Refused
from diffprune_plugin.adapters.unet_2d import UNET_2D
from diffprune_plugin.adapters.unet_2d_condition import UNET_2D_CONDITION
from diffprune_plugin.hookspecs import hookimpl

__all__ = [
    "BUILT_IN",
    "REFUSED",
    "Blocks",
    "DepthPlan",
    "Heads",
    "Keep",
    "Known",
    "Mirror",
    "ModelAdapter",
    "Pairs",
    "Port",
    "Refused",
    "Residual",
]
BUILT_IN = (UNET_2D, UNET_2D_CONDITION, DIT, PIXART, SD3, FLUX)

LATER = "a transformer without an adapter yet"
# Models that people try and that cannot be pruned on their own, and why.
REFUSED = {
    "ControlNetModel": "its outputs are added to the skip connections of a UNet, whose widths they have to keep: "
    "pruning it needs the plan of that UNet; prune the UNet of a pipeline without it",
    "Flux2Transformer2DModel": f"{LATER}: queries, keys, values and feed-forward of its single blocks are one layer",
    "SanaTransformer2DModel": f"{LATER}: its feed-forward is a gated depthwise convolution",
    "QwenImageTransformer2DModel": f"{LATER}: its rotary positions are complex, half of its last block unused",
    "ZImageTransformer2DModel": f"{LATER}: it takes lists of tensors, and its time runs the other way",
    "WanTransformer3DModel": f"{LATER}: it makes videos, and its norms run over all heads",
}


@hookimpl
def diffprune_register_adapters(register: Callable[[ModelAdapter], None]) -> None:
    for adapter in BUILT_IN:
        register(adapter)
