"""The files of an export: put in place together with a manifest, and checked for damage before a session opens them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from diffprune_plugin.errors import BadInput, CheckFailed
from diffprune_plugin.utils.files import alone_in, check_place, disk_errors, scratch, sync, write_text
from diffprune_plugin.utils.optional import need
from diffprune_plugin.utils.reading import read_json

PREFIX = "diffprune."
MANIFEST = ".manifest.json"
VERDICT = ".verdict.json"
REJECTED = ".rejected"
Files = dict[str, dict[str, Any]]
# What must be in an ONNX file of ours, and the kinds of those values that are JSON.
REQUIRED = ("axes", "config", "dtype", "macs", "opset")
KINDS = {"axes": dict, "config": dict, "inputs": dict, "multiples": dict, "timesteps": list}


def check_output(path: Path, overwrite: bool = False) -> None:
    """Raises BadInput for a path that cannot become an ONNX file: wrong ending, there already, not writable."""
    if path.suffix != ".onnx":
        example = path.with_suffix(".onnx") if path.name else "model.onnx"
        raise BadInput(f"{path}: the output must end in .onnx; for example {example}")
    if path.is_dir():
        raise BadInput(f"{path}: is a directory; name a file that ends in .onnx")
    if path.exists() and not overwrite:
        raise BadInput(f"{path} exists; use --overwrite (overwrite=True) or another output")
    check_place(path)


def manifest_path(path: Path) -> Path:
    return path.with_name(path.name + MANIFEST)


@contextlib.contextmanager
def new_model(
    path: Path, overwrite: bool = False, notes: Mapping[str, Any] | None = None, written: Files | None = None
) -> Iterator[Path]:
    """Where to write an ONNX file, its data beside it; both take their places with their manifest at the end.

    Killed at any moment it leaves nothing at ``path``, or the old file with all that belongs to it. ``notes`` go into
    the manifest, whose files are put into ``written``. Raises BadInput if by then another export has written there,
    unless ``overwrite``.
    """
    with disk_errors(path), scratch(path) as place:
        yield place
        with alone_in(path.parent):
            check_output(path, overwrite)
            files = put_in_place(place.parent, path, notes or {})
    if written is not None:
        written.update(files)


@contextlib.contextmanager
def still(path: Path, files: Files) -> Iterator[None]:
    """Alone with an ONNX file of these files, or with none; raises CheckFailed if another export has replaced it."""
    with alone_in(path.parent):
        if manifest_path(path).exists() and read_manifest(path)["files"] != files:
            raise CheckFailed(
                f"{path}: another export has written there before this one was proved, and the verdict is that one's; "
                "export to a path of its own"
            )
        yield


def put_in_place(scratch: Path, path: Path, notes: Mapping[str, Any]) -> Files:
    """Move the written files beside ``path``, the model last; until then the manifest vouches for the old ones too.

    Returns what the manifest says of them.
    """
    path.with_name(path.name + VERDICT).unlink(missing_ok=True)  # of the old file: nothing is proved of the new one
    files = {file.name: fingerprint(file) for file in sorted(scratch.iterdir())}
    files[path.name] |= notes
    old, known = old_files(path)
    for name in known - old.keys() - files.keys():  # of an overwrite that was interrupted
        path.with_name(name).unlink(missing_ok=True)
    write_manifest(path, files, old)
    for name in sorted(files, key=lambda name: name == path.name):
        sync(scratch / name)
        (scratch / name).replace(path.with_name(name))
    for name in old.keys() - files.keys():
        path.with_name(name).unlink(missing_ok=True)
    if old:
        write_manifest(path, files)
    return files


def old_files(path: Path) -> tuple[Files, set[str]]:
    """The files that are what a manifest says of them, and the names of all that it knows.

    After an interrupted overwrite these are not those that were to come. A damaged manifest knows none.
    """
    try:
        content = read_manifest(path) if path.exists() else {}
    except BadInput:
        return {}, set()
    generations: list[Files] = [content[key] for key in ("files", "previous") if content.get(key)]
    sound = (files for files in generations if next(differences(path, files), None) is None)
    return next(sound, {}), {name for files in generations for name in files}


def fingerprint(file: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}


def write_manifest(path: Path, files: Files, previous: Files | None = None) -> None:
    content = {"format": 1, "files": files} | ({"previous": previous} if previous else {})
    write_text(manifest_path(path), json.dumps(content, indent=1) + "\n")


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest beside an ONNX file; raises BadInput if it is missing, damaged, or names files elsewhere."""
    manifest = manifest_path(path)
    if not manifest.exists():
        raise BadInput(f"{path}: its manifest {manifest.name} is missing; restore it or export again")
    try:
        content = read_json(manifest)
        entries = [*content["files"].items(), *content.get("previous", {}).items()]
        sound = all(is_plain(name) and is_fingerprint(entry) for name, entry in entries)
    except (BadInput, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise BadInput(f"{manifest}: not a manifest; restore it or export again")
    return dict(content)


def is_plain(location: str) -> bool:
    """Whether a location is a bare file name: not absolute, on any system, and without a way upwards."""
    return location not in ("", "..") and PurePosixPath(location).name == PureWindowsPath(location).name == location


def is_fingerprint(entry: Any) -> bool:
    return isinstance(entry, dict) and type(entry.get("bytes")) is int and isinstance(entry.get("sha256"), str)


def check_files(path: str | Path) -> dict[str, str]:
    """The provenance of an ONNX file of ours, after every check that needs no session.

    The manifest (sizes, SHA-256), the external data (locations, offsets, lengths) and onnx.checker, by path.
    Raises BadInput that names the damage.
    """
    path = Path(path)
    onnx = need("onnx")
    if not path.is_file():
        raise BadInput(f"{path}: no such file; give an ONNX file that diffprune-export wrote")
    if manifest_path(path).exists():
        check_manifest(path)
    provenance = read_provenance(path)
    read_manifest(path)
    for tensor in external_tensors(onnx, parse(path)):
        check_tensor(onnx, path, tensor)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise BadInput(f"{path}: onnx.checker refuses it: {' '.join(str(error).split())[:200]}; export again") from None
    return provenance


def check_manifest(path: Path) -> None:
    """Raises BadInput unless every file is what the manifest says, or what it was before an interrupted overwrite."""
    content = read_manifest(path)
    generations = [content["files"], *([content["previous"]] if "previous" in content else [])]
    complaints = [next(differences(path, files), None) for files in generations]
    if None not in complaints:
        raise BadInput(f"{complaints[-1]}; restore it or export again")


def differences(path: Path, files: Files) -> Iterator[str]:
    """What is wrong with the files, sizes before contents."""
    if path.name not in files:
        yield f"{manifest_path(path)}: does not list {path.name}"
    for name, stated in files.items():
        file = path.with_name(name)
        if not file.is_file():
            yield f"{file}: missing, though the manifest lists it"
        elif file.stat().st_size != stated["bytes"]:
            yield f"{file}: {file.stat().st_size} bytes, the manifest says {stated['bytes']}: truncated or replaced"
        elif fingerprint(file)["sha256"] != stated["sha256"]:
            yield f"{file}: its SHA-256 is not the manifest's: changed since it was written"


def parse(path: Path) -> Any:
    """The ModelProto without its external data; raises BadInput if the file holds none."""
    onnx = need("onnx")
    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception:
        raise BadInput(f"{path}: damaged or not an ONNX file; export again") from None


def read_provenance(path: str | Path) -> dict[str, str]:
    """What the exporter wrote into an ONNX file, without the prefix of the keys; values as written, JSON or text.

    Raises BadInput for a file that is not there, is no ONNX file, or was not written by this package.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    properties = {p.key: p.value for p in parse(path).metadata_props}
    ours = {key.removeprefix(PREFIX): value for key, value in properties.items() if key.startswith(PREFIX)}
    if not ours:
        raise BadInput(f"{path}: not written by diffprune-export (no {PREFIX}* metadata); export the model with it")
    for key in dict.fromkeys((*REQUIRED, *KINDS)):
        if (key in REQUIRED and key not in ours) or not isinstance(read_fact(ours, key), KINDS.get(key, object)):
            raise BadInput(f"{path}: its {PREFIX}{key} is missing or damaged; export again")
    return ours


def read_fact(facts: Mapping[str, str], key: str) -> Any:
    """A value of the provenance: as JSON where it is that, an empty one for a key that older files lack."""
    kind = KINDS.get(key)
    if kind is None or key not in facts:
        return facts.get(key, kind and kind())
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(facts[key])
    return None


def external_tensors(onnx: Any, model: Any) -> Iterator[Any]:
    external = onnx.TensorProto.EXTERNAL
    return (tensor for tensor in model.graph.initializer if tensor.data_location == external)


def check_tensor(onnx: Any, path: Path, tensor: Any) -> None:
    """Raises BadInput for external data that lies elsewhere, outside its file, or has not its tensor's size."""
    entry = {item.key: item.value for item in tensor.external_data}
    location = entry.get("location", "")
    if not is_plain(location):
        raise BadInput(f"{path}: {tensor.name} points to {location!r}, outside its directory; export again")
    content, file = read_manifest(path), path.with_name(location)
    if location not in content["files"] | content.get("previous", {}) or not file.is_file():
        raise BadInput(f"{path}: {tensor.name} points to {location!r}, which the manifest does not list; export again")
    size = file.stat().st_size
    try:
        offset = int(entry.get("offset", 0))
        length = int(entry.get("length", size - offset))
        expected = math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (ValueError, KeyError):
        told = ", ".join(f"{key} {value!r}" for key, value in entry.items())
        raise BadInput(f"{path}: {tensor.name} cannot be read: type {tensor.data_type}, {told}; export again") from None
    if length != expected or offset < 0 or offset + length > size:
        raise BadInput(
            f"{path}: {tensor.name} wants {expected} bytes, its entry says {length} at {offset} of {size} in "
            f"{location}; export again"
        )


def reject(path: Path, files: Files) -> list[Path]:
    """Rename an ONNX file, first of all, its data and its manifest to ``*.rejected``; returns the new names.

    Raises CheckFailed, and renames nothing, if another export has replaced the file of these ``files``.
    """
    with still(path, files):
        named = [path, *(path.with_name(name) for name in files if name != path.name), manifest_path(path)]
        return [file.rename(file.with_name(file.name + REJECTED)) for file in named]
