"""How good a pipeline's images are, and how near to the dense model's: what `diffprune evaluate` measures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from diffprune_plugin.calibration.run import loss_curve
from diffprune_plugin.calibration.timesteps import strata
from diffprune_plugin.data.encoding import encode, image_channels
from diffprune_plugin.data.loading import load_samples
from diffprune_plugin.data.pictures import coloured
from diffprune_plugin.data.samples import Samples
from diffprune_plugin.diffusion.schedulers import check_objective, prediction_type, same_noise, training_scheduler
from diffprune_plugin.errors import BadInput
from diffprune_plugin.evaluation.clip import Clip, load_clip
from diffprune_plugin.evaluation.drawing import check_comparably_drawn, completed, drawing_facts
from diffprune_plugin.evaluation.features import Features, frechet_distance, kernel_distance, load_features
from diffprune_plugin.evaluation.prompts import read_prompts, takes_prompts
from diffprune_plugin.evaluation.report import EVALUATION, Evaluation, not_measured
from diffprune_plugin.evaluation.sampling import sample_images
from diffprune_plugin.evaluation.settings import Drawing
from diffprune_plugin.graph.costs import total_macs
from diffprune_plugin.plugins import find_adapter
from diffprune_plugin.pruning.loading import load_pipeline, model_of
from diffprune_plugin.utils.device import check_device
from diffprune_plugin.utils.files import check_absent, check_apart, relative
from diffprune_plugin.utils.images import pil_images
from diffprune_plugin.utils.optional import need
from diffprune_plugin.utils.tensors import weights_hash

Curves = npt.NDArray[np.float64]
POINTS = 20  # of the loss curve
SHOWN = 8  # images a row of the grid
SMALLEST = 6  # pixels a side, by the window of SSIM


@dataclass(frozen=True)
class Measured:
    """One model: its size, its losses (points, loss_samples), the images drawn, how many its safety checker blacked."""

    name: str
    weights: str
    params: int
    macs: int
    losses: Curves | None = field(repr=False)
    pictures: list[Image.Image] = field(repr=False)
    blacked_out: int = 0

    @property
    def images(self) -> Tensor:
        """uint8 (count, channels, height, width)."""
        arrays = [np.atleast_3d(np.asarray(picture)) for picture in self.pictures]
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def run(
    directory: Path,
    output: Path,
    *,
    against: Path | None = None,
    reference: Path | None = None,
    features: Path | None = None,
    clip: Path | None = None,
    prompts: Path | None = None,
    resolution: int | None = None,
    drawing: Drawing | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    progress: bool = True,
) -> Evaluation:
    """Evaluate the pipelines of two directories and write the result; raises BadInput before anything is computed.

    With ``features`` every image of ``reference`` counts, else as many as calibration would take. ``resolution``: they
    are resized and cropped to this height and width.
    """
    check_device(device)
    if resolution is not None and reference is None:
        raise BadInput(f"--resolution {resolution}: is of real images, and there are none; give --reference")
    check_absent(output, overwrite, EVALUATION)
    sources = {"model": directory, "against": against, "reference": reference, "features": features}
    sources |= {"clip": clip, "prompts": prompts}
    check_apart(output, {key: None if path is None else str(path) for key, path in sources.items()})
    drawing = drawing or Drawing()
    if prompts is not None:
        drawing = replace(drawing, prompts=read_prompts(prompts))
    evaluation = evaluate(
        load_pipeline(directory).to(device),
        against=None if against is None else load_pipeline(against).to(device),
        reference=None if reference is None else load_samples(reference, resolution, whole=features is not None),
        features=None if features is None else load_features(features),
        clip=None if clip is None else load_clip(clip),
        drawing=drawing,
        progress=progress,
    )
    evaluation.write(output, overwrite)
    return evaluation


def evaluate(
    pipeline: Any,
    *,
    against: Any = None,
    reference: Any = None,
    features: Features | None = None,
    clip: Clip | None = None,
    drawing: Drawing | None = None,
    progress: bool = True,
) -> Evaluation:
    """Draw from a pipeline, and from the dense one from the same noise, and measure both.

    Params and MACs always; with ``reference`` (whatever `load_samples` takes) the loss per timestep on these images;
    with ``features`` too the distances between drawn and reference images; with ``against`` SSIM and PSNR between the
    two models' images, and the difference of their losses for the same images, timesteps and noise.

    Of pipelines that draw from prompts image i of both models comes from the same prompt and the same noise; with
    ``clip`` how well it fits that prompt.

    What is not measured, for want of an option or of images, is in ``not_measured``, with what it takes.

    Raises BadInput for images or models that do not fit each other.
    """
    samples = None if reference is None else load_samples(reference)
    pipelines = {"model": pipeline} if against is None else {"against": against, "model": pipeline}
    drawing = completed(drawing or Drawing(), pipeline, samples)
    check(pipelines, samples, features, drawing)
    check_clip(clip, pipeline, drawing)
    facts: dict[str, Any] = {"drawing": drawing_facts(drawing, pipeline)}
    real = None
    if features is not None and samples is not None:
        shown = coloured(samples, image_channels(pipeline))
        real = features.of(shown.values.permute(0, 3, 1, 2), drawing.batch_size)
        size = real.shape[1]
        facts["features"] = {"name": features.frechet, "sha256": features.sha256, "size": size}
        facts["features"]["least_images"] = features.least_images(size)
    models = {role: measure(role, each, samples, drawing, progress) for role, each in pipelines.items()}
    if len({model.name for model in models.values()}) < len(models):
        models = {role: replace(model, name=f"{model.name} ({role})") for role, model in models.items()}
    facts["models"] = {role: size_and_loss(model) for role, model in models.items()}
    if samples is not None:
        facts["reference"] = {"images": len(samples), "sha256": samples.sha256}
        facts["timesteps"] = [int(part[len(part) // 2]) for part in parts_of(pipeline)]
    if features is not None and real is not None:
        for role, model in models.items():
            drawn = features.of(model.images, drawing.batch_size)
            facts["models"][role] |= distances(real, drawn, features, drawing.seed)
    if clip is not None:
        facts["clip"] = {"name": clip.name, "weights": clip.weights}
        for role, model in models.items():
            facts["models"][role] |= clip.measured(model.pictures, drawing.prompts, drawing.batch_size)
    if against is not None:
        facts["compared"] = compare(models["model"], models["against"], drawing.batch_size)
    facts["not_measured"] = not_measured(facts)
    rows = {model.name: model.pictures[:SHOWN] for model in models.values() if model.pictures}
    if samples is not None and samples.values.dtype is torch.uint8 and rows:
        rows = {"reference": pil_images(samples.values[:SHOWN].numpy() / 255)} | rows
    return Evaluation(facts, rows)


def check(pipelines: dict[str, Any], samples: Samples | None, features: Features | None, drawing: Drawing) -> None:
    """Raises BadInput for what could not be measured, before anything is drawn."""
    need("torchmetrics")
    check_comparably_drawn(drawing, pipelines.get("against", pipelines["model"]), pipelines["model"])
    shapes = {role: sample_shape(pipeline) for role, pipeline in pipelines.items()}
    if len(set(shapes.values())) > 1:
        raise BadInput(f"--against: its samples are {shapes['against']}, the model's {shapes['model']}: not comparable")
    if samples is not None:
        for each in pipelines.values():
            check_objective(each.scheduler, find_adapter(model_of(each)))
        check_comparable([training_scheduler(pipeline.scheduler) for pipeline in pipelines.values()])
    if features is None:
        return
    if samples is None:
        raise BadInput("--features needs --reference: the images to compare with")
    if samples.values.dtype is not torch.uint8:
        raise BadInput("--reference: holds floats; --features needs uint8 images")
    if not drawing.count:
        raise BadInput("--features: --count 0 draws no images to compare; give more, or leave it out")


def check_clip(clip: Clip | None, pipeline: Any, drawing: Drawing) -> None:
    """Raises BadInput where there is no image of a prompt to compare with it."""
    if clip is None:
        return
    if not takes_prompts(pipeline):
        raise BadInput(f"--clip: {type(pipeline).__name__} draws without prompts; leave it out")
    if not drawing.count:
        raise BadInput("--clip: --count 0 draws no images to compare with their prompts; give more, or leave it out")
    if not drawing.prompts:
        raise BadInput("--clip: there are no prompts to compare images with; give --prompts FILE")


def check_comparable(schedulers: Sequence[Any]) -> None:
    """Raises BadInput unless all losses are of the same prediction, with the same noise at the same timesteps."""
    first, last = schedulers[0], schedulers[-1]
    if prediction_type(first) != prediction_type(last) or not same_noise(first, last):
        kinds = [f"{prediction_type(s)} over {s.config.num_train_timesteps} timesteps" for s in (first, last)]
        raise BadInput(
            f"--against: it was trained for {kinds[0]}, the model for {kinds[1]}, or with other noise: their losses "
            "are not comparable; leave --reference out"
        )


def sample_shape(pipeline: Any) -> tuple[int, ...]:
    """(channels, height, width) of what the UNet denoises."""
    model = model_of(pipeline)
    return find_adapter(model).sample_shape(model)


def measure(role: str, pipeline: Any, samples: Samples | None, drawing: Drawing, progress: bool) -> Measured:
    """The losses first: they find out cheaply whether the images fit."""
    model = model_of(pipeline)
    losses = None if samples is None else losses_of(pipeline, samples, drawing, progress)
    pictures = sample_images(pipeline, drawing, progress=progress) if drawing.count else []
    params = sum(parameter.numel() for parameter in model.parameters())
    macs = total_macs(model, find_adapter(model))
    checked = getattr(pipeline, "safety_checker", None) is not None
    black = sum(not np.asarray(picture).any() for picture in pictures) if checked else 0
    name = relative(str(pipeline.name_or_path or role))
    return Measured(name, weights_hash(model), params, macs, losses, pictures, black)


def parts_of(pipeline: Any) -> list[npt.NDArray[np.int64]]:
    """The timesteps that each point of the loss curve stands for."""
    total = int(pipeline.scheduler.config.num_train_timesteps)
    return strata(total, min(POINTS, total))


def losses_of(pipeline: Any, samples: Samples, drawing: Drawing, progress: bool) -> Curves:
    """Noise-prediction losses (points, loss_samples): the calibration's loss curve, each sample with a seed of its own.

    Image, timestep and noise depend on the seed alone, so that two models' losses can be compared in pairs. Of very
    many images every n-th is encoded.
    """
    return loss_curve(
        model_of(pipeline),
        pipeline.scheduler,
        encode(pipeline, samples.thinned()),
        drawing.loss_samples,
        timesteps=len(parts_of(pipeline)),
        batch_size=drawing.batch_size,
        seed=drawing.seed,
        progress=progress,
    )


def size_and_loss(model: Measured) -> dict[str, Any]:
    facts: dict[str, Any] = {"name": model.name, "weights": model.weights, "params": model.params, "MACs": model.macs}
    if model.blacked_out:
        facts["blacked_out"] = model.blacked_out
    if model.losses is None:
        return facts
    mean, error = stratified_mean(model.losses)
    per_timestep = model.losses.mean(axis=1).tolist()
    return {**facts, "loss": mean, "loss_stderr": error, "loss_per_timestep": per_timestep}


def stratified_mean(values: Curves) -> tuple[float, float]:
    """Mean and standard error of values (strata, samples): only the spread inside the strata is chance."""
    return float(values.mean()), math.sqrt(values.var(axis=1, ddof=1).mean() / values.size)


def distances(real: Tensor, drawn: Tensor, features: Features, seed: int) -> dict[str, Any]:
    """The Frechet and the kernel distance; None where a set has fewer images than it needs."""
    fewest, least = min(len(real), len(drawn)), features.least_images(real.shape[1])
    found: dict[str, Any] = dict.fromkeys(least)
    if fewest >= least[features.frechet]:
        found[features.frechet] = frechet_distance(real, drawn)
    if fewest >= least[features.kernel]:
        mean, deviation = kernel_distance(real, drawn, seed)
        found[features.kernel] = {"mean": mean, "subsets_std": deviation}
    return found


def compare(model: Measured, dense: Measured, batch_size: int) -> dict[str, Any]:
    """SSIM (mean over images) and PSNR (of all pixels together) of images from the same noise, so many at a time, for
    SSIM takes thirty times the memory of its images; paired losses."""
    found: dict[str, Any] = {}
    if model.pictures and min(model.images.shape[2:]) < SMALLEST:
        height, width = model.images.shape[2:]
        raise BadInput(f"--against: SSIM needs images of {SMALLEST} pixels a side, these have {height} x {width}")
    if model.pictures:
        metrics = need("torchmetrics.image")
        likeness = metrics.StructuralSimilarityIndexMeasure(data_range=1.0, reduction="none")
        noise = metrics.PeakSignalNoiseRatio(data_range=1.0)
        for pair in zip(*(torch.split(each.images, batch_size) for each in (model, dense)), strict=True):
            for metric in (likeness, noise):
                metric.update(*(images.float() / 255 for images in pair))
        ssim, psnr = likeness.compute().flatten().double(), float(noise.compute())
        found["SSIM"] = float(ssim.mean())
        found["SSIM_stderr"] = float(ssim.std() / math.sqrt(len(ssim))) if len(ssim) > 1 else None
        found["PSNR"] = psnr if math.isfinite(psnr) else None  # every pixel is the same
    if model.losses is not None and dense.losses is not None:
        found["loss_difference"], found["loss_difference_stderr"] = stratified_mean(model.losses - dense.losses)
    return found
