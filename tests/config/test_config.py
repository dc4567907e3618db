"""The native config: every wrong value is one line with the place, the value and the remedy."""

from __future__ import annotations

import json

import pytest

import diffprune_plugin as dp
from diffprune_plugin.config.criterion import criterion_of, describe
from diffprune_plugin.config.pruning import PruningConfig, read_config
from diffprune_plugin.errors import BadInput
from diffprune_plugin.utils.checked import HIGH, LOW, facts


def test_a_config_is_the_same_in_yaml_json_and_toml(tmp_path) -> None:
    more = {"pruning_ratio": 0.4, "ignored_layers": ["conv_in"]}
    texts = {
        "c.yaml": "model: dense\nimportance: diff_taylor\npruning_ratio: 0.4\nignored_layers: [conv_in]\n",
        "c.json": json.dumps({"model": "dense", "importance": "diff_taylor"} | more),
        "c.toml": 'model = "dense"\nimportance = "diff_taylor"\npruning_ratio = 0.4\nignored_layers = ["conv_in"]\n',
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    configs = [read_config(tmp_path / name) for name in texts]
    assert configs[0] == configs[1] == configs[2]
    assert configs[0].criterion() == ("diff_taylor", {})


def test_settings_and_overrides_win_over_the_file(tmp_path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: dense\nimportance: diff_taylor\n")
    config = read_config(path, ["importance.threshold=0.02", "pruning_ratio=0.5"], output="small", model=None)
    assert config.importance == {"name": "diff_taylor", "threshold": 0.02}
    assert (config.pruning_ratio, config.output, config.model) == (0.5, "small", "dense")
    path.write_text("model: dense\n")
    assert read_config(path, ["importance.threshold=0.02"]).importance == {"name": "diff_taylor", "threshold": 0.02}
    assert read_config(path, ["importance.name=taylor"]).importance == {"name": "taylor"}


def test_a_plan_says_the_seed_that_its_criterion_scored_with() -> None:
    for importance, seed in (({"name": "random", "seed": 7}, 7), ("random", 3)):
        config = PruningConfig.make({"model": "dense", "importance": importance, "seed": 3})
        assert describe(criterion_of(config), config)["seed"] == seed


def test_a_setting_may_be_a_number_in_any_notation_or_a_pattern_with_dots(tmp_path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: dense\npruning_ratio: 2e-1\n")
    assert read_config(path).pruning_ratio == 0.2
    settings = ["pruning_ratio=1e-1", "pruning_ratio_dict.down_blocks.0=0.2", "pruning_ratio_dict.conv_in=0"]
    config = read_config(path, settings)
    assert (config.pruning_ratio, config.pruning_ratio_dict) == (0.1, {"down_blocks.0": 0.2, "conv_in": 0.0})
    assert read_config(path, ["pruning_ratio_dict={down_blocks.0: 3e-1}"]).pruning_ratio_dict == {"down_blocks.0": 0.3}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"modle": "x"}, "unknown key 'modle'; did you mean 'model'"),
        ({}, "model is missing; add 'model: ...'"),
        ({"pruning_ratio": 1.0}, "pruning_ratio: 1.0 is outside [0, 1)"),
        ({"pruning_ratio": -0.1}, "pruning_ratio: -0.1 is outside [0, 1)"),
        ({"pruning_ratio": "much"}, "pruning_ratio: 'much'"),
        ({"pruning_ratio": True}, "pruning_ratio: True"),
        ({"importance": 3}, "neither a criterion's name nor a mapping"),
        ({"importance": {"threshold": 0.1}}, "neither a criterion's name nor a mapping"),
        ({"ignored_layers": "conv_in"}, "ignored_layers: 'conv_in'"),
        ({"batch_size": 0}, "batch_size: 0"),
        ({"round_to": 0}, "round_to: 0"),
        ({"device": "gpu"}, "device: 'gpu'"),
        ({"dtype": "fp16"}, "dtype: 'fp16'"),
        ({"seed": -1}, "seed: -1"),
        ({"strict": "yes"}, "strict: 'yes'"),
        ({"output": "~/small"}, "output: '~/small': only a shell knows what ~ is; write the whole path"),
        ({"output": ""}, "output: '': no path"),
        ({"output": "$HOME/small"}, "only a shell fills in"),
        ({"macs_target": None}, "macs_target: null, and nothing else says how much is to go; give a number"),
        ({"ignored_layers": None}, "ignored_layers: None: input should be a list, or the key left out"),
        ({"allocation": False}, "allocation: False is none of uniform, linear, measured; in quotes"),
        ({"data": "a\nb"}, "'a\\nb' holds a line break or another control character"),
    ],
)
def test_a_wrong_value_is_named(values, words) -> None:
    given = values if not values or "modle" in values else {"model": "dense", **values}
    with pytest.raises(BadInput) as caught:
        dp.PruningConfig.make(given)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("c.yaml", "a: [", "not valid yaml"),
        ("c.json", "{", "not valid json"),
        ("c.toml", "a =", "not valid toml"),
        ("c.yaml", "model: a\nmodel: b", "key 'model' is given twice"),
        ("c.json", '{"model": "a", "model": "b"}', "key 'model' is given twice"),
        ("c.toml", 'model = "a"\nmodel = "b"', "not valid toml"),
        ("c.yaml", "model: &m [*m]", "nested too deeply"),
        ("c.yaml", "on: a", "key True is no word; put it in quotes"),
        ("c.yaml", "- a", "holds list, not keys and values"),
        ("c.yaml", None, "cannot be read"),
    ],
)
def test_a_file_that_is_no_config_is_named(tmp_path, name, text, words) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(BadInput, match=words):
        read_config(path)


@pytest.mark.parametrize(
    ("setting", "words"), [("nothing", "not KEY=VALUE"), ("a=[", "--set"), ("model.x=1", "not a mapping")]
)
def test_a_setting_that_cannot_be_set_is_named(tmp_path, setting, words) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: dense\n")
    with pytest.raises(BadInput, match=words):
        read_config(path, [setting])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"data": ""}, "data: ''"),
        ({"output": ""}, "output: ''"),
        ({"calibration": ""}, "calibration: ''"),
        ({"seed": 2**63}, "seed: 9223372036854775808"),
        ({"pruning_ratio_dict": {"conv_in": 1.5}}, "pruning_ratio_dict.conv_in: 1.5"),
    ],
)
def test_what_would_fail_late_or_mean_something_else_is_refused_at_once(values, words) -> None:
    with pytest.raises(BadInput, match=words):
        dp.PruningConfig.make({"model": "dense", **values})


def test_a_measured_allocation_needs_two_samples() -> None:
    given = {"model": "m", "allocation": "measured", "macs_target": 0.5, "sensitivity_samples": 1}
    with pytest.raises(BadInput, match="sensitivity_samples: 1: allocation: measured holds one out; give 2 or more"):
        PruningConfig.make(given)


def test_a_config_cannot_be_changed() -> None:
    config = dp.PruningConfig.make({"model": "dense"})
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3


NUMBERS = [
    (kind, key)
    for kind in (dp.PruningConfig, dp.FinetuneConfig)
    for key, schema in kind.model_json_schema()["properties"].items()
    if {"number", "integer"} & {part.get("type") for part in schema.get("anyOf", [schema])}
]


@pytest.mark.parametrize("kind", [dp.PruningConfig, dp.FinetuneConfig])
def test_every_key_says_what_it_is(kind) -> None:
    assert not [key for key, field in kind.model_fields.items() if not field.description]


@pytest.mark.parametrize(("kind", "key"), NUMBERS)
@pytest.mark.parametrize("value", [10**30, float("inf"), float("nan"), -1])
def test_every_number_has_a_range_and_its_key_is_named(kind, key, value) -> None:
    stated = facts(kind.model_json_schema()["properties"][key])
    assert {*LOW} & {*stated}
    assert {*HIGH} & {*stated}
    others = {"model": "m", "data": "d"} | ({"steps": 9} if kind is dp.FinetuneConfig else {})
    with pytest.raises(BadInput, match=f"config: {key}: {value}"):
        kind.make(others | {key: value})


@pytest.mark.parametrize(
    ("importance", "words"),
    [
        ({"name": "diff_taylor", "samples": 10**30}, "samples 1" + "0" * 30 + " is outside [1, 10000000]"),
        ({"name": "diff_taylor", "curve_samples": 10**30}, "is outside [1, 65536]"),
        ({"name": "fisher", "micro_batch": 10**30}, "is outside [1, 65536]"),
        ({"name": "diff_taylor", "round_to": 10**30}, "is outside [1, 65536]"),
        ({"name": "diff_taylor", "threshold": float("nan")}, "threshold nan is outside [0, 1]"),
        ({"name": "diff_taylor", "condition_dropout": float("inf")}, "condition_dropout inf is outside [0, 1]"),
        ({"name": "magnitude", "p": 10**30}, "is outside [1, 10]"),
        ({"name": "magnitude", "p": -1}, "p -1 is outside [1, 10]"),
        ({"name": "random", "seed": -1}, "seed -1 is outside [0, 9223372036854775807]"),
    ],
)
def test_every_number_of_a_criterion_has_a_range(importance, words) -> None:
    with pytest.raises(BadInput) as caught:
        dp.importance(**importance)
    assert words in str(caught.value)


def test_of_many_wrong_values_the_first_are_told_and_the_rest_counted() -> None:
    with pytest.raises(BadInput, match=r"ignored_layers.4: 0: input should be a valid string; and 2995 more$"):
        dp.PruningConfig.make({"model": "dense", "ignored_layers": [0] * 3000})
