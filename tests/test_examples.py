"""The examples do what they show: the notebook's cells run, the action's steps pass and fail as their gates say."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from diffusers import DiffusionPipeline

import diffprune_plugin as dp
from diffprune_plugin import demo

ROOT = Path(__file__).parent.parent
ACTION = yaml.safe_load((ROOT / "examples" / "github-action.yml").read_text())
STEPS = ACTION["jobs"]["gate"]["steps"]


def executed(source: str, names: dict[str, Any]) -> Any:
    """What a cell shows: the value of its last line."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names) if isinstance(last, ast.Expr) else None


@pytest.mark.slow
def test_the_notebook_runs_and_its_model_shrinks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())["cells"]
    pictures: list[Any] = []
    names: dict[str, Any] = {"display": pictures.append}
    shown = [executed("".join(cell["source"]), names) for cell in cells if cell["cell_type"] == "code"]
    assert [picture.size for picture in pictures] == [(512, 64)] * 2
    assert shown[-1] < 0.5 * shown[0][0]
    assert sum(p.numel() for p in dp.load(tmp_path / "small").parameters()) == shown[-1]


def test_the_notebook_holds_no_outputs() -> None:
    cells = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


def run_steps(folder: Path, **env: str) -> list[tuple[str, int]]:
    """Name and exit code of each step with a command, installation aside; as on a runner, those after a failure are
    passed over unless they say always()."""
    bin_first = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    given = os.environ | ACTION["env"] | env | {"PATH": bin_first, "GITHUB_STEP_SUMMARY": str(folder / "summary.md")}
    done: list[tuple[str, int]] = []
    for step in STEPS:
        failed = any(code for _, code in done)
        if "run" in step and step["name"] != "install" and (not failed or step.get("if") == "always()"):
            command = ["bash", "-e", "-c", step["run"]]
            done.append((step["name"], subprocess.run(command, cwd=folder, env=given, capture_output=True).returncode))
    return done


@pytest.mark.slow
@pytest.mark.parametrize(("gate", "code"), [("0.5", 0), ("50", 1)])
def test_the_action_passes_and_fails_by_its_gate_and_keeps_the_verdict(tmp_path: Path, gate: str, code: int) -> None:
    pipeline = DiffusionPipeline.from_pretrained(demo.MODEL)
    dp.save(pipeline, tmp_path / "dense")
    dp.remove_(pipeline.unet, dp.make_plan(pipeline.unet, "magnitude", macs_target=0.3))
    dp.save(pipeline, tmp_path / "pruned")
    done = run_steps(tmp_path, MIN_SPEEDUP=gate, MAX_LATENCY_MS="100000")
    assert done == [
        ("what is in the directory", 0),
        ("export, prove, time", code),
        ("the table on the run's page", 0),
    ]
    kept = next(step["with"]["path"] for step in STEPS if "upload-artifact" in step.get("uses", ""))
    assert json.loads((tmp_path / kept).read_text())["passed"] is not bool(code)
    assert "pruned" in (tmp_path / "summary.md").read_text()


def test_the_images_share_one_installation_that_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    script = ROOT / "docker" / "install.sh"
    lines = (ROOT / "docker" / "Dockerfile").read_text().splitlines()
    assert [line for line in lines if "install.sh" in line] == [
        "RUN sh docker/install.sh cpu",
        "RUN sh docker/install.sh gpu",
    ]
    wrong = subprocess.run(["sh", script, "tpu"], cwd=tmp_path, capture_output=True, text=True)
    assert (wrong.returncode, wrong.stderr) == (2, "install.sh: tpu: give cpu or gpu\n")


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_what_the_images_install_is_declared(tmp_path: Path, kind: str) -> None:
    """The script with a pip that writes down its words, in a folder with the constraints."""
    (tmp_path / "constraints.txt").write_text((ROOT / "constraints.txt").read_text())
    for name, body in (("python3", 'echo "$@" >> words'), ("diffprune", "true")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["sh", ROOT / "docker" / "install.sh", kind], cwd=tmp_path, env=env, check=True)
    words = (tmp_path / "words").read_text().split()
    asked = words[-1].removeprefix(".[").rstrip("]").split(",")
    assert kind in asked
    assert set(asked) <= set(importlib.metadata.metadata("diffprune-plugin").get_all("Provides-Extra") or ())
    pinned = (tmp_path / words[words.index("-c") + 1]).read_text()
    assert ("torch==" in pinned.splitlines()[1]) == (kind == "cpu")
