"""The linear estimate of a sensitivity as a criterion: how far the output moves when a channel goes, given a bias."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from diffprune_plugin.errors import BadInput, MissingGradients

if TYPE_CHECKING:
    from torch import Tensor


class Scored(Protocol):
    """What the score takes from a `Sensitivity`: by root layer the error of removing each unit alone."""

    @property
    def scores(self) -> Mapping[str, Sequence[float]]: ...


class OutputError:
    """The mean squared change of a value of the output when a channel is replaced by its mean, to first order.

    It is what `measure_sensitivity` gives, from random probes by Hutchinson's estimator; a prune from a config measures
    it. Channels that are paired (GEGLU) have the score of their unit.
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
