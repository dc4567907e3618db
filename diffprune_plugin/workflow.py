"""From a config to a pruned directory: what `diffprune prune` does."""

from __future__ import annotations

import copy
import functools
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from diffusers import DiffusionPipeline
from torch import nn

from diffprune_plugin.calibration.calibration import Calibration
from diffprune_plugin.calibration.run import calibrate, default_points
from diffprune_plugin.config.pruning import FinetuneConfig, PruningConfig
from diffprune_plugin.data.encoding import encode
from diffprune_plugin.data.loading import Samples
from diffprune_plugin.diffusion.loss import fitting, trained_for, training_scheduler
from diffprune_plugin.errors import BadInput, HardwareUnproved, out_of_memory
from diffprune_plugin.hookspecs import Criterion
from diffprune_plugin.planning.plan import PruningPlan
from diffprune_plugin.planning.planner import check_asked, check_patterns, make_plan
from diffprune_plugin.plugins import criterion_of, find_adapter
from diffprune_plugin.pruning.checkpoint import PrunedModelMixin, load, load_pipeline, save
from diffprune_plugin.pruning.removal import remove_
from diffprune_plugin.recovery.compensate import CompensationReport, compensate_, passes_that_fit
from diffprune_plugin.utils.distributed import agreed, decided, place
from diffprune_plugin.utils.files import check_absent
from diffprune_plugin.utils.tensors import weights_hash

CONFIG_FILE = "diffprune.yaml"
# Keys of the config that are options of make_plan.
PLANNING = (
    "pruning_ratio",
    "pruning_ratio_dict",
    "macs_target",
    "params_target",
    "max_pruning_ratio",
    "head_pruning_ratio",
    "ignored_layers",
    "target_layers",
    "global_pruning",
    "isomorphic",
    "round_to",
    "halves",
    "strict",
)
COMPENSATION_FILE = "compensation.json"


@dataclass(frozen=True)
class Pruned:
    """What a run made: the model (pipeline or UNet, pruned unless a dry run), its plan, and what led to it."""

    model: Any
    plan: PruningPlan
    calibration: Calibration | None
    compensation: CompensationReport | None


@dataclass(frozen=True)
class Job:
    """What a config names, read and checked; ``samples`` reads and encodes the data when it is first called."""

    config: PruningConfig
    criterion: Criterion
    model: Any
    unet: nn.Module
    compensating: bool
    samples: Callable[[], Samples]


def prune(config: PruningConfig, *, overwrite: bool = False, dry_run: bool = False, progress: bool = True) -> Pruned:
    """Load, calibrate if the criterion needs it, plan, remove, compensate, save; a dry run stops at the plan.

    Raises BadInput for anything in the config that cannot be used, before anything is written, and where
    torch.distributed has several processes: they would all write the output.
    """
    if place()[1] > 1:
        raise BadInput(f"prune: {place()[1]} processes would all write {config.output}; call prune_shared in each")
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
    device = accelerator.device if accelerator else torch.device(config.device)
    job = agreed(lambda: prepare(on_device_of(accelerator, config), overwrite, dry_run), device)
    calibration = calibration_for(job, device, progress, store=not dry_run)
    plan = agreed(lambda: plan_of(job, calibration) if place()[0] == 0 else None, device)
    if plan is None:
        return None
    if dry_run:
        return Pruned(job.model, plan, calibration, None)
    return finish(job, plan, calibration, overwrite, progress)


def on_device_of(accelerator: Any, config: PruningConfig) -> PruningConfig:
    """The config with the kind of device that Accelerate gave this process, which is torch's current one of its kind.

    Raises BadInput if the config asks for another, or the launcher for a precision that the config does not have.
    """
    if accelerator is None:
        return config
    given, precision = accelerator.device, accelerator.mixed_precision
    if "device" in config.model_fields_set and config.device != given.type:
        raise BadInput(
            f"device: {config.device}, but Accelerate gives each process its own ({given}); leave 'device' out or say "
            f"{given.type}, or launch with --cpu, --gpu_ids or plain diffprune prune"
        )
    if precision not in ("no", "bf16" if config.autocast else "no"):
        raise BadInput(
            f"mixed_precision: accelerate launch says {precision}, the config autocast: {config.autocast}; launch with "
            "--mixed_precision no, or bf16 and autocast: true"
        )
    return config.model_copy(update={"device": given.type})


def prepare(config: PruningConfig, overwrite: bool, dry_run: bool) -> Job:
    """Everything that can be checked before work begins; the first process checks the output, which it writes."""
    output = Path(config.output)
    if not dry_run and place()[0] == 0:
        check_absent(output, overwrite)
        check_apart(output, {key: getattr(config, key) for key in ("model", "data", "calibration")})
    criterion = criterion_of(config)
    model, unet = load_model(config)
    if isinstance(unet, PrunedModelMixin):
        raise BadInput(f"model: {config.model} is pruned already; start from the dense model")
    find_adapter(unet)
    check_asked(asked(config))
    check_patterns(
        unet, **{key: getattr(config, key) for key in ("pruning_ratio_dict", "ignored_layers", "target_layers")}
    )
    samples = functools.cache(lambda: encode(model, config.data, config.resolution))
    return Job(config, criterion, model, unet, wants_compensation(config, model), samples)


def asked(config: PruningConfig) -> dict[str, Any]:
    """The options of make_plan."""
    return {key: getattr(config, key) for key in PLANNING}


def plan_of(job: Job, calibration: Calibration | None) -> PruningPlan:
    if calibration is not None:
        job.criterion.calibration = calibration  # type: ignore[attr-defined]
    return make_plan(job.unet, job.criterion, **asked(job.config), description=describe(job.criterion, job.config))


def finish(job: Job, plan: PruningPlan, calibration: Calibration | None, overwrite: bool, progress: bool) -> Pruned:
    """Remove, compensate, save."""
    config, model, unet = job.config, job.model, job.unet
    dense = copy.deepcopy(unet) if job.compensating else None
    remove_(unet, plan)
    compensation = (
        None if dense is None else compensate(unet, dense, plan, model.scheduler, job.samples(), config, progress)
    )
    extra = {CONFIG_FILE: yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)}
    if compensation is not None:
        extra[COMPENSATION_FILE] = json.dumps(compensation.as_dict(), indent=1) + "\n"
    save(model, Path(config.output), overwrite=overwrite, extra=extra)
    shutil.rmtree(progress_directory(config), ignore_errors=True)
    model.to(config.device)
    return Pruned(model, plan, calibration, compensation)


def check_apart(output: Path, sources: Mapping[str, str | None]) -> None:
    """Raises BadInput if writing the output would replace one of the sources, by config key, that it is made from."""
    place = output.resolve()
    for key, value in sources.items():
        source = Path(value).resolve() if value else None
        if source and (source == place or place in source.parents or source in place.parents):
            raise BadInput(f"output: {output} and {key}: {value} lie inside each other; choose another output")


def wants_compensation(config: PruningConfig, model: Any) -> bool:
    """Whether to compensate: as asked, or where there is what it takes.

    Raises BadInput if it is asked for and there are no images or there is no scheduler.
    """
    possible = config.data is not None and isinstance(model, DiffusionPipeline)
    if config.compensate and not possible:
        raise BadInput("compensate: true needs 'data' and a pipeline directory as 'model'; add them or set it to false")
    return possible if config.compensate is None else config.compensate


def compensate(
    unet: nn.Module,
    dense: nn.Module,
    plan: PruningPlan,
    scheduler: Any,
    samples: Samples,
    config: PruningConfig,
    progress: bool,
) -> CompensationReport:
    """Refit the pruned UNet's layers to the dense one's outputs; raises BadInput if memory does not suffice."""
    try:
        return compensate_(
            unet,
            dense,
            plan,
            scheduler,
            samples,
            batch_size=config.batch_size,
            passes=passes_that_fit(dense),
            seed=config.seed,
            checkpoint=progress_directory(config),
            progress=progress,
        )
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise BadInput(
            "out of memory while compensating; set 'compensate: false' and fine-tune (the calibration is kept for the "
            "same settings), or use a machine with more"
        ) from None


def progress_directory(config: PruningConfig | FinetuneConfig) -> Path:
    """Where an interrupted run keeps what it needs to go on: beside the output."""
    output = Path(config.output)
    return output.parent / f".{output.name}.progress"


def load_model(config: PruningConfig) -> tuple[Any, nn.Module]:
    """The pipeline or UNet of the config's directory, and its UNet, that one on the config's device.

    Raises HardwareUnproved if the device is not there.
    """
    check_device(config.device)
    directory, dtype = Path(config.model), getattr(torch, config.dtype)
    if (directory / "model_index.json").exists():
        pipeline = load_pipeline(directory, dtype)
        return pipeline, unet_of(pipeline).to(config.device)
    unet = load(directory, dtype).to(config.device)
    return unet, unet


def check_device(device: str) -> None:
    """Raises BadInput for what is no device, HardwareUnproved for a GPU that torch does not see."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise BadInput(f"device: {device!r} is none of cpu, cuda, cuda:1 ...")
    number = int(device.partition(":")[2] or 0)
    if device != "cpu" and (not torch.cuda.is_available() or number >= torch.cuda.device_count()):
        raise HardwareUnproved(f"device: {device}, but torch sees no GPU; use device: cpu or install a CUDA build")


def unet_of(pipeline: DiffusionPipeline) -> nn.Module:
    """Raises BadInput for a pipeline without one."""
    unet = getattr(pipeline, "unet", None)
    if not isinstance(unet, nn.Module):
        kind = type(pipeline).__name__
        raise BadInput(f"{pipeline.name_or_path}: {kind} has no UNet (it has {', '.join(pipeline.components)})")
    for name in ("controlnet", "adapter"):
        if getattr(pipeline, name, None) is not None:
            raise BadInput(
                f"{pipeline.name_or_path}: {type(pipeline).__name__} adds the outputs of its {name} to the UNet's skip "
                "connections, whose widths change; prune the pipeline without it"
            )
    return unet


def calibration_for(job: Job, device: torch.device, progress: bool, store: bool) -> Calibration | None:
    """The calibration that a criterion needs: the stored one if it fits, else a new one; None if it needs none.

    All processes make a new one together; a stored one the first process alone reads, and the others get None.
    """
    config, sweep = job.config, getattr(job.criterion, "sweep", None)
    if sweep is None:
        return None
    stored = Path(config.calibration) if config.calibration else None
    if stored is not None and decided(stored.exists(), device):
        return agreed(lambda: stored_calibration(stored, job, sweep) if place()[0] == 0 else None, device)
    calibration = calibrate(
        job.unet,
        agreed(lambda: scheduler_of(job), device),
        agreed(job.samples, device),
        sweep,
        batch_size=config.batch_size,
        timesteps=config.timesteps,
        seed=config.seed,
        gradient_checkpointing=config.gradient_checkpointing,
        autocast=config.autocast,
        checkpoint=progress_directory(config) if store else None,
        keep_progress=store,
        progress=progress,
    )
    if stored is not None and store:
        agreed(lambda: calibration.save(stored) if place()[0] == 0 else None, device)
    return calibration


def scheduler_of(job: Job) -> Any:
    """The pipeline's scheduler; raises BadInput without one, or without images."""
    config = job.config
    if config.data is None:
        raise BadInput(f"data is missing: {config.importance['name']} needs images; add 'data: FOLDER' or an .npz")
    if not isinstance(job.model, DiffusionPipeline):
        raise BadInput(
            f"{config.model}: a UNet without a scheduler; {config.importance['name']} needs the pipeline's; "
            "give the pipeline directory"
        )
    return job.model.scheduler


def stored_calibration(directory: Path, job: Job, sweep: Any) -> Calibration:
    """A calibration from disk; raises BadInput if it is not what the config asks for, or not of its images."""
    config, unet = job.config, job.unet
    known = config.data is not None and isinstance(job.model, DiffusionPipeline)
    images = fitting(job.samples(), unet, find_adapter(unet)).sha256 if known else None
    calibration = Calibration.load(directory)
    scheduler = training_scheduler(job.model.scheduler) if known else None
    points = config.timesteps
    if scheduler is not None:
        points = points or default_points(sweep, int(scheduler.config.num_train_timesteps))
    same = {
        "weights": calibration.weights == weights_hash(unet),
        "data": images is None or calibration.images == images,
        "seed": calibration.seed == config.seed,
        "autocast": calibration.autocast == config.autocast,
        "scheduler": scheduler is None or calibration.scheduler == trained_for(scheduler),
        "timesteps": points in (None, calibration.points),
        "batch_size": sweep.sampling == "stratified" or calibration.batch_size == config.batch_size,
    }
    for key, fits in same.items():
        if not fits:
            raise BadInput(f"{directory}: calibrated with other {key}; remove it or name another calibration directory")
    calibration = calibration.with_threshold(sweep.threshold)
    if not calibration.answers(sweep):
        raise BadInput(f"{directory}: calibrated with {calibration.sweep}, asked is {sweep}; name another directory")
    return calibration


def describe(criterion: Criterion, config: PruningConfig) -> dict[str, Any]:
    """The criterion as asked for, with what its sweep filled in: the plan's provenance."""
    sweep = getattr(getattr(criterion, "calibration", None) or criterion, "sweep", None)
    filled = sweep.as_dict() if sweep is not None else {}
    return {**filled, **config.importance, "seed": config.seed}
