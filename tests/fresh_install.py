"""A wheel in a fresh environment with one extra prunes the embedded model: python fresh_install.py WHEEL EXTRA."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

PRUNE = """
import importlib.resources, json, pathlib, sys
import diffprune_plugin as dp
from diffusers import DiffusionPipeline

model = importlib.resources.files("diffprune_plugin.demo") / "model"
pipeline = DiffusionPipeline.from_pretrained(model)
plan = dp.make_plan(pipeline.unet, "magnitude", pruning_ratio=0.3)
dp.remove_(pipeline.unet, plan)
dp.save(pipeline, "small")
assert sum(p.numel() for p in dp.load("small").parameters()) == plan.params[1]
print(json.dumps({"params": plan.params, "plan": plan.sha256[:12], "python": sys.version.split()[0]}))
"""


def main(wheel: str, extra: str) -> None:
    """Raises CalledProcessError where the installation or the pruning fails."""
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder, "bin", "python")
        venv.create(folder, with_pip=True)
        wanted = Path(wheel).resolve().as_posix() + ("" if extra == "none" else f"[{extra}]")
        constraints = Path(__file__).parent.parent / "constraints.txt"
        subprocess.run([python, "-m", "pip", "install", "-q", "-c", constraints, wanted], check=True)
        for command in ([python, "-c", PRUNE], [python, "-m", "diffprune_plugin", "inspect", "small"]):
            subprocess.run(command, check=True, cwd=folder)
    print(f"{extra}: ok")


if __name__ == "__main__":
    main(*sys.argv[1:])
