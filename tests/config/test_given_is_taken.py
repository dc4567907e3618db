"""What a config of another tool gives is what is taken: every key, in every spelling, whatever its default is."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffprune_plugin.config.dialects import nncf_json, table, translate
from diffprune_plugin.config.dialects.flags import FLAGS, SCRIPTS, THRESHOLD
from diffprune_plugin.config.dialects.flags import translate as translate_flags
from diffprune_plugin.config.dialects.pruner_kwargs import KEYS
from diffprune_plugin.config.dialects.table import Fact, Listing
from diffprune_plugin.config.pruning import PruningConfig
from diffprune_plugin.plugins import criteria, plugin_manager

KNOWN = tuple(criteria(plugin_manager()))
RATIOS = st.floats(0, 1, exclude_max=True, allow_subnormal=False)
WORDS = st.text("abz09._-/ '\"\\#$é", min_size=1, max_size=8).filter(lambda word: word.strip() and "$" not in word)
BY_KIND: dict[str, st.SearchStrategy[Any]] = {
    table.BOOL.words: st.booleans(),
    table.RATIO.words: RATIOS,
    table.SHARE.words: st.floats(0.001, 1),
    table.COUNT.words: st.integers(1, 1_000_000),
    table.WHOLE.words: st.integers(0, 1_000_000),
    table.SEED.words: st.integers(0, 2**63 - 1),
    table.TEXT.words: WORDS,
    table.NAMES.words: WORDS | st.lists(WORDS, min_size=1, max_size=2),
    table.RATIOS.words: st.dictionaries(WORDS, RATIOS, min_size=1, max_size=2),
    table.CRITERION.words: st.sampled_from(KNOWN),
    table.ANY.words: WORDS | RATIOS | st.booleans() | st.dictionaries(WORDS, RATIOS, min_size=1, max_size=2),
    THRESHOLD.words: st.floats(0, 1),
    nncf_json.ENTRY["target_scopes"].kind.words: st.lists(WORDS, min_size=1, max_size=2),
    "a number": st.floats(allow_nan=False, allow_infinity=False),
}


def values_of(fact: Fact) -> st.SearchStrategy[Any]:
    """Values that a key takes."""
    if fact.kind.words.startswith("one of "):
        values: st.SearchStrategy[Any] = st.sampled_from(fact.kind.words.removeprefix("one of ").split(", "))
    else:
        values = BY_KIND[fact.kind.words]
    return values.filter(lambda value: fact.judge(value)[0] != "refused")


def check_taken(listing: Listing, key: str, value: Any, native: Mapping[str, Any]) -> None:
    """The key's row holds the value, and all that it is natively is in force."""
    if isinstance(value, Mapping) and key not in listing.rows:  # ignored: one row for each leaf
        assert any(path.startswith(key) for path in listing.rows)
        return
    row = listing.rows[key]
    assert (row.value, row.given) == (value, True)
    assert row.verdict != "refused", row.reason
    for name, expected in native.items():
        found = listing.values[name]
        if isinstance(expected, list):
            assert [word for word in found if word in expected] == expected
        elif isinstance(expected, Mapping):
            assert found.items() >= expected.items()
        else:
            assert found == expected


TAKEN = [flag for flag, fact in FLAGS.items() if fact.verdict != "refused" and flag != "--pruner"]


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.data(), st.sampled_from(TAKEN), st.sampled_from(["", *SCRIPTS]), st.booleans())
def test_every_flag_is_taken_in_both_spellings_by_every_script(data, flag, program, equals) -> None:
    value = data.draw(values_of(FLAGS[flag])) if FLAGS[flag].kind is not table.BOOL else True
    word = flag if value is True else f"{flag}{'=' if equals else ' '}{shlex.quote(str(value))}"
    pruner = "ours" if SCRIPTS.get(program) == "ddpm_exp" else "diff-pruning" if "ddpm" in program else "magnitude"
    listing = translate_flags(f"{f'python {program} ' if program else ''}{word} --pruner {pruner}", "f")
    check_taken(listing, flag, value, FLAGS[flag].native(value))
    if flag == "--thr" and pruner != "magnitude":
        assert listing.values["importance"]["threshold"] == value


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.data(), st.sampled_from([key for key, fact in KEYS.items() if fact.verdict != "refused"]))
def test_every_keyword_argument_is_taken(data, key) -> None:
    fact = KEYS[key]
    value = data.draw(st.sampled_from(KNOWN) if key == "importance" else values_of(fact))
    content = {"importance": "MagnitudeImportance", "iterative_steps": 1, "global_pruning": True, key: value}
    native = {"importance": {"name": value}} if key == "importance" else fact.native(value)
    check_taken(translate(content, "c", KNOWN), key, value, native)


@pytest.mark.parametrize("place", ["outside", "inside"])
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_every_key_of_nncf_is_taken(place, data) -> None:
    facts = nncf_json.PARAMS if place == "inside" else nncf_json.ENTRY
    key = data.draw(st.sampled_from([k for k, f in facts.items() if f.verdict != "refused" and k not in SPECIAL]))
    criterion = key in ("filter_importance", "importance", "weight_importance")
    value = data.draw(st.sampled_from(KNOWN) if criterion else values_of(facts[key]))
    if key == "pruning_init":
        value = value / 2.5  # it may not be above the target
    entry = {key: value} if place == "outside" else {"params": {key: value}}
    listing = translate({"compression": {"algorithm": "filter_pruning", **entry}}, "c", KNOWN)
    native = {"importance": {"name": value}} if criterion else facts[key].native(value)
    check_taken(listing, f"compression.{'params.' if place == 'inside' else ''}{key}", value, native)


SPECIAL = ("algorithm", "params")  # each is one fixed word or holds the others


NATIVE: dict[str, list[Any]] = {  # two values of each native key
    **{key: ["a b", "0.3"] for key in ("model", "output", "data", "calibration")},
    **{key: [0.25, 0.75] for key in ("pruning_ratio", "macs_target", "params_target", "max_pruning_ratio")},
    **{key: [0.25, 0.75] for key in ("latency_target", "max_latency_ms")},
    "latency": [
        {
            "provider": "cuda",
            "dtype": "fp32",
            "batch": 2,
            "threads": 4,
            "fuse": True,
            "table": "t.json",
            "size": 8,
            "options": {"prefer_nhwc": 1},
        }
    ],
    **{key: [0.25, 0.75] for key in ("head_pruning_ratio", "condition_dropout")},
    **{key: [3, 8] for key in ("round_to", "resolution", "batch_size", "timesteps", "blocks_at_once", "seed")},
    **{key: [["conv_in"], ["a", "{re}b"]] for key in ("ignored_layers", "target_layers", "depth")},
    "rounding": ["published", "nearest"],
    "preset": ["obs-diff"],
    "importance": [{"name": "magnitude"}, {"name": "fisher", "samples": 9}],
    "pruning_ratio_dict": [{"conv_in": 0.25}, {"a": 0.1, "b": 0.2}],
    "halves": ["together", "apart"],
    "allocation": ["uniform"],
    "sensitivity": ["s.json"],
    "sensitivity_samples": [8, 16],
    "sensitivity_probes": [1, 2],
    "variant": ["fp16"],
    "unused_tensors": ["refuse", "ignore"],
    "device": ["cuda", "cuda:1"],
    "dtype": ["float16", "bfloat16"],
}


@pytest.mark.parametrize("key", PruningConfig.model_fields)
def test_every_native_key_is_taken_beside_the_keys_of_torch_pruning_too(key) -> None:
    for value in NATIVE.get(key, [True, False]):
        alone = translate({"model": "m", "importance": "random", "global_pruning": True, key: value}, "c", KNOWN)
        beside = {"model": "m", "importance": "random", "iterative_steps": 1, "global_pruning": True, key: value}
        for listing in (alone, translate(beside, "c", KNOWN)):
            if key == "head_pruning_ratio" and listing is not alone:
                continue  # there it belongs to prune_num_heads
            listing.check()
            native = PruningConfig.make(listing.values).model_dump(mode="json")
            assert native[key] == value


@pytest.mark.parametrize(
    ("content", "ratio"),
    [
        ({"importance": "MagnitudeImportance", "macs_target": None}, 0.5),
        ({"compression": {"algorithm": "filter_pruning", "all_weights": None}}, 0.5),
        ({"compression": {"algorithm": "filter_pruning", "params": {"pruning_target": None}}}, 0.5),
    ],
)
def test_null_is_as_if_the_key_were_absent_and_leaves_the_default(content, ratio) -> None:
    listing = translate(content, "c", KNOWN)
    assert listing.values["pruning_ratio"] == ratio
    absent = {key: value for key, value in content.items() if value is not None}
    if "compression" in content:
        assert listing.values == translate({"compression": {"algorithm": "filter_pruning"}}, "c", KNOWN).values
    else:
        assert listing.values == translate(absent | {"iterative_steps": 1}, "c", KNOWN).values | {"macs_target": None}
