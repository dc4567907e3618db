"""torch-pruning's pruning history, read in the numbering of the dense UNet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from diffprune_plugin.errors import BadInput
from diffprune_plugin.graph.costs import LayerCost, layer_cost
from diffprune_plugin.graph.groups import Channels, CoupledGroup, Member, Side, removed_channels


class History:
    """Which units of the dense UNet's groups are gone, kept up to date from a dependency graph's history.

    Each entry of the history numbers the channels of a layer as they were when it was made; ``removed`` holds the
    dense units by root layer.
    """

    def __init__(self, groups: Sequence[CoupledGroup], costs: Mapping[str, LayerCost]) -> None:
        self.removed: dict[str, set[int]] = {group.root: set() for group in groups}
        self._costs = costs
        self._gone: dict[tuple[str, Side], Channels] = {}
        self._read = 0
        self._members: dict[tuple[str, Side], list[tuple[CoupledGroup, Member]]] = {}
        for group in groups:
            for member in group.members:
                self._members.setdefault((member.layer, member.side), []).append((group, member))

    def read(self, entries: Sequence[tuple[str, bool, Sequence[int]]]) -> None:
        """Take in the entries that were added since the last call: (layer, whether its outputs, channels)."""
        for layer, is_out, channels in entries[self._read :]:
            key: tuple[str, Side] = (layer, "out" if is_out else "in")
            width = self._costs[layer].channels_out if is_out else self._costs[layer].channels_in
            left = np.setdiff1d(np.arange(width), self._gone.get(key, []))
            dense = left[np.asarray(channels, np.int64)]
            for group, member in self._members.get(key, ()):
                self._remove(group, {int(r) % group.units for r in member.roots[np.isin(member.channels, dense)]})
        self._read = len(entries)

    def _remove(self, group: CoupledGroup, units: set[int]) -> None:
        self.removed[group.root] |= units
        for key, channels in removed_channels([group], {group.root: sorted(units)}).items():
            self._gone[key] = np.union1d(self._gone.get(key, np.empty(0, np.int64)), channels)

    def check(self, model: nn.Module) -> None:
        """Raises BadInput if a layer of the UNet has other channels than the history leaves it."""
        for name, cost in self._costs.items():
            found: Any = layer_cost(model.get_submodule(name), 0)
            sides: tuple[tuple[Side, int, int], ...] = (
                ("in", cost.channels_in, found.channels_in),
                ("out", cost.channels_out, found.channels_out),
            )
            for side, dense, now in sides:
                left = dense - len(self._gone.get((name, side), ()))
                if now != left:
                    raise BadInput(
                        f"{name} has {now} {side} channels, but the pruning history leaves it {left}; remove channels "
                        "only with the pruner's own groups, and record_history=True"
                    )
