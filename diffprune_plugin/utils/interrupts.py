"""Ctrl-C, which ends a command however it is busy: an interrupt that something swallows is raised again."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import Any

from diffprune_plugin.errors import Interrupted

MESSAGE = "interrupted; prune and finetune go on from their last checkpoint, if any, with the same command"
AGAIN = 1.0  # seconds after which a Ctrl-C is a second one; a terminal and a launcher may send the first one twice
PAUSE = 0.05  # seconds until a swallowed interrupt is raised again: whatever swallowed it has to return first


class Raised(Interrupted):
    """An interrupt on its way up.

    Python prints and drops what is raised in ``__del__`` or in a weak reference's callback, and libraries catch
    everything now and then: then it is freed before it has arrived.
    """

    def __init__(self, interrupts: Interrupts) -> None:
        super().__init__(MESSAGE)
        self.interrupts = interrupts

    def __del__(self) -> None:
        if not self.interrupts.over:
            threading.Timer(PAUSE, self.interrupts.repeat).start()


class Interrupts:
    """While it is entered, Ctrl-C raises Interrupted in the main thread; a second one ends the program at once.

    ``asked``: whether there was one; from then on no library prints what it fails to tear down. ``over``: the work has
    ended, and what it leaves is being torn down.
    """

    def __init__(self) -> None:
        self.process, self.pressed = os.getpid(), 0.0
        self.asked = self.over = self.repeated = False
        self.before: Any = None

    def __enter__(self) -> Interrupts:
        self.before = signal.signal(signal.SIGINT, self.handle), sys.unraisablehook
        sys.unraisablehook = self.unraisable
        return self

    def __exit__(self, *_: object) -> None:
        handler, sys.unraisablehook = self.before
        signal.signal(signal.SIGINT, handler)

    def handle(self, *_: object) -> None:
        if os.getpid() != self.process:  # forked: it ends with the process that it works for
            return
        if self.repeated and not self.over:
            self.repeated = False
        elif not self.asked and not self.over:
            self.asked, self.pressed = True, time.monotonic()
        elif time.monotonic() - self.pressed > AGAIN:
            os._exit(Interrupted.exit_code)
        else:
            return
        raise Raised(self)

    def repeat(self) -> None:
        """Send the signal again, from another thread."""
        if not self.over:
            self.repeated = True
            os.kill(self.process, signal.SIGINT)

    def unraisable(self, swallowed: Any) -> None:
        if not self.asked:
            self.before[1](swallowed)
