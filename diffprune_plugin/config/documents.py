"""Text that people write as YAML, JSON or TOML, and as words on a command line, read without losing anything."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from diffprune_plugin.errors import BadInput

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# A string, or what NNCF's reader of JSON skips: comments, and commas before a closing bracket.
JSON_EXTRAS = re.compile(r'("(?:\\.|[^"\\])*")|//[^\n]*|#[^\n]*|/\*.*?\*/|,(?=\s*[\]}])', re.DOTALL)
DEEPEST = 20


class Loader(yaml.SafeLoader):
    """YAML where 1e-1 is a number, as everywhere but in YAML 1.1, and a key given twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise ValueError(twice(key.value))
                seen.add(key.value)
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def twice(key: str) -> str:
    return f"key {key!r} is given twice; keep one"


def read_text(path: Path) -> str:
    """The text of a file; raises BadInput if it cannot be read."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def parse_yaml(text: str) -> Any:
    """The value of a YAML text; raises ValueError or yaml.YAMLError."""
    return yaml.load(text, Loader)  # a SafeLoader


def parse_json(text: str) -> Any:
    """The value of a JSON text, comments and trailing commas allowed; raises ValueError."""

    def blank(found: re.Match[str]) -> str:
        return found[1] or re.sub(r"[^\n]", " ", found[0])

    return json.loads(JSON_EXTRAS.sub(blank, text), object_pairs_hook=unique)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; raises ValueError for a key given twice."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(twice(key))
        found[key] = value
    return found


PARSERS: dict[str, Callable[[str], Any]] = {".toml": tomllib.loads, ".json": parse_json}


def parse_mapping(text: str, path: Path) -> dict[str, Any]:
    """The keys and values in a text, as the suffix of its path says; raises BadInput if there are none."""
    try:
        content = PARSERS.get(path.suffix, parse_yaml)(text)
        check_tree(content)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        kind = path.suffix.lstrip(".") or "YAML"
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise BadInput(f"{path}: not valid {kind}: {reason}") from None
    if content is None:
        raise BadInput(f"{path}: is empty; it needs keys and values, 'model: DIRECTORY' first")
    if not isinstance(content, dict):
        raise BadInput(f"{path}: holds {type(content).__name__}, not keys and values")
    return content


def check_tree(value: Any, depth: int = 0) -> None:
    """Raises RecursionError for a value nested without end, as YAML's references can be, ValueError for an odd key."""
    if depth > DEEPEST:
        raise RecursionError
    for key in value if isinstance(value, dict) else ():
        if not isinstance(key, str):
            raise ValueError(f"key {key!r} is no word; put it in quotes")
    if isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            check_tree(inner, depth + 1)


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """What has no keys of its own, by path: {"a": {"b": 1}, "c": [{"d": 2}]} is a.b and c[0].d."""
    if isinstance(value, Mapping) and value:
        inner = {join(path, str(key)): item for key, item in value.items()}
    elif isinstance(value, list) and any(isinstance(item, (Mapping, list)) for item in value):
        inner = {f"{path}[{i}]": item for i, item in enumerate(value)}
    else:
        return {path: value}
    return {key: leaf for where, item in inner.items() for key, leaf in leaves(item, where).items()}


def join(path: str, key: str) -> str:
    """The path of a key: a.b, or a['b.c'] where the key is no plain word."""
    if not re.fullmatch(r"[\w-]+", key):
        return f"{path}[{key!r}]"
    return f"{path}.{key}" if path else key
