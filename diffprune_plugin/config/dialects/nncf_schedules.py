"""NNCF's pruning schedules as lists: the pruning level of every epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from diffprune_plugin.errors import BadInput, nearest

DEFAULT_SCHEDULE, DEFAULT_INIT, DEFAULT_TARGET, DEFAULT_STEPS = "exponential", 0.0, 0.5, 100  # those of NNCF 2.14


MOST_EPOCHS = 1_000_000


def levels(
    schedule: str = DEFAULT_SCHEDULE,
    *,
    pruning_init: float = DEFAULT_INIT,
    pruning_target: float = DEFAULT_TARGET,
    pruning_steps: int = DEFAULT_STEPS,
    num_init_steps: int = 0,
    steps: Mapping[int, float] | None = None,
    epochs: int | None = None,
) -> list[float]:
    """The share to prune at each epoch from 0 on, in [0, 1); after the list's end its last level stays.

    The arguments are the keys of NNCF's config. ``baseline`` goes to ``pruning_target`` at once, ``exponential`` and
    ``exponential_with_bias`` from ``pruning_init`` to it in ``pruning_steps`` epochs, all after ``num_init_steps``
    epochs at 0; ``multistep`` takes only ``steps``, a level for each epoch where it changes. ``epochs``: the length of
    the list, for a training of so many.

    Raises BadInput for an unknown schedule, a value out of its range, or a schedule that never reaches its target.
    Formulas: nncf 2.14.1, nncf/common/pruning/schedulers.py; multistep: nncf 3.4, pruning/scheduler_fns.py. For
    ``exponential_with_bias`` with more than some 20 steps NNCF's solver gives up at its first guess; here it is solved.
    """
    if schedule not in (*CURVES, "multistep"):
        known = ", ".join((*CURVES, "multistep"))
        raise BadInput(f"schedule: {schedule!r} is unknown{nearest(str(schedule), CURVES)}; known: {known}")
    if (steps is not None) != (schedule == "multistep"):
        raise BadInput(f"steps: {steps!r}: schedule 'multistep' needs it, as in {{0: 0.1, 5: 0.3}}, and no other does")
    if steps is not None:
        found = multistep(steps)
    else:
        check(pruning_init, pruning_target, pruning_steps, num_init_steps)
        curve = CURVES[schedule](pruning_init, pruning_target, pruning_steps - 1)
        found = [0.0] * num_init_steps + [min(level, pruning_target) for level in curve]
    if epochs is None:
        return found
    if epochs < len(found):
        raise BadInput(
            f"schedule: {schedule} reaches its target at epoch {len(found) - 1}, but there are {epochs} epochs; "
            f"train {len(found)} or shorten the schedule"
        )
    if epochs > MOST_EPOCHS:
        raise BadInput.of("epochs", epochs, f"is more than {MOST_EPOCHS:,}")
    return found + found[-1:] * (epochs - len(found))


def check(start: float, target: float, pruning_steps: int, num_init_steps: int) -> None:
    """Raises BadInput for values that describe no schedule."""
    for key, level in (("pruning_init", start), ("pruning_target", target)):
        check_level(key, level)
    if start > target:
        raise BadInput.of("pruning_init", start, f"is above pruning_target {target}, which is never reached; lower it")
    for key, count, least in (("pruning_steps", pruning_steps, 1), ("num_init_steps", num_init_steps, 0)):
        if isinstance(count, bool) or not isinstance(count, int) or not least <= count <= MOST_EPOCHS:
            raise BadInput.of(key, count, f"is no whole number of at least {least} and at most {MOST_EPOCHS:,}")


def check_level(key: str, level: object) -> None:
    if isinstance(level, bool) or not isinstance(level, (int, float)) or not 0 <= level < 1:
        raise BadInput.of(key, level, "is outside [0, 1); 0.3 removes 30 % of the channels")


def baseline(_: float, target: float, __: int) -> list[float]:
    return [target]


def exponential(start: float, target: float, last: int) -> list[float]:
    """The density 1 - level decays from 1 - start to 1 - target (NNCF's manual says the level does; its code: this)."""
    ratio = (1 - target) / (1 - start)
    return [1 - (1 - start) * ratio ** (epoch / last) for epoch in range(last)] + [target]


def exponential_with_bias(start: float, target: float, last: int) -> list[float]:
    """level = a exp(-k epoch) + b through start, the target at the last epoch, 3/4 of it at an eighth of the way.

    Raises BadInput where no such curve exists. Eq. of arXiv 1808.07471 as NNCF solves it.
    """
    if start == target:
        return [target]
    if last < 1:
        raise BadInput.of("pruning_steps", 1, "is too short for exponential_with_bias; give 2 or more, or use baseline")
    if start > target * 0.714:  # at 5/7 the curve is a line
        raise BadInput.of(
            "pruning_init",
            start,
            f"is too high: exponential_with_bias passes 3/4 of its target {target} an eighth of the way; "
            f"start below {target * 0.714:.4g} or use exponential",
        )
    share = (0.75 * target - start) / (target - start)
    # With z = exp(-k last / 8): z - share z**8 + share - 1 = 0. Concave, 0 at z = 1, so one root lies left of its top.
    low, high = 0.0, (1 / (8 * share)) ** (1 / 7)
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if middle - share * middle**8 + share - 1 < 0 else (low, middle)
    rate = -8 * math.log(high) / last
    a = (target - start) / math.expm1(-rate * last)
    return [start + a * math.expm1(-rate * epoch) for epoch in range(last)] + [target]


def multistep(steps: Mapping[int, float]) -> list[float]:
    """Each level from its epoch on; raises BadInput unless epoch 0 has one and all are levels."""
    if 0 not in steps or any(isinstance(e, bool) or not isinstance(e, int) or not 0 <= e <= MOST_EPOCHS for e in steps):
        raise BadInput(f"steps: epochs {list(steps)} are not 0 and further whole numbers, as in {{0: 0.1, 5: 0.3}}")
    for epoch, level in steps.items():
        check_level(f"steps[{epoch}]", level)
    starts = sorted(steps)
    return [steps[max(start for start in starts if start <= epoch)] for epoch in range(starts[-1] + 1)]


CURVES: dict[str, Callable[[float, float, int], list[float]]] = {
    "baseline": baseline,
    "exponential": exponential,
    "exponential_with_bias": exponential_with_bias,
}
