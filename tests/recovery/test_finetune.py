"""Fine-tuning: what a hand-written loop gives, resumable to the bit, shared out over processes, loud about trouble."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from processes import LAUNCH, call
from processes import TWO as PAIR
from processes import two_processes as processes_of
from safetensors.torch import save_file
from tiny import FAST, SMALL, make_unet
from tiny_conditional import SD

import diffprune_plugin as dp
from diffprune_plugin.adapters.unet_2d import UNET_2D
from diffprune_plugin.calibration.calibration import Calibration
from diffprune_plugin.data.loading import load_samples
from diffprune_plugin.diffusion.batches import FINETUNE, draw
from diffprune_plugin.diffusion.loss import min_snr_weights
from diffprune_plugin.errors import BadInput, CheckFailed
from diffprune_plugin.plugins import weights_of_timesteps
from diffprune_plugin.recovery import training
from diffprune_plugin.recovery.distillation import feature_error, kept_features, watched
from diffprune_plugin.recovery.finetune import FinetuneReport, finetune
from diffprune_plugin.utils import device

STEPS, BATCH, RATE, DECAY = 6, 4, 3e-3, 0.9


@pytest.fixture(scope="module")
def made(images: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dense, pruned and images.npz, made once."""
    place, pipeline = tmp_path_factory.mktemp("made"), DDPMPipeline(make_unet(), DDPMScheduler(num_train_timesteps=100))
    np.savez(place / "images.npz", images=images)
    dp.save(pipeline, place / "dense")
    dp.remove_(pipeline.unet, dp.make_plan(pipeline.unet, "magnitude", pruning_ratio=0.5))
    dp.save(pipeline, place / "pruned")
    return place


@pytest.fixture
def values(made: Path, tmp_path: Path) -> dict[str, Any]:
    """A fine-tune of a second."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    paths = {"model": str(tmp_path / "pruned"), "output": str(tmp_path / "tuned"), "data": str(tmp_path / "images.npz")}
    numbers = {"steps": STEPS, "batch_size": BATCH, "learning_rate": RATE, "ema_decay": DECAY, "warmup_steps": 2}
    return {**paths, **numbers, "tracker": "none"}


@pytest.fixture
def tuning(values: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "tune.json"
    path.write_text(json.dumps(values))
    return path


def tune(values: dict[str, Any], **changes: Any) -> FinetuneReport:
    return finetune(dp.FinetuneConfig.make({**values, **changes}), progress=False, overwrite=True)


def weights(directory: Any) -> dict[str, torch.Tensor]:
    return dict(dp.load(directory).state_dict())


def same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_it_ends_in_a_directory_that_loads_as_the_one_it_started_from(run, tuning, values, tmp_path) -> None:
    code, out, _ = run("finetune", tuning)
    assert code == 0
    assert "the moving average of the weights" in out
    loaded = DiffusionPipeline.from_pretrained(values["output"])
    assert loaded.unet.pruning_plan.sha256 == dp.load(values["model"]).pruning_plan.sha256
    assert not same_bits(weights(values["output"]), weights(values["model"]))
    report = json.loads((tmp_path / "tuned" / "finetune.json").read_text())
    assert len(report["curve"]["loss"]) == report["steps"] == STEPS
    assert report["settings"]["learning_rate"] == RATE
    assert (tmp_path / "tuned" / "finetune.png").exists()
    assert not (tmp_path / ".tuned.progress").exists()
    code, _, err = run("finetune", tuning)
    assert code == 2
    assert "exists; use --overwrite" in err
    code, out, _ = run("finetune", tuning, "--overwrite", "--set", "ema_decay=0")
    assert code == 0
    assert "the last weights" in out
    first = weights(values["output"])
    code, out, _ = run("finetune", tmp_path / "tuned" / "finetune.yaml", "--overwrite", "--json")
    assert code == 0
    assert json.loads(out)["curve"] == report["curve"], "the config beside the model trains the same again"
    assert same_bits(first, weights(values["output"]))


def by_hand(values: dict[str, Any], gamma: float | None = None, teacher: Any = None) -> dict[str, torch.Tensor]:
    """The weights after the same fine-tune, written out: AdamW, clipping, warm-up and cosine, moving average.

    Without biases that a softmax or a norm cancels: their gradients are rounding, which Adam blows up.
    """
    pipeline = DiffusionPipeline.from_pretrained(values["model"])
    unet, samples = pipeline.unet.train(), load_samples(values["data"])
    optimizer = torch.optim.AdamW(unet.parameters(), weight_decay=0.0)
    average = [p.detach().clone() for p in unet.parameters()]
    for step in range(STEPS):
        draws = [draw(samples, 0, FINETUNE, step * BATCH + i, np.arange(100)) for i in range(BATCH)]
        sample = samples.sample(torch.tensor([d.row for d in draws]))
        timesteps, noise = torch.tensor([d.timestep for d in draws]), torch.stack([d.noise for d in draws])
        alpha = pipeline.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * sample + (1 - alpha).sqrt() * noise
        prediction = unet(noisy, timesteps).sample
        loss = (prediction - noise).square().mean((1, 2, 3))
        if teacher is not None:
            with torch.no_grad():
                taught = teacher(noisy, timesteps).sample
            loss = 0.5 * loss + 2.0 * (prediction - taught).square().mean((1, 2, 3))
        if gamma is not None:
            snr = (alpha / (1 - alpha)).flatten()
            loss = loss * snr.clamp(max=gamma) / snr
        optimizer.zero_grad()
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 2) / (STEPS - 2)))
        optimizer.param_groups[0]["lr"] = RATE * (step / 2 if step < 2 else cosine)
        optimizer.step()
        decay = 0.0 if step == 0 else min(DECAY, (1 + step) / (10 + step))
        for mean, parameter in zip(average, unet.parameters(), strict=True):
            mean.lerp_(parameter.detach(), 1 - decay)
    real = [optimizer.state[p]["exp_avg_sq"].max() > 1e-12 for p in unet.parameters()]
    return {name: a for (name, _), a, moved in zip(unet.named_parameters(), average, real, strict=True) if moved}


@pytest.mark.parametrize("how", ["plain", "min-SNR", "taught"])
def test_the_weights_are_those_of_a_hand_written_loop(how, values, tmp_path) -> None:
    changes: dict[str, Any] = {
        "plain": {},
        "min-SNR": {"snr_gamma": 2.0},
        "taught": {"teacher": str(tmp_path / "dense"), "task_weight": 0.5, "output_weight": 2.0},
    }[how]
    tune(values, **changes)
    teacher = dp.load(tmp_path / "dense") if how == "taught" else None
    expected = by_hand(values, changes.get("snr_gamma"), teacher)
    assert len(expected) > 60
    tuned = weights(values["output"])
    for name, tensor in expected.items():
        torch.testing.assert_close(tuned[name], tensor, rtol=1e-3, atol=1e-4)


def test_accumulating_gradients_changes_nothing_but_rounding_and_workers_nothing_at_all(values) -> None:
    whole = tune(values)
    first = weights(values["output"])
    assert tune(values, num_workers=1).curve == whole.curve
    assert same_bits(first, weights(values["output"]))
    halves = tune(values, gradient_accumulation_steps=2)
    for name in ("loss", "grad_norm"):  # Adam itself is blind to a factor of the gradients
        np.testing.assert_allclose(halves.curve[name], whole.curve[name], rtol=1e-3)
    assert tune(values, seed=1).curve != whole.curve


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weighs_every_prediction_as_the_error_of_the_sample_it_stands_for(kind) -> None:
    """The predicted sample's squared error times min(SNR, gamma), whatever is predicted (arXiv 2303.09556, Eq. 5)."""
    scheduler, gamma = DDPMScheduler(num_train_timesteps=100, prediction_type=kind), 5.0
    timesteps = torch.tensor([0, 20, 60, 99])
    alpha = scheduler.alphas_cumprod[timesteps]
    error = torch.tensor([0.1, 0.2, 0.3, 0.4])  # of the sample
    of_prediction = {"sample": error, "epsilon": error * (alpha / (1 - alpha)).sqrt(), "v_prediction": None}[kind]
    if of_prediction is None:  # v = (sqrt(alpha) noisy - sample) / sqrt(1 - alpha)
        of_prediction = error / (1 - alpha).sqrt()
    weighted = min_snr_weights(scheduler, timesteps, gamma) * of_prediction.square()
    torch.testing.assert_close(weighted, (alpha / (1 - alpha)).clamp(max=gamma) * error.square())


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_of_training_is_that_of_calibration_also_without_any_signal(kind) -> None:
    """With betas shifted to end without signal, as for SD 2.1, the last SNR is 0: its noise still weighs 1."""
    scheduler = DDPMScheduler(50, prediction_type=kind, rescale_betas_zero_snr=True)
    weights = min_snr_weights(scheduler, torch.arange(50), gamma=5.0)
    assert weights.tolist() == pytest.approx(weights_of_timesteps("min_snr", scheduler).tolist(), rel=1e-6)
    assert weights[-1] == pytest.approx(1.0 if kind == "epsilon" else 0.0, abs=1e-6)
    assert weights.dtype is torch.float32


def test_features_are_compared_at_the_kept_channels(made) -> None:
    """A student whose features are the dense ones at the kept channels is without error; at others it is not."""
    student, dense = dp.load(made / "pruned"), dp.load(made / "dense")
    kept = kept_features(student, dense, student.pruning_plan, UNET_2D)
    assert {"down_blocks.0.resnets.0", "mid_block.attentions.0"} <= kept.keys()
    inputs = UNET_2D.example_inputs(dense, batch=2)
    with torch.no_grad(), watched(dense, kept) as taught, watched(student, kept) as values:
        dense(**inputs), student(**inputs)
    assert {name: value.shape[1] for name, value in values.items()} == {name: len(c) for name, c in kept.items()}
    perfect = {name: value[:, kept[name]] for name, value in taught.items()}
    assert feature_error(perfect, taught, kept).eq(0).all()
    shifted = {name: value[:, (kept[name] + 1) % value.shape[1]] for name, value in taught.items()}
    assert feature_error(shifted, taught, kept).gt(0.01).all()
    twice = {name: 2 * value for name, value in perfect.items()}
    assert feature_error(twice, taught, kept).tolist() == pytest.approx([1, 1], rel=1e-4)
    parts = [{n: value[i : i + 1] for n, value in of.items()} for of in (shifted, taught) for i in range(2)]
    alone = [feature_error(parts[i], parts[2 + i], kept).item() for i in range(2)]
    assert feature_error(shifted, taught, kept).tolist() == pytest.approx(alone, rel=1e-5), "however a step is split"


def test_the_teacher_moves_the_student_towards_its_features(values, tmp_path) -> None:
    report = tune(values, teacher=str(tmp_path / "dense"), feature_weight=1.0, steps=20, ema_decay=0.0)
    assert report.curve.keys() == {"loss", "task", "output", "features", "grad_norm"}
    features = report.curve["features"]
    assert np.mean(features[-5:]) < 0.9 * np.mean(features[:5])
    total = [sum(terms) for terms in zip(*(report.curve[name] for name in ("task", "output", "features")), strict=True)]
    np.testing.assert_allclose(report.curve["loss"], total, rtol=1e-5)


# Where a process of its own finds this file and what it imports.
PLACES = os.pathsep.join(map(str, Path(__file__).parents[:2]))
VICTIM = """
import os, sys
sys.path[:0] = sys.argv[1].split(os.pathsep)
from test_finetune import hang_at
hang_at(sys.argv[2], sys.argv[3], int(sys.argv[4]))
"""


def hang_at(config: str, place: str, count: int) -> None:
    """Fine-tune, and stop for good at the ``count``-th pass, or halfway through writing the ``count``-th checkpoint."""
    inner, calls = getattr(training, place), iter(range(1, 100))

    def call(*arguments: Any, **options: Any) -> Any:
        if next(calls) < count:
            return inner(*arguments, **options)
        if place == "save_tensors":
            arguments[1].write_bytes(b"half a file")
        Path("here").touch()
        return time.sleep(600)

    setattr(training, place, call)
    tune(json.loads(Path(config).read_text()))


def test_killed_at_several_points_it_resumes_to_the_same_bits(values, tuning, tmp_path, monkeypatch) -> None:
    """Processes of their own are killed with SIGKILL: in the middle of a step, and of writing a checkpoint."""
    monkeypatch.chdir(tmp_path)
    values |= {"checkpoint_every": 2, "teacher": str(tmp_path / "dense"), "gradient_accumulation_steps": 2}
    values |= {"snr_gamma": 5.0}
    unbroken = tune(values)
    expected = weights(values["output"])
    tuning.write_text(json.dumps(values))
    progress = tmp_path / ".tuned.progress"
    for place, count in (("batch_of", 8), ("save_tensors", 1)):  # in the fourth step; at the checkpoint after it
        command = [sys.executable, "-c", VICTIM, PLACES, str(tuning), place, str(count)]
        victim = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
        while not (tmp_path / "here").exists() and victim.poll() is None:
            time.sleep(0.02)
        victim.kill()
        assert victim.wait() == -signal.SIGKILL
        (tmp_path / "here").unlink()
        assert len(list(progress.glob("finetune-*.safetensors"))) == 1
    resumed = tune(values)
    assert resumed.resumed == 2
    assert resumed.curve == unbroken.curve
    assert same_bits(weights(values["output"]), expected)
    assert not progress.exists()


def stop_after(values: dict[str, Any], step: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fine-tune interrupted in the step after this one, with a checkpoint of each; returns the last."""
    inner, calls = training.batch_of, iter(range(1, 100))

    def call(*arguments: Any) -> Any:
        if next(calls) > step:
            raise KeyboardInterrupt
        return inner(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "batch_of", call)
        with pytest.raises(KeyboardInterrupt):
            tune(values, checkpoint_every=1)
    (file,) = (Path(values["output"]).parent / ".tuned.progress").glob("finetune-*")
    return file


@pytest.mark.parametrize("change", [{"gradient_checkpointing": True}, {"checkpoint_every": 3}])
def test_a_change_of_how_it_computes_goes_on_to_the_same_bits(values, tmp_path, monkeypatch, change) -> None:
    tune(values)
    expected = weights(values["output"])
    shutil.rmtree(values["output"])
    stop_after(values, 3, monkeypatch)
    assert tune(values, **change).resumed == 3
    assert same_bits(weights(values["output"]), expected)


def test_progress_of_other_settings_is_not_taken_up_and_damage_is_noticed(values, monkeypatch) -> None:
    file = stop_after(values, 3, monkeypatch)
    assert tune(values, learning_rate=1e-3).resumed == 0
    file = stop_after(values, 3, monkeypatch)
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    with pytest.raises(BadInput, match="altered since it was written"):
        tune(values)


def test_a_loss_that_is_not_finite_stops_it_at_the_last_good_checkpoint(values, tmp_path) -> None:
    with pytest.raises(CheckFailed) as caught:
        tune(values, learning_rate=1.0, weight_decay=100.0, warmup_steps=0, checkpoint_every=1, steps=50)
    words = str(caught.value)
    assert re.search(r"the (loss|norm of the gradients) is (nan|inf) in step \d+: image \d+ at timestep \d+, ", words)
    (file,) = (tmp_path / ".tuned.progress").iterdir()
    assert str(file) in words
    assert not (tmp_path / "tuned").exists()


TWO = """
import os, sys
sys.path[:0] = sys.argv[1].split(os.pathsep)
from test_finetune import two_processes
two_processes(sys.argv[2])
"""


def two_processes(config: str) -> None:
    """The fine-tune of a config, one for features alone, a calibration by each sampling, on the processes there are."""
    values = json.loads(Path(config).read_text())
    tune(values)
    tune(features_only(values))
    for sampling in SAMPLINGS:
        calibration = calibrate(sampling)
        if torch.distributed.get_rank() == 1:  # all have the same
            calibration.save(Path(sampling))


def features_only(values: dict[str, Any]) -> dict[str, Any]:
    """Layers behind the last block that is compared take no part in the loss."""
    weights = {"task_weight": 0.0, "output_weight": 0.0, "feature_weight": 1.0}
    return {**values, **weights, "teacher": "dense", "output": "features", "steps": 3, "warmup_steps": 0}


SAMPLINGS = {
    "stratified": {},
    "reference": {"sampling": "reference"},
    "squares": {"accumulate": "square", "micro_batch": 4},
}


def calibrate(sampling: str) -> Calibration:
    from dataclasses import replace

    scheduler, sweep = DDPMScheduler(num_train_timesteps=20), replace(SMALL, threshold=0.0, **SAMPLINGS[sampling])
    settings = {**FAST, "batch_size": 3, "checkpoint": Path("progress"), "checkpoint_seconds": 0}
    return dp.calibrate(make_unet(), scheduler, "images.npz", sweep, **settings)


def test_two_processes_train_and_calibrate_as_one_does(values, tuning, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    values |= {"checkpoint_every": 4, "timestep_sampling": "stratified"}
    one = tune(values)
    tuning.write_text(json.dumps(values))
    script = tmp_path / "two.py"
    script.write_text(TWO)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    words = [str(script), PLACES, str(tuning)]
    result = subprocess.run([*launch, *words], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "tuned" / "finetune.json").read_text())
    assert (report["processes"], one.processes) == (2, 1)
    features = json.loads((tmp_path / "features" / "finetune.json").read_text())
    alone = tune(features_only(values))
    for shared, curve, rtol in ((report["curve"], one.curve, 1e-3), (features["curve"], alone.curve, 1e-2)):
        for name in ("loss", "grad_norm"):  # Adam itself is blind to a factor of the gradients
            np.testing.assert_allclose(shared[name], curve[name], rtol=rtol)
    for sampling in SAMPLINGS:
        alone, shared = calibrate(sampling), Calibration.load(tmp_path / sampling)
        np.testing.assert_allclose(shared.loss, alone.loss, rtol=1e-4)
        assert shared.gradients.keys() == alone.gradients.keys()
        for name, gradient in alone.gradients.items():
            torch.testing.assert_close(shared.gradients[name], gradient, rtol=1e-3, atol=1e-4)


def test_ctrl_c_with_processes_that_load_data_is_one_line_and_exit_code_130(tuning, tmp_path) -> None:
    command = [sys.executable, "-m", "diffprune_plugin.cli", "finetune", str(tuning), "--set", "num_workers=2"]
    command += ["--set", "steps=100000", "--set", "checkpoint_every=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, start_new_session=True)
    while not list(tmp_path.glob(".tuned.progress/finetune-*")) and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert said.count("error: interrupted; prune and finetune go on from their last checkpoint") == 1


def test_with_fp16_steps_are_skipped_until_the_scale_is_below_1_and_resumed_without_any_taken(
    values, monkeypatch, tmp_path
) -> None:
    """With the scaler of a GPU played: no gradient is ever finite, and the optimizer has no state to resume."""
    file = stop_after(values, 1, monkeypatch)
    tensors, metadata = training.load_tensors(file)
    left = {name: tensor.clone() for name, tensor in tensors.items() if not name.startswith("optimizer.")}
    training.save_tensors(left, file, metadata)
    assert tune(values).resumed == 1
    scales = iter((2.0, 1.0, 0.5))
    scaler = SimpleNamespace(get_scale=lambda: next(scales))
    played = SimpleNamespace(scaler=scaler, clip_grad_norm_=lambda *_: torch.tensor(torch.inf), device="cpu")
    played.gather = lambda tensor: tensor
    settings = SimpleNamespace(max_grad_norm=1.0)
    self = SimpleNamespace(accelerator=played, parameters=[], config=settings, file=tmp_path / "none", step=7)
    self.stop = partial(training.Training.stop, self)
    batch = SimpleNamespace(rows=torch.tensor([3]), timesteps=torch.tensor([5]))
    for _ in range(2):
        training.Training.clip(self, batch)
        assert self.norm == 0.0
    with pytest.raises(CheckFailed, match="the norm of the gradients is inf in step 8: image 3 at timestep 5"):
        training.Training.clip(self, batch)


@pytest.mark.slow
def test_under_accelerate_launch_one_process_speaks(tuning, tmp_path) -> None:
    command = [*LAUNCH, *PAIR, "--dynamo_backend", "no", "-m", "diffprune_plugin", "finetune", tuning]
    good = call(*command, cwd=tmp_path)
    assert good.returncode == 0, good.stderr
    assert good.stdout.count("on 2 processes (cpu)") == good.stdout.count("wrote ") == 1


@pytest.mark.slow
def test_what_one_process_alone_lacks_ends_both_and_is_told_once(tuning, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    words = ["-m", "diffprune_plugin", "finetune", tuning.name]
    (code, _, told), second = processes_of(*words, cwd=(tuning.parent, tmp_path / "empty"))
    assert (code, told.count("error: process 1: tune.json")) == (2, 1), told
    assert second == (2, "", "")


def test_class_labels_are_trained_with_and_dropped_for_guidance(images, scheduler, values) -> None:
    unet = make_unet(num_class_embeds=4)
    dp.remove_(unet, dp.make_plan(unet, "magnitude", pruning_ratio=0.5))
    dp.save(DDPMPipeline(unet, scheduler), values["model"], overwrite=True)
    arrays = {"images": images, "class_labels": np.arange(16) % 3}
    before = weights(values["model"])["class_embedding.weight"]

    def moved(**changes: Any) -> list[bool]:
        tune(values, **changes)
        change = weights(values["output"])["class_embedding.weight"] - before
        return list((change.abs().sum(1) > 0).tolist())

    np.savez(values["data"], **arrays)
    assert moved() == [True, True, True, False], "no image has the last label"
    np.savez(values["data"], **arrays, null_class_labels=np.array([3]))
    assert moved(condition_dropout=0.5, gradient_checkpointing=True) == [True] * 4
    np.savez(values["data"], **arrays)
    with pytest.raises(BadInput, match=r"fine-tune: condition_dropout 0.5, but the data \(class_labels\) has no null"):
        tune(values, condition_dropout=0.5)


def test_half_precision_and_the_curve_for_tensorboard(values, tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("tensorboard")
    AcceleratorState._reset_state(reset_partial_state=True)
    exact = tune(values)
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(device.platform, "machine", lambda: "x86_64")
    report = tune(values, mixed_precision="bf16", tracker="tensorboard")
    assert capsys.readouterr().err.count("mixed_precision: bf16: this CPU has no AVX-512") == 1
    AcceleratorState._reset_state(reset_partial_state=True)
    assert report.mixed_precision == "bf16"
    assert report.curve != exact.curve
    np.testing.assert_allclose(report.curve["loss"], exact.curve["loss"], rtol=0.05)
    assert all(tensor.dtype is torch.float32 for tensor in weights(values["output"]).values())
    assert list((tmp_path / "tuned.logs").rglob("events*"))


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_a_tracker_that_is_installed_sees_every_step(tracker, values, tmp_path, monkeypatch) -> None:
    pytest.importorskip(tracker)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    report = tune(values, tracker=tracker)
    if tracker == "wandb":
        assert list(tmp_path.rglob("run-*.wandb"))
        return
    import mlflow

    runs = mlflow.search_runs(search_all_experiments=True, output_format="list")
    found = mlflow.MlflowClient().get_metric_history(runs[0].info.run_id, "loss")
    assert [one.value for one in found] == pytest.approx(report.curve["loss"])


def test_a_tracker_that_does_not_start_is_one_line(values, monkeypatch) -> None:
    pytest.importorskip("tensorboard")

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no API key\nlog in")

    monkeypatch.setattr(Accelerator, "init_trackers", refuse)
    with pytest.raises(BadInput, match="tracker: tensorboard does not start: RuntimeError: no API key log in"):
        tune(values, tracker="tensorboard")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["stpes=3"], "did you mean 'steps'"),
        (["learning_rate=fast"], "learning_rate: 'fast'"),
        (["learning_rate=0"], "learning_rate: 0"),
        (["lr_scheduler=cosin"], "lr_scheduler: 'cosin'"),
        (["warmup_steps=6"], "warmup_steps 6 leaves none of the 6 steps"),
        (["lr_scheduler=polynomial", "learning_rate=1e-7"], "polynomial ends at 1e-07; make it larger"),
        (["output=tune.json/new"], "tune.json is not a directory that can be written to"),
        (["feature_weight=1"], "feature_weight needs the dense model; add 'teacher: DIRECTORY'"),
        (["task_weight=0"], "all weights of the loss are 0"),
        (["gradient_accumulation_steps=3"], "batch_size: 4 does not divide"),
        (["mixed_precision=bf16"], "mixed_precision: bf16: AcceleratorState has already been initialized"),
        (["model=dense"], "dense is not pruned; prune it first"),
        (["model=nowhere"], "nowhere: no model_index.json"),
        (["data=nowhere"], "nowhere: no such folder"),
        (["teacher=nowhere"], "nowhere: no such directory"),
        (["teacher=pruned"], "teacher: pruned is pruned already"),
        (["output=pruned/new"], "lie inside each other"),
        (["output=dense", "teacher=dense"], "dense exists"),
        (["tracker=tensorboard"], "pip install 'diffprune-plugin[train]'"),
        (["tracker=wandb"], "pip install 'diffprune-plugin[wandb]'"),
        (["tracker=mlflow"], "pip install 'diffprune-plugin[mlflow]'"),
        (["tracker=aim"], "tracker: 'aim' is none of tensorboard, wandb, mlflow, none"),
    ],
)
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(
    run, tuning, tmp_path, monkeypatch, settings, words
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(mixed_precision="no")
    before = sorted(tmp_path.rglob("*"))
    code, _, err = run("finetune", tuning, *[word for s in settings for word in ("--set", s)])
    assert code == 2
    assert words in err
    assert len(err.strip().splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_training_does_not_take_the_precision_of_one_before_it(values) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(mixed_precision="bf16")
    with pytest.raises(BadInput, match="mixed_precision: no: AcceleratorState has already been initialized"):
        tune(values)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_small_number_is_a_number_in_yaml_too(values, tmp_path) -> None:
    path = tmp_path / "tune.yaml"
    path.write_text("model: a\ndata: b\nsteps: 3\nlearning_rate: 1e-4\n")
    from diffprune_plugin.config.base import read_as

    assert read_as(dp.FinetuneConfig, path).learning_rate == 1e-4


def test_a_teacher_that_is_asked_nothing_is_refused(values) -> None:
    with pytest.raises(BadInput, match="teacher: dense is asked nothing"):
        dp.FinetuneConfig.make({**values, "teacher": "dense", "output_weight": 0.0})


def test_what_the_class_does_not_train_stays_as_it_is(tmp_path: Path) -> None:
    """Frequencies of a Fourier embedding: moved by a thousandth, the phase of t = 999 is another one."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**SD, time_embedding_type="fourier")
    dp.remove_(unet, dp.make_plan(unet, "magnitude", pruning_ratio=0.5))
    dp.save(DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=100)), tmp_path / "pruned")
    tensors = {"latents": torch.randn(8, 4, 8, 8), "encoder_hidden_states": torch.randn(8, 3, 24)}
    save_file(tensors, tmp_path / "data.safetensors")
    paths = {"model": str(tmp_path / "pruned"), "output": str(tmp_path / "tuned")}
    tune({**paths, "data": str(tmp_path / "data.safetensors"), "steps": 2, "batch_size": 2, "tracker": "none"})
    before, after = weights(paths["model"]), weights(paths["output"])
    assert torch.equal(before["time_proj.weight"], after["time_proj.weight"])
    assert not torch.equal(before["conv_in.weight"], after["conv_in.weight"])
