"""An ONNX file in the place of a denoiser."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DOutput

from diffprune_plugin.errors import BadInput
from diffprune_plugin.export.feeds import check_multiple, input_names, multiples
from diffprune_plugin.export.integrity import check_files
from diffprune_plugin.export.ort_session import OrtSession, StandIn
from diffprune_plugin.export.timestep import AXIS


class ORTUNet(StandIn):
    """An ONNX file of ours as the ``model`` of a diffusers pipeline: ``DDIMPipeline(model=ORTUNet(path), ...)``.

    Raises BadInput for a damaged file, a device or dtype other than the session's, an argument that the graph lacks,
    or a size that it does not compute.
    """

    def __init__(
        self, path: str | Path, *, provider: str = "cpu", threads: int = 1, session: OrtSession | None = None
    ) -> None:
        facts = check_files(path)
        super().__init__(facts, session or OrtSession(Path(path), provider, threads))
        self.path = Path(path)
        self.facts, self.names = facts, input_names(facts)
        # Stable Diffusion XL reads this width from the module instead of the config.
        width = self.config.get("projection_class_embeddings_input_dim")
        self.__dict__["add_embedding"] = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))

    def forward(self, *values: Any, return_dict: bool = True, **named: Any) -> UNet2DOutput | tuple[torch.Tensor]:
        """The prediction, of the sample's shape, dtype and device; inputs in the graph's order or by name."""
        names = list(self.session.types)
        given = dict(zip(names, values, strict=False)) | flattened(named)
        given = {name: value for name, value in given.items() if value is not None}
        unknown, missing = sorted(set(given) - set(names)), sorted(set(names) - set(given))
        if unknown or missing or len(values) > len(names):
            raise BadInput(
                f"{self.path}: the graph takes {', '.join(names)}; "
                + "; ".join([*(f"it has no {name}" for name in unknown), *(f"{name} is missing" for name in missing)])
            )
        for word, step in multiples(self.facts).items():
            for size in sizes_of(word, self.shapes, given):
                check_multiple(self.path, word, size, step)
        sample, timestep = given[self.names["sample"]], given[self.names["timestep"]]
        rows = torch.as_tensor(timestep).reshape(-1)
        if self.shapes[self.names["timestep"]] != [AXIS]:  # files of before take one for each sample only
            rows = rows.expand(sample.shape[0])
        elif bool((rows == rows[0]).all()):  # as in sessions of fixed sizes, which take one
            rows = rows[:1]
        whole = self.session.types[self.names["timestep"]].kind != "f"
        if whole and rows.is_floating_point() and bool((rows != rows.round()).any()):
            raise BadInput(
                f"{self.path}: timestep {rows.tolist()[0]} is no whole number, and the graph takes those; use a "
                "scheduler that steps at them (DDIM, or timestep_spacing='leading')"
            )
        (output,) = self.run({**given, self.names["timestep"]: rows}).values()
        output = output.to(sample)
        return UNet2DOutput(sample=output) if return_dict else (output,)


def sizes_of(word: str, shapes: Mapping[str, list[str | int]], given: Mapping[str, torch.Tensor]) -> Iterator[int]:
    """The sizes that the inputs have on a dynamic axis."""
    return (given[name].shape[axes.index(word)] for name, axes in shapes.items() if word in axes)


def flattened(named: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, those inside dicts (added_cond_kwargs) too."""
    flat: dict[str, Any] = {}
    for name, value in named.items():
        flat |= value if isinstance(value, Mapping) else {name: value}
    return flat
