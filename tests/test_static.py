"""Ruff on the checkout, mypy --strict on the installed wheel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def test_ruff_finds_nothing(call: Any) -> None:
    call(sys.executable, "-m", "ruff", "check", ".", cwd=ROOT)
    call(sys.executable, "-m", "ruff", "format", "--check", ".", cwd=ROOT)


def test_mypy_strict_finds_nothing_in_the_wheel(site: Path, call: Any, tmp_path: Path) -> None:
    """The folder mapping of adapters/ and export/ exists only in an installed wheel."""
    options = ("--config-file", ROOT / "pyproject.toml", "-p", "diffprune_plugin")
    call(sys.executable, "-m", "mypy", *options, cwd=tmp_path, MYPYPATH=site)


@pytest.mark.slow
def test_a_suite_calls_what_another_one_has_with_the_arguments_that_it_takes() -> None:
    """Of what mypy says of the benchmarks, which are not held to its strictness, what would end a run."""
    options = ("--ignore-missing-imports", "--explicit-package-bases", "--follow-imports=silent")
    command = [sys.executable, "-m", "mypy", *options, "bench.py", "quality", "size", "shared", "making"]
    settings = {**os.environ, "MYPYPATH": f"{ROOT / 'benchmarks'}:{ROOT}"}
    found = subprocess.run(command, cwd=ROOT / "benchmarks", env=settings, capture_output=True, text=True).stdout
    assert "error:" in found, "it ran"
    assert [line for line in found.splitlines() if line.endswith(("[call-arg]", "[name-defined]"))] == []
