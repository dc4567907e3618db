"""What a GPU run proves and measures, each part in a process of its own: what fails leaves its last lines.

    python benchmarks/bench.py gpu                               # make gpu: CUDA, at most 8 minutes
    python benchmarks/bench.py gpu --suite proofs --suite latency --minutes 4
    python benchmarks/bench.py gpu --provider openvino --small   # a rehearsal: a second provider on the CPU

Suites: proofs (a clean run raises no alarm 20 times, each planted fault is caught), latency (dense against pruned with
the provider's options on and off, PyTorch eager and torch.compile in the same rounds), sizes (Stable Diffusion's
calibration, plan, removal, compensation: seconds, peak memory) and plan (the embedded model's plan is the CPU's).
Ends with exit code 3 and one line where the provider is not there, with 1 where a part failed.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import torch
import typer
from shared.architectures import build
from shared.gpu_report import report

import diffprune_plugin as dp
from diffprune_plugin import demo
from diffprune_plugin.errors import HardwareUnproved
from diffprune_plugin.export import measure, to_onnx
from diffprune_plugin.export.feeds import example_feeds, fixed_dims
from diffprune_plugin.export.proofs import (
    Bound,
    binding_proof,
    device_proof,
    profile_proof,
    prove,
    replay_proof,
    session_proof,
)
from diffprune_plugin.export.providers import known_provider, spec_of
from size import scale

BENCH = Path(__file__).parents[1] / "bench.py"
CLEAN = 20  # runs without a fault
NARROW = 5  # divides the widths of a rehearsal
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
        config["sample_size"] = 16
        return type(model).from_config(config).eval()


def files(place: Place, name: str, ratio: float, dtype: str, folder: Path, **options: Any) -> tuple[Any, Any, float]:
    """dense.onnx and pruned.onnx in a folder; the models, and the share of the MACs that is left."""
    dense = place.model(name)
    pruned = copy.deepcopy(dense)
    plan = dp.make_plan(pruned, "magnitude", pruning_ratio=ratio, **options)
    dp.remove_(pruned, plan)
    for model, file in ((dense, "dense.onnx"), (pruned, "pruned.onnx")):
        to_onnx(model, folder / file, dtype=dtype)
    return dense, pruned, plan.macs[1] / plan.macs[0]


def small_file(place: Place, folder: Path) -> tuple[Path, dict[str, Any], dict[str, int]]:
    """A model whose numbers say nothing, to prove a provider with: file, feeds, dims."""
    path = folder / "pruned.onnx"
    files(replace(place, small=True), "ddpm-cifar10-32", 0.3, "fp32", folder)
    dims = fixed_dims(path, batch=1)
    return path, example_feeds(path, dims), dims


def clean(place: Place) -> Row:
    """The negative control: the proofs hold each time where nothing is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        path, feeds, dims = small_file(place, Path(folder))
        held = [prove(path, place.provider, feeds, dims)[0].proved for _ in range(CLEAN)]
    return {"runs": CLEAN, "alarms": held.count(False), "passed": all(held)}


class Stale(Bound):
    """A captured graph with other addresses: it goes on with what it saw first."""

    def put(self, feeds: Any) -> None:
        pass


def faults(place: Place) -> Row:
    """Each fault that can be planted, and whether a proof refuses it."""
    found: Row = {}
    wanted = known_provider(place.provider)
    with tempfile.TemporaryDirectory() as folder:
        path, feeds, dims = small_file(place, Path(folder))
        strange = with_strange_node(path, Path(folder) / "strange.onnx")
        found["a node without a kernel, left to the CPU"] = refused(lambda: prove(strange, place.provider, feeds, dims))
        found["the same, and the session says so"] = not session_proof(strange, place.provider, dims, 1, Path(folder))[
            1
        ].held
        found["a provider that is listed and not there"] = not device_proof(replace(wanted, memory="nowhere")).held
        bound, plain = prove(path, place.provider, feeds, dims)[1], prove(path, place.provider, feeds, dims)[1]
        found["inputs and outputs in another memory"] = not binding_proof("elsewhere", bound.devices()).held
        bound.__class__ = Stale
        found["a replay that reads old buffers"] = not replay_proof(bound, plain, feeds).held
        event = {
            "cat": "Node",
            "name": "copy_kernel_time",
            "args": {"provider": wanted.name, "op_name": "MemcpyToHost"},
        }
        found["copies between memories"] = not profile_proof(wanted, [event]).held
    return found | {"passed": all(found.values())}


def with_strange_node(path: Path, target: Path) -> Path:
    """The model with a node at its end that nobody but the CPU computes."""
    model = onnx.load(path)
    output = model.graph.output[0]
    name, output.name = output.name, "strange"
    model.graph.node.append(onnx.helper.make_node("Det", ["square"], ["determinant"]))
    square = onnx.numpy_helper.from_array(np.eye(2, dtype=np.float32), "eye")
    model.graph.initializer.append(square)
    model.graph.node.insert(-1, onnx.helper.make_node("ReduceMean", [name], ["mean"], keepdims=0))
    model.graph.node.insert(-1, onnx.helper.make_node("Mul", ["eye", "mean"], ["square"]))
    model.graph.node.append(onnx.helper.make_node("Add", [name, "determinant"], ["strange"]))
    onnx.save(model, target)
    return target


def refused(attempt: Callable[[], Any]) -> bool:
    try:
        attempt()
    except HardwareUnproved:
        return True
    return False


def latency(place: Place, name: str, ratio: float, dtype: str, options: Row) -> Row:
    """Dense against pruned on the provider, plain and with each option that it has; PyTorch in the plain rounds."""
    rows: Row = {}
    with tempfile.TemporaryDirectory() as folder:
        dense, pruned, macs = files(place, name, ratio, dtype, Path(folder), **options)
        for spec in combinations(place.provider):
            eager = timed_models(place, dense, pruned, dtype) if spec == place.provider else None
            found = measure(
                Path(folder) / "pruned.onnx",
                Path(folder) / "dense.onnx",
                provider=spec,
                batches=(1,) if place.small else (1, 8),
                rounds=5 if place.small else None,
                budget=5,
                eager=eager,
                memory=False,
            )
            rows[spec] = found.as_dict()
    return {"macs": macs, "measured": rows, "passed": True}


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


def timed_models(place: Place, dense: Any, pruned: Any, dtype: str) -> Row:
    """The PyTorch models, eager and compiled, on the provider's device in the file's type."""
    models = {"dense": dense, "pruned": pruned}
    models = {n: m.to(place.device, {"fp32": torch.float32, "fp16": torch.float16}[dtype]) for n, m in models.items()}
    if place.small:
        return models
    compiled = {f"compiled {name}": copy.deepcopy(model) for name, model in models.items()}
    for model in compiled.values():
        model.compile()  # in place: the class, and with it the adapter, stays
    return models | compiled


def sizes(place: Place, kind: str, name: str) -> Row:
    """Seconds and peak memory of one step of a size, by the suite of sizes."""
    scale.DEVICE = place.device
    row = {} if place.small else scale.KINDS[kind][0](name)
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


MODELS = (
    ("ddpm-cifar10-32", 0.3, "fp32", {}),
    ("ddpm-cifar10-32", 0.3, "fp16", {"round_to": 8}),
    ("sd15", 0.3, "fp16", {}),
    ("sd15", 0.3, "fp16", {"round_to": 8}),
    ("sd15", 0.5, "fp16", {"round_to": 8}),
)


def parts(place: Place) -> dict[str, dict[str, Callable[[], Row]]]:
    """What each suite consists of, by name; a rehearsal has one architecture, in fp32."""
    models = MODELS[:1] if place.small else MODELS
    return {
        "proofs": {"clean": partial(clean, place), "faults": partial(faults, place)},
        "latency": {
            f"{name} {ratio} {dtype}{' round_to 8' if options else ''}": partial(
                latency, place, name, ratio, dtype, options
            )
            for name, ratio, dtype, options in models
        },
        "sizes": {
            f"{kind} {name}": partial(sizes, place, kind, name)
            for name in ("sd15", "sdxl-base")
            for kind in ("plan", "calibrate", "compensate")
            if name in scale.KINDS[kind][1]
        },
        "plan": {"embedded": partial(plan, place)},
    }


def main(
    provider: Annotated[str, typer.Option(help="cuda, tensorrt; openvino or cpu rehearse on a CPU")] = "cuda",
    suite: Annotated[list[str] | None, typer.Option(help="proofs, latency, sizes, plan; default: all")] = None,
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
    results = {
        f"{chosen}/{name}": in_process(f"{chosen}/{name}", place, ended - time.monotonic())
        for chosen in suite or work
        for name in work[chosen]
    }
    report("gpu_quick" if small else "gpu", provider, results)
    if not all(row.get("passed") for row in results.values()):
        raise typer.Exit(1)


def in_process(part: str, place: Place, seconds: float) -> Row:
    """A part's result, or what its process said last."""
    if seconds < 5:
        return {"passed": False, "why": "no time left"}
    words = [sys.executable, str(BENCH), "gpu", "--provider", place.provider, "--child", part]
    start = time.monotonic()
    try:
        done = subprocess.run(
            words + ["--small"] * place.small, capture_output=True, text=True, timeout=seconds, check=False
        )
        lines = done.stdout.splitlines()
        row = json.loads(lines[-1]) if done.returncode == 0 and lines else {"passed": False, "why": done.stderr[-1500:]}
    except subprocess.TimeoutExpired:
        row = {"passed": False, "why": f"not done in {seconds:.0f} s"}
    print(f"{part}: {'passed' if row['passed'] else 'FAILED'} in {time.monotonic() - start:.0f} s", flush=True)
    return row | {"seconds": time.monotonic() - start}
