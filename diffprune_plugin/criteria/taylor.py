"""Taylor scores: what they are of, and their presets. Nothing here imports torch; what computes is in `scores`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

from diffprune_plugin.criteria.sweep import Accumulation, Sweep, check_option
from diffprune_plugin.errors import BadInput, nearest

if TYPE_CHECKING:
    from torch import Tensor

Normalizer = Literal["mean"] | None

# The three variants in the authors' code, and the paper's own equation; every entry is an option and can be overridden.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"power": 1},
    "ddpm_exp": {"power": 2, "sampling": "reference"},
    "diffusers": {"power": 1, "sampling": "reference", "include_last": True},
    "ldm": {"power": 1, "sampling": "fresh", "threshold": 0.1, "round_to": 2, "halves": "apart"},
}


class Calibrated(Protocol):
    """What a score takes from a `Calibration`: gradients by parameter name, and the sweep that they are of."""

    @property
    def gradients(self) -> Mapping[str, Tensor]: ...

    @property
    def sweep(self) -> Sweep: ...

    def matching(self, options: Mapping[str, Any]) -> Calibrated:
        """The same for these options of a sweep; raises BadInput if its gradients are not what they ask for."""


class TaylorImportance:
    """First-order Taylor score of a coupled group: sum over its weights k of |w_k g_k| ** power.

    g is the gradient of the loss, summed over the timesteps that the calibration kept before the absolute value is
    taken (Eq. 7-10 of arXiv 2305.10924). Where the sweep accumulates powers, the score is sum_k |w_k| ** p G_k with
    G_k the sum over timesteps of |g_kt| ** p; for p = 2 that of arXiv 1906.10771.
    Convolutions and linear layers count, norm affine parameters if ``norms``.
    ``normalizer="mean"`` divides by the group's mean, so that groups can be ranked together; the order inside a group
    is the same. ``round_to`` and ``halves`` are what `make_plan` takes where it is not told otherwise. Without a
    calibration, gradients accumulated in ``.grad`` are used.
    """

    def __init__(
        self,
        sweep: Sweep,
        *,
        power: int = 1,
        norms: bool = False,
        normalizer: Normalizer = "mean",
        round_to: int | None = None,
        halves: Literal["together", "apart"] | None = None,
        calibration: Calibrated | None = None,
    ) -> None:
        check_option("power", power, int)
        check_option("norms", norms, bool)
        if round_to is not None:
            check_option("round_to", round_to, int, 1, 65536)
        if halves not in ("together", "apart", None):
            raise BadInput(f"importance: halves {halves!r} is neither 'together' nor 'apart'")
        if power not in (1, 2):
            raise BadInput(f"importance: power {power} is neither 1 (absolute value) nor 2 (square)")
        if power != 1 and sweep.accumulate != "sum":
            raise BadInput(f"importance: power {power} is for accumulate 'sum', not {sweep.accumulate!r}; leave it out")
        if normalizer not in ("mean", None):
            raise BadInput(f"importance: normalizer {normalizer!r} is neither 'mean' nor null")
        self.sweep, self.power, self.norms, self.normalizer = sweep, power, norms, normalizer
        self.round_to, self.halves, self.calibration = round_to, halves, calibration

    def __call__(self, group: Any) -> Tensor | None:
        """Score of each root channel of a torch-pruning group, shape (channels,), >= 0; None if nothing in it counts.

        Raises MissingGradients if calibration has not run or belongs to a model of other sizes.
        """
        from diffprune_plugin.criteria.scores import taylor_score

        return taylor_score(self, group)


def diff_taylor(preset: str = "paper", **options: Any) -> TaylorImportance:
    """The thresholded timestep Taylor score; presets are variants of the authors' code (docs/guide/calibrate.md)."""
    if not isinstance(preset, str) or preset not in PRESETS:
        raise BadInput(f"importance: preset {preset!r} is none of {', '.join(PRESETS)}{nearest(str(preset), PRESETS)}")
    return make_taylor({"accumulate": "sum", **PRESETS[preset], **options}, options)


def taylor(**options: Any) -> TaylorImportance:
    """The Taylor score over all timesteps: no threshold."""
    if "threshold" in options:
        raise BadInput("importance: taylor keeps all timesteps and takes no threshold; use diff_taylor")
    return make_taylor({"accumulate": "sum", "threshold": 0.0, **options})


def taylor_absolute(**options: Any) -> TaylorImportance:
    """sum_k |w_k| sum_t |g_kt|: gradients of different timesteps do not cancel; all timesteps unless told otherwise."""
    return accumulating("absolute", options)


def fisher(**options: Any) -> TaylorImportance:
    """sum_k w_k^2 sum_t g_kt^2: the Fisher score; all timesteps unless told otherwise."""
    return accumulating("square", options)


def accumulating(what: Accumulation, options: dict[str, Any]) -> TaylorImportance:
    if options.get("accumulate", what) != what:
        raise BadInput(
            f"importance: accumulate {options['accumulate']!r}: this criterion's is {what!r}; use diff_taylor"
        )
    return make_taylor({"threshold": 0.0, **options, "accumulate": what})


def make_taylor(options: dict[str, Any], asked: Mapping[str, Any] | None = None) -> TaylorImportance:
    """Split the options into those of the sweep and those of the score; ``asked``: those that are the caller's own.

    Raises BadInput for one that is unknown, or is asked for and would change nothing.
    """
    known = Sweep.option_names()
    allowed = (*known, *(name for name in inspect.signature(TaylorImportance).parameters if name != "sweep"))
    for key in options:
        if key not in allowed:
            raise BadInput(f"importance: unknown option {key!r}{nearest(key, allowed)}; have {', '.join(allowed)}")
    given = {key: value for key, value in options.items() if key in known}
    sweep, calibration = Sweep(**given), options.get("calibration")
    for key, what in sweep.unused().items():
        if (value := (options if asked is None else asked).get(key, getattr(Sweep, key))) != getattr(Sweep, key):
            raise BadInput(f"importance: {key} {value!r} is for {what}, and changes nothing here; leave it out")
    if calibration is not None:
        options["calibration"] = calibration = calibration.matching(given)
        sweep = calibration.sweep
    return TaylorImportance(sweep, **{key: value for key, value in options.items() if key not in known})
