"""A model at any widths that its groups can have, without weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from diffprune_plugin.export.convert import Flat
from diffprune_plugin.graph.costs import meta_copy
from diffprune_plugin.graph.groups import removed_channels
from diffprune_plugin.latency.pieces import Piece, key_of, pieces_of
from diffprune_plugin.planning.plan import GroupPlan
from diffprune_plugin.planning.planner import Material, heads_left
from diffprune_plugin.pruning.removal import shrink_


class Structures:
    """The structures of one model, at a batch size, by what each of its groups loses."""

    def __init__(self, model: nn.Module, material: Material, batch: int, size: int | None = None) -> None:
        """``size``: side of a sample, by default the config's."""
        self.bare, self.material, self.batch, self.size = meta_copy(model), material, batch, size
        self.groups = [item.group for item in material.items]

    def shrunk(self, planned: Sequence[GroupPlan]) -> nn.Module:
        """The model after a plan, on the meta device."""
        gone = removed_channels(self.groups, {plan.root: list(plan.removed) for plan in planned})
        small = copy.deepcopy(self.bare)
        shrink_(small, gone, heads_left(self.material.heads, planned, self.groups), self.material.adapter)
        return small

    def pieces(self, planned: Sequence[GroupPlan]) -> list[Piece]:
        """Those of the model after a plan, in order of execution: of any plan equally many."""
        small = self.shrunk(planned)
        return pieces_of(small, self.material.adapter, self.inputs(small))

    def whole(self, planned: Sequence[GroupPlan]) -> Piece:
        """All of the model after a plan as one piece."""
        flat = Flat(self.shrunk(planned), self.material.adapter)
        given: Any = (tuple(self.inputs(flat.model).values()), {})
        return Piece("", flat, given, {}, key_of(flat, given))

    def inputs(self, bare: nn.Module) -> dict[str, Tensor]:
        size = None if self.size is None else (self.size, self.size)
        found = self.material.adapter.flat_inputs(bare, batch=self.batch, size=size)
        return {name: value.to("meta") for name, value in found.items()}
