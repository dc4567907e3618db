from __future__ import annotations

import contextlib

import onnx
import onnx_ir
import pytest
import torch
from tiny_pipelines import PIPELINES

from diffprune_plugin.errors import BadInput
from diffprune_plugin.export import components
from diffprune_plugin.export.components import Piece, first_greatest_in_floats, part_to_onnx
from diffprune_plugin.export.kernels import (
    kernel,
    kernel_table,
    missing_kernel,
    without_kernel,
)
from diffprune_plugin.export.workflow import check_placement

FLOAT = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
TABLE = kernel_table("cuda")


def node(operator: str, kind: onnx_ir.DataType = onnx_ir.DataType.FLOAT) -> onnx_ir.Node:
    value = onnx_ir.Value(name="x", type=onnx_ir.TensorType(kind))
    return onnx_ir.Node("", operator, [value], name="n")


def test_every_node_of_the_opset_20_graph_has_a_cuda_kernel(models, mixed_onnx):
    assert without_kernel(models.pruned_onnx) == []
    assert without_kernel(mixed_onnx) == []


def test_every_node_of_a_text_encoder_and_an_autoencoder_has_a_cuda_kernel(tmp_path, monkeypatch):
    pipeline = PIPELINES["stable diffusion"][0](tmp_path)
    pieces = [(components.TEXT, pipeline.text_encoder), (components.ENCODER, pipeline.vae)]
    for part, model in [*pieces, (components.DECODER, pipeline.vae)]:
        path = tmp_path / f"{part.ending or 'text'}.onnx"
        part_to_onnx(Piece(part, model, (8, 8)), path, opset=20, dynamic=("batch", "sequence"), dtype="fp32")
        assert without_kernel(path) == []
    monkeypatch.setattr(components, "first_greatest_in_floats", contextlib.nullcontext)
    part_to_onnx(Piece(*pieces[0], (8, 8)), tmp_path / "whole.onnx", opset=20, dynamic=("batch",), dtype="fp32")
    assert [miss.operator for miss in without_kernel(tmp_path / "whole.onnx")] == ["ArgMax"]


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_the_first_greatest_integer_is_that_of_torch(dim):
    values = torch.randint(0, 3, (7, 9), generator=torch.Generator().manual_seed(0))
    expected = values.argmax(dim), values.argmax(dim, keepdim=True), values.argmax()
    with first_greatest_in_floats():
        found = values.argmax(dim), values.argmax(dim, keepdim=True), values.argmax()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_group_normalization_has_no_cuda_kernel():
    miss = missing_kernel(node("GroupNormalization"), 21, TABLE)
    assert miss is not None
    assert miss.why == "no kernel in the table"


def test_a_kernel_without_an_end_fits_its_first_version_only():
    assert missing_kernel(node("InstanceNormalization"), 20, TABLE) is None
    miss = missing_kernel(node("InstanceNormalization"), 22, TABLE)
    assert miss is not None
    assert miss.why == "no kernel for version 22 of the operator (opset 22)"


def test_a_type_without_kernel_is_named():
    miss = missing_kernel(node("InstanceNormalization", onnx_ir.DataType.BFLOAT16), 20, TABLE)
    assert miss is not None
    assert miss.why == "no kernel for bfloat16"


def test_no_opset_has_kernels_for_a_unet_in_bf16():
    """Convolutions from opset 22 on, norms over groups up to opset 20."""

    def has(operator: str, opset: int, kind: onnx_ir.DataType) -> bool:
        return missing_kernel(node(operator, kind), opset, TABLE) is None

    brain, single = onnx_ir.DataType.BFLOAT16, onnx_ir.DataType.FLOAT
    assert [opset for opset in range(18, 25) if has("Conv", opset, brain)] == [22, 23, 24]
    assert [opset for opset in range(18, 25) if has("InstanceNormalization", opset, single)] == [18, 19, 20, 21]
    assert has("Conv", 20, single)


def test_the_rows_of_the_table_read_as_ranges():
    types = {"t0": frozenset({"float"})}
    assert [kernel(row, types)[:2] for row in ("13+ t0", "7-12 t0", "14 t0")] == [(13, None), (7, 12), (14, 14)]


def test_nodes_of_a_domain_that_the_table_does_not_tell_of_are_counted_and_not_called_without_a_kernel(copy, resigned):
    """As `--fuse` leaves them; one of ONNX's own that has no kernel is still named beside them."""
    model = onnx.load(copy)
    fused = [node for node in model.graph.node if node.op_type == "InstanceNormalization"]
    for node in fused:
        node.domain, node.op_type = "com.microsoft", "GroupNorm"
    next(node for node in model.graph.node if node.op_type == "Sigmoid").op_type = "Sinh"
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, copy)
    resigned(copy)
    said: list[str] = []
    content: dict[str, object] = {}
    check_placement(content, copy, "cuda", 1, said.append)
    assert said[0].startswith("cuda: 1 nodes without a kernel")
    assert said[1].startswith("  Sinh ")
    told = f"{len(fused)} nodes ({len(fused)} com.microsoft.GroupNorm)"
    assert said[2:] == [f"not looked up, since the table does not tell of their domain: {told}"]
    assert content["placement_unknown"] == {"com.microsoft.GroupNorm": len(fused)}


def test_there_is_a_table_for_cuda_only(models):
    with pytest.raises(BadInput, match="there is a kernel table for cuda only"):
        without_kernel(models.pruned_onnx, "tensorrt")
