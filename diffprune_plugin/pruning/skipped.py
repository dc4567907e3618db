"""Blocks that are gone without a config that says so: what goes in comes out."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.errors import BadInput, nearest


class Skip(nn.Module):
    """In the place of a block that added something to its first argument; ``wrapped``: it returned a tuple."""

    def __init__(self, wrapped: bool) -> None:
        super().__init__()
        self.wrapped = wrapped

    def forward(self, stream: Any, *_: Any, **__: Any) -> Any:
        return (stream,) if self.wrapped else stream


def skip_(model: nn.Module, names: Collection[str], adapter: ModelAdapter) -> None:
    """Take these blocks out of a model, if they are not yet; raises BadInput for what is none that may go."""
    rows = adapter.residual_modules(model)
    left = [name for name in names if name not in skipped_in(model)]
    for name in left:
        if name not in rows:
            raise BadInput(f"depth: {name} is no block whose output is its input and more{nearest(name, rows)}")
    for name in left:
        model.set_submodule(name, Skip(rows[name].wrapped))


def skipped_in(model: nn.Module) -> set[str]:
    """The blocks that are gone."""
    return {name for name, module in model.named_modules() if isinstance(module, Skip)}


@contextlib.contextmanager
def skipping(model: nn.Module, names: Collection[str], adapter: ModelAdapter) -> Iterator[None]:
    """`skip_`, taken back if what follows fails."""
    modules, gone = dict(model.named_modules()), skipped_in(model)
    before = {name: modules[name] for name in names if name in modules and name not in gone}
    skip_(model, names, adapter)
    try:
        yield
    except BaseException:
        for name, module in before.items():
            model.set_submodule(name, module)
        raise
