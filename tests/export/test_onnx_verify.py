from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

import diffprune_plugin
from diffprune_plugin.errors import BadInput
from diffprune_plugin.export import verify_onnx
from diffprune_plugin.export.verify import Tolerance, judged, pipeline_scheduler, summary


def test_the_pruned_file_computes_what_pytorch_does_within_a_hundred_thousandth(models):
    result = verify_onnx(models.pruned_onnx, models.pruned, scheduler=pipeline_scheduler(models.pruned), steps=4)
    assert result.passed, summary(result)
    assert result.worst.relative < 1e-5
    names = [case.name for case in result.cases]
    assert "batch 1, timestep 999" in names
    assert "batch 5, timestep 0, 1, 10, 500, 999" in names
    assert "output depends on timestep" in names
    assert [name for name in names if name.startswith("sampling")] == [
        f"sampling, timestep {t}" for t in (750, 500, 250, 0)
    ]
    assert len(result.sampling) == 4


def test_every_dynamic_axis_is_tried_at_two_other_sizes_and_fp16_has_its_own_tolerance(models, mixed_onnx):
    result = verify_onnx(mixed_onnx, models.pruned)
    assert result.passed, summary(result)
    assert [c.name for c in result.cases if c.name[0] in "hw"] == ["height 20", "height 8", "width 20", "width 8"]
    assert result.tolerance.relative == 5e-3


def rejected(path: Path) -> bool:
    left = sorted(file.name for file in path.parent.iterdir())
    return left == sorted([f"{path.name}.rejected", f"{path.name}.manifest.json.rejected"])


def test_a_changed_weight_is_caught_and_the_file_renamed(models, copy, resigned):
    model = onnx.load(copy)
    weight = next(t for t in model.graph.initializer if t.name == "unet.mid_block.resnets.0.conv1.weight")
    values = numpy_helper.to_array(weight).copy()
    values[0, 0, 1, 1] += 0.01
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(model, copy)
    resigned(copy)
    result = verify_onnx(copy, models.pruned)
    assert not result.passed
    assert "batch 1, timestep 0: error" in summary(result)
    assert rejected(copy)


def test_a_baked_timestep_is_caught_as_an_output_that_does_not_depend_on_it(models, copy, resigned):
    model = onnx.load(copy)
    for node in model.graph.node:
        node.input[:] = ["baked" if name == "timestep" else name for name in node.input]
    constants = {"zero": 0, "five hundred": 500}
    model.graph.initializer.extend(numpy_helper.from_array(np.array([v]), name) for name, v in constants.items())
    nodes = [
        helper.make_node("Mul", ["timestep", "zero"], ["nothing"]),
        helper.make_node("Add", ["nothing", "five hundred"], ["baked"]),
    ]
    for node in reversed(nodes):
        model.graph.node.insert(0, node)
    onnx.save(model, copy)
    resigned(copy)
    result = verify_onnx(copy, models.pruned)
    missed = [case.name for case in result.cases if not case.passed]
    assert "output depends on timestep" in missed
    assert "batch 1, timestep 0" in missed
    assert "batch 1, timestep 500" not in missed
    assert rejected(copy)


def test_a_batch_that_only_works_at_1_is_caught(models, copy, resigned):
    model = onnx.load(copy)
    for node in model.graph.node:
        node.input[:] = ["one" if name == "sample" else name for name in node.input]
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 3, 16, 16]), "shape of one"))
    model.graph.node.insert(0, helper.make_node("Reshape", ["sample", "shape of one"], ["one"]))
    onnx.save(model, copy)
    resigned(copy)
    result = verify_onnx(copy, models.pruned)
    assert not result.passed
    assert result.worst.name.startswith("batch 2, timestep 0, 1")
    assert rejected(copy)


def test_an_input_that_the_graph_lacks_is_named(models, copy, resigned):
    model = onnx.load(copy)
    model.graph.input[1].name = "time"
    for node in model.graph.node:
        node.input[:] = ["time" if name == "timestep" else name for name in node.input]
    onnx.save(model, copy)
    resigned(copy)
    result = verify_onnx(copy, models.pruned)
    assert "time, timestep only in the graph or only in the model" in summary(result)


def test_another_model_of_the_same_shape_is_caught(models, copy):
    unet = diffprune_plugin.load(models.pruned)
    with torch.no_grad():
        unet.conv_out.bias += 1e-3
    assert not verify_onnx(copy, unet).passed


def test_a_damaged_file_is_refused_not_rejected(models, copy):
    copy.write_bytes(copy.read_bytes()[:-1])
    with pytest.raises(BadInput, match="truncated"):
        verify_onnx(copy, models.pruned)
    assert copy.exists()


def test_a_nan_is_a_miss():
    case = judged("x", torch.tensor([float("nan")]), torch.tensor([1.0]), Tolerance(1.0, 1.0))
    assert not case.passed


def test_the_limit_is_the_absolute_tolerance_plus_the_relative_one_of_the_largest_output():
    expected = torch.tensor([10.0, -1.0])
    assert judged("x", expected + 0.10, expected, Tolerance(0.01, 0.01)).passed
    assert not judged("x", expected + 0.12, expected, Tolerance(0.01, 0.01)).passed


def test_a_model_without_scheduler_has_no_sampling_run(models, tmp_path):
    assert pipeline_scheduler(models.pruned / "unet") is None
