"""diffusers' SD3Transformer2DModel: Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from diffprune_plugin.adapters.depth import STREAMS, Blocks, State
from diffprune_plugin.adapters.dit import RESIDUAL, predicted_channels
from diffprune_plugin.adapters.ports import Port, two_patches
from diffprune_plugin.adapters.rows import JOINT, JOINT_NORMS, Heads, Keep, Known
from diffprune_plugin.adapters.table import ModelAdapter, always


def context_ends(state: State, block: str) -> State:
    """The weights where this block is the last, which gives no text: of what its text norm is modulated with the shift
    and the scale of attention are left, the other way round."""
    names = [f"{block}.norm1_context.linear.{key}" for key in ("weight", "bias")]
    width = state[f"{block}.attn.to_q.weight"].shape[1]
    if len(state[names[0]]) == 2 * width:  # it was the last before
        return state
    return state | {name: state[name][: 2 * width].roll(width, 0) for name in names}


SD3 = ModelAdapter(
    model_class="SD3Transformer2DModel",
    component="transformer",
    sample="hidden_states",
    objective="flow_matching",
    smallest=two_patches,
    any_size=True,
    largest=lambda config: int(config["pos_embed_max_size"] * config["patch_size"]),
    inputs=(
        Port("hidden_states", "batch {in_channels} height width"),
        Port("encoder_hidden_states", "batch sequence {joint_attention_dim}"),
        Port("pooled_projections", "batch {pooled_projection_dim}"),
        Port("timestep", "batch"),
    ),
    blocks=(Blocks("transformer_blocks", "num_layers", ("dual_attention_layers",), context_ends, STREAMS),),
    outputs=(Port("out_sample", ("batch", predicted_channels, "height", "width")),),
    known=(Known("qk_norm", (None, "rms_norm")),),
    keep=(
        Keep("pos_embed.proj", always, RESIDUAL),
        Keep("context_embedder", always, RESIDUAL),
        "proj_out",
    ),
    heads=(
        Heads(
            "Attention",
            "heads",
            JOINT,
            "to_q",
            "scale",
            whole=True,
            norms=JOINT_NORMS,
            widths=("inner_dim", "inner_kv_dim"),
            value="to_v",
        ),
    ),
    processors=("JointAttnProcessor2_0",),
    words=(("sequence", 333),),
    encoded=(
        "encoder_hidden_states",
        "null encoder_hidden_states",
        "pooled_projections",
        "null pooled_projections",
    ),
)
