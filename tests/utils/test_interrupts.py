"""Ctrl-C ends a command with 130 and one line, wherever it comes in."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from diffprune_plugin.utils import interrupts
from diffprune_plugin.utils.entry_point import run_app
from diffprune_plugin.utils.interrupts import MESSAGE


def press(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGINT)


class Dying:
    def __del__(self) -> None:
        press()


def in_del() -> None:
    Dying()


def in_a_callback() -> None:
    held = {0}
    kept = weakref.ref(held, press)  # noqa: F841
    del held


def caught() -> None:
    with contextlib.suppress(BaseException):
        press()


def turned_into_another() -> None:
    try:
        press()
    finally:
        raise RuntimeError("a worker has died")


def plain() -> None:
    press()


def twice() -> None:
    try:
        press()
    finally:
        press()


def ended(trouble: Callable[[], None], capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    """Exit code and standard error of a command that meets the trouble, and would go on for long."""

    def work(_: list[str]) -> None:
        trouble()
        for _ in range(1000):
            time.sleep(0.01)

    before = signal.getsignal(signal.SIGINT), sys.unraisablehook
    with pytest.raises(SystemExit) as end:
        run_app(work, [])
    assert (signal.getsignal(signal.SIGINT), sys.unraisablehook) == before
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize("trouble", [plain, in_del, in_a_callback, caught, turned_into_another, twice])
def test_an_interrupt_that_something_swallows_is_raised_again(trouble, capsys) -> None:
    assert ended(trouble, capsys) == (130, f"error: {MESSAGE}\n")


def test_a_second_one_ends_the_program_at_once(capsys, monkeypatch) -> None:
    class Ended(BaseException):
        pass

    def end(code: int) -> None:
        assert code == 130
        raise Ended

    monkeypatch.setattr(interrupts, "AGAIN", -1.0)
    monkeypatch.setattr(os, "_exit", end)
    seen = []

    def stubborn() -> None:
        try:
            press()
        finally:
            with contextlib.suppress(Ended):
                press()
                seen.append("went on")
            seen.append("ended")

    ended(stubborn, capsys)
    assert seen == ["ended"]


def test_a_forked_process_leaves_the_interrupt_to_the_one_it_works_for(capsys) -> None:
    def work(_: list[str]) -> None:
        child = os.fork()
        if not child:
            press()
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7

    run_app(work, [])
    assert capsys.readouterr().err == ""


def test_what_an_interrupt_leaves_half_made_prints_nothing(capsys, monkeypatch) -> None:
    class Half:
        def __del__(self) -> None:
            raise AttributeError("no attribute '_free_weak_ref'")

    def work(_: list[str]) -> None:
        Half()
        kept = Half()
        press()
        del kept

    said: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    with pytest.raises(SystemExit):
        run_app(work, [])
    assert len(said) == 1, "the one before the interrupt"
