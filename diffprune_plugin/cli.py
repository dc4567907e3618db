"""The command ``diffprune``. Imports what is heavy only inside the commands, so that --help answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from diffprune_plugin.errors import BadInput
from diffprune_plugin.export.cli import Overwrite, bench
from diffprune_plugin.utils.entry_point import run_app

if TYPE_CHECKING:
    from diffprune_plugin.config.dialects.table import Listing
    from diffprune_plugin.config.pruning import PruningConfig
    from diffprune_plugin.planning.plan import PruningPlan
    from diffprune_plugin.recovery.compensate import CompensationReport

app = typer.Typer(
    name="diffprune",
    help="Structural pruning of diffusion UNets. Start with: diffprune demo",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
console = Console()
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Scheduler = Annotated[str, typer.Option(help="ddim, ddpm, dpm, or a diffusers class.")]
Skip = Annotated[str, typer.Option(help="Spacing of the timesteps: uniform or quad.")]
ConfigFile = Annotated[
    Path | None,
    typer.Argument(help="Native YAML, JSON or TOML; NNCF's JSON; Torch-Pruning's arguments; or Diff-Pruning's flags."),
]
FromFlags = Annotated[
    str | None, typer.Option("--from-flags", metavar="FLAGS", help="Diff-Pruning's flags, in place of CONFIG.")
]
Model = Annotated[str | None, typer.Option(help="Pipeline or UNet directory; overrides the config's.")]
Data = Annotated[
    str | None, typer.Option(help="Images (folder or .npz) or latents (.safetensors); overrides the config's.")
]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set a native config key.")]
PromptsFile = Annotated[
    Path | None,
    typer.Option("--prompts", metavar="FILE", help="Prompts, one a line, for pipelines that draw from them."),
]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale; by default the pipeline's own.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.", min=0, max=2**63 - 1)]


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Structural pruning of diffusion UNets. Start with: diffprune demo"""


@app.command(
    epilog="Example: diffprune prune config.yaml --set importance.threshold=0.02 --output small, or on several GPUs: "
    "accelerate launch -m diffprune_plugin prune config.yaml"
)
def prune(
    context: typer.Context,
    config: ConfigFile = None,
    flags: FromFlags = None,
    model: Model = None,
    data: Data = None,
    output: Annotated[str | None, typer.Option(help="Where the pruned model goes; overrides the config's.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, write nothing.")] = False,
    settings: Settings = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Prune a UNet by a config, of this tool or another, and write a directory that diffusers loads."""
    from diffprune_plugin.config.dialects import read, settle
    from diffprune_plugin.utils.distributed import Processes
    from diffprune_plugin.workflow import prune_shared

    def given() -> tuple[Listing, PruningConfig]:
        listing = read(config, flags)
        return listing, settle(listing, settings or [], model=model, data=data, output=output)

    accelerator = context.obj  # of accelerate launch
    processes = Processes(accelerator and accelerator.device)
    listing, settled = processes.on_all(given)
    if listing.dialect != "native" and processes.is_first:
        Console(stderr=True).print(f"{listing.summary()}; diffprune config lists them", markup=False, soft_wrap=True)
    try:
        result = prune_shared(settled, accelerator, overwrite=overwrite, dry_run=dry_run)
    except BadInput as error:
        raise listing.located(error) from None
    if result is None:  # the first process speaks for all
        return
    show_plan(result.plan, json)
    if accelerator and not json:
        say(f"processes: {processes.count} ({accelerator.device.type})")
    if not json and not dry_run:
        console.print(compensation_line(result.compensation))
        say(f"wrote {settled.output}; load it with: import diffprune_plugin; ", end="")
        say(f"DiffusionPipeline.from_pretrained({settled.output!r})")


@app.command(
    epilog="Example: diffprune finetune config.yaml, or on several GPUs: "
    "accelerate launch -m diffprune_plugin finetune config.yaml"
)
def finetune(
    config: Annotated[Path, typer.Argument(help="Config in YAML, JSON or TOML.")],
    model: Annotated[str | None, typer.Option(help="Pruned pipeline directory; overrides the config's.")] = None,
    output: Annotated[str | None, typer.Option(help="Where the trained model goes; overrides the config's.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set a config key.")] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Train a pruned model further, on one device or, under accelerate launch, on several."""
    from diffprune_plugin.config.base import read_as
    from diffprune_plugin.config.finetuning import FinetuneConfig
    from diffprune_plugin.recovery.finetune import finetune as run
    from diffprune_plugin.utils.distributed import Processes

    def given() -> FinetuneConfig:
        return read_as(FinetuneConfig, config, settings or [], model=model, output=output)

    processes = Processes.of_accelerate()
    settled = processes.on_all(given)
    report = run(settled, overwrite=overwrite)
    if not processes.is_first:  # the first process speaks for all
        return
    if json:
        console.print_json(data=report.as_dict())
        return
    first, last = report.ends()
    say(f"{report.steps} steps in {report.seconds:.0f} s on {report.processes} processes ({report.device}): ", end="")
    say(f"loss {first:.4f} -> {last:.4f} (means of the first and last tenth)")
    say(f"wrote {settled.output}: the moving average of the weights, and the loss curve in finetune.json")


@app.command(epilog="Example: diffprune config nncf.json -o native.yaml")
def config(
    config: ConfigFile = None,
    flags: FromFlags = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the native config to this file.")] = None,
    model: Model = None,
    data: Data = None,
    settings: Settings = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Translate a config to the native form, and list what becomes of each of its keys and why."""
    import yaml

    from diffprune_plugin.config.dialects import read, translated
    from diffprune_plugin.utils.files import write_text

    if output and output.exists() and not overwrite:
        raise BadInput(f"{output} exists; use --overwrite or another file")
    listing = read(config, flags)
    if json:
        console.print_json(data=listing.as_dict(), default=str)
    else:
        console.print(listing.table())
    native = yaml.safe_dump(translated(listing, settings or [], model=model, data=data), sort_keys=False)
    if output:
        write_text(output, native)
    if not json:
        say(f"wrote {output}" if output else native)


@app.command(epilog="Example: diffprune inspect pruned")
def inspect(
    path: Annotated[Path, typer.Argument(help="Pruned pipeline or UNet directory, or an exported .onnx file.")],
    json: Json = False,
) -> None:
    """Show what was removed from a pruned model and why what stayed stayed, or where an ONNX file comes from."""
    if path.suffix == ".onnx":
        show_provenance(path, json)
        return
    from diffprune_plugin.pruning.directory import read_plan

    show_plan(read_plan(path), json)


@app.command(epilog="Example: diffprune sample pruned -o grid.png --count 16 --seed 0")
def sample(
    directory: Annotated[Path, typer.Argument(help="Pipeline directory, dense or pruned.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="PNG file with the images.")],
    count: Annotated[int, typer.Option(help="Number of images.", min=1)] = 16,
    steps: Annotated[int, typer.Option(help="Sampling steps.", min=1)] = 50,
    scheduler: Scheduler = "ddim",
    skip: Skip = "uniform",
    prompts: PromptsFile = None,
    guidance_scale: Guidance = None,
    seed: Seed = 0,
    device: Device = "cpu",
    overwrite: Overwrite = False,
) -> None:
    """Draw images; the same seed gives every model the same noise."""
    from diffprune_plugin.evaluation.images import image_grid, save_image
    from diffprune_plugin.evaluation.prompts import read_prompts
    from diffprune_plugin.evaluation.sampling import sample_images
    from diffprune_plugin.pruning.loading import load_pipeline
    from diffprune_plugin.utils.device import check_device

    check_device(device)
    if output.exists() and not overwrite:
        raise BadInput(f"{output} exists; use --overwrite or another file")
    texts = read_prompts(prompts) if prompts else ()
    images = sample_images(
        load_pipeline(directory).to(device),
        count,
        seed=seed,
        steps=steps,
        scheduler=scheduler,
        skip=skip,
        prompts=texts,
        guidance_scale=guidance_scale,
    )
    rows = {f"{directory}, seed {seed}": images[:8]} | {
        " " * i: images[8 * i : 8 * i + 8] for i in range(1, -(-count // 8))
    }
    save_image(image_grid(rows, scale=2 if images[0].width < 128 else 1), output)
    say(f"wrote {output}")


@app.command(
    epilog="Example: diffprune evaluate pruned --against dense --reference images --features inception.safetensors "
    "--count 5000"
)
def evaluate(
    directory: Annotated[Path, typer.Argument(help="Pipeline directory, dense or pruned.")],
    against: Annotated[Path | None, typer.Option(help="Dense pipeline directory to compare with.")] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Real images: a folder (captions: metadata.jsonl) or .npz.")
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(help="Height and width to which real images are resized and cropped.", min=1)
    ] = None,
    features: Annotated[
        Path | None, typer.Option(help="Feature network (.onnx), or Inception's weights (.safetensors).")
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory for the result.")] = Path("evaluation"),
    scheduler: Scheduler = "ddim",
    steps: Annotated[int, typer.Option(help="Sampling steps.", min=1)] = 50,
    skip: Skip = "uniform",
    prompts: PromptsFile = None,
    guidance_scale: Guidance = None,
    count: Annotated[int, typer.Option(help="Images of each model; 0 draws none.", min=0)] = 64,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(help="Images a pass.", min=1)] = 32,
    loss_samples: Annotated[int, typer.Option(help="Samples for each point of the loss curve.", min=2)] = 32,
    device: Device = "cpu",
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Measure a model: size, loss per timestep, distance to real images, likeness to the dense model's images."""
    from diffprune_plugin.evaluation.evaluate import run
    from diffprune_plugin.evaluation.settings import Drawing

    drawing = Drawing(
        count=count,
        seed=seed,
        scheduler=scheduler,
        steps=steps,
        skip=skip,
        batch_size=batch_size,
        guidance_scale=guidance_scale,
        loss_samples=loss_samples,
    )
    result = run(
        directory,
        output,
        against=against,
        reference=reference,
        features=features,
        prompts=prompts,
        resolution=resolution,
        drawing=drawing,
        device=device,
        overwrite=overwrite,
    )
    if json:
        console.print_json(data=result.facts)
        return
    say(result.markdown())
    say(f"wrote {output}")


@app.command(epilog="Example: diffprune plugins")
def plugins(json: Json = False) -> None:
    """List criteria, timestep weights and adapters, the packages they come from, and what failed to load and why."""
    from diffprune_plugin.plugins import adapters, criteria, plugin_manager, timestep_weights

    found = plugin_manager()
    offers: dict[str, list[str]] = {}
    kinds = {"criterion": criteria, "timestep weights": timestep_weights, "adapter": adapters}
    for kind, entries in ((kind, collect(found)) for kind, collect in kinds.items()):
        for name, entry in entries.items():
            offers.setdefault(entry.plugin, []).append(f"{kind} {name}")
    rows: list[dict[str, Any]] = [
        {"plugin": p.name, "package": p.package, "version": p.version, "hooks": list(p.hooks)}
        | {"offers": offers.get(p.name, []), "failure": p.failure}
        for p in found.found
    ]
    if json:
        console.print_json(data=rows)
        return
    table = Table("plugin", "package", "version", "offers", "failed to load because")
    for row in rows:
        table.add_row(row["plugin"], row["package"], row["version"], "\n".join(row["offers"]), escape(row["failure"]))
    console.print(table)


@app.command(epilog="Example: diffprune demo --output diffprune-demo")
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the models and the report.")] = Path("diffprune-demo"),
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Prune the model inside the package, draw beside the dense one, and write report.md."""
    from diffprune_plugin.demo import run

    report = run(output, seed=seed, overwrite=overwrite, console=console)
    say(f"wrote {report}")


app.command(epilog="Example: diffprune bench dense.onnx pruned.onnx --batch 1,4")(bench)


def say(line: str, end: str = "\n") -> None:
    """A line as it is: names that users chose are no markup."""
    console.print(line, end=end, markup=False, soft_wrap=True)


def show_provenance(path: Path, json: bool) -> None:
    """What was written into an exported file about the model that it was made from."""
    from diffprune_plugin.export.integrity import read_provenance

    provenance = read_provenance(path)
    if json:
        console.print_json(data=provenance)
        return
    table = Table("key", "value")
    for key, value in provenance.items():
        table.add_row(key, escape(value))
    console.print(table)


def compensation_line(report: CompensationReport | None) -> str:
    """In one line whether the layers behind the cuts were refitted."""
    if report is None:
        return "not compensated: fine-tune it, or set 'compensate: true' (needs data and a pipeline)"
    refitted = sum(repair.refitted for repair in report.repairs)
    return f"compensated: {refitted} of {len(report.repairs)} regressions improved on held-out samples and were taken"


def show_plan(plan: PruningPlan, json: bool) -> None:
    """The plan as a table, or as JSON; what fell short on standard error."""
    from diffprune_plugin.planning.report import plan_table

    if json:
        console.print_json(plan.model_dump_json())
    else:
        console.print(plan_table(plan))
    for line in plan.shortfalls():
        Console(stderr=True).print(f"[yellow]fell short:[/] {escape(line)}", soft_wrap=True)


def main(arguments: list[str] | None = None) -> None:
    """Run the command; an error made for the user ends in one line and its exit code."""
    run_app(app, arguments)


if __name__ == "__main__":
    main()
