"""Damaged configs of every dialect: each is taken, and shows in what `diffprune config` prints, or one line."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mutate import DIALECTS, mutated

from diffprune_plugin.config.dialects import shell, translate, translated
from diffprune_plugin.config.dialects.flags import translate as translate_flags
from diffprune_plugin.config.documents import MOST_BYTES, leaves, parse_mapping
from diffprune_plugin.errors import BadInput
from diffprune_plugin.plugins import criteria, plugin_manager
from diffprune_plugin.utils.reading import read_text

KNOWN = tuple(criteria(plugin_manager()))
HANG = 60  # seconds after which a config is said to hang; it needs some hundredths


@pytest.fixture
def watchdog() -> Iterator[list[str]]:
    """Ends the test, with the name in the list, if nothing happens to the list for too long."""
    now: list[str] = []

    def bark(*_: object) -> None:
        pytest.fail(f"hangs: {now[-1]}")

    before = signal.signal(signal.SIGALRM, bark)
    yield now
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def shown(path: Path) -> dict[str, Any]:
    """What `diffprune config --json` prints of a config."""
    text = read_text(path, MOST_BYTES)
    if shell.recognises(text):
        content, listing = None, translate_flags(text, str(path))
    else:
        content = parse_mapping(text, path)
        listing = translate(content, str(path), KNOWN)
    translated(listing)
    found: dict[str, Any] = json.loads(json.dumps(listing.as_dict()))
    rows = [row["key"] for row in found["keys"]]
    for leaf in leaves(content) if content else ():
        assert any(f"{leaf}.".startswith((f"{key}.", f"{key}[")) or key.startswith(leaf) for key in rows), leaf
    return found


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_damaged_config_is_shown_or_refused_in_one_line(dialect, watchdog, tmp_path) -> None:
    refusals = []
    for seed in range(300):
        watchdog.append(f"mutated({dialect!r}, {seed})")
        signal.alarm(HANG)
        suffix, data = mutated(dialect, seed)
        path = tmp_path / f"c{suffix}"
        path.write_bytes(data)
        try:
            shown(path)
        except BadInput as error:
            refusals.append(str(error))
        except Exception as error:
            raise AssertionError(watchdog[-1]) from error
    assert [line for line in refusals if "\n" in line or not line.startswith(f"{path}: ")] == []
    assert 200 < len(refusals) < 295  # or they are damaged too little, or too much


def test_the_same_seed_gives_the_same_bytes() -> None:
    assert all(mutated(dialect, 7) == mutated(dialect, 7) != mutated(dialect, 8) for dialect in DIALECTS)
