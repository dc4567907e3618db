"""What one backward pass of a probe tells of each layer: its inputs, or a query's outputs, times their gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from diffprune_plugin.recovery.ridge import by_position


def of_logits(name: str) -> str:
    """The name of what a query projection, or a group by its root, does to the logits of attention."""
    return f"{name} logits"


@contextlib.contextmanager
def products(model: nn.Module, centres: Mapping[str, Tensor], queries: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """For each layer in ``centres``, after a backward inside: sum over positions of (x - centre) grad, shape (batch,
    channels); for each query projection, as `of_logits` names it, that of its output times its gradient.

    What a hook of the graph refers to must not lead back to the graph: such a ring is never freed.
    """
    found: dict[str, Tensor] = {}

    def adding(name: str, values: Tensor) -> Any:
        def back(gradient: Tensor) -> None:
            moved = (values * by_position(gradient).float()).sum(1).cpu()
            found[name] = found[name] + moved if name in found else moved

        return back

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            given = args[0]
            # A tensor of its own, whose gradient is by way of this layer alone.
            own = given.view_as(given) if given.requires_grad else given.detach().requires_grad_(True)
            own.register_hook(adding(name, by_position(own.detach()) - centres[name].to(own)))
            return (own, *args[1:])

        return hook

    def watch_query(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            seen = output if output.requires_grad else output.detach().requires_grad_(True)
            seen.register_hook(adding(of_logits(name), by_position(seen.detach())))
            return seen

        return hook

    with contextlib.ExitStack() as hooks:
        for name in centres:
            hooks.callback(model.get_submodule(name).register_forward_pre_hook(watch(name)).remove)
        for name in queries:
            hooks.callback(model.get_submodule(name).register_forward_hook(watch_query(name)).remove)
        yield found


def by_sample(values: Tensor, samples: int) -> Tensor:
    """Rows (samples * n, ..., channels) as (samples, positions, channels): PixArt alpha embeds the two numbers of a
    resolution in a row each."""
    return values.reshape(samples, -1, values.shape[-1])
