"""How long `diffprune prune` takes to meet a stated budget, the whole process, nothing kept from an earlier one.

    python benchmarks/bench.py seconds                 # twenty minutes of an otherwise idle machine
    python benchmarks/bench.py seconds --rounds 1 --budgets 0.46      # five

Calibration, sensitivity, allocation, plan, removal, compensation and the directory, of the embedded model: by one ratio
and by both allocations, in one process and shared out over two, one after the other in each round. Wall and CPU seconds
go with their machine: a time says little without the row of one ratio beside it.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from shared.results import publish, some_shares, table

from diffprune_plugin import demo
from diffprune_plugin.pruning.directory import read_plan
from diffprune_plugin.utils.hashes import json_hash

ALLOCATIONS = ("uniform", "linear", "measured")
PROCESSES = (1, 2)
LAUNCH = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--mixed_precision", "no", "-m"]
Run = tuple[float, float, str]  # wall seconds, CPU seconds, hash of which units go (sums differ in their last bits)


def timed(allocation: str, budget: float, processes: int) -> Run:
    """One prune in new processes and an empty directory."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "pruned"
        asked = {"model": str(demo.MODEL), "data": str(demo.CALIBRATION_IMAGES), "output": str(output)}
        file = Path(folder) / "config.json"
        file.write_text(
            json.dumps(asked | {"macs_target": budget, "allocation": allocation, "importance": "output_error"})
        )
        launch = LAUNCH if processes > 1 else []
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", *launch, "diffprune_plugin", "prune", str(file)],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": str((os.cpu_count() or 1) // processes or 1)},
        )
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        return (
            wall,
            after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
            json_hash(read_plan(output).removed_units()),
        )


def span(values: list[float]) -> str:
    """The least and the most of the rounds."""
    ends = [f"{end:.0f}" for end in (min(values), max(values))]
    return " to ".join(dict.fromkeys(ends)) + " s"


def main(
    rounds: Annotated[int, typer.Option(min=1, help="each of them runs every row once")] = 2,
    budgets: Annotated[str, typer.Option(**some_shares("of the MACs"))] = "0.46,0.25",
) -> None:
    """Time every row in turn, then print the table; ends with an error where two processes take other channels."""
    rows = list(itertools.product(map(float, budgets.split(",")), ALLOCATIONS, PROCESSES))
    runs: dict[tuple[float, str, int], list[Run]] = {row: [] for row in rows}
    for _, row in itertools.product(range(rounds), rows):
        budget, allocation, processes = row
        runs[row].append(timed(allocation, budget, processes))
        print(f"{budget:.0%}, {allocation}, processes {processes}: {runs[row][-1][0]:.0f} s", file=sys.stderr)
    cells = [
        [f"{budget:.0%}", allocation, str(count), span([run[0] for run in found]), span([run[1] for run in found])]
        for (budget, allocation, count), found in runs.items()
    ]
    told = "one run" if rounds == 1 else f"the least and the most of {rounds} runs"
    intro = (
        f"Whole runs of `diffprune prune`, output_error, compensated; {told} of each row, interleaved; "
        f"{os.cpu_count()} processors, whose threads the processes share."
    )
    publish("seconds", [intro, "", *table(["budget", "allocation", "processes", "wall", "CPU"], cells)])
    for budget, allocation in itertools.product(sorted({row[0] for row in rows}), ALLOCATIONS):
        plans = {plan for count in PROCESSES for *_, plan in runs[budget, allocation, count]}
        if len(plans) > 1:
            raise SystemExit(f"error: {allocation} at {budget:.0%}: one config took {len(plans)} choices of channels")
