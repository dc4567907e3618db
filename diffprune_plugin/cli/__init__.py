"""The command ``diffprune``. Imports what is heavy only inside the commands, so that --help answers at once."""

from __future__ import annotations

from typing import Annotated

import typer

from diffprune_plugin.cli.evaluation import evaluate, sample
from diffprune_plugin.cli.inspection import card, inspect, plugins
from diffprune_plugin.cli.pruning import config, demo, finetune, frontier, prune
from diffprune_plugin.export.cli import bench
from diffprune_plugin.utils.command_options import Command, with_paths
from diffprune_plugin.utils.entry_point import run_app

LAUNCH = "or on several GPUs: accelerate launch -m diffprune_plugin"
# In the order of --help, each with an example.
COMMANDS: dict[Command, str] = {
    prune: f"prune config.yaml --set importance.threshold=0.02 --output small, {LAUNCH} prune config.yaml",
    frontier: "frontier config.yaml --verify 2 --plot frontier.png",
    finetune: f"finetune config.yaml, {LAUNCH} finetune config.yaml",
    config: "config nncf.json -o native.yaml",
    inspect: "inspect pruned",
    card: "card pruned --evaluation evaluation",
    sample: "sample pruned -o grid.png --count 16 --seed 0",
    evaluate: "evaluate pruned --against dense --reference images --features inception.safetensors --count 5000",
    plugins: "plugins",
    demo: "demo --output diffprune-demo",
    bench: "bench dense.onnx pruned.onnx --batch 1,4",
}
app = typer.Typer(
    name="diffprune",
    help="Structural pruning of diffusion UNets and transformers. Start with: diffprune demo",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
for command, example in COMMANDS.items():
    app.command(epilog=f"Example: diffprune {example}")(with_paths(command))


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Structural pruning of diffusion UNets and transformers. Start with: diffprune demo"""


def main(arguments: list[str] | None = None) -> None:
    """Run the command; an error made for the user ends in one line and its exit code."""
    run_app(app, arguments)
