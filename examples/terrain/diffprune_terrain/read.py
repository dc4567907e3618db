"""The published ONNX file as a pipeline directory, and terrains of its own to calibrate with.

pip install adaptive-terrain-diffusion==0.4.2
python -m diffprune_terrain.read terrain          # terrain/model and terrain/data.safetensors
"""

import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from onnx import numpy_helper
from safetensors.torch import save_file

from diffprune_terrain.adapter import SCHEDULE, SIGMA_MAX
from diffprune_terrain.unet import Block, SelfAttention, TerrainUNet

COUNT, SEED = 128, 0


def published():
    """The file in the installed package."""
    return Path(str(files("terrain_diffusion") / "weights" / "terrain_consistency_unet_difficulty100.onnx"))


class Weights:
    """The tensors of the file by name, and those of its norms, which have none, in the order of their use."""

    def __init__(self, path):
        graph = onnx.load(path).graph
        self.tensors = {tensor.name: torch.tensor(numpy_helper.to_array(tensor)) for tensor in graph.initializer}
        made = {node.output[0]: node for node in graph.node}
        scaled = [node for node in graph.node if node.op_type == "Mul" and self.of_norm(node, made)]
        added = {node.input[0]: node.input[1] for node in graph.node if node.op_type == "Add"}
        self.norms = iter([(node.input[1], added[node.output[0]]) for node in scaled])

    def of_norm(self, node, made):
        before = made.get(node.input[0])
        source = made.get(before.input[0]) if before is not None and before.op_type == "Reshape" else None
        return source is not None and source.op_type == "InstanceNormalization"

    def norm(self):
        """Weight and bias (channels,) of the next one."""
        return tuple(self.tensors[name].flatten() for name in next(self.norms))

    def layer(self, name):
        return self.tensors[f"network.{name}.weight"], self.tensors[f"network.{name}.bias"]


@torch.no_grad()
def put_(layer, pair):
    for parameter, value in zip((layer.weight, layer.bias), pair, strict=True):
        parameter.copy_(value.reshape(parameter.shape))


def put_block_(block, weights, name):
    """A residual block: the inner norm's weights go into the embedding's layer, its groups' channels apart."""
    put_(block.norm, weights.norm())
    gain, offset = weights.norm()
    weight, bias = (value.chunk(2) for value in weights.layer(f"{name}.emb_layers.1"))
    columns = gain[:, None], offset[:, None]
    scale = columns[0] * weight[0], gain * (1 + bias[0])
    shift = columns[1] * weight[0] + weight[1], offset * (1 + bias[0]) + bias[1]
    order = torch.arange(len(gain)).reshape(-1, block.parts).T.flatten()
    put_(block.embedding, [torch.cat([a[order], b[order]]) for a, b in zip(scale, shift, strict=True)])
    put_(block.conv1, [value[order] for value in weights.layer(f"{name}.in_layers.2")])
    into, bias = weights.layer(f"{name}.out_layers.3")
    put_(block.conv2, (into[:, order], bias))
    if isinstance(block.shortcut, torch.nn.Conv2d):
        put_(block.shortcut, weights.layer(f"{name}.skip_connection"))


def put_attention_(attention, weights, name):
    """The file has queries, keys and values in one layer."""
    put_(attention.norm, weights.norm())
    parts = [value.chunk(3) for value in weights.layer(f"{name}.qkv")]
    for layer, *pair in zip((attention.query, attention.key, attention.value), *parts, strict=True):
        put_(layer, pair)
    put_(attention.out, weights.layer(f"{name}.proj_out"))


def read(path, **config):
    """TerrainUNet with the weights of the file."""
    unet, weights = TerrainUNet(**config).eval(), Weights(path)
    for ours, theirs in (
        ("sigma_in", "time_embed.0"),
        ("sigma_out", "time_embed.2"),
        ("difficulty_in", "label_emb.0"),
        ("difficulty_out", "label_emb.2"),
        ("conv_in", "input_blocks.0.0"),
        ("conv_out", "out.2"),
    ):
        put_(unet.get_submodule(ours), weights.layer(theirs))
    stages = [(stage, f"input_blocks.{number}") for number, stage in enumerate(unet.down, 1)]
    stages += [(unet.middle, "middle_block")]
    stages += [(stage, f"output_blocks.{number}") for number, stage in enumerate(unet.up)]
    for stage, name in stages:
        for number, layer in enumerate(stage):
            kinds = {Block: put_block_, SelfAttention: put_attention_}
            kinds[type(layer)](layer, weights, f"{name}.{number}")
    put_(unet.norm_out, weights.norm())
    return unet


def terrains(path, count=COUNT, seed=SEED, size=128):
    """What the file draws, as the package does: ``latents`` (count, 1, size, size) and ``difficulty`` (count,)."""
    session, generator = (
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]),
        np.random.default_rng(seed),
    )
    difficulty = generator.uniform(size=count).astype(np.float32)
    noise = generator.standard_normal((count, 1, size, size), dtype=np.float32)
    sigma = np.full(1, SIGMA_MAX, np.float32)
    drawn = [
        session.run(
            None,
            {"noisy": np.float32(SIGMA_MAX) * noise[i : i + 1], "sigma": sigma, "difficulty": difficulty[i : i + 1]},
        )
        for i in range(count)
    ]
    return {"latents": torch.tensor(np.concatenate([one[0] for one in drawn])), "difficulty": torch.tensor(difficulty)}


if __name__ == "__main__":
    folder, file = Path(sys.argv[1]), published()
    folder.mkdir(parents=True, exist_ok=True)
    DDPMPipeline(read(file), DDPMScheduler(**SCHEDULE)).save_pretrained(folder / "model")
    save_file(terrains(file), folder / "data.safetensors")
