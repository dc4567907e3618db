"""The linear estimate of a sensitivity as a criterion: how far the output moves when a channel goes in its turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from diffprune_plugin.errors import BadInput, MissingGradients

if TYPE_CHECKING:
    from torch import Tensor


class Scored(Protocol):
    """What the score takes from a `Sensitivity`: by root layer what each unit adds to the error."""

    @property
    def scores(self) -> Mapping[str, Sequence[float]]: ...


class OutputError:
    """What a channel adds to the mean squared change of a value of the output, to first order, when it goes after those
    that add less and the layers behind are refitted.

    It is what `measure_sensitivity` gives, from random probes by Hutchinson's estimator and the correlations of the
    channels; a prune from a config measures it. For a model that is not compensated: the sensitivity's
    ``unrefitted()``, by which each channel is replaced by its mean alone. Channels that are paired (GEGLU) have the
    score of their unit.
    """

    def __init__(self, sensitivity: Scored | None = None) -> None:
        if sensitivity is not None and not isinstance(getattr(sensitivity, "scores", None), Mapping):
            raise BadInput(f"importance: sensitivity {sensitivity!r} is not what measure_sensitivity returns")
        self.sensitivity = sensitivity

    def __call__(self, group: Any) -> Tensor:
        """Score of each root channel of a torch-pruning group, shape (channels,), >= 0.

        Raises MissingGradients without a sensitivity, BadInput for one of another model.
        """
        from diffprune_plugin.criteria.scores import stored_score

        if self.sensitivity is None:
            raise MissingGradients(
                "importance: output_error has no sensitivity; pass importance('output_error', "
                "sensitivity=measure_sensitivity(model, scheduler, images))"
            )
        return stored_score(group, self.sensitivity.scores)
