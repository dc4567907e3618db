"""Latency of the CIFAR-10 DDPM UNet, pruned by 0.3 after the published rule, against the dense one.

    python benchmarks/latency.py                   # Markdown with 95 % intervals, exit code 1 if a promise is missed
    python benchmarks/latency.py --batch 1,4 --plot latency.png
    python benchmarks/latency.py --quick           # at least 10 rounds instead of 30; promises are not judged

Weights are random: they make no difference to latency. Takes two to five minutes on one core.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from architectures import build
from common import publish

import diffprune_plugin
from diffprune_plugin.export import measure, tables, to_onnx, verify_onnx
from diffprune_plugin.export.verify import summary

PROMISED = {"relative error": 1e-5, "share of the MACs ratio": 0.9, "eager / ONNX Runtime at batch 1": 1.3}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", default="1", help="batch sizes, for example 1,4")
    parser.add_argument("--rounds", type=int, help="default: 30 or more, until the interval is narrow")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--round-to", type=int, default=None, help="keep multiples of this many channels")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dense, pruned = build("ddpm-cifar10-32"), build("ddpm-cifar10-32")
    plan = diffprune_plugin.make_plan(pruned, "magnitude", pruning_ratio=0.3, round_to=arguments.round_to)
    diffprune_plugin.remove_(pruned, plan)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "dense.onnx", Path(folder) / "pruned.onnx"]
        for unet, path in zip((dense, pruned), files, strict=True):
            to_onnx(unet, path)
        verified = verify_onnx(files[1], pruned)
        result = measure(
            files[1],
            files[0],
            batches=[int(size) for size in arguments.batch.split(",")],
            threads=arguments.threads,
            rounds=arguments.rounds,
            budget=20 if arguments.quick else None,
            eager={"dense": dense, "pruned": pruned},
        )
    publish(
        "latency" + ("_quick" if arguments.quick else ""),
        [
            f"params {plan.params[0] / 1e6:.2f} M to {plan.params[1] / 1e6:.2f} M, "
            f"MACs {plan.macs[0] / 1e9:.2f} G to {plan.macs[1] / 1e9:.2f} G; verified: {summary(verified)}",
            "",
            tables.markdown(result),
        ],
    )
    if arguments.plot:
        tables.plot(result, arguments.plot)
    speed = next(ratio for ratio in result.ratios if ratio.name == "dense / pruned")
    eager = next(ratio for ratio in result.ratios if ratio.name == "eager pruned / pruned")
    found = (verified.worst.relative, speed.realised or 0.0, eager.median)
    held = [
        found[0] <= PROMISED["relative error"],
        *(f >= p for f, p in zip(found[1:], [*PROMISED.values()][1:], strict=True)),
    ]
    for (name, promised), value, ok in zip(PROMISED.items(), found, held, strict=True):
        print(f"{'holds' if ok else 'MISSED'}: {name} {value:.3g}, promised {promised:g}")
    return 0 if all(held) or arguments.quick else 1


if __name__ == "__main__":
    sys.exit(main())
