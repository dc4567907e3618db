"""Microsoft Olive: a pass that prunes, so that ``olive run`` prunes and converts.

``python -m diffprune_plugin.integrations.olive_pass > passes.json`` writes what
``olive run --package-config passes.json`` needs. The input model is a diffusers directory, loaded by this file::

    {"type": "PyTorchModel", "model_path": "my-ddpm", "model_script": ".../diffprune_plugin/integrations/olive_pass.py",
     "model_loader": "load_unet", "io_config": "io_config", "dummy_inputs_func": "dummy_inputs"}
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from olive.model import PyTorchModelHandler
from olive.package_config import OlivePackageConfig
from olive.passes import Pass
from olive.passes.pass_config import PassConfigParam

from diffprune_plugin.config.pruning import PruningConfig
from diffprune_plugin.plugins import find_adapter
from diffprune_plugin.pruning.loading import load
from diffprune_plugin.workflow import prune

HANDLER = {
    "model_script": str(Path(__file__)),
    "model_loader": "load_unet",
    "io_config": "io_config",
    "dummy_inputs_func": "dummy_inputs",
}


class DiffPrune(Pass):  # type: ignore[misc]
    """Prune the UNet of a diffusers directory; the options are the keys of a diffprune config, but model and output."""

    @classmethod
    def _default_config(cls, accelerator_spec: Any) -> dict[str, PassConfigParam]:
        return {
            key: PassConfigParam(
                type_=Any, default_value=field.get_default(call_default_factory=True), description=f"diffprune: {key}"
            )
            for key, field in PruningConfig.model_fields.items()
            if key not in ("model", "output")
        }

    def _run_for_config(self, model: Any, config: Any, output_model_path: str) -> Any:
        options = {key: value for key in self._default_config(None) if (value := getattr(config, key)) is not None}
        output = output_model_path.removesuffix(".onnx").removesuffix(".pt")
        paths = {"model": str(model.model_path), "output": output}
        settled = PruningConfig.make(options | paths, "Olive pass DiffPrune")
        prune(settled, overwrite=True, progress=False)
        return PyTorchModelHandler(model_path=settled.output, **HANDLER)


def load_unet(path: str) -> Any:
    """The UNet of a directory, dense or pruned."""
    return load(path)


def dummy_inputs(handler: Any) -> dict[str, Any]:
    """Two samples of the config's size: with one, the exporter fixes the batch."""
    model = handler.load_model()
    return find_adapter(model).example_inputs(model, batch=2)


def io_config(handler: Any) -> dict[str, Any]:
    """Names as optimum-onnx has them; the batch is dynamic."""
    model = handler.load_model()
    adapter = find_adapter(model)
    names = [port.name for port in adapter.ports(model)]
    return {
        "input_names": names,
        "output_names": [port.name for port in adapter.outputs],
        "dynamic_shapes": adapter.nested({name: {"0": "batch"} for name in names}),
    }


def package_config() -> dict[str, Any]:
    """Olive's own passes and this one."""
    content: dict[str, Any] = json.loads(Path(OlivePackageConfig.get_default_config_path()).read_text())
    everywhere = {f"supported_{key}": ["*"] for key in ("providers", "accelerators", "precisions")}
    content["passes"]["DiffPrune"] = {"module_path": f"{DiffPrune.__module__}.DiffPrune", **everywhere}
    return content


def main() -> None:
    """Print the package config, with the pass under its importable name."""
    from diffprune_plugin.integrations import olive_pass

    json.dump(olive_pass.package_config(), sys.stdout, indent=1)


if __name__ == "__main__":
    main()
