"""Masks that grow from epoch to epoch, as a pruning schedule says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffprune_plugin.calibration import Calibration
from diffprune_plugin.errors import BadInput
from diffprune_plugin.hookspecs import Criterion
from diffprune_plugin.kept import stock_
from diffprune_plugin.masking import MaskReport, fold_, mask_
from diffprune_plugin.plan import PruningPlan
from diffprune_plugin.planning import check_ratio, make_plan
from diffprune_plugin.plugins import importance


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
        unet: nn.Module,
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
        self.unet, self.levels, self.calibrate, self.options = unet, list(levels), calibrate, options
        self.criterion: Any = importance(criterion) if isinstance(criterion, str) else criterion
        self.exact_norms, self.epoch = exact_norms, 0
        masked = getattr(unet, "mask_report", None)
        self.plan: PruningPlan | None = masked.plan if isinstance(masked, MaskReport) else None
        self.current_ratio = self.plan.pruning_ratio if self.plan else 0.0

    def step(self, epoch: int | None = None) -> MaskReport | None:
        """Mask what this epoch asks for, by default the one after the last; None if that is no more than before."""
        epoch = self.epoch if epoch is None else epoch
        ratio = self.levels[min(epoch, len(self.levels) - 1)]
        self.epoch = epoch + 1
        if ratio <= self.current_ratio:
            return None
        if self.calibrate is not None:
            self.criterion.calibration = self.calibrate(self.unet)
        nested = Nested(self.criterion, self.plan)
        if self.plan is not None:
            fold_(self.unet)
            stock_(self.unet)
        try:
            self.plan = make_plan(self.unet, nested, pruning_ratio=ratio, **self.options)
            self.current_ratio = ratio
        finally:  # a plan that cannot be made leaves the masks as they were
            report = None if self.plan is None else mask_(self.unet, self.plan, exact_norms=self.exact_norms)
        return report


class Nested:
    """A criterion under which the channels that a plan removes score 0, and all others more."""

    def __init__(self, criterion: Criterion, plan: PruningPlan | None) -> None:
        self.criterion = criterion
        self.round_to, self.halves = getattr(criterion, "round_to", None), getattr(criterion, "halves", None)
        self.gone = {
            group.root: [half * group.units + unit for half in range(group.pairs) for unit in group.removed]
            for group in (plan.groups if plan else ())
        }

    def __call__(self, group: Any) -> Tensor | None:
        score = self.criterion(group)
        if score is None:
            return None
        score = score.clamp_min(torch.finfo(score.dtype).tiny)
        score[self.gone.get(group._DG._module2name[group[0].dep.target.module], [])] = 0
        return score
