"""The flags of the authors' scripts (github.com/VainF/Diff-Pruning): ddpm_prune.py, ddpm_exp/prune.py, prune_ldm.py."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from diffprune_plugin.config.dialects.shell import FLAG, Command, commands
from diffprune_plugin.config.dialects.table import (
    BOOL,
    COUNT,
    RATIO,
    SEED,
    TEXT,
    Fact,
    Kind,
    Listing,
    Verdict,
    ratio,
    to,
)
from diffprune_plugin.config.documents import check_tree
from diffprune_plugin.errors import BadInput, nearest

NAME = "Diff-Pruning flags"

COUNTS = "of C channels C - int(C (1 - ratio)) go, equally many from each norm group: the authors' rule"
BATCH = Fact(COUNT, "honoured", "samples a pass: the one batch of the calibration", to("batch_size"))
PRUNED_RATIO = Fact(RATIO, "honoured", COUNTS, lambda value: {"pruning_ratio": float(value)})
SAMPLING = "of drawing samples; see diffprune sample"
TRAINING = "of the training; fine-tune the pruned model"
LOGS = "of the script's own records"
THRESHOLD = Kind("a number in [0, 1]; useful values are 0.01 to 0.1", lambda value: ratio(value) or value in (1, 1.0))

FLAGS = {
    "--pruner": Fact(TEXT, "honoured", ""),
    "--pruning_ratio": PRUNED_RATIO,
    "--sparsity": replace(PRUNED_RATIO, instead_of="--pruning_ratio"),
    "--thr": Fact(THRESHOLD, "honoured", "timesteps count while their loss is above this share of the largest"),
    "--batch_size": BATCH,
    "--taylor_batch_size": replace(BATCH, instead_of="--batch_size"),
    "--device": Fact(TEXT, "honoured", "where it runs", to("device")),
    "--seed": Fact(SEED, "approximated", "seeded too, but other numbers than the script's", to("seed")),
    "--dataset": Fact(TEXT, "honoured", "a folder of images, or an .npz", to("data")),
    "--model_path": Fact(TEXT, "honoured", "pipeline directory", to("model")),
    "--save_path": Fact(TEXT, "honoured", "output directory; no pickle in it", to("output")),
    "--config": Fact(TEXT, "ignored", "of the authors' own model class; the pipeline directory holds its config"),
    "--save_pruned_model": Fact(TEXT, "ignored", "a pickle; give --output for the directory"),
    "--load_pruned_model": Fact(TEXT, "refused", "a pickle, and pruned already; start from the dense pipeline"),
    "--restore_from": Fact(TEXT, "refused", "a pickle; give the dense pipeline directory with --model"),
    **dict.fromkeys(("--exp", "--doc", "--comment", "--verbose"), Fact(TEXT, "ignored", LOGS)),
    **dict.fromkeys(("-i", "--image_folder", "--sample_type", "--skip_type"), Fact(TEXT, "ignored", SAMPLING)),
    "--timesteps": Fact(COUNT, "ignored", SAMPLING),
    "--eta": Fact(Kind("a number", lambda value: isinstance(value, (int, float))), "ignored", SAMPLING),
    **dict.fromkeys(("--test", "--sample", "--fid", "--interpolation", "--sequence"), Fact(BOOL, "ignored", SAMPLING)),
    "--resume_training": Fact(BOOL, "ignored", TRAINING),
    "--ni": Fact(BOOL, "ignored", "nothing is asked here"),
    **dict.fromkeys(
        ("--use_ema", "--use_pretrained", "--use_generated_samples"),
        Fact(BOOL, "ignored", "the weights in the pipeline directory are taken, and the images of --data"),
    ),
}

DEFAULTS: dict[str, dict[str, Any]] = {  # of each script, where they matter here
    "ddpm_prune": {"--pruner": "taylor", "--pruning_ratio": 0.3, "--batch_size": 128, "--thr": 0.05},
    "ldm_prune": {"--pruner": "random", "--pruning_ratio": 0.3},
    "ddpm_exp": {"--pruner": "taylor", "--pruning_ratio": 0.0, "--taylor_batch_size": 128, "--thr": 0.01},
    "ldm_exp": {"--pruner": "magnitude", "--sparsity": 0.0},
}
SCRIPTS = {
    "ddpm_prune.py": "ddpm_prune",
    "ldm_prune.py": "ldm_prune",
    "prune.py": "ddpm_exp",
    "prune_ldm.py": "ldm_exp",
}
VARIABLE = re.compile(r"\$[\w{(@*]|`")
ONLY = {  # what tells the scripts apart
    "ddpm_prune": {"--dataset", "--model_path", "--save_path", "--batch_size", "--device"},
    "ldm_exp": {"--sparsity"},
}

Own = tuple[Verdict, str, dict[str, Any]]
MAGNITUDE: Own = ("honoured", "torch-pruning's class", {"name": "magnitude"})
RANDOM: Own = ("approximated", "random too, but other numbers", {"name": "random"})
REINIT: Own = ("refused", "new weights are no pruning; use random and train the result", {})
BASE = {"magnitude": MAGNITUDE, "random": RANDOM, "reinit": REINIT}


def loop(verdict: Verdict, reason: str, name: str, **options: Any) -> Own:
    return verdict, reason, {"name": name, **options}


PRUNERS: dict[str, dict[str, Own]] = {
    "ddpm_prune": {
        **BASE,
        "diff-pruning": loop("honoured", "the script's loop and score", "diff_taylor", preset="diffusers"),
        "taylor": loop("approximated", "sum of |w g|, not |sum of w g|", "taylor", sampling="reference"),
    },
    "ldm_prune": BASE,
    "ddpm_exp": {
        **BASE,
        "ours": loop("honoured", "the script's loop and score", "diff_taylor", preset="ddpm_exp"),
        "taylor": loop("honoured", "the script's loop and score", "taylor", sampling="reference", power=2),
    },
    "ldm_exp": {
        **BASE,
        "diff-pruning": loop("approximated", "samples come from --data, not the model", "diff_taylor", preset="ldm"),
        "diff0": loop("approximated", "as diff-pruning", "diff_taylor", preset="ldm", threshold=0.0),
        "taylor": loop("approximated", "sum of |w g|, not |sum of w g|", "taylor", sampling="fresh", round_to=2),
    },
}
UNKNOWN = ("first_order_taylor", "second_order_taylor", "abs_taylor", "fisher")


def pruning_command(found: Sequence[Command], where: str) -> Command:
    """The command that prunes; raises BadInput unless there is just one."""
    of_scripts = [command for command in found if command.program in SCRIPTS]
    fitting = of_scripts or [command for command in found if command.program or command.words]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        listed = " and ".join(command.start or "flags" for command in fitting)
        raise BadInput(f"{where}: {listed} may each be what prunes; keep one of them")
    raise BadInput(f"{where}: holds no command with flags; write flags as in python ddpm_prune.py --thr 0.05")


def parse(words: Sequence[str], where: str) -> dict[str, Any]:
    """Flags and their values; raises BadInput for words that are neither, or a flag given twice."""
    tokens, found = list(reversed(words)), dict[str, Any]()
    while tokens:
        flag, equals, value = tokens.pop().partition("=")
        if not FLAG.match(flag):
            raise BadInput(f"{where}: {flag!r} belongs to no flag; write flags as in --thr 0.05")
        if flag in found:
            raise BadInput(f"{where}: {flag} is given twice; keep one")
        kind = FLAGS[flag].kind if flag in FLAGS else TEXT
        if not equals and kind is not BOOL and tokens and not FLAG.match(tokens[-1]):
            equals, value = "=", tokens.pop()
        found[flag] = value if equals and kind is TEXT else read_number(value) if equals else kind is BOOL or None
    return found


def read_number(text: str) -> Any:
    """The number in a text, or the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def script_of(flags: Mapping[str, Any]) -> str:
    """Which of the scripts takes these flags."""
    if "--sparsity" in flags or flags.get("--pruner") == "diff0":
        return "ldm_exp"
    of_exp = set(FLAGS) - ONLY["ddpm_prune"] - {"--pruner", "--pruning_ratio", "--thr", "--seed"}
    return "ddpm_exp" if of_exp & set(flags) or flags.get("--pruner") == "ours" else "ddpm_prune"


def translate(text: str, where: str, _: Collection[str] = ()) -> Listing:
    """Flags as a listing."""
    found = commands(text, where)
    command = pruning_command(found, where)
    flags = parse(command.words, where)
    try:
        check_tree(flags)
    except ValueError as error:
        raise BadInput(f"{where}: {error}") from None
    script = SCRIPTS.get(command.program) or script_of(flags)
    defaults = DEFAULTS[script]
    table = {flag: replace(fact, default=defaults[flag]) if flag in defaults else fact for flag, fact in FLAGS.items()}
    listing = Listing(f"{NAME} ({script})", where)
    for other in found:
        if str(other) and other is not command:
            listing.add(str(other), None, "ignored", "another command of the script")
    if command.start:
        listing.add(command.start, None, "ignored", "how the script is started")
    for flag, value in list(flags.items()):
        if value is None:
            reason = "needs a value" if flag in table else f"unknown flag{nearest(flag, table)}"
            listing.refuse(flag, flags.pop(flag), reason)
        elif VARIABLE.search(str(value)) and flag in table and table[flag].verdict != "ignored":
            listing.refuse(flag, flags.pop(flag), "is for the shell to fill in; write the value itself")
    taken = listing.take(table, flags)
    pruner = taken.get("--pruner")
    if pruner in UNKNOWN:
        listing.refuse("--pruner", pruner, "is not built in; use ours or taylor")
    elif pruner is not None:
        listing.take_criterion("--pruner", pruner, PRUNERS[script], ())
    if "--thr" in taken:
        settle_threshold(listing, pruner, float(taken["--thr"]))
    if script == "ldm_exp" and not any(row.verdict == "refused" for row in listing.rows.values()):
        listing.values |= {"round_to": 2, "halves": "apart"}
    return listing


def settle_threshold(listing: Listing, pruner: Any, threshold: float) -> None:
    """The threshold belongs to the authors' criterion; the others keep all timesteps."""
    if pruner in ("diff-pruning", "ours"):
        listing.give("--thr", {"importance": {"threshold": threshold}})
    elif listing.rows["--thr"].given:
        listing.amend("--thr", "ignored", f"--pruner {pruner} keeps all timesteps, in the script too")
    else:
        del listing.rows["--thr"]
