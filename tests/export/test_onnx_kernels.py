from __future__ import annotations

import onnx
import onnx_ir
import pytest

from diffprune_plugin.errors import BadInput
from diffprune_plugin.export.kernels import (
    kernel,
    kernel_table,
    layer_widths,
    missing_kernel,
    wasteful_layers,
    without_kernel,
)

FLOAT = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
TABLE = kernel_table("cuda")


def node(operator: str, kind: onnx_ir.DataType = onnx_ir.DataType.FLOAT) -> onnx_ir.Node:
    value = onnx_ir.Value(name="x", type=onnx_ir.TensorType(kind))
    return onnx_ir.Node("", operator, [value], name="n")


def test_every_node_of_the_opset_20_graph_has_a_cuda_kernel(models, mixed_onnx):
    assert without_kernel(models.pruned_onnx) == []
    assert without_kernel(mixed_onnx) == []


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


def test_the_rows_of_the_table_read_as_ranges():
    types = {"t0": frozenset({"float"})}
    assert [kernel(row, types)[:2] for row in ("13+ t0", "7-12 t0", "14 t0")] == [(13, None), (7, 12), (14, 14)]


def test_there_is_a_table_for_cuda_only(models):
    with pytest.raises(BadInput, match="there is a kernel table for cuda only"):
        without_kernel(models.pruned_onnx, "tensorrt")


def test_a_width_of_24_wastes_a_cpu_in_fp32_and_not_tensor_cores(models):
    waste = {w.layer: (w.width, w.rounded) for w in wasteful_layers(models.pruned_onnx, "cpu", "fp32")}
    assert waste["mid_block.resnets.0.conv1"] == (24, 32)
    assert "conv_out" not in waste
    assert "mid_block.resnets.0.conv1" not in {w.layer for w in wasteful_layers(models.pruned_onnx, "cuda", "fp16")}


def test_layers_that_the_exporter_renamed_keep_their_names(models):
    widths = dict(layer_widths(onnx.load(models.dense_onnx).graph))
    assert widths["mid_block.attentions.0.to_q"] == 32
    assert widths["time_embedding.linear_1"] == 64
