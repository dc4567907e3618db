"""Commands that make models smaller, and train them further: prune, finetune, config, demo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from diffprune_plugin.cli.console import console, say
from diffprune_plugin.cli.inspection import show_plan
from diffprune_plugin.cli.options import ConfigFile, Data, FromFlags, Json, Model, Seed, SetKeys
from diffprune_plugin.cli.reports import write_frontier, write_pruning
from diffprune_plugin.errors import BadInput
from diffprune_plugin.export.options import Overwrite, Report
from diffprune_plugin.utils.written_paths import check_different

if TYPE_CHECKING:
    from diffprune_plugin.config.dialects.table import Listing
    from diffprune_plugin.config.finetuning import FinetuneConfig
    from diffprune_plugin.config.pruning import PruningConfig
    from diffprune_plugin.planning.plan import Latency
    from diffprune_plugin.recovery.compensate import CompensationReport


def prune(
    context: typer.Context,
    config: ConfigFile = None,
    flags: FromFlags = None,
    model: Model = None,
    data: Data = None,
    output: Annotated[Path | None, typer.Option(help="Where the pruned model goes; overrides the config's.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, write nothing.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the widths, and what others would cost, as PNG.")] = None,
    keys: SetKeys = None,
    overwrite: Overwrite = False,
    report: Report = None,
    json: Json = False,
) -> None:
    """Prune a UNet or transformer by a config, of this tool or another, and write a directory that diffusers loads."""
    from diffprune_plugin.config.dialects import read, settle
    from diffprune_plugin.utils.distributed import Processes
    from diffprune_plugin.utils.html_report import check_report
    from diffprune_plugin.workflow import prune_shared

    if report:
        check_report(report, overwrite)

    def given() -> tuple[Listing, PruningConfig]:
        listing = read(config, flags)
        return listing, settle(listing, keys or [], model=model, data=data, output=output)

    check_plot(plot, overwrite)
    accelerator = context.obj  # of accelerate launch
    processes = Processes(accelerator and accelerator.device)
    listing, settled = processes.on_all(given)
    check_different({"--plot": plot, "--report": report}, settled.output)
    if listing.dialect != "native" and processes.is_first:
        Console(stderr=True).print(f"{listing.summary()}; diffprune config lists them", markup=False, soft_wrap=True)
    try:
        result = prune_shared(settled, accelerator, overwrite=overwrite, dry_run=dry_run)
    except BadInput as error:
        raise listing.located(error) from None
    if result is None:  # the first process speaks for all
        return
    show_plan(result.plan, json)
    if result.plan.latency and not json:
        say(latency_line(result.plan.target["latency_target"], result.plan.latency))
    if accelerator and not json:
        say(f"processes: {processes.count} ({accelerator.device.type})")
    if not json and not dry_run:
        console.print(compensation_line(result.compensation))
        say(f"wrote {settled.output}; load it with: import diffprune_plugin; ", end="")
        say(f"DiffusionPipeline.from_pretrained({settled.output!r})")
    if plot:
        result.plot(plot)
        if not json:
            say(f"wrote {plot}")
    if report:
        write_pruning(report, settled, result)


def frontier(
    config: ConfigFile = None,
    flags: FromFlags = None,
    model: Model = None,
    data: Data = None,
    keys: SetKeys = None,
    verify: Annotated[
        int, typer.Option(help="Budgets to really prune, compensate and measure, both ways.", min=0, max=8)
    ] = 0,
    latency: Annotated[
        bool, typer.Option("--latency", help="Against the latency on the runtime of the config's 'latency', measured.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw it as PNG.")] = None,
    overwrite: Overwrite = False,
    report: Report = None,
    json: Json = False,
) -> None:
    """Show what every budget would cost, before choosing one: the error of the output, uniform and allocated."""
    from diffprune_plugin.config.dialects import read, settle
    from diffprune_plugin.utils.html_report import check_report
    from diffprune_plugin.workflow import frontier_of

    if report:
        check_report(report, overwrite)
    check_plot(plot, overwrite, drawing=report is not None)
    check_different({"--plot": plot, "--report": report})
    listing = read(config, flags)
    try:
        found = frontier_of(settle(listing, keys or [], model=model, data=data), verify, latency=latency)
    except BadInput as error:
        raise listing.located(error) from None
    if report:
        write_frontier(report, found)
    if json:
        console.print_json(data=found.as_dict())
    else:
        console.print(found.timed_table() if latency else found.table())
    if plot:
        found.plot(plot)
        if not json:
            say(f"wrote {plot}")


def check_plot(plot: Path | None, overwrite: bool, drawing: bool = False) -> None:
    """Raises MissingExtra without matplotlib where something is drawn, BadInput for a file that cannot be written."""
    from diffprune_plugin.utils.files import check_picture
    from diffprune_plugin.utils.optional import check_installed

    if plot or drawing:
        check_installed("matplotlib")
    if plot:
        check_picture(plot, overwrite)


def latency_line(asked: float, latency: Latency) -> str:
    """In one line what latency was asked for, and what was measured."""
    share, low, high = latency.measured
    return (
        f"latency: {share:.1%} [{low:.1%}, {high:.1%}] of the dense model's {latency.dense_ms:.3g} ms, asked "
        f"{asked:.1%}; {latency.provider} {latency.dtype}, batch {latency.batch}, {latency.attempts} plans measured"
    )


def compensation_line(report: CompensationReport | None) -> str:
    """In one line whether the layers behind the cuts were refitted."""
    if report is None:
        return "not compensated: fine-tune it, or set 'compensate: true' (needs data and a pipeline)"
    refitted = sum(repair.refitted for repair in report.repairs)
    return f"compensated: {refitted} of {len(report.repairs)} regressions improved on held-out samples and were taken"


def finetune(
    config: Annotated[Path, typer.Argument(help="Config in YAML, JSON or TOML.")],
    model: Annotated[Path | None, typer.Option(help="Pruned pipeline directory; overrides the config's.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where the trained model goes; overrides the config's.")] = None,
    keys: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set a config key.")] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Train a pruned model further, on one device or, under accelerate launch, on several."""
    from diffprune_plugin.config.base import read_as
    from diffprune_plugin.config.finetuning import FinetuneConfig
    from diffprune_plugin.recovery.finetune import finetune as run
    from diffprune_plugin.utils.distributed import Processes

    def given() -> FinetuneConfig:
        return read_as(FinetuneConfig, config, keys or [], model=model, output=output)

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
    written = "the moving average of the weights" if settled.ema_decay else "the last weights"
    if settled.lora and not settled.lora.merge:
        written = "the weights as they were, the trained adapter beside them (pipeline.load_lora_weights)"
    say(f"wrote {settled.output}: {written}, and the loss curve in finetune.json")


def config(
    config: ConfigFile = None,
    flags: FromFlags = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the native config to this file.")] = None,
    model: Model = None,
    data: Data = None,
    keys: SetKeys = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Translate a config to the native form, and list what becomes of each of its keys and why."""
    from json import dumps

    import yaml

    from diffprune_plugin.config.dialects import read, translated
    from diffprune_plugin.utils.files import check_file, write_text

    if output:
        check_file(output, overwrite)
        if output.suffix == ".toml":
            raise BadInput(f"{output}: TOML is not written; name a .yaml or a .json")
    listing = read(config, flags)
    if json:
        console.print_json(data=listing.as_dict(), default=str)
    else:
        console.print(listing.table())
    content = translated(listing, keys or [], model=model, data=data)
    native = yaml.safe_dump(content, sort_keys=False)
    if output:
        write_text(output, f"{dumps(content, indent=1)}\n" if output.suffix == ".json" else native)
    if not json:
        say(f"wrote {output}" if output else native)


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the models and the report.")] = Path("diffprune-demo"),
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Prune the model inside the package, draw beside the dense one, and write report.md."""
    from diffprune_plugin.demo import run

    report = run(output, seed=seed, overwrite=overwrite, console=console)
    say(f"wrote {report}")
