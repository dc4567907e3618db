"""The parts of a model whose gradients are summed one after another, so that memory holds those of one."""

from __future__ import annotations

from torch import nn

from diffprune_plugin.errors import BadInput


def parts_of(model: nn.Module, blocks_at_once: int | None) -> list[frozenset[str]]:
    """The names of the parameters of each part: so many blocks, in order; with the first part what is in no block.

    Blocks are the items of the model's own lists of modules. One part, of everything, where no number is given. Raises
    BadInput for a model without blocks.
    """
    everything = frozenset(name for name, _ in model.named_parameters())
    if blocks_at_once is None:
        return [everything]
    blocks = blocks_of(model)
    if not blocks:
        raise BadInput(f"blocks_at_once: {blocks_at_once}: {type(model).__name__} has no list of blocks; leave it out")
    parts = [tuple(blocks[first : first + blocks_at_once]) for first in range(0, len(blocks), blocks_at_once)]
    found = [frozenset(name for name in everything if name.startswith(part)) for part in parts]
    return [found[0] | outside(model), *found[1:]]


def blocks_of(model: nn.Module) -> list[str]:
    """What the names of each block's parameters start with."""
    lists = {name: child for name, child in model.named_children() if isinstance(child, nn.ModuleList)}
    return [f"{name}.{number}." for name, blocks in lists.items() for number in range(len(blocks))]


def outside(model: nn.Module) -> frozenset[str]:
    """The parameters that are in no block: embeddings, the first layer, the last."""
    blocks = tuple(blocks_of(model))
    return frozenset(name for name, _ in model.named_parameters() if not name.startswith(blocks))
