"""Units of a coupled group that change places: a right table leaves the UNet's output as it was."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from diffprune_plugin.graph.groups import Channels, CoupledGroup, Member

NORMS = (nn.GroupNorm, nn.LayerNorm)


def new_order(model: nn.Module, group: CoupledGroup, rng: np.random.Generator, whole: bool = False) -> Channels:
    """A random order of the group's units, in which only those that share heads and norm groups change places; of
    ``whole`` heads these change places."""
    order = np.arange(group.units)
    if whole:
        return rng.permutation(order.reshape(group.parts, -1)).ravel()
    places = [[unit * group.parts // group.units] for unit in range(group.units)]
    for member in group.members:
        layer = model.get_submodule(member.layer)
        if isinstance(layer, nn.GroupNorm):  # those of a concatenation cut across the parts
            for channel, root in zip(member.channels, member.roots, strict=True):
                places[root % group.units].append(channel * layer.num_groups // layer.num_channels)
    for place in {tuple(place) for place in places}:
        same = np.array([unit for unit in range(group.units) if tuple(places[unit]) == place])
        order[same] = rng.permutation(same)
    return order


def reorder_(tensors: dict[str, Tensor], model: nn.Module, group: CoupledGroup, order: Channels) -> None:
    """Put the group's units into a new order in tensors of the parameters' names and shapes (weights, gradients)."""
    roots = group.rooted(order)
    for member in group.members:
        layer = model.get_submodule(member.layer)
        for name, parameter in layer.named_parameters(recurse=False):
            key, flat = f"{member.layer}.{name}", parameter.dim() < 2
            axis = 0 if flat or (member.side == "out" and not isinstance(layer, nn.Embedding)) else 1
            if key in tensors and (member.side == "out" or not flat or isinstance(layer, NORMS)):
                tensors[key] = tensors[key].index_select(axis, new_places(member, roots, parameter.shape[axis]))


def new_places(member: Member, roots: Channels, size: int) -> Tensor:
    """For each channel of a layer's side, the one that takes its place: of the root that takes its root's place."""
    places = np.arange(size)
    for root in np.unique(member.roots):
        mine, theirs = (np.sort(member.channels[member.roots == r]) for r in (root, roots[root]))
        places[mine] = theirs
    return torch.from_numpy(places)
