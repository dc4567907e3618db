"""Patterns of layers: an expression that would take for ever is one line."""

from __future__ import annotations

import pytest

from diffprune_plugin.errors import BadInput
from diffprune_plugin.graph import patterns
from diffprune_plugin.graph.patterns import matching

NAMES: dict[str, tuple[str, ...]] = {f"blocks.{i}.{'a' * 60}": () for i in range(100)}


@pytest.mark.parametrize("prefix", ["{re}", "{nncf}{re}"])
@pytest.mark.parametrize("expression", ["(.*.*.*)*X", "(a|a)*b", "(.+.+)+[!?]", "(x+x+)+y"])
def test_an_expression_with_repeats_inside_repeats_is_decided(prefix, expression) -> None:
    with pytest.raises(BadInput, match=r"matches no layer|takes more than"):
        matching(prefix + expression, NAMES, "ignored_layers")


def test_an_expression_that_takes_too_long_is_named(monkeypatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.0)
    long = {"a" * 5000: ()}
    with pytest.raises(BadInput, match=r"ignored_layers: '{re}.*' takes more than 0.0 s to match"):
        matching("{re}(.*.*.*)*[!?]", long, "ignored_layers")


@pytest.mark.parametrize("expression", ["(?:a{1000}){1000}", "(a{,99}){,200}", "a" * 10_001])
def test_an_expression_that_would_take_long_to_compile_is_named(expression) -> None:
    with pytest.raises(BadInput, match="is no valid expression for names of layers"):
        matching("{re}" + expression, NAMES, "ignored_layers")


def test_an_expression_means_what_it_means_to_re() -> None:
    assert matching(r"{re}blocks\.(?!1)\d{1}\..*", NAMES, "k") == [n for n in NAMES if n[8] == "." and n[7] != "1"]
