"""A drop-in for torch-pruning's BasePruner that knows diffusion UNets: one changed import in an existing script."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch_pruning as tp
from torch import nn

from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.calibration.calibration import Calibration
from diffprune_plugin.calibration.run import calibrate
from diffprune_plugin.errors import BadInput, nearest
from diffprune_plugin.graph.costs import layer_costs
from diffprune_plugin.graph.groups import CoupledGroup, groups_of
from diffprune_plugin.graph.patterns import layer_names, matching
from diffprune_plugin.hookspecs import Criterion
from diffprune_plugin.integrations.torch_pruning_history import History
from diffprune_plugin.planning.channels import Rules, group_plan, head_groups, select
from diffprune_plugin.planning.plan import GroupPlan, PruningPlan, architecture_hash
from diffprune_plugin.planning.planner import (
    asked_group,
    asked_of_heads,
    check_ratio,
    library_versions,
    requested_ratio,
)
from diffprune_plugin.planning.target import sizes
from diffprune_plugin.plugins import find_adapter, importance, with_calibration
from diffprune_plugin.pruning.pruned_class import PrunedModelMixin, as_pruned_
from diffprune_plugin.utils.modes import differentiable
from diffprune_plugin.utils.tensors import weights_hash

SIGNATURE = inspect.signature(tp.pruner.BasePruner)
HONOURED = (
    *("model", "example_inputs", "importance", "global_pruning", "pruning_ratio", "pruning_ratio_dict"),
    *("max_pruning_ratio", "iterative_steps", "iterative_pruning_ratio_scheduler", "ignored_layers", "round_to"),
    *("isomorphic", "out_channel_groups", "num_heads", "prune_num_heads", "prune_head_dims", "head_pruning_ratio"),
    *("root_module_types", "forward_fn", "output_transform"),
)
RENAMED = {
    "channel_groups": "out_channel_groups",
    "ch_sparsity": "pruning_ratio",
    "ch_sparsity_dict": "pruning_ratio_dict",
}
REFUSED = {
    "head_pruning_ratio_dict": "every attention loses the same share of its heads; use head_pruning_ratio",
    "in_channel_groups": "the adapter's table says which channels go together; leave it out",
    "customized_pruners": "a pruned UNet is rebuilt from convolutions, linear, norm and embedding layers only; "
    "use torch_pruning's own BasePruner with **adapter.torch_pruning_kwargs(model)",
    "unwrapped_parameters": "parameters outside layers are not pruned; leave it out",
}
# What makes a calibration: one, the arguments of `calibrate` after the UNet, or a function of the UNet.
Calibrations = Calibration | Mapping[str, Any] | Callable[[nn.Module], Calibration]
Key = nn.Module | type | str | tuple[Any, ...]


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

    def __init__(self, group: Any, settle: Callable[[], None]) -> None:
        super().__init__()
        self._group, self._DG, self._settle = group.items, group._DG, settle

    def prune(self, idxs: Sequence[int] | None = None, record_history: bool = True) -> None:
        """Remove the group's channels, or just those of the root layer's in ``idxs``."""
        root, chosen = self[0].dep, self[0].idxs if idxs is None else idxs
        self._DG.get_pruning_group(root.target.module, root.handler, chosen).prune(record_history=record_history)
        self._settle()


class Pruner(tp.pruner.BasePruner):  # type: ignore[misc]
    """torch_pruning.pruner.BasePruner for diffusion UNets: the same arguments, and `make_plan`'s exact counts.

    ``importance``: a criterion's name, a mapping of ``name`` and options, or any torch-pruning importance.
    ``calibration``: a `Calibration`, a mapping of `calibrate`'s arguments (``scheduler``, ``images`` ...) or a
    function of the UNet that returns one; the latter two are called before each of the ``iterative_steps``. Without
    it, gradients in ``.grad`` are used, as in torch-pruning. What the UNet's adapter knows is filled in: layers
    that keep their width, heads, paired channels. After every step the UNet runs, keeps its softmax scale, and
    `diffprune_plugin.save` writes it with its ``plan``.

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
            "importance": criterion_of(importance),
            "pruning_ratio_dict": {tuple(map(model.get_submodule, layers[key])): ratios[key] for key in ratios},
            "ignored_layers": [model.get_submodule(name) for name in self._stays],
        }
        with differentiable(model):
            super().__init__(**given)
        self._scopes = [
            Scope(f"pruning_ratio_dict[{i}]", layers[key], self._ratios(ratios[key])) for i, key in enumerate(ratios)
        ]
        self._ratios(self.pruning_ratio)
        self._head_layers = self.adapter.head_layers(model) if self.prune_num_heads else {}
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
            return (PlannedGroup(group, self._settle) for group in groups)
        for group in groups:
            group.prune()
        self._settle()
        return None

    @property
    def plan(self) -> PruningPlan:
        """What has been removed from the dense UNet so far."""
        gone = self._history.removed
        groups = tuple(overall(g, self._decided.get(g.root), sorted(gone[g.root])) for g in self._dense)
        layers, params, macs = sizes(self._dense, groups, self._costs)
        name, options = named(self._wanted)
        return PruningPlan(
            model_class=self.adapter.model_class,
            architecture=self._architecture,
            criterion={"name": name or type(self._wanted).__name__, **options},
            pruning_ratio=float(self._ratios(self.pruning_ratio)[self.current_step]),
            groups=groups,
            heads=self._head_counts(),
            layers=layers,
            params=params,
            macs=macs,
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
        self._settle()

    def load_pruning_history(self, pruning_history: Any) -> None:
        """Remove what another pruner of the same dense UNet removed."""
        super().load_pruning_history(pruning_history)
        self._settle()

    def _ratios(self, ratio: float) -> Sequence[float]:
        """The ratio at each step; raises BadInput for one outside [0, 1)."""
        ratios: Sequence[float] = self.iterative_pruning_ratio_scheduler(ratio, self.iterative_steps)
        for value in (ratio, *ratios[1:]):
            check_ratio(value, "pruning_ratio")
        return ratios

    def _groups(self) -> list[CoupledGroup]:
        parts = equal_parts(self.model, self.adapter, self._parts)
        return groups_of(self.DG, self.model, self.adapter, parts, self.root_module_types)

    def _decide(self, step: int) -> None:
        """Choose, for each group as it is now, what goes in this step."""
        self.importance = calibrated(self._wanted, self._calibration, self.model)
        rules = Rules(
            global_pruning=self.global_pruning,
            isomorphic=self.isomorphic,
            round_to=self.round_to or getattr(self.importance, "round_to", None) or 1,
            max_pruning_ratio=self.max_pruning_ratio,
            halves=getattr(self.importance, "halves", None) or "together",
        )
        groups = self._groups()
        heads = head_groups(groups, self._head_layers)
        special = {layer: (float(s.ratios[step]), s.label) for s in self._scopes for layer in s.layers}
        asked = asked_of_heads({g.root: requested_ratio(g, special, self._stays) for g in groups}, heads)
        items = [
            replace(
                asked_group(g, asked[g.root], self.importance, heads.get(g.root, "")),
                scope=next((scope.label for scope in self._scopes if scope.layers.intersection(g.layers)), ""),
                gone=self._units[g.root] - g.units,
            )
            for g in groups
        ]
        common, head_ratio = (self._ratios(ratio)[step] for ratio in (self.pruning_ratio, self.head_pruning_ratio))
        chosen = select(items, float(common), float(head_ratio) if heads else None, rules)
        self._decided = {group.root: group for group in chosen}

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
        return self.DG.get_pruning_group(layer, prune, paired.closed(group.removed).tolist())

    def _settle(self) -> None:
        """Bring everything that depends on the sizes up to date."""
        self._history.read(self.DG.pruning_history())
        self._history.check(self.model)
        self.adapter.set_heads_(self.model, self._head_counts())
        self.num_heads.update(self.adapter.torch_pruning_kwargs(self.model)["num_heads"])
        self.adapter.mend_(self.model)
        self.adapter.keep_softmax_scale_(self.model, self._heads)
        self._heads = self.adapter.head_sizes(self.model)
        as_pruned_(self.model, self.plan)


def arguments(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """BasePruner's arguments by their present names, with its defaults.

    Raises BadInput for one that it does not have, or that is not honoured here.
    """
    try:
        bound = SIGNATURE.bind(*args, **kwargs)
    except TypeError as error:
        unknown = next((key for key in kwargs if key not in SIGNATURE.parameters), "")
        raise BadInput(f"Pruner: {error}{nearest(unknown, SIGNATURE.parameters)}") from None
    for old, new in RENAMED.items():
        if old in bound.arguments:
            warnings.warn(f"{old} is deprecated; it is called {new}", stacklevel=3)
            bound.arguments[new] = bound.arguments.pop(old)
    defaults = {key: parameter.default for key, parameter in SIGNATURE.parameters.items()}
    for key, value in bound.arguments.items():
        if key not in HONOURED and value not in (defaults[key], None, {}):
            raise BadInput(f"{key}: {REFUSED.get(key, 'not known to this version; leave it out')}")
    given = {key: bound.arguments.get(key, defaults[key]) for key in HONOURED}
    if given["isomorphic"] and not given["global_pruning"]:
        raise BadInput("isomorphic: ranks groups of one shape together, which needs global_pruning=True; add it")
    if given["prune_num_heads"] is not (given["head_pruning_ratio"] > 0):
        raise BadInput("prune_num_heads, head_pruning_ratio: one has no effect without the other; give both or none")
    if given["prune_num_heads"] and (given["prune_head_dims"] or given["global_pruning"]):
        raise BadInput(
            "prune_num_heads: an attention loses whole heads, ranked among its own; add prune_head_dims=False and "
            "leave out global_pruning"
        )
    if not isinstance(given["iterative_steps"], int) or given["iterative_steps"] < 1:
        raise BadInput(f"iterative_steps: {given['iterative_steps']!r} is no whole number from 1 on")
    if not 0 < given["max_pruning_ratio"] <= 1:
        raise BadInput(f"max_pruning_ratio: {given['max_pruning_ratio']} is outside (0, 1]")
    return given


def layers_of(model: nn.Module, key: Key, argument: str) -> frozenset[str]:
    """Names of the layers that a module, a type, a pattern of names or a tuple of those means, with all inside them.

    Raises BadInput for what means no layer of the model.
    """
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    if isinstance(key, tuple):
        return frozenset().union(*(layers_of(model, part, argument) for part in key))
    if isinstance(key, str):
        return frozenset(matching(key, layer_names(model), argument))
    if not isinstance(key, (type, nn.Module)):
        raise BadInput(f"{argument}: a {type(key).__name__} is no layer; give the module, a type or a name")
    found = [module for module in names if (isinstance(module, key) if isinstance(key, type) else module is key)]
    if not found:
        raise BadInput(f"{argument}: {key if isinstance(key, type) else type(key)}: the model has no such layer")
    return frozenset(names[inside] for module in found for inside in module.modules())


def stays(model: nn.Module, adapter: ModelAdapter, given: Mapping[str, Any]) -> dict[str, str]:
    """The layers that stay as they are, and why."""
    found = dict.fromkeys(adapter.kept_layers(model), "kept: the adapter says that its width is the output's")
    if not given["prune_head_dims"] and not given["prune_num_heads"]:
        found |= dict.fromkeys(adapter.head_counts(model), "prune_head_dims is False")
    for key in given["ignored_layers"] or ():
        found |= dict.fromkeys(layers_of(model, key, "ignored_layers"), "ignored_layers")
    return found


def check_heads(model: nn.Module, adapter: ModelAdapter, stated: Mapping[nn.Module, int]) -> None:
    """Raises BadInput where the caller states other heads than the model has."""
    names, heads = {module: name for name, module in model.named_modules()}, adapter.head_counts(model)
    for layer, count in stated.items():
        name = names.get(layer, f"a {type(layer).__name__} outside the model")
        if heads.get(name) != count:
            raise BadInput(f"{count} heads asked for {name}, which has {heads.get(name, 'none')}; leave it out")


def equal_parts(model: nn.Module, adapter: ModelAdapter, stated: Mapping[nn.Module, int]) -> dict[str, int]:
    """For each layer, into how many parts that lose equally many it falls, by the adapter and by the caller.

    Raises BadInput where the caller names no layer of the model.
    """
    names = {module: name for name, module in model.named_modules()}
    parts, paired, heads = adapter.equal_parts(model), adapter.paired(model), adapter.head_counts(model)
    for layer, count in stated.items():
        if layer not in names:
            raise BadInput(f"out_channel_groups: a {type(layer).__name__} outside the model; leave it out")
        name = names[layer]
        if name in heads:
            check_heads(model, adapter, {layer: count})
        elif paired.get(name) != count:
            parts[name] = math.lcm(parts.get(name, 1), count)
    return parts


def named(wanted: Any) -> tuple[str | None, dict[str, Any]]:
    """Name and options of an importance given by name; no name for an object."""
    if isinstance(wanted, str):
        return wanted, {}
    if isinstance(wanted, Mapping):
        options = dict(wanted)
        return options.pop("name", ""), options
    return None, {}


def criterion_of(wanted: Any, calibration: Calibration | None = None) -> Criterion:
    """The importance that was asked for by name, or as an object."""
    name, options = named(wanted)
    if name is not None:
        return importance(name, calibration=calibration, **options)
    return wanted if calibration is None else with_calibration(wanted, calibration)


def check_calibration(wanted: Any, calibration: Calibrations | None, steps: int) -> None:
    """Raises BadInput for a calibration that cannot be used, before anything is traced."""
    criterion = criterion_of(wanted)
    if calibration is None:
        return
    if getattr(criterion, "sweep", None) is None:
        raise BadInput(f"calibration: {type(criterion).__name__} takes none; leave it out")
    if isinstance(calibration, Calibration):
        if steps > 1:
            raise BadInput(
                f"calibration: after a removal it is stale, and iterative_steps is {steps}; give the arguments that "
                "make one: calibration={'scheduler': ..., 'images': ...}"
            )
    elif isinstance(calibration, Mapping):
        known = set(inspect.signature(calibrate).parameters) - {"model", "sweep"}
        for key in (*sorted(set(calibration) - known), *sorted({"scheduler", "images"} - set(calibration))):
            state = "unknown argument" if key in calibration else "missing argument"
            raise BadInput(f"calibration: {state} {key!r}; it holds those of diffprune_plugin.calibrate")
    elif not callable(calibration):
        raise BadInput(f"calibration: a {type(calibration).__name__} is no Calibration, mapping or function")


def calibrated(wanted: Any, calibration: Calibrations | None, model: nn.Module) -> Criterion:
    """The importance, calibrated for the UNet as it is now.

    Raises BadInput for a calibration of other weights.
    """
    criterion: Any = criterion_of(wanted)
    if calibration is None:
        return criterion  # type: ignore[no-any-return]
    made = calibration
    if isinstance(made, Mapping):
        made = calibrate(model, sweep=criterion.sweep, **made)
    elif not isinstance(made, Calibration):
        made = made(model)
    if not isinstance(made, Calibration):
        raise BadInput(f"calibration: the function returned a {type(made).__name__}, not a Calibration")
    if made.weights != weights_hash(model):
        raise BadInput("calibration: made for other weights than the model's; calibrate again")
    return criterion_of(wanted, made)


def overall(group: CoupledGroup, decided: GroupPlan | None, removed: Sequence[int]) -> GroupPlan:
    """A group of the dense UNet with all that is gone of it; ``decided`` is its last step."""
    if decided is None:
        return group_plan(group, group.parts, group.parts, 0, removed, "")
    left_out = len(removed) < group.units - decided.units + len(decided.removed)
    reason = "not pruned by the caller of step(interactive=True)" if left_out else decided.reason
    return group_plan(group, decided.parts, decided.step, decided.requested, removed, reason)
