"""Gradients summed in float32, by parameter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diffprune_plugin.errors import CheckFailed
from diffprune_plugin.utils.distributed import Processes
from diffprune_plugin.utils.modes import differentiable

SCALE = 2.0**12  # for float16, in which the gradients of a mean over 65,536 numbers would round to 0


class GradientSums:
    """The gradients of all backward passes summed in float32, ``totals``, by parameter name.

    Each parameter's gradient is added and freed as soon as a pass has it: the memory is one set of gradients, whatever
    the dtype of the weights. A pass that ran out of memory half-way is repeated without counting anything twice.
    ``finished``: the sums over all processes of parts of the model that are done, off the device.
    """

    def __init__(self, model: nn.Module) -> None:
        self.totals: dict[str, Tensor] = {}
        self.finished: dict[str, Tensor] = {}
        self.wanted: frozenset[str] | None = None  # of the part under way; None: all
        self.added: set[str] = set()  # by the pass under way
        self.counted: frozenset[str] = frozenset()  # by failed passes over the same samples
        self.model = model
        half = any(parameter.dtype is torch.float16 for parameter in model.parameters())
        self.scale = SCALE if half else 1.0  # of every loss, taken out of the sums again

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Gradients of the UNet's parameters go into the sums, and their ``.grad`` is empty."""
        with contextlib.ExitStack() as hooks:
            for name, parameter in self.model.named_parameters():
                register: Any = parameter.register_post_accumulate_grad_hook
                hooks.callback(register(self.adder(name)).remove)
            yield

    def adder(self, name: str) -> Callable[[Tensor], None]:
        def add(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is None or name in self.counted or (self.wanted is not None and name not in self.wanted):
                return
            if name in self.totals:
                self.totals[name].add_(gradient, alpha=1 / self.scale)
            else:
                self.totals[name] = gradient.float().div_(self.scale)
            self.added.add(name)

        return add

    def begin(self) -> None:
        """A pass begins: none of its gradients are added yet, also where it fails before there are any."""
        self.added.clear()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def over(self, processes: Processes) -> dict[str, Tensor]:
        """The sums of this part over all processes, by parameter name; of those that have one on some process."""
        totals, named = self.totals, dict(self.model.named_parameters())
        has = processes.reduce(torch.tensor([name in totals for name in named], device=self.device).int())
        return {
            name: processes.reduce(totals[name] if name in totals else torch.zeros_like(parameter, dtype=torch.float32))
            for (name, parameter), some in zip(named.items(), has.tolist(), strict=True)
            if some
        }

    def finish(self, processes: Processes) -> None:
        """The part that was summed last is done; raises CheckFailed, on every process, for sums that are not finite."""
        self.finished, self.totals = self.of_all(processes), {}
        bad = next((name for name, total in self.finished.items() if not bool(torch.isfinite(total).all())), None)
        if bad is not None:
            raise CheckFailed(
                f"calibration: the gradient of {bad} is not finite; set autocast: true or dtype: bfloat16 in place of "
                "float16, or check the model's weights"
            )

    def of_all(self, processes: Processes) -> dict[str, Tensor]:
        """The sums over all parts and processes, off the device."""
        return self.finished | {name: total.cpu() for name, total in self.over(processes).items()}

    @contextlib.contextmanager
    def repeating(self) -> Iterator[None]:
        """What the failed pass has added already is not added again."""
        before, self.counted = self.counted, self.counted | self.added
        try:
            yield
        finally:
            self.counted = before


@contextlib.contextmanager
def gradients_of(model: nn.Module) -> Iterator[None]:
    """Every parameter collects gradients, from none on, in eval mode; afterwards all is as it was."""
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in before:
        parameter.grad = None
    try:
        with differentiable(model):
            yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient
