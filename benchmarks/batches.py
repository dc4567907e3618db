"""More images a step than `make bench` has time for, with the scripts it runs.

    python benchmarks/batches.py            # half an hour on two cores, on slow ones more than one
    python benchmarks/batches.py --quick    # 8 steps

criteria.py at half the MACs with 16 images a step instead of one, and recover.py with the 32 of the dense model's own
training. Results are kept in benchmarks/results; interrupted, it goes on where it was.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import criteria
import recover
import typer

NAMES = ("random", "magnitude", "taylor", criteria.PAPER, criteria.SCRATCH)


def main(
    quick: Annotated[bool, typer.Option("--quick", help="two seeds, 8 steps")] = False,
    seeds: Annotated[int, typer.Option(help="of criteria.py; recover.py has two")] = 3,
    workers: Annotated[int, typer.Option(help="processes, of one thread each")] = 2,
) -> None:
    """Measure what is missing, then print both tables and draw their pictures."""
    end, seeds, steps = ("_quick", 2, 8) if quick else ("", seeds, criteria.FULL.steps)
    budget, scale = criteria.QUICK if quick else criteria.FULL, recover.QUICK if quick else recover.FULL
    recover.recover(f"recover_batch_32{end}", 2, replace(scale, batch_size=32, steps=steps), workers)
    more = replace(budget, batch_size=16, steps=steps)
    criteria.compare(f"criteria_batch_16{end}", NAMES, criteria.RATIOS[:1], seeds, more, workers)


if __name__ == "__main__":
    typer.run(main)
