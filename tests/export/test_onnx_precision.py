"""Half precision: what stays in fp32, by name and found by itself, and the error that the dense model justifies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from conftest import tiny_unet

from diffprune_plugin.errors import BadInput, CheckFailed
from diffprune_plugin.export import baseline, precision, provider_table, to_onnx, verify, workflow
from diffprune_plugin.export.integrity import check_files
from diffprune_plugin.export.precision import cast, ends, found_by_itself, largest, mixed
from diffprune_plugin.plugins import find_adapter

BLOCK = "mid_block.resnets.0"
LOUD = 1e6  # times the weights of a layer whose output a norm brings back


def loud(layer: str = f"{BLOCK}.conv1", factor: float = LOUD) -> Any:
    unet = tiny_unet()
    with torch.no_grad():
        unet.get_submodule(layer).weight.mul_(factor)
    return unet


def half_output(unet: Any, patterns: list[str]) -> torch.Tensor:
    adapter = find_adapter(unet)
    inputs = {n: cast(v, torch.float16) for n, v in adapter.flat_inputs(unet).items()}
    with torch.no_grad():
        output: torch.Tensor = adapter.denoise(mixed(unet, "fp16", patterns)[0], inputs)
    return output


def test_a_block_whose_values_leave_fp16_is_found_and_kept_and_nothing_in_a_model_that_fits(monkeypatch: Any) -> None:
    monkeypatch.setattr(precision, "TRIED", 4)
    unet = loud()
    assert not half_output(unet, []).isfinite().all()  # the control
    assert found_by_itself(unet, find_adapter(unet), "fp16", []) == [BLOCK]
    with torch.no_grad():
        exact = find_adapter(unet).denoise(unet, find_adapter(unet).flat_inputs(unet))
    output = half_output(unet, [BLOCK])
    assert output.dtype == torch.float16
    assert float((output - exact).abs().max() / exact.abs().max()) < 5e-3
    assert found_by_itself(tiny_unet(), find_adapter(unet), "fp16", []) == []


def test_values_that_no_block_brings_back_are_told(monkeypatch: Any) -> None:
    monkeypatch.setattr(precision, "TRIED", 4)
    unet = loud("conv_in", 1e8)
    with pytest.raises(CheckFailed, match=r"--dtype fp16: conv_in reaches .*e\+0.*use --dtype fp32"):
        found_by_itself(unet, find_adapter(unet), "fp16", [])


def test_fifty_timesteps_are_tried_half_of_them_from_each_end() -> None:
    steps = ends(tiny_unet(), find_adapter(tiny_unet()))
    assert steps == [*range(25), *range(975, 1000)]


@pytest.mark.slow
def test_a_file_keeps_the_layers_by_name_and_says_so(tmp_path: Path) -> None:
    unet = tiny_unet()
    report = to_onnx(unet, tmp_path / "m.onnx", dtype="fp16", keep_fp32=["mid_block.*", "conv_in"])
    assert check_files(report.path)["keep_fp32"] == '["mid_block.attentions", "mid_block.resnets", "conv_in"]'
    kinds = {t.name: t.data_type for t in onnx.load(report.path).graph.initializer if t.name.endswith("weight")}
    kept = {name for name, kind in kinds.items() if kind == onnx.TensorProto.FLOAT}
    assert kept == {name for name in kinds if name.startswith(("model.mid_block.", "model.conv_in."))}
    types = {v.type.tensor_type.elem_type for v in [*onnx.load(report.path).graph.input][:1]}
    assert types == {onnx.TensorProto.FLOAT16}
    assert verify.verify_onnx(report.path, unet).passed
    assert next(unet.parameters()).dtype == torch.float32
    with pytest.raises(BadInput, match=r"--keep-fp32.*nosuch.*matches no layer"):
        to_onnx(unet, tmp_path / "n.onnx", dtype="fp16", keep_fp32=["nosuch"])
    with pytest.raises(BadInput, match="--keep-fp32 conv_in: all of an fp32 file is fp32"):
        to_onnx(unet, tmp_path / "n.onnx", keep_fp32=["conv_in"])


@pytest.mark.slow
def test_a_file_that_fails_at_one_end_of_the_timesteps_alone_is_rejected(tmp_path: Path, monkeypatch: Any) -> None:
    """On a provider that computes fp16, whose part the CPU plays."""
    monkeypatch.setitem(provider_table.PROVIDERS, "cpu", replace(provider_table.CPU, dtypes=("fp32", "fp16")))
    path = to_onnx(tiny_unet(), tmp_path / "m.onnx", dtype="fp16").path
    found = verify.verify_onnx(path, tiny_unet())
    assert found.passed
    assert "finite at 50 timesteps" in {case.name for case in found.cases}
    whole = verify.OrtDenoiser.__call__

    def fails(session: Any, inputs: Any) -> torch.Tensor:
        output = whole(session, inputs)
        return output * float("nan") if int(inputs["timestep"][0]) == 990 else output

    monkeypatch.setattr(verify.OrtDenoiser, "__call__", fails)
    found = verify.verify_onnx(path, tiny_unet())
    assert found.worst.name == "not finite at timestep 990"
    assert found.rejected


@pytest.mark.slow
def test_a_pruned_file_may_be_twice_as_wrong_as_the_dense_one_and_no_more(models, tmp_path, monkeypatch) -> None:
    options = workflow.Options(dtype="fp16", latency=False, baseline=models.dense, steps=2)
    said: list[str] = []
    content = workflow.run(models.pruned, tmp_path / "m.onnx", options, said.append).content
    assert content["verify"]["dense"]["allowed"] == 2 * content["verify"]["dense"]["relative"]
    assert content["verify"]["tolerance"]["relative"] == content["verify"]["dense"]["allowed"]
    assert 1e-5 < content["verify"]["dense"]["relative"] < 5e-3
    assert any("no layer is kept in fp32" in line for line in said)
    monkeypatch.setattr(baseline, "WORSE", 1e4)
    with pytest.raises(CheckFailed, match=r"its own fp16 file is off by .* so that nothing could be told by it"):
        workflow.run(models.pruned, tmp_path / "n.onnx", options)
    assert not (tmp_path / "n.onnx").exists()
    monkeypatch.setattr(baseline, "WORSE", 1e-4)
    with pytest.raises(CheckFailed, match="does not compute what"):
        workflow.run(models.pruned, tmp_path / "n.onnx", options)
    assert (tmp_path / "n.onnx.rejected").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_largest_value_is_infinite_wherever_one_is_not_finite(value: float) -> None:
    one, odd = torch.ones(2), torch.tensor([0.5, value])
    assert largest([one, [-2 * one]]) == 2
    assert largest([one, odd]) == largest([odd, one]) == largest({"sample": odd}) == float("inf")
