"""How a command ends: one line and an exit code for every error made for the user."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

from diffprune_plugin.errors import DiffPruneError, Interrupted


def run_app(
    application: Callable[[list[str]], Any],
    arguments: list[str] | None = None,
    speaks: Callable[[], bool] = lambda: True,
) -> None:
    """Run a typer application with the exit codes 0 done, 1 a check failed, 2 bad input, 3 hardware not proved.

    ``speaks``: whether the line of a DiffPruneError is written, asked when there is one; another process may write it.
    """
    given = sys.argv[1:] if arguments is None else arguments
    debug, words = "--debug" in given, [word for word in given if word != "--debug"]
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        application(words)
    except (DiffPruneError, Interrupted) as error:
        finish(error, str(error), error.exit_code, debug, speaks())
    except OSError as error:
        if error.filename is None:
            raise
        finish(error, f"{error.filename}: {error.strerror}; choose another path", 2, debug, speaks())
    except Exception as error:
        from diffprune_plugin.utils.memory import out_of_memory

        if not out_of_memory(error):
            raise
        finish(error, "out of memory; use a smaller batch_size", 2, debug, True)  # the first process may have enough
    finally:
        signal.signal(signal.SIGINT, before)


def interrupt(*_: object) -> None:
    raise Interrupted("interrupted; prune and finetune go on from their last checkpoint, if any, with the same command")


def finish(error: BaseException, message: Any, code: int, debug: bool, speaks: bool) -> None:
    if debug:
        traceback.print_exception(error)
    if speaks:
        sys.stderr.write(f"error: {message}\n")
    raise SystemExit(code)
