"""Files and directories that are written whole or not at all, and what may be replaced."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffprune_plugin.errors import BadInput, first_line
from diffprune_plugin.utils.reading import read_json

LIST_FILE = "diffprune.files.json"  # in each directory of ours: what it is, and its files with their hashes
ENDING = ".diffprune"  # of what is being written: .NAME.xxxxxxxx.diffprune


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; renamed to it at the end, removed if anything fails.

    Raises BadInput if the disk is full or the place not writable.
    """
    with disk_errors(path), scratch(path) as temporary:
        temporary.touch()
        yield temporary
        os.chmod(temporary, 0o666 & ~current_umask())
        sync(temporary)
        temporary.replace(path)


def write_text(path: Path, text: str) -> None:
    with new_file(path) as temporary:
        temporary.write_text(text)


@contextlib.contextmanager
def new_directory(path: Path, overwrite: bool = False, kind: str = "directory") -> Iterator[Path]:
    """A directory beside ``path`` to write into; it takes the place of ``path`` in one step at the end.

    ``kind``: what it is, in a word or two; it replaces only its like. Raises BadInput if ``path`` exists and may not be
    replaced (`check_absent`), the disk is full or the place not writable.
    """
    path = resolved(path)
    check_absent(path, overwrite, kind)
    with disk_errors(path), scratch(path) as temporary:
        temporary.mkdir()
        yield temporary
        write_list(temporary, kind)
        os.chmod(temporary, 0o777 & ~current_umask())
        if overwrite and path.exists():
            exchange(temporary, path)
        else:
            temporary.rename(path)


@contextlib.contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """Where to make ``path``, in a directory beside it that is gone at the end; what killed processes left goes first.

    The directory is locked for as long as its process lives, so that another can tell. The path lies one level below,
    whose own lock is free for ``alone_in``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path)
    while True:
        folder = tempfile.mkdtemp(prefix=f".{path.name}.", suffix=ENDING, dir=path.parent)
        handle = os.open(folder, os.O_RDONLY)
        lock(handle, wait=True)
        if os.path.exists(folder):  # nobody swept it between its making and the lock
            break
        os.close(handle)
    try:
        inner = Path(folder, "new")
        inner.mkdir()
        yield inner / path.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a directory's lock, which ends with the process; without one where the system has none."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        lock(handle, wait=True)
        yield
    finally:
        os.close(handle)


def sweep(path: Path) -> None:
    """Remove what killed processes left beside ``path`` when they wrote it."""
    left = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}{re.escape(ENDING)}")
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    for place in [each for each in beside if left.fullmatch(each.name)]:
        with contextlib.suppress(OSError):
            handle = os.open(place, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                if lock(handle, wait=False):
                    shutil.rmtree(place, ignore_errors=True)
            finally:
                os.close(handle)


def lock(handle: int, *, wait: bool) -> bool:
    """Lock an open directory until it is closed; False if another process has, and ``wait`` is not set."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return wait  # a file system without locks: nothing can be swept there
    return True


def write_list(directory: Path, kind: str) -> None:
    """Write down what a directory is and which files it has, so that later only they are replaced."""
    files = {
        str(file.relative_to(directory).as_posix()): sha256(file)
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file != directory / LIST_FILE
    }
    text = json.dumps({"format": 1, "kind": kind, "files": files}, indent=1) + "\n"
    (directory / LIST_FILE).write_text(text)
    sync(directory / LIST_FILE)


def renew_listed(directory: Path, name: str) -> None:
    """Write the hash of one file that was renewed into a directory's list; nothing where it has none."""
    kind, files = read_list(directory)
    if files is None:
        return
    files[name] = sha256(directory / name)
    text = json.dumps({"format": 1, "kind": kind, "files": dict(sorted(files.items()))}, indent=1) + "\n"
    write_text(directory / LIST_FILE, text)


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_absent(path: Path, overwrite: bool = False, kind: str = "directory") -> None:
    """Raises BadInput if there is something at ``path`` that may not be replaced, or the place cannot be written to.

    With ``overwrite`` a directory of this kind that we wrote may be, as long as it is what we wrote.
    """
    here = Path.cwd()
    if resolved(path) in (here, *here.parents):
        raise BadInput(f"output: {str(path)!r} is the working directory or above it; name a directory of its own")
    check_place(path)
    if path.exists() and not overwrite:
        raise BadInput(f"{path} exists; use --overwrite (overwrite=True) or another output")
    if path.exists() and not path.is_dir():
        raise BadInput(f"{path} is a file, not a directory; choose another output")
    if path.exists() and any(path.iterdir()):
        check_ours(path, kind)


def resolved(path: Path) -> Path:
    """The path without links; raises BadInput for one that cannot be, as with links that go round in circles."""
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise BadInput(f"{str(path)!r} is no path that can be used: {first_line(error)}") from None


def check_ours(path: Path, kind: str) -> None:
    """Raises BadInput, naming a file, unless a directory is of this kind and holds what we wrote and nothing else."""
    stated, files = read_list(path)
    if files is None:
        raise BadInput(
            f"{path} holds other files ({next(path.iterdir()).name} ...): it has no {LIST_FILE}, so diffprune did not "
            "write it; move it away or choose another output"
        )
    if stated != kind:
        raise BadInput(f"{path} holds a {stated}, which a {kind} does not replace; choose another output")
    known = {path / LIST_FILE, *(path / name for name in files)}
    known |= {folder for file in known for folder in file.parents}
    for found in sorted(path.rglob("*")):
        if found not in known or found.is_symlink():
            stray = found.relative_to(path)
            raise BadInput(f"{path} holds other files: {stray}; move that away or choose another output")
    for name, digest in files.items():
        if (path / name).is_file() and sha256(path / name) != digest:
            raise BadInput(f"{path / name} was changed since diffprune wrote it; move it away or choose another output")


def check_unchanged(path: Path, except_for: Sequence[str] = ()) -> None:
    """Raises BadInput, naming a file, unless a directory is ours and its files are what we wrote; ``except_for``: names
    (patterns) that are not looked at."""
    files = read_list(path)[1]
    if files is None:
        raise BadInput(f"{path}: no {LIST_FILE}, or a damaged one: diffprune did not write this directory")
    for name, digest in files.items():
        if any(Path(name).match(pattern) for pattern in except_for):
            continue
        if not (path / name).is_file():
            raise BadInput(f"{path / name}: missing, though {LIST_FILE} lists it; restore it")
        if sha256(path / name) != digest:
            raise BadInput(f"{path / name}: its SHA-256 is not that in {LIST_FILE}: changed since it was written")


def read_list(path: Path) -> tuple[str, dict[str, str] | None]:
    """What `write_list` wrote: the kind, and the files with their hashes; None if there is no such list."""
    try:
        content = read_json(path / LIST_FILE)
        return str(content["kind"]), {str(name): str(digest) for name, digest in content["files"].items()}
    except (BadInput, LookupError, TypeError, AttributeError):
        return "", None


def check_place(path: Path, what: str = "output") -> None:
    """Raises BadInput unless a file or directory can be made at ``path``; ``what``: what it is called."""
    folder = next((parent for parent in path.absolute().parents if parent.exists()), path.absolute())
    try:
        with tempfile.NamedTemporaryFile(prefix=f".{path.name}.", suffix=ENDING, dir=folder):
            return
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise BadInput(f"{path}: {error.strerror}; choose a shorter {what}") from None
        raise BadInput(f"{path}: {folder} is not a directory that can be written to; choose another {what}") from None


def check_file(path: Path, overwrite: bool = False, what: str = "file", begins: bytes = b"") -> None:
    """Raises BadInput unless a file can be written at ``path``, over what is there only with ``overwrite``, and if that
    ``begins`` as what we write does."""
    if path.is_dir():
        raise BadInput(f"{path} is a directory; choose another {what}")
    if path.exists() and not overwrite:
        raise BadInput(f"{path} exists; use --overwrite or another {what}")
    if path.is_file() and (begun := path.open("rb").read(len(begins))) and begun != begins:
        raise BadInput(f"{path} is another kind of file, which is not replaced; choose another {what}")
    check_place(path, what)


def check_picture(path: Path, overwrite: bool = False, what: str = "file") -> None:
    """The same of a PNG, which alone we draw."""
    if path.suffix.lower() not in ("", ".png") and not path.is_dir():
        raise BadInput(f"{path}: what is drawn is a PNG; name it {path.with_suffix('.png').name}")
    check_file(path, overwrite, what, b"\x89PNG")


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


def relative(value: Any) -> Any:
    """An absolute path, also inside a mapping, as seen from the working directory: what is handed on does not name this
    machine's folders."""
    if isinstance(value, Mapping):
        return {key: relative(inner) for key, inner in value.items()}
    if not isinstance(value, str) or not os.path.isabs(value):
        return value
    try:
        return os.path.relpath(value)
    except ValueError:  # on another drive
        return Path(value).name


def check_apart(output: Path, sources: Mapping[str, str | None]) -> None:
    """Raises BadInput if writing the output would replace one of the sources, by config key, that it is made from."""
    place = resolved(output)
    for key, value in sources.items():
        source = resolved(Path(value)) if value else None
        if source and (source == place or place in source.parents or source in place.parents):
            raise BadInput(f"output: {output} and {key}: {value} lie inside each other; choose another output")
