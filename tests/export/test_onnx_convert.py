from __future__ import annotations

import json
import re
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import diffprune_plugin
from diffprune_plugin.errors import BadInput
from diffprune_plugin.export import read_provenance, to_onnx
from diffprune_plugin.export.convert import dense_twin
from diffprune_plugin.export.feeds import fixed_dims, input_shapes
from diffprune_plugin.export.graphs import content_hash
from diffprune_plugin.export.integrity import check_files
from diffprune_plugin.planning.plan import PruningPlan


def test_names_and_axes_are_those_of_the_adapters_table(models):
    assert input_shapes(models.pruned_onnx) == {"sample": ["batch", 3, 16, 16], "timestep": ["steps"]}
    assert [value.name for value in onnx.load(models.pruned_onnx).graph.output] == ["out_sample"]


def test_the_file_tells_which_plan_and_config_it_came_from(models):
    facts = read_provenance(models.pruned_onnx)
    plan = PruningPlan.read(models.pruned / "unet" / "pruning_plan.json")
    assert facts["plan_sha256"] == plan.sha256
    assert facts["source_config_sha256"] == plan.architecture
    assert json.loads(facts["criterion"]) == plan.criterion
    assert (facts["pruning_ratio"], facts["opset"], facts["dtype"]) == ("0.3", "20", "fp32")
    assert (int(facts["dense_macs"]), int(facts["macs"])) == plan.macs
    assert json.loads(facts["versions"])["torch"] == torch.__version__


def test_a_dense_model_has_no_plan_in_its_provenance(models):
    assert "plan_sha256" not in read_provenance(models.dense_onnx)


def test_no_path_of_the_machine_is_left_in_the_file(models):
    content = models.pruned_onnx.read_bytes()
    assert not re.search(rb"site-packages|\.py\b|/home/|/root/|/tmp/", content)
    assert str(models.pruned).encode() not in content


def test_fp16_takes_two_bytes_a_weight_in_one_file_of_their_own(mixed_onnx):
    data = [path for path in mixed_onnx.parent.iterdir() if path.suffix == ".data"]
    assert len(data) == 1
    assert data[0].stat().st_size == pytest.approx(2 * int(read_provenance(mixed_onnx)["params"]), rel=0.05)
    assert set(fixed_dims(mixed_onnx)) == {"batch", "height", "steps", "width"}
    assert check_files(mixed_onnx)["dtype"] == "fp16"


def test_exporting_a_live_module_leaves_it_as_it_was(models, tmp_path, monkeypatch):
    unet = diffprune_plugin.load(models.pruned).train()
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}

    def stop(*arguments: object, **options: object) -> None:
        raise RuntimeError("as far as needed")

    monkeypatch.setattr(torch.onnx, "export", stop)
    with pytest.raises(BadInput, match="torch cannot export it: as far as needed"):
        to_onnx(unet, tmp_path / "m.onnx", dtype="fp16")
    assert unet.training
    assert next(unet.parameters()).dtype is torch.float32
    assert all(torch.equal(before[name], tensor) for name, tensor in unet.state_dict().items())
    assert list(tmp_path.iterdir()) == []


def test_the_dense_twin_has_the_dense_size(models):
    twin = dense_twin(diffprune_plugin.load(models.pruned))
    assert twin is not None
    assert sum(p.numel() for p in twin.parameters()) == int(read_provenance(models.dense_onnx)["params"])
    assert dense_twin(twin) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 12}, "--opset 12: not one of 18 to 24"),
        ({"dtype": "bf16"}, "--dtype 'bf16'.*not one of fp32, fp16"),
        ({"dynamic": ("batch", "hight")}, "--dynamic 'hight'; did you mean 'height'"),
    ],
)
def test_an_option_that_cannot_be_is_refused_before_any_work(models, tmp_path, options, message):
    with pytest.raises(BadInput, match=message):
        to_onnx(models.pruned, tmp_path / "m.onnx", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_module_without_adapter_is_refused_with_those_known(tmp_path):
    with pytest.raises(BadInput, match=r"no adapter for Linear; have .*UNet2DModel"):
        to_onnx(nn.Linear(2, 2), tmp_path / "m.onnx")


def test_the_name_of_the_weights_file_counts_a_weight_without_dims():
    """As a batch norm has one: how many batches it has seen."""
    norm = nn.BatchNorm2d(2)
    before = content_hash(norm, {})
    assert content_hash(nn.BatchNorm2d(2), {}) == before
    norm.num_batches_tracked += 1
    assert content_hash(norm, {}) != before


def test_a_missing_model_directory_is_named(tmp_path):
    with pytest.raises(BadInput, match="nowhere: no such directory"):
        to_onnx(Path("nowhere"), tmp_path / "m.onnx")
