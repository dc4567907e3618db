"""The timestep of an exported graph, as clients feed it: one for the whole batch, or one for each sample."""

from __future__ import annotations

from typing import Any

from diffprune_plugin.adapters.ports import config_of
from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.errors import BadInput, nearest

AXIS = "steps"  # its axis in the graph, as optimum-onnx calls it: of length 1, or the batch
KINDS = ("int64", "float32")


def check_kind(kind: str, model: Any, adapter: ModelAdapter) -> None:
    """Raises BadInput for a type that is not known, or reals for a model that takes whole numbers only."""
    if kind not in KINDS:
        raise BadInput(f"--timestep {kind!r}{nearest(kind, KINDS)}: not one of {', '.join(KINDS)}")
    if kind == "float32" and not adapter.real_timesteps(config_of(model)):
        raise BadInput(f"--timestep float32: this {adapter.model_class} takes whole timesteps only; leave it out")


def loosen_(program: Any, sample: str, timestep: str) -> None:
    """Give a graph (onnx_ir) whose timestep has the batch's length an input that may also have length 1.

    ONNX's Expand repeats a single one and refuses any other length. PyTorch's own expand would tie it to the batch.
    """
    import onnx_ir as ir

    graph = program.graph
    inputs = {value.name: value for value in graph.inputs}
    rows = inputs[timestep]
    given = ir.Value(name=timestep, shape=ir.Shape([AXIS]), type=rows.type)
    graph.inputs[graph.inputs.index(rows)] = given
    batch = ir.node("Shape", [inputs[sample]], {"start": 0, "end": 1}, name=f"{timestep}_batch")
    expanded = ir.node("Expand", [given, batch.outputs[0]], name=f"{timestep}_expand")
    batch.outputs[0].name, expanded.outputs[0].name = f"{timestep}_batch", f"{timestep}_rows"
    expanded.outputs[0].shape, expanded.outputs[0].type = rows.shape, rows.type
    ir.convenience.replace_all_uses_with(rows, expanded.outputs[0])
    graph.insert_before(graph[0], [batch, expanded])
