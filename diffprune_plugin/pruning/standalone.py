"""Loads the pruned model in this folder: with diffprune_plugin where that is installed, else by itself.

diffprune_plugin wrote this file, the same in every folder. It needs diffusers, torch and safetensors, reads config.json
(the dense architecture) and the weights, and gives every layer the sizes that its tensors have. Nothing else happens:

    DiffusionPipeline.from_pretrained("DIRECTORY", trust_remote_code=True)
"""
# mypy: ignore-errors

import hashlib
import importlib
import importlib.util
import json
from pathlib import Path

import diffusers
import torch
from safetensors import safe_open
from torch import nn

PACKAGE = "diffprune_plugin"
WEIGHTS = "diffusion_pytorch_model.safetensors"
# Attributes that repeat a layer's size: the class that has one, the attribute, what it repeats.
REPEATED = (
    ("Upsample2D", "channels", "conv.in_channels"),
    ("Downsample2D", "channels", "conv.in_channels"),
    ("ResnetBlock2D", "upsample.channels", "conv1.in_channels"),
    ("ResnetBlock2D", "downsample.channels", "conv1.in_channels"),
)


def __getattr__(name):
    """The class that model_index.json names, PrunedUNet2DModel or another."""
    if not name.startswith("Pruned"):
        raise AttributeError(name)
    if importlib.util.find_spec(PACKAGE):
        return getattr(importlib.import_module(PACKAGE), name)
    return type(name, (Pruned, getattr(diffusers, name.removeprefix("Pruned"))), {"__module__": __name__})


class Pruned:
    """A diffusers class whose layers have the sizes of the tensors in a folder."""

    @classmethod
    def from_pretrained(cls, directory, subfolder=None, torch_dtype=None, dtype=None, device_map=None, **_):
        """The model in eval mode, float32 unless told otherwise; ValueError where the files were changed."""
        folder = Path(directory, subfolder or "")
        tensors, facts = read(folder / WEIGHTS)
        with torch.random.fork_rng(devices=[]):  # the dense model's first weights are drawn, and replaced
            model = cls.from_config(json.loads((folder / "config.json").read_text()))
        for name, wrapped in json.loads(facts.get("skipped", "{}")).items():
            model.set_submodule(name, Skip(wrapped))
        kind = dtype or torch_dtype or torch.float32  # of what is saved: what a model computes itself stays
        resize(
            model,
            {k: t.to(kind) if t.is_floating_point() else t for k, t in tensors.items()},
            json.loads(facts["heads"]),
        )
        device = device_map.get("", "cpu") if isinstance(device_map, dict) else device_map or "cpu"
        return nn.Module.to(model, device).eval()

    def save_pretrained(self, *_, **__):
        raise ValueError(f"{type(self).__name__} was loaded without {PACKAGE}; install that to save it")


class Skip(nn.Module):
    """In the place of a block that is gone: what goes in comes out, in a tuple where the block returned one."""

    def __init__(self, wrapped):
        super().__init__()
        self.wrapped = wrapped

    def forward(self, stream, *_, **__):
        return (stream,) if self.wrapped else stream


def read(path):
    """The tensors of a file and what it says of them; ValueError unless they, and this file, are what was written."""
    with safe_open(path, "pt") as file:
        facts = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(name.encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    own = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    for what, is_, stated in (
        (path, found.hexdigest(), facts.get("sha256")),
        (f"{PACKAGE}.py beside it", own, facts.get("loader")),
    ):
        if is_ != stated:
            raise ValueError(f"{what}: was changed: its SHA-256 is {is_}, {path} states {stated}; restore the folder")
    return tensors, facts


def resize(model, tensors, heads):
    """Give every layer its tensors, and what repeats their sizes the new ones; ``heads``: left in each attention."""
    for name, layer in model.named_modules():
        shape = tensors[f"{name}.weight"].shape if f"{name}.weight" in tensors else ()
        if isinstance(layer, nn.Conv2d):
            layer.out_channels, layer.in_channels = shape[:2]
        elif isinstance(layer, nn.Linear):
            layer.out_features, layer.in_features = shape
        elif isinstance(layer, nn.Embedding):
            layer.embedding_dim = shape[1]
        elif isinstance(layer, nn.GroupNorm) and shape:
            layer.num_channels = shape[0]
        elif isinstance(layer, nn.LayerNorm) and shape:
            layer.normalized_shape = tuple(shape)
        prefix = f"{name}." if name else ""
        for key, old in list(layer.named_parameters(recurse=False)):
            setattr(layer, key, nn.Parameter(tensors.pop(prefix + key).clone(), old.requires_grad))
        for key in [key for key in layer._buffers if prefix + key in tensors]:
            layer._buffers[key] = tensors.pop(prefix + key).clone()
    if tensors:
        raise ValueError(f"{WEIGHTS}: {next(iter(tensors))} has no place in the model that config.json describes")
    for name, layer in model.named_modules():
        kind = type(layer).__name__
        for _, attribute, source in (row for row in REPEATED if row[0] == kind):
            owner, size = at(layer, attribute.rpartition(".")[0]), at(layer, source)
            if owner is not None and size is not None:
                setattr(owner, attribute.rpartition(".")[2], size)
        if name in heads:
            layer.heads = heads[name]
        if kind == "Attention":
            layer.scale = (layer.to_q.out_features // layer.heads) ** -0.5


def at(owner, path):
    """``owner.a.b`` for "a.b", owner for nothing; None where a step is missing."""
    for step in path.split(".") if path else ():
        owner = getattr(owner, step, None)
    return owner
