"""The built-in importance criteria, registered through the same hooks as anyone's."""

from __future__ import annotations

from collections.abc import Callable

from diffprune_plugin.criteria.filters import FilterImportance, GroupMagnitudeImportance, RandomImportance
from diffprune_plugin.criteria.output_error import OutputError
from diffprune_plugin.criteria.taylor import diff_taylor, fisher, taylor, taylor_absolute
from diffprune_plugin.hookspecs import CriterionFactory, hookimpl

BUILT_IN: dict[str, CriterionFactory] = {
    "diff_taylor": diff_taylor,
    "diff-pruning": diff_taylor,
    "ours": diff_taylor,
    "taylor": taylor,
    "taylor_absolute": taylor_absolute,
    "fisher": fisher,
    "output_error": OutputError,
    "magnitude": GroupMagnitudeImportance,
    "random": RandomImportance,
    "filter_norm": FilterImportance,
}


@hookimpl
def diffprune_register_criteria(register: Callable[[str, CriterionFactory], None]) -> None:
    for name, factory in BUILT_IN.items():
        register(name, factory)
