"""Killed at every file operation, a command leaves its output whole or absent; the next run ends as if never killed.

An audit hook in a forked child counts what Python does to files below the working directory and kills the child, by
SIGKILL, before operation N. What it cannot see, the writes of safetensors and ONNX, lies between two that it sees.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import DDPMPipeline, DDPMScheduler
from tiny import make_unet

import diffprune_plugin as dp
from diffprune_plugin.calibration.run import calibrate
from diffprune_plugin.cli import main as diffprune
from diffprune_plugin.export import cli, convert
from diffprune_plugin.export.convert import traced
from diffprune_plugin.export.integrity import VERDICT, check_files, fingerprint
from diffprune_plugin.plugins import find_adapter
from diffprune_plugin.pruning.saving import PRUNED
from diffprune_plugin.recovery.compensate import compensate_
from diffprune_plugin.utils.files import check_ours

KINDS = "EVERY_KILL" not in os.environ  # at the first and the last operation of each kind, or at all of them
LAST = 30  # operations that an --overwrite is killed at: until then it does what a first run does
CHANGING = re.compile(r"\.\w{8}\.diffprune|\d{4}\.safetensors|-[0-9a-f]{16}")  # in the paths of operations of one kind
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "os.link", "os.symlink")
CHANGES += ("fcntl.flock", "ctypes.dlopen")  # a lock, and what swaps two directories
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
PRUNE = {
    "model": "dense",
    "output": "out",
    "data": "images.npz",
    "importance": {"name": "diff_taylor", "samples": 4, "curve_samples": 2},
    "timesteps": 3,
    "batch_size": 4,
    "calibration": "calibration",
}
TUNE = {"model": "pruned", "output": "out", "data": "images.npz", "steps": 3, "batch_size": 2}
TUNE |= {"checkpoint_every": 1, "tracker": "none"}
# One level, no attention: few layers to compensate, each with an operation after the other.
SMALLEST = {"block_out_channels": (16,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
SMALLEST |= {"sample_size": 8, "mid_block_type": None, "norm_num_groups": 4}
EXPORT = ("out.onnx", "--model", "pruned", "--no-bench", "--steps", "2")
COMMANDS: dict[str, tuple[Callable[[list[str]], None], tuple[str, ...]]] = {
    "prune": (diffprune, ("prune", "prune.json")),
    "finetune": (diffprune, ("finetune", "tune.json")),
    "export": (cli.main, EXPORT),
}
OTHER = {  # the same to another result, which an --overwrite replaces
    "prune": ("--set", "seed=1", "--set", "calibration=null"),
    "finetune": ("--set", "seed=1"),
    "export": ("--opset", "19"),
}
MODEL = "out.onnx"
CLOCKS = ("seconds", "resumed", "compensation.json", "finetune.json")
PROGRAMS: dict[int, Any] = {}  # by opset, what the exporter made of the pruned model


@pytest.fixture(scope="module")
def place(images: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory that each run gets a copy of."""
    folder = tmp_path_factory.mktemp("place")
    np.savez(folder / "images.npz", images=images[:8, 4:12, 4:12])
    pipeline = DDPMPipeline(make_unet(**SMALLEST), DDPMScheduler(num_train_timesteps=20))
    dp.save(pipeline, folder / "dense")
    dp.remove_(pipeline.unet, dp.make_plan(pipeline.unet, "magnitude", pruning_ratio=0.5))
    dp.save(pipeline, folder / "pruned")
    for opset in (19, 20):
        PROGRAMS[opset] = traced(pipeline.unet, find_adapter(pipeline.unet), opset, ("batch",), (8, 8))
    (folder / "prune.json").write_text(json.dumps(PRUNE))
    (folder / "tune.json").write_text(json.dumps(TUNE))
    return folder


def child(command: str, folder: Path, *more: str, kill_at: int = 0) -> tuple[int, list[str]]:
    """Run a command in a forked child: how it ended (an exit code, or minus a signal), and the operations it did,
    those of one kind in the same words."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os._exit(in_child(command, folder, more, kill_at, writer))
        finally:  # never back into the tests
            os._exit(98)
    os.close(writer)
    with os.fdopen(reader, "rb") as said:
        done = said.read().decode().splitlines()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), [CHANGING.sub("", each) for each in done]


def in_child(command: str, folder: Path, more: tuple[str, ...], kill_at: int, writer: int) -> int:
    """A line is written for each operation; there are checkpoints as often as there can be, of little work."""
    os.chdir(folder)
    convert.traced = lambda model, adapter, opset, *rest: PROGRAMS[opset]  # ten seconds, without a file
    log = os.open(folder.parent / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    calibrate.__kwdefaults__["checkpoint_seconds"] = 0.0
    compensate_.__wrapped__.__kwdefaults__["samples"] = 16  # below torch.no_grad
    done = 0

    def step(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal done
        if changes_files(event, arguments, folder):
            done += 1
            if done == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            os.write(writer, f"{event} {[each for each in arguments if isinstance(each, str)]}\n".encode())

    sys.addaudithook(step)
    run, words = COMMANDS[command]
    try:
        run([*words, *more])
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 99
    return 0


def changes_files(event: str, arguments: tuple[Any, ...], folder: Path) -> bool:
    if event == "open":
        path, _, flags = arguments
        return bool(flags & WRITING) and isinstance(path, (str, bytes)) and folder in below(path).parents
    if event == "os.mkdir":
        return folder in below(arguments[0]).parents and not below(arguments[0]).is_dir()
    return event in CHANGES


def below(path: str | bytes) -> Path:
    return Path(os.path.abspath(os.fsdecode(path)))


def state(folder: Path) -> dict[str, Any]:
    """What lies in a directory, hidden things too: the contents of files, without the clocks in reports."""
    return {str(path.relative_to(folder)): content(path) for path in sorted(folder.rglob("*"))}


def content(path: Path) -> Any:
    if path.is_dir():
        return "a directory"
    with contextlib.suppress(ValueError):  # half a file, in a directory that a killed run left
        return without_clocks(json.loads(path.read_text())) if path.suffix == ".json" else path.read_bytes()
    return path.read_bytes()


def without_clocks(value: Any) -> Any:
    """Without what a report says of the run and not of the result, and its hash in the list of files."""
    if isinstance(value, dict):
        return {key: without_clocks(inner) for key, inner in value.items() if key not in CLOCKS}
    return [without_clocks(inner) for inner in value] if isinstance(value, list) else value


def below_output(found: dict[str, Any], name: str) -> dict[str, Any]:
    return {path: what for path, what in found.items() if Path(path).parts[0] == name}


def check_whole(command: str, folder: Path, results: list[dict[str, Any]]) -> None:
    """Each output is that of one of the results, or is not there; and says so itself."""
    found = state(folder)
    if command == "export":
        verdict = found.get(MODEL + VERDICT)
        assert MODEL in found or not verdict
        if MODEL in found:
            check_files(folder / MODEL)
            assert found[MODEL] in [result[MODEL] for result in results]
        if verdict:
            assert verdict["export"]["files"][MODEL]["sha256"] == fingerprint(folder / MODEL)["sha256"]
            assert verdict in [result[MODEL + VERDICT] for result in results] or not verdict["passed"]
        return
    for name in ("out", "calibration"):
        assert below_output(found, name) in [{}, *(below_output(result, name) for result in results)]
    if "out" in found:
        check_ours(folder / "out", PRUNED)


def ended(command: str, folder: Path, *more: str) -> dict[str, Any]:
    code, _ = child(command, folder, *more)
    assert code == 0, (folder.parent / "log").read_text()
    return state(folder)


def of_each_kind(done: list[str]) -> list[int]:
    """The numbers, from 1, of the first and the last operation of each kind: a layer's checkpoint is as another's."""
    last = {kind: number for number, kind in enumerate(done, 1)}
    first = {kind: number for number, kind in reversed(list(enumerate(done, 1)))}
    return sorted({*first.values(), *last.values()})


@pytest.mark.slow
@pytest.mark.parametrize("replacing", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_any_operation_it_is_whole_or_absent_and_the_next_run_ends_as_if_never_killed(
    command: str, replacing: bool, place: Path, tmp_path: Path
) -> None:
    start, more = tmp_path / "start", ("--overwrite",) if replacing else ()
    shutil.copytree(place, start)
    results = [ended(command, start, *OTHER[command])] if replacing else []
    shutil.copytree(start, tmp_path / "unbroken")
    code, operations = child(command, tmp_path / "unbroken", *more)
    assert (code, len(operations) > 20) == (0, True)
    expected = state(tmp_path / "unbroken")
    shutil.copytree(start, tmp_path / "again")
    assert ended(command, tmp_path / "again", *more) == expected, "two runs give the same"
    numbers = of_each_kind(operations) if KINDS else [*range(1, len(operations) + 1)]
    for number in numbers[-LAST:] if replacing else numbers:
        folder = tmp_path / f"killed at {number}"
        shutil.copytree(start, folder)
        code, done = child(command, folder, *more, kill_at=number)
        assert (code, len(done)) == (-signal.SIGKILL, number - 1)
        check_whole(command, folder, [*results, expected])
        assert ended(command, folder, "--overwrite") == expected, f"killed at {number}: {operations[number - 1]}"
        shutil.rmtree(folder)
