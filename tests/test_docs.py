"""The README and the pages say what holds: their code runs or says why not, and the site builds without a warning."""

from __future__ import annotations

import importlib.util
import inspect
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import typer
from accelerate.commands.launch import launch_command_parser
from diffusers import DiffusionPipeline
from PIL import Image
from tiny_pipelines import captioned_folder, stable_diffusion

import diffprune_plugin as dp
from diffprune_plugin import cli, demo
from diffprune_plugin.config.dialects import settle, translate
from diffprune_plugin.config.documents import parse_mapping
from diffprune_plugin.config.finetuning import FinetuneConfig
from diffprune_plugin.config.pruning import PruningConfig
from diffprune_plugin.criteria.sweep import Sweep
from diffprune_plugin.export import cli as export_cli
from diffprune_plugin.recovery.compensate import compensate_

ROOT = Path(__file__).parent.parent
GUIDE = sorted((ROOT / "docs" / "guide").glob("*.md"))
PAGES = [
    ROOT / "README.md",
    *GUIDE,
    *(ROOT / "docs" / f"{name}.md" for name in ("install", "other-tools", "extending")),
]
PYPROJECT = parse_mapping((ROOT / "pyproject.toml").read_text(), Path("pyproject.toml"))
FENCED = re.compile(r"(?:<!-- not run: ([^\n]+) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LONGEST = 150  # lines of the README
# What makes a command of a page take seconds instead of minutes; its own words stand before these.
FEWER = "sensitivity_samples=4"
FAST = {
    "prune": ("--set", "timesteps=5", "--set", "batch_size=4", "--set", "compensate=false", "--set", FEWER),
    "sample": ("--count", "2", "--steps", "2"),
    "evaluate": ("--count", "2", "--steps", "2", "--loss-samples", "2"),
    "finetune": ("--set", "steps=2", "--set", "batch_size=2"),
}
COMMANDS = typer.main.get_command(cli.app).commands | {"export": typer.main.get_command(export_cli.app)}


class Block(NamedTuple):
    language: str
    text: str
    reason: str  # why it is not run


def blocks(text: str) -> Iterator[Block]:
    for reason, language, body in re.findall(
        r"(?:<!-- not run: ([^\n]+) -->\n)?^```(\w*)\n(.*?)^```$", text, re.M | re.S
    ):
        yield Block(language, body, reason)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with what pages take for granted: models, images, configs that other pages show."""
    shutil.copytree(demo.MODEL, tmp_path / "my-ddpm")
    shutil.copy(ROOT / "tests" / "configs" / "nncf_filter_pruning.json", tmp_path / "nncf.json")
    for name, images in (("train-images", demo.CALIBRATION_IMAGES), ("test-images", demo.HELD_OUT_IMAGES)):
        (tmp_path / name).mkdir()
        for i, pixels in enumerate(np.load(images)["images"][:8]):
            Image.fromarray(pixels[..., 0]).save(tmp_path / name / f"{i}.png")
    stable_diffusion(tmp_path / "tokenizers").save_pretrained(tmp_path / "my-stable-diffusion")
    captioned_folder(tmp_path / "captioned-images", 16)
    for page in GUIDE:
        for block in blocks(page.read_text()):
            write_if_named(block.text, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_package", raising=False)
    for function, values in (
        (Sweep.__init__, {"samples": 8, "curve_samples": 1}),
        (dp.calibrate, {"timesteps": 5, "batch_size": 8, "progress": False}),
        (compensate_, {"samples": 16}),
    ):
        for key, value in values.items():
            assert key in inspect.unwrap(function).__kwdefaults__
            monkeypatch.setitem(inspect.unwrap(function).__kwdefaults__, key, value)
    return tmp_path


def prune_to(output: Path, model: Path) -> None:
    """A pruned pipeline, where a page has none made before it needs one."""
    pipeline = DiffusionPipeline.from_pretrained(model)
    dp.remove_(pipeline.unet, dp.make_plan(pipeline.unet, "magnitude", pruning_ratio=0.3))
    dp.save(pipeline, output)


def write_if_named(text: str, place: Path) -> None:
    """A block that begins with a file's name is that file."""
    if named := re.match(r"# (\w+\.\w+)\b", text):
        (place / named[1]).write_text(text)


def check_python(block: Block, run: Any) -> None:
    code = compile(block.text, "page", "exec")
    if not block.reason:
        exec(code, {"__name__": "page"})


def check_yaml(block: Block, run: Any) -> None:
    values = parse_mapping(block.text, Path("page.yaml"))
    if "steps" in values:
        FinetuneConfig.make(values)
    else:
        settle(translate(values, "page", ()))
        if values.get("model") == "my-ddpm" and "latency" not in values:
            Path("page.yaml").write_text(block.text)
            code, _, error = run("prune", "page.yaml", "--dry-run", *FAST["prune"])
            assert code == 0, error


def check_shell(block: Block, run: Any) -> None:
    """Every word is parsed by the command it is meant for; then ``diffprune`` runs."""
    for line in block.text.splitlines():
        words = shlex.split(line, comments=True)
        command = parsed(words)
        if command and not block.reason:
            code, _, error = run(*command, *FAST.get(command[0], ()))
            assert code == 0, error


def parsed(words: list[str]) -> list[str]:
    """What ``diffprune`` has to run, if anything; of other programs what can be known without them is checked."""
    if words[:2] == ["accelerate", "launch"]:
        given = launch_command_parser().parse_args(words[2:])
        assert (given.module, given.training_script) == (True, "diffprune_plugin")
        words = ["diffprune", *given.training_script_args]
    match words:
        case ["diffprune", *command]:
            COMMANDS[command[0]].make_context(command[0], command[1:])
            return command
        case ["diffprune-export", *options]:
            COMMANDS["export"].make_context("diffprune-export", options)
        case ["pip", "install", what]:
            assert set(re.findall(r"\w+", what)) <= set(PYPROJECT["project"]["optional-dependencies"])
        case ["make", target]:
            assert f"\n{target}:" in (ROOT / "Makefile").read_text()
        case ["python", "-m", module, ">", _]:
            assert importlib.util.find_spec(module)
        case _:
            assert words[0] == "olive"
    return []


CHECKS = {
    "python": check_python,
    "shell": check_shell,
    "yaml": check_yaml,
    "toml": lambda block, run: parse_mapping(block.text, Path("page.toml")),
    "text": lambda block, run: None,
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_a_page_runs_or_says_why_not(page: Path, place: Path, run: Any) -> None:
    text = page.read_text()
    found = list(blocks(text))
    assert text.count("```") == 2 * len(found) > 0
    if "output: my-ddpm-small" not in text:
        prune_to(place / "my-ddpm-small", place / "my-ddpm")
    for block in found:
        write_if_named(block.text, place)
        CHECKS[block.language](block, run)


@pytest.mark.parametrize(
    ("language", "text", "message"),
    [
        ("python", "from diffprune_plugin import prune_everything", "prune_everything"),
        ("shell", "diffprune prune config.yaml --dryrun", "dryrun"),
        ("shell", "diffprune inspect nowhere", "nowhere"),
        ("shell", "diffprune-export model.onnx --speedup 1", "speedup"),
        ("yaml", "model: my-ddpm\nratio: 0.3", "ratio"),
        ("yaml", "model: a\ndata: b\nsteps: 0", "steps"),
    ],
)
def test_a_block_that_does_not_hold_is_found(language, text, message, place: Path, run: Any) -> None:
    with pytest.raises(Exception, match=message):
        CHECKS[language](Block(language, text, ""), run)


def test_the_readme_is_read_in_two_minutes() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= LONGEST


@pytest.fixture(scope="module")
def pages(call: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built with --strict: a dead link or a name that is not there ends the build."""
    site = tmp_path_factory.mktemp("site")
    call(sys.executable, "-m", "mkdocs", "build", "--strict", "-d", site, cwd=ROOT, NO_MKDOCS_2_WARNING=1)
    return site


def test_the_reference_has_every_key_command_and_public_name(pages: Path) -> None:
    keys, commands, names = (
        (pages / "reference" / name / "index.html").read_text() for name in ("config", "commands", "api")
    )
    for key in (*PruningConfig.model_fields, *FinetuneConfig.model_fields):
        assert f"<code>{key}</code>" in keys
    for name, command in COMMANDS.items():
        assert name in commands
        for parameter in command.params:
            assert parameter.opts[0] in commands
    for name in dp.__all__:
        assert f'id="diffprune_plugin.{name}"' in names


def test_the_picture_of_the_rooms_is_that_of_the_contract(pages: Path) -> None:
    layers = PYPROJECT["tool"]["importlinter"]["contracts"][0]["layers"]
    shown = re.findall(r"<strong><code>(\w+)</code></strong>", (pages / "architecture" / "index.html").read_text())
    assert shown == [room for layer in layers for room in re.findall(r"\w+", layer)]
