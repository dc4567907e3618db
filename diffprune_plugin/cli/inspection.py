"""Commands that only read: inspect, plugins. They answer without torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from diffprune_plugin.cli.console import console, say
from diffprune_plugin.cli.options import Json

if TYPE_CHECKING:
    from diffprune_plugin.planning.plan import PruningPlan


def inspect(
    path: Annotated[Path, typer.Argument(help="Directory of a pruned pipeline or model, or an exported .onnx file.")],
    json: Json = False,
) -> None:
    """Show what was removed from a pruned model and why what stayed stayed, or where an ONNX file comes from."""
    if path.suffix == ".onnx":
        show_provenance(path, json)
        return
    from diffprune_plugin.pruning.directory import read_plan

    show_plan(read_plan(path), json)


def show_plan(plan: PruningPlan, json: bool) -> None:
    """The plan as a table, or as JSON; what fell short on standard error."""
    from diffprune_plugin.planning.report import plan_text

    if json:
        console.print_json(plan.model_dump_json())
    else:
        say(plan_text(plan, console.width))
    for line in plan.shortfalls():
        Console(stderr=True).print(f"[yellow]fell short:[/] {escape(line)}", soft_wrap=True)


def show_provenance(path: Path, json: bool) -> None:
    """What was written into an exported file about where it comes from; raises BadInput if it is damaged."""
    from diffprune_plugin.export.integrity import check_files, read_provenance

    provenance = read_provenance(path)
    if json:
        console.print_json(data=provenance)
    else:
        widest = max(map(len, provenance), default=0)
        for key, value in provenance.items():
            say(f"{key:<{widest}}  {value}")
    check_files(path)
    if not json:
        say(f"{path}: undamaged, its files have the manifest's SHA-256")


def card(
    directory: Annotated[Path, typer.Argument(help="Pipeline directory, dense, pruned or of ONNX files.")],
    evaluation: Annotated[Path | None, typer.Option(help="Directory that diffprune evaluate wrote.")] = None,
    verdict: Annotated[Path | None, typer.Option(help="Verdict (.json) of diffprune-export.")] = None,
) -> None:
    """Write or renew a pipeline's model card, README.md; what was written around our part of it stays."""
    from diffprune_plugin.pruning.card import renew_card
    from diffprune_plugin.pruning.card_proofs import told_by_evaluation, told_by_verdict

    proofs: dict[str, Any] = {}
    if evaluation:
        file = evaluation / "evaluation.json" if evaluation.is_dir() else evaluation
        proofs["`diffprune evaluate`"] = told_by_evaluation(file, directory)
    if verdict:
        proofs["the export"] = told_by_verdict(verdict, directory)
    say(f"wrote {renew_card(directory, proofs)}")


def plugins(json: Json = False) -> None:
    """List what plugins register, by kind, the packages it comes from, and what failed to load and why."""
    from diffprune_plugin.plugins import adapters, compensations, criteria, plugin_manager, timestep_weights

    found = plugin_manager()
    offers: dict[str, list[str]] = {}
    kinds = {
        "criterion": criteria,
        "timestep weights": timestep_weights,
        "compensation": compensations,
        "adapter": adapters,
    }
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
    for row in rows:
        say(f"{row['plugin']} ({row['package']} {row['version']})")
        for line in [*row["offers"], *(["failed to load: " + row["failure"]] if row["failure"] else [])]:
            say(f"  {line}")
