"""Writes nncf.json beside it: what NNCF 2.14.1, the last kind that had filter pruning, does with the values below.

Run in an environment of its own, since this project uses NNCF 3:

    python -m venv old && old/bin/pip install nncf==2.14.1 torch==2.13.0 diffusers==0.42.1
    old/bin/python tests/golden/make_nncf.py
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nncf.common.pruning.schedulers import PRUNING_SCHEDULERS

warnings.simplefilter("ignore")  # SciPy's, where the solver of exponential_with_bias gives up

SCHEDULES = [  # schedule, pruning_init, pruning_target, pruning_steps, num_init_steps
    *(("baseline", *values) for values in ((0.0, 0.5, 1, 0), (0.3, 0.3, 100, 0), (0.1, 0.6, 5, 2))),
    *(
        ("exponential", *values)
        for values in ((0.0, 0.5, 100, 0), (0.1, 0.6, 5, 0), (0.1, 0.6, 5, 2), (0.2, 0.4, 1, 0))
    ),
    *(("exponential_with_bias", *values) for values in ((0.1, 0.6, 5, 0), (0.1, 0.6, 5, 2), (0.3, 0.5, 10, 0))),
    *(("exponential_with_bias", *values) for values in ((0.0, 0.5, 20, 0), (0.0, 0.5, 50, 0), (0.0, 0.5, 100, 0))),
]


def schedule(name: str, init: float, target: float, steps: int, warmup: int) -> dict[str, Any]:
    """The level that the real scheduler sets at each epoch."""
    levels: list[float] = []
    controller = SimpleNamespace(
        pruning_init=init, prune_flops=False, set_pruning_level=levels.append, freeze=lambda: None
    )
    params = {"pruning_target": target, "pruning_steps": steps, "num_init_steps": warmup}
    scheduler = PRUNING_SCHEDULERS.get(name)(controller, params)
    for _ in range(warmup + steps + 2):
        scheduler.epoch_step()
    return {"schedule": name, "pruning_init": init, **params, "levels": [float(level) for level in levels]}


def main() -> None:
    golden = {"schedules": [schedule(*case) for case in SCHEDULES]}
    (Path(__file__).parent / "nncf.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
