"""Configs read from a file, with settings on top."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, Field

from diffprune_plugin.config.documents import check_tree, parse_yaml, read_mapping, reason_of
from diffprune_plugin.errors import BadInput
from diffprune_plugin.utils.checked import Checked

CRITERION = "diff_taylor"  # of a config that names none
ConfigType = TypeVar("ConfigType", bound=Checked)


def as_written(path: str) -> str:
    """A path that no shell has still to fill in, in one line; raises ValueError for another."""
    check_tree(path)
    if path == "~" or path.startswith("~/"):
        raise ValueError("only a shell knows what ~ is; write the whole path")
    return path


# An empty path would be the working directory.
PathText = Annotated[str, Field(min_length=1), AfterValidator(as_written)]


def read_as(kind: type[ConfigType], path: Path, settings: Sequence[str] = (), **overrides: str | None) -> ConfigType:
    """A config file with ``KEY=VALUE`` settings (values in YAML, dots reach into mappings) and overrides on top."""
    values = read_mapping(path)
    apply_(values, settings, overrides)
    return kind.make(values, str(path))


def apply_(values: dict[str, Any], settings: Sequence[str], overrides: Mapping[str, str | None]) -> None:
    """Put settings and overrides on top of a config's values; raises BadInput for a setting that cannot be set."""
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise BadInput(f"--set {setting!r}: not KEY=VALUE")
        try:
            set_at(values, key, parse_yaml(text))
        except (ValueError, yaml.YAMLError, RecursionError) as error:
            raise BadInput(f"--set {setting!r}: {reason_of(error)}") from None
    values |= {key: value for key, value in overrides.items() if value is not None}


def set_at(values: dict[str, Any], key: str, value: Any) -> None:
    """``values[key] = value``; what follows the key's first dot is a key of the mapping there, dots and all.

    A criterion's name, and the default's, becomes a mapping when options are set on it.
    """
    first, dot, inner = key.partition(".")
    if dot:
        before = values.get(first) or (CRITERION if first == "importance" else {})
        before = {"name": before} if isinstance(before, str) and first == "importance" else before
        if not isinstance(before, dict):
            raise BadInput(f"--set {key}: {first} is {before!r}, not a mapping")
        value = {**before, inner: value}
    values[first] = value
