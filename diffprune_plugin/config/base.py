"""What all configs share: frozen, checked when made, an unknown key is an error; read from a file, with settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from typing_extensions import Self

from diffprune_plugin.config.documents import parse_mapping, parse_yaml, read_text
from diffprune_plugin.errors import BadInput, nearest

ConfigType = TypeVar("ConfigType", bound="Config")


def number(value: Any) -> Any:
    """A whole number as a float."""
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53
    return float(value) if whole else value


Place = Annotated[str, Field(min_length=1)]  # an empty path would be the working directory


Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]  # what torch takes


Number = Annotated[float, BeforeValidator(number)]


class Config(BaseModel):
    """What all configs share: frozen, checked when made, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @classmethod
    def make(cls, values: Mapping[str, Any], where: str = "config") -> Self:
        """A config from a mapping; raises BadInput with the place, the value and the remedy for what is wrong."""
        for key in values:
            if key not in cls.model_fields:
                raise BadInput(f"{where}: unknown key {key!r}{nearest(str(key), cls.model_fields)}; {known_keys(cls)}")
        try:
            return cls(**values)
        except ValidationError as error:
            raise BadInput(f"{where}: {'; '.join(explain(item) for item in error.errors())}") from None


def known_keys(cls: type[BaseModel]) -> str:
    return f"known: {', '.join(cls.model_fields)}"


def explain(error: Any) -> str:
    """One pydantic error as key, value and what is expected."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"{key} is missing; add '{key}: ...'" + (" or give --model" if key == "model" else "")
    message = error["msg"].removeprefix("Value error, ")
    if not key:
        return str(message)
    return f"{key}: {error['input']!r}: {message[0].lower()}{message[1:]}"


def read_as(kind: type[ConfigType], path: Path, settings: Sequence[str] = (), **overrides: str | None) -> ConfigType:
    """A config file with ``KEY=VALUE`` settings (values in YAML, dots reach into mappings) and overrides on top."""
    values = parse_mapping(read_text(path), path)
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
        except (ValueError, yaml.YAMLError) as error:
            raise BadInput(f"--set {setting!r}: {' '.join(str(error).split())}") from None
    values |= {key: value for key, value in overrides.items() if value is not None}


def set_at(values: dict[str, Any], key: str, value: Any) -> None:
    """``values[key] = value``; what follows the key's first dot is a key of the mapping there, dots and all.

    A criterion's name becomes a mapping when options are set on it.
    """
    first, dot, inner = key.partition(".")
    if dot:
        before = values.get(first) or {}
        before = {"name": before} if first == "importance" and isinstance(before, str) else before
        if not isinstance(before, dict):
            raise BadInput(f"--set {key}: {first} is {before!r}, not a mapping")
        value = {**before, inner: value}
    values[first] = value
