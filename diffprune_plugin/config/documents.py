"""Text that people write as YAML, JSON or TOML, and as words on a command line, read without losing anything."""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from diffprune_plugin.errors import BadInput
from diffprune_plugin.utils.reading import MOST_DIGITS, check_plain, leaves_and_keys, read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# A string, or what NNCF's reader of JSON skips: comments, and commas before a closing bracket. What is left open goes
# to the end, so that no place is looked at twice.
JSON_EXTRAS = re.compile(r'("(?:\\.|[^"\\])*(?:"|\\?\Z))|//[^\n]*|#[^\n]*|/\*.*?(?:\*/|\Z)|,(?=\s*[\]}])', re.DOTALL)
# What may be a key in TOML, and the dots between its parts: a library takes the square of their number in time.
TOML_KEYS, TOML_DOTS = re.compile(r"""[\w"'. \t-]+"""), re.compile(r"""[\w"'-][ \t]*\.""")
DEEPEST = 20
MOST_BYTES = 2**18  # of a config: twice what it takes to name every layer of SDXL
MOST_VALUES = 20_000
LINE_BREAKING = ("Cc", "Zl", "Zp")  # Unicode's categories of what breaks a line or drives a terminal
TAG = "tag:yaml.org,2002:"
NUMBERS = (f"{TAG}int", f"{TAG}float")
PLAIN = (*NUMBERS, *(f"{TAG}{kind}" for kind in ("null", "bool", "str", "seq", "map")))
# Read as 8 and 90 by YAML 1.1, as 10 and text by YAML 1.2.
AMBIGUOUS = re.compile(r"[-+]?(0[0-7_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")


class Loader(yaml.SafeLoader):
    """YAML with limits, where 1e-1 is a number, as everywhere but in YAML 1.1, and a key given twice is an error.

    Raises ValueError, RecursionError or yaml.YAMLError for all that is no plain value: of limited depth and size, what
    its aliases stand for counted each time, and no number that versions of YAML read differently.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = self.count = 0
        self.counts: dict[yaml.Node, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        before, alias = self.count, self.check_event(yaml.AliasEvent)
        self.depth += 1
        if self.depth > DEEPEST:
            raise RecursionError
        node: Any = super().compose_node(parent, index)
        self.depth -= 1
        if alias and node not in self.counts:  # inside what it stands for
            raise RecursionError
        self.count += self.counts[node] if alias else 1
        if self.count > MOST_VALUES:
            raise ValueError(f"holds more than {MOST_VALUES:,} values, with what its aliases stand for")
        self.counts.setdefault(node, self.count - before)
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        if node.tag not in PLAIN:
            text = repr(node.value) if isinstance(node, yaml.ScalarNode) else f"line {node.start_mark.line + 1}"
            raise ValueError(f"{text} is a {node.tag.removeprefix(TAG)}, which no key takes; put text in quotes")
        if node.tag in NUMBERS and len(node.value) > MOST_DIGITS:
            raise ValueError(f"a number has {len(node.value)} digits; write it shorter")
        if node.tag in NUMBERS and AMBIGUOUS.fullmatch(str(node.value)):
            raise ValueError(f"{node.value!r} is another number in YAML 1.1 than in 1.2; write it in base 10")
        try:
            return super().construct_object(node, deep)
        except (IndexError, KeyError, AttributeError, TypeError):  # PyYAML's own constructors on a tag that is given
            raise ValueError(f"{node.value!r} is no {node.tag.rpartition(':')[2]}") from None

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise ValueError(twice(key.value))
                seen.add(key.value)
        found = super().construct_mapping(node, deep)
        for key in found:
            if not isinstance(key, str):
                raise ValueError(f"key {key!r} is no word; put it in quotes")
        return found


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def twice(key: str) -> str:
    return f"key {key!r} is given twice; keep one"


def parse_yaml(text: str) -> Any:
    """The value of a YAML text; raises ValueError, RecursionError or yaml.YAMLError."""
    value = yaml.load(text, Loader)  # a SafeLoader
    check_tree(value)
    return value


def parse_json(text: str) -> Any:
    """The value of a JSON text, comments and trailing commas allowed; raises ValueError."""

    def blank(found: re.Match[str]) -> str:
        return found[1] or re.sub(r"[^\n]", " ", found[0])

    return json.loads(JSON_EXTRAS.sub(blank, text), object_pairs_hook=unique)


def parse_toml(text: str) -> Any:
    """The value of a TOML text; raises ValueError, or RecursionError for a key of too many parts (a.b.c ...)."""
    for run in TOML_KEYS.findall(text):
        if len(TOML_DOTS.findall(run)) > DEEPEST:
            raise RecursionError
    return tomllib.loads(text)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; raises ValueError for a key given twice."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(twice(key))
        found[key] = value
    return found


PARSERS: dict[str, Callable[[str], Any]] = {".toml": parse_toml, ".json": parse_json}


def read_mapping(path: Path) -> dict[str, Any]:
    """The keys and values in a config file; raises BadInput if there are none."""
    return parse_mapping(read_text(path, MOST_BYTES), path)


def parse_mapping(text: str, path: Path) -> dict[str, Any]:
    """The keys and values in a text, as the suffix of its path says; raises BadInput if there are none."""
    try:
        content = PARSERS.get(path.suffix.lower(), parse_yaml)(text)
        check_tree(content)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        kind = path.suffix.lstrip(".") or "YAML"
        raise BadInput(f"{path}: not valid {kind}: {reason_of(error)}") from None
    if content is None or content == {}:
        raise BadInput(f"{path}: is empty; it needs keys and values, 'model: DIRECTORY' first")
    if not isinstance(content, dict):
        raise BadInput(f"{path}: holds {type(content).__name__}, not keys and values")
    return content


def reason_of(error: Exception) -> str:
    """What a parser's error says, in one line."""
    return "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())


def check_tree(value: Any) -> None:
    """Raises ValueError for what no key of a config takes, RecursionError for a value nested too deeply."""
    for leaf in leaves_and_keys(value, DEEPEST):
        check_plain(leaf)
        if isinstance(leaf, str) and any(unicodedata.category(letter) in LINE_BREAKING for letter in leaf):
            raise ValueError(f"{leaf!r} holds a line break or another control character; remove it")


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
