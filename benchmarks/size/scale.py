"""Published denoisers at their real size, with random weights: exact ratios, and seconds and peak memory against size.

    python benchmarks/bench.py scale                      # everything, an hour on one core; 16 GiB of memory
    python benchmarks/bench.py scale --only plan          # one kind: plan, ratios, calibrate, compensate or allocate
    python benchmarks/bench.py scale --only plan --model sd15

Each figure is taken in a process of its own, whose peak memory is the kernel's count of it (VmHWM), with the model
itself inside. Finished rows are in OUTPUT/scale.json at once: killed and started again it goes on with the next.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from shared.architectures import NAMES, build
from shared.results import RESULTS, one_of

import diffprune_plugin as dp
from diffprune_plugin.data.samples import Samples
from diffprune_plugin.export.memory import high_water
from diffprune_plugin.planning.plan import PruningPlan
from diffprune_plugin.plugins import find_adapter
from diffprune_plugin.recovery.compensate import compensate_
from diffprune_plugin.sensitivity.linear import measure_sensitivity
from diffprune_plugin.sensitivity.sensitivity import Sensitivity
from diffprune_plugin.utils.files import write_text
from diffprune_plugin.utils.tensors import weights_hash

BENCH = Path(__file__).parents[1] / "bench.py"
Row = dict[str, Any]
RATIOS = (0.1, 0.3, 0.5, 0.7)
CONDITIONAL = ("sd15", "sd21", "sdxl-base")
DEVICE = "cpu"  # another for the suite of a GPU
HALF = dict.fromkeys(("sdxl-base", "sd3-medium"), torch.bfloat16)  # as people deploy them; float32 elsewhere
# The side of the latents and blocks_at_once; of others as the config says, and all at once.
CALIBRATED_AT = {"sd3-medium": (64, 6)}
SMALL = 32  # latents' side for the forwards that check a result
IMAGES = 8  # synthetic latents of compensation and sensitivity
PROBES = 2  # backward passes of each


def model(name: str) -> Any:
    return build(name, HALF.get(name, torch.float32)).to(DEVICE)


def inputs_of(unet: Any, count: int = 1, size: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Seeded unit noise for each of the UNet's inputs, by flat name; latents of the config's size unless given."""
    return find_adapter(unet).flat_inputs(unet, count, (size, size) if size else None, seed)


def fresh_inputs(unet: Any) -> dict[str, Any]:
    """Those that nothing was fitted to, in the middle of the timesteps."""
    return inputs_of(unet, seed=1) | {"timestep": torch.tensor([500], device=DEVICE)}


def samples_of(unet: Any, count: int, size: int | None = None) -> Samples:
    """Synthetic latents with the further inputs that the UNet takes."""
    inputs = inputs_of(unet, count, size)
    del inputs["timestep"]
    return Samples(inputs.pop(find_adapter(unet).sample), inputs)


def scheduler_of(unet: Any) -> Any:
    return FlowMatchEulerDiscreteScheduler() if find_adapter(unet).objective == "flow_matching" else DDPMScheduler()


@torch.no_grad()
def output(unet: Any, inputs: dict[str, Any]) -> torch.Tensor:
    result: torch.Tensor = unet(**find_adapter(unet).nested(inputs), return_dict=False)[0]
    return result.float()


def plan(name: str) -> Row:
    """Plan and removal with magnitude at 0.3."""
    unet = model(name)
    loaded, start = high_water(), time.perf_counter()
    made = dp.make_plan(unet, "magnitude", pruning_ratio=0.3)
    planned = time.perf_counter()
    dp.remove_(unet, made)
    row = {"plan": planned - start, "removal": time.perf_counter() - planned, "loaded": loaded}
    return row | {"params": made.params, "macs": made.macs, "shortfalls": made.shortfalls()}


def ratios(name: str) -> Row:
    """Each ratio: what every group lost against the request, the same plan twice, and a reload with difference 0."""
    return {str(ratio): one_ratio(name, ratio) for ratio in RATIOS}


def one_ratio(name: str, ratio: float) -> Row:
    unet = model(name)
    made, again = (dp.make_plan(unet, "magnitude", pruning_ratio=ratio) for _ in range(2))
    dp.remove_(unet, made)
    with tempfile.TemporaryDirectory() as folder:
        dp.save(unet, Path(folder) / "pruned")
        loaded = dp.load(Path(folder) / "pruned", HALF.get(name, torch.float32)).eval()
    inputs = inputs_of(unet, size=SMALL)
    difference = float((output(unet, inputs) - output(loaded, inputs)).abs().max())
    return achieved(made) | {
        "the same twice": made.sha256 == again.sha256,
        "finite": bool(torch.isfinite(output(unet, inputs)).all()),
        "reload difference": difference,
        "params": made.params,
        "macs": made.macs,
    }


def achieved(made: PruningPlan) -> Row:
    """How far the groups are from the request, in channels and in their own steps; and the GEGLU widths."""
    asked = [group for group in made.groups if group.requested]
    missing = [group.requested - len(group.removed) for group in asked]
    steps = [lost / group.step for lost, group in zip(missing, asked, strict=True)]
    widths = {(g.units, g.units - len(g.removed)) for g in asked if g.pairs > 1}
    return {
        "groups": len(asked),
        "kept whole": len(made.groups) - len(asked),
        "steps": sorted({group.step for group in asked}),
        "largest miss": max(missing),
        "largest miss in steps": max(steps),
        "removed too much": sum(lost < 0 for lost in missing),
        "GEGLU": sorted(widths),
    }


def calibrate(name: str) -> Row:
    """Scores from gradients of one timestep, batch 1, and the plan and removal after them."""
    unet, (size, blocks) = model(name), CALIBRATED_AT.get(name, (None, None))
    samples = samples_of(unet, 1, size)
    options = {"samples": 1, "curve_samples": 1, "threshold": 0.0}
    settings: Row = {"batch_size": 1, "timesteps": 1, "blocks_at_once": blocks, "progress": False}
    loaded, start = high_water(), time.perf_counter()
    sweep = dp.importance("diff_taylor", **options).sweep  # type: ignore[attr-defined]
    calibration = dp.calibrate(unet, scheduler_of(unet), samples, sweep, **settings)
    scored = dp.importance("diff_taylor", calibration=calibration)
    made = dp.make_plan(unet, scored, pruning_ratio=0.3)
    dp.remove_(unet, made)
    return {"seconds": time.perf_counter() - start, "loaded": loaded, "params": made.params}


def compensate(name: str) -> Row:
    """The training-free repair at 0.3: the relative error of the UNet's output on fresh noise before and after."""
    unet = model(name)
    dense, made = copy.deepcopy(unet), dp.make_plan(unet, "magnitude", pruning_ratio=0.3)
    dp.remove_(unet, made)
    samples, fresh = samples_of(dense, IMAGES), fresh_inputs(dense)
    wanted = output(dense, fresh)
    row = {"error before": relative(output(unet, fresh), wanted), "loaded": high_water()}
    start = time.process_time()
    report = compensate_(unet, dense, made, DDPMScheduler(), samples, **kept(unet))
    row |= {"seconds": report.seconds, "cpu seconds": time.process_time() - start}
    row["error after"] = relative(output(unet, fresh), wanted)
    row["refitted"] = sum(repair.refitted for repair in report.repairs)
    return row | {"params": made.params, "regressions": len(report.repairs)}


def kept(unet: Any) -> Row:
    """Options of a compensation or a sensitivity, with where an interrupted one goes on."""
    return {"samples": IMAGES, "batch_size": 2, "checkpoint": Path("runs") / f"scale-{weights_hash(unet)[:12]}"}


def allocate(name: str) -> Row:
    """Half of the MACs by the linear sensitivity and by one ratio, both compensated; CPU seconds of each step."""
    dense = model(name)
    samples, fresh = samples_of(dense, IMAGES), fresh_inputs(dense)
    wanted, row = output(dense, fresh), {"loaded": high_water()}
    found, row["sensitivity"] = sensitivity_of(dense, samples)
    row["peak of sensitivity"] = high_water()
    for way in ("linear", "uniform"):
        row |= {f"{way} {key}": value for key, value in spent(way, dense, found, samples, fresh, wanted).items()}
    return row | {"params": [sum(p.numel() for p in dense.parameters())]}


def sensitivity_of(dense: Any, samples: Samples) -> tuple[Sensitivity, float]:
    """It and its CPU seconds, which are kept with it."""
    options = kept(dense)
    file, seconds = (options["checkpoint"] / f"sensitivity.{end}" for end in ("json", "seconds"))
    if not seconds.exists():
        start = time.process_time()
        found = measure_sensitivity(dense, DDPMScheduler(), samples, probes=PROBES, **options | {"batch_size": 1})
        file.parent.mkdir(parents=True, exist_ok=True)
        found.save(file)
        write_text(seconds, f"{time.process_time() - start:.0f}")
    return Sensitivity.load(file), float(seconds.read_text())


def spent(way: str, dense: Any, found: Sensitivity, samples: Samples, fresh: Row, wanted: torch.Tensor) -> Row:
    """One way to spend the MACs: what is left, and the error of the output before and after the compensation."""
    start = time.process_time()
    made = dp.make_plan(dense, "magnitude", macs_target=0.5, allocation=way, sensitivity=found)
    unet = copy.deepcopy(dense)
    dp.remove_(unet, made)
    row = {"plan": time.process_time() - start}
    row |= {"macs": made.macs[1] / made.macs[0], "params": made.params[1] / made.params[0]}
    row["removed"], start = relative(output(unet, fresh), wanted), time.process_time()
    compensate_(unet, dense, made, DDPMScheduler(), samples, **kept(unet))
    row["compensation"] = time.process_time() - start
    return row | {"compensated": relative(output(unet, fresh), wanted)}


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


# What is measured, and for which models.
KINDS: dict[str, tuple[Callable[[str], Row], tuple[str, ...]]] = {
    "plan": (plan, NAMES),
    "ratios": (ratios, CONDITIONAL),
    "calibrate": (calibrate, ("ddpm-cifar10-32", "ldm4-imagenet-256", "sd15", "sd3-medium")),
    "compensate": (compensate, ("ddpm-cifar10-32", "ldm-celebahq-256", "sd15")),
    "allocate": (allocate, ("ddpm-cifar10-32", "sd15")),
}


def in_a_process(kind: str, name: str) -> Row:
    """One row, measured by a child process; SystemExit if it fails."""
    child = subprocess.run(
        [sys.executable, str(BENCH), "scale", "--child", kind, "--model", name], stdout=subprocess.PIPE
    )
    if child.returncode:
        sys.exit(f"{kind} {name}: exit code {child.returncode}")
    row: Row = json.loads(child.stdout.splitlines()[-1])
    return row


def line(*values: str) -> str:
    return "| " + " | ".join(values) + " |"


def header(*names: str) -> list[str]:
    return [line(*names), line(*["---"] * len(names))]


def table(rows: dict[str, Row]) -> str:
    """Everything measured as Markdown."""
    gib = 2**30
    lines = ["Plan and removal, magnitude, ratio 0.3, one thread; `weights` is the peak before, with the model loaded."]
    lines += ["", *header("model", "params", "after", "plan", "removal", "weights", "peak")]
    for name, row in of_kind(rows, "plan"):
        sizes = [f"{count / 1e6:.1f} M" for count in row["params"]]
        memory = [f"{row[key] / gib:.1f} GiB" for key in ("loaded", "peak")]
        lines.append(line(name, *sizes, f"{row['plan']:.1f} s", f"{row['removal']:.1f} s", *memory))
    columns = ("model", "ratio", "groups", "steps", "largest miss", "in steps", "too much", "GEGLU", "twice", "reload")
    lines += [
        "",
        "Achieved against requested, in channels. Steps: how many can go at a time; largest miss: the most that a "
        "group kept of what was asked, also in its steps; too much: groups that lost more; twice: a second plan is the "
        "same; reload: difference of the output.",
    ]
    lines += ["", *header(*columns)]
    for name, row in of_kind(rows, "ratios"):
        for ratio in map(str, RATIOS):
            cell = row[ratio]
            widths = ", ".join(f"{before} to {after}" for before, after in cell["GEGLU"])
            figures = [cell["groups"], cell["steps"], cell["largest miss"], f"{cell['largest miss in steps']:.2f}"]
            figures += [cell["removed too much"], widths, cell["the same twice"], cell["reload difference"]]
            lines.append(line(name, ratio, *map(str, figures)))
    lines += ["", "Scores from gradients (one timestep, batch 1), plan and removal; sd3-medium: bfloat16, latents of"]
    lines += ["64 x 64 (512 x 512 pixels), `blocks_at_once: 6`.", ""]
    lines += header("model", "params", "seconds", "weights", "peak")
    for name, row in of_kind(rows, "calibrate"):
        memory = [f"{row[key] / gib:.1f} GiB" for key in ("loaded", "peak")]
        lines.append(line(name, f"{row['params'][0] / 1e6:.1f} M", f"{row['seconds']:.0f} s", *memory))
    lines += ["", f"Compensation at 0.3 ({IMAGES} synthetic samples): relative error of the output on fresh noise.", ""]
    lines += header("model", "params", "pruned", "compensated", "refitted", "CPU", "weights", "peak")
    for name, row in of_kind(rows, "compensate"):
        errors = [f"{row[key]:.3f}" for key in ("error before", "error after")]
        memory = [f"{row[key] / gib:.1f} GiB" for key in ("loaded", "peak")]
        refitted = f"{row['refitted']} of {row['regressions']}"
        size = f"{row['params'][0] / 1e6:.1f} M"
        lines.append(line(name, size, *errors, refitted, f"{row.get('cpu seconds', row['seconds']):.0f} s", *memory))
    lines += ["", f"`macs_target: 0.5`, compensated; sensitivity of {IMAGES} samples, {PROBES} probes; CPU.", ""]
    steps = ("plan", "compensation")
    lines += header("model", "allocation", "MACs", "params", "pruned", "compensated", "sensitivity", *steps, "peak")
    for name, row in of_kind(rows, "allocate"):
        for way in ("uniform", "linear"):
            cells = [f"{row[f'{way} {key}']:.1%}" for key in ("macs", "params")]
            cells += [f"{row[f'{way} {key}']:.3f}" for key in ("removed", "compensated")]
            seconds = [row["sensitivity"] if way == "linear" else 0, *(row[f"{way} {step}"] for step in steps)]
            cells += [*(f"{count:.0f} s" for count in seconds), f"{row['peak'] / gib:.1f} GiB"]
            lines.append(line(name, way, *cells))
    return "\n".join(lines) + "\n"


def of_kind(rows: dict[str, Row], kind: str) -> list[tuple[str, Row]]:
    """The rows of a kind with their models, the smallest first."""
    found = [(key.split()[1], row) for key, row in rows.items() if key.startswith(kind + " ")]
    return sorted(found, key=lambda item: item[1].get("params", [0])[0])


def plot(rows: dict[str, Row], path: Path) -> None:
    """Seconds and peak memory against parameters, both axes logarithmic, with a straight line's slope for each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    kinds = {"plan": "plan and removal", "calibrate": "scores, plan, removal", "compensate": "compensation"}
    for kind, label in kinds.items():
        found = of_kind(rows, kind)
        if not found:
            continue
        params = np.array([row["params"][0] for _, row in found])
        seconds = np.array([row["seconds"] if "seconds" in row else row["plan"] + row["removal"] for _, row in found])
        for axes, values in zip(panels, (seconds, np.array([row["peak"] for _, row in found]) / 2**30), strict=True):
            slope = np.polyfit(np.log(params), np.log(values), 1)[0]
            axes.plot(params, values, "o-", label=f"{label}: grows as size to the {slope:.2f}")
    for axes, name in zip(panels, ("seconds, one thread", "peak memory, GiB"), strict=True):
        axes.set(xscale="log", yscale="log", xlabel="parameters of the dense UNet", ylabel=name)
        axes.margins(y=0.4)
        axes.legend(fontsize=8, loc="upper left")
    figure.savefig(path, dpi=110)


def main(
    result: Annotated[Path, typer.Option("--output", help="where scale.json, .md and .png go")] = RESULTS,
    only: Annotated[str | None, typer.Option(**one_of(KINDS))] = None,
    name: Annotated[str | None, typer.Option("--model", **one_of(NAMES))] = None,
    child: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure what is missing, then print the tables and draw the plot."""
    torch.set_num_threads(1)
    if child is not None and name is not None:
        row = KINDS[child][0](name)
        print(json.dumps(row | {"peak": high_water()}))
        return
    result.mkdir(parents=True, exist_ok=True)
    file = result / "scale.json"
    rows: dict[str, Row] = json.loads(file.read_text()) if file.exists() else {}
    for kind, (_, names) in KINDS.items():
        for architecture in names:
            wanted = only in (None, kind) and name in (None, architecture)
            if wanted and f"{kind} {architecture}" not in rows:
                rows[f"{kind} {architecture}"] = in_a_process(kind, architecture)
                file.write_text(json.dumps(rows, indent=1) + "\n")
                print(kind, architecture, json.dumps(rows[f"{kind} {architecture}"]), flush=True)
    (result / "scale.md").write_text(table(rows))
    plot(rows, result / "scale.png")
    sys.stdout.write(table(rows))
