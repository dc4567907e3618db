"""Which timesteps count, and how much: what a criterion wants calibrated, the loss threshold, the built-in weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from diffprune_plugin.errors import BadInput, nearest

Sampling = Literal["stratified", "reference", "fresh"]
SAMPLINGS: tuple[Sampling, ...] = ("stratified", "reference", "fresh")
Accumulation = Literal["sum", "absolute", "square"]
POWERS: dict[Accumulation, int] = {"sum": 1, "absolute": 1, "square": 2}  # of the gradient, before it is added up


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a criterion wants calibrated.

    threshold: a timestep counts if its loss is above this share of the largest loss (T of arXiv 2305.10924); 0 keeps
        all of them.
    sampling: ``stratified`` measures the loss curve first and then takes gradients of batches that mix the timesteps
        that count, with images and noise drawn anew for each sample. ``reference`` is the authors' loop: one batch and
        one noise tensor at every timestep from 0 on, until the loss falls below the threshold. ``fresh`` is the same
        loop with a new batch and new noise at each timestep (their latent model).
    include_last: whether the timestep that ends the authors' loop still counts.
    accumulate: what is added up over timesteps, for each weight: the gradient (``sum``; the paper), its ``absolute``
        value, or its ``square`` (Fisher). Opposite gradients of two timesteps cancel in the first only.
    micro_batch: with ``absolute`` and ``square``, as many samples of one timestep give one gradient g, and
        sum_t weight_t E[|g_t| ** p] is estimated. For p = 2, E[g^2] is the squared expected gradient plus the variance
        of one sample's divided by micro_batch: 1 gives the empirical Fisher, more leave less noise in the score. In
        the authors' loop a pass is the micro-batch.
    timestep_weights: name of the rule for the weight of each timestep that counts; ``uniform``, ``log_decrease``,
        ``min_snr`` or a plugin's.
    samples: gradient samples of the stratified sampling.
    curve_samples: samples for each point of its loss curve.
    condition_dropout: share of the samples that are taken without their condition, as classifier-free guidance is
        trained and sampled; by default 0.1 where the data knows what stands for no condition, else 0.
    """

    threshold: float = 0.05
    sampling: Sampling = "stratified"
    include_last: bool = False
    samples: int = 1024
    curve_samples: int = 16
    condition_dropout: float | None = None
    accumulate: Accumulation = "sum"
    micro_batch: int = 8
    timestep_weights: str = "uniform"

    def __post_init__(self) -> None:
        for key, (expected, *ends) in OPTIONS.items():
            if getattr(self, key) is not None or key != "condition_dropout":
                check_option(key, getattr(self, key), expected, *ends)
        if self.sampling not in SAMPLINGS:
            hint = nearest(str(self.sampling), SAMPLINGS)
            raise BadInput(f"importance: sampling {self.sampling!r} is none of {', '.join(SAMPLINGS)}{hint}")
        if self.accumulate not in POWERS:
            hint = nearest(str(self.accumulate), POWERS)
            raise BadInput(f"importance: accumulate {self.accumulate!r} is none of {', '.join(POWERS)}{hint}")
        if self.accumulate != "sum" and self.sampling == "stratified" and self.micro_batch > self.samples:
            raise BadInput(f"importance: micro_batch {self.micro_batch} is more than samples {self.samples}")

    @property
    def drawn(self) -> int:
        """Gradient samples that the stratified sampling draws: whole micro-batches."""
        return self.samples if self.accumulate == "sum" else self.samples - self.samples % self.micro_batch

    def unused(self) -> dict[str, str]:
        """Options that change nothing beside the others, each with what it is for."""
        stratified = {"samples": "stratified sampling", "curve_samples": "stratified sampling"}
        found = {"include_last": "the authors' loop"} if self.sampling == "stratified" else stratified
        if self.sampling != "stratified" or self.accumulate == "sum":
            found = {**found, "micro_batch": "stratified sampling of absolute values or squares"}
        return found

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in fields(cls))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


# The type of each option, and the least and the largest value of a number.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "threshold": (float, 0, 1),
    "include_last": (bool,),
    "samples": (int, 1, 10_000_000),
    "curve_samples": (int, 1, 65536),
    "condition_dropout": (float, 0, 1),
    "micro_batch": (int, 1, 65536),
    "accumulate": (str,),
    "timestep_weights": (str,),
}


def check_option(key: str, value: Any, expected: type, least: float | None = None, most: float | None = None) -> None:
    """Raises BadInput unless an option has the type it needs and lies in [least, most]; a whole number is a float too,
    a truth value neither.
    """
    fits = isinstance(value, (int, float) if expected is float else expected)
    if not fits or (isinstance(value, bool) and expected is not bool):
        raise BadInput(f"importance: {key} {value!r} is no {expected.__name__}")
    if least is not None and most is not None and not least <= value <= most:
        raise BadInput(f"importance: {key} {value} is outside [{least}, {most}]")
