"""`diffprune prune` over several processes: the result of one, and trouble of one that ends all, told once."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from processes import LAUNCH, ONE, TWO, call, two_processes
from test_pipelines import FAST, SWEEP
from tiny_pipelines import PIPELINES, captioned_folder

import diffprune_plugin as dp
from diffprune_plugin import __main__ as launched
from diffprune_plugin.calibration import progress as stored_progress
from diffprune_plugin.calibration import stored as stored_calibrations
from diffprune_plugin.calibration.batches import Batches
from diffprune_plugin.calibration.calibration import Calibration
from diffprune_plugin.calibration.gradients import GradientSums
from diffprune_plugin.calibration.settings import Settings
from diffprune_plugin.config.pruning import PruningConfig
from diffprune_plugin.errors import BadInput, DiffPruneError
from diffprune_plugin.sensitivity.linear import Run
from diffprune_plugin.utils import distributed
from diffprune_plugin.utils.distributed import Processes, check_parallel
from diffprune_plugin.workflow import config_on, prune, prune_shared

MODULE = ["--dynamo_backend", "no", "-m", "diffprune_plugin", "prune"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion with captions; output and calibration go into the working directory."""
    place = tmp_path_factory.mktemp("made")
    make, side = PIPELINES["stable diffusion"]
    dp.save(make(place), place / "dense")
    values = {"model": str(place / "dense"), "data": str(captioned_folder(place / "data", side)), "importance": SWEEP}
    values |= {**FAST, "batch_size": 5, "compensate": False, "calibration": "stored"}
    (place / "config.json").write_text(json.dumps(values))
    return place / "config.json"


@pytest.fixture(scope="module")
def alone(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `diffprune prune` has left its results."""
    place = tmp_path_factory.mktemp("alone")
    result = call(sys.executable, "-m", "diffprune_plugin.cli", "prune", config, cwd=place)
    assert result.returncode == 0, result.stderr
    return place


def check_same_result(alone: Path, shared: Path) -> None:
    """Loss and gradients are the same up to rounding, the plan and what follows from it exactly."""
    one, two = (Calibration.load(place / "stored") for place in (alone, shared))
    np.testing.assert_allclose(two.loss, one.loss, rtol=1e-5)
    assert two.gradients.keys() == one.gradients.keys()
    for name, gradient in one.gradients.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(two.gradients[name], gradient, rtol=1e-5, atol=1e-5 * scale, msg=name)
    first, second = (dp.load(place / "pruned") for place in (alone, shared))
    assert second.pruning_plan.sha256 == first.pruning_plan.sha256
    assert second.pruning_plan.removed_units() == first.pruning_plan.removed_units()
    weights = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in weights)


def content(file: Path) -> Any:
    """The bytes; of a .safetensors its header as a mapping, whose order is not fixed, and the rest."""
    read = file.read_bytes()
    if file.suffix != ".safetensors":
        return read
    end = 8 + int.from_bytes(read[:8], "little")
    return json.loads(read[8:end]), read[end:]


def test_two_processes_under_accelerate_launch_prune_as_one_does(config, alone, tmp_path) -> None:
    result = call(*LAUNCH, *TWO, *MODULE, config, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("processes: 2 (cpu)") == result.stdout.count("wrote pruned") == 1
    assert "is now spelled" not in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pruned", "stored"]
    check_same_result(alone, tmp_path)


@pytest.mark.slow
def test_one_process_under_accelerate_launch_leaves_the_files_of_diffprune_prune(config, alone, tmp_path) -> None:
    result = call(*LAUNCH, *ONE, *MODULE, config, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    names = sorted(path.relative_to(alone) for path in alone.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert all(content(alone / name) == content(tmp_path / name) for name in names)


@pytest.mark.slow
def test_a_bad_config_ends_both_processes_with_2_and_is_told_once(config, tmp_path) -> None:
    """The launcher itself ends with 1 and a report, whatever its processes end with."""
    result = call(*LAUNCH, *TWO, *MODULE, config, "--set", "timesteps=2000", cwd=tmp_path)
    assert result.returncode == 1
    assert re.findall(r"exitcode +: (-?\d+)", result.stderr) == ["2", "2"]
    assert result.stderr.count("error: ") == result.stderr.count("timesteps: 2000 is outside 1..100") == 1
    assert result.stderr.count("Traceback") == 1, "the launcher's"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_launcher_takes_the_old_spelling_too_and_says_the_new_one_once(config, tmp_path) -> None:
    results = two_processes("-m", "diffprune_plugin.prune", config, cwd=(tmp_path, tmp_path))
    assert [code for code, _, _ in results] == [0, 0], results
    new = "diffprune_plugin.prune is now spelled: accelerate launch -m diffprune_plugin prune\n"
    assert [err.count(new) for _, _, err in results] == [1, 0]
    assert (tmp_path / "pruned").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["config.json"],
            "error: process 1: config.json: cannot be read: No such file",
        ),  # only where the first process works
        pytest.param(["--nothing"], "No such option: --nothing", marks=pytest.mark.slow),
    ],
)
def test_what_one_process_alone_lacks_ends_both_with_2_and_is_told_once(words, expected, config, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    (code, _, told), second = two_processes(*MODULE[2:], *words, cwd=(config.parent, tmp_path / "empty"))
    assert code == 2
    assert told.count(expected) == 1
    assert second == (2, "", "")


def no_data(rank: int, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"data": "nowhere"} if rank else {}


def other_data(rank: int, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"resolution": 16, "data": str(captioned_folder(Path("other"), 32))} if rank else {}


def no_memory(rank: int, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    def loss(settings: Any, draws: Any) -> Any:
        if rank and torch.is_grad_enabled():
            raise MemoryError
        return plain(settings, draws)

    plain = Settings.loss
    patch.setattr(Settings, "loss", loss)
    return {}


def fault(rank: int, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    if rank:
        patch.setattr(Batches, "add_own", lambda *_: [].pop())
    return {}


BUDGET = {"importance": "magnitude", "macs_target": 0.8, "sensitivity_samples": 8, "sensitivity_probes": 1}


def lost_pass(rank: int, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    if rank:
        patch.setattr(Run, "add", lambda *_: [].pop())
    return BUDGET


def lost_means(rank: int, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    if rank:
        patch.setattr(Run, "means", lambda *_: [].pop())
    return BUDGET


def full_disk(rank: int, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    def save(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    patch.setattr(stored_progress, "save_tensors", save)
    return {}


def damaged(rank: int, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    Path("damaged").mkdir(exist_ok=True)
    return {"calibration": "damaged"}


def too_strict(rank: int, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"strict": True, "pruning_ratio": 0.01}


def output_there(rank: int, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"output": "."}


def another_device(rank: int, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"device": "cuda"} if rank else {}


def dropped(rank: int, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The second process's gradients count for nothing."""
    if rank:
        patch.setattr(GradientSums, "adder", lambda *_: lambda parameter: setattr(parameter, "grad", None))
    return {"calibration": "dropped/stored", "output": "dropped/pruned"}


def nothing(rank: int, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"calibration": "whole/stored", "output": "whole/pruned"}


def stored(rank: int, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the run before has left is used, not made again; that it is there the second process need not see."""
    patch.setattr(stored_calibrations, "calibrate", None)
    return {"calibration": "nowhere" if rank else "whole/stored"}


# What goes wrong, the exit code, and what the first and the second process raise.
TROUBLE: dict[Callable[..., dict[str, Any]], tuple[int, str, str]] = {
    no_data: (2, "BadInput: process 1: data: nowhere: no such folder", "BadInput: data: nowhere: no such"),
    other_data: (2, "BadInput: calibration: the model, the data or the settings are not the same", "BadInput: calib"),
    no_memory: (2, "BadInput: process 1: out of memory at batch size 1", "BadInput: out of memory at batch size 1"),
    fault: (1, "CheckFailed: process 1: IndexError: pop from empty list", "IndexError: pop from empty list"),
    lost_pass: (1, "CheckFailed: process 1: IndexError: pop from empty list", "IndexError: pop from empty list"),
    lost_means: (1, "CheckFailed: process 1: IndexError: pop from empty list", "IndexError: pop from empty list"),
    full_disk: (2, "BadInput: cannot write", "BadInput: process 0: cannot write"),
    damaged: (
        2,
        "BadInput: damaged/calibration.json: cannot be read",
        "BadInput: process 0: damaged/calibration.json: cannot be read",
    ),
    too_strict: (1, "CheckFailed: strict", "CheckFailed: process 0: strict"),
    output_there: (2, "BadInput: output: '.' is the working", "BadInput: process 0: output: '.' is the working"),
    another_device: (2, "BadInput: process 1: device: cuda, but", "BadInput: device: cuda, but"),
    dropped: (0, "done", "not the first"),
    nothing: (0, "done", "not the first"),
    stored: (0, "done", "not the first"),
}
ALL = """
import os, sys
sys.path[:0] = sys.argv[1].split(os.pathsep)
from test_distributed import go_through
go_through(sys.argv[2])
"""


def go_through(config: str) -> None:
    """Prune under each trouble in turn and store what it came to; whoever is out of step with the other gets stuck."""
    values, accelerator, found = json.loads(Path(config).read_text()), Accelerator(), {}
    for trouble in TROUBLE:
        name = trouble.__name__
        with pytest.MonkeyPatch.context() as patch:
            changes = {"output": f"{name}-out", "calibration": None, **trouble(accelerator.process_index, patch)}
            try:
                result = prune_shared(PruningConfig(**{**values, **changes}), accelerator, progress=False)
                found[name] = 0, "done" if result else "not the first"
            except DiffPruneError as error:
                found[name] = error.exit_code, f"{type(error).__name__}: {error}"
            except IndexError as error:
                found[name] = 1, f"IndexError: {error}"
    Path(f"{accelerator.process_index}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def gone_through(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("trouble")
    results = two_processes("-c", ALL, Path(__file__).parent, config, cwd=(place, place))
    assert [code for code, _, _ in results] == [0, 0], results
    return place


@pytest.mark.parametrize("trouble", TROUBLE, ids=lambda trouble: trouble.__name__)
def test_trouble_of_one_process_is_an_error_of_both(trouble, gone_through) -> None:
    code, *words = TROUBLE[trouble]
    for rank, start in enumerate(words):
        found, message = json.loads((gone_through / f"{rank}.json").read_text())[trouble.__name__]
        assert found == code
        assert message.startswith(start)
    if code:
        assert not (gone_through / f"{trouble.__name__}-out").exists()


def test_gradients_of_a_process_that_get_lost_are_noticed(alone, gone_through) -> None:
    """The control of the comparison between one process and two."""
    check_same_result(alone, gone_through / "whole")
    with pytest.raises(AssertionError):
        check_same_result(alone, gone_through / "dropped")


def accelerator(device: str, precision: str = "no") -> Any:
    return SimpleNamespace(device=torch.device(device), mixed_precision=precision)


def test_each_process_takes_the_device_that_accelerate_gives_it_and_another_in_the_config_is_refused() -> None:
    """cuda is torch's current device of the kind, which Accelerate sets in each process."""
    plain, config = PruningConfig(model="m"), PruningConfig(model="m", device="cuda:1")
    assert config_on(None, config) is config
    assert config_on(accelerator("cpu"), plain).device == "cpu"
    assert config_on(accelerator("cuda:1"), plain).device == "cuda"
    assert config_on(accelerator("cuda:1"), PruningConfig(model="m", device="cuda")).device == "cuda"
    for device, asked in (("cpu", "cuda"), ("cuda:0", "cpu"), ("cuda:1", "cuda:1")):
        with pytest.raises(BadInput, match=f"device: {asked}, but Accelerate gives each process its own"):
            config_on(accelerator(device), PruningConfig(model="m", device=asked))


@pytest.mark.parametrize(("precision", "autocast"), [("bf16", False), ("fp16", True)])
def test_a_precision_that_only_the_launcher_asks_for_is_refused(precision, autocast) -> None:
    with pytest.raises(BadInput, match=f"accelerate launch says {precision}"):
        config_on(accelerator("cpu", precision), PruningConfig(model="m", autocast=autocast))
    assert config_on(accelerator("cpu", "bf16"), PruningConfig(model="m", autocast=True)).autocast


def test_launchers_that_split_the_model_are_refused() -> None:
    with pytest.raises(BadInput, match="FSDP splits the model"):
        check_parallel(SimpleNamespace(distributed_type=DistributedType.FSDP))


def test_pruning_alone_among_several_processes_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(distributed, "place", lambda: (0, 2))
    with pytest.raises(BadInput, match="2 processes would all write out; call prune_shared in each"):
        prune(PruningConfig(model="m", output="out"))


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_speaks_before_the_others_end_and_no_launcher_stops_them(rank, monkeypatch, capsys) -> None:
    waited: list[float] = []
    monkeypatch.setitem(launched.STARTS, "prune", lambda: accelerator("cpu"))
    monkeypatch.setattr(Processes, "is_first", property(lambda _: rank == 0))
    monkeypatch.setattr(launched.time, "sleep", waited.append)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit, match="2"):
            launched.shared("prune", ["prune", "nowhere.yaml"])
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    assert waited == [0.0, launched.HEAD_START][rank : rank + 1]
    assert capsys.readouterr().err.count("nowhere.yaml") == 1 - rank


def test_what_is_summed_is_sent_from_the_device_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL takes nothing else, wherever the sums are kept."""
    sent = list[str]()

    def all_reduce(tensor: torch.Tensor) -> None:
        sent.append(tensor.device.type)
        raise KeyboardInterrupt

    monkeypatch.setattr(distributed, "place", lambda: (0, 2))
    monkeypatch.setattr(distributed.distributed, "all_reduce", all_reduce)
    for processes in (Processes(torch.device("meta")), Processes()):
        with pytest.raises(KeyboardInterrupt):
            processes.reduce(torch.ones(2, dtype=torch.float64))
    assert sent == ["meta", "cpu"]


@pytest.mark.parametrize("first", [True, False])
def test_what_each_process_does_by_itself_the_first_alone_stores(config, monkeypatch, tmp_path, first) -> None:
    asked = list[bool]()

    def refitted(job: Any, store: bool, progress: bool) -> None:
        asked.append(store)
        raise KeyboardInterrupt

    monkeypatch.setattr(Processes, "is_first", property(lambda self: first))
    monkeypatch.setattr("diffprune_plugin.workflow.refitted", refitted)
    values = json.loads(config.read_text()) | {"output": str(tmp_path / "out")}
    with pytest.raises(KeyboardInterrupt):
        prune_shared(PruningConfig(**values), progress=False)
    assert asked == [first]
