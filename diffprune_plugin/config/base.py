"""Configs read from a file, with settings on top."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator

from diffprune_plugin.config.documents import check_tree, parse_yaml, read_mapping, reason_of
from diffprune_plugin.errors import BadInput
from diffprune_plugin.utils.checked import Checked
from diffprune_plugin.utils.written_paths import as_written

CRITERION = "diff_taylor"  # of a config that names none
ConfigType = TypeVar("ConfigType", bound=Checked)


def in_one_line(path: str) -> str:
    check_tree(path)
    return path


PathText = Annotated[str, AfterValidator(in_one_line), AfterValidator(as_written)]


def read_as(
    kind: type[ConfigType], path: Path, settings: Sequence[str] = (), **overrides: str | Path | None
) -> ConfigType:
    """A config file with ``KEY=VALUE`` settings (values in YAML, dots reach into mappings) and overrides on top."""
    values = read_mapping(path)
    return kind.make(values, str(path), apply_(values, settings, overrides))


def apply_(
    values: dict[str, Any], settings: Sequence[str], overrides: Mapping[str, str | Path | None]
) -> dict[str, str]:
    """Put settings and overrides on top of a config's values; where each of these keys is from, in words.

    Raises BadInput for a setting that cannot be set.
    """
    places = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise BadInput(f"--set {setting!r}: not KEY=VALUE")
        if not text.strip():
            raise BadInput(f"--set {setting!r}: no value; {key}=null takes back what the config says")
        try:
            set_at(values, key, parse_yaml(text))
        except (ValueError, yaml.YAMLError, RecursionError) as error:
            raise BadInput(f"--set {setting!r}: {reason_of(error)}") from None
        places[key.partition(".")[0]] = f"--set {setting}"
    given = {key: str(value) for key, value in overrides.items() if value is not None}
    values |= given
    return places | {key: f"--{key}" for key in given}


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
