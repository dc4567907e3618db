"""What the benchmarks stand on: results that survive an interruption, and the figures of their tables."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DiTPipeline
from tiny import make_unet
from tiny_transformers import make

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from shared import results as common

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    yield common
    common.processes(1).shutdown()
    common.processes.cache_clear()


def test_every_suite_is_a_command_and_what_it_imports_is_there(call: Any) -> None:
    shown = call(sys.executable, BENCHMARKS / "bench.py", "--help", cwd=BENCHMARKS.parent)
    modules = {
        file.stem.replace("_", "-") for room in ("quality", "size") for file in (BENCHMARKS / room).glob("[a-z]*.py")
    }
    assert {name for name in modules if f" {name} " in shown} == modules


def test_what_was_measured_before_a_failure_is_not_measured_again(common: Any) -> None:
    common.Store("roots", "facts").fill({"four": partial(math.sqrt, 4)}, 1)
    with pytest.raises(ValueError, match="math domain"):
        common.Store("roots", "facts").fill({"four": partial(math.sqrt, -4), "bad": partial(math.sqrt, -1)}, 1)
    common.processes.cache_clear()
    store = common.Store("roots", "facts")
    store.fill({"four": partial(math.sqrt, -4), "nine": partial(math.sqrt, 9)}, 1)
    assert store.values == common.Store("roots", "facts").values == {"four": 2.0, "nine": 3.0}
    assert common.Store("roots", "other facts").values == {}


def test_standard_error_and_paired_t_test_are_those_of_the_books(common: Any) -> None:
    first, second = [0.21, 0.25, 0.19, 0.30], [0.20, 0.21, 0.18, 0.22]
    difference = np.subtract(first, second)
    spread = math.sqrt(sum((x - difference.mean()) ** 2 for x in difference) / 3)
    t = difference.mean() / (spread / math.sqrt(4))
    assert common.standard_error(difference) == pytest.approx(spread / 2)
    # Student's distribution with 3 degrees of freedom in closed form.
    angle = math.atan(t / math.sqrt(3))
    assert common.paired_p(first, second) == pytest.approx(
        1 - 2 / math.pi * (angle + math.sin(angle) * math.cos(angle))
    )
    assert common.mean([0.5]) == "0.5000"
    assert common.mean([0.5, 0.7], 2) == "0.60 ± 0.10"
    assert common.p_text(common.paired_p(first, first)) == ""
    assert common.p_text(2e-4) == "< 0.001"


def test_holms_p_are_those_of_the_textbook_step_down(common: Any) -> None:
    # By hand: 0.005 x 4, 0.011 x 3, 0.02 x 2, and the last not below them.
    assert common.holm([0.02, 0.005, 0.03, 0.011]) == pytest.approx([0.04, 0.02, 0.04, 0.033])
    assert common.holm([0.6, 0.5]) == [1.0, 1.0]
    found = common.holm([math.nan, 0.02])
    assert math.isnan(found[0])
    assert found[1] == 0.02


@pytest.mark.parametrize("document", ["README.md", "docs/figures.md"])
def test_documents_show_the_results_that_are_stored(document: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from shared import results as common

    text = (BENCHMARKS.parent / document).read_text()
    for name in re.findall(r"<!-- benchmarks/results/(\w+\.md) -->", text):
        assert (common.RESULTS / name).exists()
    assert common.with_results(text) == text
    blocks = text.count("<!-- benchmarks/results/")
    assert blocks == text.count("<!-- end -->") > 0
    assert common.with_results(text.replace("| taylor |", "| tailor |")) == text


def test_a_table_that_is_printed_is_renewed_where_it_is_shown(common: Any, monkeypatch, tmp_path, capsys) -> None:
    document = tmp_path / "README.md"
    other = "<!-- benchmarks/results/two.md -->\nstays\n<!-- end -->\n"
    empty = "<!-- benchmarks/results/one.md -->\n<!-- end -->\n"
    document.write_text(f"before\n<!-- benchmarks/results/one.md -->\nold\n<!-- end -->\nafter\n{empty}{other}")
    monkeypatch.setattr(common, "DOCUMENTS", (document,))
    common.publish("one", ["new", "lines"])
    assert capsys.readouterr().out == "new\nlines\n\n"
    new = "<!-- benchmarks/results/one.md -->\nnew\nlines\n<!-- end -->\n"
    assert document.read_text() == f"before\n{new}after\n{new}{other}"


def test_a_table_is_github_markdown(common: Any) -> None:
    assert common.table(["a", "b"], [["1", "2"]]) == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]


def test_a_part_that_no_time_was_left_for_stands_in_the_report(common: Any, monkeypatch, tmp_path) -> None:
    from shared import gpu_report
    from size import gpu

    monkeypatch.setattr(gpu_report, "RESULTS", tmp_path)
    row = gpu.in_process("plan/embedded", gpu.Place("cpu", True), 1)
    gpu_report.report("tried", "cpu", {"plan/embedded": row})
    assert "| plan/embedded | NO | 0 | no time left |" in (tmp_path / "tried.md").read_text()


@pytest.mark.slow
def test_without_a_gpu_its_suites_end_with_a_line_that_says_what_is_missing() -> None:
    done = subprocess.run([sys.executable, BENCHMARKS / "bench.py", "gpu"], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1].startswith("gpu: cuda: ")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from size import gpu

    return gpu


def test_what_was_timed_before_fusing_failed_is_kept_with_the_reason(gpu: Any, monkeypatch: Any) -> None:
    class Model:
        def cpu(self) -> Any:
            return self

    def failing(*_: Any) -> Any:
        raise RuntimeError("no kernel for BiasSplitGelu")

    monkeypatch.setattr(gpu, "files", lambda *_, **__: (Model(), Model(), 0.5))
    monkeypatch.setattr(gpu, "on_device", lambda *_: {})
    monkeypatch.setattr(gpu, "timed", lambda place, case, paths, spec, eager=None: {"spec": spec})
    monkeypatch.setattr(gpu, "written", failing)
    found = gpu.latency(gpu.Place("cuda", False), gpu.Case("sd15", 0.3, "fp16", (1,), {}))
    assert not found["passed"]
    assert "no kernel for BiasSplitGelu" in found["why"]
    specs = ["cuda", "cuda:prefer_nhwc=1", "cuda:enable_cuda_graph=1", "cuda:enable_cuda_graph=1,prefer_nhwc=1"]
    assert list(found["measured"]) == [*specs, "compiled"]


def test_a_size_on_a_gpu_says_what_memory_it_took_there(gpu: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(
        gpu.scale, "KINDS", {"plan": (lambda name: {"seconds": 1.0, "on": gpu.scale.DEVICE}, ("sd15",))}
    )
    monkeypatch.setattr(gpu.scale, "DEVICE", "cpu")
    monkeypatch.setattr(gpu.torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    row = gpu.sizes(gpu.Place("cuda", False), "plan", "sd15")
    assert row == {"seconds": 1.0, "on": "cuda", "GPU memory, GiB": 3.0, "passed": True}
    assert "GPU memory, GiB" not in gpu.sizes(gpu.Place("cpu", False), "plan", "sd15")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["allocation", "--ways", "linear,optimal"], "'optimal' is none of uniform, global_pruning,"),
        (["finetuned", "--ways", "uniform;optimal"], "'optimal' is none of uniform; linear;"),
        (["allocation", "--budgets", "0.4,half"], "'half' is no number above 0 and below 1"),
        (["rivals", "--ratios", "36"], "'36' is no number above 0 and below 1"),
        (["thresholds", "--thresholds", "0,0.02"], "0.05 is compared with: add it to 0,0.02"),
        (["scale", "--only", "speed"], "'speed' is none of plan, ratios,"),
        (["criteria", "--seeds", "0"], "Invalid value for '--seeds'"),
    ],
)
def test_a_word_that_a_suite_does_not_know_is_one_line_and_exit_code_2(arguments, told, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench
    from typer.testing import CliRunner

    done = CliRunner().invoke(bench.app, arguments)
    assert done.exit_code == 2
    assert told in " ".join(done.output.replace("│", " ").split())


def test_a_fine_tune_of_another_recipe_is_another_model_and_one_that_is_there_is_not_made_again(
    monkeypatch, tmp_path
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from shared import embedded

    made = list[Any]()

    def finetune(config: Any, progress: bool) -> None:
        made.append(config.learning_rate)
        Path(config.output).mkdir(parents=True)

    monkeypatch.setattr(embedded, "finetune", finetune)
    of = SimpleNamespace(work=tmp_path, train=lambda: tmp_path / "digits.npz")
    rates = (1e-3, 5e-4, 1e-3)
    places = [embedded.tuned("small", tmp_path, 0, of, steps=2, learning_rate=rate) for rate in rates]
    assert places[0] == places[2] != places[1]
    assert made == [1e-3, 5e-4]


def test_the_sensitivity_of_a_subject_is_that_of_its_denoiser_whatever_it_is_called(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from shared import embedded

    asked = list[Any]()
    monkeypatch.setattr(embedded, "measure_sensitivity", lambda model, *_, **__: asked.append(model))
    pipelines = [DiTPipeline(make("DiT"), None, DDIMScheduler()), DDPMPipeline(make_unet(), DDIMScheduler())]
    for pipeline in pipelines:
        monkeypatch.setattr(embedded, "dense", lambda _, pipeline=pipeline: pipeline)
        embedded.sensitivity.__wrapped__(0, 1, SimpleNamespace(calibration=""))
    assert asked == [pipelines[0].transformer, pipelines[1].unet]


def test_an_image_is_what_was_asked_where_the_classifier_says_so(tmp_path, monkeypatch) -> None:
    """Of images twice as large as the real ones, by a classifier that tells white (0) from black (1)."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from dataclasses import replace

    from shared import embedded
    from shared.subject import DIGITS

    class Brightness(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            light = image.mean((1, 2, 3))[:, None]
            return light, torch.cat([light, 1 - light], 1)

    names = {"input_names": ["image"], "output_names": ["features", "logits"]}
    shapes = {"dynamo": True, "dynamic_shapes": ({0: "batch"},), "verbose": False}
    torch.onnx.export(Brightness().eval(), (torch.rand(2, 1, 32, 32),), tmp_path / "net.onnx", **names, **shapes)
    of = replace(DIGITS, features=tmp_path / "net.onnx", classes=2)
    images = torch.tensor([1.0, 0, 1, 0]).reshape(4, 1, 1, 1).expand(-1, -1, 64, 64)
    assert embedded.recognised(images, of) == 1
    assert embedded.recognised(images.roll(1, 0), of) == 0
    assert embedded.recognised(images[:1].expand(4, -1, -1, -1), of) == 0.5


def test_a_caption_says_what_it_is_its_name_and_the_tones_of_skin(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from making.emoji import caption_of

    assert caption_of({"name": "CAT FACE"}, "animals", "") == "animals: cat face"
    assert (
        caption_of({"name": "KISS: MAN, MAN"}, "people", "1F3FB-1F3FF")
        == "people: kiss: man, man, light skin, dark skin"
    )
    assert caption_of({"name": "HANDSHAKE"}, "hands", "1F3FD-1F3FD") == "hands: handshake, medium skin"


def test_the_tokenizer_of_the_captions_knows_their_words_and_any_other_letters(monkeypatch, tmp_path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from making.train_captions import WORDS, make_tokenizer, tokens_of

    captions = ["hands: waving hand, dark skin", "animals: cat face"]
    tokenizer = make_tokenizer(captions, tmp_path)
    assert tokenizer.tokenize("dark cat") == ["dark</w>", "cat</w>"]
    found = tokens_of(tokenizer, [*captions, "", "Zebra"])
    assert found.shape == (4, WORDS)
    assert found[:, 0].eq(0).all()
    assert found[2, 1:].eq(1).all(), "nothing but ends"
    assert len(found.unique(dim=0)) == 4
    assert tokens_of(tokenizer, ["ZEBRA"]).equal(found[3:])


def test_a_look_from_two_noises_is_the_mean_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from shared import embedded, subject

    look = subject.Look(held_out=10, repeats=1, count=66, steps=1, noises=2)
    images = [embedded.drawn(embedded.dense(), look, noise=noise) for noise in (0, 1)]
    assert not torch.equal(*images)
    found = embedded.measure_dense(look)
    assert found["distance"] == pytest.approx(sum(map(embedded.distance, images)) / 2)
    assert found["ssim"] == pytest.approx(1.0)


def test_what_a_step_does_to_the_picture_is_that_of_the_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of predictions that know nothing of the sample, wrong by delta: delta^2 times the squared change of sigma."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from quality import path

    class Constant(torch.nn.Module):
        def forward(self, sample: torch.Tensor, timestep: Any) -> SimpleNamespace:
            return SimpleNamespace(sample=torch.full_like(sample, self.value))

        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

    scheduler = DDIMScheduler(clip_sample=False)
    monkeypatch.setattr(path, "dense", lambda: SimpleNamespace(unet=Constant(0.2), scheduler=scheduler))
    monkeypatch.setattr(path, "load_pipeline", lambda _: SimpleNamespace(unet=Constant(0.5)))
    monkeypatch.setattr(path, "place", lambda *_: None)
    found = path.measured("any", 0)
    steps = np.array(found["timesteps"])
    alphas = scheduler.alphas_cumprod.numpy()[steps]
    sigmas = np.append(np.sqrt((1 - alphas) / alphas), 0)
    assert len(steps) == path.STEPS
    assert found["picture"] == pytest.approx(0.3**2 * np.diff(sigmas) ** 2, rel=1e-3)
    assert found["path"] == found["data"] == pytest.approx([0.3**2] * path.STEPS)
    high, *_ = path.rows("any", [found])
    inside = steps >= 800
    assert float(high[-1]) == pytest.approx((np.diff(sigmas) ** 2)[inside].mean(), rel=0.01)
