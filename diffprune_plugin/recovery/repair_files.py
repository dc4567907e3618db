"""The repairs of a compensation on disk, one file each, so that an interrupted one goes on to identical bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from diffprune_plugin.errors import BadInput
from diffprune_plugin.recovery.ridge import Repair, System
from diffprune_plugin.utils.files import new_file
from diffprune_plugin.utils.hashes import json_hash
from diffprune_plugin.utils.tensors import load_tensors, save_tensors


class RepairFiles:
    """The files of a run of these ``facts``; those of another are never taken up."""

    def __init__(self, directory: Path, facts: Any) -> None:
        self.digest = json_hash(facts)
        self.folder = directory / f"compensate-{self.digest[:16]}"

    def file(self, number: int) -> Path:
        return self.folder / f"{number:04d}.safetensors"

    def of(self, number: int, system: System) -> str:
        """What a file says that it is of."""
        parts = [[part.name, part.first, part.last] for part in system.parts]
        return json.dumps([self.digest, number, system.block, parts])

    def add(self, number: int, system: System, repair: Repair) -> None:
        """Store the layers of a system as the repair left them."""
        tensors = {f"{part.name}.{key}": value for part in system.parts for key, value in part.layer.named_parameters()}
        with new_file(self.file(number)) as path:
            save_tensors(tensors, path, {"repair": json.dumps(asdict(repair)), "of": self.of(number, system)})

    def take_up(self, model: nn.Module, systems: Sequence[System]) -> list[Repair]:
        """Put the stored layers into the model; the repairs so far.

        Raises BadInput for a file that is damaged, or of another system or run.
        """
        repairs: list[Repair] = []
        for number, system in enumerate(systems):
            file = self.file(number)
            if not file.exists():
                break
            tensors, metadata = load_tensors(file, bound=True)
            if metadata["of"] != self.of(number, system):
                raise BadInput(f"{file}: of another layer or another run than its name says; remove {self.folder}")
            model.load_state_dict(tensors, strict=False)
            stored = json.loads(metadata["repair"])
            repairs.append(Repair(**{**stored, "layers": tuple(stored["layers"])}))
        return repairs

    def forget(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
