"""Passes that begin where a model first differs from another: what comes before is taken from the other's pass."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from diffprune_plugin.graph.patterns import around, outermost


def ended_before(order: Mapping[str, int], layers: Collection[str]) -> list[str]:
    """The outermost modules that have ended before any of these layers begins; ``order``: where a pass ends each."""
    changed = {next(name for name in (layer, *around(layer)) if name in order) for layer in layers}
    first = min(order[name] for name in changed)
    return outermost(name for name, place in order.items() if place < first and changed.isdisjoint(around(name)))


@contextlib.contextmanager
def recorded(model: nn.Module, names: Collection[str]) -> Iterator[dict[str, Any]]:
    """What these modules give in the pass of the block.

    Without those that are called again, give other than tensors, or whose output is changed in place afterwards: those
    have to run.
    """
    found: dict[str, Any] = {}
    versions: dict[str, list[int] | None] = {}

    def keeper(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            versions[name] = None if name in found else versions_of(output)
            found[name] = output

        return hook

    with contextlib.ExitStack() as hooks:
        for name in names:
            hooks.enter_context(model.get_submodule(name).register_forward_hook(keeper(name)))
        yield found
    for name, before in versions.items():
        if before is None or versions_of(found[name]) != before:
            del found[name]


def versions_of(output: Any) -> list[int] | None:
    """How often each tensor in a module's output was changed in place; None where there is something else."""
    leaves = [leaf for leaf in tree_leaves(output) if leaf is not None]
    return [leaf._version for leaf in leaves] if all(isinstance(leaf, Tensor) for leaf in leaves) else None


@contextlib.contextmanager
def served(model: nn.Module, outputs: Mapping[str, Any]) -> Iterator[None]:
    """In the block, these modules give what is given here, and compute nothing."""
    modules = [(model.get_submodule(name), output) for name, output in outputs.items()]
    try:
        for module, output in modules:
            module.forward = lambda *_, output=output, **__: output
        yield
    finally:
        for module, _ in modules:
            module.__dict__.pop("forward", None)
