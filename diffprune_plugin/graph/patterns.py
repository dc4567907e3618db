"""Names of layers by pattern, as users write them in a config."""

from __future__ import annotations

import fnmatch
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import regex

from diffprune_plugin.errors import BadInput, nearest

STRIDED, FIRST = "{strided}", "{first}"
SECONDS = 2.0  # that one expression may take on all names of a model; it needs a thousandth
LONGEST = 10_000  # characters of an expression, and the repeats that it asks for, nested ones multiplied
# The operation that NNCF 2 names a layer's node after, by the layer's class.
OPERATIONS = {"Conv1d": "conv1d", "Conv2d": "conv2d", "ConvTranspose2d": "conv_transpose2d", "Linear": "linear"}


def layer_names(model: Any) -> dict[str, tuple[str, ...]]:
    """Every module's name, with what else a convolution or linear layer is called: see `also_called`; and ``{first}``
    for the first convolution."""
    modules = dict(model.named_modules())
    found = {name: also_called(name, modules) for name in modules if name}
    first = [name for name in found if type(modules[name]).__name__ == "Conv2d"][:1]
    return found | {name: (*found[name], FIRST) for name in first}


def around(name: str) -> list[str]:
    """The names of the modules around one, the innermost first; the model itself has the empty name."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts) - 1, -1, -1)]


def outermost(names: Iterable[str]) -> list[str]:
    """The names that lie inside no other, in their order."""
    found = dict.fromkeys(names)
    return [name for name in found if not any(each in found for each in around(name))]


def also_called(name: str, modules: Mapping[str, Any]) -> tuple[str, ...]:
    """A layer's name, NNCF 2's names of its node (wrapped and not), and ``{strided}`` if its stride is above 1."""
    kind = type(modules[name]).__name__
    if kind not in OPERATIONS:
        return ()
    scopes, parts = [type(modules[""]).__name__], name.split(".")
    for depth, part in enumerate(parts[:-1], 1):
        scopes.append(f"{type(modules['.'.join(parts[:depth])]).__name__}[{part}]")
    scope = "/".join(scopes)
    layer, node = f"{kind}[{parts[-1]}]", f"{OPERATIONS[kind]}_0"
    stride = max(getattr(modules[name], "stride", (1,)))
    names = (name, f"{scope}/{layer}", f"{scope}/{layer}/{node}", f"{scope}/NNCF{layer}/{node}")
    return (*names, STRIDED) if stride > 1 else names


def matching(pattern: str, names: Mapping[str, Iterable[str]], key: str) -> list[str]:
    """The names (of `layer_names`) that a pattern means.

    A layer, everything below a module, a glob, or ``{re}`` and an expression; ``{nncf}`` and a scope as NNCF 2 matches
    it with its names of convolutions and linear layers; ``{strided}``, those with a stride above 1, and ``{first}``,
    the first convolution, if there are any.

    Raises BadInput, naming the config key, if the pattern matches nothing, is no valid expression or takes too long.
    """
    if pattern in (STRIDED, FIRST):
        return [name for name, also in names.items() if pattern in also]
    if pattern.startswith("{nncf}"):
        fits = scope_test(pattern.removeprefix("{nncf}"), key)
        found = [name for name, also in names.items() if any(map(fits, also))]
    elif pattern.startswith("{re}"):
        fits = expression_test(pattern[4:], pattern, key, "fullmatch")
        found = [name for name in names if fits(name)]
    else:
        found = [n for n in names if n == pattern or n.startswith(f"{pattern}.") or fnmatch.fnmatchcase(n, pattern)]
    if not found:
        raise BadInput.of(key, pattern, f"matches no layer{nearest(pattern.removeprefix('{nncf}'), names)}")
    return found


def scope_test(scope: str, key: str) -> Callable[[str], Any]:
    """How NNCF 2 compares a scope with a node: equal, or with ``{re}`` found anywhere in its name."""
    if "{re}" in scope:
        return expression_test(scope.replace("{re}", ""), scope, key, "search")
    return scope.__eq__


def expression_test(expression: str, pattern: str, key: str, how: str) -> Callable[[str], Any]:
    """Whether an expression is found in a name, or ``fullmatch``es it.

    Raises BadInput, naming the config key, for what is no valid expression; the test, if all its names together take
    longer than `SECONDS`: as many as 2 ** length ways to match are tried in turn.
    """
    test, left = getattr(compiled(expression, pattern, key), how), SECONDS

    def fits(name: str) -> Any:
        nonlocal left
        start = time.monotonic()
        try:
            return test(name, timeout=max(left, 0.001))
        except (TimeoutError, MemoryError):
            reason = f"takes more than {SECONDS} s to match, on {name!r}; write it without a repeat inside a repeat"
            raise BadInput.of(key, pattern, reason) from None
        finally:
            left -= time.monotonic() - start

    return fits


def compiled(expression: str, pattern: str, key: str) -> Any:
    """A pattern of the package ``regex``, which diffusers needs too: it reads what ``re`` does, and has a time limit.

    Raises BadInput, naming the config key, for what is no valid expression, or is too long or repeats too much.
    """
    counts = [int(count) for count in re.findall(r"\d{1,9}(?=[\d,]*\})", expression)]
    if len(expression) > LONGEST or math.prod(filter(None, counts)) > LONGEST:
        reason = f"is no valid expression for names of layers: longer than {LONGEST:,}, or repeated more often"
        raise BadInput.of(key, pattern, reason)
    try:
        return regex.compile(expression)
    except (regex.error, OverflowError, RecursionError) as error:
        raise BadInput.of(key, pattern, f"is no valid expression: {error}") from None
