"""The plan's channels held at zero by NNCF's own masks, so that NNCF's functions see and train the pruned model.

The only importer of nncf (extra ``nncf``), and only when one of these functions is called. The order of work::

    mask_(model, plan)            # nncf.pruning_statistic, training, nncf.torch.get_config work on it from here on
    ...                          # fine-tune
    remove_(model, fold_(model).plan)
    nncf.quantize(model, ...)     # the torch model, or the ONNX file of it

What NNCF's users should know:

- Masks save no time, they cost some: a masked forward takes two to four times as long. Removal saves it.
- ``nncf.quantize`` comes last. Masks and quantizers together cannot be folded. On a torch model its first call compiles
  a C++ extension (g++ needed) and gives up after 60 s, unless the environment has ``NNCF_EXTENSION_LOAD_TIMEOUT=0``.
- ``nncf.pruning_statistic`` on a model without masks fails with ``AttributeError: __nncf_hooks``.
- ``nncf.torch.wrap_model`` is another function than the ``nncf.torch.function_hook.wrap_model`` that masks need: it
  returns a wrapper instead of the model.
- Not tried under masks: GPUs, several processes, torch.compile. A loaded LoRA is refused.
- NNCF reports its use to its makers unless you run ``opt_in_out --opt_out`` or set ``NNCF_CI=1``.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffprune_plugin import plugins
from diffprune_plugin.adapters.state import HOOKS
from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.calibration.calibration import Calibration
from diffprune_plugin.errors import BadInput, first_line
from diffprune_plugin.graph.groups import ChannelsToGo
from diffprune_plugin.hookspecs import Criterion
from diffprune_plugin.planning.plan import PLAN_FILE, PruningPlan
from diffprune_plugin.planning.planner import make_plan
from diffprune_plugin.pruning.masked_layers import keep_, stock_
from diffprune_plugin.pruning.removal import channels_to_go
from diffprune_plugin.utils.files import new_directory
from diffprune_plugin.utils.optional import need
from diffprune_plugin.utils.tensors import load_tensors, save_tensors, tensors_hash

WEIGHTS = "masked.safetensors"
# Modules of nncf.torch.function_hook that are used here.
NNCF_PARTS = (
    "hook_storage",
    "nncf_graph.nncf_graph_builder",
    "pruning.magnitude.modules",
    "pruning.prune_model",
)


@dataclass(frozen=True)
class MaskReport:
    """What a UNet was masked with: the plan, whether norms are exact, how many parameters have a mask, and the masks'
    SHA-256; the UNet carries it as ``mask_report``."""

    plan: PruningPlan
    exact_norms: bool
    tensors: int
    sha256: str


def mask_(
    model: nn.Module,
    plan: PruningPlan,
    *,
    exact_norms: bool = True,
    register: bool = True,
    adapter: ModelAdapter | None = None,
) -> MaskReport:
    """Hold the plan's channels at zero in every weight, bias and norm: in the forward, not in the parameters.

    With ``exact_norms`` norms take their statistics over the kept channels, and queries are trained at the scale that
    they have after removal: the UNet computes and learns what the pruned one does. Without, the masks are NNCF's and
    nothing else, and removal changes the outputs (after 50 % by a third).

    Only calls of the UNet itself see the masks: a submodule called directly does not, and gradient checkpointing fails
    (torch: CheckpointError), since NNCF's hooks sleep while it recomputes. `nncf.prune` and NNCF's schedulers overwrite
    these masks; `fold_` notices, and `MaskSchedule` follows a schedule. ``save_pretrained`` of a masked UNet writes
    what ``from_pretrained`` cannot read: use `save_masked`. ``register=False`` prepares everything but the hooks, for
    ``nncf.torch.load_from_config`` and ``load_state_dict`` to follow.

    Raises MissingExtra without nncf; BadInput for a plan of another UNet, a UNet that is pruned or masked already, or
    gradient checkpointing.
    """
    hooks = need_nncf().torch.function_hook
    adapter = adapter or plugins.find_adapter(model)
    if getattr(model, "is_gradient_checkpointing", False):
        raise BadInput("masks do not work with gradient checkpointing; call unet.disable_gradient_checkpointing()")
    gone = channels_to_go(model, plan, adapter)
    masks = keep_masks(model, gone)
    if exact_norms:
        keep_(model, kept_channels(model, plan, gone, adapter))
    if register:
        hooks.wrap_model(model)
        for name, keep in masks.items():
            mask = hooks.pruning.magnitude.modules.UnstructuredPruningMask(tuple(keep.shape))
            mask.binary_mask.copy_(keep)
            hooks.register_post_function_hook(model, name, 0, mask.to(model.get_parameter(name).device))
    report = MaskReport(plan, exact_norms, len(masks), masks_hash(masks.items()))
    model.mask_report = report  # type: ignore[assignment]
    return report


def fold_(model: nn.Module) -> MaskReport:
    """Write the masks' zeros into the parameters and take NNCF off the UNet; its outputs stay the same.

    The parameters are then those of ``nncf.strip(model, strip_format=nncf.StripFormat.IN_PLACE)``; but that needs
    torchao, which NNCF does not install, leaves all masked parameters frozen (requires_grad False), and without
    ``strip_format`` it leaves the masks. Norms stay exact until `remove_`.

    Raises BadInput if the UNet is not masked by `mask_`, or something else changed the masks or added quantizers.
    """
    modules = need_nncf().torch.function_hook.pruning.magnitude.modules
    report, found = report_of(model), hooks_of(model)
    if not all(isinstance(hook, modules.UnstructuredPruningMask) for _, hook in found):
        raise BadInput("the UNet carries other NNCF hooks than masks; fold and remove first, then call nncf.quantize")
    if masks_hash((name, hook.binary_mask) for name, hook in found) != report.sha256:
        raise BadInput(
            "the masks are no longer those of mask_: nncf.prune, one of NNCF's schedulers or another state dict "
            "overwrote them; load what save_masked wrote, or mask the dense UNet again"
        )
    with torch.no_grad():
        for name, hook in found:
            model.get_parameter(name).mul_(hook.binary_mask)
    unwrap_(model)
    del model.mask_report
    return report


def save_masked(model: Any, directory: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write a masked UNet as config.json, its plan and a safetensors file of its state dict, all or nothing.

    Raises BadInput if the UNet is not masked, or if the directory exists and ``overwrite`` is not set.
    """
    report, path = report_of(model), Path(directory)
    stamp = {"plan": report.plan.sha256, "exact_norms": str(report.exact_norms)}
    with new_directory(path, overwrite, "masked model") as temporary:
        model.save_config(str(temporary))
        report.plan.write(temporary / PLAN_FILE)
        save_tensors(model.state_dict(), temporary / WEIGHTS, stamp)
    return path


def load_masked_(
    model: nn.Module, directory: str | os.PathLike[str], *, adapter: ModelAdapter | None = None
) -> MaskReport:
    """Mask a dense UNet as `save_masked` found it, with its weights, to go on fine-tuning.

    Raises BadInput if the files are missing, damaged or of another UNet.
    """
    plan = PruningPlan.read(Path(directory) / PLAN_FILE)
    state, stamp = load_tensors(Path(directory) / WEIGHTS)
    if stamp.get("plan") != plan.sha256:
        raise BadInput(f"{Path(directory) / WEIGHTS}: belongs to another plan than {PLAN_FILE}; restore both files")
    report = mask_(model, plan, exact_norms=stamp.get("exact_norms") == "True", adapter=adapter)
    mine = {name: tensor.shape for name, tensor in model.state_dict().items()}
    wrong = [name for name in {**mine, **state} if name not in state or mine.get(name) != state[name].shape]
    if wrong:
        unwrap_(model)
        stock_(model)
        del model.mask_report
        raise BadInput(f"{Path(directory) / WEIGHTS}: does not fit the UNet: {wrong[0]}")
    model.load_state_dict(state)
    return report


def nncf_prune(
    model: Any,
    importance: str | Criterion = "diff_taylor",
    *,
    ratio: float | None = None,
    ignored_scope: Any = None,
    examples_inputs: Any = None,
    calibration: Calibration | None = None,
    exact_norms: bool = True,
    adapter: ModelAdapter | None = None,
    **options: Any,
) -> Any:
    """``nncf.prune`` for whole channels: masks those of least importance in place and returns the model.

    ``importance`` stands where NNCF has its mode: a criterion or its name, with ``calibration`` where it needs one
    (``diff_taylor``: that, or gradients in ``.grad``). ``ratio`` is the share of each group's channels, 0.3 unless
    ``options``, further ones of `make_plan`, have a target, with the ``sensitivity`` that it is spent by, say; the plan
    is ``model.mask_report.plan``. In ``ignored_scope`` (`nncf.IgnoredScope`) name layers by parameter, as in
    ``names=["conv_in.weight"]`` or ``patterns=[r"mid_block\\..*"]``: NNCF's operation names are call numbers in
    diffusers' UNets. ``examples_inputs``: a tuple or dict of the forward's arguments, by default the adapter's.

    Raises as `make_plan` and `mask_` do, and BadInput for a scope that matches nothing.
    """
    if "pruning_ratio" in options:
        raise BadInput(f"pruning_ratio: {options['pruning_ratio']} is called ratio here, as in nncf.prune")
    adapter = adapter or plugins.find_adapter(model)
    examples_inputs = adapter.trace_inputs(model) if examples_inputs is None else examples_inputs
    ignored = ignored_layers(model, ignored_scope, examples_inputs)
    criterion, description = importance, None
    if isinstance(importance, str):
        criterion, description = plugins.importance(importance, calibration=calibration), {"name": importance}
    elif calibration is not None:
        criterion = plugins.with_calibration(importance, calibration)
    further = options.get("ignored_layers", ())
    options["ignored_layers"] = [*ignored, *([further] if isinstance(further, str) else further)]
    plan = make_plan(model, criterion, pruning_ratio=ratio, adapter=adapter, description=description, **options)
    mask_(model, plan, exact_norms=exact_norms, adapter=adapter)
    return model


def ignored_layers(model: nn.Module, scope: Any, examples_inputs: Any) -> list[str]:
    """Names of the layers that an `nncf.IgnoredScope` means, as NNCF resolves it; raises BadInput if it means none."""
    nncf = need_nncf()
    if not isinstance(examples_inputs, (dict, tuple)):
        raise BadInput(
            f"examples_inputs: a {type(examples_inputs).__name__}; give a tuple or a dict of the forward's arguments"
        )
    if scope is None:
        return []
    if not isinstance(scope, nncf.IgnoredScope):
        raise BadInput(f"ignored_scope: {scope!r} is no nncf.IgnoredScope(names=[...], patterns=[...])")
    function_hook = nncf.torch.function_hook
    graph = function_hook.nncf_graph.nncf_graph_builder.build_nncf_graph(model, examples_inputs)
    prunable = function_hook.pruning.prune_model.get_prunable_parameters
    try:
        spared = prunable(graph, None) - prunable(graph, scope)
    except nncf.ValidationError as error:
        raise BadInput(f"ignored_scope: {first_line(error)}; names are those of parameters, 'conv_in.weight'") from None
    if not spared:
        raise BadInput(f"ignored_scope: {scope} means no layer with weights; name parameters, as in 'conv_in.weight'")
    return sorted(name.removesuffix(".weight") for name in spared)


def keep_masks(model: nn.Module, gone: ChannelsToGo) -> dict[str, Tensor]:
    """For each parameter that loses channels what is kept, True or False for each element, in its shape."""
    masks: dict[str, Tensor] = {}
    for (name, side), channels in gone.items():
        layer = model.get_submodule(name)
        for key, parameter in layer.named_parameters(recurse=False):
            axis = 1 if side == "in" or isinstance(layer, nn.Embedding) else 0
            if axis < parameter.dim():  # a bias has no input channels
                mask = masks.setdefault(f"{name}.{key}", torch.ones(parameter.shape, dtype=torch.bool))
                mask.index_fill_(axis, torch.from_numpy(channels), False)
    return masks


def kept_channels(
    model: nn.Module, plan: PruningPlan, gone: ChannelsToGo, adapter: ModelAdapter
) -> Mapping[str, Tensor]:
    """For each norm that loses channels, and each query projection whose heads shrink, the indices of those kept."""
    queries = {query for query, attention in adapter.queries(model).items() if attention not in plan.heads}
    kept = {}
    for (name, side), channels in gone.items():
        layer = model.get_submodule(name)
        if side == "out" and (name in queries or isinstance(layer, (nn.GroupNorm, nn.LayerNorm))):
            width = layer.num_channels if isinstance(layer, nn.GroupNorm) else len(layer.get_parameter("weight"))
            keep = torch.ones(width, dtype=torch.bool)
            keep[torch.from_numpy(channels)] = False
            kept[name] = keep.nonzero().flatten()
    return kept


def report_of(model: nn.Module) -> MaskReport:
    """What the UNet was masked with; raises BadInput if it was not."""
    report = getattr(model, "mask_report", None)
    if not isinstance(report, MaskReport):
        raise BadInput("the UNet is not masked; call mask_(unet, plan) first")
    return report


def hooks_of(model: nn.Module) -> list[tuple[str, Any]]:
    """NNCF's hooks on the UNet, each with the parameter or operation that it hangs on."""
    decode = need_nncf().torch.function_hook.hook_storage.decode_hook_name
    storage: Any = getattr(model, HOOKS, None)
    return [] if storage is None else [(decode(name)[1], hook) for name, hook in storage.named_hooks()]


def unwrap_(model: Any) -> None:
    """Take NNCF's hooks and wrappers off, for which NNCF itself has no function."""
    forward = model.forward.orig_forward
    for name in ("forward", "_replicate_for_data_parallel"):
        del model.__dict__[name]
    if getattr(forward, "__func__", None) is not type(model).forward:
        model.forward = forward  # another library's wrapper, which was there first
    delattr(model, HOOKS)


def masks_hash(masks: Iterable[tuple[str, Tensor]]) -> str:
    return tensors_hash(sorted(masks, key=itemgetter(0)))


def need_nncf() -> Any:
    """NNCF with the parts used here; they are not all marked as its public API, hence the range of versions.

    Raises MissingExtra if it is not installed, BadInput for a version outside that range.
    """
    nncf = need("nncf")
    if not (3, 2) <= tuple(int(part) for part in nncf.__version__.split(".")[:2]) < (4, 0):
        raise BadInput(f"nncf {nncf.__version__} is installed, but masks need nncf>=3.2,<4; install that")
    for part in NNCF_PARTS:
        importlib.import_module(f"nncf.torch.function_hook.{part}")
    return nncf
