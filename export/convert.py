"""From a diffusers UNet to an ONNX file that says where it came from."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.metadata
import json
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffprune_plugin.adapters.table import Port, UNetAdapter
from diffprune_plugin.errors import BadInput, first_line, nearest
from diffprune_plugin.export.integrity import PREFIX, Files, check_output, new_model, read_manifest
from diffprune_plugin.graph.costs import total_macs
from diffprune_plugin.planning.plan import architecture_hash
from diffprune_plugin.plugins import find_adapter
from diffprune_plugin.pruning.checkpoint import load
from diffprune_plugin.utils.optional import need

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
OPSETS = range(18, 25)  # what torch's exporter writes; past 20 GroupNormalization has no kernel and is slower
INLINE_LIMIT = 1_500_000_000  # bytes of weights; a protobuf ends at 2 GiB
PACKAGES = ("diffprune-plugin", "torch", "diffusers", "onnx", "onnxscript")


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote: its files with sizes and hashes, nodes in the graph, seconds, provenance."""

    path: Path
    files: Files
    nodes: int
    seconds: float
    provenance: dict[str, str]


class Flat(nn.Module):
    """A UNet with its inputs in a row and one tensor out: what the graph's names and order come from."""

    def __init__(self, unet: nn.Module, adapter: UNetAdapter) -> None:
        super().__init__()
        self.unet = unet
        self.adapter = adapter
        self.names = tuple(port.name for port in adapter.ports(unet))

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        return denoise(self.unet, dict(zip(self.names, values, strict=True)), self.adapter)


def denoise(unet: nn.Module, inputs: dict[str, Any], adapter: UNetAdapter) -> torch.Tensor:
    """The UNet's output for inputs by port name; the adapter says which go inside a dict argument."""
    output: torch.Tensor = unet(**adapter.nested(inputs), return_dict=False)[0]
    return output


def to_onnx(
    model: nn.Module | str | Path,
    path: str | Path,
    *,
    opset: int = 20,
    dynamic: Sequence[str] = ("batch",),
    dtype: str = "fp32",
    overwrite: bool = False,
    external_data: bool | None = None,
    adapter: UNetAdapter | None = None,
) -> ExportReport:
    """Write a UNet, dense or pruned, live or from a pipeline or UNet directory, as an ONNX file with its manifest.

    ``dynamic`` names the axes left open; the others have the config's size. ``external_data``: weights in one file of
    their own (None: where they would not fit a protobuf). The same input gives the same bytes.

    Raises BadInput for what cannot be exported or written; nothing is half-written.
    """
    start, path = time.perf_counter(), Path(path)
    check_output(path, overwrite)
    check_options(opset, dtype)
    need("onnx")
    need("onnxscript")
    unet = unet_in(model, dtype)
    adapter = adapter or find_adapter(unet)
    check_dynamic(adapter.ports(unet), dynamic)
    program = traced(unet, adapter, opset, tuple(dynamic))
    options = {"opset": str(opset), "dtype": dtype, "dynamic": ",".join(dynamic)}
    facts = provenance(unet, adapter, options)
    strip_(program.model)
    program.model.producer_name, program.model.producer_version = "diffprune", facts["versions"]["diffprune-plugin"]
    written = {k: v if isinstance(v, str) else json.dumps(v, sort_keys=True) for k, v in facts.items()}
    program.model.metadata_props.update({PREFIX + key: written[key] for key in sorted(written)})
    with new_model(path) as temporary:
        save(program.model, temporary, unet, external_data, written)
    nodes = sum(1 for _ in program.model.graph.all_nodes())
    return ExportReport(path, read_manifest(path)["files"], nodes, time.perf_counter() - start, written)


def check_options(opset: int, dtype: str) -> None:
    if opset not in OPSETS:
        raise BadInput(f"--opset {opset}: not one of {OPSETS[0]} to {OPSETS[-1]}; 20 runs fastest")
    if dtype not in DTYPES:
        raise BadInput(f"--dtype {dtype!r}{nearest(dtype, DTYPES)}: not one of {', '.join(DTYPES)}")


def unet_in(model: Any, dtype: str = "fp32") -> nn.Module:
    """The UNet of a directory, a pipeline or a module, in eval mode and this dtype; a live one is not changed."""
    if isinstance(model, (str, Path)):
        loaded: nn.Module = load(model, torch_dtype=DTYPES[dtype])
        return loaded
    unet: nn.Module = model if isinstance(model, nn.Module) else model.unet
    if unet.training or next(unet.parameters()).dtype is not DTYPES[dtype]:
        # Not diffusers' own .to(), which warns of layers to be kept in float32 where there are none.
        unet = nn.Module.to(copy.deepcopy(unet), DTYPES[dtype]).eval()
    return unet


def dense_twin(unet: Any) -> nn.Module | None:
    """The architecture that a pruned UNet came from, with random weights; None for one that is not pruned."""
    plan = getattr(unet, "pruning_plan", None)
    if plan is None:
        return None
    base: Any = next(cls for cls in type(unet).__mro__ if cls.__name__ == plan.model_class)
    config = {key: value for key, value in dict(unet.config).items() if not key.startswith("_")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        twin: nn.Module = base(**config).eval()
    return twin


def words_of(port: Port) -> dict[int, str]:
    """The axes of a port that are words, neither numbers nor config values, by position."""
    return {index: axis for index, axis in enumerate(port.axes.split()) if axis.isidentifier()}


def check_dynamic(ports: Sequence[Port], dynamic: Sequence[str]) -> None:
    known = list(dict.fromkeys(word for port in ports for word in words_of(port).values()))
    for word in dynamic:
        if word not in known:
            raise BadInput(f"--dynamic {word!r}{nearest(word, known)}: this UNet's axes are {', '.join(known)}")


def traced(unet: nn.Module, adapter: UNetAdapter, opset: int, dynamic: tuple[str, ...]) -> Any:
    """The UNet as an ONNX program.

    The example batch is 2: with 1 the exporter writes a file that says dynamic and works at batch 1 only.
    """
    ports = adapter.ports(unet)
    inputs = adapter.flat_inputs(unet, batch=2 if "batch" in dynamic else 1)
    shapes = tuple({i: word for i, word in words_of(port).items() if word in dynamic} for port in ports)
    with quiet():
        try:
            return torch.onnx.export(
                Flat(unet, adapter).eval(),
                tuple(inputs[port.name] for port in ports),
                dynamo=True,
                input_names=[port.name for port in ports],
                output_names=[port.name for port in adapter.outputs],
                dynamic_shapes=(shapes,),
                opset_version=opset,
                verbose=False,
            )
        except (torch.onnx.OnnxExporterError, RuntimeError) as error:
            cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
            axes = f"; leave {', '.join(dynamic)} fixed" if len(dynamic) > 1 else ""
            raise BadInput(f"{type(unet).__name__}: torch cannot export it: {first_line(cause)}{axes}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's advice to its own developers off the user's screen."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def provenance(unet: Any, adapter: UNetAdapter, options: dict[str, str]) -> dict[str, Any]:
    """Everything that the file says about where it came from; MACs for one sample of the config's size."""
    config = {key: value for key, value in dict(unet.config).items() if not key.startswith("_")}
    facts: dict[str, Any] = {
        "format": "1",
        "model_class": adapter.model_class,
        "config": json.loads(json.dumps(config, default=list)),
        "source_config_sha256": architecture_hash(unet),
        "axes": default_axes(unet, adapter),
        "params": str(sum(p.numel() for p in unet.parameters())),
        "macs": str(total_macs(unet, adapter)),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        **options,
    }
    plan = getattr(unet, "pruning_plan", None)
    if plan is not None:
        facts |= {"criterion": plan.criterion, "pruning_ratio": str(plan.pruning_ratio), "plan_sha256": plan.sha256}
        facts |= {"dense_params": str(plan.params[0]), "dense_macs": str(plan.macs[0])}
        thresholds = [str(value) for value in values_of(plan.criterion, "threshold")]
        facts |= {"threshold": thresholds[0]} if thresholds else {}
    return facts


def default_axes(unet: nn.Module, adapter: UNetAdapter) -> dict[str, int]:
    """The size of each axis, by word, for one sample of the config's size."""
    inputs = adapter.flat_inputs(unet)
    return {word: inputs[p.name].shape[i] for p in adapter.ports(unet) for i, word in words_of(p).items()}


def values_of(tree: Any, key: str) -> Iterator[Any]:
    """Every value under a key, at any depth."""
    for name, value in tree.items() if isinstance(tree, dict) else ():
        if name == key:
            yield value
        yield from values_of(value, key)


def strip_(model: Any) -> None:
    """Remove the exporter's debug metadata: nine tenths of the file, with the absolute paths of its sources."""
    graph = model.graph
    nodes = list(graph.all_nodes())
    values = [*graph.inputs, *graph.outputs, *graph.initializers.values(), *(v for n in nodes for v in n.outputs)]
    for holder in (model, graph, *nodes, *values):
        holder.metadata_props.clear()
        holder.doc_string = None


def save(model: Any, path: Path, unet: nn.Module, external: bool | None, facts: dict[str, str]) -> None:
    """Write the graph, its weights inside or, past the limit, in one file named by what it was made from."""
    import onnx_ir

    if external is None:
        external = sum(p.numel() * p.element_size() for p in unet.parameters()) > INLINE_LIMIT
    # A name of its own, so that overwriting never touches the data of the old model.
    name = f"{path.stem}.{content_hash(unet, facts)[:12]}.data" if external else None
    onnx_ir.save(model, path, external_data=name)


def content_hash(unet: nn.Module, facts: dict[str, str]) -> str:
    """SHA-256 of the weights and the options of the export."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(unet.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
