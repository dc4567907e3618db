"""How a command ends: one line and an exit code for every error made for the user."""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from diffprune_plugin.errors import BadInput, CheckFailed, DiffPruneError, Interrupted, one_line
from diffprune_plugin.utils.interrupts import MESSAGE, Interrupts

# Packages that may end the program: after their own line, done, or since nobody reads what they print (rich).
ENDS = ("typer", "click", "diffprune_plugin", "rich")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
SHORT = "out of memory; use a smaller batch_size"


def run_app(
    application: Callable[[list[str]], Any],
    arguments: list[str] | None = None,
    speaks: Callable[[], bool] = lambda: True,
) -> None:
    """Run a typer application with the exit codes 0 done, 1 a check failed, 2 bad input, 3 hardware not proved, 130
    interrupted.

    ``speaks``: whether the line of a DiffPruneError is written, asked when there is one; another process may write it.
    """
    given = sys.argv[1:] if arguments is None else arguments
    debug, words = "--debug" in given, [word for word in given if word != "--debug"]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what an encoding cannot say ends no command
    with Interrupts() as interrupts:
        try:
            with whole_output(), nobody_else_ends():
                application(words)
            return
        except BaseException as error:
            interrupts.over = True
            message, code = outcome(error, interrupts.asked)
            if code is None:
                raise
            if debug:
                traceback.print_exception(error)
            if speaks() or message == SHORT:  # the first process may have memory enough
                with contextlib.suppress(OSError, AttributeError):  # nobody may be there to read it (2>&-)
                    sys.stderr.write(f"error: {one_line(message)}\n")
        if interrupts.asked:
            gc.collect()  # what still holds on to the work is torn down in silence
    raise SystemExit(code)


def outcome(error: BaseException, interrupted: bool) -> tuple[str, int | None]:
    """The line and the exit code of an error; no code for what is no error made for the user."""
    if isinstance(error, SystemExit) and not error.code:
        return "", None
    if interrupted or isinstance(error, KeyboardInterrupt):  # whatever else the interrupt has led to
        return MESSAGE, Interrupted.exit_code
    if isinstance(error, (DiffPruneError, Interrupted)):
        return str(error), error.exit_code
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}; choose another path", BadInput.exit_code
    if isinstance(error, OSError) and error.errno in FULL:
        return f"cannot write the output: {error.strerror}; free space, or send it elsewhere", BadInput.exit_code
    if isinstance(error, Exception) and memory_ran_out(error):
        return SHORT, BadInput.exit_code
    return "", None


def memory_ran_out(error: Exception) -> bool:
    from diffprune_plugin.utils.out_of_memory import out_of_memory

    return out_of_memory(error)


@contextlib.contextmanager
def nobody_else_ends() -> Iterator[None]:
    """A plugin or library that ends the program has failed, whatever exit code it gives: raises CheckFailed."""
    try:
        yield
    except SystemExit as end:
        *_, (frame, _) = traceback.walk_tb(end.__traceback__)
        spec, name = frame.f_globals.get("__spec__"), frame.f_globals.get("__name__")
        where = str(spec.name if spec else name)
        if where.partition(".")[0] in ENDS:
            raise
        raise CheckFailed(
            f"{where} ended the program, by sys.exit({end.code!r}), before its work was done; mend it or do without it"
        ) from end


@contextlib.contextmanager
def whole_output() -> Iterator[None]:
    """What was printed has arrived in the end; raises OSError where standard output cannot be written to."""
    try:
        yield
    except SystemExit as end:
        if not end.code:
            flush_output()
        raise
    except OSError:
        with contextlib.suppress(OSError):
            flush_output()
        raise
    flush_output()


def flush_output() -> None:
    """Raises OSError where it cannot be written; then it is dropped, or Python would try again at the very end."""
    try:
        if sys.stdout is not None:  # as with >&-
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise
