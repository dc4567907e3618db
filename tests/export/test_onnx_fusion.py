"""`--fuse`: the same numbers, more operators of ONNX Runtime's own, and what pruning lost of them."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
from contrib_operators import OPERATORS
from onnx.reference import ReferenceEvaluator
from tiny_conditional import SD, make_unet

import diffprune_plugin as dp
from diffprune_plugin.errors import BadInput
from diffprune_plugin.export import fusion, measure, tables, to_onnx, verify_onnx
from diffprune_plugin.export.benchmark import Latency
from diffprune_plugin.export.feeds import example_feeds, fixed_dims
from diffprune_plugin.export.options import Options
from diffprune_plugin.export.proofs import Placement
from diffprune_plugin.export.providers import open_session
from diffprune_plugin.export.widths import lost_kernels, wasteful_layers


@dataclasses.dataclass(frozen=True)
class Files:
    dense: Path
    pruned: Path
    models: dict[str, Any]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Unfused: norm groups of 4 in the dense model, of 3, 6 and 9 in the pruned one."""
    folder, dense = tmp_path_factory.mktemp("plain"), make_unet(SD)
    pruned = copy.deepcopy(dense)
    dp.remove_(pruned, dp.make_plan(pruned, "magnitude", pruning_ratio=0.3))
    paths = [to_onnx(model, folder / f"{name}.onnx").path for name, model in (("dense", dense), ("pruned", pruned))]
    return Files(*paths, {"dense": dense, "pruned": pruned})


def fused_graph(path: Path, provider: str) -> Any:
    return fusion.fused(onnx_ir.load(path), provider)


@pytest.mark.slow
def test_all_of_a_dense_graph_is_fused_for_cuda_and_no_norm_of_an_odd_number_in_a_pruned_one(plain) -> None:
    dense = fusion.own_operators(fused_graph(plain.dense, "cuda"))
    assert dense == {
        "GroupNorm": 6,
        "SkipGroupNorm": 15,
        "NhwcConv": 33,
        "MultiHeadAttention": 8,
        "SkipLayerNormalization": 8,
    }
    pruned = fused_graph(plain.pruned, "cuda")
    found = fusion.own_operators(pruned)
    assert (found["MultiHeadAttention"], found["NhwcConv"]) == (8, 33)
    norms = found["GroupNorm"] + found["SkipGroupNorm"]
    left = sum(node.op_type == "InstanceNormalization" for node in pruned.graph.all_nodes())
    assert (norms, left) == (10, 11)
    odd = [w for w in wasteful_layers(plain.pruned, "cuda", "fp16") if w.of == "norm group"]
    assert len(odd) == left


@pytest.mark.slow
def test_for_the_cpu_only_what_it_has_kernels_for(plain) -> None:
    assert set(fusion.own_operators(fused_graph(plain.dense, "cpu"))) == {
        "MultiHeadAttention",
        "SkipLayerNormalization",
    }


@pytest.mark.parametrize("provider", [None, "openvino", "tensorrt:trt_cuda_graph_enable=1"])
def test_a_provider_without_fused_operators_is_refused(provider) -> None:
    with pytest.raises(BadInput, match=r"--fuse: .*give --provider cpu or cuda"):
        Options(provider=provider, fuse=True).of_file()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["dense", "pruned"])
def test_the_graph_for_cuda_computes_what_the_plain_one_does(model: str, plain, monkeypatch, tmp_path) -> None:
    """By ONNX's reference, with the operators of CUDA in NumPy; a GEGLU of a width that the kernel knows among them."""
    known = dataclasses.replace(fusion.SPLIT_GELU, listed=(128, 256, 89))
    monkeypatch.setattr(fusion, "SPLIT_GELU", known)
    path = getattr(plain, model)
    graph = fused_graph(path, "cuda")
    assert fusion.own_operators(graph)["BiasSplitGelu"] >= 3
    onnx_ir.save(graph, tmp_path / "fused.onnx")
    feeds = example_feeds(path, fixed_dims(path, batch=2))
    expected = open_session(path).run(None, feeds)[0]
    found = ReferenceEvaluator(onnx.load(tmp_path / "fused.onnx"), new_ops=OPERATORS).run(None, feeds)[0]
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_a_fused_file_is_verified_timed_and_says_what_ran(plain, tmp_path) -> None:
    paths = {n: to_onnx(model, tmp_path / f"{n}.onnx", fuse="cpu").path for n, model in plain.models.items()}
    assert verify_onnx(paths["pruned"], plain.models["pruned"]).passed
    found = measure(paths["pruned"], paths["dense"], provider="cpu", rounds=5, memory=False)
    assert found.operators["dense"]["MultiHeadAttention"] == found.operators["pruned"]["MultiHeadAttention"] == 8
    lines = tables.lint(found)
    assert "dense: 8 MultiHeadAttention, 8 SkipLayerNormalization" in lines[-2]
    assert lines[-1] == "lost by pruning: none"


@pytest.mark.slow
def test_what_pruning_lost_is_named_with_the_width_that_would_keep_it(plain, tmp_path) -> None:
    waste = [
        wasteful_layers(to_onnx(plain.models[name], tmp_path / f"{name}.onnx", fuse="cuda").path, "cuda", "fp32", True)
        for name in ("pruned", "dense")
    ]
    lost = lost_kernels(*waste)
    assert {w.kernel for w in lost} == {"GroupNorm", "MultiHeadAttention"}
    assert ("the norm before down_blocks.0.resnets.0.conv2", 3, 4) in {(w.layer, w.width, w.rounded) for w in lost}
    result = Latency("cuda", "fp32", 1, 5, lost=lost)
    result.placements = {
        "dense, batch 1": Placement("cuda", operators={"GroupNorm": 21}),
        "pruned, batch 1": Placement("cuda"),
    }
    text = " ".join(tables.fusion_lines(result))
    assert "dense: 21 GroupNorm; pruned: none" in text
    assert "GroupNorm of the norm before down_blocks.0.resnets.0.conv2 (3, 4 would keep it)" in text
