"""A command as one of the processes that `accelerate launch` starts: they end together, and the first says why."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from torch import distributed

from diffprune_plugin.cli import app
from diffprune_plugin.errors import BadInput, first_line
from diffprune_plugin.utils.distributed import place
from diffprune_plugin.utils.entry_point import run_app

HEAD_START = 1.0  # seconds


def main(command: str, start: Callable[[], Any], arguments: list[str] | None = None) -> None:
    """Run a command of `diffprune`; every process ends with the same exit code.

    ``start`` joins the processes and returns what the command finds as its context's ``obj``.
    """
    given = sys.argv[1:] if arguments is None else arguments
    try:
        run_app(lambda words: run(words, start), [command, *given], speaks=is_first)
    except SystemExit as end:
        if end.code:  # a launcher stops the others at once; they end by themselves, after the first has spoken
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(0.0 if is_first() else HEAD_START)
        raise
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def run(words: list[str], start: Callable[[], Any]) -> None:
    """The command in this process; typer's own errors and help are written by the first."""
    try:
        state = start()
    except ValueError as error:
        raise BadInput(f"accelerate: {first_line(error)}; see accelerate config") from None
    try:
        app(words, obj=state, standalone_mode=is_first())
    except Exception as error:
        if is_first() or not hasattr(error, "format_message"):
            raise
        raise SystemExit(getattr(error, "exit_code", BadInput.exit_code)) from None


def is_first() -> bool:
    return place()[0] == 0
