"""A module as an ONNX graph, and the graph as a file: what every part of a pipeline has in common."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffprune_plugin.errors import BadInput, first_line
from diffprune_plugin.export.integrity import PREFIX, Files, new_model

INLINE_LIMIT = 1_500_000_000  # bytes of weights; a protobuf ends at 2 GiB
PACKAGES = ("diffprune-plugin", "torch", "diffusers", "onnx", "onnxscript")


def exported(
    module: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    axes: Sequence[Mapping[int, str]],
    outputs: Sequence[str],
    opset: int,
    what: str,
) -> Any:
    """A module of tensors in a row as an ONNX program; ``axes``: of each input the dynamic ones by position.

    Raises BadInput, with ``what`` it is, where torch cannot export it.
    """
    with quiet():
        try:
            return torch.onnx.export(
                module.eval(),
                tuple(inputs.values()),
                dynamo=True,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=(tuple(dict(each) for each in axes),),
                opset_version=opset,
                verbose=False,
            )
        except (torch.onnx.OnnxExporterError, RuntimeError) as error:
            cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
            words = list(dict.fromkeys(word for each in axes for word in each.values()))
            remedy = f"; leave {', '.join(words)} fixed" if len(words) > 1 else ""
            raise BadInput(f"{what}: torch cannot export it: {first_line(cause)}{remedy}") from error


def written(
    program: Any,
    path: Path,
    model: nn.Module,
    facts: Mapping[str, Any],
    *,
    overwrite: bool = False,
    external: bool | None = None,
    notes: Mapping[str, Any] | None = None,
) -> tuple[dict[str, str], int, Files]:
    """Put a program, without the exporter's own metadata and with these facts, in its place.

    Returns the facts as written, the number of nodes, and the files.
    """
    files: Files = {}
    strip_(program.model)
    program.model.producer_name, program.model.producer_version = "diffprune", facts["versions"]["diffprune-plugin"]
    texts = {k: v if isinstance(v, str) else json.dumps(v, sort_keys=True) for k, v in facts.items()}
    program.model.metadata_props.update({PREFIX + key: texts[key] for key in sorted(texts)})
    with new_model(path, overwrite, notes or {}, files) as temporary:
        save(program.model, temporary, model, external, texts)
    return texts, sum(1 for _ in program.model.graph.all_nodes()), files


def versions() -> dict[str, str]:
    """Of PACKAGES; torch's own says which build it is (+cu130), which an index may leave out."""
    return {name: importlib.metadata.version(name) for name in PACKAGES} | {"torch": torch.__version__}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's advice to its own developers off the user's screen."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.utils._sympy.interp")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def strip_(model: Any) -> None:
    """Remove the exporter's debug metadata: nine tenths of the file, with the absolute paths of its sources."""
    graph = model.graph
    nodes = list(graph.all_nodes())
    values = [*graph.inputs, *graph.outputs, *graph.initializers.values(), *(v for n in nodes for v in n.outputs)]
    for holder in (model, graph, *nodes, *values):
        holder.metadata_props.clear()
        holder.doc_string = None


def save(graph: Any, path: Path, model: nn.Module, external: bool | None, facts: Mapping[str, str]) -> None:
    """Write the graph, its weights inside or, past the limit, in one file named by what it was made from."""
    import onnx_ir

    if external is None:
        external = sum(p.numel() * p.element_size() for p in model.parameters()) > INLINE_LIMIT
    # A name of its own, so that overwriting never touches the data of the old model.
    name = f"{path.stem}.{content_hash(model, facts)[:12]}.data" if external else None
    onnx_ir.save(graph, path, external_data=name)


def content_hash(model: nn.Module, facts: Mapping[str, str]) -> str:
    """SHA-256 of the weights and the options of the export."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())  # a view needs a dim
    return digest.hexdigest()
