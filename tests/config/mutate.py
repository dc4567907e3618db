"""Configs of every dialect, damaged at random: the same dialect and seed give the same bytes."""

from __future__ import annotations

import copy
import json
import math
import random
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).parents[1] / "configs"
NATIVE = {
    "model": "m",
    "importance": {"name": "diff_taylor", "threshold": 0.05, "samples": 8},
    "pruning_ratio": 0.3,
    "pruning_ratio_dict": {"conv_in": 0.1},
    "ignored_layers": ["conv_out", "{re}.*mid.*"],
    "round_to": 8,
    "batch_size": 4,
    "seed": 1,
    "device": "cpu",
    "data": "images",
}
KWARGS = yaml.safe_load((CONFIGS / "torch_pruning.yaml").read_text()) | {
    "pruning_ratio_dict": {"mid_block": 0.2},
    "max_pruning_ratio": 0.9,
    "prune_num_heads": True,
    "head_pruning_ratio": 0.5,
}
NNCF = json.loads((CONFIGS / "nncf_filter_pruning.json").read_text())
FLAGS = {"--pruner": "diff-pruning", "--pruning_ratio": 0.3, "--thr": 0.05, "--batch_size": 64, "--seed": 3}
FLAGS |= {"--dataset": "images", "--model_path": "m", "--save_path": "o", "--device": "cpu"}


def to_toml(value: Any, inner: bool = False) -> str:
    """A tree as TOML; what TOML lacks (null) is written all the same."""
    if isinstance(value, dict):
        pairs = [f"{json.dumps(str(key))} = {to_toml(item, True)}" for key, item in value.items()]
        return "{" + ", ".join(pairs) + "}" if inner else "\n".join(pairs)
    if isinstance(value, list):
        return f"[{', '.join(to_toml(item, True) for item in value)}]"
    return str(value).lower() if isinstance(value, float) and not math.isfinite(value) else json.dumps(value)


def to_flags(value: Any) -> str:
    pairs = value.items() if isinstance(value, dict) else [("--x", value)]
    return " ".join(f"{key}{'=' if i % 3 == 0 else ' '}{shlex.quote(str(item))}" for i, (key, item) in enumerate(pairs))


def to_yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False)


# Dialect: suffix, how it is written, and a config that is right.
DIALECTS: dict[str, tuple[str, Callable[[Any], str], dict[str, Any]]] = {
    "native yaml": (".yaml", to_yaml, NATIVE),
    "native json": (".json", json.dumps, NATIVE),
    "native toml": (".toml", to_toml, NATIVE),
    "torch-pruning": (".yaml", to_yaml, KWARGS),
    "nncf": (".json", json.dumps, NNCF),
    "flags": (".txt", to_flags, FLAGS),
}


def nested(depth: int, innermost: Any = 0) -> Any:
    return [nested(depth - 1, innermost)] if depth else innermost


VALUES = [
    *(None, True, False, "", " ", "x", "0.3", "cuda:99999999999999999999", -1, 0, 1, 2**31, 2**63, 10**30, 10**400),
    *(0.5, 1e308, 5e-324, -0.0, math.inf, -math.inf, math.nan, [], {}, [[]], {"": 1}, ["a", 1], {"name": []}),
    *("x\0y", "\x1b[31mred", "a\nb", "\ud800", "é", "\u202e", "x" * 5000, "../../x", "/dev/zero", "~", "$1", "--thr"),
    *("{re}(.*.*.*)*X", "{re}[", "{re}" + "(" * 2000, "{re}a{99999999999}", "{nncf}{re}(a|a)*b", "{strided}"),
    *({"name": "diff_taylor", "samples": "8"}, {"name": "diff_taylor", "smaples": 8}),
    *({"name": "magnitude", "p": 10**30}, {"name": "random", "seed": 0.5}, {"name": "filter_norm", "norm": []}),
    *({"name": "taylor", "threshold": 0.1}, "*" * 50),
    *(nested(30), nested(300), [0] * 3000, {str(i): i for i in range(1000)}),
]
KEYS = ["", " ", "x", "pruning_ratio", "importance", "seed", "compression", "--sparsity", "a.b", "é", "k\n", "<<"]
KEYS += ["k" * 3000]
# Put into the text where a value was: what a tree cannot say.
RAW = [
    *('!!int ""', '!!float ""', "!!bool maybe", "!!timestamp x", "!!null x", "!!binary '?'", "!!binary aGk=", "!x y"),
    *("!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", '!!python/object/apply:os.system ["true"]', "!!str"),
    *("!!map []", "9" * 5000, "0x" + "f" * 5000, "0b" + "1" * 9000, "-" + "9" * 5000, "1" + ":1" * 4000),
    *("1" + ":1" * 40 + ".5", "1e999", "010", "0o17", "08", "1_000", "1:30", "2001-01-01", "12:30:00", ".5", "5.", "~"),
    *("2001-01-01T00:00:00Z", "+.inf", "on", "[" * 5000, '{"a":' * 5000, "[" * 5000 + "]" * 5000, "- " * 3000, "*x"),
    *("&x 1", "&x [*x]", "{<<: *x}", "? a", "%", "@", "'" * 3, '"""', "|", ">", "NaN", "Infinity", "-Infinity"),
    *("0.30000000000000000000000000000001", "1" * 4400 + ".5"),
]
BOMB = "".join(f"b{i}: &b{i} [{', '.join([f'*b{i - 1}' if i else '0'] * 10)}]\n" for i in range(12))
MERGES = "".join(f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 10 if i else [])}]}}\n" for i in range(9))
ADDED = [
    *(BOMB, MERGES, "/*" * 30000, '"' + '\\"' * 30000, "[" * 60000, '"' * 60001, " " * 99999, "\n" * 99999),
    *("- a\n" * 20000, "a.b." * 10000 + "c = 1", "a: {" * 3000, "? " * 5000, "--x " * 20000, "\\\n" * 20000),
    *("'" + "x" * 100000, "#" * 99999, "\0", "\x1b]0;x\x07", "---\na: 1\n", "...\n", "%YAML 9.9\n---\n"),
    *("python ddpm_prune.py --thr 0.1\n", "$(id)", "`id`"),
]
ENCODINGS = ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "latin-1", "cp500", "utf-7"]


def mutated(dialect: str, seed: int) -> tuple[str, bytes]:
    """The suffix and the bytes of one damaged config."""
    draw = random.Random(f"{dialect} {seed}")
    suffix, write, right = DIALECTS[dialect]
    content = copy.deepcopy(right)
    raw = {}
    for i in range(draw.randint(1, 3)):
        if change(draw, content, f"RAW{i}RAW"):
            raw[f"RAW{i}RAW"] = draw.choice(RAW)
    text = write(content)
    for word, value in raw.items():
        for quoted in (f'"{word}"', word):
            text = text.replace(quoted, value)
    for _ in range(draw.choice((0, 0, 0, 1, 1, 2))):
        text = damage(draw, text)
    data = text.encode(errors="surrogatepass")
    if draw.random() < 0.1:
        data = text.encode(draw.choice(ENCODINGS), errors="replace")
    for _ in range(draw.choice((0,) * 9 + (1, 3))):
        place = draw.randrange(len(data) + 1)
        data = data[:place] + bytes([draw.randrange(256)]) + data[place + 1 :]
    return suffix, data


def change(draw: random.Random, content: dict[str, Any], word: str) -> bool:
    """One change of a tree; whether ``word`` now stands there for a raw value."""
    container, key = draw.choice(places(content) or [(content, "model")])
    what = draw.choice(("value", "value", "raw", "raw", "rename", "remove", "add"))
    if what == "value":
        container[key] = copy.deepcopy(draw.choice(VALUES))
    elif what == "raw":
        container[key] = word
    elif what == "remove":
        del container[key]
    elif isinstance(container, dict):
        value = container.pop(key) if what == "rename" else copy.deepcopy(draw.choice(VALUES))
        container[draw.choice(KEYS)] = value
    return what == "raw"


def places(content: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a tree."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [place for key, value in items for place in ((content, key), *places(value))][:200]


def damage(draw: random.Random, text: str) -> str:
    """One change of a text."""
    start, end = sorted(draw.randrange(len(text) + 1) for _ in range(2))
    lines = text.splitlines(keepends=True) or [""]
    what = draw.randrange(6)
    if what == 0:
        return text[:start]
    if what == 1:
        return text[:start] + text[min(end, start + 9) :]
    if what == 2:
        return text[:start] + draw.choice("{}[]:,\"'-#/*&!|>%@\\\n\t \0\x07=<é\u2028") + text[start:]
    if what == 3:
        return "".join(draw.sample(lines, len(lines)))
    if what == 4:
        return text + "\n" + draw.choice(lines)
    added = draw.choice(ADDED)
    return added + text if draw.random() < 0.5 else f"{text}\n{added}"
