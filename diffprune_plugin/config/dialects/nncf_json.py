"""NNCF's JSON configs with filter pruning, as NNCF 2 read them (schema and defaults: nncf 2.14.1)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from diffprune_plugin.config.dialects.nncf_schedules import (
    CURVES,
    DEFAULT_INIT,
    DEFAULT_SCHEDULE,
    DEFAULT_STEPS,
    DEFAULT_TARGET,
    levels,
)
from diffprune_plugin.config.dialects.table import (
    ABSENT,
    ANY,
    BOOL,
    COUNT,
    CRITERION,
    NAMES,
    RATIO,
    TEXT,
    WHOLE,
    Fact,
    Kind,
    Listing,
    Verdict,
    one_of,
)
from diffprune_plugin.config.documents import join
from diffprune_plugin.errors import BadInput, nearest
from diffprune_plugin.graph.patterns import FIRST, STRIDED, scope_test

NAME = "NNCF filter_pruning"
TRAINING = "of the training script; fine-tune the pruned model"
NO_BATCH_NORM = "a diffusion UNet has no BatchNorm"


def filter_norm(norm: str) -> tuple[Verdict, str, dict[str, Any]]:
    return "honoured", "NNCF's score", {"name": "filter_norm", "norm": norm}


IMPORTANCES = {name: filter_norm(name) for name in ("L2", "L1", "geometric_median")}
OTHER_ALGORITHMS = {
    "quantization": "not done here; run nncf.quantize on the pruned model",
    **dict.fromkeys(
        ("magnitude_sparsity", "rb_sparsity", "const_sparsity", "knowledge_distillation", "movement_sparsity"),
        "not done here; run it with NNCF on the pruned model",
    ),
}

TOP = {
    "input_info": Fact(ANY, "ignored", "the inputs follow from the model's config"),
    "compression": Fact(ANY, "honoured", ""),
    "target_device": Fact(ANY, "ignored", "a removed channel is gone on every device"),
    "accuracy_aware_training": Fact(ANY, "ignored", "nothing is trained here; fine-tune the pruned model"),
    "compression_lr_multiplier": Fact(ANY, "ignored", "nothing is trained here"),
    "disable_shape_matching": Fact(ANY, "ignored", "the inputs follow from the model's config"),
    "log_dir": Fact(ANY, "ignored", "nothing is logged"),
    **dict.fromkeys(
        ("model", "model_params", "pretrained", "weights", "dataset", "dataset_dir", "num_classes", "preprocessing"),
        Fact(ANY, "ignored", "of the training script; give --model and --data"),
    ),
    **dict.fromkeys(
        ("batch_size", "epochs", "optimizer", "criterion", "mode", "multiprocessing_distributed", "workers"),
        Fact(ANY, "ignored", TRAINING),
    ),
}

SCOPES = "NNCF's node names are matched, and the names of the layers"
ENTRY = {
    "algorithm": Fact(TEXT, "honoured", "filters are removed, and through GroupNorm too, where NNCF 2 stops"),
    "pruning_init": Fact(RATIO, "approximated", "", default=DEFAULT_INIT),
    "ignored_scopes": Fact(
        NAMES, "honoured", SCOPES, lambda scopes: {"ignored_layers": [f"{{nncf}}{scope}" for scope in listed(scopes)]}
    ),
    "target_scopes": Fact(
        Kind("a name or a list of some names", lambda scopes: NAMES.fits(scopes) and bool(scopes)),
        "honoured",
        SCOPES,
        lambda scopes: {"target_layers": [f"{{nncf}}{scope}" for scope in listed(scopes)]},
    ),
    "validate_scopes": Fact(
        BOOL,
        "honoured",
        "a scope that matches nothing is an error",
        cases=((False, "approximated", "a scope that matches nothing is an error all the same"),),
    ),
    "initializer": Fact(ANY, "ignored", NO_BATCH_NORM),
    "compression_lr_multiplier": Fact(ANY, "ignored", "nothing is trained here"),
    "params": Fact(ANY, "honoured", ""),
}

PARAMS = {
    "filter_importance": Fact(CRITERION, "honoured", "", default="L2"),
    "schedule": Fact(
        one_of(*CURVES),
        "approximated",
        "removed in one step, at the last level; masks can follow the schedule while training",
        default=DEFAULT_SCHEDULE,
        cases=(("baseline", "honoured", "the target at once"),),
    ),
    "pruning_target": Fact(
        RATIO,
        "honoured",
        "of C channels C - int(C (1 - ratio)) are asked to go, equally many from each norm group",
        lambda value: {"pruning_ratio": float(value)},
        default=DEFAULT_TARGET,
    ),
    "pruning_flops_target": Fact(
        RATIO,
        "honoured",
        "one ratio is searched that leaves 1 - target of the MACs",
        lambda value: {"macs_target": round(1 - value, 12), "allocation": "uniform"},
        instead_of="pruning_target",
    ),
    "num_init_steps": Fact(
        WHOLE, "approximated", "train for so many epochs before", cases=((0, "honoured", "removed at once"),)
    ),
    "pruning_steps": Fact(COUNT, "approximated", "removed in one step; masks can follow the schedule while training"),
    "interlayer_ranking_type": Fact(
        one_of("unweighted_ranking", "learned_ranking"),
        "honoured",
        "scores are compared as they are",
        cases=(("learned_ranking", "refused", "LeGR is not built in; use unweighted_ranking, or all_weights"),),
    ),
    "all_weights": Fact(
        BOOL,
        "approximated",
        "each group by itself, kept counts a multiple of 8: the next from int(n (1 - level)), NNCF: n (1 - level)",
        lambda value: {"global_pruning": True} if value else {"round_to": 8},
        default=False,
        cases=((True, "approximated", "ranked together; norm groups lose equally many, and no layer is emptied"),),
    ),
    "prune_first_conv": Fact(
        BOOL,
        "honoured",
        "the first convolution stays, and with it what is coupled to it",
        lambda value: {} if value else {"ignored_layers": [FIRST]},
        default=False,
        cases=((True, "honoured", "the first convolution is pruned too"),),
    ),
    "prune_downsample_convs": Fact(
        BOOL,
        "honoured",
        "convolutions with a stride stay, and with them what is coupled to them",
        lambda value: {} if value else {"ignored_layers": [STRIDED]},
        default=False,
        cases=((True, "honoured", "convolutions with a stride are pruned too"),),
    ),
    "prune_batch_norms": Fact(BOOL, "ignored", f"{NO_BATCH_NORM}; channels of other norms go with their layer"),
    "legr_params": Fact(ANY, "ignored", "of learned_ranking only"),
    "save_ranking_coeffs_path": Fact(TEXT, "ignored", "of learned_ranking only"),
    "load_ranking_coeffs_path": Fact(TEXT, "refused", "LeGR is not built in; remove it"),
    "zero_grad": Fact(BOOL, "ignored", "of NNCF 1; nothing is trained here"),
    "prune_last_conv": Fact(
        BOOL,
        "ignored",
        "conv_out always keeps its width, which is the output's",
        cases=((False, "honoured", "conv_out keeps its width"),),
    ),
    # NNCF's schema has it beside "params" only, and the next one inside only; manuals and users had them elsewhere.
    "pruning_init": Fact(RATIO, "approximated", ""),
}
ENTRY["all_weights"] = replace(PARAMS["all_weights"], default=ABSENT)
for synonym in ("importance", "weight_importance"):
    PARAMS[synonym] = replace(PARAMS["filter_importance"], instead_of="filter_importance", default=ABSENT)


def given(values: Mapping[str, Any]) -> set[str]:
    """The keys with a value; null is as if the key were absent."""
    return {key for key, value in values.items() if value is not None}


def listed(scopes: str | list[str]) -> list[str]:
    return [scopes] if isinstance(scopes, str) else scopes


def translate(content: Mapping[str, Any], where: str, criteria: Collection[str]) -> Listing:
    """An NNCF config as a listing; ``criteria`` are the names that importances may have beside NNCF's own."""
    listing = Listing(NAME, where)
    compression = content.get("compression")
    listing.take(TOP, {key: value for key, value in content.items() if key != "compression"})
    entries: dict[str, Any] = {"compression": compression}
    if isinstance(compression, list) and compression:
        entries = {f"compression[{i}]": entry for i, entry in enumerate(compression)}
    pruning = ""
    for path, entry in entries.items():
        algorithm = entry.get("algorithm") if isinstance(entry, Mapping) else None
        if algorithm == "filter_pruning" and not pruning:
            pruning = path
            translate_entry(listing, entry, path, criteria)
        elif algorithm == "filter_pruning":
            listing.refuse(path, entry, f"filter_pruning is in {pruning} already; keep one of them")
        elif isinstance(algorithm, str) and algorithm in OTHER_ALGORITHMS:
            listing.list_all(path, entry, "ignored", OTHER_ALGORITHMS[algorithm])
        elif isinstance(algorithm, str):
            known = ("filter_pruning", *OTHER_ALGORITHMS)
            listing.list_all(path, entry, "ignored", "of an unknown algorithm")
            listing.refuse(join(path, "algorithm"), algorithm, f"unknown{nearest(algorithm, known)}")
        else:
            listing.refuse(path, entry, 'is no mapping with "algorithm": "filter_pruning"')
    if not pruning and all(row.verdict != "refused" for row in listing.rows.values()):
        listing.refuse("compression", compression, 'holds no "algorithm": "filter_pruning"; nothing would be pruned')
    return listing


def translate_entry(listing: Listing, entry: Mapping[str, Any], path: str, criteria: Collection[str]) -> None:
    """The rows of one entry of ``compression``."""
    params = entry.get("params", {})
    if not isinstance(params, Mapping):
        listing.refuse(join(path, "params"), params, "is no mapping; remove it or give it keys")
        params = {}
    outer = {key: value for key, value in entry.items() if key != "params"}
    inside, outside = join(path, "params"), path
    found = listing.take(ENTRY, outer, outside, elsewhere={"pruning_init"} & given(params))
    found |= listing.take(PARAMS, params, inside, elsewhere={"all_weights", "pruning_init"} & given(outer))
    places = {key: join(inside if key in given(params) else outside, key) for key in ("pruning_init", "all_weights")}
    places |= {key: join(inside, key) for key in PARAMS if key not in places}
    normalize = bool(found.get("all_weights"))
    for key in ("filter_importance", "importance", "weight_importance"):
        if key in found:
            own = {name: with_option(value, normalize) for name, value in IMPORTANCES.items()}
            listing.take_criterion(places[key], found[key], own, criteria)
    for key in ("ignored_scopes", "target_scopes"):
        check_scopes(listing, join(path, key), found.get(key, []))
    settle_schedule(listing, found, places)


def with_option(own: tuple[Verdict, str, dict[str, Any]], normalize: bool) -> tuple[Verdict, str, dict[str, Any]]:
    """NNCF divides each weight by its norm before it ranks all groups together."""
    verdict, reason, native = own
    return verdict, reason, native | ({"normalize": True} if normalize else {})


def check_scopes(listing: Listing, key: str, scopes: str | list[str]) -> None:
    """Refuse a scope that is no valid expression."""
    for scope in listed(scopes):
        try:
            scope_test(scope, key)
        except BadInput as error:
            listing.refuse(key, scopes, f"{scope!r} {error.reason}")


def settle_schedule(listing: Listing, found: Mapping[str, Any], places: Mapping[str, str]) -> None:
    """Refuse a schedule that never reaches its target, and say what becomes of the level that it starts at."""
    target = found.get("pruning_target", found.get("pruning_flops_target", DEFAULT_TARGET))
    start, schedule = found.get("pruning_init", DEFAULT_INIT), found.get("schedule", DEFAULT_SCHEDULE)
    steps = {"pruning_steps": found.get("pruning_steps", DEFAULT_STEPS)}
    try:
        levels(schedule, pruning_init=start, pruning_target=target, **steps)
    except BadInput as error:
        listing.refuse(places[error.key], error.value, error.reason)
        return
    once = start == target or schedule == "baseline"
    reason = "the target at once" if once else "removed in one step, at the schedule's last level"
    if "pruning_init" in found:
        verdict: Verdict = "honoured" if once and start in (target, DEFAULT_INIT) else "approximated"
        listing.amend(places["pruning_init"], verdict, reason)
    if "pruning_steps" in found and schedule == "baseline":
        listing.amend(places["pruning_steps"], "ignored", "of the other schedules only")
