"""From a config to a pruned directory: what `diffprune prune` does."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from torch import nn

from diffprune_plugin.calibration.calibration import Calibration
from diffprune_plugin.calibration.stored import calibration_for
from diffprune_plugin.config.criterion import criterion_of, describe, dropout_of, tell_unused
from diffprune_plugin.config.pruning import PruningConfig
from diffprune_plugin.data.encoding import encode
from diffprune_plugin.data.places import is_folder
from diffprune_plugin.data.samples import Samples
from diffprune_plugin.diffusion.inputs import fitting
from diffprune_plugin.errors import BadInput
from diffprune_plugin.graph.running import execution_order
from diffprune_plugin.hookspecs import Criterion
from diffprune_plugin.latency.run import check_runtime, check_size, meet_latency, timed_on
from diffprune_plugin.planning.allocated import LatencyCosts, predicted
from diffprune_plugin.planning.options import PlanOptions
from diffprune_plugin.planning.plan import PLAN_FILE, BlockChoice, PruningPlan
from diffprune_plugin.planning.planner import Material, check_patterns, check_same_layers, material_of, plan_from
from diffprune_plugin.planning.plot import plot_widths
from diffprune_plugin.planning.presets import filled_in
from diffprune_plugin.plugins import find_adapter
from diffprune_plugin.pruning.depth import Cut, cut_out
from diffprune_plugin.pruning.directory import COMPENSATION_FILE, CONFIG_FILE, check_kept, progress_directory
from diffprune_plugin.pruning.loading import load_model, model_of, with_model
from diffprune_plugin.pruning.pruned_class import PrunedModelMixin
from diffprune_plugin.pruning.removal import remove_
from diffprune_plugin.pruning.saving import PRUNED, save
from diffprune_plugin.recovery.compensate import SAMPLES, CompensationReport, joined
from diffprune_plugin.recovery.draws import check_enough
from diffprune_plugin.recovery.repairing import compensate, compensate_depth, wants_compensation
from diffprune_plugin.sensitivity.answers import spend_measured
from diffprune_plugin.sensitivity.depth import check_choosable, chosen_blocks, left_for_widths
from diffprune_plugin.sensitivity.frontier import Frontier, check_frontier, frontier, verified
from diffprune_plugin.sensitivity.measured import Search, search
from diffprune_plugin.sensitivity.sensitivity import Sensitivity
from diffprune_plugin.sensitivity.stored import is_allocated, sensitivity_for
from diffprune_plugin.utils.device import device_of
from diffprune_plugin.utils.distributed import Processes
from diffprune_plugin.utils.files import check_absent, check_apart, relative


@dataclass(frozen=True)
class Pruned:
    """What a run made: the model (pipeline or UNet, pruned unless a dry run), its plan, and what led to it.

    errors: what a budget was spent by, the error that each width of each group would have by itself, by root layer and
    by how many units go; empty where it was not spent so.
    """

    model: Any
    plan: PruningPlan
    calibration: Calibration | None
    compensation: CompensationReport | None
    errors: Mapping[str, Mapping[int, float]] = field(default_factory=dict)

    def plot(self, path: Path) -> None:
        """The widths before and after, and what others would have cost; raises MissingExtra without matplotlib."""
        model = self.model if isinstance(self.model, nn.Module) else model_of(self.model)
        plot_widths(self.plan, execution_order(model, find_adapter(model)), path, self.errors)


@dataclass(frozen=True)
class Job:
    """What a config names, read and checked; ``samples`` reads and encodes the data when it is first called.

    ``stated``: the config as it was given, ``config`` what it asks of ``model``, which may have lost blocks already:
    ``gone`` is what the plan says of them, ``blocks`` why, where they were chosen, ``refit`` what was done about it.
    ``cut``: the model beside the dense one, until it is refitted.
    """

    stated: PruningConfig
    config: PruningConfig
    criterion: Criterion
    loaded: Any
    model: nn.Module
    cut: Cut | None
    compensating: bool
    samples: Callable[[], Samples]
    gone: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    blocks: BlockChoice | None = None
    refit: CompensationReport | None = None

    @property
    def scheduler(self) -> Any:
        """The pipeline's; None for a bare model."""
        return getattr(self.loaded, "scheduler", None)


def prune(config: PruningConfig, *, overwrite: bool = False, dry_run: bool = False, progress: bool = True) -> Pruned:
    """Load, calibrate if the criterion needs it, plan, remove, compensate, save; a dry run stops at the plan.

    Raises BadInput for what cannot be used in the config, before anything is written, and for several processes.
    """
    count = Processes().count
    if count > 1:
        raise BadInput(f"prune: {count} processes would all write {config.output}; call prune_shared in each")
    return cast(Pruned, prune_shared(config, overwrite=overwrite, dry_run=dry_run, progress=progress))


def prune_shared(
    config: PruningConfig,
    accelerator: Any = None,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: bool = True,
) -> Pruned | None:
    """As `prune`, with the calibration shared out over all processes of torch.distributed, which make the same call.

    The rest is done by the first process, and the others get None: after the plan, so that what fails until then fails
    on all of them. ``accelerator`` (Accelerate's) says the device of each. Raises what `prune` raises.
    """
    processes = Processes(accelerator.device if accelerator else torch.device(config.device))
    job = processes.on_all(lambda: prepare(config_on(accelerator, config), overwrite, dry_run))
    store = not dry_run and processes.is_first  # one file of progress of what each process does by itself
    job = processes.on_all(lambda: refitted(with_chosen_depth(job, store, progress), store, progress))
    calibration, sensitivity = measured(job, processes, not dry_run, progress)
    made = processes.on_first(lambda: material_for(job, calibration))
    plan = plan_of(job, made, sensitivity, processes, not dry_run, progress)
    if plan is None or made is None:
        return None
    plan = plan.model_copy(update={**job.gone, "blocks": job.blocks})
    wished = job.config.with_wishes_of(made.criterion)
    errors = {} if sensitivity is None else predicted(made.items, wished, sensitivity)
    result = Pruned(job.loaded, plan, calibration, None, errors)
    return result if dry_run else replace(result, compensation=finish(job, plan, overwrite, progress))


def frontier_of(config: PruningConfig, verify: int = 0, progress: bool = True, latency: bool = False) -> Frontier:
    """What every budget would cost the config's model; nothing is written but what the config names to be kept.

    verify: so many budgets are really pruned and compensated. latency: also by that on the config's runtime.
    Raises what `prune` raises.
    """
    if latency:
        check_runtime(config.latency)
    check_frontier(config, latency)
    # What a prune of the same output left to go on from is none of a frontier's.
    config = config.model_copy(update={"output": f"{Path(config.output)}.frontier"})
    job = prepare(config.model_copy(update={"allocation": "linear"}), overwrite=False, dry_run=True)
    if latency:
        check_size(config.latency, job.model)
    job = refitted(job, True, progress)
    config = job.config.model_copy(update={"allocation": config.allocation})
    calibration, sensitivity = measured(job, Processes(torch.device(config.device)), True, progress)
    material = material_for(replace(job, config=config), calibration)
    with contextlib.ExitStack() as stack:
        file, runtime = progress_directory(config.output) / "latency.json", None
        if latency:
            runtime = stack.enter_context(timed_on(config, config.latency, job.model, material, file, progress))
        found = frontier(material, config, cast(Sensitivity, sensitivity), latency=runtime.costs if runtime else None)
        if runtime:
            found = replace(found, dense_ms=runtime.dense_ms())
        if verify:
            repair = functools.partial(compensate, config=config, progress=progress) if job.compensating else None
            given = found, verify, job.model, job.scheduler, job.samples(), material.adapter, config.seed, repair
            found = verified(*given, timer=runtime.share if runtime else None)
    shutil.rmtree(progress_directory(config.output), ignore_errors=True)
    return found


def measured(
    job: Job, processes: Processes, store: bool, progress: bool
) -> tuple[Calibration | None, Sensitivity | None]:
    """What a plan is made by, each where it is needed: new ones by all processes together, stored ones by the first.

    store: whether they are written where the config says, and what an interrupted call has, beside the output.
    """
    scheduler, sweep = job.scheduler, getattr(job.criterion, "sweep", None)
    if store:
        kept_in = job.config.calibration, job.config.sensitivity
        processes.on_all(lambda: check_kept(*kept_in) if processes.is_first else None)
    kept: dict[str, Any] = {"store": store, "progress_in": progress_directory(job.config.output), "progress": progress}
    given = job.model, scheduler, job.samples, processes
    calibration = calibration_for(job.config, sweep, *given, **kept)
    kept |= {"scoring": hasattr(job.criterion, "sensitivity"), "compensating": job.compensating}
    found = sensitivity_for(job.config, *given, **kept)
    if hasattr(job.criterion, "sensitivity"):
        job.criterion.sensitivity = found
    return calibration, found if is_allocated(job.config, scheduler) else None


def config_on(accelerator: Any, config: PruningConfig) -> PruningConfig:
    """The config with the device that Accelerate gave this process; raises BadInput if it asks for another."""
    if accelerator is None:
        return config
    asked = config.device if "device" in config.model_fields_set else None
    return config.model_copy(update={"device": device_of(accelerator, asked, config.autocast)})


def prepare(config: PruningConfig, overwrite: bool, dry_run: bool) -> Job:
    """Everything that can be checked before work begins; the first process checks the output, which it writes."""
    output = Path(config.output)
    if not dry_run and Processes().is_first:
        check_absent(output, overwrite, PRUNED)
        check_apart(output, config.sources)
    criterion = criterion_of(config)
    loaded, model = load_model(
        config.model, config.device, config.dtype, variant=config.variant, unused_tensors=config.unused_tensors
    )
    if isinstance(model, PrunedModelMixin):
        raise BadInput(f"model: {config.model} is pruned already; start from the dense model")
    stated, adapter, cut = config, find_adapter(model), None
    if config.chooses_depth:
        check_choosable(config, model, adapter, getattr(loaded, "scheduler", None))
    elif config.depth:
        cut = cut_out(model, config.depth, adapter=adapter)
        check_same_layers(model, cut.model, cut.shallower.dense_name, config)
        loaded, model = with_model(loaded, model, cut.model)
    config = filled_in(config, model, find_adapter(model))
    check_patterns(model, config)
    if config.timed:
        check_runtime(config.latency)
        check_size(config.latency, model)
    compensating, scheduler = wants_compensation(config, loaded), getattr(loaded, "scheduler", None)
    if config.data:
        is_folder(Path(config.data))  # that it is there

    def samples() -> Samples:
        found = encode(loaded, config.data, config.resolution).with_dropout(dropout_of(criterion))
        if compensating:
            check_enough(len(found), SAMPLES)
        return found

    job = Job(stated, config, criterion, loaded, model, cut, compensating, functools.cache(samples))
    if compensating and not dry_run and Processes().is_first:  # read now, not when all but the repair is done
        fitting(job.samples(), model, find_adapter(model), scheduler)
    tell_unused(stated, criterion, is_allocated(config, scheduler))
    return job


def with_chosen_depth(job: Job, store: bool, progress: bool) -> Job:
    """The job without the blocks that are chosen, if they are to be: its widths have to meet the rest of the target."""
    if not job.config.chooses_depth:
        return job
    kept: dict[str, Any] = {"store": store, "progress_in": progress_directory(job.config.output), "progress": progress}
    choice = chosen_blocks(job.config, job.criterion, job.model, job.scheduler, job.samples, job.compensating, **kept)
    if not choice.gone:
        return replace(job, blocks=choice)
    cut = cut_out(job.model, choice.gone)
    config = left_for_widths(job.config, choice, cut.model, job.samples().extra)
    loaded, model = with_model(job.loaded, job.model, cut.model)
    criterion = job.criterion if config.target else criterion_of(config)
    return replace(job, config=config, criterion=criterion, loaded=loaded, model=model, cut=cut, blocks=choice)


def refitted(job: Job, store: bool, progress: bool) -> Job:
    """The job with the layers around blocks that went refitted, where compensation is on."""
    if (cut := job.cut) is None:
        return job
    job = replace(job, gone={"depth": cut.shallower.gone, "skipped": cut.shallower.skipped}, cut=None)
    if not job.compensating:
        return job
    loaded, model = with_model(job.loaded, job.model, copy.deepcopy(job.model))  # its weights are the dense model's
    report = compensate_depth(cut, model, job.scheduler, job.samples(), job.config, store, progress)
    return replace(job, loaded=loaded, model=model, refit=report)


def material_for(job: Job, calibration: Calibration | None) -> Material:
    """What the plan is made from, scored with the calibration."""
    if calibration is not None:
        job.criterion.calibration = calibration  # type: ignore[attr-defined]
    extra = job.samples().extra if job.config.data and find_adapter(job.model).words else {}
    return material_of(job.config, job.model, job.criterion, extra=extra)


def plan_of(
    job: Job,
    material: Material | None,
    sensitivity: Sensitivity | None,
    processes: Processes,
    store: bool,
    progress: bool,
) -> PruningPlan | None:
    """The plan, on the first process, which alone has the material; what it is measured by, all measure together."""
    config = job.config

    def made() -> PruningPlan:
        return plan_from(cast(Material, material), config, describe(job.criterion, config), sensitivity)

    def searching() -> Search:
        return search(cast(Material, material), config, describe(job.criterion, config), cast(Sensitivity, sensitivity))

    if config.timed:
        return processes.on_first(lambda: timed_plan(job, cast(Material, material), sensitivity, store, progress))
    if config.allocation != "measured":
        return processes.on_first(made)
    return spend_measured(
        searching,
        job.model,
        job.loaded.scheduler,
        processes.on_all(job.samples),
        processes,
        samples=config.sensitivity_samples,
        seed=config.seed,
        progress_in=progress_directory(config.output) if store else None,
        progress=progress,
    )


def timed_plan(
    job: Job, material: Material, sensitivity: Sensitivity | None, store: bool, progress: bool
) -> PruningPlan:
    """The plan that meets a latency, measured; ``store`` keeps what an interrupted measurement has."""
    config, told = job.config, describe(job.criterion, job.config)
    file = progress_directory(config.output) / "latency.json" if store else None

    def plan(options: PlanOptions, costs: LatencyCosts) -> PruningPlan:
        return plan_from(material, options, told, sensitivity, costs)

    return meet_latency(config, config.latency, job.model, material, plan, file, progress, store=store)


def finish(job: Job, plan: PruningPlan, overwrite: bool, progress: bool) -> CompensationReport | None:
    """Remove, compensate, save; what the compensation did, if there was one.

    Where nothing but blocks goes, what is left is saved as the dense model that it is.
    """
    config, loaded, model, stock = job.config, job.loaded, job.model, plan.depth and not (plan.layers or plan.skipped)
    dense = copy.deepcopy(model) if job.compensating and plan.layers else None
    if not stock:
        remove_(model, plan)
    compensation = (
        None if dense is None else compensate(model, dense, plan, loaded.scheduler, job.samples(), config, progress)
    )
    compensation = joined(job.refit, compensation)
    stored = {key: relative(value) for key, value in job.stated.model_dump(mode="json").items()}
    extra = {CONFIG_FILE: yaml.safe_dump(stored, sort_keys=False)} | ({PLAN_FILE: plan.as_json(1)} if stock else {})
    if compensation is not None:
        extra[COMPENSATION_FILE] = json.dumps(compensation.as_dict(), indent=1) + "\n"
    save(loaded, Path(config.output), overwrite=overwrite, extra=extra)
    shutil.rmtree(progress_directory(config.output), ignore_errors=True)
    loaded.to(config.device)
    return compensation
