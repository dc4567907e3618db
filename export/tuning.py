"""A provider's options tried out: the sensible combinations, for the dense and the pruned model alike."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from diffprune_plugin.errors import BadInput, DiffPruneError
from diffprune_plugin.export.benchmark import DENSE, PRUNED, measure
from diffprune_plugin.export.provider_table import PROVIDERS
from diffprune_plugin.export.providers import known_provider, spec_of

ROUNDS = 10  # of each combination: enough to tell options apart that matter


@dataclass(frozen=True)
class Tried:
    """One combination: the medians in milliseconds and the seconds until each was built, by model, or why not."""

    provider: str
    ms: dict[str, float] = field(default_factory=dict)
    build_seconds: dict[str, float] = field(default_factory=dict)
    why: str = ""


def check_tune(spec: str | None) -> str:
    """The provider whose options are tried; raises BadInput for none, or one that has none to try."""
    name = (spec or "").partition(":")[0]
    if not spec or not known_provider(spec).tuned:
        able = ", ".join(each for each, row in PROVIDERS.items() if row.tuned)
        raise BadInput(
            f"--tune: {f'{name} has no options to try' if name else 'no --provider'}; give --provider {able}"
        )
    return spec


def combinations(spec: str) -> list[str]:
    """The provider with each combination of the options that are worth trying and that it is not given already."""
    name, _, rest = spec.partition(":")
    given = [word for word in rest.split(",") if word]
    taken = {word.partition("=")[0] for word in given}
    free = [[f"{key}={value}" for value in of] for key, of in known_provider(name).tuned.items() if key not in taken]
    return [spec_of(name, [*given, *words]) for words in itertools.product(*free)]


def tune(pruned: Path, dense: Path | None, spec: str, batch: int, threads: int) -> list[Tried]:
    """Every combination, dense and pruned in the same shuffled rounds; one that is not proved says why."""
    found = []
    for each in combinations(check_tune(spec)):
        try:
            result = measure(
                pruned, dense, provider=each, batches=(batch,), threads=threads, rounds=ROUNDS, memory=False
            )
        except DiffPruneError as error:
            found.append(Tried(each, why=str(error)))
            continue
        ms = {row.model: row.p50 for row in result.rows if row.model in (DENSE, PRUNED)}
        builds = {name.partition(",")[0]: placement.build_seconds for name, placement in result.placements.items()}
        found.append(Tried(each, ms, {name: builds[name] for name in ms}))
    return found


def best(tried: Sequence[Tried], model: str) -> str | None:
    """The combination that a model was fastest with; None where it was not timed.

    Raises BadInput where none of them worked.
    """
    if not any(each.ms for each in tried):
        raise BadInput(f"--tune: no combination works; the first: {tried[0].provider}: {tried[0].why}")
    timed = [each for each in tried if model in each.ms]
    return min(timed, key=lambda each: each.ms[model]).provider if timed else None


def as_rows(tried: Sequence[Tried]) -> list[dict[str, Any]]:
    return [asdict(each) for each in tried]
