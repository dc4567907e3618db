"""What lies where in a model directory, read without the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffprune_plugin.errors import BadInput
from diffprune_plugin.planning.plan import PLAN_FILE, PruningPlan
from diffprune_plugin.plugins import adapters, components, no_adapter, no_denoiser, plugin_manager
from diffprune_plugin.utils import reading
from diffprune_plugin.utils.files import check_place, sweep

PREFIX = "Pruned"  # of a pruned model's class
WEIGHTS = "diffusion_pytorch_model.safetensors"
LOADER_FILE = "diffprune_plugin.py"  # for diffusers without this package: named as model_index.json names the library
DENSE_CONFIG = "dense_config.json"  # where config.json says the widths that are left (see `stock`)
# Classes that diffusers has split up by their config's norm_type, as it maps them; published DiT and PixArt name them.
SPLIT = {
    ("Transformer2DModel", "ada_norm_zero"): "DiTTransformer2DModel",
    ("Transformer2DModel", "ada_norm_single"): "PixArtTransformer2DModel",
}
# SHA-256 of every loader that a version of this package wrote; the last is that of now.
LOADERS = (
    "d8c93281aa987b748fc8145cc0738a386a799345b7033fca71276d5e6c4aa516",
    "99f862ac4a6c547117dfc69ca420db87c71a08ccabd2cf3e6e2f470892125faf",
    "1199e00be7d2bb81196c43d032def2c36692f6669f2939366f83e9411c4ed12b",
    "f04e3810ac0581736691ccff8f5a5512cf4310ef8b1c5bafb870e25d9fc74d17",
)
CONFIG_FILE = "diffprune.yaml"
COMPENSATION_FILE = "compensation.json"
ADAPTER_FILE = "pytorch_lora_weights.safetensors"  # where diffusers looks for one
SOURCE_KEY = "_name_or_path"  # where diffusers and transformers write down what a config was loaded from


def progress_directory(output: str | Path) -> Path:
    """Where an interrupted run keeps what it needs to go on: beside the output."""
    return Path(output).parent / f".{Path(output).name}.progress"


def check_kept(calibration: str | None, sensitivity: str | None) -> None:
    """Raises BadInput where what is measured could not be kept; what killed runs left there goes, since who reads it
    later sweeps nothing."""
    for what, path in (("calibration", calibration), ("sensitivity", sensitivity)):
        if path:
            check_place(Path(path), what)
            sweep(Path(path))


def model_folder(directory: Path) -> Path:
    """Where the UNet of a pipeline or UNet directory lies; raises BadInput if it is neither."""
    if not directory.is_dir():
        raise BadInput(f"{directory}: no such directory; give a pipeline directory or a UNet directory")
    name = component_in(directory) if (directory / "model_index.json").exists() else ""
    folder = directory / name
    if not (folder / "config.json").exists():
        raise BadInput(f"{directory}: neither a pipeline (model_index.json, unet/) nor a UNet (config.json) directory")
    if any(folder.glob("*.onnx")) and not any(folder.glob("*.safetensors")):
        raise BadInput(
            f"{directory}: a directory of ONNX files, which diffprune_plugin.export.ORTPipeline draws from; give the "
            "PyTorch directory that it was made of"
        )
    return folder


def described_in(folder: Path) -> Path:
    """The config that says what a model's class is, a pruned one's by that name, and its dense sizes."""
    dense = folder / DENSE_CONFIG
    return dense if dense.exists() else folder / "config.json"


def loader_bytes() -> bytes:
    """The loader that lies beside a pruned model's weights, the same everywhere."""
    return (Path(__file__).parent / "standalone.py").read_bytes()


def class_in(config: Path) -> str:
    """The model class that a config names; one that diffusers has split up since is what it loads it as."""
    content = read_json(config)
    name = str(content.get("_class_name", "a model of no named class"))
    return SPLIT.get((name, str(content.get("norm_type"))), name)


def component_in(directory: Path) -> str:
    """The component of a pipeline directory that denoises; raises BadInput, saying what is there, for none known."""
    index, names = read_json(directory / "model_index.json"), components()
    parts = {name: str(part[-1]) for name, part in index.items() if isinstance(part, list) and part and part[-1]}
    found = next((name for name in names if name in parts or (directory / name).is_dir()), None)
    of_diffusers = found in parts and index[found][0] == "diffusers"
    if found and of_diffusers and parts[found] in {name for name, _ in SPLIT}:
        parts[found] = class_in(directory / found / "config.json")
    if found is None or (of_diffusers and parts[found] not in adapters(plugin_manager())):
        raise no_denoiser(directory, str(index.get("_class_name")), parts)
    return found


def read_plan(directory: Path) -> PruningPlan:
    """The plan of a pruned pipeline or UNet directory; raises BadInput if it has none."""
    # Plugins, which may take seconds to load, are asked only where no plan lies.
    index = directory / "model_index.json"
    parts = [name for name in (read_json(index) if index.exists() else {}) if Path(name).name == name]
    places = [directory, *(directory / name for name in parts)]
    found = next((path for place in places if (path := place / PLAN_FILE).is_file()), None)
    if found is None:
        check_described(model_folder(directory))
        raise BadInput(
            f"{directory}: not pruned (no {PLAN_FILE}); prune it with: diffprune prune CONFIG --model {directory}"
        )
    return PruningPlan.read(found)


def check_described(folder: Path) -> None:
    """Raises BadInput, saying what it is, for a model whose class, in its config, no adapter describes."""
    name = class_in(folder / "config.json")
    known = adapters(plugin_manager())
    if name.removeprefix(PREFIX) not in known:
        raise BadInput(f"{folder}: {no_adapter(name, known)}")


def read_json(path: Path) -> dict[str, Any]:
    """An object in a JSON file; raises BadInput if there is none."""
    content = reading.read_json(path)
    if not isinstance(content, dict):
        raise BadInput(f"{path}: holds a {type(content).__name__}, not an object")
    return content


def to_json(content: Mapping[str, Any]) -> str:
    """A config as diffusers writes it."""
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def without_paths(content: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the absolute path that it was loaded from."""
    return {k: v for k, v in content.items() if not (k == SOURCE_KEY and Path(str(v)).is_absolute())}
