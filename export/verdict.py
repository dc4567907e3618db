"""What an export found and the failure that ended it, written down as JSON."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffprune_plugin.errors import BadInput, DiffPruneError
from diffprune_plugin.export.benchmark import Latency
from diffprune_plugin.export.drawing import Images
from diffprune_plugin.export.integrity import still
from diffprune_plugin.export.options import Options
from diffprune_plugin.utils.command_options import asked_by
from diffprune_plugin.utils.files import write_text
from diffprune_plugin.utils.out_of_memory import out_of_memory

PLACES = ("overwrite", "verdict", "markdown", "plot", "report")


@dataclass
class Verdict:
    """The outcome of an export: what each part found, and the failure that ended it.

    ``latency``: what the gates judge, a whole pipeline's where one was exported; ``alone``: one pass of its denoiser;
    ``images``: PyTorch's and ONNX Runtime's.
    """

    content: dict[str, Any]
    latency: Latency | None = None
    alone: Latency | None = None
    images: dict[str, Images] = field(default_factory=dict)


def command(model: Path, output: Path, options: Options) -> str:
    """The command of an export, with what differs from its defaults but for where results go."""
    words = ["diffprune-export", told(output), "--model", told(model)]
    for option in asked_by(Options):
        value = getattr(options, option.field.name)
        if value != option.default and option.field.name not in PLACES:
            words.append(option.flag)
            if isinstance(value, tuple):
                words.append(",".join(map(str, value)))
            elif not isinstance(value, bool):
                words.append(told(value) if isinstance(value, Path) else str(value))
    return shlex.join(words)


@contextlib.contextmanager
def outcome(content: dict[str, Any], paths: list[Path | None]) -> Iterator[None]:
    """Write into a verdict that all of it passed, or the failure, without where these paths lie on this machine."""
    try:
        with memory_errors():
            yield
        content["passed"] = True
        del content["failure"]
    except DiffPruneError as error:
        text = str(error)
        for path in filter(None, paths):
            text = text.replace(str(path), told(path))
        content["failure"] = text
        raise


def told(path: Path) -> str:
    """A path for an artifact that others read: where it lies on this machine is left out."""
    return path.name if path.is_absolute() else str(path)


def write_verdict(path: Path, output: Path, content: dict[str, Any]) -> None:
    """Raises CheckFailed, and writes nothing, where the file is another export's by now."""
    with still(output, content["export"]["files"]):
        write_json(path, content)


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Turn memory that ran out, in whichever library, into one line."""
    try:
        yield
    except DiffPruneError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise BadInput("out of memory; use a smaller --batch, a machine with more, or --no-bench") from error
        raise
