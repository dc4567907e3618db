"""The passes of a compensation: what the dense model computes, then each regression at its place in the pruned one."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.progress import Progress
from torch import Tensor, nn

from diffprune_plugin.recovery.draws import Draws
from diffprune_plugin.recovery.repair_files import RepairFiles
from diffprune_plugin.recovery.residual import Call, gate_in, unpacked
from diffprune_plugin.recovery.ridge import Part, Repair, System

Passes = Literal["one", "layer"]


class Stop(Exception):
    """Ends a forward pass that has gone far enough."""


@dataclass
class Refit:
    """One compensation under way; everything that a resumed one needs is in ``repairs`` and the layers' weights."""

    model: nn.Module
    dense: nn.Module
    systems: list[System]
    draws: Draws
    batch_size: int
    seed: int
    strengths: Sequence[float]
    passes: Passes
    files: RepairFiles | None
    repairs: list[Repair] = field(default_factory=list)
    rerunning: bool = False

    def __post_init__(self) -> None:
        if self.files is not None:
            self.repairs += self.files.take_up(self.model, self.systems)

    def keep_targets(self, bar: Progress) -> None:
        """One pass of the dense UNet over all samples, which keeps what each open system is fitted to."""
        batches = self.draws.batches(self.batch_size)
        for batch in bar.track(batches, description="dense activations"):
            with contextlib.ExitStack() as hooks:
                for number, system in self.open():
                    module = self.dense.get_submodule(system.source or system.block)
                    hooks.enter_context(module.register_forward_hook(self.keeper(number, system, batch)))
                self.draws.forward(self.dense, batch)

    def keeper(self, number: int, system: System, batch: slice) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            system.keep_target(unpacked(output), batch, len(self.draws.noisy), (self.seed * 1_000_003 + number) % 2**63)

        return hook

    def open(self) -> list[tuple[int, System]]:
        """The systems that are not solved yet, with their places."""
        return list(enumerate(self.systems))[len(self.repairs) :]

    def run(self, bar: Progress) -> None:
        """Solve the open systems: all of them in one pass of the pruned UNet, or each in a pass of its own."""
        task = bar.add_task("compensate", total=len(self.systems), completed=len(self.repairs))
        waves = [self.open()] if self.passes == "one" else [[one] for one in self.open()]
        for wave in waves:
            for batch in self.draws.batches(len(self.draws.noisy) if self.passes == "one" else self.batch_size):
                with contextlib.ExitStack() as hooks, contextlib.suppress(Stop):
                    for _, system in wave:
                        self.watch(system, batch, hooks, bar, task)
                    self.draws.forward(self.model, batch)
            if self.passes == "layer":
                self.finish(wave[0][1], bar, task)

    def watch(self, system: System, batch: slice, hooks: contextlib.ExitStack, bar: Progress, task: Any) -> None:
        """Hooks that collect a system's rows when its block ends; in a single pass they also solve it there."""

        def remember(part: Part) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
                if not self.rerunning:
                    system.inputs[part.name] = args[0]

            return hook

        def end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self.rerunning:
                return output
            gate = self.gate(system, module, args, kwargs, output) if system.gated else None
            system.collect(unpacked(output), batch, self.draws.held_out, self.strengths, gate)
            if self.passes == "layer":
                raise Stop
            self.finish(system, bar, task)
            if not self.open():
                raise Stop
            return self.rerun(module, args, kwargs)

        for part in system.parts:
            hooks.enter_context(part.layer.register_forward_pre_hook(remember(part)))
        block = self.model.get_submodule(system.block)
        hooks.enter_context(block.register_forward_hook(end, with_kwargs=True))

    def gate(self, system: System, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor | None:
        """What multiplies a system's one layer on its way to the end of the block, in this batch."""
        self.rerunning = True
        try:
            return gate_in(module, Call(args, kwargs, unpacked(output)), system.parts[0].name[len(system.block) + 1 :])
        finally:
            self.rerunning = False

    def rerun(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The block's output with its new weights, which the pass goes on with."""
        self.rerunning = True
        try:
            return module(*args, **kwargs)
        finally:
            self.rerunning = False

    def finish(self, system: System, bar: Progress, task: Any) -> None:
        """Solve a system and store what came out."""
        repair = system.solve(self.strengths, self.draws.held_out)
        if self.files is not None:
            self.files.add(len(self.repairs), system, repair)
        self.repairs.append(repair)
        bar.advance(task)
