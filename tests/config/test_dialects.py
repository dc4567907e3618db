"""Configs of other tools: what becomes of every key, against NNCF 2.14's own values where there are any."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch_pruning as tp
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_unet
from tiny_transformers import make as make_transformer
from torch import nn

import diffprune_plugin as dp
import diffprune_plugin.config.dialects.nncf_json as nncf_json
from diffprune_plugin import demo
from diffprune_plugin.config.dialects import read, settle, translate, translated
from diffprune_plugin.config.dialects.flags import FLAGS
from diffprune_plugin.config.dialects.flags import translate as translate_flags
from diffprune_plugin.config.dialects.pruner_kwargs import KEYS
from diffprune_plugin.config.dialects.table import Listing
from diffprune_plugin.config.documents import leaves, parse_mapping
from diffprune_plugin.config.pruning import PruningConfig
from diffprune_plugin.errors import BadInput
from diffprune_plugin.graph.groups import CoupledGroup
from diffprune_plugin.graph.patterns import layer_names, matching
from diffprune_plugin.planning.channels import AskedGroup, Request, asked_of, plan_group
from diffprune_plugin.planning.options import PlanOptions
from diffprune_plugin.plugins import criteria, plugin_manager
from diffprune_plugin.workflow import prune

HERE = Path(__file__).parents[1]
GOLDEN = json.loads((HERE / "golden" / "nncf.json").read_text())
CONFIGS = {path.name: path for path in (HERE / "configs").iterdir()}
KNOWN = tuple(criteria(plugin_manager()))
DIFF_TAYLOR = {"nncf_filter_pruning.json": '"L2"', "torch_pruning.yaml": "TaylorImportance"}


def nncf(params: Any = None, **entry: Any) -> dict[str, Any]:
    """An NNCF config with one entry."""
    inner = {"algorithm": "filter_pruning", **entry}
    return {"compression": inner if params is None else {**inner, "params": params}}


def listing_of(content: Any) -> Listing:
    return translate_flags(content, "f") if isinstance(content, str) else translate(content, "c.json", KNOWN)


def native(content: Any) -> dict[str, Any]:
    return translated(listing_of(content))


# --- the configs that users have


@pytest.fixture(params=CONFIGS)
def user_config(request, tmp_path) -> Path:
    """A config as users have it, its importance replaced by diff_taylor (the flags name it already)."""
    path = tmp_path / request.param
    word = DIFF_TAYLOR.get(request.param, "")
    path.write_text(CONFIGS[request.param].read_text().replace(word, '"diff_taylor"' if word else ""))
    return path


def test_one_word_changed_and_a_users_config_gives_the_plan_of_its_native_form(user_config, run, tmp_path) -> None:
    model = ["--model", demo.MODEL, "--data", demo.CALIBRATION_IMAGES]
    fast = ["importance.sampling=stratified", "importance.samples=8", "importance.curve_samples=1", "timesteps=4"]
    fast = [word for setting in fast for word in ("--set", setting)]
    out = run("prune", user_config, *model, *fast, "--dry-run", "--json")[1]
    theirs = json.loads(out)
    file = tmp_path / "native.yaml"
    assert run("config", user_config, "-o", file)[0] == 0
    ours = prune(settle(read(file), fast[1::2], model=str(model[1]), data=str(model[3])), dry_run=True, progress=False)
    assert theirs["groups"] == json.loads(ours.plan.model_dump_json())["groups"]
    assert dp.PruningPlan.model_validate(theirs).sha256 == ours.plan.sha256
    assert ours.plan.criterion["name"] == "diff_taylor"
    assert ours.plan.macs[1] < 0.6 * ours.plan.macs[0]


def test_their_flags_run_from_the_command_line_too(run) -> None:
    flags = CONFIGS["diff_pruning_flags.txt"].read_text()
    code, out, _ = run("config", "--from-flags", flags, "--json")
    assert code == 0
    assert json.loads(out)["native"] == {
        "importance": {"name": "diff_taylor", "preset": "diffusers", "threshold": 0.05},
        "pruning_ratio": 0.3,
        "batch_size": 64,
        "device": "cpu",
    }
    assert run("config", "--from-flags", flags, CONFIGS["torch_pruning.yaml"])[0] == 2
    assert run("prune")[0] == 2


# --- NNCF


def test_the_first_convolution_is_meant_whatever_its_name() -> None:
    """NNCF's default leaves it; a transformer has no conv_in."""
    assert matching("{first}", layer_names(make_unet()), "ignored_layers") == ["conv_in"]
    assert matching("{first}", layer_names(make_transformer("DiT")), "ignored_layers") == ["pos_embed.proj"]
    assert matching("{first}", layer_names(make_transformer("Flux")), "ignored_layers") == []


def test_the_defaults_are_nncfs() -> None:
    ours = {key: fact.default for key, fact in {**nncf_json.ENTRY, **nncf_json.PARAMS}.items()}
    for name, default in GOLDEN["defaults"].items():
        key = name.lower().removeprefix("pruning_")
        key = next((key for key in (name.lower(), f"pruning_{key}", key) if key in ours), None)
        if key and isinstance(ours[key], (bool, int, float, str)):
            assert ours[key] == default, key
    assert native(nncf()) == {
        "importance": {"name": "filter_norm", "norm": "L2"},
        "pruning_ratio": 0.5,
        "round_to": 8,
        "ignored_layers": ["{first}", "{strided}"],
    }


@pytest.mark.parametrize("case", GOLDEN["entries"], ids=lambda case: str(case["entry"]))
def test_what_nncfs_schema_refuses_is_refused(case) -> None:
    params = case["entry"].get("params", {})
    here = (
        "learned_ranking" in str(params) or "pruning_flops_target" in params
    )  # both targets: NNCF's controller refuses
    refused = [row for row in listing_of(nncf(**case["entry"])).rows.values() if row.verdict == "refused"]
    assert bool(refused) == (not case["valid"] or here)


def test_filter_norm_scores_as_nncf_does() -> None:
    weight = torch.tensor(GOLDEN["importance"]["weight"])
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 2, 1))
    network[0].weight.data = weight
    graph = tp.DependencyGraph().build_dependency(network, torch.randn(1, 3, 8, 8))
    group = graph.get_pruning_group(network[0], tp.prune_conv_out_channels, list(range(6)))
    for norm, expected in GOLDEN["importance"]["scores"].items():
        score = dp.importance("filter_norm", norm=norm)(group)
        assert torch.allclose(score, torch.tensor(expected), rtol=1e-4), norm
        normalized = dp.importance("filter_norm", norm=norm, normalize=True)(group)
        assert torch.allclose(normalized * weight.norm(), score, rtol=1e-4)
    with pytest.raises(BadInput, match="did you mean 'geometric_median'"):
        dp.importance("filter_norm", norm="geometric")


@pytest.mark.parametrize(("count", "level", "kept"), GOLDEN["kept_of_count_at_level"])
def test_kept_counts_are_multiples_of_8_as_nncfs_or_one_step_less(count, level, kept) -> None:
    group = CoupledGroup("layer", count, 1, 1, (), None)
    plan = plan_group(
        AskedGroup(group, Request(), np.arange(count)), asked_of(count, level, PlanOptions()), PlanOptions(round_to=8)
    )
    ours = count - len(plan.removed)
    assert ours % 8 == 0
    assert ours in ((kept,) if math.isclose(count * level % 1, 0, abs_tol=1e-9) else (kept, kept - 8))


def test_every_layer_has_the_name_that_nncf_gives_its_node() -> None:
    names = layer_names(make_unet())
    assert sorted(also[3] for also in names.values() if also) == GOLDEN["node_names"]


@pytest.mark.parametrize(
    ("scope", "found"),
    [
        ("UNet2DModel/NNCFConv2d[conv_in]/conv2d_0", ["conv_in"]),
        ("{re}.*conv_out.*", ["conv_out"]),
        (r"{re}DownBlock2D\[0\].*Conv2d\[conv1\]", ["down_blocks.0.resnets.0.conv1"]),
        ("down_blocks.0.resnets.0.conv1", ["down_blocks.0.resnets.0.conv1"]),
        ("{re}^conv_in$", ["conv_in"]),
    ],
)
def test_a_scope_means_the_layers_that_it_means_in_nncf(scope, found) -> None:
    assert matching("{nncf}" + scope, layer_names(make_unet()), "k") == found


def test_first_and_strided_convolutions_and_all_outside_the_target_stay_with_what_is_coupled() -> None:
    unet = make_unet()
    down = [group for group in plan_of(unet, nncf()).groups if "down_blocks.0.downsamplers.0.conv" in group.layers]
    assert [group.removed for group in down] == [()]
    scopes = {"target_scopes": ["{re}mid_block", "{re}time_emb_proj"], "params": {"prune_downsample_convs": True}}
    plan = plan_of(unet, nncf(**scopes))
    pruned = {layer for group in plan.groups if group.removed for layer in group.layers if "norm" not in layer}
    assert pruned
    assert all("mid_block" in layer or "time_emb_proj" in layer for layer in pruned)


def plan_of(unet: nn.Module, content: dict[str, Any]) -> dp.PruningPlan:
    values = translated(listing_of(content))
    options = values.pop("importance")
    return dp.make_plan(unet, dp.importance(**options), **values)


def test_a_target_in_flops_is_a_target_in_macs() -> None:
    plan = plan_of(make_unet(), nncf({"pruning_flops_target": 0.4, "prune_first_conv": True, "all_weights": True}))
    assert plan.target == {"macs_target": 0.6}
    assert translated(listing_of(nncf({"pruning_flops_target": 0.4})))["allocation"] == "uniform", "one ratio, as there"
    assert plan.macs[1] / plan.macs[0] == pytest.approx(0.6, abs=0.1)


# --- verdicts

TP = {"importance": "MagnitudeImportance"}


@pytest.mark.parametrize(
    ("content", "key", "verdict", "expected"),
    [
        (nncf({"importance": "diff_taylor"}), "importance", "honoured", {"importance": {"name": "diff_taylor"}}),
        (
            nncf({"weight_importance": "L1"}),
            "weight_importance",
            "honoured",
            {"importance": {"name": "filter_norm", "norm": "L1"}},
        ),
        (
            nncf({"filter_importance": {"name": "diff_taylor", "threshold": 0.1}}),
            "filter_importance",
            "honoured",
            {"importance": {"name": "diff_taylor", "threshold": 0.1}},
        ),
        (nncf({"schedule": "exponential"}), "schedule", "approximated", {}),
        (nncf({"all_weights": True}), "all_weights", "approximated", {"global_pruning": True}),
        (
            nncf({"all_weights": True}),
            "filter_importance",
            "honoured",
            {"importance": {"name": "filter_norm", "norm": "L2", "normalize": True}},
        ),
        (nncf(all_weights=True), "all_weights", "approximated", {"global_pruning": True}),
        (nncf({"pruning_init": 0.5, "schedule": "baseline"}), "pruning_init", "honoured", {}),
        (nncf(pruning_init=0.1), "pruning_init", "approximated", {}),
        (nncf({"pruning_steps": 5, "schedule": "baseline"}), "pruning_steps", "ignored", {}),
        (nncf({"pruning_steps": 5}), "pruning_steps", "approximated", {}),
        (nncf({"num_init_steps": 2}), "num_init_steps", "approximated", {}),
        (nncf({"prune_batch_norms": False}), "prune_batch_norms", "ignored", {}),
        (nncf({"prune_last_conv": True}), "prune_last_conv", "ignored", {}),
        (nncf({"pruning_flops_target": None}), "pruning_flops_target", "honoured", {}),
        (nncf({"interlayer_ranking_type": "learned_ranking"}), "interlayer_ranking_type", "refused", {}),
        (nncf({"legr_params": {"generations": 3}}), "generations", "ignored", {}),
        (
            nncf(initializer={"batchnorm_adaptation": {"num_bn_adaptation_samples": 9}}),
            "num_bn_adaptation_samples",
            "ignored",
            {},
        ),
        (nncf(validate_scopes=False), "validate_scopes", "approximated", {}),
        (nncf() | {"target_device": "CPU"}, "target_device", "ignored", {}),
        (
            {"compression": [nncf()["compression"], {"algorithm": "quantization", "preset": "mixed"}]},
            "preset",
            "ignored",
            {},
        ),
        (TP, "importance", "honoured", {"importance": {"name": "magnitude"}}),
        (TP, "pruning_ratio", "honoured", {"pruning_ratio": 0.5}),
        ({**TP, "ch_sparsity": 0.2}, "ch_sparsity", "honoured", {"pruning_ratio": 0.2}),
        (
            {**TP, "ch_sparsity_dict": {"conv_in": 0.2}},
            "ch_sparsity_dict",
            "honoured",
            {"pruning_ratio_dict": {"conv_in": 0.2}},
        ),
        ({**TP, "channel_groups": {"a": 4}}, "channel_groups.a", "ignored", {}),
        ({**TP, "iterative_steps": 5}, "iterative_steps", "approximated", {}),
        ({**TP, "max_pruning_ratio": 0.5}, "max_pruning_ratio", "honoured", {"max_pruning_ratio": 0.5}),
        ({**TP, "global_pruning": True, "isomorphic": True}, "isomorphic", "honoured", {"isomorphic": True}),
        ({**TP, "isomorphic": True}, "isomorphic", "refused", {}),
        (
            {**TP, "prune_num_heads": True, "head_pruning_ratio": 0.5},
            "head_pruning_ratio",
            "honoured",
            {"head_pruning_ratio": 0.5},
        ),
        ({**TP, "prune_num_heads": True, "head_pruning_ratio": 0.5}, "prune_num_heads", "approximated", {}),
        ({**TP, "head_pruning_ratio": 0.5}, "head_pruning_ratio", "ignored", {}),
        ({**TP, "prune_head_dims": False}, "prune_head_dims", "honoured", {"head_pruning_ratio": 0.0}),
        ({**TP, "customized_pruners": {"a": "b"}}, "customized_pruners", "refused", {}),
        ({**TP, "customized_pruners": None}, "customized_pruners", "honoured", {}),
        ({**TP, "data": "images"}, "data", "honoured", {"data": "images"}),
        (
            {"importance": {"name": "MagnitudeImportance", "p": 1}},
            "importance",
            "honoured",
            {"importance": {"name": "magnitude", "p": 1}},
        ),
        ({"importance": "LAMPImportance"}, "importance", "refused", {}),
        ("--pruner magnitude --thr 0.1", "--thr", "ignored", {}),
        ("--pruner=ours", "--thr", "honoured", {"importance": {"threshold": 0.01}}),
        ("--pruner ours --taylor_batch_size 8 --ni", "--ni", "ignored", {}),
        ("--pruner ours", "--pruner", "honoured", {"importance": {"name": "diff_taylor", "preset": "ddpm_exp"}}),
        (
            "--pruner diff-pruning --sparsity 0.3",
            "--pruner",
            "approximated",
            {"importance": {"name": "diff_taylor", "preset": "ldm"}},
        ),
        ("--pruner reinit", "--pruner", "refused", {}),
        (
            "--pruning_ratio 0.2",
            "--pruner",
            "approximated",
            {"importance": {"name": "taylor", "sampling": "reference"}},
        ),
        ("--model_path m --save_path o --dataset d", "--save_path", "honoured", {"output": "o"}),
        ({"model": "m", "seed": 3}, "seed", "honoured", {"seed": 3}),
    ],
)
def test_each_key_has_its_verdict_and_its_native_form(content, key, verdict, expected) -> None:
    rows = {row.key: row for row in listing_of(content).rows.values()}
    (row,) = [row for name, row in rows.items() if name == key or name.endswith(f".{key}")]
    assert (row.verdict, row.native) == (verdict, expected)
    assert row.reason


def test_every_verdict_of_every_dialect_has_its_reason() -> None:
    later = {
        "importance",
        "filter_importance",
        "weight_importance",
        "--pruner",
        "compression",
        "params",
        "pruning_init",
    }
    for table in (nncf_json.TOP, nncf_json.ENTRY, nncf_json.PARAMS, KEYS, FLAGS):
        for key, fact in table.items():
            assert key in later or (fact.reason and all(reason for *_, reason in fact.cases)), key


# --- bad input


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("n.json", nncf({"pruning_target": 1.3}), "compression.params.pruning_target: 1.3: is not a number in [0, 1)"),
        (
            "n.json",
            {"compression": [nncf({"pruning_target": "x"})["compression"]]},
            "compression[0].params.pruning_target: 'x'",
        ),
        (
            "n.json",
            nncf({"pruning_target": 0.1, "pruning_flops_target": 0.1}),
            "pruning_flops_target: 0.1: is given beside pruning_target; keep one",
        ),
        (
            "n.json",
            nncf({"filter_importance": "diff_tylor"}),
            "filter_importance: 'diff_tylor': unknown importance; did you mean 'diff_taylor'",
        ),
        (
            "n.json",
            nncf({"importance": "L1", "filter_importance": "L2"}),
            "filter_importance: 'L2': is given beside importance",
        ),
        ("n.json", nncf({"prunning_target": 0.1}), "prunning_target: 0.1: unknown key; did you mean 'pruning_target'"),
        (
            "n.json",
            nncf(pruning_init=0.6),
            "compression.pruning_init: 0.6: is above pruning_target 0.5, which is never reached",
        ),
        ("n.json", nncf({"schedule": "exponential_with_bias"}, pruning_init=0.45), "compression.pruning_init: 0.45"),
        ("n.json", nncf({"schedule": "multistep"}), "schedule: 'multistep': is not one of baseline"),
        (
            "n.json",
            nncf({"pruning_init": 0.1}, pruning_init=0.1),
            "pruning_init: 0.1: is given beside the same in another place",
        ),
        ("n.json", nncf(ignored_scopes=["{re}["]), "ignored_scopes: ['{re}[']: '{re}[' is no valid expression"),
        ("n.json", nncf(params=3), "compression.params: 3: is no mapping"),
        ("n.json", nncf(params=[]), "compression.params: []: is no mapping"),
        ("n.json", nncf(target_scopes=[]), "compression.target_scopes: []: is not a name or a list of some names"),
        ("n.json", {"compression": {"algorithm": "quantization"}}, 'holds no "algorithm": "filter_pruning"'),
        (
            "n.json",
            {"compression": {"algorithm": "filter_prunning"}},
            "compression.algorithm: 'filter_prunning': unknown; did you mean 'filter_pruning'",
        ),
        ("n.json", {"compression": [nncf()["compression"]] * 2}, "filter_pruning is in compression[0] already"),
        ("n.json", {"input_info": {}}, "compression: None"),
        (
            "n.json",
            '{"compression": {}, "compression": {}}',
            "not valid json: key 'compression' is given twice; keep one",
        ),
        (
            "t.yaml",
            "importance: diff_taylor\niterative_steps: 1\nch_sparsity: 0.3\npruning_ratio: 0.3",
            "pruning_ratio: 0.3: is given beside ch_sparsity",
        ),
        ("t.yaml", "importance: diff_taylor\niterative_steps: 0", "iterative_steps: 0: is not a whole number"),
        ("t.yaml", "importance: MagnitudeImportanc\niterative_steps: 1", "did you mean 'MagnitudeImportance'"),
        ("t.yaml", "importance: MagnitudeImportance\nignored_layer: [a]", "unknown key; did you mean 'ignored_layers'"),
        (
            "t.yaml",
            "importance: MagnitudeImportance\npruning_ratio_dict: {conv_in: 1.0}",
            "pruning_ratio_dict: {'conv_in': 1.0}: is not ratios",
        ),
        ("t.yaml", "iterative_steps: 1", "importance: None: is missing"),
        (
            "t.yaml",
            "importance: {name: MagnitudeImportance, q: 1}",
            "unknown option 'q' (1); magnitude has p",
        ),
        ("t.yaml", "seed: 1\nseed: 2", "not valid yaml: key 'seed' is given twice; keep one"),
        (
            "f.txt",
            "--pruner diff-prunning",
            "--pruner: 'diff-prunning': unknown importance; did you mean 'diff-pruning'",
        ),
        ("f.txt", "--thr 5", "--thr: 5: is not a number in [0, 1]"),
        ("f.txt", "--thr", "--thr: None: needs a value"),
        ("f.txt", "--trh 0.05", "--trh: '0.05': unknown key; did you mean '--thr'"),
        ("f.txt", "--thr 0.05 0.1", "'0.1' belongs to no flag"),
        ("f.txt", "--thr 0.05 --thr 0.1", "--thr is given twice"),
        ("f.txt", "--pruner 'x", "no closing quotation"),
        ("f.txt", "--pruning_ratio 1", "--pruning_ratio: 1: is not a number in [0, 1)"),
        ("f.txt", "--load_pruned_model x.pth", "a pickle"),
        ("c.yaml", "modle: x", "unknown key; did you mean 'model'"),
        ("c.yaml", "model: x\npruning_ratio: 1.3", "pruning_ratio: 1.3 is outside [0, 1)"),
    ],
)
def test_bad_input_is_one_line_with_the_path_of_the_key_and_exit_code_2(name, text, message, run, tmp_path) -> None:
    path = tmp_path / name
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    for command in ("prune", "config"):
        output = ("-o", tmp_path / "native.yaml") if command == "config" else ()
        code, _, err = run(command, path, "--model", "m", *output)
        assert code == 2
        assert err.startswith(f"error: {path}: ")
        assert message in err
        assert len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_scope_that_matches_nothing_is_named_before_anything_is_calibrated(run, config_file, tmp_path) -> None:
    path = tmp_path / "n.json"
    path.write_text(json.dumps(nncf({"importance": "diff_taylor"}, ignored_scopes=["{re}conv_inn"])))
    values = json.loads(config_file.read_text())
    code, _, err = run("prune", path, "--model", values["model"], "--data", values["data"], "--dry-run")
    assert code == 2
    where = f"error: {path}: compression.ignored_scopes: ignored_layers: "
    assert err.splitlines()[-1].startswith(where + "'{nncf}{re}conv_inn' matches no layer")
    assert "loss curve" not in err


# --- the command


@pytest.mark.parametrize("name", ["native.yaml", "native.json", "native"])
def test_config_lists_every_key_and_writes_a_native_file_that_prune_reads(run, dense_dir, npz, tmp_path, name) -> None:
    path = tmp_path / name
    words = ["--model", dense_dir, "--data", npz, "--set", "pruning_ratio=1e-1"]
    code, out, _ = run("config", CONFIGS["nncf_filter_pruning.json"], "-o", path, *words)
    assert code == 0
    assert "ignored" in out
    assert "(default)" in out
    values = yaml.safe_load(path.read_text())
    assert (values["model"], values["pruning_ratio"]) == (str(dense_dir), 0.1)
    assert run("prune", path, "--dry-run")[0] == 0
    code, _, err = run("config", CONFIGS["torch_pruning.yaml"], "-o", path)
    assert code == 2
    assert "exists; use --overwrite" in err
    code, _, err = run("config", CONFIGS["torch_pruning.yaml"], "-o", tmp_path / "native.toml")
    assert code == 2
    assert "TOML is not written; name a .yaml or a .json" in err


def test_a_refused_key_is_listed_and_then_the_error(run, tmp_path) -> None:
    path = tmp_path / "n.json"
    path.write_text(json.dumps(nncf({"pruning_target": 2, "all_weights": 1})))
    code, out, err = run("config", path, "--json")
    assert code == 2
    assert {row["key"] for row in json.loads(out)["keys"] if row["verdict"] == "refused"} == {
        "compression.params.pruning_target",
        "compression.params.all_weights",
    }
    assert "and 1 more; diffprune config lists them" in err


def test_nncfs_json_may_hold_comments(tmp_path) -> None:
    path = tmp_path / "n.json"
    path.write_text(
        '{ // all of it\n "compression": {"algorithm": "filter_pruning", /* "x": 1 */ "ignored_scopes": "a//b",},}'
    )
    assert read(path).values["ignored_layers"][0] == "{nncf}a//b"


# --- any config at all

CASES = {
    "nncf": json.loads(CONFIGS["nncf_filter_pruning.json"].read_text()),
    "nncf, more": nncf(
        {"pruning_flops_target": 0.2, "filter_importance": "diff_taylor", "all_weights": True, "legr_params": {"a": 1}},
        pruning_init=0.1,
        target_scopes=["{re}mid"],
        initializer={"batchnorm_adaptation": {}},
    ),
    "torch-pruning": yaml.safe_load(CONFIGS["torch_pruning.yaml"].read_text()),
    "torch-pruning, more": {
        "importance": {"name": "MagnitudeImportance", "p": 1},
        "ch_sparsity": 0.2,
        "prune_num_heads": True,
        "head_pruning_ratio": 0.5,
        "pruning_ratio_dict": {"conv_in": 0.1},
    },
    "native": {"model": "m", "importance": {"name": "diff_taylor"}, "pruning_ratio_dict": {"a": 0.1}, "round_to": 8},
}
NAMES = sorted({*nncf_json.PARAMS, *nncf_json.ENTRY, *nncf_json.TOP, *KEYS, *PruningConfig.model_fields})
KEY = st.sampled_from(NAMES) | st.text(max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([0.3, 1.3, *KNOWN]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEY, inner, max_size=3),
    max_leaves=4,
)


def places(content: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a config."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [place for key, value in items for place in ((content, key), *places(value))]


@st.composite
def mutated(draw: Any) -> dict[str, Any]:
    """A config of some dialect with up to three keys changed, removed or added."""
    content: dict[str, Any] = json.loads(json.dumps(CASES[draw(st.sampled_from(sorted(CASES)))]))
    for _ in range(draw(st.integers(1, 3))):
        container, key = draw(st.sampled_from(places(content) or [(content, "model")]))
        what = draw(st.sampled_from(("change", "remove", "add")))
        if what == "change":
            container[key] = draw(VALUES)
        elif what == "remove":
            container.pop(key, None) if isinstance(container, dict) else container.pop(key)
        elif isinstance(container, dict):
            container[draw(KEY)] = draw(VALUES)
    return content


def attempt(function: Callable[..., Any], *values: Any, **named: Any) -> Any:
    """What a function returns, or its BadInput, which is one line."""
    try:
        return function(*values, **named)
    except BadInput as error:
        found = error
    assert "\n" not in str(found)
    return found


@settings(derandomize=True, max_examples=300, deadline=None, database=None)
@given(mutated())
def test_any_config_is_a_pruning_config_or_bad_input_and_every_key_is_listed(content) -> None:
    listing = listing_of(content)
    assert isinstance(attempt(settle, listing, model="m"), (PruningConfig, BadInput))
    rows = listing.rows
    for path in leaves(content):
        near = (
            f"{path}.".startswith((f"{key}.", f"{key}[")) or key.startswith((f"{path}.", f"{path}[")) for key in rows
        )
        assert any(near) or not path, path


WORDS = [*FLAGS, "--what", "diff-pruning", "ours", "0.3", "7", "-1", "x y", "'", "="]


@settings(derandomize=True, max_examples=150, deadline=None, database=None)
@given(st.lists(st.sampled_from(WORDS), max_size=6))
def test_any_flags_are_a_pruning_config_or_bad_input_and_every_flag_is_listed(words) -> None:
    listing = attempt(listing_of, " ".join(words))
    if isinstance(listing, Listing):
        assert "'" in words or {word for word in words if word.startswith("--")} <= set(listing.rows)
        assert isinstance(attempt(settle, listing, model="m"), (PruningConfig, BadInput))


@settings(derandomize=True, max_examples=200, deadline=None, database=None)
@given(st.sampled_from([".json", ".yaml", ".toml"]), st.text('{}[]:,"-#/*& \n<!|=aé1.e', max_size=30))
def test_any_text_is_a_mapping_or_bad_input(suffix, text) -> None:
    assert isinstance(attempt(parse_mapping, text, Path(f"c{suffix}")), (dict, BadInput))
