"""What the suite of a GPU found, as tables, JSON and a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from diffprune_plugin.export.benchmark import Ratio
from diffprune_plugin.export.providers import check_distribution, gpu, versions
from diffprune_plugin.utils.files import write_text
from diffprune_plugin.utils.optional import need_pyplot
from shared.results import RESULTS, publish, table

Row = dict[str, Any]
HIDDEN = ("passed", "seconds", "measured")  # of a part: not in its cell


def report(name: str, provider: str, results: dict[str, Row]) -> None:
    """The tables, the JSON and the picture."""
    about = {"device": gpu() or "CPU", "provider": provider, **versions(check_distribution())}
    about |= {"torch": torch.__version__}
    write_text(RESULTS / f"{name}.json", json.dumps({"about": about, "parts": results}, indent=1) + "\n")
    rows = [[p, "yes" if r["passed"] else "NO", f"{r['seconds']:.0f}", told(r)] for p, r in results.items()]
    speeds = list(ratios_of(results))
    lines = [
        "; ".join(f"{key} {value}" for key, value in about.items() if key != "build"),
        "",
        *table(["part", "passed", "seconds", "found"], rows),
        "",
        *table(
            ["model", "options", "batch", "ratio", "median [95 %]", "share of the MACs ratio"],
            [
                [m, spec, str(r.batch), r.name, f"{r.median:.2f}x [{r.low:.2f}, {r.high:.2f}]", share(r)]
                for m, spec, r in speeds
            ],
        ),
    ]
    publish(name, lines)
    plot([(f"{m} {spec} batch {r.batch}", r) for m, spec, r in speeds if r.macs_ratio], RESULTS / f"{name}.png")


def told(row: Row) -> str:
    """What a part found, in a cell."""
    if "why" in row:
        return str(row["why"]).strip().splitlines()[-1].replace("|", "/") if str(row["why"]).strip() else "nothing said"
    return ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if k not in HIDDEN)


def ratios_of(results: dict[str, Row]) -> Iterator[tuple[str, str, Ratio]]:
    """(model, provider with options, ratio) of all that was timed."""
    for part, row in results.items():
        for spec, found in row.get("measured", {}).items():
            for each in found["ratios"]:
                fields = {key: each[key] for key in ("name", "batch", "median", "low", "high", "macs_ratio", "floor")}
                yield part.partition("/")[2], spec, Ratio(**fields)


def share(ratio: Ratio) -> str:
    return "" if ratio.realised is None else f"{ratio.realised:.0%}"


def plot(bars: list[tuple[str, Ratio]], path: Path) -> None:
    """Each speed-up with its interval, and the MACs ratio that it could reach."""
    if not bars:
        return
    pyplot = need_pyplot()
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.35 * len(bars)), layout="constrained")
    places = list(range(len(bars)))[::-1]
    medians = [ratio.median for _, ratio in bars]
    errors = [[r.median - r.low for _, r in bars], [r.high - r.median for _, r in bars]]
    axes.barh(places, medians, xerr=errors, height=0.6)
    axes.plot([r.macs_ratio for _, r in bars], places, "k|", markersize=14, label="MACs ratio")
    axes.set_yticks(places, [name for name, _ in bars], fontsize=8)
    axes.set_xlabel("dense / pruned")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
