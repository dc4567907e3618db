"""What pieces take, kept on disk: an interrupted measurement goes on, another budget measures what is new."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffprune_plugin.errors import BadInput, first_line
from diffprune_plugin.latency.pieces import Piece, Timer, distinct
from diffprune_plugin.utils.files import alone_in, write_text
from diffprune_plugin.utils.progress import progress_bar
from diffprune_plugin.utils.reading import read_json

SECONDS = 10.0  # between two writes


@dataclass
class Table:
    """Times of pieces, by key, in units of the yardstick, for one context: provider, dtype, threads, versions, device.

    ``file`` (JSON; None: none is kept) may hold other contexts too, which stay in it.
    """

    timer: Timer
    context: Mapping[str, Any]
    file: Path | None = None
    progress: bool = True
    times: dict[str, float] = field(default_factory=dict)
    store: bool = True  # whether the file is written

    def __post_init__(self) -> None:
        if self.file is not None and self.file.exists():
            self.times = dict(read_table(self.file).get(self.key, {"pieces": {}})["pieces"])

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(self.context, sort_keys=True).encode()).hexdigest()

    def measure(self, pieces: Iterable[Piece], title: str = "latency of pieces") -> None:
        """Time the pieces that are not in the table yet, each key once."""
        missing = [piece for key, piece in distinct(list(pieces)).items() if key not in self.times]
        if not missing:
            return
        saved = time.monotonic()
        try:
            with progress_bar(self.progress) as bar:
                for piece in bar.track(missing, description=title):
                    self.times[piece.key] = self.timer(piece)
                    if time.monotonic() > saved + SECONDS:
                        self.save()
                        saved = time.monotonic()
        finally:
            self.save()

    def total(self, pieces: Iterable[Piece]) -> float:
        """The sum over pieces, all of which were measured."""
        return sum(self.times[piece.key] for piece in pieces)

    def save(self) -> None:
        """With what other runs have put there meanwhile."""
        if self.file is not None and self.store:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with alone_in(self.file.parent):
                content = read_table(self.file) if self.file.exists() else {}
                times = content.get(self.key, {"pieces": {}})["pieces"] | self.times
                content[self.key] = {"context": dict(self.context), "pieces": times}
                write_text(self.file, json.dumps(content, indent=1) + "\n")


def read_table(file: Path) -> dict[str, Any]:
    """The contexts of a table by their hash; raises BadInput for a file that is none."""
    content = read_json(file, "remove it, or name another table")
    try:
        for of in content.values():
            if not isinstance(of["context"], dict):
                raise TypeError("a context is no mapping")
            for key, value in of["pieces"].items():
                if len(key) != 64 or not 0 <= float(value) < float("inf"):
                    raise ValueError(f"{key}: {value} is no time")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{file}: not a latency table, or damaged: {first_line(error)}; remove it") from None
    return dict(content)
