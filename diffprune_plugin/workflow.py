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
from typing import Any

import torch
import yaml
from diffusers import DiffusionPipeline
from torch import nn

from diffprune_plugin.calibrating import calibrate
from diffprune_plugin.calibration import Calibration
from diffprune_plugin.checkpoint import PrunedModelMixin, load, load_pipeline, save
from diffprune_plugin.compensate import CompensationReport, compensate_
from diffprune_plugin.config import FinetuneConfig, PruningConfig
from diffprune_plugin.data import Samples
from diffprune_plugin.encoding import encode
from diffprune_plugin.errors import BadInput, HardwareUnproved
from diffprune_plugin.files import check_absent
from diffprune_plugin.hookspecs import Criterion
from diffprune_plugin.objective import fitting
from diffprune_plugin.plan import PruningPlan
from diffprune_plugin.planning import check_asked, check_patterns, make_plan
from diffprune_plugin.plugins import criterion_of, find_adapter
from diffprune_plugin.removal import remove_
from diffprune_plugin.tensors import weights_hash

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


def prune(config: PruningConfig, *, overwrite: bool = False, dry_run: bool = False, progress: bool = True) -> Pruned:
    """Load, calibrate if the criterion needs it, plan, remove, compensate, save; a dry run stops at the plan.

    Raises BadInput for anything in the config that cannot be used, before anything is written.
    """
    output = Path(config.output)
    if not dry_run:
        check_absent(output, overwrite)
        check_apart(output, {key: getattr(config, key) for key in ("model", "data", "calibration")})
    criterion = criterion_of(config)
    model, unet = load_model(config)
    if isinstance(unet, PrunedModelMixin):
        raise BadInput(f"model: {config.model} is pruned already; start from the dense model")
    find_adapter(unet)
    asked = {key: getattr(config, key) for key in PLANNING}
    check_asked(asked)
    check_patterns(unet, **{key: asked[key] for key in ("pruning_ratio_dict", "ignored_layers", "target_layers")})
    compensating = wants_compensation(config, model)
    samples = functools.cache(lambda: encode(model, config.data, config.resolution))
    calibration = calibration_for(criterion, model, unet, config, samples, progress, store=not dry_run)
    if calibration is not None:
        criterion.calibration = calibration  # type: ignore[attr-defined]
    plan = make_plan(
        unet,
        criterion,
        **asked,
        description=describe(criterion, config),
    )
    if dry_run:
        return Pruned(model, plan, calibration, None)
    dense = copy.deepcopy(unet) if compensating else None
    remove_(unet, plan)
    compensation = (
        None if dense is None else compensate(unet, dense, plan, model.scheduler, samples(), config, progress)
    )
    extra = {CONFIG_FILE: yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)}
    if compensation is not None:
        extra[COMPENSATION_FILE] = json.dumps(compensation.as_dict(), indent=1) + "\n"
    save(model, output, overwrite=overwrite, extra=extra)
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
    """Refit the pruned UNet's layers to the dense one's outputs."""
    return compensate_(
        unet,
        dense,
        plan,
        scheduler,
        samples,
        seed=config.seed,
        checkpoint=progress_directory(config),
        progress=progress,
    )


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


def calibration_for(
    criterion: Criterion,
    model: Any,
    unet: nn.Module,
    config: PruningConfig,
    samples: Callable[[], Samples],
    progress: bool,
    store: bool,
) -> Calibration | None:
    """The calibration that a criterion needs: the stored one if it fits, else a new one; None if it needs none."""
    sweep = getattr(criterion, "sweep", None)
    if sweep is None:
        return None
    stored = Path(config.calibration) if config.calibration else None
    if stored is not None and stored.exists():
        known = config.data is not None and isinstance(model, DiffusionPipeline)
        images = fitting(samples(), unet, find_adapter(unet)).sha256 if known else None
        return stored_calibration(stored, unet, sweep, config, images)
    if config.data is None:
        raise BadInput(f"data is missing: {config.importance['name']} needs images; add 'data: FOLDER' or an .npz")
    if not isinstance(model, DiffusionPipeline):
        raise BadInput(
            f"{config.model}: a UNet without a scheduler; {config.importance['name']} needs the pipeline's; "
            "give the pipeline directory"
        )
    calibration = calibrate(
        unet,
        model.scheduler,
        samples(),
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
        calibration.save(stored)
    return calibration


def stored_calibration(
    directory: Path, unet: nn.Module, sweep: Any, config: PruningConfig, images: str | None
) -> Calibration:
    """A calibration from disk; raises BadInput if it is not what the config asks for, or not of ``images`` (a hash)."""
    calibration = Calibration.load(directory)
    points = config.timesteps or len(calibration.timesteps)
    same = {
        "weights": calibration.weights == weights_hash(unet),
        "data": images is None or calibration.images == images,
        "seed": calibration.seed == config.seed,
        "autocast": calibration.autocast == config.autocast,
        "timesteps": sweep.sampling != "stratified" or points == len(calibration.timesteps),
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
