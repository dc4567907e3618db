"""A drop-in for torch-pruning's BasePruner that knows diffusion UNets: one changed import in an existing script."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch_pruning as tp
from torch import nn

from diffprune_plugin.errors import BadInput
from diffprune_plugin.graph.axes import feature_axes
from diffprune_plugin.graph.costs import layer_costs
from diffprune_plugin.graph.groups import CoupledGroup, groups_of
from diffprune_plugin.integrations.torch_pruning_arguments import arguments, check_heads, equal_parts, layers_of, stays
from diffprune_plugin.integrations.torch_pruning_calibration import (
    Calibrations,
    calibrated,
    check_calibration,
    importance_of,
    named,
)
from diffprune_plugin.integrations.torch_pruning_history import History
from diffprune_plugin.planning.channels import group_plan, head_groups, select
from diffprune_plugin.planning.options import PlanOptions, check_ratio
from diffprune_plugin.planning.plan import GroupPlan, PruningPlan, architecture_hash
from diffprune_plugin.planning.planner import asked_group, library_versions, request_of, requests_of_heads
from diffprune_plugin.planning.target import sizes
from diffprune_plugin.plugins import find_adapter
from diffprune_plugin.pruning.pruned_class import PrunedModelMixin, as_pruned_
from diffprune_plugin.utils.modes import differentiable

# The arguments that are options of `make_plan` too.
OPTIONS = ("pruning_ratio", "max_pruning_ratio", "global_pruning", "isomorphic", "round_to")


@dataclass(frozen=True)
class Scope:
    """One entry of pruning_ratio_dict: the layers that it means and their ratio at each step."""

    label: str
    layers: frozenset[str]
    ratios: Sequence[float]


class PlannedGroup(tp.dependency.Group):  # type: ignore[misc]
    """A torch-pruning group whose removal leaves the UNet running and saveable.

    It is looked up again when it is pruned, so that groups may be kept and pruned in any order.
    """

    def __init__(self, group: Any, refresh: Callable[[], None]) -> None:
        super().__init__()
        self._group, self._DG, self._refresh = group.items, group._DG, refresh

    def prune(self, idxs: Sequence[int] | None = None, record_history: bool = True) -> None:
        """Remove the group's channels, or just those of the root layer's in ``idxs``."""
        root, chosen = self[0].dep, self[0].idxs if idxs is None else idxs
        self._DG.get_pruning_group(root.target.module, root.handler, chosen).prune(record_history=record_history)
        self._refresh()


class Pruner(tp.pruner.BasePruner):  # type: ignore[misc]
    """torch_pruning.pruner.BasePruner for diffusion UNets: the same arguments, and `make_plan`'s exact counts.

    ``importance``: a criterion's name, a mapping of ``name`` and options, or any torch-pruning importance.
    ``calibration``: a `Calibration`, a mapping of `calibrate`'s arguments (``scheduler``, ``images`` ...) or a
    function of the UNet that returns one; the latter two are called before each of the ``iterative_steps``. Without
    it, gradients in ``.grad`` are used, as in torch-pruning. What the UNet's adapter knows is filled in: layers
    that keep their width, heads, paired channels. ``round_to`` rounds what is kept up. After every step the UNet runs,
    keeps its softmax scale, and `diffprune_plugin.save` writes it with its ``plan``.

    Raises BadInput for a model that was pruned before, and for an argument that is not honoured, with the remedy.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        importance: Any,
        *args: Any,
        calibration: Calibrations | None = None,
        **kwargs: Any,
    ) -> None:
        given = arguments(model, example_inputs, importance, *args, **kwargs)
        self._options = PlanOptions.make({key: given[key] for key in OPTIONS}, "Pruner")
        if isinstance(model, PrunedModelMixin):
            raise BadInput("model: pruned already; start from the dense one, or go on with the pruner that pruned it")
        self.adapter = find_adapter(model)
        self.adapter.check(model)
        check_calibration(importance, calibration, given["iterative_steps"])
        self._wanted, self._calibration = importance, calibration
        ratios = {key: float(ratio) for key, ratio in (given["pruning_ratio_dict"] or {}).items()}
        layers = {key: layers_of(model, key, "pruning_ratio_dict") for key in ratios}
        self._stays = stays(model, self.adapter, given)
        self._parts = dict(given["out_channel_groups"])
        equal_parts(model, self.adapter, self._parts)
        check_heads(model, self.adapter, given["num_heads"])
        fresh = self.adapter.torch_pruning_kwargs(model)
        given |= fresh | {
            "importance": importance_of(importance),
            "pruning_ratio_dict": {tuple(map(model.get_submodule, layers[key])): ratios[key] for key in ratios},
            "ignored_layers": [
                *(model.get_submodule(name) for name in self._stays),
                *(model.get_parameter(name) for name in self.adapter.uncoupled(model)),
            ],
        }
        with differentiable(model), feature_axes():
            super().__init__(**given)
        self._scopes = [
            Scope(f"pruning_ratio_dict[{i}]", layers[key], self._ratios(ratios[key])) for i, key in enumerate(ratios)
        ]
        self._ratios(self.pruning_ratio)
        self._ratios(self.head_pruning_ratio, "head_pruning_ratio")
        self._head_layers = self.adapter.head_layers(model, whole=not self.prune_num_heads)
        self._heads = self.adapter.head_sizes(model)
        self._dense, self._costs = self._groups(), layer_costs(model, self.adapter)
        self._units = {group.root: group.units for group in self._dense}
        self._history, self._decided = History(self._dense, self._costs), dict[str, GroupPlan]()
        self._architecture = architecture_hash(model)

    def step(self, interactive: bool = False) -> Iterator[PlannedGroup] | None:
        """Remove the channels of the next step; with ``interactive`` yield its groups for the caller to prune."""
        if self.current_step >= self.iterative_steps:
            warnings.warn("all iterative_steps are done: nothing is removed", stacklevel=2)
            return iter(()) if interactive else None
        self._decide(self.current_step + 1)
        self.current_step += 1
        groups = (self._graph_group(root) for root, group in self._decided.items() if group.removed)
        if interactive:
            return (PlannedGroup(group, self._refresh) for group in groups)
        for group in groups:
            group.prune()
        self._refresh()
        return None

    @property
    def plan(self) -> PruningPlan:
        """What has been removed from the dense UNet so far."""
        gone = self._history.removed
        groups = tuple(overall(g, self._decided.get(g.root), sorted(gone[g.root])) for g in self._dense)
        layers, before, after = sizes(self._dense, groups, self._costs)
        name, options = named(self._wanted)
        return PruningPlan(
            model_class=self.adapter.model_class,
            architecture=self._architecture,
            criterion={"name": name or type(self._wanted).__name__, **options},
            pruning_ratio=float(self._ratios(self.pruning_ratio)[self.current_step]),
            groups=groups,
            heads=self._head_counts(),
            layers=layers,
            params=(before.params, after.params),
            macs=(before.macs, after.macs),
            versions=library_versions(),
        )

    def manual_prune_width(self, layer: nn.Module, pruning_fn: Callable[..., Any], pruning_ratios_or_idxs: Any) -> None:
        """Remove these channels of a layer; raises BadInput for a ratio, which torch-pruning takes the wrong way."""
        if isinstance(pruning_ratios_or_idxs, float):
            raise BadInput(
                f"manual_prune_width: torch-pruning removes 1 - {pruning_ratios_or_idxs}; give the channels, or "
                "pruning_ratio_dict={layer: ratio}"
            )
        super().manual_prune_width(layer, pruning_fn, pruning_ratios_or_idxs)
        self._refresh()

    def load_pruning_history(self, pruning_history: Any) -> None:
        """Remove what another pruner of the same dense UNet removed."""
        super().load_pruning_history(pruning_history)
        self._refresh()

    def _ratios(self, ratio: float, key: str = "pruning_ratio") -> Sequence[float]:
        """The ratio at each step; raises BadInput for one outside [0, 1)."""
        ratios: Sequence[float] = self.iterative_pruning_ratio_scheduler(ratio, self.iterative_steps)
        for value in (ratio, *ratios[1:]):
            check_ratio(value, key)
        return ratios

    def _groups(self) -> list[CoupledGroup]:
        parts = equal_parts(self.model, self.adapter, self._parts)
        with feature_axes():
            return groups_of(self.DG, self.model, self.adapter, parts, self.root_module_types)

    def _decide(self, step: int) -> None:
        """Choose, for each group as it is now, what goes in this step."""
        self.importance = calibrated(self._wanted, self._calibration, self.model)
        common, of_heads = (float(self._ratios(ratio)[step]) for ratio in (self.pruning_ratio, self.head_pruning_ratio))
        options = self._options.with_wishes_of(self.importance)
        options = options.model_copy(update={"head_pruning_ratio": of_heads if self.prune_num_heads else None})
        groups = self._groups()
        heads = head_groups(groups, self._head_layers)
        special = {layer: (float(s.ratios[step]), s.label) for s in self._scopes for layer in s.layers}
        requests = {g.root: request_of(g, special, self._stays) for g in groups}
        requests = requests_of_heads(requests, heads, options.head_pruning_ratio)
        items = [
            replace(
                asked_group(g, requests[g.root], self.importance, heads.get(g.root, "")),
                scope=next((scope.label for scope in self._scopes if scope.layers.intersection(g.layers)), ""),
                gone=self._units[g.root] - g.units,
            )
            for g in groups
        ]
        self._decided = {group.root: group for group in select(items, common, options)}

    def _head_counts(self) -> dict[str, tuple[int, int]]:
        """Heads before and now of each attention that lost whole ones."""
        counts = {}
        for group in self._dense:
            attention = self._head_layers.get(group.root)
            if attention and (gone := len(self._history.removed[group.root])):
                counts[attention] = (group.parts, group.parts - gone * group.parts // group.units)
        return counts

    def _graph_group(self, root: str) -> Any:
        """torch-pruning's group of what was decided for one root layer, in today's numbering."""
        layer, group = self.model.get_submodule(root), self._decided[root]
        paired = CoupledGroup(root, group.units * group.pairs, group.pairs, group.parts, (), None)
        prune = self.DG.get_pruner_of_module(layer).prune_out_channels
        with feature_axes():
            return self.DG.get_pruning_group(layer, prune, paired.closed(group.removed).tolist())

    def _refresh(self) -> None:
        """Bring everything that depends on the sizes up to date."""
        self._history.read(self.DG.pruning_history())
        self._history.check(self.model)
        self.adapter.set_heads_(self.model, self._head_counts())
        self.num_heads.update(self.adapter.torch_pruning_kwargs(self.model)["num_heads"])
        self.adapter.mend_(self.model)
        self.adapter.keep_softmax_scale_(self.model, self._heads)
        self._heads = self.adapter.head_sizes(self.model)
        as_pruned_(self.model, self.plan)


def overall(group: CoupledGroup, decided: GroupPlan | None, removed: Sequence[int]) -> GroupPlan:
    """A group of the dense UNet with all that is gone of it; ``decided`` is its last step."""
    if decided is None:
        return group_plan(group, group.parts, group.parts, 0, removed, "")
    left_out = len(removed) < group.units - decided.units + len(decided.removed)
    reason = "not pruned by the caller of step(interactive=True)" if left_out else decided.reason
    return group_plan(group, decided.parts, decided.step, decided.requested, removed, reason)
