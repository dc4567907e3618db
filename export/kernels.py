"""What can be said of a GPU without one: which nodes have no CUDA kernel."""

from __future__ import annotations

import importlib.resources
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffprune_plugin.errors import BadInput
from diffprune_plugin.export.feeds import fixed_dims
from diffprune_plugin.export.integrity import check_files
from diffprune_plugin.export.provider_table import PROVIDERS
from diffprune_plugin.utils.optional import need

TABLES = {name: provider.kernels for name, provider in PROVIDERS.items() if provider.kernels}
DATA_INPUT = {"Where": 1, "OneHot": 0}  # the input whose type the kernel is chosen by; otherwise the first
# ONNX says float where the rest of the world says float32.
TYPE_NAMES = {"FLOAT": "float", "DOUBLE": "double"}


@dataclass(frozen=True)
class NoKernel:
    """A node that would be left to the CPU, and why."""

    node: str
    operator: str
    why: str


def without_kernel(path: str | Path, provider: str = "cuda", **dims: int) -> list[NoKernel]:
    """The nodes of the graph, its dims fixed and constants folded, that have no kernel at their version and type.

    From ONNX Runtime's documented kernel table; nothing is run. Raises BadInput for a provider without a table.
    """
    return looked_up(path, provider, **dims)[0]


def looked_up(path: str | Path, provider: str = "cuda", **dims: int) -> tuple[list[NoKernel], dict[str, int]]:
    """The same, and how many nodes are of domains that the table does not tell of, by operator."""
    if provider not in TABLES:
        raise BadInput(f"--check-placement {provider}: there is a kernel table for {', '.join(TABLES)} only")
    check_files(path)
    table = kernel_table(provider)
    model = frozen(Path(path), fixed_dims(path, **dims))
    opset = model.opset_imports[""]
    domains = {domain_of(operator) for operator in table}
    known, unknown = list[Any](), Counter[str]()
    for node in model.graph.all_nodes():
        if node.domain in domains:
            known.append(node)
        else:
            unknown[label_of(node)] += 1
    return [miss for node in known if (miss := missing_kernel(node, opset, table))], dict(unknown.most_common())


def unknown_line(unknown: Mapping[str, int]) -> str:
    """In one line what was not looked up."""
    named = ", ".join(f"{count} {operator}" for operator, count in unknown.items())
    return f"not looked up, since the table does not tell of their domain: {sum(unknown.values())} nodes ({named})"


def label_of(node: Any) -> str:
    """A node's operator as the table has it."""
    return f"{node.domain + '.' if node.domain else ''}{node.op_type}"


def domain_of(label: str) -> str:
    return label.rpartition(".")[0]


def kernel_table(provider: str) -> dict[str, list[tuple[int, int | None, frozenset[str]]]]:
    """For each operator its kernels: first and last operator version (None: no end), data types."""
    text = importlib.resources.files("diffprune_plugin.export").joinpath(TABLES[provider]).read_text()
    content = json.loads(text)
    types = {key: frozenset(names.split()) for key, names in content["types"].items()}
    return {op: [kernel(row, types) for row in rows] for op, rows in content["kernels"].items()}


def kernel(row: str, types: Mapping[str, frozenset[str]]) -> tuple[int, int | None, frozenset[str]]:
    """One row of the table: ``13+ t0``, ``7-12 t1`` or ``13 t2``."""
    found = re.fullmatch(r"(\d+)(\+|-(\d+))? (\w+)", row)
    assert found, row
    first, end, last, key = found.groups()
    return int(first), None if end == "+" else int(last or first), types[key]


def missing_kernel(node: Any, opset: int, table: Mapping[str, Any]) -> NoKernel | None:
    """None if a kernel fits, as ONNX Runtime matches them: one without an end fits its first version only."""
    onnx = need("onnx")
    label = label_of(node)
    if label not in table:
        return NoKernel(node.name, label, "no kernel in the table")
    since = onnx.defs.get_schema(node.op_type, opset, node.domain).since_version
    fitting = [types for first, last, types in table[label] if since == first or (last and first < since <= last)]
    if not fitting:
        return NoKernel(node.name, label, f"no kernel for version {since} of the operator (opset {opset})")
    value = node.inputs[DATA_INPUT.get(node.op_type, 0)] if node.inputs else None
    if value is None or value.dtype is None:
        return None
    kind = TYPE_NAMES.get(value.dtype.name, value.dtype.name.lower())
    return None if any(kind in types for types in fitting) else NoKernel(node.name, label, f"no kernel for {kind}")


def frozen(path: Path, dims: Mapping[str, int]) -> Any:
    """The graph with its dims fixed: what reads shapes then folds away, as it does in a session."""
    ir, optimizer = need("onnx_ir"), need("onnxscript.optimizer")
    model = ir.load(path)
    for value in model.graph.inputs:
        value.shape = ir.Shape([dims.get(str(dim), dim) for dim in value.shape])
    for node in model.graph.all_nodes():
        for output in node.outputs:
            output.shape = None
    optimizer.optimize_ir(model, onnx_shape_inference=True)
    return model
