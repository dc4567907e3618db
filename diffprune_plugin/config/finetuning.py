"""How to train a pruned model further: the config of `diffprune finetune`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from diffprune_plugin.config.base import Config, Number, Place, Seed

POLYNOMIAL_END = 1e-7  # the rate that diffusers' polynomial schedule ends at


class FinetuneConfig(Config):
    """How to train a pruned model further. Paths are relative to the working directory.

    model, output: directories of the pruned model (a pipeline) and of the result; data, resolution: as for pruning.
    condition_dropout: share of samples trained without their condition, for classifier-free guidance; by default 0.1
        where the data says what stands for none (the empty caption), else 0.
    steps: optimizer steps; batch_size: samples a step, over all processes and accumulated passes together, so that the
        same config trains the same on any number of processes.
    learning_rate, lr_scheduler, warmup_steps (by default a twentieth of the steps), weight_decay: of AdamW.
    max_grad_norm: gradients are clipped to it; null does not clip.
    ema_decay: of the moving average of the weights, which is what is saved; 0 saves the last weights.
    snr_gamma: min-SNR weights (arXiv 2303.09556), 5 in the paper; by default all timesteps weigh the same.
    timestep_sampling: ``uniform``, each sample on its own, or ``stratified``, a batch spread evenly over the timesteps.
    teacher: directory of the dense model; task_weight, output_weight, feature_weight: weights of the noise-prediction
        loss, of the distance to the teacher's prediction, and of that between features (arXiv 2305.15798).
    mixed_precision: by default what ``accelerate launch`` was told, else ``no``. gradient_checkpointing: less memory,
        more time.
    checkpoint_every: steps; num_workers: processes that load data; tracker: where the curve is followed, in
        ``OUTPUT.logs``.
    """

    model: Place
    output: Place = "finetuned"
    data: Place
    resolution: int | None = Field(default=None, ge=1)
    condition_dropout: Number | None = Field(default=None, ge=0, le=1)
    steps: int = Field(ge=1)
    batch_size: int = Field(default=32, ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    learning_rate: Number = Field(default=2e-4, gt=0)
    lr_scheduler: Literal["cosine", "linear", "constant", "polynomial"] = "cosine"
    warmup_steps: int | None = Field(default=None, ge=0)
    weight_decay: Number = Field(default=0.0, ge=0)
    max_grad_norm: Number | None = Field(default=1.0, gt=0)
    ema_decay: Number = Field(default=0.999, ge=0, lt=1)
    snr_gamma: Number | None = Field(default=None, gt=0)
    timestep_sampling: Literal["uniform", "stratified"] = "uniform"
    teacher: Place | None = None
    task_weight: Number = Field(default=1.0, ge=0)
    output_weight: Number | None = Field(default=None, ge=0)
    feature_weight: Number | None = Field(default=None, ge=0)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    gradient_checkpointing: bool = False
    checkpoint_every: int = Field(default=500, ge=1)
    num_workers: int = Field(default=0, ge=0)
    tracker: Literal["tensorboard", "none"] = "tensorboard"
    seed: Seed = 0

    @model_validator(mode="after")
    def _complete(self) -> Self:
        for key in ("output_weight", "feature_weight"):
            if self.teacher is None and getattr(self, key) is not None:
                raise ValueError(f"{key} needs the dense model; add 'teacher: DIRECTORY'")
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
