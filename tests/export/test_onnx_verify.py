from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from onnx import helper, numpy_helper
from tiny import make_unet
from tiny_conditional import SD, SDXL
from tiny_conditional import make_unet as make_conditional

import diffprune_plugin
from diffprune_plugin.errors import BadInput
from diffprune_plugin.export import ORTUNet, convert, read_provenance, to_onnx, verify, verify_onnx
from diffprune_plugin.export.feeds import example_feeds, fixed_dims
from diffprune_plugin.export.integrity import read_manifest
from diffprune_plugin.export.options import Options
from diffprune_plugin.export.ort_session import RunFailed
from diffprune_plugin.export.pipeline_workflow import run_pipeline
from diffprune_plugin.export.scheduler import pipeline_scheduler
from diffprune_plugin.export.verify import OrtDenoiser, Tolerance, judged, summary
from diffprune_plugin.export.workflow import run
from diffprune_plugin.plugins import find_adapter


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
    assert [c.name for c in result.cases if c.name[0] in "hw"] == [
        f"{axis} {size}" for axis in ("height", "width") for size in (20, 8, 22)
    ]
    assert result.tolerance.relative == 5e-3


def test_a_learned_time_embedding_is_fed_the_timesteps_that_it_has_rows_for(tmp_path):
    unet = make_unet(time_embedding_type="learned", num_train_timesteps=7)
    to_onnx(unet, tmp_path / "m.onnx")
    facts = read_provenance(tmp_path / "m.onnx")
    assert facts["timesteps"] == "[0, 6]"
    assert example_feeds(tmp_path / "m.onnx", {"batch": 2, "steps": 2})["timestep"].tolist() == [3, 3]
    result = verify_onnx(tmp_path / "m.onnx", unet)
    assert result.passed, summary(result)
    assert [c.name for c in result.cases][:4] == [f"batch 1, timestep {t}" for t in (0, 1, 6, 6)]
    with pytest.raises(BadInput, match="its timesteps go from 0 to 999, this UNet2DModel has learned those to 6"):
        verify_onnx(tmp_path / "m.onnx", unet, scheduler=DDIMScheduler(), steps=2)
    assert (tmp_path / "m.onnx").exists(), "nothing is wrong with the file"


@pytest.mark.parametrize(("rows", "total"), [(20, 30), (1000, 1001)])
def test_a_scheduler_longer_than_a_learned_time_table_is_refused_before_an_export_verified_or_not(
    rows: int, total: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of as many rows as schedulers have by default too; a time embedding that is computed has no end."""

    def reached(*_: object) -> None:
        raise InterruptedError("traced")

    monkeypatch.setattr(convert, "traced", reached)
    for kind in ("learned", "positional"):
        unet = make_unet(time_embedding_type=kind, num_train_timesteps=rows)
        DDIMPipeline(unet, DDIMScheduler(num_train_timesteps=total)).save_pretrained(tmp_path / kind)
    said = f"timesteps go from 0 to {total - 1}, this UNet2DModel has learned those to {rows - 1};"
    learned = tmp_path / "learned"
    for export in (
        lambda: to_onnx(learned, tmp_path / "m.onnx"),
        lambda: to_onnx(DDIMPipeline.from_pretrained(learned), tmp_path / "m.onnx"),
        lambda: run(learned, tmp_path / "m.onnx", Options(verify=False, latency=False)),
        lambda: run_pipeline(learned, tmp_path / "m", Options(latency=False)),
        lambda: run_pipeline(learned, tmp_path / "m", Options(verify=False, latency=False)),
    ):
        with pytest.raises(BadInput, match=said):
            export()
    assert {path.name for path in tmp_path.iterdir()} <= {"learned", "positional", "m.verdict.json"}
    with pytest.raises(InterruptedError, match="traced"):
        to_onnx(tmp_path / "positional", tmp_path / "m.onnx")


@pytest.mark.slow
def test_a_graph_that_takes_only_a_timestep_for_each_sample_is_caught(tmp_path, monkeypatch):
    """Planted: SDXL as it was exported before, on which optimum-onnx failed; and one that broadcasts by luck."""
    monkeypatch.setattr(convert, "loosen_", lambda *_: None)
    for unet in (make_conditional(SDXL), make_unet()):
        path = tmp_path / f"{type(unet).__name__}.onnx"
        to_onnx(unet, path)
        result = verify_onnx(path, unet)
        assert not result.passed
        assert "timestep has the batch's length only" in result.worst.name


def test_one_timestep_for_all_samples_gives_what_one_for_each_does_and_another_length_is_refused(models):
    session = OrtDenoiser(models.pruned_onnx)
    inputs = {"sample": torch.randn(3, 3, 16, 16), "timestep": torch.tensor([7, 7, 7])}
    assert torch.equal(session(inputs | {"timestep": torch.tensor([7])}), session(inputs))
    with pytest.raises(RunFailed, match="Expand"):
        session(inputs | {"timestep": torch.tensor([7, 7])})


def test_timesteps_between_whole_ones_are_computed_where_the_model_takes_them(tmp_path):
    unet, path = make_unet(), tmp_path / "m.onnx"
    to_onnx(unet, path, timestep="float32")
    result = verify_onnx(path, unet)
    assert result.passed, summary(result)
    assert [c.name for c in result.cases if "998.375" in c.name] == ["batch 2, one timestep 998.375 for all"]
    sample, halfway = torch.randn(2, 1, 16, 16), torch.tensor(3.5)
    with torch.no_grad():
        expected = unet(sample, halfway).sample
    torch.testing.assert_close(ORTUNet(path)(sample, halfway).sample, expected, rtol=1e-4, atol=1e-5)
    learned = make_unet(time_embedding_type="learned", num_train_timesteps=7)
    with pytest.raises(BadInput, match="--timestep float32: this UNet2DModel takes whole timesteps only"):
        to_onnx(learned, tmp_path / "learned.onnx", timestep="float32")


@pytest.mark.parametrize(
    ("make", "step", "odd"),
    [pytest.param(lambda: make_conditional(SD), 1, 13, marks=pytest.mark.slow), (make_unet, 2, 22)],
)
def test_every_size_that_pytorch_computes_is_in_a_file_with_open_height_and_width(make, step, odd, tmp_path):
    """A UNet2DConditionModel takes any size, a UNet2DModel multiples of its depth: the file says so, and is as good."""
    unet, path = make(), tmp_path / "m.onnx"
    to_onnx(unet, path, dynamic=("batch", "height", "width"))
    promised = {"height": step, "width": step}
    assert json.loads(read_provenance(path)["multiples"]) == promised
    assert read_manifest(path)["files"]["m.onnx"]["multiples"] == promised
    result = verify_onnx(path, unet)
    assert result.passed, summary(result)
    assert {f"height {odd}", f"width {odd}"} <= {case.name for case in result.cases}
    session, adapter = ORTUNet(path), find_adapter(unet)
    for size in ((16, 16), (13 * step, 16), (11 * step, 7 * step)):
        inputs = adapter.flat_inputs(unet, size=size)
        with torch.no_grad():
            expected = adapter.denoise(unet, inputs)
        torch.testing.assert_close(session(**inputs).sample, expected, rtol=1e-4, atol=1e-5)
    if step > 1:
        with pytest.raises(BadInput, match="width 7: it computes multiples of 2, next 6 and 8; pad or resize"):
            session(**adapter.flat_inputs(unet, size=(16, 7)))
        with pytest.raises(BadInput, match="height 1: it computes multiples of 2, next 2; pad"):
            fixed_dims(path, height=1)


def rejected(path: Path) -> bool:
    left = sorted(file.name for file in path.parent.iterdir())
    return left == sorted([f"{path.name}.rejected", f"{path.name}.manifest.json.rejected"])


def test_a_changed_weight_is_caught_and_the_file_renamed(models, copy, resigned):
    model = onnx.load(copy)
    weight = next(t for t in model.graph.initializer if t.name == "model.mid_block.resnets.0.conv1.weight")
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


@pytest.mark.parametrize(("baked", "missed"), [(1, "batch 2, timestep 0, 1"), (2, "batch 1, timestep 0: ")])
def test_a_batch_that_only_works_at_one_size_is_caught(models, copy, resigned, baked, missed):
    model = onnx.load(copy)
    for node in model.graph.node:
        node.input[:] = ["one" if name == "sample" else name for name in node.input]
    model.graph.initializer.append(numpy_helper.from_array(np.array([baked, 3, 16, 16]), "shape of one"))
    model.graph.node.insert(0, helper.make_node("Reshape", ["sample", "shape of one"], ["one"]))
    onnx.save(model, copy)
    resigned(copy)
    result = verify_onnx(copy, models.pruned)
    assert not result.passed
    assert result.worst.name.startswith(missed)
    assert rejected(copy)
    result.sampling = [math.nan, 1.0]
    facts = json.dumps(result.as_dict(), allow_nan=False)
    assert '"sampling": [null, 1.0]' in facts


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


@pytest.mark.parametrize(
    ("provider", "dtype", "relative"),
    [
        ("cpu", "fp32", 1e-5),
        ("cuda", "fp32", 1e-4),
        ("cuda:use_tf32=1", "fp32", 5e-3),
        ("cuda:use_tf32=0", "fp32", 1e-4),
        ("cuda:use_tf32=1", "fp16", 5e-3),
    ],
)
def test_the_tolerance_is_that_of_the_products_of_a_provider(provider, dtype, relative):
    assert verify.tolerance_of(provider, dtype).relative == relative


def test_a_nan_is_a_miss():
    case = judged("x", torch.tensor([float("nan")]), torch.tensor([1.0]), Tolerance(1.0, 1.0))
    assert not case.passed


def test_the_limit_is_the_absolute_tolerance_plus_the_relative_one_of_the_largest_output():
    expected = torch.tensor([10.0, -1.0])
    assert judged("x", expected + 0.10, expected, Tolerance(0.01, 0.01)).passed
    assert not judged("x", expected + 0.12, expected, Tolerance(0.01, 0.01)).passed


def test_a_unet_that_takes_more_channels_than_it_gives_is_sampled_with_the_rest_as_it_is(tmp_path):
    """Of inpainting and of instructions: latents, and what they are drawn beside."""
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    kinds = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = UNet2DModel(in_channels=9, out_channels=4, add_attention=False, **sizes, **kinds).eval()
    to_onnx(unet, tmp_path / "m.onnx")
    result = verify_onnx(tmp_path / "m.onnx", unet, scheduler=DDIMScheduler(), steps=3)
    assert result.passed, summary(result)
    assert len(result.sampling) == 3


@pytest.mark.parametrize(
    ("config", "steps", "words"),
    [
        ({}, 2000, "--steps 2000: "),
        ({"steps_offset": 1}, 1000, "--steps 1000: they would begin at timestep 1000 of 1000; take fewer"),
    ],
)
def test_more_steps_than_the_scheduler_has_are_refused_before_any_work(models, copy, config, steps, words):
    with pytest.raises(BadInput, match=words):
        verify_onnx(copy, models.pruned, scheduler=DDIMScheduler(**config), steps=steps)
    assert copy.exists()


def test_memory_that_runs_out_is_no_miss(models, copy, monkeypatch):
    def fails(*_: object) -> None:
        raise RuntimeError("Failed to allocate memory for requested buffer of size 9")

    monkeypatch.setattr("onnxruntime.InferenceSession.run", fails)
    with pytest.raises(RuntimeError, match="Failed to allocate"):
        verify_onnx(copy, models.pruned)
    assert copy.exists()


def test_a_scheduler_that_ddim_cannot_follow_is_none_and_a_damaged_one_is_named(models, tmp_path):
    shutil.copytree(models.pruned / "scheduler", tmp_path / "scheduler")
    file = tmp_path / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"prediction_type": "flow_prediction"}))
    assert pipeline_scheduler(tmp_path) is None
    file.write_text("{")
    with pytest.raises(BadInput, match=r"damaged scheduler_config\.json"):
        pipeline_scheduler(tmp_path)


def test_a_model_without_scheduler_has_no_sampling_run(models, tmp_path):
    assert pipeline_scheduler(models.pruned / "unet") is None


def test_an_input_that_is_always_the_same_has_to_be_depended_on_too() -> None:
    """FLUX's guidance: flipped it is what it was."""

    def denoise(inputs: Any) -> torch.Tensor:
        return inputs["sample"] * inputs["guidance"] + inputs["timestep"]

    example = {"sample": torch.ones(1, 2), "timestep": torch.zeros(1), "guidance": torch.full((1,), 3.5)}
    adapter = SimpleNamespace(timestep="timestep", model_time=1.0)
    subject: Any = SimpleNamespace(
        adapter=adapter, taken=lambda step: step, denoise=denoise, example=lambda seed=0: dict(example)
    )
    for session, holds in ((denoise, True), (lambda inputs: denoise(inputs | {"guidance": torch.tensor(3.5)}), False)):
        cases = {case.name: case.passed for case in verify.dependence(session, subject, verify.TOLERANCES["fp32"])}
        assert cases == {name: holds or name != "output depends on guidance" for name in cases}
        assert len(cases) == 3
