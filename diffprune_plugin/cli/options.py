"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffprune_plugin.utils.command_options import LARGEST_SEED

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
ConfigFile = Annotated[
    Path | None,
    typer.Argument(help="Native YAML, JSON or TOML; NNCF's JSON; Torch-Pruning's arguments; or Diff-Pruning's flags."),
]
FromFlags = Annotated[
    str | None, typer.Option("--from-flags", metavar="FLAGS", help="Diff-Pruning's flags, in place of CONFIG.")
]
Model = Annotated[Path | None, typer.Option(help="Directory of a pipeline or a model; overrides the config's.")]
Data = Annotated[
    Path | None, typer.Option(help="Images (folder or .npz) or latents (.safetensors); overrides the config's.")
]
SetKeys = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set a native config key.")]
Pipeline = Annotated[Path, typer.Argument(help="Pipeline directory, dense or pruned.")]
PromptsFile = Annotated[
    Path | None,
    typer.Option("--prompts", metavar="FILE", help="Prompts, one a line, for pipelines that draw from them."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.", min=0, max=LARGEST_SEED)]
