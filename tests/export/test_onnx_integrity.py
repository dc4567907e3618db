from __future__ import annotations

import contextlib
import fcntl
import json
import os
from pathlib import Path

import onnx
import pytest

from diffprune_plugin.errors import BadInput, MissingExtra
from diffprune_plugin.export import check_files, read_provenance
from diffprune_plugin.export import integrity as files
from diffprune_plugin.utils.files import alone_in, scratch


def data_of(path: Path) -> Path:
    return next(path.parent.glob("*.data"))


def test_an_untouched_file_passes(models, mixed_onnx):
    assert check_files(models.pruned_onnx)["model_class"] == "UNet2DModel"
    assert check_files(mixed_onnx)["dtype"] == "fp16"


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"\.data: \d+ bytes, the manifest says \d+: truncated"),
        (flip_a_byte, r"\.data: its SHA-256 is not the manifest's"),
        (Path.unlink, r"\.data: missing, though the manifest lists it"),
    ],
)
def test_damaged_data_is_named_before_a_session_opens_it(mixed_onnx, copied, damage, message):
    path = copied(mixed_onnx)
    damage(data_of(path))
    with pytest.raises(BadInput, match=message):
        check_files(path)


@pytest.mark.parametrize(
    ("damage", "message"), [(truncate, "the manifest says"), (flip_a_byte, "SHA-256"), (Path.unlink, "no such file")]
)
def test_a_damaged_model_is_named(copy, damage, message):
    damage(copy)
    with pytest.raises(BadInput, match=message):
        check_files(copy)


def test_a_missing_or_broken_manifest_is_named(copy):
    files.manifest_path(copy).write_text("{}")
    with pytest.raises(BadInput, match=r"manifest\.json: not a manifest"):
        check_files(copy)
    files.manifest_path(copy).unlink()
    with pytest.raises(BadInput, match=r"its manifest .* is missing; restore it or export again"):
        check_files(copy)


@pytest.mark.parametrize("location", ["/etc/passwd", "../weights.data", "C:\\weights.data", "a/b.data", ""])
def test_data_that_lies_elsewhere_is_refused(mixed_onnx, copied, location):
    path = copied(mixed_onnx)
    model = onnx.load(path, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    next(item for item in tensor.external_data if item.key == "location").value = location
    path.write_bytes(model.SerializeToString())
    listed = files.read_manifest(path)["files"] | {path.name: files.fingerprint(path)}
    files.write_manifest(path, listed)
    with pytest.raises(BadInput, match="outside its directory"):
        check_files(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("offset", "999999999"), ("offset", "far"), ("length", "4"), ("length", "1e9"), ("location", "other.data")],
)
def test_data_outside_its_file_or_of_another_size_is_refused(mixed_onnx, copied, key, value):
    path = copied(mixed_onnx)
    model = onnx.load(path, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    next(item for item in tensor.external_data if item.key == key).value = value
    path.write_bytes(model.SerializeToString())
    files.write_manifest(path, files.read_manifest(path)["files"] | {path.name: files.fingerprint(path)})
    with pytest.raises(BadInput, match=r"its entry says|does not list|cannot be read: type \d+, .*(far|1e9)"):
        check_files(path)


def test_an_onnx_file_of_somebody_else_is_not_ours(tmp_path):
    graph = onnx.helper.make_graph([], "empty", [], [])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "other.onnx")
    with pytest.raises(BadInput, match="not written by diffprune-export"):
        check_files(tmp_path / "other.onnx")
    (tmp_path / "text.onnx").write_text("no protobuf")
    with pytest.raises(BadInput, match="damaged or not an ONNX file"):
        read_provenance(tmp_path / "text.onnx")


class Killed(BaseException):
    """What no clean-up of ours may rely on catching."""


def die_after(moves: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let so many renames happen, then no more."""
    replace, left = Path.replace, [moves]

    def dying_replace(self: Path, target: Path) -> Path:
        if not left[0]:
            raise Killed
        left[0] -= 1
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", dying_replace)


@pytest.mark.parametrize("moves", range(5))
def test_an_overwrite_killed_at_any_step_leaves_the_old_file_or_the_new_one_whole(copy, moves, monkeypatch):
    old = copy.read_bytes()
    die_after(moves, monkeypatch)
    new = old_with_note(old)
    try:
        with files.new_model(copy, overwrite=True) as temporary:
            temporary.write_bytes(new)
    except Killed:
        assert moves < 3
    monkeypatch.undo()
    assert copy.read_bytes() == (old if moves < 2 else new)
    check_files(copy)
    assert sorted(path.name for path in copy.parent.iterdir()) == [copy.name, files.manifest_path(copy).name]


def test_an_overwrite_killed_before_its_end_keeps_the_old_data_file(mixed_onnx, copied, monkeypatch):
    path = copied(mixed_onnx)
    old = path.read_bytes()
    die_after(2, monkeypatch)
    with contextlib.suppress(Killed), files.new_model(path, overwrite=True) as temporary:
        temporary.write_bytes(b"the new graph")
        temporary.with_name("mixed.new.data").write_bytes(b"the new weights")
    monkeypatch.undo()
    assert path.read_bytes() == old
    assert path.with_name("mixed.new.data").exists()
    assert check_files(path)["dtype"] == "fp16"


def test_two_overwrites_killed_one_after_the_other_keep_the_old_files_and_a_third_clears_up(
    mixed_onnx, copied, monkeypatch
):
    path = copied(mixed_onnx)
    old = path.read_bytes()
    for name in ("first.data", "second.data"):
        die_after(2, monkeypatch)
        with contextlib.suppress(Killed), files.new_model(path, overwrite=True) as temporary:
            temporary.write_bytes(b"a new graph for " + name.encode())
            temporary.with_name(name).write_bytes(b"new weights")
        monkeypatch.undo()
        assert path.read_bytes() == old
        assert check_files(path)["dtype"] == "fp16"
    with files.new_model(path, overwrite=True) as temporary:
        temporary.write_bytes(old_with_note((path.parent / path.name).read_bytes()))
    left = {file.name for file in path.parent.iterdir()}
    assert left == {path.name, files.manifest_path(path).name}


def old_with_note(content: bytes) -> bytes:
    model = onnx.load_from_string(content)
    model.doc_string = "new"
    return model.SerializeToString()


def test_a_first_export_killed_before_its_end_leaves_no_model(tmp_path, monkeypatch):
    die_after(0, monkeypatch)
    with pytest.raises(Killed), files.new_model(tmp_path / "m.onnx") as temporary:
        temporary.write_bytes(b"half")
    assert list(tmp_path.iterdir()) == []


def test_of_two_first_exports_to_one_path_the_second_to_end_is_refused_and_the_first_stays_whole(copy, tmp_path):
    content, path = copy.read_bytes(), tmp_path / "m.onnx"
    with pytest.raises(BadInput, match=r"m\.onnx exists; use --overwrite"), files.new_model(path) as slow:  # noqa: PT012
        slow.write_bytes(b"the second")
        with files.new_model(path) as fast:
            fast.write_bytes(content)
    assert path.read_bytes() == content
    check_files(path)


def test_one_export_is_put_in_place_at_a_time(tmp_path):
    handle = os.open(tmp_path, os.O_RDONLY)
    with alone_in(tmp_path), pytest.raises(BlockingIOError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(handle)


def test_an_export_into_a_scratch_place_does_not_wait_for_its_own_lock(tmp_path):
    with scratch(tmp_path / "dense.onnx") as place:
        handle = os.open(place.parent, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(handle)


@pytest.mark.parametrize("moves", [0, 1, 2, 3])
def test_the_verdict_of_the_old_file_is_gone_before_the_new_file_comes(copy, moves, monkeypatch):
    old, verdict = copy.read_bytes(), copy.with_name(copy.name + files.VERDICT)
    verdict.write_text('{"passed": true}')
    die_after(moves, monkeypatch)
    with contextlib.suppress(Killed), files.new_model(copy, overwrite=True) as temporary:
        assert verdict.exists(), "until then it is right"
        temporary.write_bytes(old_with_note(old))
    monkeypatch.undo()
    assert not verdict.exists()


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"files": []}',
        '{"files": {"m.onnx": ["bytes", "sha256"]}}',
        '{"files": {"m.onnx": {"bytes": "9", "sha256": "0"}}}',
        '{"files": {"m.onnx": {"bytes": 9, "sha256": null}}}',
        '{"files": {}, "previous": 3}',
    ],
)
def test_a_manifest_of_another_form_is_one_line(copy, text):
    files.manifest_path(copy).write_text(text)
    with pytest.raises(BadInput, match=r"manifest\.json: not a manifest; restore it or export again"):
        check_files(copy)


@pytest.mark.parametrize(
    ("key", "value"), [("axes", "[" * 100_000), ("axes", "[]"), ("config", "{"), ("timesteps", "{}"), ("dtype", None)]
)
def test_metadata_of_another_form_is_one_line(copy, resigned, key, value):
    model = onnx.load(copy)
    kept = {p.key: p.value for p in model.metadata_props if p.key != f"diffprune.{key}"}
    onnx.helper.set_model_props(model, kept | ({f"diffprune.{key}": value} if value else {}))
    onnx.save(model, copy)
    resigned(copy)
    with pytest.raises(BadInput, match=rf"its diffprune\.{key} is missing or damaged; export again"):
        check_files(copy)


def test_a_full_disk_is_one_line(tmp_path):
    with pytest.raises(BadInput, match=r"cannot write .*No space left on device"), files.new_model(tmp_path / "m.onnx"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.pt", r"must end in \.onnx"),
        ("folder.onnx", "is a directory"),
        ("there.onnx", "exists; use --overwrite"),
        ("there.onnx/model.onnx", "not a directory that can be written to"),
    ],
)
def test_an_output_that_cannot_be_is_refused(tmp_path, name, message):
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "there.onnx").touch()
    with pytest.raises(BadInput, match=message):
        files.check_output(tmp_path / name)
    files.check_output(tmp_path / "there.onnx", overwrite=True)


def test_a_missing_package_names_its_extra():
    with pytest.raises(
        MissingExtra, match=r"no_such_package is not installed; run: pip install 'diffprune-plugin\[cpu\]'"
    ):
        files.need("no_such_package")


def test_the_manifest_is_plain_json_with_sizes_and_hashes(models):
    listed = json.loads(files.manifest_path(models.pruned_onnx).read_text())["files"]
    assert listed["pruned.onnx"]["bytes"] == models.pruned_onnx.stat().st_size
    assert len(listed["pruned.onnx"]["sha256"]) == 64
