"""The benchmarks: one command with a suite for each claim.

    python benchmarks/bench.py --help
    python benchmarks/bench.py criteria --quick
    python benchmarks/bench.py readme            # make bench: recover, criteria, reference, latency, consistency

One program runs several suites, because to import what they need takes each of its processes ten seconds. Results are
kept in benchmarks/results; interrupted, a suite goes on where it was.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).parent))  # for the processes of a pool too

from quality import (
    allocation,
    at_latency,
    calibration,
    compensate,
    consistency,
    criteria,
    finetuned,
    floor,
    onnx_pruned,
    path,
    recover,
    reference,
    regressions,
    rivals,
    seconds,
    sensitivity,
    terrain,
    thresholds,
    transformers,
)
from shared.results import Seeds, Workers
from shared.subject import EMOJI, SUBJECTS, TRANSFORMERS
from size import export_sd15, gpu, latency, pipeline_sd15, scale, targets, variants, widths

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
Quick = Annotated[bool, typer.Option("--quick", help="fewer seeds, steps and images")]
LARGE_BATCH = ("random", "magnitude", "taylor", criteria.PAPER, criteria.SCRATCH)

for module in (
    recover,
    criteria,
    reference,
    allocation,
    sensitivity,
    at_latency,
    finetuned,
    floor,
    path,
    consistency,
    calibration,
    compensate,
    regressions,
    thresholds,
    rivals,
    seconds,
    terrain,
    transformers,
    onnx_pruned,
    latency,
    targets,
    scale,
    export_sd15,
    pipeline_sd15,
    gpu,
    widths,
    variants,
):
    app.command(module.__name__.rpartition(".")[2].replace("_", "-"), help=(module.__doc__ or "").split("\n\n")[0])(
        module.main
    )


@app.command()
def policies(quick: Quick = False, seeds: Seeds = 3, workers: Workers = 2) -> None:
    """What is accumulated over timesteps, and with which weights: further criteria, at 25 % of the MACs."""
    names = (criteria.PAPER, "taylor", *criteria.FURTHER)
    title, seeds, budget = ("policies_quick", 2, criteria.QUICK) if quick else ("policies", seeds, criteria.FULL)
    criteria.compare(title, names, criteria.RATIOS[1:], seeds, budget, workers)


@app.command()
def batches(quick: Quick = False, seeds: Seeds = 3, workers: Workers = 2) -> None:
    """More images a step than `make bench` has time for: criteria at half the MACs with 16, recover with 32.

    Half an hour on two cores, on slow ones more than one.
    """
    end, seeds, steps = ("_quick", 2, 8) if quick else ("", seeds, criteria.FULL.steps)
    budget, scale_ = criteria.QUICK if quick else criteria.FULL, recover.QUICK if quick else recover.FULL
    recover.recover(f"recover_batch_32{end}", 2, replace(scale_, batch_size=32, steps=steps), workers)
    more = replace(budget, batch_size=16, steps=steps)
    criteria.compare(f"criteria_batch_16{end}", LARGE_BATCH, criteria.RATIOS[:1], seeds, more, workers)


@app.command()
def readme(quick: Quick = False) -> None:
    """The tables that the README and docs/figures.md are about; the exit code is that of latency."""
    for suite in (recover, criteria, reference):
        suite.main(quick=quick)
    if not quick and EMOJI.facts.exists():
        consistency.main(EMOJI.name)
    elif not quick:
        print("consistency in colour: left as it is, since its model is not here; make models trains it")
    latency.main(quick=quick)


@app.command()
def more() -> None:
    """The further tables of docs/figures.md."""
    allocation.main()
    policies()
    batches()
    calibration.main()
    compensate.main()
    regressions.main()
    for model in ("digits", "emoji"):
        thresholds.main(model)
        rivals.main(model)
        sensitivity.main(model)
    for model in SUBJECTS:
        consistency.main(model)
    for model in TRANSFORMERS:
        transformers.main(model)
        transformers.main(model, ways=transformers.SHORT, steps=200)
        sensitivity.main(model)
    for model in ("digits", "emoji"):
        floor.main(model)
    terrain.main()
    onnx_pruned.main()


@app.command()
def sizes() -> None:
    """Real sizes with random weights: Stable Diffusion and others."""
    scale.main()
    export_sd15.main()
    pipeline_sd15.main()


if __name__ == "__main__":
    app()
