"""Keyword arguments of torch-pruning's BasePruner as a config (torch-pruning 1.6.1 and its deprecated spellings)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from diffprune_plugin.config.dialects.table import (
    ABSENT,
    ANY,
    BOOL,
    COUNT,
    CRITERION,
    NAMES,
    NATIVE,
    RATIO,
    RATIOS,
    SHARE,
    Fact,
    Listing,
    Verdict,
    to,
)
from diffprune_plugin.config.pruning import PruningConfig
from diffprune_plugin.planning.options import BUDGETS

NAME = "Torch-Pruning"
NO_CLASS = "is not built in; use MagnitudeImportance or TaylorImportance, or register a plugin (see docs/extending.md)"


def own(verdict: Verdict, reason: str, name: str = "") -> tuple[Verdict, str, dict[str, Any]]:
    return verdict, reason, {"name": name}


MAGNITUDE = own("honoured", "torch-pruning's own class", "magnitude")
TAYLOR = own(
    "approximated",
    "sum of |w g|, the gradients calibrated here over all timesteps, not those that a script left in .grad",
    "taylor",
)
IMPORTANCES = {
    "MagnitudeImportance": MAGNITUDE,
    "GroupMagnitudeImportance": MAGNITUDE,
    "GroupNormImportance": MAGNITUDE,
    "TaylorImportance": TAYLOR,
    "GroupTaylorImportance": TAYLOR,
    "RandomImportance": own("approximated", "random too, but other numbers", "random"),
    "BNScaleImportance": own("refused", "a diffusion UNet has no BatchNorm; use MagnitudeImportance"),
    **dict.fromkeys(
        (
            *("LAMPImportance", "FPGMImportance", "HessianImportance", "GroupHessianImportance"),
            *("OBDCImportance", "ActivationImportance"),
        ),
        own("refused", NO_CLASS),
    ),
}

BY_ADAPTER = Fact(ANY, "ignored", "the adapter knows norm groups, heads and pairs")
OBJECTS = "takes Python objects; describe the layer in an adapter (see docs/extending.md, 'A new model')"
NO_OBJECTS: tuple[tuple[Any, Verdict, str], ...] = (({}, "honoured", "empty"), ([], "honoured", "empty"))
TRAINING = Fact(ANY, "refused", "sparse training is not done here; remove it")

KEYS = {
    "importance": Fact(CRITERION, "honoured", ""),
    "global_pruning": Fact(
        BOOL,
        "approximated",
        "ranked together; norm groups and heads lose equally many, and no layer is emptied",
        to("global_pruning"),
        cases=((False, "honoured", "each group by itself"),),
    ),
    "pruning_ratio": Fact(
        RATIO,
        "honoured",
        "of C channels C - int(C (1 - ratio)) go, equally many from each norm group and head",
        lambda value: {"pruning_ratio": float(value)},
        default=0.5,
    ),
    "pruning_ratio_dict": Fact(
        RATIOS,
        "honoured",
        "ratio by layer name or pattern",
        lambda value: {"pruning_ratio_dict": {str(name): float(ratio) for name, ratio in value.items()}},
    ),
    "max_pruning_ratio": Fact(
        SHARE, "honoured", "no group loses more", lambda value: {"max_pruning_ratio": float(value)}
    ),
    "isomorphic": Fact(BOOL, "honoured", "like groups are ranked together", to("isomorphic")),
    "iterative_steps": Fact(
        COUNT,
        "approximated",
        "in one step; for several with a calibration between them use the Python API",
        cases=((1, "honoured", "one step"),),
    ),
    "iterative_pruning_ratio_scheduler": Fact(ANY, "ignored", "there is one step"),
    "ignored_layers": Fact(
        NAMES,
        "honoured",
        "by name or pattern, with what is coupled",
        lambda value: {"ignored_layers": [value] if isinstance(value, str) else value},
    ),
    "round_to": Fact(
        COUNT, "approximated", "what is kept is a multiple of it, rounded up; torch-pruning rounds down", to("round_to")
    ),
    "example_inputs": Fact(ANY, "ignored", "made from the model's config"),
    "in_channel_groups": BY_ADAPTER,
    "out_channel_groups": BY_ADAPTER,
    "channel_groups": BY_ADAPTER,
    "num_heads": BY_ADAPTER,
    "prune_num_heads": Fact(BOOL, "honoured", "whether whole heads go"),
    "prune_head_dims": Fact(BOOL, "honoured", "whether dimensions inside heads go"),
    "head_pruning_ratio": Fact(RATIO, "honoured", "share of each attention's heads"),
    "head_pruning_ratio_dict": Fact(
        ANY, "refused", "heads have one ratio here; use head_pruning_ratio", cases=NO_OBJECTS
    ),
    "customized_pruners": Fact(ANY, "refused", OBJECTS, cases=NO_OBJECTS),
    "unwrapped_parameters": Fact(ANY, "refused", OBJECTS, cases=NO_OBJECTS),
    "root_module_types": Fact(ANY, "ignored", "groups start at convolutions and linear layers"),
    "forward_fn": Fact(ANY, "ignored", "the adapter knows how to call the UNet"),
    "output_transform": Fact(ANY, "ignored", "the adapter knows what the UNet gives"),
    "reg": TRAINING,
    "alpha": TRAINING,
    "delta_reg": TRAINING,
}
for deprecated, name in (("ch_sparsity", "pruning_ratio"), ("ch_sparsity_dict", "pruning_ratio_dict")):
    KEYS[deprecated] = replace(KEYS[name], instead_of=name, default=ABSENT)

OWN_KEYS = frozenset(KEYS) - frozenset(PruningConfig.model_fields)  # those that tell it from a native config
BESIDE = {
    key: Fact(NATIVE, "honoured", "a native key", to(key)) for key in PruningConfig.model_fields if key not in KEYS
}


def recognises(content: Mapping[str, Any]) -> bool:
    """Whether a config is this, not a native one."""
    importance = content.get("importance")
    name = importance.get("name") if isinstance(importance, Mapping) else importance
    return bool(OWN_KEYS & {key for key in content if isinstance(key, str)}) or (
        isinstance(name, str) and name in IMPORTANCES
    )


def translate(content: Mapping[str, Any], where: str, criteria: Collection[str]) -> Listing:
    """The keyword arguments as a listing; native keys may stand beside them."""
    listing = Listing(NAME, where)
    facts = KEYS | BESIDE
    if any(content.get(key) is not None for key in BUDGETS):  # they stand for a ratio
        facts |= {"pruning_ratio": replace(KEYS["pruning_ratio"], default=ABSENT)}
    found = listing.take(facts, content)
    if "importance" in found:
        listing.take_criterion("importance", found["importance"], IMPORTANCES, criteria)
    elif "importance" not in listing.rows or listing.rows["importance"].verdict != "refused":
        listing.refuse("importance", None, "is missing; torch-pruning has no default; add 'importance: diff_taylor'")
    settle_heads(listing, found)
    if found.get("isomorphic") and not found.get("global_pruning"):
        listing.refuse("isomorphic", True, "prunes nothing without global_pruning; set that to true too")
    return listing


def settle_heads(listing: Listing, found: Mapping[str, Any]) -> None:
    """The three keys for attention as the one native key: whole heads go, or dimensions inside them."""
    whole, inside = found.get("prune_num_heads", False), found.get("prune_head_dims", True)
    share = float(found.get("head_pruning_ratio", 0))
    if share and not whole:
        listing.amend("head_pruning_ratio", "ignored", "prune_num_heads is false, in torch-pruning too")
    if share and whole and inside:
        listing.amend("prune_num_heads", "approximated", "whole heads go instead of dimensions inside them, not both")
    if share and whole and found.get("global_pruning"):
        listing.amend(
            "head_pruning_ratio", "approximated", "each attention loses that share, ranked among its own heads"
        )
    if share and whole:
        listing.give("head_pruning_ratio", {"head_pruning_ratio": share})
    elif not inside:
        listing.give("prune_head_dims", {"head_pruning_ratio": 0.0})
