"""Latency that can be believed: proved placement, shuffled interleaving, ratios with intervals, a noise floor."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from diffprune_plugin.errors import BadInput, CheckFailed
from diffprune_plugin.export.feeds import example_feeds, fixed_dims
from diffprune_plugin.export.integrity import check_files
from diffprune_plugin.export.memory import peak_memory
from diffprune_plugin.export.proofs import Placement, best_provider, prove
from diffprune_plugin.export.providers import check_dtype, known_provider
from diffprune_plugin.export.widths import Waste, lost_kernels, wasteful_layers

DENSE, PRUNED, AGAIN = "dense", "pruned", "again"
EAGER = "PyTorch eager"
NOISE = "A/A: the same model twice"  # the ratio that shows what noise alone does
PATIENCE = 4  # times as many rounds as the provider's at most, while the interval is wider than WIDTH
WIDTH = 0.01  # half-width of the interval of the speed-up, as a share of it
NOISY = 1.5  # p90 / p50 above which a row is called noisy
LEAST = 0.02  # seconds that a model runs in a round: short ones run several times, and their median counts
Run = Callable[[], None]
Clock = Callable[[], float]  # seconds


@dataclass(frozen=True)
class Row:
    """Latency of one model at one batch size: percentiles in milliseconds over n runs, peak memory in bytes."""

    runtime: str
    model: str
    batch: int
    n: int
    p50: float
    p90: float
    p99: float
    minimum: float
    warm_up: int
    memory: int | None = None

    @property
    def noisy(self) -> bool:
        return self.p90 / self.p50 > NOISY


@dataclass(frozen=True)
class Ratio:
    """How much faster one is than another: the median of per-round ratios with its 95 % bootstrap interval."""

    name: str
    batch: int
    median: float
    low: float
    high: float
    macs_ratio: float | None = None
    floor: float = 1.0

    @property
    def win(self) -> bool:
        """A win is claimed only where the whole interval lies above 1, and above what noise alone showed."""
        return self.low > max(1.0, self.floor)

    @property
    def realised(self) -> float | None:
        """The share of the MACs ratio that became speed-up."""
        return self.median / self.macs_ratio if self.macs_ratio else None


@dataclass
class Latency:
    """Everything that one benchmark found, and under which conditions; ``lost``: see `lost_kernels`.

    ``per``: what a time is that of, a forward or a whole image. ``fused``: whether the pruned file has fused operators.
    ``tuned``: what `--tune` tried; the dense model then ran on ``dense_provider``, with options of its own.
    """

    provider: str
    dtype: str
    threads: int
    rounds: int
    rows: list[Row] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    placements: dict[str, Placement] = field(default_factory=dict)
    waste: list[Waste] = field(default_factory=list)
    lost: list[Waste] = field(default_factory=list)
    dense_provider: str = ""
    per: str = "forward"
    fused: bool = False
    tuned: list[dict[str, Any]] = field(default_factory=list)

    @property
    def operators(self) -> dict[str, dict[str, int]]:
        """Of each model the operators of ONNX Runtime's own that ran, fused ones among them."""
        found: dict[str, dict[str, int]] = {}
        for name, placement in self.placements.items():
            found.setdefault(name.partition(",")[0], placement.operators)
        found.pop(AGAIN, None)
        return found

    def as_dict(self) -> dict[str, Any]:
        content = asdict(self) | {"spinning": False, "operators": self.operators}
        content["placements"] = {name: placement.as_dict() for name, placement in self.placements.items()}
        content["rows"] = [asdict(row) | {"noisy": row.noisy} for row in self.rows]
        content["ratios"] = [asdict(r) | {"win": r.win, "realised": r.realised} for r in self.ratios]
        return content


def measure(
    pruned: str | Path,
    dense: str | Path | None = None,
    *,
    provider: str | None = None,
    dense_provider: str | None = None,
    batches: Sequence[int] = (1,),
    axes: Mapping[str, int] | None = None,
    threads: int = 1,
    rounds: int | None = None,
    budget: float | None = None,
    eager: Mapping[str, Any] | None = None,
    memory: bool = True,
    clock: Clock = time.perf_counter,
    opened: int = 1,
) -> Latency:
    """Time a pruned model, against the dense one if given, on a provider that is proved for every session timed.

    ``rounds``: how many (None: at least 30, more while the interval is wide); ``budget``: seconds of rounds for each
    batch size, after which they end early. ``axes``: sizes of other dynamic axes. ``eager``: PyTorch models under
    "dense" and "pruned", in the same rounds. ``clock``: what tells the seconds. ``dense_provider``: the same provider
    with the options that suit the dense model. ``opened``: how often each session is made anew, with its part of the
    rounds, forwards and back: two of one file can differ by 3 %, the last was seen to be up to 2 % faster.

    Raises BadInput for damaged files or impossible sizes, HardwareUnproved for a provider without proof.
    """
    files = {PRUNED: Path(pruned)} if dense is None else {DENSE: Path(dense), PRUNED: Path(pruned)}
    facts = {name: check_files(path) for name, path in files.items()}
    dtype = check_comparable(files, facts)
    if threads < 1 or not batches or (rounds is not None and rounds < 5):
        raise BadInput(f"threads {threads}, rounds {rounds}: at least 1 thread, one batch size and 5 rounds are needed")
    asked = {batch: {**(axes or {}), "batch": batch} for batch in batches}
    dims = {batch: {name: fixed_dims(path, **asked[batch]) for name, path in files.items()} for batch in batches}
    if provider is None:
        first = dims[batches[0]][PRUNED]
        provider = best_provider(files[PRUNED], example_feeds(files[PRUNED], first), first, dtype).provider
    check_dtype(provider, dtype)
    wanted = known_provider(provider)
    for name, model in (eager or {}).items():
        if (device := next(model.parameters()).device.type) != wanted.memory:
            raise BadInput(
                f"eager {name} is on {device}, {provider} computes on {wanted.memory}: not comparable; move it"
            )
    result = Latency(provider, dtype, threads, rounds or wanted.rounds, dense_provider=dense_provider or provider)
    waste = {n: wasteful_layers(path, provider, dtype, "fused" in facts[n]) for n, path in files.items()}
    result.waste = waste[PRUNED]
    result.fused = "fused" in facts[PRUNED]
    result.lost = lost_kernels(waste[PRUNED], waste.get(DENSE, waste[PRUNED])) if result.fused else []
    macs = int(facts[DENSE]["macs"]) / int(facts[PRUNED]["macs"]) if dense else None
    for batch in batches:
        seen: list[dict[str, list[list[float]]]] = []
        for number in range(opened):
            runs: dict[str, Any] = {}  # those of before go first: memory holds one set of sessions
            runs = sessions(result, files, batch, dims[batch], back=number % 2 == 1)
            for name, model in (eager or {}).items():
                from diffprune_plugin.export.eager import eager_run  # with torch, which sessions alone do not need

                runs[f"eager {name}"] = eager_run(model, files[PRUNED], dims[batch][PRUNED], threads)
            least, most = (math.ceil(count / opened) for count in (result.rounds, rounds or result.rounds * PATIENCE))
            times, warm_ups = interleaved(runs, least, most, budget, wanted.warm_up, clock)
            seen.append(times)
        ran = {name: provider if name == PRUNED else result.dense_provider for name in times}
        peaks = {n: peak_memory(p, ran[n], dims[batch][n], threads) for n, p in files.items()} if memory else {}
        every = {name: [taken for times in seen for taken in times[name]] for name in seen[0]}
        result.rows += [row(n, batch, every[n], warm_ups[n], peaks.get(n), ran[n]) for n in every]
        result.ratios += ratios([{n: medians(taken) for n, taken in times.items()} for times in seen], batch, macs)
    return result


def check_comparable(files: Mapping[str, Path], facts: Mapping[str, Mapping[str, str]]) -> str:
    """The dtype of the files; raises BadInput where two of them differ in dtype, opset, the size of a
    sample or fusion."""
    for key in ("dtype", "opset", "axes"):
        values = {name: fact[key] for name, fact in facts.items()}
        if len(set(values.values())) > 1:
            told = ", ".join(f"{files[name]} has {value}" for name, value in values.items())
            raise BadInput(f"{key} differ: {told}; a ratio needs two exports of the same {key}")
    fused = [files[name] for name, fact in facts.items() if "fused" in fact]
    if 0 < len(fused) < len(facts):
        raise BadInput(f"--fuse: {fused[0]} alone has fused operators; a ratio needs two exports that have, or none")
    return facts[PRUNED]["dtype"]


def sessions(
    result: Latency, files: Mapping[str, Path], batch: int, dims: Mapping[str, Mapping[str, int]], back: bool = False
) -> dict[str, Run]:
    """A proved session for each model, and a second of the first, the noise floor; ``back``: opened from the last."""
    runs: dict[str, Run] = {}
    first = next(iter(files))
    for name, source in [*((n, n) for n in files), (AGAIN, first)][:: -1 if back else 1]:
        feeds = example_feeds(files[source], dims[source])
        spec = result.provider if source == PRUNED else result.dense_provider
        placement, bound = prove(files[source], spec, feeds, dims[source], result.threads)
        result.placements[f"{name}, batch {batch}"] = placement
        runs[name] = bound.run
    return runs


def interleaved(
    runs: Mapping[str, Run],
    rounds: int,
    most: int,
    budget: float | None,
    warm_up: int,
    clock: Clock = time.perf_counter,
) -> tuple[dict[str, list[list[float]]], dict[str, int]]:
    """Seconds of the runs of each round, every round in another order, after each model has reached a steady state.

    In blocks, other load on the machine comes and goes between the models; inside a round it hits them all.
    """
    warm = {name: warmed(run, warm_up, clock) for name, run in runs.items()}
    repeats = max(1, min(10, math.ceil(LEAST / min(t[-1] for t in warm.values()))))
    order, shuffler = list(runs), random.Random(0)
    times: dict[str, list[list[float]]] = {name: [] for name in runs}
    end = time.perf_counter() + (budget or float("inf"))
    for count in range(most):
        late = count >= 10 and time.perf_counter() > end
        if late or (count >= rounds and count % 10 == 0 and settled(times)):
            break
        shuffler.shuffle(order)
        for name in order:
            times[name].append([timed(runs[name], clock) for _ in range(repeats)])
    return times, {name: len(t) for name, t in warm.items()}


def settled(times: Mapping[str, Sequence[Sequence[float]]]) -> bool:
    """Whether the interval of the speed-up is narrow enough."""
    first = medians(times[DENSE if DENSE in times else PRUNED])
    median, low, high = interval([(first, medians(times[PRUNED if DENSE in times else AGAIN]))], 500)
    return high - low < 2 * WIDTH * median


def medians(rounds: Sequence[Sequence[float]]) -> list[float]:
    """One figure a round."""
    return [statistics.median(runs) for runs in rounds]


def warmed(run: Run, least: int, clock: Clock = time.perf_counter, most: int = 20) -> list[float]:
    """Run until the last three differ by less than 5 %; the seconds of each run."""
    times: list[float] = []
    while len(times) < most:
        times.append(timed(run, clock))
        last = times[-3:]
        if len(times) >= max(least, 3) and max(last) - min(last) < 0.05 * min(last):
            break
    return times


def timed(run: Run, clock: Clock = time.perf_counter) -> float:
    start = clock()
    run()
    return clock() - start


def row(
    name: str, batch: int, rounds: Sequence[Sequence[float]], warm_up: int, memory: int | None, provider: str
) -> Row:
    seconds = [run for runs in rounds for run in runs]
    p50, p90, p99 = (float(np.percentile(seconds, q)) * 1e3 for q in (50, 90, 99))
    runtime, model = (EAGER, name.removeprefix("eager ")) if name.startswith("eager ") else (provider, name)
    return Row(runtime, model, batch, len(seconds), p50, p90, p99, min(seconds) * 1e3, warm_up, memory)


def ratios(seen: Sequence[Mapping[str, Sequence[float]]], batch: int, macs: float | None) -> list[Ratio]:
    """Every ratio that the rounds allow, the noise floor last; ``seen``: the rounds of each opening of the sessions."""
    times = seen[0]
    wanted = (
        ("dense / pruned", DENSE, PRUNED, macs),
        ("eager dense / eager pruned", "eager dense", "eager pruned", macs),
        ("eager dense / dense", "eager dense", DENSE, None),
        ("eager pruned / pruned", "eager pruned", PRUNED, None),
        (NOISE, DENSE if DENSE in times else PRUNED, AGAIN, None),
    )
    found = [
        Ratio(name, batch, *interval([(times[slow], times[fast]) for times in seen]), macs_ratio)
        for name, slow, fast, macs_ratio in wanted
        if slow in times and fast in times
    ]
    noise = found[-1].median
    return [*(replace(ratio, floor=max(noise, 1 / noise)) for ratio in found[:-1]), found[-1]]


def interval(
    pairs: Sequence[tuple[Sequence[float], Sequence[float]]], resamples: int = 2000
) -> tuple[float, float, float]:
    """Median of the per-round ratios, slow by fast, and its 95 % bootstrap interval.

    pairs: the rounds of each opening of the sessions, which are drawn first, then as many rounds of each that is drawn.
    """
    openings = [np.asarray(slow) / np.asarray(fast) for slow, fast in pairs]
    drawing, count, found = np.random.default_rng(0), len(openings), []
    for _ in range(resamples):
        chosen = [openings[place] for place in drawing.integers(count, size=count)]
        found.append(np.median(np.concatenate([drawing.choice(values, len(values)) for values in chosen])))
    low, high = np.percentile(found, (2.5, 97.5))
    return float(np.median(np.concatenate(openings))), float(low), float(high)


def check_gates(max_latency_ms: float | None, min_speedup: float | None) -> None:
    """Raises BadInput for a gate that everything would pass, or nothing."""
    for option, value in (("--max-latency-ms", max_latency_ms), ("--min-speedup", min_speedup)):
        if value is not None and not 0 < value < math.inf:
            raise BadInput(f"{option} {value:g}: give a number above 0")


def gate(result: Latency, max_latency_ms: float | None = None, min_speedup: float | None = None) -> None:
    """Raises CheckFailed where a median latency or a proved speed-up misses what was asked."""
    timed_rows = [row for row in result.rows if row.model == PRUNED and row.runtime == result.provider]
    for row in timed_rows if max_latency_ms is not None else ():
        if not row.p50 <= float(max_latency_ms or 0):
            raise CheckFailed(f"--max-latency-ms {max_latency_ms:g}: batch {row.batch} takes {row.p50:.2f} ms (median)")
    speedups = [ratio for ratio in result.ratios if ratio.name == "dense / pruned"]
    if min_speedup is not None and not speedups:
        raise BadInput("--min-speedup needs the dense model: give --baseline")
    for ratio in speedups if min_speedup is not None else ():
        if not ratio.low >= float(min_speedup or 0):
            raise CheckFailed(
                f"--min-speedup {min_speedup:g}: batch {ratio.batch} is {ratio.median:.2f}x "
                f"[{ratio.low:.2f}, {ratio.high:.2f}]; the lower end counts"
            )
