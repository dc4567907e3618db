"""Export, verify and time a Stable Diffusion 1.5-size UNet with random weights; prints seconds and peak memory.

    python benchmarks/bench.py export-sd15

Needs up to 8 GiB of memory, 4 GB of disk and five minutes on two cores; exit code 1 beyond that.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from shared.architectures import build

from diffprune_plugin.export import check_files, prove, to_onnx, verify_onnx
from diffprune_plugin.export.benchmark import timed
from diffprune_plugin.export.feeds import example_feeds, fixed_dims
from diffprune_plugin.export.memory import high_water
from diffprune_plugin.export.verify import summary

BENCH = Path(__file__).parents[1] / "bench.py"
SECONDS, GIB = 300, 8
THREADS = 2


def export(path: Path, adapter: Any) -> None:
    to_onnx(model(), path, dynamic=("batch", "height", "width", "sequence"), adapter=adapter)


def manifest(path: Path, adapter: Any) -> None:
    check_files(path)


def verify(path: Path, adapter: Any) -> None:
    verified = verify_onnx(path, model(), batches=(1, 2), size=(16, 16), threads=THREADS, adapter=adapter)
    print(f"at 16x16: {summary(verified)}")
    assert verified.passed


def run(path: Path, adapter: Any) -> None:
    dims = fixed_dims(path, batch=1)
    _, bound = prove(path, "cpu", example_feeds(path, dims), dims, THREADS)
    print(f"one forward at 64x64: {timed(bound.run):.1f} s on {THREADS} threads")


PHASES = {phase.__name__: phase for phase in (export, manifest, verify, run)}


def model() -> Any:
    torch.set_num_threads(THREADS)
    return build("sd15")


def one_phase(name: str, path: Path, adapter: Any = None) -> None:
    start = time.perf_counter()
    PHASES[name](path, adapter)
    print(f"{name}: {time.perf_counter() - start:.0f} s, peak {high_water() / 2**30:.2f} GiB", flush=True)
    if high_water() > GIB * 2**30:
        sys.exit(f"{name} takes more than {GIB} GiB")


def main(
    path: Annotated[Path | None, typer.Argument(hidden=True)] = None,
    phase: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Each phase in a process of its own, as in a shell: none has to hold what another left."""
    if path is not None and phase is not None:
        one_phase(phase, path)
        return
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sd15.onnx"
        codes = [
            subprocess.run(
                [sys.executable, str(BENCH), "export-sd15", "--phase", name, str(file)], check=False
            ).returncode
            for name in PHASES
        ]
    seconds = time.perf_counter() - start
    print(f"all of it: {seconds:.0f} s; promised {SECONDS} s and {GIB} GiB")
    if any(codes) or seconds > SECONDS:
        raise typer.Exit(1)
