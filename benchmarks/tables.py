"""The README's tables, one after the other: recover.py, criteria.py, reference.py, latency.py.

    python benchmarks/tables.py            # make bench
    python benchmarks/tables.py --quick    # make bench-quick: fewer seeds, steps and images

One program, because to import what they need takes each of its processes ten seconds. Results are kept; interrupted, it
goes on where it was.
"""

from __future__ import annotations

from typing import Annotated

import criteria
import latency
import recover
import reference
import typer


def main(quick: Annotated[bool, typer.Option("--quick", help="fewer seeds, steps and images")] = False) -> None:
    """Run each with its defaults; the exit code is that of latency.py."""
    for script in (recover, criteria, reference):
        script.main(quick=quick)
    latency.main(quick=quick)


if __name__ == "__main__":
    typer.run(main)
