"""What an evaluation and an export's verdict add to a directory's model card, if they are of its model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffprune_plugin.errors import BadInput
from diffprune_plugin.planning.plan import PruningPlan, architecture_hash
from diffprune_plugin.pruning.building import foreign_errors
from diffprune_plugin.pruning.card import evaluation_lines, onnx_files, verdict_lines
from diffprune_plugin.pruning.directory import read_json
from diffprune_plugin.pruning.loading import bare, load_pipeline, model_of
from diffprune_plugin.utils.tensors import weights_hash

MANIFEST = ".manifest.json"  # beside a file of ONNX
CONFIG_HASH = "source_config_sha256"  # of a denoiser's provenance


def told_by_verdict(path: Path, directory: Path) -> list[str]:
    """The lines for a directory's card of a verdict's file; raises BadInput for a file that is none, or damaged, or of
    an export of another model: of other files of ONNX, else of another plan or config (not of other weights: a verdict
    does not tell what its were)."""
    found = read_json(path)
    if not isinstance(found.get("passed"), bool) or not found.keys() & {"verify", "parts", "failure"}:
        raise BadInput(f"{path}: no verdict of diffprune-export; give the .verdict.json beside the export")
    with foreign_errors(f"{path}: damaged"):
        if not (of_files if onnx_files(directory) else of_model)(found, directory):
            raise BadInput(f"{path}: it is of {found.get('model')}, another model than {directory}'s")
        return verdict_lines(found)


def of_files(verdict: Mapping[str, Any], directory: Path) -> bool:
    """Whether a verdict is of the ONNX files of a directory, as their manifests tell."""
    manifests = {path.parent.name: read_json(path)["files"] for path in directory.glob(f"*/*{MANIFEST}")}
    return manifests == {name: part["export"]["files"] for name, part in verdict.get("parts", {}).items()}


def of_model(verdict: Mapping[str, Any], directory: Path) -> bool:
    """Whether a verdict is of a model of a directory's plan and config; one that failed before an export tells none."""
    exports = [verdict.get("export", {}), *(part["export"] for part in verdict.get("parts", {}).values())]
    stated = [export["provenance"] for export in exports if CONFIG_HASH in export.get("provenance", {})]
    model = bare(directory)
    plan: PruningPlan | None = getattr(model, "pruning_plan", None)
    own = architecture_hash(model), plan.sha256 if plan else None
    return all((facts[CONFIG_HASH], facts.get("plan_sha256")) == own for facts in stated)


def told_by_evaluation(path: Path, directory: Path) -> list[str]:
    """The lines for a directory's card of an evaluation.json; raises BadInput for a file that is none, or damaged, or
    of a model with other weights. (Files of ONNX do not tell what their weights were.)"""
    found = read_json(path)
    if not isinstance(found.get("models"), Mapping) or not isinstance(found["models"].get("model"), Mapping):
        raise BadInput(f"{path}: no evaluation; give the directory that diffprune evaluate wrote")
    measured = found["models"]["model"]
    if not onnx_files(directory) and measured.get("weights") != weights_hash(model_of(load_pipeline(directory))):
        raise BadInput(f"{path}: it is of {measured.get('name')}, whose weights are others than {directory}'s")
    with foreign_errors(f"{path}: damaged"):
        return evaluation_lines(found)
