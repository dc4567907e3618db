"""Batches shared out over processes, in passes that fit the memory: their losses, and their gradients added up."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from diffprune_plugin.calibration.calibration import Curve
from diffprune_plugin.calibration.parts import outside
from diffprune_plugin.calibration.progress import Progress
from diffprune_plugin.calibration.settings import Settings
from diffprune_plugin.criteria.sweep import POWERS
from diffprune_plugin.diffusion.batches import Draw
from diffprune_plugin.errors import CheckFailed
from diffprune_plugin.utils.memory import Passes


class Batches:
    """What one process does of each batch: every method is called by all of them, with the whole batch.

    Each raises CheckFailed, on every process, if a loss is not finite; what fails on one process, for want of memory
    say, fails on all.
    """

    def __init__(self, settings: Settings, progress: Progress) -> None:
        self.settings, self.progress, self.processes = settings, progress, progress.processes
        self.passes = Passes(settings.batch_size)

    def measure(self, draws: Sequence[Draw]) -> Curve:
        """The loss of each sample, shape (len(draws),), without gradients."""
        own = self.processes.part_of(draws)
        with torch.no_grad():
            losses = self.processes.on_all(lambda: self.passes.over(own, self.settings.loss))
        return self.gathered(losses, draws)

    def measure_with_graph(self, draws: Sequence[Draw]) -> tuple[Curve, list[Tensor] | None]:
        """As `measure`, and this process's losses with their graph if all of them fit in one pass."""
        own = self.processes.part_of(draws)

        def loss(part: Sequence[Draw]) -> Tensor:
            found = self.settings.loss(part)
            return found if len(part) == len(own) else found.detach()

        graph = self.processes.on_all(lambda: self.passes.over(own, loss))
        return self.gathered(graph, draws), graph if len(graph) == 1 else None

    def add(self, draws: Sequence[Draw], scale: float, known: list[Tensor] | None = None) -> None:
        """Add the gradients of the samples' losses times ``scale``; ``known``: this process's losses, used up."""
        own = self.processes.part_of(draws)
        losses = self.processes.on_all(lambda: self.add_own(own, scale, known))
        self.gathered(losses, draws)

    def add_own(self, draws: Sequence[Draw], scale: float, known: list[Tensor] | None) -> list[Tensor]:
        """This process's part of `add`; where gradients are summed, each is weighted by its timestep."""
        sums, plain = self.progress.sums, self.settings.sweep.accumulate == "sum"

        def run(part: Sequence[Draw]) -> Tensor:
            sums.begin()
            loss = known.pop() if known else self.settings.loss(part)
            weights = self.settings.timestep_weights[[draw.timestep for draw in part]].to(loss) if plain else 1.0
            torch.autograd.backward((loss * weights).sum() * (scale * sums.scale), inputs=self.inputs())
            return loss.detach()

        return self.passes.over(draws, run, sums.repeating)

    def inputs(self) -> list[Tensor]:
        """The parameters of the part of the model that is under way, and of all that is outside of blocks.

        Of these the first layer's are one: a GroupNorm whose input has no gradient crashes torch 2.13 (CPU, channels
        last).
        """
        model = self.settings.model
        wanted = self.settings.parts[self.progress.part] | outside(model)
        return [parameter for name, parameter in model.named_parameters() if name in wanted]

    @contextlib.contextmanager
    def one_gradient(self, timestep: int, scale: float = 1.0) -> Iterator[None]:
        """Where powers are accumulated, what is added inside is one gradient g of this timestep.

        The sums grow by scale * weight_t * |g| ** power, on the first process.
        """
        sums, accumulate = self.progress.sums, self.settings.sweep.accumulate
        if accumulate == "sum":
            yield
            return
        totals, sums.totals = sums.totals, {}
        yield
        factor = scale * float(self.settings.timestep_weights[timestep])
        gradients = sums.over(self.processes)  # every process takes part in the sum
        for name, gradient in gradients.items() if self.processes.is_first else ():
            grown = factor * gradient.abs() ** POWERS[accumulate]
            totals[name] = totals[name] + grown if name in totals else grown
        sums.totals = totals

    def gathered(self, losses: Sequence[Tensor], draws: Sequence[Draw]) -> Curve:
        """The losses of all draws, of which each process has those of its own passes, shape (len(draws),)."""
        own = torch.cat([part.detach() for part in losses]) if losses else self.settings.parameter.new_zeros(0)
        values = self.processes.gather(own.float(), len(draws)).cpu()
        finite = torch.isfinite(values)
        if not bool(finite.all()):
            bad = int((~finite).nonzero()[0])
            raise CheckFailed(
                f"calibration: the loss is {values[bad].item()} at timestep {draws[bad].timestep}, image "
                f"{draws[bad].row} (batch at sample {self.progress.done} of stage {self.progress.stage}); "
                "check the model's weights and the images"
            )
        found: Curve = values.double().numpy()
        return found
