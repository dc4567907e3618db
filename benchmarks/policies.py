"""What is accumulated over timesteps, and with which weights: further criteria, compared as in criteria.py.

    python benchmarks/policies.py            # at 25 % of the MACs, three seeds; shares what criteria.py made
    python benchmarks/policies.py --quick    # two seeds, 30 steps

Results are kept in benchmarks/results/policies.json; interrupted, it goes on where it was.
"""

from __future__ import annotations

from typing import Annotated

import typer
from criteria import FULL, FURTHER, PAPER, QUICK, RATIOS, compare


def main(
    quick: Annotated[bool, typer.Option("--quick", help="two seeds, 30 steps")] = False,
    seeds: int = 3,
    workers: Annotated[int, typer.Option(help="processes, of one thread each")] = 2,
) -> None:
    """Print the table, draw the plot and keep both in benchmarks/results."""
    names = (PAPER, "taylor", *FURTHER)
    if quick:
        compare("policies_quick", names, RATIOS[1:], 2, QUICK, workers)
    else:
        compare("policies", names, RATIOS[1:], seeds, FULL, workers)


if __name__ == "__main__":
    typer.run(main)
