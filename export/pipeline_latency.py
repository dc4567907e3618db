"""What one image costs: the whole pipeline's latency, dense against pruned, and each component's share of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffprune_plugin.errors import HardwareUnproved
from diffprune_plugin.export.benchmark import AGAIN, DENSE, PRUNED, Latency, interleaved, medians, ratios, row
from diffprune_plugin.export.components import DECODER, MODEL_FILE, PARTS, SEQUENCE, TEXT
from diffprune_plugin.export.drawing import draw, guided
from diffprune_plugin.export.feeds import example_feeds, fixed_dims
from diffprune_plugin.export.integrity import read_provenance
from diffprune_plugin.export.options import BenchOptions, Options
from diffprune_plugin.export.ort_pipeline import assembled, pipeline_class
from diffprune_plugin.export.ort_session import OrtSession
from diffprune_plugin.export.ort_unet import ORTUNet
from diffprune_plugin.export.pipeline import denoiser_file, tokens_of
from diffprune_plugin.export.proofs import prove
from diffprune_plugin.export.providers import known_provider
from diffprune_plugin.plugins import components, denoiser_of
from diffprune_plugin.pruning.directory import read_json

ROUNDS = 10  # each an image, of many passes
REST = "the rest"  # the scheduler, the tokenizer, Python


@dataclass
class Shares:
    """Seconds that each component took of the images drawn, by model and folder, and of their whole."""

    seconds: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, model: str, spent: dict[str, float], whole: float) -> None:
        total = self.seconds.setdefault(model, {})
        own = {name.removeprefix(f"{DENSE} "): value for name, value in spent.items()}
        for name, value in (own | {REST: whole - sum(spent.values())}).items():
            total[name] = total.get(name, 0.0) + value

    def of(self, model: str) -> dict[str, float]:
        """Each component's share of the whole, the largest first."""
        found = self.seconds[model]
        whole = sum(found.values())
        return {name: value / whole for name, value in sorted(found.items(), key=lambda item: -item[1])}


def measure_pipeline(
    place: Path, dense: Path | None, options: BenchOptions, steps: int, provider: str
) -> tuple[Latency, Shares]:
    """Time whole images of so many steps, the dense denoiser's beside, in shuffled rounds after a warm-up.

    The sessions timed are those that were proved to run on the provider, whole. Raises HardwareUnproved if one is not.
    """
    dtype = read_provenance(denoiser_file(place))["dtype"]
    result, shares = Latency(provider, dtype, options.threads, options.rounds or ROUNDS, per="image"), Shares()
    for batch in options.batches:
        opened: dict[str, OrtSession] = {}
        # Those of before go first: memory holds one set of sessions.
        pipelines: dict[str, Any] = {}
        runs: dict[str, Any] = {}
        pipelines, cost = proved_pipelines(place, dense, batch, steps, result, opened)
        runs = {name: timed_run(name, pipelines[name], batch, steps, opened, shares) for name in pipelines}
        runs[AGAIN] = plain_run(next(iter(pipelines.values())), batch, steps)
        warm = known_provider(provider).warm_up
        times, warm_ups = interleaved(runs, result.rounds, result.rounds, options.budget, warm)
        result.rows += [row(name, batch, times[name], warm_ups[name], None, provider) for name in times]
        macs = cost[DENSE] / cost[PRUNED] if dense else None
        result.ratios += ratios([{name: medians(taken) for name, taken in times.items()}], batch, macs)
    return result, shares


def proved_pipelines(
    place: Path, dense: Path | None, batch: int, steps: int, result: Latency, opened: dict[str, OrtSession]
) -> tuple[dict[str, Any], dict[str, int]]:
    """The pipelines to time, dense first, which share all but their denoiser; and the MACs of an image of each."""
    cost = dict.fromkeys((DENSE, PRUNED), 0)
    double = takes_guidance(place)

    def open_proved(folder: str, path: Path) -> OrtSession:
        denoiser = folder in components() or path == dense
        factor = 2 if double and denoiser else 1
        dims = part_dims(place, path, batch * factor)
        placement, bound = prove(path, result.provider, example_feeds(path, dims), dims, result.threads)
        result.placements[f"{folder}, batch {batch * factor}"] = placement
        opened[folder] = OrtSession(path, result.provider, session=bound.session)
        facts = read_provenance(path)
        times = factor * steps if denoiser else passes(folder, facts["model_class"], double)
        for name in (DENSE,) if path == dense else (PRUNED,) if denoiser else (DENSE, PRUNED):
            cost[name] += int(facts["macs"]) * times
        return opened[folder]

    pruned = assembled(place, open_proved)
    if dense is None:
        return {PRUNED: pruned}, cost
    name = denoiser_of(pruned)[0]
    shared = {key: value for key, value in pruned.components.items() if key != name}
    unet = ORTUNet(dense, session=open_proved(f"dense {name}", dense))
    return {DENSE: assembled(place, open_proved, **shared, **{name: unet}), PRUNED: pruned}, cost


def part_dims(place: Path, path: Path, batch: int) -> dict[str, int]:
    """The sizes that a part's open axes are fixed to, in the pipeline that it is of."""
    dims = fixed_dims(path, batch=batch)
    if dims.get("sequence") == SEQUENCE:  # the usual one
        dims["sequence"] = tokens_of(place)
    return dims


def prove_parts(place: Path, options: Options, found: dict[str, Any]) -> None:
    """Prove that every part runs on the provider asked for, whole; ``found`` gets the placements by folder.

    Raises HardwareUnproved, with its folder, where one does not.
    """
    for path in sorted(place.glob(f"*/{MODEL_FILE}")):
        # The denoiser alone replays a captured graph, as when it is timed.
        spec = (options.asked_provider if path == denoiser_file(place) else None) or options.checking_provider
        dims = part_dims(place, path, options.batches[0])
        try:
            placement, _ = prove(path, spec, example_feeds(path, dims), dims, options.threads)
        except HardwareUnproved as error:
            raise HardwareUnproved(f"{path.parent.name}/{MODEL_FILE}: {error}") from error
        found[path.parent.name] = placement.as_dict()


def passes(folder: str, kind: str, double: bool) -> int:
    """How often an image passes through a part other than the denoiser: with guidance the empty prompt is read too."""
    if kind in PARTS and TEXT in PARTS[kind]:
        return 2 if double else 1
    return int(folder.endswith(DECODER.ending))


def takes_guidance(place: Path) -> bool:
    return guided(pipeline_class(place), read_json(denoiser_file(place).with_name("config.json")))


def timed_run(
    name: str, pipeline: Any, batch: int, steps: int, opened: dict[str, OrtSession], shares: Shares
) -> Callable[[], None]:
    """One image, of which the sessions' seconds are written down."""

    def run() -> None:
        before = {folder: session.seconds for folder, session in opened.items()}
        start = time.perf_counter()
        draw(pipeline, batch, steps)
        whole = time.perf_counter() - start
        spent = {folder: opened[folder].seconds - seconds for folder, seconds in before.items()}
        shares.add(name, {folder: value for folder, value in spent.items() if value}, whole)

    return run


def plain_run(pipeline: Any, batch: int, steps: int) -> Callable[[], None]:
    def run() -> None:
        draw(pipeline, batch, steps)

    return run


def lines(shares: Shares) -> list[str]:
    """The shares in a line for each model."""
    return [
        f"{model}: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.of(model).items())
        for model in shares.seconds
    ]
