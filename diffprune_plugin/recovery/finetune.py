"""From a pruned directory to a trained one: what `diffprune finetune` does."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration
from torch import nn

from diffprune_plugin.config.finetuning import FinetuneConfig
from diffprune_plugin.data.encoding import encode
from diffprune_plugin.data.samples import Samples
from diffprune_plugin.diffusion.batches import settled_dropout
from diffprune_plugin.diffusion.inputs import fitting
from diffprune_plugin.diffusion.schedulers import settings_of, training_scheduler
from diffprune_plugin.errors import BadInput, first_line
from diffprune_plugin.planning.plan import PLAN_FILE, PruningPlan
from diffprune_plugin.plugins import denoiser_of, find_adapter
from diffprune_plugin.pruning.building import foreign_errors
from diffprune_plugin.pruning.directory import COMPENSATION_FILE, CONFIG_FILE, progress_directory
from diffprune_plugin.pruning.loading import load, load_pipeline, model_of
from diffprune_plugin.pruning.pruned_class import PrunedModelMixin, check_dense
from diffprune_plugin.pruning.saving import PRUNED, save
from diffprune_plugin.recovery.distillation import kept_features
from diffprune_plugin.recovery.lora import check_kept
from diffprune_plugin.recovery.plot import loss_plot
from diffprune_plugin.recovery.sharded import whole
from diffprune_plugin.recovery.training import GRADIENT_NORM, Teacher, Training
from diffprune_plugin.utils.device import say_if_emulated
from diffprune_plugin.utils.distributed import Processes, check_parallel
from diffprune_plugin.utils.files import check_absent, check_apart, disk_errors, relative
from diffprune_plugin.utils.hashes import json_hash
from diffprune_plugin.utils.memory import checkpointing
from diffprune_plugin.utils.optional import check_installed, has
from diffprune_plugin.utils.progress import progress_bar
from diffprune_plugin.utils.tensors import weights_hash

FINETUNE_FILE = "finetune.yaml"
FORMAT = 4  # of the checkpoints
REPORT_FILE = "finetune.json"
PLOT_FILE = "finetune.png"
# Keys that say how, not what: a training goes on after a change of these.
FREE = {"output", "checkpoint_every", "num_workers", "tracker", "mixed_precision", "gradient_checkpointing"}


@dataclass(frozen=True)
class FinetuneReport:
    """What a training did: settings, steps and wall seconds, processes, and the curve of each term of the loss.

    ``curve``: one entry a step, the mean over its batch before the step; ``loss`` is the weighted sum of the terms,
    ``grad_norm`` the norm of the gradients before they are clipped (0 where fp16 skipped the step).
    ``resumed``: the step that this run went on from.
    """

    settings: dict[str, Any]
    steps: int
    resumed: int
    seconds: float
    processes: int
    device: str
    mixed_precision: str
    versions: dict[str, str]
    curve: dict[str, list[float]]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def ends(self) -> tuple[float, float]:
        """The mean loss over the first tenth of the steps and over the last."""
        loss = self.curve["loss"]
        tenth = max(len(loss) // 10, 1)
        return sum(loss[:tenth]) / tenth, sum(loss[-tenth:]) / tenth


def finetune(config: FinetuneConfig, *, overwrite: bool = False, progress: bool = True) -> FinetuneReport:
    """Train the pruned model of a directory and write one that loads the same way; its weights are the moving average,
    or, with ``ema_decay: 0``, the last.

    An interrupted call goes on from its last checkpoint, on one process to identical bits. The output also holds the
    config, the loss curve (finetune.json) and, where matplotlib is installed, its plot.

    Raises BadInput for anything in the config that cannot be used, before anything is written; CheckFailed for a loss
    that is not finite.
    """
    accelerator = Processes.of_accelerate().on_all(lambda: make_accelerator(config))
    processes = Processes(accelerator.device)
    begin, pipeline = processes.on_all(lambda: prepare(config, accelerator, overwrite))
    training = begin()
    processes.on_all(training.resume)
    resumed = training.step
    processes.check_same(resumed, training.file)
    processes.on_all(lambda: start_tracker(config, accelerator, training.file.stem))
    try:
        shown = progress and accelerator.is_local_main_process
        with checkpointing(training.model, config.gradient_checkpointing), progress_bar(shown, "steps") as bar:
            training.run(bar)
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
    training.finish_()
    kept = training.low_rank.finish_(pipeline, denoiser_of(pipeline)[0]) if training.low_rank else {}
    if accelerator.distributed_type == DistributedType.FSDP:
        pipeline = put_together(config, training, processes)
    report = report_of(training, resumed)
    processes.on_first(lambda: finish(config, pipeline, {**kept, **provenance(config, report)}, overwrite))
    return report


def put_together(config: FinetuneConfig, training: Training, processes: Processes) -> Any:
    """The pipeline with the trained weights, on the first process, where each had a part of them."""
    state = whole(training.model.state_dict(), processes.is_first)

    def filled() -> Any:
        pipeline = load_pipeline(Path(config.model))
        model_of(pipeline).load_state_dict(state)
        return pipeline

    return processes.on_first(filled)


def finish(config: FinetuneConfig, pipeline: Any, files: Mapping[str, str | bytes], overwrite: bool) -> None:
    """Write the output; the checkpoints are needed no more."""
    save(pipeline, Path(config.output), overwrite=overwrite, extra=files)
    shutil.rmtree(progress_directory(config.output), ignore_errors=True)


def start_tracker(config: FinetuneConfig, accelerator: Accelerator, name: str) -> None:
    """Raises BadInput where its files cannot be written, or its service says no."""
    if config.tracker != "none":
        with disk_errors(Path(accelerator.logging_dir)), foreign_errors(f"tracker: {config.tracker} does not start"):
            accelerator.init_trackers(name)


def make_accelerator(config: FinetuneConfig) -> Accelerator:
    """Accelerate as the config and ``accelerate launch`` want it.

    Raises MissingExtra without the tracker's package, BadInput for what this machine or process cannot do.
    """
    check_installed(*([config.tracker] if config.tracker != "none" else []), *(["peft"] if config.lora else []))
    place = Path(config.output)
    # Left open, Accelerate takes that of an earlier training in this process.
    precision = config.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            log_with=None if config.tracker == "none" else config.tracker,
            project_config=ProjectConfiguration(str(place.parent), str(place.parent / f"{place.name}.logs")),
        )
    except ValueError as error:
        raise BadInput(f"mixed_precision: {precision}: {first_line(error)}") from None
    if accelerator.mixed_precision == "bf16" and accelerator.is_main_process:
        say_if_emulated(accelerator.device.type, "mixed_precision: bf16")
    check_parallel(accelerator, splitting=True)
    if accelerator.distributed_type == DistributedType.FSDP:
        if config.lora:
            raise BadInput("lora: is not split over processes, having few gradients to hold; launch it without FSDP")
        # Each process reads the file itself, and Accelerate's way to spare that fails on stored buffers.
        accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
    return accelerator


def check_shares(config: FinetuneConfig, accelerator: Accelerator) -> None:
    """Raises BadInput unless the batch divides evenly."""
    passes, processes = config.gradient_accumulation_steps, accelerator.num_processes
    if config.batch_size % (passes * processes):
        raise BadInput(
            f"batch_size: {config.batch_size} does not divide over {processes} processes x {passes} "
            f"gradient_accumulation_steps; choose a multiple of {passes * processes}"
        )


def prepare(config: FinetuneConfig, accelerator: Accelerator, overwrite: bool) -> tuple[Callable[[], Training], Any]:
    """What makes the training at its first step, and the pipeline whose UNet it trains.

    Raises BadInput for an output in the way, a batch that does not divide over the processes, a model that is no pruned
    pipeline, and for images or a teacher that do not fit it.
    """
    output = Path(config.output)
    check_absent(output, overwrite, PRUNED)
    check_apart(output, {key: getattr(config, key) for key in ("model", "data", "teacher")})
    check_shares(config, accelerator)
    pipeline = load_pipeline(Path(config.model))
    check_kept(config.lora, pipeline, denoiser_of(pipeline)[0])
    model = model_of(pipeline)
    by_blocks = (Path(config.model) / PLAN_FILE).is_file()  # blocks alone went, and what is left is a dense model
    if not isinstance(model, PrunedModelMixin) and not by_blocks:
        raise BadInput(f"model: {config.model} is not pruned; prune it first: diffprune prune CONFIG")
    adapter = find_adapter(model)
    if accelerator.distributed_type != DistributedType.FSDP:  # which takes the parts from where they lie
        model.to(accelerator.device)
    data = encode(pipeline, config.data, config.resolution, whole=True)
    samples = fitting(data, model, adapter, pipeline.scheduler)
    settled_dropout(config.condition_dropout, samples, "fine-tune")
    scheduler = training_scheduler(pipeline.scheduler)
    teacher = teacher_of(config, model, accelerator) if config.teacher else None
    name = fingerprint(config, model, teacher, scheduler, samples, accelerator)
    file = progress_directory(config.output) / f"finetune-{name}.safetensors"
    return partial(Training, model, teacher, scheduler, samples, config, adapter, accelerator, file), pipeline


def teacher_of(config: FinetuneConfig, model: Any, accelerator: Accelerator) -> Teacher | None:
    """The dense UNet, if it is the one that was pruned; None if nothing is to be learned from it."""
    weights, directory = config.weights(), str(config.teacher)
    if not weights["output"] and not weights["features"]:
        return None
    dense: nn.Module = load(directory)
    plan: PruningPlan | None = getattr(model, "pruning_plan", None)
    check_dense(dense, model, f"teacher: {directory}")
    if weights["features"] and (plan is None or set(plan.depth) - set(plan.skipped)):
        raise BadInput("feature_weight: whole blocks are gone, and the others have new numbers; leave it out")
    dense.to(accelerator.device).requires_grad_(False)
    kept = kept_features(model, dense, plan, find_adapter(dense)) if plan and weights["features"] else {}
    return Teacher(dense, kept)


def fingerprint(
    config: FinetuneConfig, model: nn.Module, teacher: Teacher | None, scheduler: Any, samples: Samples, by: Accelerator
) -> str:
    """Of everything that the result depends on but the number of processes: other progress is never taken up."""
    facts = [
        config.model_dump(mode="json", exclude={*FREE, "model", "data", "teacher"}),
        by.mixed_precision,
        weights_hash(model),
        teacher and weights_hash(teacher.model),
        settings_of(scheduler),
        samples.sha256,
        torch.__version__,
        FORMAT,
    ]
    return json_hash(facts)[:16]


def report_of(training: Training, resumed: int) -> FinetuneReport:
    accelerator = training.accelerator
    packages = ("diffprune-plugin", "torch", "diffusers", "accelerate")
    return FinetuneReport(
        settings=stored(training.config),
        steps=training.step,
        resumed=resumed,
        seconds=training.seconds,
        processes=accelerator.num_processes,
        device=accelerator.device.type,
        mixed_precision=accelerator.mixed_precision,
        versions={name: importlib.metadata.version(name) for name in packages},
        curve=training.curve,
    )


def stored(config: FinetuneConfig) -> dict[str, Any]:
    return {key: relative(value) for key, value in config.model_dump(mode="json").items()}


def provenance(config: FinetuneConfig, report: FinetuneReport) -> dict[str, str | bytes]:
    """The files beside the model: what pruning left there, the config, the report, the plot."""
    files: dict[str, str | bytes] = {
        name: path.read_bytes()
        for name in (CONFIG_FILE, COMPENSATION_FILE, PLAN_FILE)
        if (path := Path(config.model) / name).exists()
    }
    files[FINETUNE_FILE] = yaml.safe_dump(stored(config), sort_keys=False)
    files[REPORT_FILE] = json.dumps(report.as_dict(), indent=1) + "\n"
    if has("matplotlib"):
        files[PLOT_FILE] = loss_plot({name: v for name, v in report.curve.items() if name != GRADIENT_NORM})
    return files
