"""What a change of one group does to the output of a pruned and compensated model: tried, not estimated.

Every trial starts from the compensated weights of the plan around which it looks, takes its units away, or gives them
back with their dense weights, and refits only the layers that the group touches. Nothing is traced twice, and what
comes before these layers is not computed again.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.data.samples import Samples
from diffprune_plugin.graph.groups import ChannelsToGo, CoupledGroup, removed_channels, trace_groups
from diffprune_plugin.pruning.removal import remove_channels_, shrink_
from diffprune_plugin.recovery.compensate import STRENGTHS
from diffprune_plugin.recovery.draws import Draws, draw
from diffprune_plugin.recovery.refit import Refit
from diffprune_plugin.recovery.residual import unpacked
from diffprune_plugin.recovery.ridge import System, by_position, rows_at
from diffprune_plugin.recovery.systems import Layout, layout_of, softmax_factors, systems_of
from diffprune_plugin.sensitivity.linear import Noisy
from diffprune_plugin.sensitivity.prefix import ended_before, recorded, served
from diffprune_plugin.utils.modes import evaluating
from diffprune_plugin.utils.progress import progress_bar

LOOK = 64  # noisy samples that an error is measured on
OTHER = 1_000_003  # added to the seed of what measures: nothing was fitted to these samples
ROWS = 8_192  # that a regression of a trial is fitted on
Units = Mapping[str, Sequence[int]]  # that are gone, by root layer


class Look:
    """Fresh noisy samples, and what the dense model makes of them."""

    @torch.no_grad()
    def __init__(self, dense: nn.Module, scheduler: Any, samples: Samples, adapter: ModelAdapter, seed: int) -> None:
        noisy = Noisy(samples, scheduler, LOOK, seed + OTHER, adapter)
        self.adapter, self.inputs = adapter, noisy.batch(range(LOOK), dense)
        self.wanted = adapter.noise_in(dense.eval(), self.inputs).double()
        self.power = float(self.wanted.square().mean())

    @torch.no_grad()
    def error(self, model: nn.Module) -> float:
        """The mean squared difference from the dense model's output."""
        found = self.adapter.noise_in(model.eval(), self.inputs).double()
        return float((found - self.wanted).square().mean())


@dataclass
class Base:
    """A plan that trials look around: its compensated model, the same in the dense shape, and what its modules give
    where trials begin, in a pass over the draws and in one over the samples looked at."""

    units: Units
    heads: Mapping[str, tuple[int, int]]
    model: nn.Module
    start: nn.Module
    outputs: tuple[dict[str, Any], dict[str, Any]] | None = None


@dataclass
class Trials:
    """The dense model, and what all trials share: samples, where the layers stand, the dense outputs to fit to."""

    dense: nn.Module
    adapter: ModelAdapter
    groups: Sequence[CoupledGroup]
    draws: Draws
    look: Look
    layout: Layout
    targets: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # block: positions, and the values there

    @classmethod
    def of(
        cls, dense: nn.Module, scheduler: Any, data: Samples, adapter: ModelAdapter, samples: int, seed: int
    ) -> Trials:
        """``samples`` noisy ones to fit to; ``data`` and ``scheduler`` as `fitting` and `training_scheduler` give."""
        groups = trace_groups(dense, adapter)
        timesteps = np.arange(int(scheduler.config.num_train_timesteps))
        draws = draw(data, scheduler, timesteps, samples, seed, next(dense.parameters()), adapter)
        layers = sorted({m.layer for group in groups for m in group.members if m.side == "in"})
        with torch.no_grad(), evaluating(dense):
            layout = layout_of(dense, layers, adapter)
            look = Look(dense, scheduler, data, adapter, seed)
        found = cls(dense, adapter, groups, draws, look, layout)
        found.keep_targets(seed)
        return found

    @torch.no_grad()
    def keep_targets(self, seed: int) -> None:
        """What the dense model computes where sums end, at random positions of each sample."""
        count = len(self.draws.noisy)
        generator = torch.Generator().manual_seed(seed % 2**63)

        def keep(block: str) -> Any:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                values = unpacked(output)
                total = by_position(values).shape[1]
                order = torch.rand((count, total), generator=generator).argsort(1)
                positions = order[:, : -(-ROWS // count)].to(values.device)
                rows = rows_at(values, positions).float()
                self.targets[block] = positions, rows.reshape(count, -1, rows.shape[-1])

            return hook

        blocks = {block for block, _ in self.layout.sums.values()}
        hooks = [self.dense.get_submodule(block).register_forward_hook(keep(block)) for block in sorted(blocks)]
        try:
            with evaluating(self.dense):
                self.draws.forward(self.dense, slice(0, count))
        finally:
            for hook in hooks:
                hook.remove()

    def gone(self, units: Units) -> ChannelsToGo:
        return removed_channels(self.groups, {root: list(some) for root, some in units.items()})

    def touched(self, root: str) -> set[str]:
        """The layers whose inputs or outputs belong to a group."""
        return {member.layer for group in self.groups if group.root == root for member in group.members}

    @cached_property
    def before(self) -> dict[str, list[str]]:
        """By root layer the modules that have ended when the first layer of a group begins."""
        return {group.root: ended_before(self.layout.order, self.touched(group.root)) for group in self.groups}

    def base(self, units: Units, heads: Mapping[str, tuple[int, int]]) -> Base:
        """The plan that loses these units, compensated."""
        model = self.refitted(self.dense, units, heads)
        return Base(units, heads, model, self.extended(model, units))

    @torch.no_grad()
    def outputs(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the modules before every group give, in a pass over the draws and in one over the samples looked at."""
        names = {name for names in self.before.values() for name in names}
        with evaluating(model):
            with recorded(model, names) as fitted:
                self.draws.forward(model, slice(0, len(self.draws.noisy)))
            with recorded(model, names) as looked:
                self.look.error(model)
        return fitted, looked

    def error(self, base: Base, root: str, units: Sequence[int]) -> float:
        """Of the plan with other units of one group gone: what it is with all passes begun at the model's inputs."""
        if base.outputs is None:
            base.outputs = self.outputs(base.model)
        fitted, looked = ({n: each[n] for n in self.before[root] if n in each} for each in base.outputs)
        model = self.refitted(base.start, {**base.units, root: units}, base.heads, self.touched(root), fitted)
        with served(model, looked):
            return self.look.error(model)

    @torch.no_grad()
    def refitted(
        self,
        start: nn.Module,
        units: Units,
        heads: Mapping[str, tuple[int, int]],
        only: Collection[str] | None = None,
        given: Mapping[str, Any] | None = None,
    ) -> nn.Module:
        """A model of the dense shape, without these units, refitted; ``only``: these layers alone, from dense weights.

        So a layer that lost inputs at the start and loses none any more is the dense one again. ``given``: what
        modules before the first of them give.
        """
        model, gone = copy.deepcopy(start), self.gone(units)
        for name in only or ():
            model.get_submodule(name).load_state_dict(self.dense.get_submodule(name).state_dict())
        shrink_(model, gone, heads, self.adapter)
        with evaluating(model):
            systems = systems_of(model, self.dense, gone, self.layout, self.adapter, only)
            for system in systems:
                self.give_target(system)
            size = len(self.draws.noisy)
            with progress_bar(False) as bar, served(model, given or {}):
                Refit(model, self.dense, systems, self.draws, size, 0, STRENGTHS, "one", None).run(bar)
        return model

    def give_target(self, system: System) -> None:
        system.positions, values = self.targets[system.block]
        system.targets = values[..., system.kept] * system.factor

    @torch.no_grad()
    def extended(self, model: nn.Module, units: Units) -> nn.Module:
        """A model of the dense shape with the weights of a pruned one; units that are gone have their dense weights."""
        whole, given = copy.deepcopy(self.dense), dict(model.named_parameters())
        places = kept_elements(self.dense, self.gone(units))
        factors = softmax_factors(model, self.dense, self.adapter)
        for name, parameter in whole.named_parameters():
            value = given[name] / factors.get(name.rpartition(".")[0], 1.0)
            parameter.view(-1)[places[name]] = value.flatten()
        return whole


@torch.no_grad()
def kept_elements(dense: nn.Module, gone: ChannelsToGo) -> dict[str, Tensor]:
    """For each parameter the places in the dense one, flattened, of the elements that a removal leaves."""
    numbered = copy.deepcopy(dense).double()  # float64 holds every number below 2^53
    for parameter in numbered.parameters():
        parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape))
    remove_channels_(numbered, gone)
    return {name: parameter.flatten().long() for name, parameter in numbered.named_parameters()}
