"""Whole pipelines as directories of ONNX files: layout, proofs, and diffusers' own pipeline over ONNX Runtime."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DiffusionPipeline,
    DiTPipeline,
    EulerDiscreteScheduler,
    LDMSuperResolutionPipeline,
    VQModel,
)
from PIL import Image
from tiny import make_unet as unconditional
from tiny_pipelines import LETTERS, PIPELINES, autoencoder
from tiny_transformers import make

import diffprune_plugin as dp
from diffprune_plugin.errors import BadInput, CheckFailed, HardwareUnproved
from diffprune_plugin.export import (
    ORTPipeline,
    ORTUNet,
    cli,
    drawing,
    integrity,
    pipeline,
    pipeline_latency,
    pipeline_workflow,
)
from diffprune_plugin.export.benchmark import Latency, Row
from diffprune_plugin.export.convert import ExportReport
from diffprune_plugin.export.options import Options
from diffprune_plugin.export.pipeline_workflow import run_pipeline
from diffprune_plugin.pruning.card import verdict_lines
from diffprune_plugin.pruning.directory import read_json

QUICK = Options(steps=3, latency=False)


def exit_code(*words: object) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in words])
    return int(stop.value.code or 0)


def images(pipe: Any, **given: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    return np.asarray(pipe(generator=generator, num_inference_steps=3, output_type="np", **given).images)


def differing(found: np.ndarray, expected: np.ndarray) -> float:
    """The share of 8-bit values that differ, but for those that lie between two grey levels, where 1e-5 decides."""
    between = np.abs(expected * 255 % 1 - 0.5) < 255e-5
    return float(np.mean(~between & (np.round(found * 255) != np.round(expected * 255))))


@pytest.fixture
def exported(models: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The UNet's export itself replaced by a copy of the file that is there."""

    def copy_instead(model: object, path: Path, **_: object) -> ExportReport:
        with integrity.new_model(path) as temporary:
            shutil.copy(models.pruned_onnx, temporary)
        return ExportReport(path, integrity.read_manifest(path)["files"], 1, 0.0, integrity.read_provenance(path))

    monkeypatch.setattr(pipeline, "to_onnx", copy_instead)
    return models.pruned


def test_a_directory_holds_the_pipeline_and_draws_pytorchs_images(
    exported: Path, opened: Any, tmp_path: Path, capsys: Any
) -> None:
    output, report = tmp_path / "onnx", tmp_path / "report.html"
    assert exit_code(output, "--model", exported, "--steps", 3, "--no-bench", "--report", report) == 0
    printed = capsys.readouterr().out
    assert "the whole pipeline draws what PyTorch does: 3 images of 3 steps" in printed
    assert "load it with: from diffprune_plugin.export import ORTPipeline" in printed
    found = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    assert {"model_index.json", "README.md", "unet/model.onnx", "unet/config.json"} <= found
    assert json.loads((output / "model_index.json").read_text())["unet"] == ["diffusers", "UNet2DModel"]
    verdict = json.loads((tmp_path / "onnx.verdict.json").read_text())
    assert verdict["passed"]
    assert verdict["images"]["tolerance"] == drawing.TOLERANCES["fp32"]
    assert str(tmp_path) not in json.dumps(verdict)
    assert "images: largest difference of a pixel" in (output / "README.md").read_text()
    page = opened(report)
    assert "<h1>onnx: passed</h1>" in page
    assert f"<td>{verdict['parts']['unet']['verify']['worst']['relative']:.1e}</td>" in page
    assert page.count("<img") == 1  # PyTorch's images above ONNX Runtime's
    with pytest.raises(BadInput, match="save_pretrained: would write no models, which are ONNX"):
        ORTPipeline(output).save_pretrained(tmp_path / "saved")
    assert str(tmp_path) not in page
    lean = ORTPipeline(output, arena=False)
    assert not lean.unet.session.session.get_session_options().enable_cpu_mem_arena
    plain = DDPMPipeline.from_pretrained(exported)
    drawn = [images(pipe, batch_size=2) for pipe in (ORTPipeline(output), plain, lean)]
    assert differing(*drawn[:2]) == 0
    assert np.array_equal(drawn[0], drawn[2])
    assert differing(drawn[0] + 1 / 255, drawn[1]) > 0.9


def test_an_overwriting_export_that_fails_leaves_the_earlier_one_and_its_verdict(
    models: Any, exported: Path, tmp_path: Path
) -> None:
    output, words = tmp_path / "onnx", ("--steps", 2, "--no-bench")
    assert exit_code(output, "--model", exported, *words) == 0
    assert exit_code(output, "--model", models.dense, *words, "--overwrite") == 1
    assert json.loads((tmp_path / "onnx.verdict.json").read_text())["passed"]
    assert not json.loads((tmp_path / "onnx.rejected.verdict.json").read_text())["passed"]
    assert ORTPipeline(output)


def test_a_card_tells_of_the_gate_and_an_earlier_verdict_goes_with_its_directory(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, words, elsewhere = tmp_path / "onnx", ("--steps", 2, "--no-verify"), tmp_path / "elsewhere.json"

    def timed(verdict: Any, *_: Any) -> None:
        verdict.latency = Latency("cpu", "fp32", 1, 5)

    def misses(*_: Any) -> None:
        raise CheckFailed("too slow")

    real = pipeline_workflow.gate
    monkeypatch.setattr(pipeline_workflow, "time_both", timed)
    monkeypatch.setattr(pipeline_workflow, "gate", misses)
    assert exit_code(output, "--model", exported, *words) == 1
    assert "it did NOT hold: too slow" in (output / "README.md").read_text()
    assert json.loads((tmp_path / "onnx.verdict.json").read_text())["failure"] == "too slow"
    monkeypatch.setattr(pipeline_workflow, "gate", real)
    assert exit_code(output, "--model", exported, *words, "--overwrite", "--json", elsewhere) == 0
    assert "it held" in (output / "README.md").read_text()
    assert not list(tmp_path.glob("onnx.*"))
    assert json.loads(elsewhere.read_text())["passed"]


def test_pytorchs_images_are_those_before_a_safety_checker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pipe = PIPELINES["stable diffusion"][0](tmp_path)
    pipe.safety_checker = lambda images, **_: (0 * images, [True] * len(images))
    monkeypatch.setattr(pipeline_workflow, "load_pipeline", lambda _: pipe)
    drawn, _ = pipeline_workflow.pytorch_images(tmp_path, Options(steps=2))
    assert all(np.any(images) for images in drawn.values())


def test_a_pipeline_with_another_models_file_fails_and_leaves_no_directory(
    models: Any, exported: Path, opened: Any, tmp_path: Path, capsys: Any
) -> None:
    words = ("--model", models.dense, "--steps", 2, "--no-bench", "--report", tmp_path / "report.html")
    assert exit_code(tmp_path / "onnx", *words) == 1
    assert "unet/model.onnx does not compute what PyTorch does" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["onnx.verdict.json", "report.html"]
    verdict = json.loads((tmp_path / "onnx.verdict.json").read_text())
    assert not verdict["passed"]
    assert not verdict["parts"]["unet"]["verify"]["passed"]
    page = opened(tmp_path / "report.html")
    assert "<h1>onnx: FAILED</h1>" in page
    assert "<td><strong>missed</strong></td>" in page


def test_images_that_are_not_pytorchs_fail_though_every_part_held(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Planted: the client draws with a scheduler of its own."""
    real = pipeline_workflow.ORTPipeline

    def with_another(*words: Any, **given: Any) -> Any:
        pipe = real(*words, **given)
        pipe.scheduler.register_to_config(beta_end=0.5)
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        return pipe

    monkeypatch.setattr(pipeline_workflow, "ORTPipeline", with_another)
    assert exit_code(tmp_path / "onnx", "--model", exported, "--steps", 2, "--no-bench") == 1
    assert "the pipeline does not draw what PyTorch does: 3 images of 2 steps" in capsys.readouterr().err
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_images_that_are_not_finite_fail_in_one_line_at_whichever_batch(
    exported: Path, opened: Any, batch: int, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Planted: one pixel of what ONNX Runtime draws at one batch size."""
    real = pipeline_workflow.draw

    def damaged(pipe: Any, size: int, steps: int) -> Any:
        found = real(pipe, size, steps)
        if size == batch and isinstance(pipe.unet, ORTUNet):
            found[-1, 0, 0] = value
        return found

    monkeypatch.setattr(pipeline_workflow, "draw", damaged)
    report = tmp_path / "report.html"
    words = ("--model", exported, "--steps", 2, "--no-bench", "--report", report)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # more than the one line
        assert exit_code(tmp_path / "onnx", *words) == 1
    told = "3 images of 2 steps: largest difference of a pixel not finite, allowed"
    assert f"the pipeline does not draw what PyTorch does: {told}" in capsys.readouterr().err
    assert told in opened(report)
    verdict = read_json(tmp_path / "onnx.verdict.json")
    assert (verdict["passed"], verdict["images"]["passed"], verdict["images"]["difference"]) == (False, False, None)
    assert any("largest difference of a pixel not finite" in line for line in verdict_lines(verdict))


def test_a_damaged_directory_is_refused_by_the_file(exported: Path, tmp_path: Path) -> None:
    run_pipeline(exported, tmp_path / "onnx", QUICK)
    for name in ("scheduler/scheduler_config.json", "unet/model.onnx"):
        shutil.copytree(tmp_path / "onnx", tmp_path / "damaged")
        content = bytearray((tmp_path / "damaged" / name).read_bytes())
        content[-2] ^= 1
        (tmp_path / "damaged" / name).write_bytes(content)
        with pytest.raises(BadInput, match=rf"{name.rpartition('/')[2]}: its SHA-256 is not"):
            ORTPipeline(tmp_path / "damaged")
        shutil.rmtree(tmp_path / "damaged")
    with pytest.raises(BadInput, match=r"no model_index\.json"):
        ORTPipeline(tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["out", "--model", "pruned/unet"], "a directory of ONNX files needs a pipeline, a model a name in .onnx"),
        (["."], "is the working directory or above it"),
        (["pruned/onnx", "--model", "pruned"], "lie inside each other"),
        (["there", "--model", "pruned"], "there exists; use --overwrite"),
        (["there", "--model", "pruned", "--overwrite"], "there holds other files"),
    ],
)
def test_bad_input_exits_with_2_before_any_work(
    models: Any, words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models.pruned, "pruned")
    Path("there").mkdir()
    Path("there/notes.txt").touch()
    assert exit_code(*words) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pruned", "there"]


def test_guidance_needs_an_open_batch_and_a_class_without_a_row_is_named(tmp_path: Path) -> None:
    dp.save(PIPELINES["stable diffusion"][0](tmp_path / "tokenizer"), tmp_path / "sd")
    with pytest.raises(BadInput, match="guidance doubles the batch; leave batch among them"):
        pipeline.check_pipeline(tmp_path / "sd", Options(dynamic=("height",)))
    index = tmp_path / "sd" / "model_index.json"
    index.write_text(index.read_text().replace("AutoencoderKL", "AutoencoderTiny"))
    with pytest.raises(BadInput, match="vae: a AutoencoderTiny cannot be exported, only AutoencoderKL"):
        pipeline.check_pipeline(tmp_path / "sd", Options())


def test_markdown_and_plot_hold_the_denoisers_latency_and_the_pipelines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, whole = (
        Latency("cpu", "fp32", 1, 5, [Row("cpu", "pruned", 1, 5, ms, ms, ms, ms, 3)], per=per)
        for ms, per in ((1.25, "forward"), (98.75, "image"))
    )

    def ran(*given: Any) -> None:
        given[-1](alone)
        given[-1](whole)

    heights = []
    for number, show in enumerate((ran, lambda *given: given[-1](whole))):
        monkeypatch.setattr(pipeline_workflow, "run_pipeline", show)
        text, picture = tmp_path / f"{number}.md", tmp_path / f"{number}.png"
        assert exit_code("onnx", "--model", "m", "--markdown", text, "--plot", picture) == 0
        heights.append(Image.open(picture).height)
    both = (tmp_path / "0.md").read_text()
    assert both.index("## One pass of the denoiser") < both.index("| 1.25 |") < both.index("## A whole image")
    assert "| 98.75 |" in both
    assert "##" not in (tmp_path / "1.md").read_text()
    assert heights[0] > 1.9 * heights[1]


def test_pytorch_beside_a_pipeline_is_refused_before_any_work(models: Any, tmp_path: Path, capsys: Any) -> None:
    assert exit_code(tmp_path / "onnx", "--model", models.pruned, "--torch") == 2
    assert "--torch: PyTorch is timed beside one file, not a pipeline" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_decoder_that_overflows_in_fp16_is_found_by_its_config_or_by_trying() -> None:
    side = (8, 8)
    assert not pipeline.overflows(autoencoder(force_upcast=False), side)
    assert pipeline.overflows(autoencoder(force_upcast=True), side)
    large = autoencoder(force_upcast=False)
    with torch.no_grad():
        large.decoder.conv_in.weight.mul_(1e5)
    assert pipeline.overflows(large, side)


def test_a_scheduler_between_whole_timesteps_gets_a_timestep_of_reals(models: Any, tmp_path: Path) -> None:
    place = tmp_path / "pruned"
    shutil.copytree(models.pruned, place)
    assert pipeline.timestep_kind(place, Options(), print) == "int64"
    index = place / "model_index.json"
    index.write_text(index.read_text().replace("DDPMScheduler", "EulerDiscreteScheduler"))
    EulerDiscreteScheduler(timestep_spacing="linspace").save_pretrained(place / "scheduler")
    said: list[str] = []
    assert pipeline.timestep_kind(place, Options(), said.append) == "float32"
    assert said == ["timestep: float32, since the pipeline's scheduler steps between whole ones"]


def test_a_tokenizer_as_transformers_5_writes_it_gets_the_files_that_transformers_4_reads(tmp_path: Path) -> None:
    vocabulary = {letter: number for number, letter in enumerate(LETTERS)}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [["a", "b"], ["c", "d"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    pipeline.add_vocabulary(tmp_path)
    assert json.loads((tmp_path / "vocab.json").read_text()) == vocabulary
    assert (tmp_path / "merges.txt").read_text() == "#version: 0.2\na b\nc d\n"


def test_a_provider_asked_for_is_proved_of_every_part_without_timing_too(
    opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    dit = DiTPipeline(make("DiT", num_layers=1, num_embeds_ada_norm=1000), autoencoder(), DDIMScheduler())
    dp.save(dit, tmp_path / "dit")
    report = tmp_path / "report.html"
    words = ("--model", tmp_path / "dit", "--provider", "cpu", "--no-bench", "--no-verify", "--report", report)
    assert exit_code(tmp_path / "onnx", *words) == 0
    parts = ["transformer", "vae_decoder", "vae_encoder"]
    assert f"proved on cpu, each part whole: {', '.join(parts)}" in capsys.readouterr().out
    placements = json.loads((tmp_path / "onnx.verdict.json").read_text())["placements"]
    assert sorted(placements) == parts
    assert all(placement["proved"] and len(placement["proofs"]) == 5 for placement in placements.values())
    assert "vae_decoder: what was seen" in opened(report)
    real = pipeline_latency.prove

    def partial(path: Path, *rest: Any) -> Any:
        if path.parent.name == "vae_decoder":
            raise HardwareUnproved("cpu is not proved: PARTIAL")
        return real(path, *rest)

    monkeypatch.setattr(pipeline_latency, "prove", partial)
    found: dict[str, Any] = {}
    with pytest.raises(HardwareUnproved, match=r"^vae_decoder/model\.onnx: cpu is not proved: PARTIAL"):
        pipeline_latency.prove_parts(tmp_path / "onnx", Options(provider="cpu"), found)
    assert list(found) == ["transformer"]


def test_a_pipeline_that_is_not_timed_keeps_its_directory_and_its_denoisers_latency(
    opened: Any, tmp_path: Path, capsys: Any
) -> None:
    unet = unconditional(in_channels=6, out_channels=3)
    vqvae = autoencoder(VQModel, num_vq_embeddings=16, latent_channels=3)
    dp.save(LDMSuperResolutionPipeline(vqvae, unet, DDIMScheduler()), tmp_path / "larger")
    words = (tmp_path / "onnx", "--model", tmp_path / "larger", "--rounds", 5, "--no-verify")
    why = "LDMSuperResolutionPipeline draws from image"
    assert exit_code(*words, "--max-latency-ms", 1.1) == 2
    refused = f"--min-speedup, --max-latency-ms: no image of {tmp_path / 'larger'} is timed: {why}"
    assert refused in capsys.readouterr().err
    assert exit_code(*words, "--report", tmp_path / "report.html", "--check-placement", "cuda") == 0
    told = f"the whole pipeline is not timed: {why}"
    printed = capsys.readouterr().out
    assert told in printed
    assert "cuda: 0 nodes without a kernel" in printed
    assert json.loads((tmp_path / "onnx.verdict.json").read_text())["placement_check"] == []
    latency = json.loads((tmp_path / "onnx.verdict.json").read_text())["latency"]
    assert latency["denoiser"]["rows"][0]["p50"] > 0
    assert latency["pipeline"] == told
    card = (tmp_path / "onnx" / "README.md").read_text()
    assert "the denoiser alone, cpu, batch 1" in card
    assert told in card
    page = opened(tmp_path / "report.html")
    assert "One pass of the denoiser" in page
    assert told in page


@pytest.mark.slow
def test_captions_of_other_than_77_tokens_leave_the_sequence_open_and_draw_the_same(tmp_path: Path) -> None:
    pipe = PIPELINES["stable diffusion"][0](tmp_path / "tokenizer")
    pipe.tokenizer.model_max_length = 16
    dp.save(pipe, tmp_path / "dense")
    dp.remove_(pipe.unet, dp.make_plan(pipe.unet, "magnitude", pruning_ratio=0.3))
    dp.save(pipe, tmp_path / "pruned")
    options = Options(steps=3, rounds=5, baseline=tmp_path / "dense")
    verdict = run_pipeline(tmp_path / "pruned", tmp_path / "onnx", options)
    assert set(verdict.content["latency"]["shares"]) == {"dense", "pruned"}
    prompts = {"prompt": ["a bar", "nothing"], "guidance_scale": 7.5}
    expected = images(DiffusionPipeline.from_pretrained(tmp_path / "pruned"), **prompts)
    assert differing(images(ORTPipeline(tmp_path / "onnx"), **prompts), expected) == 0


def test_the_sequence_stays_as_asked_where_captions_have_77_tokens(tmp_path: Path) -> None:
    dp.save(PIPELINES["stable diffusion"][0](tmp_path / "tokenizer"), tmp_path / "sd")
    assert pipeline.open_axes(tmp_path / "sd", Options(), pytest.fail) == ("batch",)
    config = tmp_path / "sd" / "tokenizer" / "tokenizer_config.json"
    config.write_text(config.read_text().replace("77", "20"))
    said: list[str] = []
    assert pipeline.open_axes(tmp_path / "sd", Options(), said.append) == ("batch", "sequence")
    assert said == ["sequence: left open, since captions have 20 tokens and not 77"]
    assert pipeline.open_axes(tmp_path / "sd", Options(dynamic=("batch", "sequence")), pytest.fail)[1] == "sequence"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["stable diffusion", "stable diffusion xl", "latent diffusion"])
def test_every_family_draws_the_same_uint8_images_through_ortpipeline(family: str, opened: Any, tmp_path: Path) -> None:
    pipe = PIPELINES[family][0](tmp_path / "tokenizer")
    dp.remove_(pipe.unet, dp.make_plan(pipe.unet, "magnitude", pruning_ratio=0.3))
    dp.save(pipe, tmp_path / "pruned")
    latency = family == "stable diffusion"
    options = Options(steps=3, latency=latency, rounds=5, report=tmp_path / "report.html")
    verdict = run_pipeline(tmp_path / "pruned", tmp_path / "onnx", options)
    assert verdict.content["images"]["difference"] < 1e-5
    print(family, verdict.content["images"])
    prompts = {"prompt": ["a bar", "nothing"], "guidance_scale": 7.5}
    expected = images(DiffusionPipeline.from_pretrained(tmp_path / "pruned"), **prompts)
    assert differing(images(ORTPipeline(tmp_path / "onnx"), **prompts), expected) == 0
    if latency:
        shares = verdict.content["latency"]["shares"]
        assert set(shares) == {"dense", "pruned"}
        assert {"unet", "text_encoder", "vae_decoder"} <= set(shares["pruned"])
        assert sum(shares["pruned"].values()) == pytest.approx(1)
        page = opened(tmp_path / "report.html")
        assert f"<td>vae_decoder</td>\n<td>{shares['dense']['vae_decoder']:.1%}</td>" in page
        assert "<h2>An image of 3 steps</h2>" in page


@pytest.mark.slow
def test_fp16_keeps_the_decoder_of_sdxl_in_fp32(tmp_path: Path) -> None:
    pipe = PIPELINES["stable diffusion xl"][0](tmp_path / "tokenizer")
    pipe.vae.register_to_config(force_upcast=True)
    dp.save(pipe, tmp_path / "dense")
    said: list[str] = []
    run_pipeline(tmp_path / "dense", tmp_path / "onnx", Options(steps=2, latency=False, dtype="fp16"), said.append)
    assert "vae_decoder: kept in fp32, since it overflows in fp16" in said
    kinds = {path.parent.name: integrity.read_provenance(path)["dtype"] for path in tmp_path.glob("onnx/*/model.onnx")}
    assert {name for name, kind in kinds.items() if kind == "fp32"} == {"vae_decoder", "vae_encoder"}
    vae = ORTPipeline(tmp_path / "onnx").vae
    assert vae.to(dtype=torch.float32).to(torch.float16) is vae, "diffusers upcasts it to encode, and back"
    with pytest.raises(BadInput, match=r"runs as torch\.float32 on CPUExecutionProvider"):
        vae.to("cuda")
