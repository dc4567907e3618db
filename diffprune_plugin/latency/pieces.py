"""The pieces that a model's latency is the sum of: blocks, and the layers between them, with the shapes they get."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.graph.costs import layer_cost, own_parameters

# Of diffusers: taken whole where they are no part of another.
BLOCKS = ("ResnetBlock2D", "Attention", "BasicTransformerBlock", "Downsample2D", "Upsample2D", "TimestepEmbedding")
SPREAD = 0.02  # of random weights: large enough that nothing is denormal
PLAIN = (bool, int, float, str, tuple, type(None))


@dataclass(frozen=True)
class Piece:
    """A module (on the meta device) with one call's arguments.

    widths: channels (in, out) of its layers with parameters, by full name. key: SHA-256 of its structure and of the
    shapes that it gets: pieces of one key take equally long.
    """

    name: str
    module: nn.Module
    inputs: tuple[Any, ...]
    widths: Mapping[str, tuple[int, int]]
    key: str


Timer = Callable[[Piece], float]


class Call(nn.Module):
    """A module with all arguments of a call that are no tensors filled in; takes the tensors in their order."""

    def __init__(self, module: nn.Module, inputs: Any) -> None:
        super().__init__()
        self.module = module
        self.leaves, self.spec = tree_flatten(inputs)

    def forward(self, *tensors: Tensor) -> Any:
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.spec)
        return self.module(*args, **kwargs)


def pieces_of(bare: nn.Module, adapter: ModelAdapter, inputs: Mapping[str, Any]) -> list[Piece]:
    """Every piece in order of execution, each call of it once; ``bare``: the model on the meta device.

    inputs: of the whole model, by name, on the meta device.
    """
    names = {module: name for name, module in outermost(bare)}
    found: list[Piece] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = names[module]
        costs = {inner: layer_cost(layer, 0) for inner, layer in module.named_modules() if own_parameters(layer)}
        widths = {".".join(filter(None, (name, inner))): (c.channels_in, c.channels_out) for inner, c in costs.items()}
        found.append(Piece(name, module, (args, kwargs), widths, key_of(module, (args, kwargs))))

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in names]
    try:
        with torch.no_grad():
            adapter.denoise(bare, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def outermost(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Blocks that are in no other, and the layers with parameters outside of them."""
    for inner, child in model.named_children():
        full = f"{name}.{inner}" if name else inner
        if type(child).__name__ in BLOCKS or own_parameters(child):
            yield full, child
        else:
            yield from outermost(child, full)


def key_of(module: nn.Module, inputs: Any) -> str:
    """SHA-256 of the kinds, settings and sizes of a module's parts, and of its inputs."""
    parts = []
    for name, part in module.named_modules():
        settings = {key: str(v) for key, v in vars(part).items() if isinstance(v, PLAIN) and not key.startswith("_")}
        shapes = {key: list(value.shape) for key, value in part.named_parameters(recurse=False)}
        parts.append([name, type(part).__name__, settings, shapes])
    leaves, spec = tree_flatten(inputs)
    told = [[str(leaf.dtype), *leaf.shape] if isinstance(leaf, Tensor) else str(leaf) for leaf in leaves]
    text = json.dumps([parts, told, str(spec)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def filled(piece: Piece, dtype: torch.dtype) -> tuple[Call, tuple[Tensor, ...]]:
    """The piece with random weights, and inputs for it, on the CPU: what is exported and timed."""
    call = Call(random_weights(piece.module).to(dtype).eval(), piece.inputs)
    tensors = [leaf for leaf in call.leaves if isinstance(leaf, Tensor)]
    generator = torch.Generator().manual_seed(0)
    return call, tuple(example(tensor, dtype, generator) for tensor in tensors)


def random_weights(bare: nn.Module) -> nn.Module:
    """A copy of a module on the meta device, with random numbers on the CPU: latency needs structure only."""
    generator = torch.Generator().manual_seed(0)
    module = copy.deepcopy(bare).to_empty(device="cpu")
    with torch.no_grad():
        for value in (*module.parameters(), *module.buffers()):
            if value.is_floating_point():
                value.normal_(0, SPREAD, generator=generator)
    return module


def example(like: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal noise of a tensor's shape, zeros where it holds whole numbers."""
    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype)
    return torch.randn(like.shape, generator=generator).to(dtype)


def distinct(pieces: Sequence[Piece]) -> dict[str, Piece]:
    """One piece of each key."""
    return {piece.key: piece for piece in pieces}
