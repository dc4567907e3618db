"""diffprune evaluate: what it measures, against hand-written oracles, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image
from test_features import CLASSIFIER, write_network
from tiny import make_unet

import diffprune_plugin as dp
from diffprune_plugin import demo
from diffprune_plugin.criteria.sweep import Sweep
from diffprune_plugin.data.arrays import load_npz
from diffprune_plugin.errors import BadInput
from diffprune_plugin.evaluation.evaluate import Measured, compare, evaluate, stratified_mean
from diffprune_plugin.evaluation.features import frechet_distance, load_features
from diffprune_plugin.evaluation.report import with_error
from diffprune_plugin.evaluation.sampling import sample_images
from diffprune_plugin.evaluation.settings import Drawing, SamplingSettings
from diffprune_plugin.utils.files import LIST_FILE

QUICK = Drawing(count=4, steps=2, batch_size=3, loss_samples=2)


@pytest.fixture
def pruned(scheduler: DDPMScheduler) -> DDPMPipeline:
    unet = make_unet()
    dp.remove_(unet, dp.make_plan(unet, dp.importance("magnitude"), pruning_ratio=0.3))
    return DDPMPipeline(unet, scheduler)


def test_a_model_against_itself_is_the_same(pipeline: DDPMPipeline, images: np.ndarray) -> None:
    facts = evaluate(pipeline, against=pipeline, reference=images, drawing=QUICK, progress=False).facts
    assert facts["models"]["model"] == facts["models"]["against"] | {"name": facts["models"]["model"]["name"]}
    assert facts["compared"] == {
        "SSIM": pytest.approx(1),
        "SSIM_stderr": pytest.approx(0, abs=1e-6),
        "PSNR": None,
        "loss_difference": 0,
        "loss_difference_stderr": 0,
    }


def test_sizes_are_the_plans_and_psnr_is_the_equation(pipeline: DDPMPipeline, pruned: DDPMPipeline) -> None:
    facts = evaluate(pruned, against=pipeline, drawing=QUICK, progress=False).facts
    plan, models = pruned.unet.pruning_plan, facts["models"]
    assert (models["against"]["params"], models["model"]["params"]) == plan.params
    assert (models["against"]["MACs"], models["model"]["MACs"]) == plan.macs
    drawn = [
        np.stack([np.asarray(i) / 255 for i in sample_images(p, SamplingSettings(count=4, steps=2), progress=False)])
        for p in (pruned, pipeline)
    ]
    by_hand = -10 * math.log10(((drawn[0] - drawn[1]) ** 2).mean())
    assert facts["compared"]["PSNR"] == pytest.approx(by_hand, rel=1e-4)
    assert "loss" not in models["model"], "no images, no loss"


def test_the_loss_per_timestep_is_the_calibrations_curve(pipeline: DDPMPipeline, images: np.ndarray) -> None:
    sweep = Sweep(threshold=0.0, curve_samples=2, samples=1)
    curve = dp.calibrate(pipeline.unet, pipeline.scheduler, images, sweep, timesteps=20, progress=False)
    facts = evaluate(pipeline, reference=images, drawing=Drawing(count=0, loss_samples=2), progress=False).facts
    assert facts["timesteps"] == curve.timesteps.tolist()
    assert facts["models"]["model"]["loss_per_timestep"] == pytest.approx(curve.loss.tolist(), rel=1e-5)


def test_the_error_of_a_stratified_mean_leaves_out_the_spread_between_strata() -> None:
    values = np.random.default_rng(0).normal(np.arange(50.0)[:, None], 2.0, (50, 8))
    mean, error = stratified_mean(values)
    assert mean == pytest.approx(values.mean())
    assert error == pytest.approx(2 / math.sqrt(400), rel=0.1)


def test_distances_are_named_after_the_features_and_say_how_many_images_they_need(
    pipeline: DDPMPipeline, images: np.ndarray, tmp_path: Path
) -> None:
    features = load_features(write_network(tmp_path / "rows.onnx"))  # 16 features
    result = evaluate(pipeline, reference=images, features=features, drawing=QUICK, progress=False)
    for name, least in (("FD (rows)", 17), ("KD (rows)", 50)):
        assert result.facts["models"]["model"][name] is None
        assert f"| {name} | - |" in result.markdown()
        needs = f"needs at least {least} drawn and as many reference images, not 4 and 16"
        assert result.facts["not_measured"][name] == needs
        assert f"- {name}: {needs}." in result.markdown()
    assert "FID" not in result.markdown()
    assert "KID" not in result.markdown()


@pytest.mark.parametrize(
    "change", [{"prediction_type": "v_prediction"}, {"num_train_timesteps": 90}, {"beta_end": 0.03}]
)
def test_losses_of_models_that_were_trained_otherwise_are_not_compared(
    pipeline: DDPMPipeline, images: np.ndarray, change: dict[str, Any]
) -> None:
    other = DDPMPipeline(pipeline.unet, DDPMScheduler(**{"num_train_timesteps": 100, **change}))
    assert "SSIM" in evaluate(other, against=pipeline, drawing=QUICK, progress=False).facts["compared"]
    with pytest.raises(BadInput, match="their losses are not comparable; leave --reference out"):
        evaluate(other, against=pipeline, reference=images, drawing=QUICK, progress=False)


def test_pictures_in_colour_are_compared_in_grey_with_what_a_grey_model_draws(
    pipeline: DDPMPipeline, images: np.ndarray, tmp_path: Path
) -> None:
    """Their features too, as their losses are: a folder of the same pictures in colour gives what the array gives."""
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image[..., 0]).convert("RGB").save(tmp_path / "folder" / f"{i:02}.png")
    features = load_features(write_network(tmp_path / "rows.onnx", ("n", 1, "h", "w")))
    measured = [
        evaluate(pipeline, reference=source, features=features, drawing=QUICK, progress=False).facts["models"]
        for source in (images, str(tmp_path / "folder"))
    ]
    assert measured[0] == measured[1]


def test_of_very_many_reference_images_all_have_features_and_every_nth_a_loss(
    images: np.ndarray, dense_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any
) -> None:
    monkeypatch.setattr("diffprune_plugin.data.samples.LIMIT", 5)
    (tmp_path / "real").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image[..., 0]).resize((20, 24)).save(tmp_path / "real" / f"{number:02}.png")
    options = ["--reference", tmp_path / "real", "--resolution", 16, "--count", 2, "--steps", 1, "--json"]
    seen: list[int] = []
    monkeypatch.setattr(
        "diffprune_plugin.evaluation.evaluate.encode", lambda _, samples: seen.append(len(samples)) or samples
    )
    network = write_network(tmp_path / "rows.onnx")
    code, out, _ = run("evaluate", dense_dir, *options, "-o", tmp_path / "a", "--features", network)
    assert (code, json.loads(out)["reference"]["images"], seen) == (0, 16, [4])
    code, out, err = run("evaluate", dense_dir, *options, "-o", tmp_path / "b")
    assert (code, json.loads(out)["reference"]["images"], seen) == (0, 4, [4, 4])
    assert "4 of 16 images" in err


@pytest.mark.parametrize(("count", "real", "found"), [(50, 50, True), (49, 50, False), (50, 49, False)])
def test_the_kernel_distance_takes_fifty_images_of_each(
    pipeline: DDPMPipeline, images: np.ndarray, tmp_path: Path, count: int, real: int, found: bool
) -> None:
    features, many = load_features(write_network(tmp_path / "rows.onnx")), np.concatenate([images] * 4)[:real]
    drawing = Drawing(count=count, steps=1, loss_samples=2)
    facts = evaluate(pipeline, reference=many, features=features, drawing=drawing, progress=False).facts
    assert (facts["models"]["model"]["KD (rows)"] is not None) == found
    assert ("KD (rows)" in facts["not_measured"]) == (not found)
    assert facts["models"]["model"]["FD (rows)"] > 0


SCORES = "SSIM and PSNR to the dense model's images"
ALL_GIVEN = {"reference": True, "features": True, "against": True}


@pytest.mark.parametrize(
    ("given", "count", "missing"),
    [
        (
            {},
            2,
            {
                "loss per timestep": "give --reference IMAGES",
                SCORES: "give --against DENSE",
                "loss difference to the dense model": "give --against DENSE and --reference IMAGES",
                "distance to real images": "give --reference IMAGES and --features NETWORK",
            },
        ),
        (
            {"reference": True, "against": True},
            0,
            {SCORES: "give --count 1 or more", "distance to real images": "give --features NETWORK"},
        ),
        (ALL_GIVEN, 50, {}),
    ],
)
def test_the_report_says_what_was_not_measured_and_which_option_would(
    pipeline: DDPMPipeline, images: np.ndarray, tmp_path: Path, given: dict[str, bool], count: int, missing: Any
) -> None:
    sources = {
        "reference": np.concatenate([images] * 4),
        "features": load_features(write_network(tmp_path / "rows.onnx")),
        "against": pipeline,
    }
    drawing = Drawing(count=count, steps=1, loss_samples=2)
    result = evaluate(pipeline, **{key: sources[key] for key in given}, drawing=drawing, progress=False)
    assert result.facts["not_measured"] == missing
    listed = [line for line in result.markdown().splitlines() if line.startswith("- ")]
    assert listed == [f"- {what}: {why}." for what, why in missing.items()]
    assert ("## Not measured" in result.markdown()) == bool(missing)


def test_the_frechet_distance_is_that_of_the_drawn_images(
    pipeline: DDPMPipeline, images: np.ndarray, tmp_path: Path
) -> None:
    features, many = load_features(write_network(tmp_path / "rows.onnx")), np.concatenate([images, images[:4, ::-1]])
    drawing = Drawing(count=18, steps=2, loss_samples=2)
    facts = evaluate(pipeline, reference=many, features=features, drawing=drawing, progress=False).facts
    drawn = np.stack([np.asarray(image) for image in sample_images(pipeline, drawing, progress=False)])
    by_hand = frechet_distance(torch.from_numpy(many.mean(2)[:, :, 0] / 255), torch.from_numpy(drawn.mean(2) / 255))
    assert facts["models"]["model"]["FD (rows)"] == pytest.approx(by_hand, rel=1e-3)


def test_the_whole_way_on_the_command_line(run: Any, dense_dir: Path, npz: Path, tmp_path: Path) -> None:
    network, out = write_network(tmp_path / "rows.onnx"), tmp_path / "result"
    words = ["evaluate", dense_dir, "--against", dense_dir, "--reference", npz, "--features", network, "-o", out]
    quick = ["--count", 17, "--steps", 2, "--skip", "quad", "--loss-samples", 2]  # 16 features
    code, text, _ = run(*words, *quick)
    assert code == 0
    assert "SSIM 1.0000" in text
    assert "Reference: 16 images, SHA-256 " in text
    assert sorted(file.name for file in out.iterdir()) == [LIST_FILE, "evaluation.json", "report.md", "samples.png"]
    facts = json.loads((out / "evaluation.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert facts["not_measured"].keys() == {"FD (rows)", "KD (rows)"}
    assert "KD (rows): needs at least 50 drawn" in text
    assert run(*words, *quick)[0] == 2, "an existing result is kept"
    code, text, _ = run(*words, "--count", 0, "--loss-samples", 2, "--json", "--overwrite")
    assert code == 2, "no images, but features asked for"
    code, text, _ = run(
        "evaluate", dense_dir, "--reference", npz, "--count", 0, "--loss-samples", 2, "-o", out, "--json", "--overwrite"
    )
    assert json.loads(text)["models"]["model"]["loss"] > 0
    assert not (out / "samples.png").exists()


@pytest.mark.parametrize("place", [".", "..", "inside"])
def test_the_result_never_replaces_the_model(run: Any, dense_dir: Path, place: str) -> None:
    before = sorted(dense_dir.rglob("*"))
    code, _, err = run("evaluate", dense_dir, "-o", dense_dir / place, "--count", 0, "--overwrite")
    assert code == 2
    assert "choose another output" in err
    assert sorted(dense_dir.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--features", "rows.onnx"], "--features needs --reference"),
        (["--resolution", 16], "is of real images, and there are none"),
        (["--features", "none.onnx", "--reference", "images.npz"], "none.onnx: no such file"),
        (["--features", "rows.onnx", "--reference", "images.npz", "--count", 0], "--count 0 draws no images"),
        (["--reference", "wide.npz"], "the UNet takes (1, 16, 16)"),
        (["--reference", "nowhere"], "no such folder"),
        (["--against", "nowhere"], "no model_index.json"),
        (["--against", "larger"], "its samples are (1, 32, 32), the model's (1, 16, 16)"),
        (["--features", "eight.onnx", "--reference", "images.npz"], "takes ['n', 1, 8, 8], the images are"),
        (["--device", "cuda"], "torch sees no GPU"),
        (["--scheduler", "dimm"], "did you mean 'ddim'"),
    ],
)
def test_what_cannot_be_measured_is_one_line_and_leaves_nothing(
    run: Any,
    dense_dir: Path,
    npz: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_network(tmp_path / "rows.onnx")
    write_network(tmp_path / "eight.onnx", ("n", 1, 8, 8))
    np.savez(tmp_path / "wide.npz", images=np.zeros((8, 16, 32, 1), np.uint8))
    if "larger" in words:
        dp.save(DDPMPipeline(make_unet(sample_size=32), DDPMScheduler(100)), tmp_path / "larger")
    code, _, err = run("evaluate", dense_dir, "-o", tmp_path / "out", "--steps", 2, "--count", 4, *words)
    assert code == (3 if "--device" in words else 2)
    assert message in err
    assert "sampling" not in err, "it is found out before anything is drawn"
    assert len(err.strip().splitlines()) == 1 or "loss curve" in err
    assert not (tmp_path / "out").exists()


def test_without_torchmetrics_it_says_what_to_install(
    run: Any, dense_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    code, _, err = run("evaluate", dense_dir, "-o", dense_dir.parent / "out")
    assert code == 2
    assert "diffprune-plugin[eval]" in err


def test_the_digit_classifier_is_the_one_described_and_tells_digits_from_noise() -> None:
    facts = json.loads(CLASSIFIER.with_suffix(".json").read_text())
    assert facts["sha256"] == hashlib.sha256(CLASSIFIER.read_bytes()).hexdigest()
    assert CLASSIFIER.stat().st_size < 1_000_000
    features = load_features(CLASSIFIER)
    digits = load_npz(demo.HELD_OUT_IMAGES).values.permute(0, 3, 1, 2)
    one, other = features.of(digits[::2], 50), features.of(digits[1::2], 50)
    noisy = digits[1::2].flip(3)
    assert one.shape == (250, 64)
    assert features.frechet == "FD (digits_classifier)"
    assert frechet_distance(one, other) < frechet_distance(one, features.of(noisy, 50)) / 3, "mirrored digits"


def test_a_small_error_is_shown_to_two_digits_and_its_value_as_far() -> None:
    assert with_error({"x": 3.24e-5, "x_stderr": 9.1e-6}, "x") == "0.0000324 ± 0.0000091"
    assert with_error({"x": 0.25, "x_stderr": 0.0123}, "x") == "0.2500 ± 0.0123"
    assert with_error({"x": 0.0, "x_stderr": 0.0}, "x") == "0.0000 ± 0.0000"


def test_the_likeness_is_that_of_all_images_however_many_at_a_time(
    pipeline: DDPMPipeline, pruned: DDPMPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, update = [], torchmetrics.image.StructuralSimilarityIndexMeasure.update
    monkeypatch.setattr(
        torchmetrics.image.StructuralSimilarityIndexMeasure,
        "update",
        lambda self, *pair: (sizes.append(len(pair[0])), update(self, *pair))[1],
    )
    found = [
        evaluate(pruned, against=pipeline, drawing=replace(QUICK, batch_size=size), progress=False).facts["compared"]
        for size in (3, 4)
    ]
    assert sizes == [3, 1, 4]
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_two_models_of_one_name_are_told_apart(pipeline: DDPMPipeline) -> None:
    found = evaluate(pipeline, against=pipeline, drawing=Drawing(count=2, steps=2), progress=False)
    assert len(found.rows) == 2


def test_images_too_small_for_the_window_of_ssim_are_refused_in_a_line(pipeline: DDPMPipeline) -> None:
    small = [Image.new("L", (5, 8))] * 2
    measured = Measured("small", "", 1, 1, None, small)
    with pytest.raises(BadInput, match="SSIM needs images of 6 pixels a side, these have 8 x 5"):
        compare(measured, measured, 2)
