"""What mkdocs makes of these pages on the way: the front page, tables read from the code, pictures from benchmarks/.

A page asks for a generated part by ``<!-- generated: NAME -->``; an unknown name ends the build.
"""

from __future__ import annotations

import ast
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args

import typer
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File
from pydantic import BaseModel

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from diffprune_plugin import __all__ as public_names  # noqa: E402
from diffprune_plugin import adapters, export, testing  # noqa: E402
from diffprune_plugin.cli import app  # noqa: E402
from diffprune_plugin.config.documents import parse_mapping  # noqa: E402
from diffprune_plugin.config.finetuning import FinetuneConfig  # noqa: E402
from diffprune_plugin.config.lora import LoraConfig  # noqa: E402
from diffprune_plugin.config.pruning import PruningConfig  # noqa: E402
from diffprune_plugin.export.cli import app as export_app  # noqa: E402

MARK = re.compile(r"<!-- generated: ([\w ]+) -->")
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}  # attributes of pydantic's constraints
LARGEST = 2**53  # a bound beyond it is the machine's, not the user's
FOLDERS = {"adapters": ROOT / "adapters", "export": ROOT / "export"}  # rooms that lie beside the package
MODULES = {"adapters": adapters, "export": export, "testing": testing}


@event_priority(100)  # before mkdocstrings
def on_config(config: Any) -> Any:
    """mkdocstrings reads sources and imports nothing: it gets the package with all its rooms in one folder."""
    config.extra["whole"] = whole = tempfile.TemporaryDirectory()  # lives as long as the config does
    package = Path(whole.name) / "diffprune_plugin"
    package.mkdir()
    for entry in [*(ROOT / "diffprune_plugin").iterdir(), *FOLDERS.values()]:
        (package / entry.name).symlink_to(entry)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [whole.name]
    return config


def on_files(files: Any, config: Any) -> Any:
    """The README is the front page; pictures of benchmarks/ are the site's too."""
    files.append(File.generated(config, "index.md", content=front_page((ROOT / "README.md").read_text())))
    for picture in (ROOT / "benchmarks" / "results").glob("*.png"):
        name = picture.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(picture)))
    return files


def front_page(text: str) -> str:
    """The README as a page of the site: links into docs/ become links beside it, of other files the names stay."""
    text = text.replace("](docs/", "](")
    return re.sub(r"(?<!!)\[([^]]+)\]\((?!\w+:|#|[\w/-]+\.md|benchmarks/results/)[^)]+\)", r"\1", text)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    markdown = markdown.replace("](../benchmarks/results/", "](benchmarks/results/")
    return MARK.sub(lambda found: GENERATED[found[1]](), markdown)


def table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    def cell(text: str) -> str:
        return text if "`" in text else text.replace("|", "\\|")  # in code it needs no escape

    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in (head, ("---",) * len(head), *rows))


def keys_of(config: Any) -> str:
    """Every key of a config, those required first: type and bounds, default, description, as pydantic has them."""
    schema = config.model_json_schema()["properties"]

    def rows() -> Iterator[tuple[str, ...]]:
        for name, field in sorted(config.model_fields.items(), key=lambda item: not item[1].is_required()):
            allowed = ", ".join([kind(schema[name]), *bounds(field)])
            yield f"`{name}`", allowed, default(field), " ".join((field.description or "").split())

    return table(("key", "type", "default", "meaning"), rows())


def kind(schema: Mapping[str, Any]) -> str:
    """What a JSON schema allows, in words."""
    if "anyOf" in schema:
        return " or ".join(kind(part) for part in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    inner = schema.get("items") or schema.get("additionalProperties")
    found = schema.get("type", "object")  # a mapping with keys of its own is a reference
    name = {"object": "mapping", "array": "list"}.get(found, found)
    pattern = f" `{schema['pattern']}`" if "pattern" in schema else ""
    return f"{name}{pattern}{f' of {kind(inner)}' if isinstance(inner, Mapping) else ''}"


def bounds(field: Any) -> list[str]:
    """The limits of a key's number, or of the numbers in its mapping."""
    inner = [item for part in get_args(field.annotation) for item in getattr(part, "__metadata__", ())]
    constraints = [*field.metadata, *(one for item in inner for one in getattr(item, "metadata", ()))]
    found = ((sign, getattr(one, key, None)) for one in constraints for key, sign in BOUNDS.items())
    return [f"{sign} {value:g}" for sign, value in found if value is not None and value < LARGEST]


def default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return f"`{{{', '.join(f'{key}: {of}' for key, of in value.model_dump().items() if of)}}}`"
    return "" if value is None or value in ((), {}) else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def commands() -> str:
    """Every command with its arguments and options, as typer has them."""
    diffprune = typer.main.get_command(app)
    found = {f"diffprune {name}": command for name, command in diffprune.commands.items()}
    found["diffprune-export"] = typer.main.get_command(export_app)
    return "\n\n".join(command_text(name, command) for name, command in found.items())


def command_text(name: str, command: Any) -> str:
    context = command.make_context(name, [], resilient_parsing=True)

    def rows() -> Iterator[tuple[str, ...]]:
        for parameter in command.get_params(context):
            if parameter.name == "help":
                continue
            plain = parameter.default is None or callable(parameter.default) or parameter.default is False
            names = parameter.opts if parameter.param_type_name == "option" else [parameter.name.upper()]
            required = "required" if parameter.required else "" if plain else f"`{parameter.default}`"
            yield ", ".join(f"`{word}`" for word in names), required, getattr(parameter, "help", None) or ""

    usage = f"```text\n{' '.join([name, *command.collect_usage_pieces(context)])}\n```"
    return f"## {name}\n\n{command.help}\n\n{usage}\n\n{table(('', 'default', ''), rows())}\n\n{command.epilog or ''}"


def names_of(module: str, names: list[str]) -> str:
    return "\n\n".join(f"::: {module}.{name}" for name in names)


def rooms() -> str:
    """The floors of the import contract, highest first, each room with the first sentence of its docstring."""
    contract = parse_mapping((ROOT / "pyproject.toml").read_text(), ROOT / "pyproject.toml")["tool"]["importlinter"]
    layers = contract["contracts"][0]["layers"]
    lines = []
    for floor, layer in enumerate(layers, 1):
        found = (room.strip() for room in re.split(r"[|:]", layer))
        lines.append(f"{floor}. " + "<br>".join(f"**`{room}`** {purpose(room)}" for room in found))
    return "\n".join(lines)


def purpose(room: str) -> str:
    """The first sentence of a room's docstring."""
    folder = FOLDERS.get(room, ROOT / "diffprune_plugin" / room)
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    text = ast.get_docstring(ast.parse(file.read_text()))
    assert text, f"{file}: a room says what it is, in its docstring"
    return " ".join(re.split(r"\n\n|(?<=\w)\. ", text)[0].split())


GENERATED: dict[str, Callable[[], str]] = {
    "pruning keys": lambda: keys_of(PruningConfig),
    "finetune keys": lambda: keys_of(FinetuneConfig),
    "lora keys": lambda: keys_of(LoraConfig),
    "commands": commands,
    "public names": lambda: names_of("diffprune_plugin", public_names),
    **{name: partial(names_of, f"diffprune_plugin.{name}", module.__all__) for name, module in MODULES.items()},
    "rooms": rooms,
}
