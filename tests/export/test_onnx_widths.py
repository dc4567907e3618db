"""What an exported file says of its widths, by the table that plans are made with."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from tiny_conditional import SD, make_unet

import diffprune_plugin as dp
from diffprune_plugin.export import to_onnx
from diffprune_plugin.export.integrity import parse
from diffprune_plugin.export.widths import Widths, wasteful_layers


@pytest.fixture(scope="module")
def conditional(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Attention and GEGLU, pruned as published and for a runtime: norm groups of 3, heads of 6 against 4 and 8."""
    unet, files = make_unet(SD), {}
    for name, round_to in (("published", None), ("kept", "cuda-fp16")):
        pruned = copy.deepcopy(unet)
        dp.remove_(pruned, dp.make_plan(pruned, "magnitude", pruning_ratio=0.3, round_to=round_to))
        files[name] = to_onnx(pruned, tmp_path_factory.mktemp("widths") / f"{name}.onnx").path
    return files


def test_a_width_of_24_wastes_a_cpu_in_fp32_and_not_tensor_cores(models) -> None:
    waste = {w.layer: (w.width, w.rounded) for w in wasteful_layers(models.pruned_onnx, "cpu", "fp32")}
    assert waste["mid_block.resnets.0.conv1"] == (24, 32)
    assert "conv_out" not in waste
    assert "mid_block.resnets.0.conv1" not in {w.layer for w in wasteful_layers(models.pruned_onnx, "cuda", "fp16")}


def test_layers_that_the_exporter_renamed_keep_their_names(models) -> None:
    widths = {layer: width for of, layer, width in Widths(parse(models.dense_onnx).graph).found() if of == "layer"}
    assert widths["mid_block.attentions.0.to_q"] == 32
    assert widths["time_embedding.linear_1"] == 64


def test_norm_groups_heads_and_halves_are_those_of_the_model(conditional: dict[str, Path]) -> None:
    found = list(Widths(parse(conditional["published"]).graph).found())
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert ("norm group", "the norm before down_blocks.0.resnets.0.conv2", 3) in found
    assert ("head", f"a layer before {block}.attn1.to_out.0", 6) in found
    assert ("half", f"{block}.ff.net.0.proj", 89) in found


def test_the_lint_names_what_a_kernel_does_not_take_and_nothing_in_a_file_that_was_planned_for_it(conditional) -> None:
    waste = {(w.of, w.kernel, w.width, w.rounded) for w in wasteful_layers(conditional["published"], "cuda", "fp16")}
    assert ("norm group", "GroupNorm", 3, 4) in waste
    assert ("head", "MultiHeadAttention", 11, 16) in waste
    assert ("layer", "tensor cores", 178, 184) in waste
    assert not wasteful_layers(conditional["kept"], "cuda:prefer_nhwc=1", "fp16")
