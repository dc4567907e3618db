"""`diffprune prune` as one of several processes, which share the calibration.

accelerate launch -m diffprune_plugin.prune CONFIG     # several processes, GPUs or machines
"""

from __future__ import annotations

import signal
import sys
import time
from typing import Any

from accelerate import Accelerator
from torch import distributed

from diffprune_plugin.cli import app
from diffprune_plugin.errors import BadInput, first_line
from diffprune_plugin.processes import check_parallel, place
from diffprune_plugin.program import run_app

HEAD_START = 1.0  # seconds


def main(arguments: list[str] | None = None) -> None:
    """`diffprune prune` with these options; every process ends with the same exit code, and the first says why."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        run_app(run, ["prune", *given], speaks=is_first)
    except SystemExit as end:
        if end.code:  # a launcher stops the others at once; they end by themselves, after the first has spoken
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(0.0 if is_first() else HEAD_START)
        raise
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def run(words: list[str]) -> None:
    """The command in this process; typer's own errors and help are written by the first."""
    accelerator = make_accelerator()
    try:
        app(words, obj=accelerator, standalone_mode=is_first())
    except Exception as error:
        if is_first() or not hasattr(error, "format_message"):
            raise
        raise SystemExit(getattr(error, "exit_code", BadInput.exit_code)) from None


def is_first() -> bool:
    return place()[0] == 0


def make_accelerator() -> Any:
    """Accelerate as `accelerate launch` wants it.

    Raises BadInput for what this machine or process cannot do.
    """
    try:
        accelerator = Accelerator()
    except ValueError as error:
        raise BadInput(f"accelerate: {first_line(error)}; see accelerate config") from None
    check_parallel(accelerator)
    return accelerator


if __name__ == "__main__":
    main()
