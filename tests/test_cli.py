"""The command line as a user meets it: what it prints, what it leaves, and its exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import diffprune_plugin as dp
from diffprune_plugin import workflow
from diffprune_plugin.cli import main
from diffprune_plugin.pruning.directory import read_plan
from diffprune_plugin.recovery import repairing


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys\nfrom diffprune_plugin.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "prune" in result.stdout


@pytest.mark.parametrize(
    "command", ["prune", "finetune", "evaluate", "config", "inspect", "sample", "plugins", "bench", "demo"]
)
def test_every_command_has_help_with_an_example(run, command) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "Example: diffprune" in out


def test_prune_inspect_and_sample_the_whole_way(run, config_file, tmp_path) -> None:
    code, out, _ = run("prune", config_file)
    assert code == 0
    assert "conv_in" in out
    pruned = tmp_path / "pruned"
    loaded = DiffusionPipeline.from_pretrained(pruned)
    assert sum(p.numel() for p in loaded.unet.parameters()) == read_plan(pruned).params[1]
    code, out, _ = run("inspect", pruned, "--json")
    assert code == 0
    assert json.loads(out)["criterion"]["name"] == "diff_taylor"
    assert json.loads(out)["criterion"]["threshold"] == 0.05
    assert run("inspect", pruned)[0] == 0
    grid = tmp_path / "grid.png"
    assert run("sample", pruned, "-o", grid, "--count", 2, "--steps", 2)[0] == 0
    assert Image.open(grid).size[0] > 16
    assert run("sample", pruned, "-o", grid)[0] == 2, "an existing picture is kept"
    code, _, err = run("prune", config_file)
    assert code == 2
    assert "exists; use --overwrite" in err
    assert run("prune", config_file, "--overwrite", "--json")[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "dense", "grid.png", "images.npz", "pruned"]


def test_the_config_that_made_it_is_stored_beside_the_model_and_runs_again(run, config_file, tmp_path) -> None:
    run("prune", config_file)
    first = dp.load(tmp_path / "pruned").pruning_plan
    assert run("prune", tmp_path / "pruned" / workflow.CONFIG_FILE, "--output", tmp_path / "again")[0] == 0
    assert dp.load(tmp_path / "again").pruning_plan.sha256 == first.sha256


def test_layers_behind_the_cuts_are_refitted_unless_told_otherwise(run, config_file, tmp_path) -> None:
    code, out, _ = run("prune", config_file)
    assert code == 0
    assert "regressions improved on held-out samples" in out
    report = json.loads((tmp_path / "pruned" / workflow.COMPENSATION_FILE).read_text())
    assert all(repair["after"] <= repair["before"] for repair in report["repairs"])
    code, out, _ = run("prune", config_file, "--set", "compensate=false", "--output", tmp_path / "plain")
    assert code == 0
    assert "not compensated" in out
    assert not (tmp_path / "plain" / workflow.COMPENSATION_FILE).exists()
    plain, refitted = (dp.load(tmp_path / name) for name in ("plain", "pruned"))
    assert plain.pruning_plan.sha256 == refitted.pruning_plan.sha256
    weights = zip(plain.parameters(), refitted.parameters(), strict=True)
    assert not all(torch.equal(before, after) for before, after in weights)


def test_a_dry_run_shows_the_plan_and_writes_nothing(run, config_file, tmp_path) -> None:
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = run("prune", config_file, "--dry-run")
    assert code == 0
    assert "MACs" in out
    assert sorted(tmp_path.rglob("*")) == before


def test_a_stored_calibration_is_used_again_and_refused_for_other_weights(
    run, config_file, tmp_path, monkeypatch
) -> None:
    stored = ["--set", f"calibration={tmp_path / 'stored'}"]
    assert run("prune", config_file, *stored)[0] == 0
    monkeypatch.setattr(
        "diffprune_plugin.calibration.stored.calibrate", lambda *a, **k: pytest.fail("calibrated again")
    )
    assert run("prune", config_file, *stored, "--output", tmp_path / "b", "--set", "pruning_ratio=0.5")[0] == 0
    code, _, err = run("prune", config_file, *stored, "--dry-run", "--set", "importance.samples=9")
    assert code == 2
    assert "name another directory" in err
    code, _, err = run("prune", config_file, *stored, "--dry-run", "--set", "seed=5")
    assert code == 2
    assert "calibrated with other seed" in err
    code, _, err = run("prune", config_file, *stored, "--dry-run", "--set", "timesteps=null")
    assert code == 2
    assert "calibrated with other timesteps" in err, "a hundred by default"
    scheduler = tmp_path / "dense" / "scheduler" / "scheduler_config.json"
    before = scheduler.read_text()
    scheduler.write_text(json.dumps(json.loads(before) | {"prediction_type": "v_prediction"}))
    code, _, err = run("prune", config_file, *stored, "--dry-run")
    assert code == 2
    assert "calibrated with other scheduler" in err
    scheduler.write_text(before)
    unet = dp.load(tmp_path / "dense")
    with torch.no_grad():
        unet.conv_in.weight.mul_(2)
    dp.save(unet, tmp_path / "other")
    code, _, err = run("prune", config_file, *stored, "--dry-run", "--model", tmp_path / "other")
    assert code == 2
    assert "calibrated with other weights" in err


def test_a_bare_unet_directory_is_pruned_by_a_criterion_that_needs_no_scheduler(run, config_file, tmp_path) -> None:
    words = ["--model", tmp_path / "dense" / "unet"]
    assert run("prune", config_file, *words, "--set", "importance=magnitude")[0] == 0
    assert dp.load(tmp_path / "pruned").pruning_plan.criterion["name"] == "magnitude"
    code, _, err = run("prune", config_file, *words, "--overwrite")
    assert code == 2
    assert "a UNet without a scheduler" in err


def no_adapter(tmp_path: Path) -> None:
    path = tmp_path / "dense" / "unet" / "config.json"
    path.write_text(path.read_text().replace("UNet2DModel", "Transformer2DModel"))


def truncated(tmp_path: Path) -> None:
    path = tmp_path / "dense" / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def other_size(tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", images=np.zeros((2, 8, 8, 1), np.uint8))


def no_index(tmp_path: Path) -> None:
    (tmp_path / "dense" / "model_index.json").unlink()
    (tmp_path / "dense" / "unet" / "config.json").unlink()


def nothing(tmp_path: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("spoil", "settings", "words"),
    [
        (nothing, ["pruning_ratoi=0.3"], "did you mean 'pruning_ratio'"),
        (nothing, ["pruning_ratio=1.2"], "pruning_ratio: 1.2"),
        (nothing, ["importance.threshold=2"], "threshold 2 is outside [0, 1]"),
        (nothing, ["importance.preset=papers"], "did you mean 'paper'"),
        (nothing, ["importance=diff_tylor"], "did you mean 'diff_taylor'"),
        (nothing, ["model=nowhere"], "nowhere: no such directory"),
        (nothing, ["data=nowhere"], "nowhere: no such folder"),
        (nothing, ["data=null"], "data is missing"),
        (nothing, ["data="], "no value; data=null takes back"),
        (nothing, ["importance=magnitude", "compensate=false", "data=nowhere"], "nowhere: no such folder"),
        (nothing, ["pruning_ratio=null"], "nothing else says how much is to go"),
        (nothing, ["importance={name: magnitude, plugins: 3}"], "unknown option 'plugins'"),
        (nothing, ["ignored_layers=['{re}x{99999999999}']"], "no valid expression"),
        (nothing, ["data=null", "importance=magnitude", "compensate=true"], "compensate: true needs 'data'"),
        (nothing, ["ignored_layers=[conv_inn]"], "did you mean 'conv_in'"),
        (nothing, ["timesteps=2000"], "outside 1..100"),
        (no_adapter, [], "Transformer2DModel"),
        (no_index, [], "neither a pipeline"),
        (truncated, [], "truncated or damaged"),
        (other_size, [], "the UNet takes (1, 16, 16)"),
    ],
)
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(
    run, config_file, tmp_path, spoil, settings, words
) -> None:
    spoil(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, _, err = run("prune", config_file, *[word for s in settings for word in ("--set", s)])
    assert code == 2
    assert words in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_says_that_the_data_are_not_there(run, config_file) -> None:
    code, _, err = run("prune", config_file, "--dry-run", "--set", "importance=magnitude", "--data", "nowhere")
    assert code == 2
    assert "nowhere: no such folder" in err


def test_data_that_do_not_fit_are_found_before_the_plan(run, config_file, tmp_path, monkeypatch) -> None:
    other_size(tmp_path)
    monkeypatch.setattr("diffprune_plugin.workflow.plan_from", pytest.fail)
    code, _, err = run("prune", config_file, "--set", "importance=magnitude")
    assert code == 2
    assert "the UNet takes (1, 16, 16)" in err


def test_keys_that_nothing_uses_are_told(run, config_file) -> None:
    idle = ["calibration=stored", "sensitivity=stored.json", "latency={threads: 2}", "resolution=8", "data=null"]
    words = [word for setting in ["importance=magnitude", *idle] for word in ("--set", setting)]
    code, _, err = run("prune", config_file, "--dry-run", *words)
    assert code == 0
    assert "nothing here uses resolution, calibration, sensitivity, latency, timesteps" in err
    assert "nothing here uses" not in run("prune", config_file, "--dry-run", "--set", "calibration=stored")[2]


def test_a_mistake_of_the_command_line_is_not_looked_for_in_the_file(run, config_file) -> None:
    words = ["--set", "pruning_ratio=2", "--set", "seed=-1"]
    code, _, err = run("prune", config_file, *words)
    assert code == 2
    assert err.startswith("error: --set pruning_ratio=2: pruning_ratio: 2 is outside [0, 1); --set seed=-1: seed: -1")
    assert str(config_file) not in err


def test_a_device_that_is_not_there_is_exit_code_3(run, config_file, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = run("prune", config_file, "--set", "device=cuda")
    assert code == 3
    assert "torch sees no GPU" in err


def test_a_check_that_fails_is_exit_code_1(run, config_file) -> None:
    code, _, err = run("prune", config_file, "--set", "strict=true", "--set", "pruning_ratio=0.1")
    assert code == 1
    assert "strict" in err


def test_an_output_that_would_replace_what_it_is_made_from_is_refused(run, config_file, tmp_path) -> None:
    for place in (tmp_path, tmp_path / "dense", tmp_path / "dense" / "unet" / "new"):
        code, _, err = run("prune", config_file, "--overwrite", "--output", place)
        assert code == 2
        assert any(w in err for w in ("lie inside each other", "holds other files", "holds a dense model"))
    assert (tmp_path / "dense" / "model_index.json").exists()


def test_a_pruned_model_is_refused_before_anything_is_calibrated(run, config_file, tmp_path) -> None:
    assert run("prune", config_file, "--set", "importance=magnitude", "--set", "compensate=false")[0] == 0
    again = ["--model", tmp_path / "pruned", "--output", tmp_path / "b", "--dry-run"]
    code, _, err = run("prune", config_file, *again)
    assert code == 2
    assert "pruned already" in err
    assert "loss curve" not in err


def test_names_with_brackets_are_printed_as_they_are(run, config_file) -> None:
    code, out, _ = run("prune", config_file, "--dry-run", "--set", "ignored_layers=['{re}conv_in|[/x]nothing']")
    assert code == 0
    assert "MACs" in out


def test_debug_shows_the_traceback(run) -> None:
    for words in (("--debug", "inspect", "nowhere"), ("inspect", "nowhere", "--debug")):
        code, _, err = run(*words)
        assert code == 2
        assert "Traceback" in err


def test_inspecting_a_dense_model_says_how_to_prune_it(run, dense_dir) -> None:
    code, _, err = run("inspect", dense_dir)
    assert code == 2
    assert "not pruned" in err


def out_of_memory(error: Exception) -> None:
    raise error


ON_CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried")


@pytest.mark.parametrize(
    ("trouble", "expected"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGINT), 130),
        (lambda: out_of_memory(MemoryError()), 2),
        (lambda: out_of_memory(ON_CPU), 2),
    ],
)
def test_an_interruption_and_too_little_memory_are_one_line(run, config_file, monkeypatch, trouble, expected) -> None:
    monkeypatch.setattr(workflow, "prune_shared", lambda *a, **k: trouble())
    code, _, err = run("prune", config_file)
    assert code == expected
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("words", [["--model", "x" * 300], ["--data", "x" * 300], ["--output", "x" * 300]])
def test_a_path_that_the_system_refuses_is_one_line(run, config_file, words) -> None:
    code, _, err = run("prune", config_file, *words)
    assert code == 2
    assert "File name too long" in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("place", ["", ".", "..", "/"])
def test_overwrite_never_takes_the_working_directory_or_one_above_it(run, config_file, tmp_path, monkeypatch, place):
    """As with --output "$OUT" where OUT is not set."""
    work = tmp_path / "work" / "here"
    work.mkdir(parents=True)
    (work / "model_index.json").write_text("{}")
    monkeypatch.chdir(work)
    code, _, err = run("prune", config_file, "--output", place, "--overwrite")
    assert code == 2
    assert "is the working directory or above it" in err or "'' no path" in err
    code, _, err = run("evaluate", tmp_path / "dense", "--output", place, "--overwrite", "--count", 0)
    assert code == 2
    assert list(work.iterdir()) == [work / "model_index.json"]


def test_memory_that_runs_out_while_compensating_is_one_line_and_the_calibration_is_kept(
    run, config_file, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(repairing, "compensate_", lambda *a, **k: out_of_memory(ON_CPU))
    code, _, err = run("prune", config_file)
    assert code == 2
    assert "error: out of memory while compensating; set 'compensate: false' and fine-tune" in err
    passes = []
    monkeypatch.setattr("diffprune_plugin.calibration.settings.noise_prediction_loss", lambda *a: passes.append(a))
    assert run("prune", config_file, "--set", "compensate=false")[0] == 0
    assert not passes, "as the line says, the calibration is kept"
    assert (tmp_path / "pruned").exists()


def test_one_image_is_too_few_to_compensate_and_refused_before_the_calibration(
    run, config_file, npz, images, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("diffprune_plugin.calibration.run.run_loops", None)
    np.savez(npz, images=images[:1])
    code, _, err = run("prune", config_file)
    assert code == 2
    assert err.startswith("error: compensate: 1 images, 256 samples: it needs two of both, to hold one out; add images")
    assert not list(tmp_path.glob("*pruned*"))


def test_a_value_in_an_error_is_cut_and_what_cannot_be_printed_is_taken_out(run, config_file) -> None:
    code, _, err = run("prune", config_file, "--set", f"importance='{'b ' * 200}'")
    assert code == 2
    assert f"unknown criterion '{'b ' * 98}...; known: " in err
    code, _, err = run("inspect", "no\nwhere\x1b[31m")
    assert (code, err.splitlines()) == (2, [err.strip()])
    assert err.startswith("error: no where [31m: no such directory")


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        pytest.param(["config"], marks=pytest.mark.slow),
        pytest.param(["config", "--json"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_output_that_cannot_be_written_is_one_line(words, config_file) -> None:
    given = [config_file] if "config" in words else []
    command = [sys.executable, "-m", "diffprune_plugin.cli", *words, *given]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 2
    *slow, line = result.stderr.splitlines()
    assert line == "error: cannot write the output: No space left on device; free space, or send it elsewhere"
    assert all("still loading plugin" in said for said in slow)


def test_sample_refuses_an_unknown_scheduler(run, dense_dir, tmp_path) -> None:
    code, _, err = run("sample", dense_dir, "-o", tmp_path / "g.png", "--scheduler", "dimm")
    assert code == 2
    assert "did you mean 'ddim'" in err


def test_as_a_module_it_is_the_same_program() -> None:
    command = [sys.executable, "-m", "diffprune_plugin.cli", "inspect", "nowhere"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 2
    assert result.stderr == "error: nowhere: no such directory; give a pipeline directory or a UNet directory\n"
    assert callable(main)


def test_a_stored_calibration_is_refused_for_other_images(run, config_file, npz, images, tmp_path) -> None:
    stored = ["--set", f"calibration={tmp_path / 'stored'}"]
    assert run("prune", config_file, *stored)[0] == 0
    np.savez(npz, images=255 - images)
    code, _, err = run("prune", config_file, *stored, "--dry-run")
    assert code == 2
    assert "calibrated with other data" in err


def test_who_reads_no_further_is_no_fault_of_a_library(tmp_path: Path) -> None:
    command = f"{sys.executable} -m diffprune_plugin.cli plugins | true"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
