"""Settings: frozen dataclasses whose fields say what they are and their bounds; commands make their options of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field, field, fields
from numbers import Integral, Real
from typing import Any

from diffprune_plugin.errors import BadInput

LARGEST_SEED = 2**63 - 1  # what torch takes


def setting(default: Any, help: str, least: float | None = None, most: float | None = None) -> Any:
    """A field that is an option too: its default, what it is, and between which numbers it lies; whole if they are."""
    return field(default=default, metadata={"help": help, "least": least, "most": most})


def options_in(kind: Any) -> Iterator[Field[Any]]:
    """The fields of settings that are options."""
    return (each for each in fields(kind) if "help" in each.metadata)


def check_bounds(settings: Any) -> None:
    """Raises BadInput, by the option's name, for a number outside its bounds; None is for what is not given."""
    for each in options_in(settings):
        value, least, most = getattr(settings, each.name), each.metadata["least"], each.metadata["most"]
        if least is None or (value is None and each.default is None):
            continue
        whole = isinstance(least, int)
        number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
        if not number or not least <= value <= most:
            name = each.name.replace("_", "-")
            raise BadInput(f"--{name} {value}: not a {'whole ' * whole}number >= {least:g} and <= {most:g}")
