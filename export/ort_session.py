"""A session that takes and gives tensors by name, and what stands in a pipeline for the model that it computes."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from torch import nn

from diffprune_plugin.errors import BadInput, CheckFailed, first_line
from diffprune_plugin.export.feeds import input_shapes, input_types
from diffprune_plugin.export.precision import DTYPES
from diffprune_plugin.export.providers import known_provider, open_session
from diffprune_plugin.utils.out_of_memory import out_of_memory

Tensors = dict[str, torch.Tensor]


class RunFailed(CheckFailed):
    """ONNX Runtime does not compute the graph for these inputs (exit code 1)."""


class OrtSession:
    """An ONNX file of ours, called with tensors by name; gives float32 tensors by name.

    ``session``: an open one, instead of a new one. ``seconds``: spent in it so far. Raises RunFailed for inputs that it
    refuses.
    """

    def __init__(
        self, path: Path, provider: str = "cpu", threads: int = 1, session: Any = None, arena: bool = True
    ) -> None:
        self.path, self.types, self.provider, self.seconds = path, input_types(path), provider, 0.0
        self.session = session or open_session(path, provider, threads=threads, arena=arena)
        self.names = [output.name for output in self.session.get_outputs()]

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> Tensors:
        feeds = {name: inputs[name].detach().cpu().numpy().astype(kind) for name, kind in self.types.items()}
        start = time.perf_counter()
        try:
            found = self.session.run(None, feeds)
        except Exception as error:
            if out_of_memory(error):
                raise
            raise RunFailed(first_line(error)) from error
        self.seconds += time.perf_counter() - start
        return {name: torch.from_numpy(value).float() for name, value in zip(self.names, found, strict=True)}


class StandIn(nn.Module):
    """What diffusers' pipelines read from a model besides its outputs: config, dtype, device."""

    def __init__(self, facts: Mapping[str, str], session: OrtSession) -> None:
        super().__init__()
        self.session, self.shapes = session, input_shapes(session.path)
        self.config = FrozenDict(json.loads(facts["config"]))
        self.dtype = DTYPES[facts["dtype"]]
        self.device = torch.device("cpu")

    def run(self, inputs: Mapping[str, torch.Tensor]) -> Tensors:
        """What the session gives; raises BadInput for inputs of other sizes than the file computes."""
        for name, axes in self.shapes.items():
            given = list(inputs[name].shape)
            if len(given) != len(axes) or any(isinstance(a, int) and a != b for a, b in zip(axes, given, strict=True)):
                raise BadInput(
                    f"{self.session.path}: {name} is {given}, and the file computes {axes}; export again with more of "
                    "batch, height, width, sequence in --dynamic"
                )
        return self.session(inputs)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """An empty one of the file's dtype, which is what pipelines ask parameters for."""
        yield nn.Parameter(torch.empty(0, dtype=self.dtype), requires_grad=False)

    def cache_context(self, _: str) -> contextlib.AbstractContextManager[None]:
        """Of diffusers' caches, which a file has none of; FLUX's pipelines enter it at every step."""
        return contextlib.nullcontext()

    def to(self, *args: Any, **kwargs: Any) -> StandIn:
        """Itself: a session stays where it was opened. Raises BadInput for another device or dtype than its own."""
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        if (device or self.device).type != self.device.type or (dtype or self.dtype) != self.dtype:
            raise BadInput(
                f"{type(self).__name__} runs as {self.dtype} on {known_provider(self.session.provider).name}; "
                "give it another provider, or export with another --dtype, instead of .to()"
            )
        return self
