"""`diffprune prune` as one of several processes, which share the calibration.

accelerate launch -m diffprune_plugin.prune CONFIG     # several processes, GPUs or machines
"""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator

from diffprune_plugin import __main__ as launched
from diffprune_plugin.utils.distributed import check_parallel


def make_accelerator() -> Any:
    """Accelerate as `accelerate launch` wants it.

    Raises ValueError for what this machine cannot do, BadInput for ways that split the model.
    """
    accelerator = Accelerator()
    check_parallel(accelerator)
    return accelerator


def main(arguments: list[str] | None = None) -> None:
    """`diffprune prune` with these options."""
    launched.main("prune", make_accelerator, arguments)


if __name__ == "__main__":
    main()
