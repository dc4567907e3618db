"""A whole Stable Diffusion 1.5-size pipeline with random weights to ONNX, and one image of 2 steps; seconds and memory.

    python benchmarks/bench.py pipeline-sd15     # results/pipeline_sd15.md

Needs up to 10 GiB of memory, 8 GB of disk and ten minutes on two cores; exit code 1 beyond that. Every part is compared
with PyTorch at 128 x 128 pixels, the image at 512 x 512.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from shared.architectures import build
from shared.results import publish, table
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffprune_plugin.export.drawing import ImageCheck, summary
from diffprune_plugin.export.memory import high_water
from diffprune_plugin.export.options import Options
from diffprune_plugin.export.pipeline_workflow import run_pipeline

BENCH = Path(__file__).parents[1] / "bench.py"
SECONDS, GIB, THREADS = 600, 10, 2
ERRORS = ("absolute", "relative")
LETTERS = "abcdefghijklmnopqrstuvwxyz,"


def tokenizer(folder: Path) -> CLIPTokenizer:
    """Every letter is a token: the real vocabulary is not here, and its size makes no difference to one."""
    folder.mkdir(parents=True)
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def pipeline(folder: Path) -> StableDiffusionPipeline:
    """The published sizes: 860 M parameters of UNet, 123 M of text encoder, 84 M of autoencoder."""
    unet = build("sd15")
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, **blocks)
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=tokenizer(folder / "tokenizer"),
        unet=unet,
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make(folder: Path) -> None:
    pipeline(folder).save_pretrained(folder / "pipeline")


def export(folder: Path) -> None:
    options = Options(steps=2, drawn=(1,), dynamic=("batch", "height", "width"), latency=False, threads=THREADS)
    start = time.perf_counter()

    def say(line: str) -> None:
        print(f"{time.perf_counter() - start:4.0f} s, peak {high_water() / 2**30:.2f} GiB: {line}", flush=True)

    run_pipeline(folder / "pipeline", folder / "onnx", options, say)


PHASES = {phase.__name__: phase for phase in (make, export)}


def own_memory(most: list[int]) -> None:
    """Puts the most memory into a list that this process had at any time and that no file backs: what mapped files take
    the kernel gives to others when they need it, though it counts as this process's. Of Linux."""
    while True:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
        most[0] = max(most[0], 1024 * int(found[1]) if found else 0)
        time.sleep(0.05)


def one_phase(name: str, folder: Path) -> None:
    torch.set_num_threads(THREADS)
    start, own = time.perf_counter(), [0]
    threading.Thread(target=own_memory, args=(own,), daemon=True).start()
    PHASES[name](folder)
    seconds = f"{time.perf_counter() - start:.0f} s", f"{time.process_time():.0f} s"
    memory = [f"{peak / 2**30:.2f} GiB" for peak in (own[0], high_water())]
    (folder / f"{name}.json").write_text(json.dumps([name, *seconds, *memory]))
    if own[0] > GIB * 2**30:
        sys.exit(f"{name} takes more than {GIB} GiB")


def found(folder: Path, load: float) -> list[str]:
    """The tables: what each phase took, and how far ONNX Runtime is from PyTorch."""
    phases = [json.loads((folder / f"{name}.json").read_text()) for name in PHASES]
    verdict = json.loads((folder / "onnx.verdict.json").read_text())
    parts = [
        [name, str(len(part["verify"]["cases"])), *(f"{part['verify']['worst'][key]:.1e}" for key in ERRORS)]
        for name, part in verdict["parts"].items()
    ]
    return [
        f"{THREADS} threads on {os.cpu_count()} cores, where {load:.1f} other processes ran at the start.",
        "",
        *table(["phase", "took", "of processors", "memory", "with mapped files"], phases),
        "",
        *table(["part", "cases", "largest error", "relative"], parts),
        "",
        f"Drawn at 512 x 512 with guidance: {summary(ImageCheck(**verdict['images']))}.",
    ]


def main(
    folder: Annotated[Path | None, typer.Argument(hidden=True)] = None,
    phase: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Each phase in a process of its own, as in a shell: none has to hold what another left."""
    if folder is not None and phase is not None:
        one_phase(phase, folder)
        return
    start, load = time.perf_counter(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as place:
        words: list[Any] = [sys.executable, BENCH, "pipeline-sd15", "--phase"]
        codes = [subprocess.run([*map(str, words), name, place], check=False).returncode for name in PHASES]
        if (Path(place) / "onnx.verdict.json").exists():  # beyond the promised memory too
            publish("pipeline_sd15", found(Path(place), load))
    seconds = time.perf_counter() - start
    print(f"all of it: {seconds:.0f} s; promised {SECONDS} s and {GIB} GiB")
    if any(codes) or seconds > SECONDS:
        raise typer.Exit(1)
