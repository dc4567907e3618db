"""What pruning has to know about GatedUNet, as a table."""

import torch

from diffprune_plugin.adapters.table import Heads, Mirror, ModelAdapter, Pairs, Port

GATED_UNET = ModelAdapter(
    model_class="GatedUNet",
    module="diffprune_example",
    inputs=(Port("sample", "batch {in_channels} height width"), Port("timestep", "batch", torch.int64)),
    outputs=(Port("out_sample", "batch {out_channels} height width"),),
    keep=("conv_out",),
    heads=(Heads("SelfAttention", "heads", ("query", "key", "value"), query="query", scale="scale"),),
    pairs=(Pairs("Gated", "proj", 2),),
    mirrors=(Mirror("Shrink", "width", "conv.in_channels"),),
)
