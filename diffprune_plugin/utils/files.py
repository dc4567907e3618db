"""Files and directories that are written whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from diffprune_plugin.errors import BadInput

# One of them is in all that we write, and in hardly anything else.
OURS = (
    "model_index.json",
    "pruning_plan.json",
    "diffusion_pytorch_model.safetensors",
    "calibration.json",
    "evaluation.json",
    "dense/model_index.json",
)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; renamed to it at the end, removed if anything fails.

    Raises BadInput if the disk is full or the place not writable.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            os.chmod(temporary, 0o666 & ~current_umask())
            sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a directory's lock, which ends with the process; without one where the system has none."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # of a network disk that does not lock
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    with new_file(path) as temporary:
        temporary.write_text(text)


@contextlib.contextmanager
def new_directory(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A directory beside ``path`` to write into; it takes the place of ``path`` in one step at the end.

    Raises BadInput if ``path`` exists and ``overwrite`` is not set, the disk is full or the place not writable.
    """
    path = path.resolve()
    check_absent(path, overwrite)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            yield temporary
            os.chmod(temporary, 0o777 & ~current_umask())
            if overwrite and path.exists():
                exchange(temporary, path)
            else:
                temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def check_absent(path: Path, overwrite: bool = False) -> None:
    """Raises BadInput if there is something at ``path`` that may not be replaced, or the place cannot be written to."""
    here = Path.cwd()
    if path.resolve() in (here, *here.parents):
        raise BadInput(f"output: {str(path)!r} is the working directory or above it; name a directory of its own")
    check_place(path)
    if path.exists() and not overwrite:
        raise BadInput(f"{path} exists; use --overwrite (overwrite=True) or another output")
    if path.exists() and not path.is_dir():
        raise BadInput(f"{path} is a file, not a directory; choose another output")
    if path.exists() and any(path.iterdir()) and not any((path / name).exists() for name in OURS):
        raise BadInput(f"{path} holds other files, which --overwrite would delete; choose another output")


def check_place(path: Path) -> None:
    """Raises BadInput unless a file or directory can be made at ``path``."""
    folder = next((parent for parent in path.absolute().parents if parent.exists()), path.absolute())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise BadInput(f"{path}: {folder} is not a directory that can be written to; choose another output")


def exchange(first: Path, second: Path) -> None:
    """Swap two directories in one step where the system can (Linux), so that ``second`` is never missing."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None, use_errno=True)
        here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        if libc.renameat2(here, os.fsencode(first), here, os.fsencode(second), swap) == 0:
            return
    aside = Path(tempfile.mkdtemp(prefix=f".{second.name}.old.", dir=second.parent))
    second.rename(aside / "old")
    first.rename(second)
    shutil.rmtree(aside)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a place that cannot be written to into one line."""
    try:
        yield
    except OSError as error:
        raise BadInput(
            f"cannot write {path}: {error.strerror or error}; free space or choose another output"
        ) from error


def sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_apart(output: Path, sources: Mapping[str, str | None]) -> None:
    """Raises BadInput if writing the output would replace one of the sources, by config key, that it is made from."""
    place = output.resolve()
    for key, value in sources.items():
        source = Path(value).resolve() if value else None
        if source and (source == place or place in source.parents or source in place.parents):
            raise BadInput(f"output: {output} and {key}: {value} lie inside each other; choose another output")
