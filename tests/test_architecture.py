"""Imports point one way: a file imports only what stands before it in this list."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
ORDER = [
    "errors",
    "program",
    "files",
    "progress",
    "documents",
    "tensors",
    "patterns",
    "schedules",
    "hookspecs",
    "config",
    "timesteps",
    "criteria",
    "adapters.table",
    "adapters.*",
    "adapters",
    "plugins",
    "dialects.table",
    "dialects.*",
    "dialects",
    "data",
    "encoding",
    "passes",
    "draws",
    "processes",
    "kept",
    "groups",
    "permute",
    "plan",
    "selection",
    "planning",
    "calibration",
    "objective",
    "calibrating",
    "checkpoint",
    "removal",
    "history",
    "pruner",
    "masking",
    "mask_schedule",
    "ridge",
    "residual",
    "compensate",
    "report",
    "prompts",
    "sample",
    "drawing",
    "workflow",
    "distillation",
    "training",
    "finetune",
    "export.*",
    "export",
    "features",
    "evaluation",
    "evaluate",
    "check",
    "hosts",
    "hosts.*",
    "demo",
    "cli",
    "launched",
    "prune",
]


def rank(module: str) -> int:
    if module in ORDER:
        return ORDER.index(module)
    return ORDER.index(f"{module.split('.')[0]}.*")


def imports_of(path: Path) -> list[str]:
    """What a file imports from the project at its top level (not inside functions or for type checking)."""
    found = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("diffprune_plugin"):
            module = node.module.removeprefix("diffprune_plugin").lstrip(".")
            found += [module] if module else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names if a.name.startswith("diffprune_plugin.")]
            found += [name.removeprefix("diffprune_plugin.") for name in names]
    return found


def modules() -> dict[str, Path]:
    files = {}
    for folder, prefix in (("diffprune_plugin", ""), ("adapters", "adapters."), ("export", "export.")):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = (prefix + ".".join(parts)).removesuffix("__init__").rstrip(".")
            if name:
                files[name] = path
    return files


def test_imports_point_one_way() -> None:
    upward = []
    for name, path in modules().items():
        for imported in imports_of(path):
            same_family = rank(imported) == rank(name) and "." in name
            if rank(imported) >= rank(name) and not same_family:
                upward.append(f"{name} imports {imported}")
    assert not upward


def test_nothing_writes_or_reads_a_pickle() -> None:
    for path in [*modules().values(), *(ROOT / "benchmarks").glob("*.py")]:
        text = path.read_text()
        for word in ("import pickle", "torch.save(", "torch.load(", "weights_only=False", "allow_pickle=True"):
            assert word not in text, f"{path}: {word}"
