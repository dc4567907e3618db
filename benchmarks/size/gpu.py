"""What a GPU run proves and measures, each part in a process of its own: what fails leaves its last lines.

    python benchmarks/bench.py gpu                               # make gpu: CUDA, at most 8 minutes
    python benchmarks/bench.py gpu --suite proofs --suite latency --minutes 4
    python benchmarks/bench.py gpu --provider openvino --small   # a rehearsal: a second provider on the CPU

Suites: proofs (a clean run raises no alarm 20 times, each planted fault is caught), plan (the embedded model's plan is
the CPU's), target (a plan of the CIFAR-10 size for 0.6 of its latency, measured there), latency (dense against pruned
with the provider's options on and off, PyTorch eager and torch.compile in the same rounds) and sizes (Stable
Diffusion's calibration, plan, removal, compensation: seconds, peak memory).
Ends with exit code 3 and one line where the provider is not there, with 1 where a part failed.
"""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from shared.architectures import build
from shared.gpu_proofs import clean, faults
from shared.gpu_report import report

import diffprune_plugin as dp
from diffprune_plugin import demo
from diffprune_plugin.config.latency import LatencyConfig
from diffprune_plugin.export import measure, to_onnx
from diffprune_plugin.export.feeds import example_feeds, fixed_dims
from diffprune_plugin.export.proofs import device_proof
from diffprune_plugin.export.providers import known_provider, spec_of
from diffprune_plugin.latency.run import meet_latency
from diffprune_plugin.planning.options import PlanOptions
from diffprune_plugin.planning.planner import material_of, plan_from
from diffprune_plugin.planning.widths import FUSES
from size import scale

BENCH = Path(__file__).parents[1] / "bench.py"
NARROW = 5  # divides the widths of a rehearsal
SMALL = "ddpm-cifar10-32"  # stands for the sizes in a rehearsal
MOST = {"target": 90, "latency": 240}  # seconds of a part, of a suite that could go on for long
Row = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where a part runs: ONNX Runtime's provider, PyTorch's device, and whether it is a rehearsal in small."""

    provider: str
    small: bool

    @property
    def device(self) -> str:
        return known_provider(self.provider).memory

    def model(self, name: str) -> Any:
        """Random weights of a published architecture; narrow in a rehearsal."""
        model = build(name)
        if not self.small:
            return model
        config = dict(model.config)
        config["block_out_channels"] = [max(width // NARROW // 32, 1) * 32 for width in config["block_out_channels"]]
        config |= {"sample_size": 16, "norm_num_groups": 8}  # of 32 channels in 32 groups none can go
        return type(model).from_config(config).eval()


def files(place: Place, name: str, ratio: float, dtype: str, folder: Path, **options: Any) -> tuple[Any, Any, float]:
    """dense.onnx and pruned.onnx in a folder; the models, and the share of the MACs that is left."""
    dense = place.model(name)
    pruned = copy.deepcopy(dense)
    plan = dp.make_plan(pruned, "magnitude", pruning_ratio=ratio, **options)
    dp.remove_(pruned, plan)
    written(dense, pruned, dtype, folder)
    return dense, pruned, plan.macs[1] / plan.macs[0]


def written(dense: Any, pruned: Any, dtype: str, folder: Path, fuse: str = "") -> tuple[Path, Path]:
    """Both files: pruned, dense."""
    models = {"pruned": pruned, "dense": dense}
    paths = [to_onnx(m, folder / f"{n}.onnx", dtype=dtype, fuse=fuse, overwrite=True).path for n, m in models.items()]
    return paths[0], paths[1]


def small_file(place: Place, folder: Path) -> tuple[Path, dict[str, Any], dict[str, int]]:
    """A model whose numbers say nothing, to prove a provider with: file, feeds, dims."""
    path = folder / "pruned.onnx"
    files(replace(place, small=True), "ddpm-cifar10-32", 0.3, "fp32", folder)
    dims = fixed_dims(path, batch=1)
    return path, example_feeds(path, dims), dims


def on_small_file(check: Callable[..., Row], place: Place) -> Row:
    """A check of proofs, on a file made for it."""
    with tempfile.TemporaryDirectory() as folder:
        return check(place.provider, *small_file(place, Path(folder)))


@dataclass(frozen=True)
class Case:
    """What a part of the suite of latency times. ``whole``: with each option of the provider, fused, and compiled by
    PyTorch too; else plain and with all options at once."""

    model: str
    ratio: float
    dtype: str
    batches: tuple[int, ...]
    options: Row
    whole: bool = True

    def __str__(self) -> str:
        return f"{self.model} {self.ratio} {self.dtype}{' round_to auto' if self.options else ''}"

    def specs(self, provider: str) -> list[str]:
        found = combinations(provider)
        return found if self.whole else list(dict.fromkeys((found[0], found[-1])))


def latency(place: Place, case: Case) -> Row:
    """Dense against pruned on the provider and in PyTorch; what is there so far is printed, for whoever ends it."""
    rows: Row = {}
    found: Row = {"measured": rows, "passed": True}
    with tempfile.TemporaryDirectory() as folder:
        dense, pruned, found["macs"] = files(place, case.model, case.ratio, case.dtype, Path(folder), **case.options)
        paths = Path(folder) / "pruned.onnx", Path(folder) / "dense.onnx"
        for way in (with_options, compiled, fused):
            try:
                for spec, row in way(place, case, paths, dense, pruned):
                    rows[spec] = row
                    print(json.dumps(found), flush=True)
            except Exception:  # what was timed before is kept, and what comes after is timed
                found |= {"passed": False, "why": f"{way.__name__}: {traceback.format_exc()[-1500:]}"}
    return found


Timed = Iterator[tuple[str, Row]]


def with_options(place: Place, case: Case, paths: tuple[Path, Path], dense: Any, pruned: Any) -> Timed:
    """Plain, beside PyTorch, then with the provider's options."""
    for spec in case.specs(place.provider):
        eager = on_device(place, case, dense, pruned) if spec == place.provider else None
        yield spec, timed(place, case, paths, spec, eager)


def compiled(place: Place, case: Case, paths: tuple[Path, Path], dense: Any, pruned: Any) -> Timed:
    """Beside PyTorch's models, eager and by torch.compile, which takes a minute a model: of one batch size."""
    if not case.whole or place.small:
        return
    eager = on_device(place, case, dense, pruned)
    copies = {f"compiled {name}": copy.deepcopy(model) for name, model in eager.items()}
    for model in copies.values():
        model.compile()  # in place: the class, and with it the adapter, stays
    yield "compiled", timed(place, replace(case, batches=case.batches[:1]), paths, place.provider, eager | copies)


def fused(place: Place, case: Case, paths: tuple[Path, Path], dense: Any, pruned: Any) -> Timed:
    """Files with the provider's fused operators."""
    if not case.whole or place.provider not in FUSES:
        return
    paths = written(dense.cpu(), pruned.cpu(), case.dtype, paths[0].parent, place.provider)
    for spec in combinations(place.provider):
        yield f"{spec} fused", timed(place, case, paths, spec)


def timed(place: Place, case: Case, paths: tuple[Path, Path], spec: str, eager: Row | None = None) -> Row:
    """Pruned and dense file in shuffled rounds."""
    found = measure(
        *paths,
        provider=spec,
        batches=(1,) if place.small else case.batches,
        rounds=5 if place.small else None,
        budget=5,
        eager=eager,
        memory=False,
    )
    return found.as_dict()


def combinations(provider: str) -> list[str]:
    """The provider plain, with channels last, with a captured graph, and with both, as far as it has them."""
    row = known_provider(provider)
    wanted = [
        (g, n)
        for g in (False, True)
        for n in (False, True)
        if (row.graph_option or not g) and (row.nhwc_option or not n)
    ]
    return [spec_of(provider, cuda_graph=graph, nhwc=nhwc) for graph, nhwc in wanted]


def on_device(place: Place, case: Case, dense: Any, pruned: Any) -> Row:
    """The PyTorch models, eager, on the provider's device in the file's type."""
    dtype = {"fp32": torch.float32, "fp16": torch.float16}[case.dtype]
    return {"dense": dense.to(place.device, dtype), "pruned": pruned.to(place.device, dtype)}


def sizes(place: Place, kind: str, name: str) -> Row:
    """Seconds and peak memory of one step of a size, by the suite of sizes."""
    scale.DEVICE = place.device
    row = scale.KINDS[kind][0](name)
    if place.device == "cuda":
        row["GPU memory, GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return row | {"passed": True}


def plan(place: Place) -> Row:
    """The channels that the embedded model loses on the device, against the CPU's."""
    removed = []
    for device in ("cpu", place.device):
        pipeline = dp.load(demo.MODEL).to(device)
        images = np.load(demo.CALIBRATION_IMAGES)["images"][: 32 if place.small else None]
        scheduler = dp.pruning.loading.load_pipeline(Path(demo.MODEL)).scheduler
        sweep = dp.Sweep(samples=32 if place.small else 256, curve_samples=4)
        found = dp.calibrate(pipeline, scheduler, images, sweep, timesteps=10 if place.small else 100, progress=False)
        made = dp.make_plan(pipeline, dp.importance("diff_taylor", calibration=found), pruning_ratio=0.3)
        removed.append({(group.root, unit) for group in made.groups for unit in group.removed})
    return {"removed": len(removed[0]), "in common": len(removed[0] & removed[1]), "passed": True}


def target(place: Place) -> Row:
    """A plan for 0.6 of the dense model's latency, by the code that diffprune prune runs, and what was measured."""
    model = place.model("ddpm-cifar10-32")
    options = PlanOptions.make({"latency_target": 0.6, "allocation": "uniform"})
    material = material_of(options, model, "magnitude")
    made = meet_latency(
        options,
        LatencyConfig(provider=place.provider),
        model,
        material,
        lambda asked, costs: plan_from(material, asked, latency=costs),
        None,
        False,
    )
    assert made.latency is not None
    share, low, high = made.latency.measured
    row = {"predicted": made.latency.predicted, "measured": share, "interval": f"[{low:.3f}, {high:.3f}]"}
    told = made.shortfalls()
    return row | {"plans": made.latency.attempts, "passed": not told} | ({"why": told[0]} if told else {})


CASES = (
    Case("ddpm-cifar10-32", 0.3, "fp32", (1, 8), {}),
    Case("ddpm-cifar10-32", 0.3, "fp16", (1, 8), {"round_to": "cuda-fp16"}),
    Case("sd15", 0.3, "fp16", (2,), {}, whole=False),  # one image with guidance is a batch of 2
    Case("sd15", 0.3, "fp16", (2,), {"round_to": "cuda-fp16"}),
    Case("sd15", 0.5, "fp16", (2,), {"round_to": "cuda-fp16"}, whole=False),
)


def parts(place: Place) -> dict[str, dict[str, Callable[[], Row]]]:
    """What each suite consists of, by name; a rehearsal has one architecture, in fp32."""
    return {
        "proofs": {
            name: partial(on_small_file, check, place) for name, check in (("clean", clean), ("faults", faults))
        },
        "plan": {"embedded": partial(plan, place)},
        "target": {"ddpm-cifar10-32 0.6": partial(target, place)},
        "latency": {str(case): partial(latency, place, case) for case in (CASES[:1] if place.small else CASES)},
        "sizes": {
            f"{kind} {name}": partial(sizes, place, kind, name)
            for name in ((SMALL,) if place.small else ("sd15", "sdxl-base"))
            for kind in ("plan", "calibrate", "compensate")
            if name in scale.KINDS[kind][1]
        },
    }


def main(
    provider: Annotated[str, typer.Option(help="cuda, tensorrt; openvino or cpu rehearse on a CPU")] = "cuda",
    suite: Annotated[list[str] | None, typer.Option(help="proofs, plan, target, latency, sizes; default: all")] = None,
    minutes: Annotated[float, typer.Option(help="no part begins after, and none goes on")] = 8,
    small: Annotated[bool, typer.Option("--small", help="a rehearsal: narrow models, few rounds")] = False,
    child: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run the suites, each part in a process; write results/gpu.md, gpu.json and gpu.png (gpu_quick.* in small)."""
    place = Place(provider, small)
    work = parts(place)
    if child:
        chosen, _, name = child.partition("/")
        print(json.dumps(work[chosen][name]()))
        return
    if unknown := [name for name in suite or () if name not in work]:
        raise typer.BadParameter(f"--suite {unknown[0]}: not one of {', '.join(work)}")
    proof = device_proof(known_provider(provider))
    if not proof.held:
        print(f"gpu: {provider}: {proof.seen}; to run it: {known_provider(provider).install}", file=sys.stderr)
        raise typer.Exit(3)
    ended = time.monotonic() + 60 * minutes
    results: dict[str, Row] = {}
    for chosen in suite or work:
        for name in work[chosen]:
            left = min(ended - time.monotonic(), MOST.get(chosen, math.inf))
            results[f"{chosen}/{name}"] = in_process(f"{chosen}/{name}", place, left)
            report("gpu_quick" if small else "gpu", provider, results)  # as far as it is, for whoever ends it early
    if not all(row.get("passed") for row in results.values()):
        raise typer.Exit(1)


def in_process(part: str, place: Place, seconds: float) -> Row:
    """A part's result, or what its process said last."""
    if seconds < 5:
        return {"passed": False, "why": "no time left", "seconds": 0.0}
    words = [sys.executable, str(BENCH), "gpu", "--provider", place.provider, "--child", part]
    start = time.monotonic()
    try:
        done = subprocess.run(
            words + ["--small"] * place.small, capture_output=True, text=True, timeout=seconds, check=False
        )
        lines = done.stdout.splitlines()
        row = json.loads(lines[-1]) if done.returncode == 0 and lines else {"passed": False, "why": done.stderr[-1500:]}
    except subprocess.TimeoutExpired as stopped:
        lines = (stopped.stdout or b"").decode().splitlines()
        row = (json.loads(lines[-1]) if lines else {}) | {"passed": False, "why": f"not done in {seconds:.0f} s"}
    print(f"{part}: {'passed' if row['passed'] else 'FAILED'} in {time.monotonic() - start:.0f} s", flush=True)
    return row | {"seconds": time.monotonic() - start}
