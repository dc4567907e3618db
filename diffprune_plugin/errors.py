"""Every error a user can meet, and the exit code it ends the program with."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

LONGEST, LINE = 200, 2000  # characters of a value in an error's line, and of the line
VALUE = re.compile(r"""(?<!\w)'[^']*'|(?<!\w)"[^"]*"|[^\s'"]+""")


class DiffPruneError(Exception):
    """Base of all errors raised on purpose: the message gives the value, the place and the remedy."""

    exit_code = 1


class CheckFailed(DiffPruneError):
    """A check or gate did not hold (exit code 1)."""


class BadInput(DiffPruneError):
    """What the user gave cannot be used (exit code 2); ``key``, ``value``, ``reason``: of one wrong value, if known."""

    exit_code = 2

    def __init__(self, message: str, *, key: str = "", value: object = None, reason: str = "") -> None:
        super().__init__(message)
        self.key, self.value, self.reason = key, value, reason

    @classmethod
    def of(cls, key: str, value: object, reason: str) -> BadInput:
        """The error of one wrong value: ``key: value reason``."""
        return cls(f"{key}: {value!r} {reason}", key=key, value=value, reason=reason)


class MissingExtra(BadInput):
    """A command needs an optional dependency that is not installed (exit code 2)."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; run: pip install 'diffprune-plugin[{extra}]'")


class MissingGradients(BadInput):
    """A gradient-based criterion was asked for a score before calibration (exit code 2)."""


class Interrupted(BaseException):
    """The user pressed Ctrl-C (exit code 130, as shells have it); no ``except Exception`` may swallow it."""

    exit_code = 130


class HardwareUnproved(DiffPruneError):
    """The execution provider asked for cannot be proved to have run (exit code 3)."""

    exit_code = 3


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest of the known names (of those with this word, if any), or nothing."""
    known = list(known)
    whole = [each for each in known if name in each.split("_")]
    close = difflib.get_close_matches(name, whole, n=1, cutoff=0) or difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def first_line(error: BaseException) -> str:
    """Another library's error in one line, cut to what fits."""
    return " ".join(str(error).split())[:LONGEST]


def one_line(message: str) -> str:
    """A message as one line of what can be printed; values in it (quoted, or without a space) are cut to LONGEST."""
    printable = "".join(letter if letter.isprintable() else " " for letter in message)
    line = VALUE.sub(lambda found: cut(found[0], LONGEST), printable)
    return line if len(line) <= LINE else f"{cut(line, LINE - LONGEST)} {line[-LONGEST:]}"  # the remedy is at its end


def cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."
