"""nncf_prune in the place of nncf.prune, and what NNCF does with the result: statistics and quantization."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers import DDPMScheduler
from tiny import make_unet
from tiny_conditional import FAMILIES
from tiny_conditional import make_unet as make_conditional

import diffprune_plugin as dp
from diffprune_plugin.adapters.unet_2d import UNET_2D
from diffprune_plugin.adapters.unet_2d_condition import UNET_2D_CONDITION
from diffprune_plugin.criteria.sweep import Sweep
from diffprune_plugin.errors import BadInput, MissingGradients
from diffprune_plugin.export import to_onnx

nncf = pytest.importorskip("nncf")


def test_it_takes_what_nncfs_own_function_takes_with_importance_for_the_mode() -> None:
    theirs, ours = (inspect.signature(function).parameters for function in (nncf.prune, dp.nncf_prune))
    names = ["importance" if name == "mode" else name for name in theirs]
    assert list(ours)[: len(names)] == names
    assert all(ours[a].kind == theirs[b].kind for a, b in zip(names, theirs, strict=True))


def test_diff_taylor_masks_in_place_what_its_plan_says(unet, images) -> None:
    sweep = Sweep(samples=8, curve_samples=2)
    calibration = dp.calibrate(unet, DDPMScheduler(100), images, sweep, timesteps=5, batch_size=4, progress=False)
    criterion = dp.importance("diff_taylor", calibration=calibration)
    expected = dp.make_plan(unet, criterion, pruning_ratio=0.3, description={"name": "diff_taylor"})
    model = dp.nncf_prune(unet, importance="diff_taylor", ratio=0.3, calibration=calibration)
    assert model is unet
    assert model.mask_report.plan == expected
    before, after = expected.params
    assert nncf.pruning_statistic(model).global_pruning_ratio == (before - after) / before
    with pytest.raises(MissingGradients, match="calibrat"):
        dp.nncf_prune(make_unet())
    other = dp.nncf_prune(make_unet(), criterion, ratio=0.3)
    assert other.mask_report.plan.groups == expected.groups


SCOPES: dict[str, Any] = {
    "a parameter": {"names": ["down_blocks.1.resnets.0.conv1.weight"]},
    "a pattern of parameters": {"patterns": [r"mid_block\..*"]},
    "an operation": {"names": ["conv_in/conv2d/0"]},
    "a type": {"types": ["linear"]},
}


@pytest.mark.parametrize("scope", SCOPES.values(), ids=SCOPES)
def test_an_ignored_scope_spares_the_layers_that_nncf_spares(unet, scope) -> None:
    inputs = UNET_2D.example_inputs(unet, batch=2)
    everything = {"mode": nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL, "ratio": 0.5, "examples_inputs": inputs}
    theirs = nncf.prune(make_unet(), ignored_scope=nncf.IgnoredScope(**scope), **everything)
    spared, everywhere = (
        {tensor.tensor_name for tensor in nncf.pruning_statistic(model).pruned_tensors}
        for model in (theirs, nncf.prune(make_unet(), **everything))
    )
    named = [f"{layer}.weight" for layer, _ in unet.named_modules() if f"{layer}.weight" in everywhere - spared]
    assert named
    args = (inputs["sample"], inputs["timestep"])
    for examples in (inputs, args, None):
        ours = make_unet()
        dp.nncf_prune(ours, "magnitude", ratio=0.5, ignored_scope=nncf.IgnoredScope(**scope), examples_inputs=examples)
        plan = ours.mask_report.plan
        assert not any(g.removed for g in plan.groups if {f"{layer}.weight" for layer in g.layers} & set(named))
        assert any(group.removed for group in plan.groups)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ignored_scope": {"names": ["conv_inn.weight"]}}, "ignored_scope: Ignored nodes that matches names"),
        ({"ignored_scope": {"types": ["group_norm"]}}, "means no layer with weights"),
        ({"ignored_scope": ["conv_in"]}, "is no nncf.IgnoredScope"),
        ({"examples_inputs": [torch.zeros(1)]}, "examples_inputs: a list; give a tuple or a dict"),
        ({"ratio": 1.0}, "pruning_ratio: 1.0 is outside [0, 1)"),
        ({"importance": nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL}, "unknown criterion"),
        ({"importance": "diff_tailor"}, "did you mean 'diff_taylor'"),
        ({"pruning_ratio": 0.3}, "pruning_ratio: 0.3 is called ratio here, as in nncf.prune"),
    ],
    ids=str,
)
def test_what_it_cannot_use_is_one_line_and_changes_nothing(unet, options, words) -> None:
    before = set(unet.state_dict())
    if isinstance(options.get("ignored_scope"), dict):
        options = {"ignored_scope": nncf.IgnoredScope(**options["ignored_scope"])}
    with pytest.raises(BadInput) as error:
        dp.nncf_prune(unet, **{"importance": "magnitude", **options})
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert set(unet.state_dict()) == before
    assert "forward" not in vars(unet)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["UNet2DModel", "UNet2DConditionModel"])
def test_nncf_quantizes_the_unet_that_was_masked_and_removed_and_its_onnx(name, tmp_path, monkeypatch) -> None:
    """The first call on a torch model compiles a C++ extension: without the variable it gives up after a minute."""
    monkeypatch.setenv("NNCF_EXTENSION_LOAD_TIMEOUT", "0")
    conditional = name == "UNet2DConditionModel"
    unet, adapter = (make_conditional(FAMILIES["sd 1.5"]), UNET_2D_CONDITION) if conditional else (make_unet(), UNET_2D)
    dp.nncf_prune(unet, "magnitude", ratio=0.5)
    dp.remove_(unet, dp.fold_(unet).plan)
    inputs = [adapter.flat_inputs(unet, batch=2, seed=seed) for seed in range(4)]
    with torch.no_grad():
        expected = unet(**inputs[0]).sample.numpy()
        to_onnx(unet, tmp_path / "model.onnx")
        quantized = nncf.quantize(unet, nncf.Dataset(inputs), subset_size=4)
        rounded = quantized(**inputs[0]).sample.numpy()
    feeds = [{key: value.numpy() for key, value in flat.items()} for flat in inputs]
    model = nncf.quantize(onnx.load(tmp_path / "model.onnx"), nncf.Dataset(feeds), subset_size=4)
    options = onnxruntime.SessionOptions()  # as the graph says: int8 kernels saturate on a CPU without VNNI (0.37 here)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for actual in (rounded, session.run(None, feeds[0])[0]):
        assert 0 < np.linalg.norm(actual - expected) / np.linalg.norm(expected) < 0.2  # random weights
    with pytest.raises(BadInput, match=r"before nncf\.quantize"):
        dp.make_plan(quantized, "magnitude")
