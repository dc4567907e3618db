"""Latency of the CIFAR-10 DDPM UNet, pruned by 0.3 after the published rule, against the dense one.

    python benchmarks/bench.py latency             # with 95 % intervals, exit code 1 if a promise is missed
    python benchmarks/bench.py latency --batch 1,4 --plot latency.png
    python benchmarks/bench.py latency --quick           # a few rounds instead of 30; promises are not judged

Weights are random: they make no difference to latency. Takes two to five minutes on one core.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from shared.architectures import build
from shared.results import processes, publish

import diffprune_plugin
from diffprune_plugin.export import measure, tables, to_onnx, verify_onnx
from diffprune_plugin.export.verify import summary

PROMISED = {"relative error": 1e-5, "share of the MACs ratio": 0.9, "eager / ONNX Runtime at batch 1": 1.3}


def main(
    batch: Annotated[str, typer.Option(help="batch sizes, for example 1,4")] = "1",
    rounds: Annotated[int | None, typer.Option(help="default: 30 or more, until the interval is narrow")] = None,
    threads: int = 1,
    round_to: Annotated[int | None, typer.Option(help="keep multiples of this many channels")] = None,
    plot: Path | None = None,
    quick: Annotated[bool, typer.Option("--quick", help="a few rounds instead of 30; promises are not judged")] = False,
) -> None:
    """Measure, print the tables, and end with exit code 1 if a promise is missed."""
    torch.set_num_threads(threads)
    dense, pruned = build("ddpm-cifar10-32"), build("ddpm-cifar10-32")
    plan = diffprune_plugin.make_plan(pruned, "magnitude", pruning_ratio=0.3, round_to=round_to)
    diffprune_plugin.remove_(pruned, plan)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "dense.onnx", Path(folder) / "pruned.onnx"]
        list(processes(2).map(to_onnx, (dense, pruned), files))
        verified = verify_onnx(files[1], pruned)
        result = measure(
            files[1],
            files[0],
            provider="cpu",
            batches=[int(size) for size in batch.split(",")],
            threads=threads,
            rounds=rounds,
            budget=8 if quick else None,
            eager={"dense": dense, "pruned": pruned},
        )
    publish(
        "latency" + ("_quick" if quick else ""),
        [
            f"params {plan.params[0] / 1e6:.2f} M to {plan.params[1] / 1e6:.2f} M, "
            f"MACs {plan.macs[0] / 1e9:.2f} G to {plan.macs[1] / 1e9:.2f} G; verified: {summary(verified)}",
            "",
            tables.markdown(result),
        ],
    )
    if plot:
        tables.plot(result, plot)
    speed = next(ratio for ratio in result.ratios if ratio.name == "dense / pruned")
    eager = next(ratio for ratio in result.ratios if ratio.name == "eager pruned / pruned")
    found = (verified.worst.relative, speed.realised or 0.0, eager.median)
    held = [
        found[0] <= PROMISED["relative error"],
        *(f >= p for f, p in zip(found[1:], [*PROMISED.values()][1:], strict=True)),
    ]
    for (name, promised), value, ok in zip(PROMISED.items(), found, held, strict=True):
        print(f"{'holds' if ok else 'MISSED'}: {name} {value:.3g}, promised {promised:g}")
    if not all(held) and not quick:
        raise typer.Exit(1)
