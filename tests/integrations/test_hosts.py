"""Other tools run for real, each in an environment of its own beside this one's packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest
import torch

import diffprune_plugin as dp
from diffprune_plugin.adapters.unet_2d import UNET_2D

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "diffprune_plugin" / "demo" / "model"
pytestmark = pytest.mark.slow


def environment(folder: Path, *packages: str) -> Path:
    """The python of a new environment that has these packages and sees this one's; DIFFPRUNE_HOSTS keeps it there."""
    folder = Path(os.environ["DIFFPRUNE_HOSTS"]) / folder.name if "DIFFPRUNE_HOSTS" in os.environ else folder
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "zz_shared.pth").write_text(sysconfig.get_paths()["purelib"])
        pins = (ROOT / "constraints.txt").read_text().splitlines()
        ours = [pin for pin in pins if not any(pin.startswith(package.split("<")[0]) for package in packages)]
        (folder / "constraints.txt").write_text("\n".join(ours))
        call(python, "-m", "pip", "install", "-q", "-c", "constraints.txt", *packages, cwd=folder)
    return python


def call(*command: Any, cwd: Path) -> str:
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OLIVE_DISABLE_TELEMETRY": "1"}
    result = subprocess.run([*map(str, command)], cwd=cwd, env=settings, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


def test_olive_run_prunes_and_converts(tmp_path) -> None:
    python = environment(tmp_path / "olive-venv", "olive-ai")
    (tmp_path / "passes.json").write_text(call(python, "-m", "diffprune_plugin.integrations.olive_pass", cwd=tmp_path))
    script = ROOT / "diffprune_plugin" / "integrations" / "olive_pass.py"
    prune = {"type": "DiffPrune", "importance": "magnitude", "pruning_ratio": 0.5, "compensate": False}
    config = {
        "input_model": {
            "type": "PyTorchModel",
            "model_path": str(DEMO),
            "model_script": str(script),
            "model_loader": "load_unet",
            "io_config": "io_config",
            "dummy_inputs_func": "dummy_inputs",
        },
        "passes": {"prune": prune, "convert": {"type": "OnnxConversion", "use_dynamo_exporter": True}},
        "output_dir": "out",
        "cache_dir": "cache",
    }
    (tmp_path / "run.json").write_text(json.dumps(config))
    call(python, "-m", "olive", "run", "--config", "run.json", "--package-config", "passes.json", cwd=tmp_path)
    unet = dp.load(DEMO)
    dp.remove_(unet, dp.make_plan(unet, "magnitude", pruning_ratio=0.5))
    inputs = UNET_2D.example_inputs(unet, batch=3)
    with torch.no_grad():
        expected = unet(**inputs).sample
    found = session_output(tmp_path / "out" / "model.onnx", inputs)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


PRUNA = """
import json, sys, torch
if torch.version.cuda is None:  # torchvision from PyPI is built for torch with CUDA: two operators are missing
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from pruna import PrunaModel, SmashConfig, smash
import diffprune_plugin.integrations.pruna_algorithm
from diffprune_plugin.pruning.loading import load_pipeline
from pathlib import Path
options = {"importance": "magnitude", "pruning_ratio": 0.5}
model = smash(load_pipeline(Path(sys.argv[1])), SmashConfig({"diffprune": options}, device="cpu"))
model.save_pretrained("out")
unet = PrunaModel.from_pretrained("out").unet
sample = torch.randn(2, 1, unet.config.sample_size, unet.config.sample_size)
with torch.no_grad():
    difference = (unet(sample, 3).sample - model.unet(sample, 3).sample).abs().max().item()
print(json.dumps([type(unet).__name__, sum(p.numel() for p in unet.parameters()), difference]))
"""


def test_pruna_smashes_saves_without_a_pickle_and_loads_with_difference_0(tmp_path) -> None:
    """pruna 0.3.4 needs huggingface_hub below 2 (upload_large_folder is gone there)."""
    python = environment(tmp_path / "pruna-venv", "pruna", "huggingface_hub<2")
    (tmp_path / "script.py").write_text(PRUNA)
    found = json.loads(call(python, "script.py", DEMO, cwd=tmp_path).splitlines()[-1])
    plan = dp.make_plan(dp.load(DEMO), "magnitude", pruning_ratio=0.5)
    assert found == ["PrunedUNet2DModel", plan.params[1], 0.0]
    files = [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert "diffusion_pytorch_model.safetensors" in files
    assert not any(name.endswith((".pt", ".pkl", ".bin")) for name in files)


def session_output(path: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    return torch.from_numpy(output)


def test_two_wheels_in_a_fresh_environment_list_the_plugin_and_prune_the_embedded_model(tmp_path) -> None:
    for source in (ROOT, ROOT / "examples" / "plugin"):
        copy = tmp_path / "source" / source.name
        skip = ("--exclude=.venv", "--exclude=.git", "--exclude=build", "--exclude=*.egg-info")
        copy.mkdir(parents=True)
        subprocess.run(f"tar -C {source} {' '.join(skip)} -cf - . | tar -C {copy} -xf -", shell=True, check=True)
        options = ("--no-deps", "--no-build-isolation", "-w", str(tmp_path / "wheels"), str(copy))
        subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", *options], check=True)
    wheels = sorted((tmp_path / "wheels").glob("*.whl"))
    assert [wheel.name.split("-")[0] for wheel in wheels] == ["diffprune_example", "diffprune_plugin"]
    folder = tmp_path / "fresh"
    venv.create(folder, with_pip=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "zz_shared.pth").write_text(sysconfig.get_paths()["purelib"])
    install = ("-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", "--ignore-installed")
    call(folder / "bin" / "python", *install, *wheels, cwd=folder)

    def diffprune(*words: Any) -> str:
        settings = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        command = [str(folder / "bin" / "diffprune"), *map(str, words)]
        result = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
        return result.stdout

    rows = {row["plugin"]: row for row in json.loads(diffprune("plugins", "--json"))}
    (criterion,) = [offer for offer in rows["example"]["offers"] if offer.startswith("criterion ")]
    demo = site / "diffprune_plugin" / "demo"
    assert demo.is_dir()
    config = {"model": str(demo / "model"), "output": "small", "data": str(next(demo.glob("*.npz")))}
    config |= {"importance": {"name": criterion.split()[1], "samples": 16, "curve_samples": 1}}
    config |= {"timesteps": 10, "compensate": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    diffprune("prune", "config.json")
    assert dp.load(tmp_path / "small").pruning_plan.criterion["name"] == criterion.split()[1]
