"""Names of layers by pattern, as users write them in a config."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence

from diffprune_plugin.errors import BadInput, nearest


def matching(pattern: str, names: Sequence[str], key: str) -> list[str]:
    """The names that a pattern means: a layer, everything below a module, a glob, or ``{re}`` and an expression.

    Raises BadInput, naming the config key, if the pattern matches nothing or is no valid expression.
    """
    if pattern.startswith("{re}"):
        try:
            expression = re.compile(pattern[4:])
        except (re.error, OverflowError) as error:
            raise BadInput(f"{key}: {pattern!r} is no valid expression: {error}") from None
        found = [name for name in names if expression.fullmatch(name)]
    else:
        found = [n for n in names if n == pattern or n.startswith(f"{pattern}.") or fnmatch.fnmatchcase(n, pattern)]
    if not found:
        raise BadInput(f"{key}: {pattern!r} matches no layer{nearest(pattern, names)}")
    return found
