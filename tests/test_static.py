"""Ruff on the checkout, mypy --strict on the installed wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def call(*command: str, cwd: Path, **env: str) -> None:
    result = subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_ruff_finds_nothing() -> None:
    call(sys.executable, "-m", "ruff", "check", ".", cwd=ROOT)
    call(sys.executable, "-m", "ruff", "format", "--check", ".", cwd=ROOT)


def test_mypy_strict_finds_nothing_in_the_wheel(tmp_path: Path) -> None:
    """The folder mapping of adapters/ and export/ exists only in an installed wheel."""
    pip = (sys.executable, "-m", "pip")
    source = tmp_path / "source"
    copy_checkout(source)
    call(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source), cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    call(*pip, "install", "-q", "--no-deps", "--target", str(tmp_path / "site"), str(wheel), cwd=tmp_path)
    options = ("--config-file", str(ROOT / "pyproject.toml"), "-p", "diffprune_plugin")
    call(sys.executable, "-m", "mypy", *options, cwd=tmp_path, MYPYPATH=str(tmp_path / "site"))


def copy_checkout(target: Path) -> None:
    """What goes into the wheel, copied, so that no build leftovers land in the checkout."""
    for name in ("diffprune_plugin", "adapters", "export"):
        shutil.copytree(ROOT / name, target / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
