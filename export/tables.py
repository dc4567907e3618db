"""Latency and verdicts for people: terminal, Markdown, plot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from diffprune_plugin.export.benchmark import AGAIN, DENSE, EAGER, NOISE, Latency, Ratio, Row
from diffprune_plugin.export.widths import Waste
from diffprune_plugin.utils.files import new_file
from diffprune_plugin.utils.optional import need

ROWS = ("runs on", "model", "batch", "p50 ms", "p90 ms", "p99 ms", "runs", "peak MB")
DENSE_COLOR, PRUNED_COLOR = "#b0b7c3", "#2f6fde"
CLAIMS = {"noise floor": "noise", "faster": "faster", "no win claimed": "no win"}  # as a narrow table has them
# Operators that --fuse puts into a file; a session makes some of them by itself.
FUSED = {
    *("BiasAdd", "BiasSplitGelu", "GroupNorm", "MultiHeadAttention", "NhwcConv", "SkipGroupNorm"),
    "SkipLayerNormalization",
}
PER = {"forward": "One pass of the denoiser", "image": "A whole image"}  # what a time is that of
RATIOS = ("ratio", "batch", "speed-up", "95 % interval", "MACs ratio", "realised", "")


def row_cells(row: Row) -> tuple[str, ...]:
    memory = "" if row.memory is None else f"{row.memory / 1e6:.0f}"
    times = (f"{ms:.2f}" for ms in (row.p50, row.p90, row.p99))
    return (runtime(row), model(row), str(row.batch), *times, runs(row), memory)


def model(row: Row) -> str:
    return "the first again" if row.model == AGAIN else row.model


def runs(row: Row) -> str:
    return f"{row.n}{' (noisy)' if row.noisy else ''}"


def runtime(row: Row) -> str:
    return row.runtime if row.runtime == EAGER else f"ONNX Runtime, {row.runtime}"


def ratio_cells(ratio: Ratio) -> tuple[str, ...]:
    macs = f"{ratio.macs_ratio:.3f}" if ratio.macs_ratio else ""
    share = f"{ratio.realised:.0%}" if ratio.realised else ""
    claim = "noise floor" if ratio.name == NOISE else "faster" if ratio.win else "no win claimed"
    return (
        ratio.name,
        str(ratio.batch),
        f"{ratio.median:.3f}x",
        f"[{ratio.low:.3f}, {ratio.high:.3f}]",
        macs,
        share,
        claim,
    )


def conditions(result: Latency) -> str:
    """What the figures were taken under, in a line."""
    device = next((f" ({p.device})" for p in result.placements.values() if p.device), "")
    proved = sum(placement.proved for placement in result.placements.values())
    return (
        f"ONNX Runtime on {result.provider}{device}, all 5 proofs held for {proved} of {len(result.placements)} "
        f"sessions; {result.dtype}, {result.threads} "
        f"thread{'s' if result.threads > 1 else ''}, spinning off, shuffled rounds"
    )


def tables(result: Latency) -> list[Table]:
    """The latency and the ratios for a terminal of 80 columns: shorter words and four digits, a row a line."""
    latency = narrow(("runs on", "model", "batch", "p50 ms", "p90 ms", "p99 ms", "runs", "peak MB"))
    latency.title = conditions(result)
    for row in result.rows:
        memory = "" if row.memory is None else f"{row.memory / 1e6:.0f}"
        times = (short(ms) for ms in (row.p50, row.p90, row.p99))
        latency.add_row(row.runtime, model(row), str(row.batch), *times, runs(row), memory)
    speed = narrow(("ratio", "batch", "speed-up", "95 %\ninterval", "MACs\nratio", "realised", ""))
    for ratio in result.ratios:
        between = f"[{short(ratio.low)}, {short(ratio.high)}]"
        macs, share, claim = ratio_cells(ratio)[4:]
        macs = short(ratio.macs_ratio) if ratio.macs_ratio else macs
        speed.add_row(ratio.name, str(ratio.batch), f"{short(ratio.median)}x", between, macs, share, CLAIMS[claim])
    return [latency, speed, *([tuned_table(result)] if result.tuned else [])]


def tuned_table(result: Latency) -> Table:
    """What `--tune` tried, the best of each model marked."""
    table, models = narrow(("options", "dense ms", "pruned ms", "built in s")), ("dense", "pruned")
    bests = {m: min((t["ms"][m] for t in result.tuned if m in t["ms"]), default=None) for m in models}
    for tried in result.tuned:
        cells = [f"{short(ms)}{' *' * (ms == bests[m])}" if (ms := tried["ms"].get(m)) else "-" for m in models]
        built = short(sum(tried["build_seconds"].values())) if tried["ms"] else "failed"
        table.add_row(tried["provider"].partition(":")[2].replace(",", "\n") or "none", *cells, built)
    return table


def narrow(head: Sequence[str]) -> Table:
    """A table without lines between its columns; no cell is broken."""
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False, title_justify="left")
    for place, name in enumerate(head):
        table.add_column(name, no_wrap=True, justify="left" if place == 0 else "right")
    return table


def short(value: float) -> str:
    """A number of four digits, or as many as it has before the point."""
    return f"{value:.{max(0, 4 - len(str(int(value))))}f}"


def markdown(*results: Latency) -> str:
    """The same in Markdown, with the widths that waste the hardware; of several, each below what its times are of."""
    titles = [f"## {PER[result.per]}\n\n" if len(results) > 1 else "" for result in results]
    return "\n".join(title + markdown_of_one(result) for title, result in zip(titles, results, strict=True))


def markdown_of_one(result: Latency) -> str:
    parts = [
        conditions(result) + ".",
        pipes(ROWS, (row_cells(row) for row in result.rows)),
        pipes(RATIOS, (ratio_cells(ratio) for ratio in result.ratios)),
        *lint(result),
    ]
    return "\n\n".join(parts) + "\n"


def pipes(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def lint(result: Latency) -> list[str]:
    """A line for each kernel that widths do not suit: the first of them, and what round_to would leave."""
    found: dict[tuple[str, str], list[Waste]] = {}
    for waste in result.waste:
        found.setdefault((waste.kernel, waste.of), []).append(waste)
    return [lint_line(kernel, of, wastes, result) for (kernel, of), wastes in found.items()] + fusion_lines(result)


def fusion_lines(result: Latency) -> list[str]:
    """What fused operators ran in each model, and what pruning lost, with the width that would keep it."""
    if not any(FUSED & set(counts) for counts in result.operators.values()):
        return []
    told = [
        f"{name}: {', '.join(f'{counts[operator]} {operator}' for operator in sorted(FUSED & set(counts))) or 'none'}"
        for name, counts in result.operators.items()
    ]
    lost = [f"{w.kernel} of {w.layer} ({w.width}, {w.rounded} would keep it)" for w in result.lost]
    return [f"fused operators that ran: {'; '.join(told)}", f"lost by pruning: {'; '.join(lost) or 'none'}"]


def lint_line(kernel: str, of: str, wastes: Sequence[Waste], result: Latency, shown: int = 5) -> str:
    listed = (f"{w.layer} has {w.width}, " + (f"round_to would leave {w.rounded}" if w.rounded else "") for w in wastes)
    named = "; ".join(each.removesuffix(", ") for each in list(listed)[:shown])
    more = f"; and {len(wastes) - shown} more" if len(wastes) > shown else ""
    what = (
        f"{len(wastes)} layers have widths that are no multiple of {wastes[0].multiple}, which {result.provider} pads"
    )
    told = f"{what} or runs slower" if of == "layer" else f"{len(wastes)} widths of a {of} that {kernel} does not take"
    return f"{told} ({result.dtype}): {named}{more}"


def plot(result: Latency | Sequence[Latency], path: str | Path) -> None:
    """Median latency with p90 for each model and batch size, as PNG; of several results one below the other.

    Raises MissingExtra without matplotlib.
    """
    need("matplotlib")
    from matplotlib.figure import Figure

    results = [result] if isinstance(result, Latency) else list(result)
    heights = [0.5 * len(plotted(each)) + 1.2 for each in results]
    figure = Figure(figsize=(7, sum(heights)), layout="constrained")
    grid = figure.subplots(len(results), squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, each in zip(grid[:, 0], results, strict=True):
        draw_bars(axes, each)
    figure.suptitle("\n".join(dict.fromkeys(map(conditions, results))), fontsize=7)
    with new_file(Path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def plotted(result: Latency) -> list[Row]:
    return [row for row in result.rows if row.model != AGAIN]


def draw_bars(axes: Any, result: Latency) -> None:
    rows = plotted(result)
    labels = [f"{row.model}, batch {row.batch}\n{runtime(row)}" for row in rows]
    colors = [DENSE_COLOR if row.model == DENSE else PRUNED_COLOR for row in rows]
    medians = [row.p50 for row in rows]
    whiskers = [[0.0] * len(rows), [max(row.p90 - row.p50, 0) for row in rows]]
    axes.barh(labels, medians, color=colors, xerr=whiskers, capsize=3, error_kw={"linewidth": 0.8})
    for index, row in enumerate(rows):
        axes.text(
            0,
            index,
            f" {row.p50:.2f}",
            va="center",
            fontsize=8,
            color="white" if colors[index] == PRUNED_COLOR else "black",
        )
    axes.invert_yaxis()
    axes.set_xlabel(f"ms per {result.per}: median, whisker to p90")
