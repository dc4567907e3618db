"""What whole blocks add to the stream that goes through them, and how far their removal moves the output.

A removed block's output becomes its input: to first order the output y moves by dy = -J (block(x) - x). The backward
pass of a probe gives v . dy as that difference, less its mean over samples and positions as for channels, times the
gradient where the block ends.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.errors import BadInput
from diffprune_plugin.recovery.ridge import by_position

Found = dict[str, Tensor]


def removable(model: nn.Module, adapter: ModelAdapter) -> dict[str, tuple[str, ...]]:
    """The blocks of which any may go, and the arguments of each that go through it.

    Raises BadInput for a table that names arguments which a block does not have.
    """
    found = {}
    for row in adapter.blocks:
        for place, (name, block) in enumerate(model.get_submodule(row.path).named_children()):
            if missing := set(row.stream) - set(inspect.signature(block.forward).parameters):
                raise BadInput(
                    f"adapter {adapter.model_class}: a {type(block).__name__} of {row.path} takes no "
                    f"{', '.join(sorted(missing))}; mend 'stream' in its table"
                )
            if place or not row.first_is_read:
                found[f"{row.path}.{name}"] = row.stream
    return found | {name: (row.stream,) for name, row in adapter.residual_modules(model).items()}


def lists_of(model: nn.Module, adapter: ModelAdapter) -> list[tuple[list[str], int]]:
    """The blocks that may go by the list, or the class, that they are of, and how many that has."""
    names, rows = list(removable(model, adapter)), adapter.residual_modules(model)
    lists = [
        (
            [name for name in names if name.rpartition(".")[0] == row.path],
            len(list(model.get_submodule(row.path).children())),
        )
        for row in adapter.blocks
    ]
    of = {row.owner: [name for name, its in rows.items() if its is row] for row in adapter.residuals}
    return [*lists, *((mine, len(mine)) for mine in of.values() if mine)]


@dataclass
class Branches:
    """The blocks of a model under measurement; ``centres``: the mean of what each adds, by stream."""

    model: nn.Module
    blocks: Mapping[str, tuple[str, ...]]
    centres: dict[str, list[Tensor]] = field(default_factory=dict)

    @contextlib.contextmanager
    def summing(self) -> Iterator[None]:
        """Adds up in ``centres`` what blocks add in each forward inside: the mean over positions, over all samples."""

        def note(name: str) -> Any:
            def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                means = [added.mean(1).double().sum(0) for added in self.added(name, block, args, kwargs, output)]
                before = self.centres.get(name, [torch.zeros_like(mean) for mean in means])
                self.centres[name] = [total + mean for total, mean in zip(before, means, strict=True)]

            return hook

        with self.hooked(note):
            yield

    def averaged(self, samples: int) -> None:
        """The sums are complete."""
        self.centres = {name: [total / samples for total in totals] for name, totals in self.centres.items()}

    @contextlib.contextmanager
    def watched(self, found: Found) -> Iterator[None]:
        """After a backward of a forward inside, ``found`` has v . dy by block, for each sample, shape (batch, 1)."""

        def watch(name: str) -> Any:
            def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
                added, outputs = self.added(name, block, args, kwargs, output), tensors(output)
                for place, part, centre in zip(places(outputs), added, self.centres[name], strict=True):
                    # A tensor of its own, whose gradient is by way of this block's output alone.
                    outputs[place] = outputs[place].view_as(outputs[place])
                    outputs[place].register_hook(functools.partial(take, part - centre.to(part)))
                return tuple(outputs) if isinstance(output, tuple) else outputs[0]

            def take(moved: Tensor, gradient: Tensor) -> None:
                product = (by_position(gradient).float() * moved).sum((1, 2)).cpu()[:, None]
                found[name] = found[name] + product if name in found else product

            return hook

        with self.hooked(watch):
            yield

    @contextlib.contextmanager
    def hooked(self, make: Callable[[str], Any]) -> Iterator[None]:
        """With the forward hook that is made for each block, by its name."""
        with contextlib.ExitStack() as hooks:
            for name in self.blocks:
                handle = self.model.get_submodule(name).register_forward_hook(make(name), with_kwargs=True)
                hooks.callback(handle.remove)
            yield

    def added(
        self, name: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> list[Tensor]:
        """What a block adds to each tensor that goes through it, by position; nothing for one that ends in it."""
        given = inspect.signature(block.forward).bind(*args, **kwargs).arguments
        outputs, streams = tensors(output), self.blocks[name]
        return [by_position(outputs[i].detach() - given[streams[i]].detach()) for i in places(outputs)]


def tensors(output: Any) -> list[Any]:
    """What a block returns, one or several."""
    return list(output) if isinstance(output, tuple) else [output]


def places(outputs: Any) -> list[int]:
    """Of what a block returns the places of tensors: Stable Diffusion 3's last block gives no text."""
    return [place for place, output in enumerate(outputs) if isinstance(output, torch.Tensor)]
