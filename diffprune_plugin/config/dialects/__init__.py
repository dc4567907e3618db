"""Configs of other tools: recognised, listed key by key, and turned into the native form."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffprune_plugin.config.dialects.flags as flags
import diffprune_plugin.config.dialects.nncf_json as nncf_json
import diffprune_plugin.config.dialects.pruner_kwargs as pruner_kwargs
import diffprune_plugin.config.dialects.shell as shell
from diffprune_plugin.config.base import apply_
from diffprune_plugin.config.criterion import criterion_of
from diffprune_plugin.config.dialects.table import NATIVE, Fact, Listing, to
from diffprune_plugin.config.documents import MOST_BYTES, parse_mapping
from diffprune_plugin.config.pruning import PruningConfig
from diffprune_plugin.errors import BadInput
from diffprune_plugin.plugins import criteria, plugin_manager
from diffprune_plugin.utils.reading import read_text

FROM_FLAGS = "--from-flags"
KEYS = {key: Fact(NATIVE, "honoured", "a native key", to(key)) for key in PruningConfig.model_fields}


def read(path: Path | None, text: str | None = None) -> Listing:
    """The listing of a config file in any dialect, or of flags given as text.

    Raises BadInput for a file that is none, and unless exactly one of the two is given.
    """
    if (path is None) == (text is None):
        raise BadInput(f"give a config file or {FROM_FLAGS} '--pruner ...', one of the two")
    known = tuple(criteria(plugin_manager()))
    if path is None:
        return flags.translate(text or "", FROM_FLAGS)
    content = read_text(path, MOST_BYTES)
    if shell.recognises(content):
        return flags.translate(content, str(path))
    return translate(parse_mapping(content, path), str(path), known)


def translate(content: Mapping[str, Any], where: str, known: Collection[str]) -> Listing:
    """The listing of the keys and values of a config; ``known`` are the names of the registered criteria."""
    if "compression" in content or "input_info" in content:
        return nncf_json.translate(content, where, known)
    if pruner_kwargs.recognises(content):
        return pruner_kwargs.translate(content, where, known)
    listing = Listing("native", where)
    listing.take(KEYS, content)
    return listing


def settle(listing: Listing, settings: Sequence[str] = (), **overrides: str | Path | None) -> PruningConfig:
    """The config of a listing, with settings and overrides, which speak the native form, on top.

    Raises BadInput if a key is refused, a value is wrong or the criterion cannot be made.
    """
    listing.check()
    values = dict(listing.values)
    config = PruningConfig.make(values, listing.where, apply_(values, settings, overrides))
    try:
        criterion_of(config)
    except BadInput as error:
        raise BadInput(f"{listing.where}: {error}") from None
    return config


def translated(listing: Listing, settings: Sequence[str] = (), **overrides: str | Path | None) -> dict[str, Any]:
    """What a native config file has to say to mean the same; the model may be left to the command line.

    Raises BadInput as `settle` does.
    """
    placeholder = {} if "model" in listing.values or overrides.get("model") else {"model": "MODEL"}
    listing.values.update(placeholder)
    config = settle(listing, settings, **overrides)
    values = config.model_dump(mode="json", exclude_unset=True)
    return {key: value for key, value in values.items() if key not in placeholder or value != "MODEL"}
