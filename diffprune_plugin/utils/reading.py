"""Text that somebody else wrote, read without trust: regular files, UTF-8, of a bounded size and depth."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from diffprune_plugin.errors import BadInput

MOST_BYTES = 2**26
DEEPEST = 100  # levels of a value: what walks it later has Python's thousand calls
MOST_DIGITS = 100  # of a whole number; Python itself refuses to print one of 4300
OTHER_ENCODINGS = {b"\xff\xfe": "is UTF-16", b"\xfe\xff": "is UTF-16", b"\x00\x00\xfe\xff": "is UTF-32"}
NO_FILES: dict[str, Callable[[int], bool]] = {
    "a directory": stat.S_ISDIR,
    "a pipe": stat.S_ISFIFO,
    "a device": stat.S_ISCHR,
    "a disk": stat.S_ISBLK,
    "a socket": stat.S_ISSOCK,
}


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """The text of a file of at most ``most`` bytes, in UTF-8 with or without a byte-order mark.

    Raises BadInput for anything else; a pipe or device, which might never end, is not even opened.
    """
    try:
        data = regular_bytes(path, most)
        if b"\0" in data:
            signs = (reason for start, reason in OTHER_ENCODINGS.items() if data.startswith(start))
            raise ValueError(f"{next(signs, 'holds NUL bytes, as UTF-16 does')}; save it as UTF-8")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        reason = f"byte {error.start} is not UTF-8; save it as UTF-8"
    except OSError as error:
        reason = error.strerror or str(error)
    except ValueError as error:
        reason = str(error)
    raise BadInput(f"{path}: cannot be read: {reason}")


def check_regular(path: Path) -> None:
    """Raises OSError, or ValueError for what is no regular file: a pipe or device might never end."""
    mode = os.stat(path).st_mode
    for kind, fits in NO_FILES.items():
        if fits(mode):
            raise ValueError(f"is {kind}, not a file")


def regular_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """What a file holds; raises OSError, or ValueError for what is no regular file or larger than ``most`` bytes."""
    check_regular(path)
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"has more than {most:,} bytes; is it the right file?")
    return data


def read_json(path: Path, remedy: str = "") -> Any:
    """The value in a JSON file; raises BadInput, with the remedy, for a file that holds none, or one nested more than
    100 deep."""
    try:
        return parse_json(read_text(path), str(path))
    except BadInput as error:
        raise BadInput(f"{error}; {remedy}" if remedy else str(error)) from None


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text; raises BadInput, with the place that it came from, as `read_json` does."""
    try:
        value = json.loads(text)
        for leaf in leaves_and_keys(value):
            check_plain(leaf)
    except RecursionError:
        reason = "nested too deeply"
    except ValueError as error:
        reason = str(error)
    else:
        return value
    raise BadInput(f"{where}: not valid json: {reason}")


def leaves_and_keys(value: Any, deepest: int = DEEPEST) -> Iterator[Any]:
    """What is no list and no mapping in a value, with the keys; raises RecursionError where it is nested deeper."""
    if not isinstance(value, (dict, list)):
        yield value
        return
    if not deepest:
        raise RecursionError
    for inner in (*value, *value.values()) if isinstance(value, dict) else value:
        yield from leaves_and_keys(inner, deepest - 1)


def check_plain(leaf: Any) -> None:
    """Raises ValueError for what JSON does not have, or what has it but cannot be written down again."""
    if not (leaf is None or isinstance(leaf, (str, int, float))):
        raise ValueError(f"{leaf} is a {type(leaf).__name__}; put it in quotes")
    if isinstance(leaf, int) and abs(leaf) >= 10**MOST_DIGITS:
        raise ValueError(f"a number has more than {MOST_DIGITS} digits; write it shorter")
    if isinstance(leaf, str) and any("\ud800" <= letter <= "\udfff" for letter in leaf):
        raise ValueError(f"{leaf!r} holds half a surrogate pair, which is no text")
