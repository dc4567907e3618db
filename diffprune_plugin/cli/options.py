"""Options that several commands share, and options made of settings."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from diffprune_plugin.utils.settings import LARGEST_SEED, options_in

Command = Callable[..., None]

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
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
SetKeys = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set a native config key.")]
Pipeline = Annotated[Path, typer.Argument(help="Pipeline directory, dense or pruned.")]
PromptsFile = Annotated[
    Path | None,
    typer.Option("--prompts", metavar="FILE", help="Prompts, one a line, for pipelines that draw from them."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.", min=0, max=LARGEST_SEED)]


def takes(kind: type[Any]) -> Callable[[Command], Command]:
    """A command whose parameter ``settings`` is of this kind: on the command line each of its fields is an option."""

    def decorate(command: Command) -> Command:
        options = options_of(kind)

        @functools.wraps(command)
        def run(**given: Any) -> None:
            settings = kind(**{option.name: given.pop(option.name) for option in options})
            command(**given, settings=settings)

        parameters: list[inspect.Parameter] = []
        for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
            parameters += options if name == "settings" else [parameter]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def options_of(kind: type[Any]) -> list[inspect.Parameter]:
    """The fields of settings as typer reads parameters: type, default, help and bounds."""
    types: dict[str, Any] = get_type_hints(kind)
    annotated: Any = Annotated  # of types that are known at run time only
    found = []
    for each in options_in(kind):
        facts = each.metadata
        option = typer.Option(help=facts["help"], min=facts["least"], max=facts["most"])
        given = annotated[types[each.name], option]
        found.append(
            inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=given)
        )
    return found
