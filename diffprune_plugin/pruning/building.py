"""Other people's constructors and loaders on files that may be damaged: one line, and an end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.nn.modules.module import register_module_parameter_registration_hook

from diffprune_plugin.errors import BadInput, DiffPruneError, first_line
from diffprune_plugin.utils.out_of_memory import out_of_memory


@contextlib.contextmanager
def foreign_errors(what: str) -> Iterator[None]:
    """Turn whatever another library raises into BadInput with ``what`` in front; memory that ran out stays as it is."""
    try:
        yield
    except DiffPruneError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise BadInput(f"{what}: {type(error).__name__}: {first_line(error)}") from error


@contextlib.contextmanager
def at_most(tensors: int, where: str) -> Iterator[None]:
    """Stop the making of a model that has far more parameters than its files: damaged sizes could take for ever."""
    count, limit = 0, 2 * tensors + 1000

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > limit:
            raise BadInput(f"{where}: describes more than {limit} parameters, the weights are {tensors}; restore it")

    handle = register_module_parameter_registration_hook(counted)
    try:
        yield
    finally:
        handle.remove()
