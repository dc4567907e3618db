"""Every block type, embedding and option of UNet2DModel and UNet2DConditionModel: what is pruned, and what refused.

    python benchmarks/bench.py variants            # 178 tiny models to half, half an hour on one core
    python benchmarks/bench.py variants --quick    # without ONNX, two minutes

The table that `tests/adapters/test_sweep.py` goes through (`tests/unet_variants.py`); each variant is planned, removed,
run, saved and loaded, exported to ONNX and verified. Exit code 1 if one of them is neither pruned nor refused.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
import typer
from shared.results import ROOT, Store, Workers, publish, table

import diffprune_plugin as dp
from diffprune_plugin.errors import BadInput
from diffprune_plugin.export import to_onnx, verify_onnx

sys.path.insert(0, str(ROOT / "tests"))

from unet_variants import PRUNED, REFUSED, Variant

VARIANTS = (*PRUNED, *REFUSED)
RATIO = 0.5
Row = dict[str, Any]


def one(number: int, onnx: bool) -> Row:
    """What becomes of a variant: the line that refuses it, or the figures of one that is pruned."""
    variant = VARIANTS[number]
    model = variant.made()
    try:
        plan = dp.make_plan(model, "magnitude", pruning_ratio=RATIO)
    except BadInput as error:
        return {"refused": str(error)}
    dense = variant.output(model)
    dp.remove_(model, plan)
    found = variant.output(model)
    row: Row = {"params": plan.params, "runs": found.shape == dense.shape and bool(found.isfinite().all())}
    with tempfile.TemporaryDirectory() as folder:
        loaded = dp.load(dp.save(model, Path(folder) / "pruned"))
        row["reload"] = float((variant.output(loaded) - found).abs().max())
        if onnx:
            to_onnx(model, path := Path(folder) / "model.onnx")
            result = verify_onnx(path, model, batches=(1, 2))
            row |= {"cases": len(result.cases), "verified": result.passed, "error": result.worst.relative}
    return row


def right(variant: Variant, row: Row) -> bool:
    """Whether a row is one of the two outcomes that there are."""
    if "refused" in row:
        key = next(iter(variant.change), "")
        return row["refused"].startswith(f"{key}: ") and "\n" not in row["refused"]
    return row["runs"] and row["reload"] == 0 and row["params"][1] < row["params"][0] and row.get("verified", True)


def counts(rows: dict[Variant, Row]) -> Iterator[list[str]]:
    """A line for each class of UNet."""
    for cls in dict.fromkeys(variant.cls for variant in rows):
        of_class = {variant: row for variant, row in rows.items() if variant.cls is cls}
        pruned = [row for row in of_class.values() if "refused" not in row]
        verified = [row for row in pruned if "verified" in row]
        yield [
            cls.__name__,
            *map(str, (len(of_class), len(pruned), len(of_class) - len(pruned))),
            str(sum(not right(*each) for each in of_class.items())),
            f"{max(row['reload'] for row in pruned):.1f}",
            f"{sum(row['verified'] for row in verified)} of {len(verified)}",
            f"{max(row['error'] for row in verified):.1e}" if verified else "",
        ]


def told(row: Row) -> str:
    if "refused" in row:
        return f"refused: {row['refused']}"
    before, after = row["params"]
    return f"{before / 1e3:.0f} K to {after / 1e3:.0f} K" + (
        f", {row['cases']} cases within {row['error']:.0e}" if row.get("verified") else ""
    )


def main(
    quick: Annotated[bool, typer.Option("--quick", help="without ONNX")] = False,
    workers: Workers = 1,
) -> None:
    name = "variants_quick" if quick else "variants"
    facts = {"diffusers": diffusers.__version__, "torch": torch.__version__, "ratio": RATIO}
    store = Store(name, facts)
    store.fill({str(variant): partial(one, number, not quick) for number, variant in enumerate(VARIANTS)}, workers)
    rows = {variant: store.values[str(variant)] for variant in VARIANTS}
    head = ["class", "variants", "pruned", "refused", "neither", "reload difference", "ONNX verified", "largest error"]
    lines = [
        f"Magnitude at ratio {RATIO}, diffusers {facts['diffusers']}, torch {facts['torch']}; errors are relative to",
        "the largest value of PyTorch's output. A refusal is a line that begins with the key; what has no cases",
        "was not exported in this run.",
        "",
        *table(head, list(counts(rows))),
        "",
        *table(["variant", "outcome"], [[str(variant), told(row)] for variant, row in rows.items()]),
    ]
    publish(name, lines)
    raise typer.Exit(int(not all(right(*each) for each in rows.items())))
