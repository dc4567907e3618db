"""Masks that grow from epoch to epoch, as a pruning schedule says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diffprune_plugin.calibration.calibration import Calibration
from diffprune_plugin.criteria.sweep import POWERS
from diffprune_plugin.errors import BadInput
from diffprune_plugin.hookspecs import Criterion
from diffprune_plugin.planning.options import check_ratio
from diffprune_plugin.planning.plan import PruningPlan
from diffprune_plugin.planning.planner import make_plan
from diffprune_plugin.planning.scores import channel_scores
from diffprune_plugin.plugins import importance, with_calibration
from diffprune_plugin.pruning.masked_layers import KeptQuery, stock_
from diffprune_plugin.pruning.masks import MaskReport, fold_, mask_


class MaskSchedule:
    """Raises the masked share of a UNet's channels over the epochs of its training; what was masked stays masked.

    ``levels``: the pruning ratio of each epoch from 0 on, the last for all after it: `schedules.levels`, or what NNCF's
    ``multi_step_ratio_scheduler`` and ``exponential_ratio_scheduler`` give. Where the ratio does not grow nothing
    changes. ``calibrate`` gets the masked UNet and returns what the criterion scores with, anew at each growth: masked
    weights have no gradient. ``options`` go to `make_plan`, whose plan of the last growth is ``plan``.
    As in NNCF's schedulers, `step` comes first in each epoch. A UNet that is masked already keeps what it has.

    Raises BadInput for a level outside [0, 1), or none.
    """

    def __init__(
        self,
        model: nn.Module,
        levels: Sequence[float],
        criterion: Criterion | str,
        *,
        calibrate: Callable[[nn.Module], Calibration] | None = None,
        exact_norms: bool = True,
        **options: Any,
    ) -> None:
        if not levels:
            raise BadInput("levels: is empty; give a pruning ratio for each epoch")
        for epoch, level in enumerate(levels):
            check_ratio(level, f"levels[{epoch}]")
        self.model, self.levels, self.calibrate = model, list(levels), calibrate
        self.criterion: Any = importance(criterion) if isinstance(criterion, str) else criterion
        if calibrate is not None and getattr(self.criterion, "sweep", None) is None:
            raise BadInput(f"calibrate: {type(self.criterion).__name__} takes no calibration; leave it out")
        name = criterion if isinstance(criterion, str) else type(criterion).__name__
        self.name = criterion if isinstance(criterion, str) else None
        self.options: dict[str, Any] = {"description": {"name": name}, **options}
        self.exact_norms, self.epoch = exact_norms, 0
        masked = getattr(model, "mask_report", None)
        self.plan: PruningPlan | None = masked.plan if isinstance(masked, MaskReport) else None
        self.current_ratio = self.plan.pruning_ratio if self.plan else 0.0

    def step(self, epoch: int | None = None) -> MaskReport | None:
        """Mask what this epoch asks for, by default the one after the last; None if that is no more than before."""
        epoch = self.epoch if epoch is None else epoch
        ratio = self.levels[min(epoch, len(self.levels) - 1)]
        if ratio <= self.current_ratio:
            self.epoch = epoch + 1
            return None
        gradients = [(parameter, parameter.grad) for parameter in self.model.parameters()]
        nested = Nested(self.scoring(), self.plan)
        if self.plan is not None:
            fold_(self.model)
            stock_(self.model)
        try:
            plan = make_plan(self.model, nested, pruning_ratio=ratio, **self.options)
            self.check_nested(plan, ratio)
            self.plan, self.current_ratio, self.epoch = plan, ratio, epoch + 1
        except BaseException:
            for parameter, gradient in gradients:
                parameter.grad = gradient
            raise
        finally:  # a plan that cannot be made leaves the masks as they were
            report = None if self.plan is None else mask_(self.model, self.plan, exact_norms=self.exact_norms)
        return report

    def check_nested(self, plan: PruningPlan, ratio: float) -> None:
        """Raises BadInput for a plan that has a masked channel again: an allocation, or ratios of some layers, may have
        masked more than a level does."""
        removed = {group.root: set(group.removed) for group in plan.groups}
        for group in self.plan.groups if self.plan else ():
            if not set(group.removed) <= removed.get(group.root, set()):
                raise BadInput(
                    f"levels: {ratio} masks fewer channels of {group.root} than are masked already "
                    f"({len(group.removed)} of {group.units}); begin with a higher level, or with a UNet without masks"
                )

    def scoring(self) -> Criterion:
        """The criterion, calibrated anew on the UNet as it is now; its gradients are those of the dense scale."""
        gains = {name: layer.gain for name, layer in self.model.named_modules() if isinstance(layer, KeptQuery)}
        if self.calibrate is None:
            for name, gain in gains.items():
                for parameter in self.model.get_submodule(name).parameters():
                    parameter.grad = None if parameter.grad is None else parameter.grad / gain
            criterion: Criterion = self.criterion
            return criterion
        calibration = at_dense_scale(self.calibrate(self.model), gains)
        if self.name is not None:
            return importance(self.name, calibration=calibration)
        return with_calibration(self.criterion, calibration)


def at_dense_scale(calibration: Calibration, gains: Mapping[str, float]) -> Calibration:
    """The calibration of masked query projections, whose weights are held at 1 / gain, for those of the dense scale."""
    power = POWERS[calibration.sweep.accumulate]
    gradients = {
        name: value / gains[layer] ** power if (layer := name.rpartition(".")[0]) in gains else value
        for name, value in calibration.gradients.items()
    }
    return replace(calibration, gradients=gradients)


class Nested:
    """A criterion under which the channels that a plan removes score 0, and all others more."""

    def __init__(self, criterion: Criterion, plan: PruningPlan | None) -> None:
        self.criterion = criterion
        self.round_to, self.halves = getattr(criterion, "round_to", None), getattr(criterion, "halves", None)
        self.gone = {
            group.root: [half * group.units + unit for half in range(group.pairs) for unit in group.removed]
            for group in (plan.groups if plan else ())
        }

    def __call__(self, group: Any) -> Tensor:
        score = channel_scores(self.criterion, group)
        score = score.clamp_min(torch.finfo(score.dtype).tiny)
        score[self.gone.get(group._DG._module2name[group[0].dep.target.module], [])] = 0
        return score
