"""From a denoiser to an ONNX file that says where it came from."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffprune_plugin.adapters.ports import config_of
from diffprune_plugin.adapters.table import ModelAdapter
from diffprune_plugin.diffusion.inputs import check_time_table
from diffprune_plugin.errors import BadInput, nearest
from diffprune_plugin.export.fusion import check_fuse, fused, own_operators
from diffprune_plugin.export.graphs import exported, versions, written
from diffprune_plugin.export.integrity import Files, check_output
from diffprune_plugin.export.patches import exportable
from diffprune_plugin.export.precision import DTYPES, mixed
from diffprune_plugin.export.scheduler import scheduler_of
from diffprune_plugin.export.timestep import AXIS, check_kind, loosen_
from diffprune_plugin.graph.costs import meta_copy, total_macs
from diffprune_plugin.planning.plan import architecture_hash
from diffprune_plugin.plugins import denoiser_of, find_adapter
from diffprune_plugin.pruning.loading import load
from diffprune_plugin.utils.optional import need

OPSETS = range(18, 25)  # what torch's exporter writes; past 20 GroupNormalization has no kernel and is slower
# By ONNX Runtime's table of kernels: Conv's opset 22 is the first in bf16, and the norms have no kernel past opset 20.
NO_BF16 = " (no provider has kernels for a whole UNet in it)"
IMAGE = ("height", "width")  # axes that a model halves on its way down


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote: its files with sizes and hashes, nodes in the graph, seconds, provenance."""

    path: Path
    files: Files
    nodes: int
    seconds: float
    provenance: dict[str, str]


class Flat(nn.Module):
    """A model with its inputs in a row and one tensor out: what the graph's names and order come from."""

    def __init__(self, model: nn.Module, adapter: ModelAdapter) -> None:
        super().__init__()
        self.model = model
        self.adapter = adapter
        self.names = tuple(port.name for port in adapter.ports(model))

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        return self.adapter.denoise(self.model, dict(zip(self.names, values, strict=True)))


def to_onnx(
    model: nn.Module | str | Path,
    path: str | Path,
    *,
    opset: int = 20,
    dynamic: Sequence[str] = ("batch",),
    dtype: str = "fp32",
    keep_fp32: Sequence[str] = (),
    fuse: str = "",
    timestep: str = "int64",
    overwrite: bool = False,
    external_data: bool | None = None,
    adapter: ModelAdapter | None = None,
) -> ExportReport:
    """Write a model, dense or pruned, live or from a pipeline or model directory, as an ONNX file with its manifest.

    ``dynamic`` names the axes left open; the others have the config's size. ``external_data``: weights in one file of
    their own (None: where they would not fit a protobuf). ``timestep``: its type, float32 for samplers that step
    between whole ones; its length is 1 or the batch's. ``keep_fp32``: patterns of layers that stay in fp32 where the
    others do not. ``fuse``: a provider, cpu or cuda, whose fused operators the file gets. The same input gives the same
    bytes.

    Raises BadInput for what cannot be exported or written; nothing is half-written.
    """
    start, path = time.perf_counter(), Path(path)
    check_output(path, overwrite)
    check_options(opset, dtype, keep_fp32)
    need("onnx")
    need("onnxscript")
    live, kept = mixed(model_in(model), dtype, keep_fp32) if keep_fp32 else (model_in(model, dtype), [])
    adapter = adapter or find_adapter(live)
    check_dynamic(live, adapter, dynamic)
    check_kind(timestep, live, adapter)
    if (scheduler := scheduler_of(model)) is not None:
        check_time_table(live, adapter, scheduler)
    multiples = allowed_multiples(live, adapter, dynamic)
    size = irregular_size(live, adapter, multiples)
    program = traced(live, adapter, opset, tuple(dynamic), size, timestep, dtype)
    options: dict[str, Any] = {"keep_fp32": kept} if kept else {}
    options |= {"opset": str(opset), "dtype": dtype, "dynamic": ",".join(dynamic), "multiples": multiples}
    facts = provenance(live, adapter, options)
    if "batch" in dynamic:
        loosen_(program.model, adapter.sample, adapter.timestep)
    if fuse:
        program.model = fused(program.model, check_fuse(fuse))
        facts["fused"] = own_operators(program.model)
    notes = {"multiples": multiples} if multiples else {}
    texts, nodes, files = written(program, path, live, facts, overwrite=overwrite, external=external_data, notes=notes)
    return ExportReport(path, files, nodes, time.perf_counter() - start, texts)


def check_options(opset: int, dtype: str, keep_fp32: Sequence[str] = ()) -> None:
    if opset not in OPSETS:
        raise BadInput(f"--opset {opset}: not one of {OPSETS[0]} to {OPSETS[-1]}; 20 runs fastest")
    if dtype not in DTYPES:
        why = NO_BF16 if dtype == "bf16" else nearest(dtype, DTYPES)
        raise BadInput(f"--dtype {dtype!r}{why}: not one of {', '.join(DTYPES)}")
    if keep_fp32 and dtype == "fp32":
        raise BadInput(f"--keep-fp32 {','.join(keep_fp32)}: all of an fp32 file is fp32; give --dtype fp16")


def model_in(model: Any, dtype: str = "fp32") -> nn.Module:
    """The model of a directory, a pipeline or a module, in eval mode and this dtype; a live one is not changed."""
    if isinstance(model, (str, Path)):
        loaded: nn.Module = load(model, torch_dtype=DTYPES[dtype])
        return loaded
    live: nn.Module = model if isinstance(model, nn.Module) else denoiser_of(model)[1]
    if live.training or next(live.parameters()).dtype is not DTYPES[dtype]:
        # Not diffusers' own .to(), which warns of layers to be kept in float32 where there are none.
        live = nn.Module.to(copy.deepcopy(live), DTYPES[dtype]).eval()
    return live


def dense_twin(model: Any) -> nn.Module | None:
    """The architecture that a pruned model came from, with random weights; None for one that is not pruned."""
    plan = getattr(model, "pruning_plan", None)
    if plan is None:
        return None
    base: Any = next(cls for cls in type(model).__mro__ if cls.__name__ == plan.model_class)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        twin: nn.Module = base.from_config(model.config).eval()
    return twin


def check_dynamic(model: nn.Module, adapter: ModelAdapter, dynamic: Sequence[str]) -> None:
    known = list(
        dict.fromkeys(word for shape in adapter.shapes(model).values() for word in shape if isinstance(word, str))
    )
    for word in dynamic:
        if word not in known:
            raise BadInput(f"--dynamic {word!r}{nearest(word, known)}: this model's axes are {', '.join(known)}")


def allowed_multiples(model: nn.Module, adapter: ModelAdapter, dynamic: Sequence[str]) -> dict[str, int]:
    """For each dynamic image axis the number that its size has to be a multiple of, as PyTorch tells (meta device)."""
    bare, sides = meta_copy(model), dict(zip(IMAGE, adapter.trace_size(model), strict=True))

    def computes(changed: dict[str, int]) -> bool:
        size = changed["height"], changed["width"]
        try:
            with torch.no_grad():
                return adapter.denoise(bare, adapter.flat_inputs(bare, size=size)).shape[-2:] == size
        except (RuntimeError, ValueError, AssertionError):  # of two branches that do not fit each other
            return False

    def smallest(axis: str) -> int:
        side = sides[axis]
        steps = (2**k for k in range(side.bit_length()))
        return next((step for step in steps if step < side and computes({**sides, axis: side + step})), side)

    return {axis: smallest(axis) for axis in IMAGE if axis in dynamic}


def irregular_size(model: nn.Module, adapter: ModelAdapter, multiples: Mapping[str, int]) -> tuple[int, int]:
    """The config's (height, width), where an axis is dynamic an odd multiple of what it has to be a multiple of.

    From an even one the exporter writes a file that says dynamic and fails at odd ones: models may take a way of their
    own for sizes that they cannot halve often enough.
    """
    sizes = dict(zip(IMAGE, adapter.size(config_of(model)), strict=True))
    height, width = (sizes | {axis: odd_multiple(sizes[axis], step) for axis, step in multiples.items()}).values()
    return height, width


def odd_multiple(size: int, step: int) -> int:
    """The size as an odd multiple of a step, at most one step larger."""
    return (size // step | 1) * step


def traced(
    model: nn.Module,
    adapter: ModelAdapter,
    opset: int,
    dynamic: tuple[str, ...],
    size: tuple[int, int],
    timestep: str = "int64",
    dtype: str = "fp32",
) -> Any:
    """The model as an ONNX program, from an example of this (height, width).

    The example batch is 2: with 1 the exporter writes a file that says dynamic and works at batch 1 only.
    """
    ports = adapter.ports(model)
    inputs = adapter.flat_inputs(model, batch=2 if "batch" in dynamic else 1, size=size)
    of_model = next(model.parameters()).dtype  # which may be a layer's that is kept in fp32
    inputs = {name: value.to(DTYPES[dtype]) if value.dtype is of_model else value for name, value in inputs.items()}
    if timestep == "float32":
        inputs[adapter.timestep] = inputs[adapter.timestep].float()
    config = config_of(model)
    words = [{i: word for i, word in port.words(config).items() if word in dynamic} for port in ports]
    flat = {port.name: inputs[port.name] for port in ports}
    names = [port.name for port in adapter.outputs]
    with exportable(adapter):
        return exported(Flat(model, adapter), flat, words, names, opset, type(model).__name__)


def provenance(model: Any, adapter: ModelAdapter, options: dict[str, Any]) -> dict[str, Any]:
    """Everything that the file says about where it came from; MACs for one sample of the config's size."""
    config = {key: value for key, value in dict(model.config).items() if not key.startswith("_")}
    steps = adapter.tried_timesteps(config_of(model))
    facts: dict[str, Any] = {
        "format": "1",
        "model_class": adapter.model_class,
        "config": json.loads(json.dumps(config, default=list)),
        "source_config_sha256": architecture_hash(model),
        "axes": default_axes(model, adapter) | ({AXIS: 1} if "batch" in options["dynamic"].split(",") else {}),
        "timesteps": [steps[0], steps[-1]],
        "inputs": {"sample": adapter.sample, "timestep": adapter.timestep},
        "params": str(sum(p.numel() for p in model.parameters())),
        "macs": str(total_macs(model, adapter)),
        "versions": versions(),
        **options,
    }
    plan = getattr(model, "pruning_plan", None)
    if plan is not None:
        facts |= {"criterion": plan.criterion, "pruning_ratio": str(plan.pruning_ratio), "plan_sha256": plan.sha256}
        facts |= {"dense_params": str(plan.params[0]), "dense_macs": str(plan.macs[0])}
        thresholds = [str(value) for value in values_of(plan.criterion, "threshold")]
        facts |= {"threshold": thresholds[0]} if thresholds else {}
    return facts


def default_axes(model: nn.Module, adapter: ModelAdapter) -> dict[str, int]:
    """The size of each axis, by word, for one sample of the config's size."""
    inputs = adapter.flat_inputs(model)
    return {
        word: inputs[p.name].shape[i] for p in adapter.ports(model) for i, word in p.words(config_of(model)).items()
    }


def values_of(tree: Any, key: str) -> Iterator[Any]:
    """Every value under a key, at any depth."""
    for name, value in tree.items() if isinstance(tree, dict) else ():
        if name == key:
            yield value
        yield from values_of(value, key)
