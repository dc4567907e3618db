"""`python -m diffprune_plugin`: the command `diffprune`, alone or as one of the processes of `accelerate launch`.

accelerate launch -m diffprune_plugin prune CONFIG        # several processes, GPUs or machines
accelerate launch -m diffprune_plugin finetune CONFIG
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from diffprune_plugin.cli import app
from diffprune_plugin.cli import main as alone
from diffprune_plugin.errors import BadInput, first_line
from diffprune_plugin.utils.entry_point import run_app

HEAD_START = 1.0  # seconds
PATIENCE = timedelta(hours=3)  # of processes that wait for the first: NCCL's own ten minutes are less than a timing
LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "WORLD_SIZE")  # what `accelerate launch` tells its processes


def make_accelerator() -> Any:
    """Accelerate as `accelerate launch` wants it, joined by all processes.

    Raises ValueError for what this machine cannot do, BadInput for ways that split the model.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs

    from diffprune_plugin.utils.distributed import check_parallel

    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])
    check_parallel(accelerator)
    return accelerator


def join_processes() -> Any:
    """Joins the processes; `finetune` makes an accelerator of its own, from its config."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    return PartialState(parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PATIENCE)


# What joins the processes of a command, and returns what it finds as its context's ``obj``; others run in one process.
STARTS: dict[str, Callable[[], Any]] = {"prune": make_accelerator, "finetune": join_processes}


def main(arguments: list[str] | None = None) -> None:
    """Run the command ``diffprune``; under `accelerate launch` every process ends with the same exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    command = next((word for word in given if not word.startswith("-")), "")
    if command in STARTS and any(name in os.environ for name in LAUNCHED):
        shared(command, given)
    else:
        alone(given)


def shared(command: str, given: list[str]) -> None:
    """Run a command as one of several processes."""
    from torch import distributed

    from diffprune_plugin.utils.distributed import Processes

    processes = Processes()
    try:
        run_app(lambda words: run(words, STARTS[command]), given, speaks=lambda: processes.is_first)
    except SystemExit as end:
        if end.code:  # a launcher stops the others at once; they end by themselves, after the first has spoken
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(0.0 if processes.is_first else HEAD_START)
        raise
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def run(words: list[str], start: Callable[[], Any]) -> None:
    """The command in this process; typer's own errors and help are written by the first."""
    from diffprune_plugin.utils.distributed import Processes

    try:
        state = start()
    except ValueError as error:
        raise BadInput(f"accelerate: {first_line(error)}; see accelerate config") from None
    first = Processes().is_first
    try:
        app(words, obj=state, standalone_mode=first)
    except Exception as error:
        if first or not hasattr(error, "format_message"):
            raise
        raise SystemExit(getattr(error, "exit_code", BadInput.exit_code)) from None


def renamed(command: str) -> None:
    """`accelerate launch -m diffprune_plugin.COMMAND`, as it was spelled before: says so, once, and goes on."""
    if os.environ.get("RANK", "0") == "0":
        new = f"accelerate launch -m diffprune_plugin {command}"
        sys.stderr.write(f"diffprune_plugin.{command} is now spelled: {new}\n")
    shared(command, [command, *sys.argv[1:]])


if __name__ == "__main__":
    main()
