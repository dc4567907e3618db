"""Transformers by their tables: every unit goes as the dense model without it says, and what is left loads again."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_transformers import MODELS, make, samples_for

import diffprune_plugin as dp
from diffprune_plugin.adapters import BUILT_IN
from diffprune_plugin.errors import BadInput
from diffprune_plugin.plugins import find_adapter
from diffprune_plugin.testing import check_adapter

JOINT, SELF = ("to_out.0", "to_add_out"), ("to_out.0",)
# The root layer of each kind of unit, and the layers that read these units.
UNITS: list[tuple[str, str, Sequence[str]]] = [
    ("DiT", "transformer_blocks.0.ff.net.0.proj", ["transformer_blocks.0.ff.net.2"]),
    (
        "DiT",
        "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2",
        ["transformer_blocks.0.norm1.linear", "proj_out_1"],
    ),
    ("PixArt sigma", "transformer_blocks.1.ff.net.0.proj", ["transformer_blocks.1.ff.net.2"]),
    ("PixArt alpha", "caption_projection.linear_1", ["caption_projection.linear_2"]),
    (
        "PixArt alpha",
        "adaln_single.emb.resolution_embedder.linear_1",
        ["adaln_single.emb.resolution_embedder.linear_2"],
    ),
    *((name, "transformer_blocks.0.ff.net.0.proj", ["transformer_blocks.0.ff.net.2"]) for name in ("SD 3", "SD 3.5")),
    ("SD 3.5", "transformer_blocks.0.ff_context.net.0.proj", ["transformer_blocks.0.ff_context.net.2"]),
    (
        "SD 3.5",
        "time_text_embed.timestep_embedder.linear_2",
        [f"transformer_blocks.{i}.{norm}.linear" for i in range(3) for norm in ("norm1", "norm1_context")]
        + ["norm_out.linear"],
    ),
    ("Flux", "transformer_blocks.1.ff.net.0.proj", ["transformer_blocks.1.ff.net.2"]),
    ("Flux", "transformer_blocks.0.ff_context.net.0.proj", ["transformer_blocks.0.ff_context.net.2"]),
    ("Flux", "single_transformer_blocks.0.proj_mlp", ["single_transformer_blocks.0.proj_out"]),
    (
        "Flux",
        "time_text_embed.guidance_embedder.linear_2",
        [f"transformer_blocks.{i}.{norm}.linear" for i in range(2) for norm in ("norm1", "norm1_context")]
        + [f"single_transformer_blocks.{i}.norm.linear" for i in range(2)]
        + ["norm_out.linear"],
    ),
]
BEHIND = {"single_transformer_blocks.0.proj_out": 64}  # the attention's outputs come first
HEADS: list[tuple[str, str, Sequence[str]]] = [
    ("DiT", "transformer_blocks.0.attn1", SELF),
    ("PixArt sigma", "transformer_blocks.0.attn1", SELF),
    ("PixArt sigma", "transformer_blocks.1.attn2", SELF),
    ("SD 3", "transformer_blocks.0.attn", JOINT),
    ("SD 3", "transformer_blocks.2.attn", SELF),
    ("SD 3.5", "transformer_blocks.0.attn", JOINT),
    ("SD 3.5", "transformer_blocks.1.attn2", SELF),
    ("Flux", "transformer_blocks.0.attn", JOINT),
    ("Flux", "single_transformer_blocks.1.attn", ("",)),
]


@torch.no_grad()
def output_of(model: Any, seed: int = 0) -> torch.Tensor:
    adapter = find_adapter(model)
    return adapter.denoise(model, adapter.flat_inputs(model, batch=2, seed=seed))


@torch.no_grad()
def without(model: Any, layers: Sequence[str], channels: Sequence[int]) -> Any:
    """The dense model whose layers do not see these inputs."""
    blind = copy.deepcopy(model)
    for name in layers:
        blind.get_submodule(name).weight[:, list(channels)] = 0
    return blind


def check_oracle(model: Any, plan: dp.PruningPlan, blind: Any) -> None:
    dense, expected = output_of(model), output_of(blind)
    dp.remove_(model, plan)
    found = output_of(model)
    scale = expected.abs().max()
    assert (found - expected).abs().max() < 1e-5 * scale
    assert (dense - expected).abs().max() > 1e-4 * scale  # they had an effect


@pytest.mark.parametrize(("name", "root", "readers"), UNITS)
def test_units_that_go_leave_the_dense_model_that_does_not_read_them(name: str, root: str, readers: Any) -> None:
    model = make(name)
    plan = dp.make_plan(model, "magnitude", pruning_ratio=0.0, pruning_ratio_dict={root: 0.5})
    (gone,) = [group.removed for group in plan.groups if group.removed]
    assert len(gone) == next(group.units for group in plan.groups if group.removed) // 2
    places = [place + BEHIND.get(readers[0], 0) for place in gone]
    check_oracle(model, plan, without(model, readers, places))


@pytest.mark.parametrize(("name", "attention", "outputs"), HEADS)
def test_whole_heads_that_go_leave_the_dense_model_without_them(name: str, attention: str, outputs: Any) -> None:
    model = make(name)
    others = [other for other, module in model.named_modules() if hasattr(module, "heads") and other != attention]
    plan = dp.make_plan(model, "magnitude", pruning_ratio=0.0, head_pruning_ratio=0.25, ignored_layers=others)
    assert plan.heads == {attention: (4, 3)}
    (gone,) = [group.removed for group in plan.groups if group.removed]
    readers = [f"{attention}.{out}" if out else attention.replace("attn", "proj_out") for out in outputs]
    check_oracle(model, plan, without(model, readers, gone))
    module = model.get_submodule(attention)
    width = module.to_q.out_features
    assert (module.heads, module.inner_dim) == (3, width)
    assert getattr(module, "inner_kv_dim", width) == width


@pytest.mark.parametrize(
    ("name", "attention"), [("DiT", "transformer_blocks.1.attn1"), ("PixArt sigma", "transformer_blocks.0.attn2")]
)
def test_dimensions_inside_heads_go_where_nothing_ties_them(name: str, attention: str) -> None:
    model = make(name)
    plan = dp.make_plan(model, "magnitude", pruning_ratio=0.0, pruning_ratio_dict={attention: 0.5})
    (gone,) = [list(group.removed) for group in plan.groups if group.removed]
    blind = without(model, [f"{attention}.to_out.0"], gone)
    with torch.no_grad():
        for parameter in blind.get_submodule(f"{attention}.to_q").parameters():
            parameter[gone] = 0
    check_oracle(model, plan, blind)
    assert model.get_submodule(attention).inner_dim == 16


@pytest.mark.parametrize("name", ["SD 3.5", "Flux"])
def test_attention_of_joint_streams_loses_whole_heads_by_the_common_ratio_or_its_own(name: str) -> None:
    model = make(name)
    plan = dp.make_plan(model, "magnitude", pruning_ratio=0.5)
    assert set(plan.heads.values()) == {(4, 2)}
    own = dp.make_plan(model, "magnitude", pruning_ratio=0.5, pruning_ratio_dict={"transformer_blocks.0.attn": 0.75})
    assert own.heads["transformer_blocks.0.attn"] == (4, 1)
    assert own.heads["transformer_blocks.1.attn"] == (4, 2)


@pytest.mark.parametrize("ratio", [*(pytest.param(r, marks=pytest.mark.slow) for r in (0.1, 0.3, 0.7)), 0.5])
@pytest.mark.parametrize("name", MODELS)
def test_plans_are_reached_within_a_step_and_pruned_models_load_with_difference_0(
    name: str, ratio: float, tmp_path: Path
) -> None:
    model = make(name)
    plan = dp.make_plan(model, "magnitude", pruning_ratio=ratio)
    assert all(group.requested - len(group.removed) < group.step for group in plan.groups)
    dp.remove_(model, plan)
    assert plan.params[1] == sum(p.numel() for p in model.parameters())
    loaded = dp.load(dp.save(model, tmp_path / "pruned"))
    assert torch.equal(output_of(loaded), output_of(model))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_pruned_one_loads_by_the_file_beside_it_without_this_package(name: str, tmp_path: Path) -> None:
    model = make(name)
    dp.remove_(model, dp.make_plan(model, "magnitude", pruning_ratio=0.5))
    file = dp.save(model, tmp_path / "pruned") / "diffprune_plugin.py"
    spec = importlib.util.spec_from_file_location("alone", file)
    assert spec
    assert spec.loader
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    kind = type("Alone", (alone.Pruned, MODELS[name][0]), {})
    adapter = find_adapter(model)
    inputs = adapter.flat_inputs(model, batch=2)
    assert torch.equal(adapter.denoise(kind.from_pretrained(file.parent), inputs), output_of(model))


class Evenly:
    """What a sensitivity says, where each further unit of a group costs more than the last."""

    most, sha256 = 0.75, "even"

    def knows(self, root: str, count: int) -> bool:
        return True

    def error(self, root: str, units: Sequence[int]) -> float:
        return float(len(units)) ** 2


@pytest.mark.parametrize("name", ["DiT", *(pytest.param(n, marks=pytest.mark.slow) for n in MODELS if n != "DiT")])
def test_a_target_is_spent_where_it_costs_least(name: str) -> None:  # norms without weights are in groups too
    plan = dp.make_plan(make(name), "magnitude", allocation="linear", sensitivity=Evenly(), params_target=0.9)
    assert 0.87 < plan.params[1] / plan.params[0] <= 0.9
    assert plan.shortfalls() == []


@pytest.mark.parametrize("name", ["DiT", "SD 3.5"])
def test_a_target_is_met_by_heads_and_widths_together(name: str) -> None:
    model = make(name, num_layers=4)
    plan = dp.make_plan(model, "magnitude", params_target=0.6)
    assert plan.params[1] / plan.params[0] == pytest.approx(0.6, rel=0.01)


TABLES = {
    "DiTTransformer2DModel": ["DiT"],
    "PixArtTransformer2DModel": ["PixArt sigma", "PixArt alpha"],
    "SD3Transformer2DModel": ["SD 3", "SD 3.5"],
    "FluxTransformer2DModel": ["Flux"],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TABLES)
def test_its_table_holds_all_that_it_needs_and_no_more(kind: str) -> None:
    (adapter,) = [adapter for adapter in BUILT_IN if adapter.model_class == kind]
    check_adapter(adapter, *map(make, TABLES[kind]), export=False)


def test_without_the_norms_of_its_row_the_weights_that_all_heads_share_would_go_with_one() -> None:
    model = make("SD 3.5")
    adapter = find_adapter(model)
    shared = dataclasses.replace(adapter, heads=(dataclasses.replace(adapter.heads[0], norms=()),))
    with pytest.raises(BadInput, match="a parameter outside any layer is coupled"):
        dp.make_plan(model, "magnitude", adapter=shared)


class Packed(torch.nn.Linear):
    """Stands for a layer of a package that is not installed here."""


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("bitsandbytes.nn.modules", "bitsandbytes"),
        ("diffusers.quantizers.gguf.utils", "gguf"),
        ("nunchaku.models.linear", "nunchaku"),
    ],
)
def test_a_quantized_transformer_is_refused_with_the_order_of_things(
    module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("DiT")
    monkeypatch.setattr(Packed, "__module__", module)
    model.transformer_blocks[1].ff.net[2] = Packed(128, 32)
    with pytest.raises(BadInput, match=rf"blocks.1.ff.net.2: quantized \(Packed of {package}\).*and quantize last"):
        dp.make_plan(model, "magnitude")


def test_a_transformer_that_carries_a_lora_is_refused_with_what_to_do() -> None:
    model = make("SD 3")
    model.transformer_blocks[0].attn.to_q.base_layer = torch.nn.Identity()
    with pytest.raises(BadInput, match=r"blocks.0.attn.to_q carries a loaded LoRA .*unload_lora_weights"):
        dp.make_plan(model, "magnitude")


def test_a_transformer_without_an_adapter_is_refused_by_what_it_is() -> None:
    class SanaTransformer2DModel(torch.nn.Module):
        pass

    with pytest.raises(BadInput, match="without an adapter yet: its feed-forward is a gated depthwise convolution"):
        find_adapter(SanaTransformer2DModel())


@pytest.mark.parametrize("norm", ["layer_norm", "fp32_layer_norm"])
def test_norms_of_queries_that_are_not_covered_are_refused(norm: str) -> None:
    with pytest.raises(BadInput, match=f"qk_norm: '{norm}' is not covered"):
        dp.make_plan(make("SD 3", qk_norm=norm), "magnitude", head_pruning_ratio=0.5)


def test_sd3_predicts_as_many_channels_as_it_takes_where_its_config_says_none() -> None:
    model = make("SD 3", out_channels=None)
    samples, scheduler = samples_for(model)
    found = dp.calibrate(model, scheduler, samples, dp.Sweep(samples=2, curve_samples=1), timesteps=2, progress=False)
    assert find_adapter(model).channels(model) == (4, 4)
    assert found.backward > 0


def test_flux_of_larger_patches_is_refused() -> None:
    with pytest.raises(BadInput, match="patch_size: 2 is not covered"):
        dp.make_plan(make("Flux", patch_size=2), "magnitude")
