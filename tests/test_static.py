"""Ruff on the checkout, mypy --strict on the installed wheel."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def test_ruff_finds_nothing(call: Any) -> None:
    call(sys.executable, "-m", "ruff", "check", ".", cwd=ROOT)
    call(sys.executable, "-m", "ruff", "format", "--check", ".", cwd=ROOT)


def test_mypy_strict_finds_nothing_in_the_wheel(site: Path, call: Any, tmp_path: Path) -> None:
    """The folder mapping of adapters/ and export/ exists only in an installed wheel."""
    options = ("--config-file", ROOT / "pyproject.toml", "-p", "diffprune_plugin")
    call(sys.executable, "-m", "mypy", *options, cwd=tmp_path, MYPYPATH=site)
