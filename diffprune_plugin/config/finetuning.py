"""How to train a pruned model further: the config of `diffprune finetune`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator
from typing_extensions import Self

from diffprune_plugin.config.base import PathText
from diffprune_plugin.config.lora import LoraConfig
from diffprune_plugin.utils.checked import Checked, Seed, nested

POLYNOMIAL_END = 1e-7  # the rate that diffusers' polynomial schedule ends at
LONGEST = 100_000_000  # steps


class FinetuneConfig(Checked):
    """How to train a pruned model further. Paths are relative to the working directory."""

    model: PathText = Field(description="Directory of the pruned model, a pipeline.")
    output: PathText = Field(default="finetuned", description="Directory of the result.")
    data: PathText = Field(
        description="Images to train on: a folder, an .npz with images, or a .safetensors with latents."
    )
    resolution: int | None = Field(
        default=None,
        ge=1,
        le=16384,
        description="Image files are resized and cropped to so many pixels a side; without it they stay as they are.",
    )
    condition_dropout: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Share of the samples that are trained without their condition, for classifier-free guidance; by "
        "default 0.1 where the data says what stands for none (the empty caption), else 0.",
    )
    steps: int = Field(ge=1, le=LONGEST, description="Optimizer steps.")
    batch_size: int = Field(
        default=32,
        ge=1,
        le=65536,
        description="Samples a step, over all processes and accumulated passes together, so that the same config "
        "trains the same on any number of processes.",
    )
    gradient_accumulation_steps: int = Field(
        default=1, ge=1, le=65536, description="Passes that the samples of a step are split into."
    )
    learning_rate: float = Field(default=2e-4, gt=0, le=1, description="Of AdamW, at its highest.")
    lr_scheduler: Literal["cosine", "linear", "constant", "polynomial"] = Field(
        default="cosine", description="How the learning rate goes on after the warm-up."
    )
    warmup_steps: int | None = Field(
        default=None,
        ge=0,
        le=LONGEST,
        description="Steps in which the learning rate rises from 0; by default a twentieth of the steps.",
    )
    weight_decay: float = Field(default=0.0, ge=0, le=100, description="Of AdamW.")
    max_grad_norm: float | None = Field(
        default=1.0, gt=0, le=1e6, description="Gradients are clipped to this norm; null does not clip."
    )
    ema_decay: float = Field(
        default=0.999,
        ge=0,
        lt=1,
        description="Of the moving average of the weights, which is what is saved; 0 saves the last weights.",
    )
    snr_gamma: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        description="Min-SNR weights of the timesteps (arXiv 2303.09556), 5 in the paper; by default all weigh the "
        "same.",
    )
    timestep_sampling: Literal["uniform", "stratified"] = Field(
        default="uniform",
        description="uniform: each sample's timestep is drawn on its own; stratified: a batch is spread evenly over "
        "the timesteps.",
    )
    teacher: PathText | None = Field(
        default=None, description="Directory of the dense model, to learn its predictions from."
    )
    task_weight: float = Field(default=1.0, ge=0, le=1e6, description="Weight of the noise-prediction loss.")
    output_weight: float | None = Field(
        default=None,
        ge=0,
        le=1e6,
        description="Weight of the distance to the teacher's prediction; by default 1 if there is a teacher.",
    )
    feature_weight: float | None = Field(
        default=None,
        ge=0,
        le=1e6,
        description="Weight of the distance to the teacher's features (arXiv 2305.15798); by default 0.",
    )
    lora: Annotated[LoraConfig | None, BeforeValidator(nested(LoraConfig, "lora"))] = Field(
        default=None,
        description="Trains a low-rank adapter (arXiv 2106.09685) in place of the weights, for less memory: a mapping "
        "of rank (16), alpha (the rank), dropout (0), target_modules (all) and merge (true).",
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = Field(
        default=None, description="What passes are computed in; by default what accelerate launch was told, else no."
    )
    gradient_checkpointing: bool = Field(default=False, description="Less memory for more time.")
    checkpoint_every: int = Field(
        default=500, ge=1, le=LONGEST, description="Steps between checkpoints, from which an interrupted run goes on."
    )
    num_workers: int = Field(default=0, ge=0, le=1024, description="Processes that load data.")
    tracker: Literal["tensorboard", "wandb", "mlflow", "none"] = Field(
        default="none",
        description="Where the loss curve, which the output holds in any case, can be followed; tensorboard's files "
        "are in OUTPUT.logs, the others keep theirs where their own settings say.",
    )
    seed: Seed = Field(default=0, description="Of all that is drawn at random.")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        for key in ("output_weight", "feature_weight"):
            if self.teacher is None and getattr(self, key) is not None:
                raise ValueError(f"{key} needs the dense model; add 'teacher: DIRECTORY'")
        if self.teacher is not None and not (self.weights()["output"] or self.weights()["features"]):
            raise ValueError(f"teacher: {self.teacher} is asked nothing: its weights are 0; raise one, or drop it")
        if not any(self.weights().values()):
            raise ValueError("all weights of the loss are 0; give one of them a value")
        if self.warmup_steps is not None and self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} leaves none of the {self.steps} steps; make it smaller")
        if self.lr_scheduler == "polynomial" and self.learning_rate <= POLYNOMIAL_END:
            raise ValueError(f"learning_rate {self.learning_rate}: polynomial ends at {POLYNOMIAL_END}; make it larger")
        return self

    def weights(self) -> dict[str, float]:
        """The terms of the loss with their weights; the teacher's prediction weighs 1 if there is a teacher."""
        output = self.output_weight if self.output_weight is not None else float(self.teacher is not None)
        return {"task": self.task_weight, "output": output, "features": self.feature_weight or 0.0}
