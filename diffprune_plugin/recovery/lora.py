"""Training a low-rank adapter (LoRA, arXiv 2106.09685), by peft, in place of the weights, which hold no gradients."""

from __future__ import annotations

import inspect
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffprune_plugin.config.lora import LoraConfig
from diffprune_plugin.errors import BadInput
from diffprune_plugin.graph.patterns import layer_names, matching
from diffprune_plugin.pruning.directory import ADAPTER_FILE
from diffprune_plugin.utils.optional import need

NAME = "default"  # of the adapter, as peft and diffusers call it


@dataclass(frozen=True)
class LowRank:
    """A model with an adapter in its layers; ``tuner`` is peft's, which put it there."""

    tuner: Any
    merge: bool

    @classmethod
    def add_(cls, model: nn.Module, config: LoraConfig, seed: int) -> LowRank:
        """Put an adapter into a model that changes nothing yet; only its factors are left to be trained.

        Raises BadInput for a pattern that matches no linear layer or convolution.
        """
        names = targets(model, config)
        torch.manual_seed(seed)
        options = need("peft").LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha or config.rank,
            lora_dropout=config.dropout,
            target_modules="|".join(map(re.escape, names)),  # as a list they would be the ends of names
        )
        return cls(need("peft").LoraModel(model, options, NAME), config.merge)

    def finish_(self, pipeline: Any, component: str) -> dict[str, bytes]:
        """Take the adapter out of the model, into its weights or into a file, by name."""
        if self.merge:
            self.tuner.merge_and_unload()
            files = {}
        else:
            files = {ADAPTER_FILE: as_file(self.tuner, pipeline, component)}
            self.tuner.unload()
        vars(self.tuner.model).pop("peft_config", None)  # else diffusers takes it for loaded
        return files


def targets(model: nn.Module, config: LoraConfig) -> list[str]:
    """The layers that get an adapter; raises BadInput for a pattern without one."""
    names, modules = layer_names(model), dict(model.named_modules())
    found: dict[str, None] = {}
    for pattern in config.target_modules:
        layers = [name for name in matching(pattern, names, "lora.target_modules") if takes_one(modules[name])]
        if not layers:
            raise BadInput.of("lora.target_modules", pattern, "matches no linear layer or convolution")
        found |= dict.fromkeys(layers)
    return list(found)


def takes_one(layer: nn.Module) -> bool:
    """Whether peft has an adapter for this layer; a convolution by groups would want a rank that they divide."""
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)


def check_kept(config: LoraConfig | None, pipeline: Any, component: str) -> None:
    """Raises BadInput where an adapter is to be kept in a file that this pipeline could not load."""
    if config and not config.merge and f"{component}_lora_layers" not in arguments(pipeline):
        raise BadInput(
            f"lora.merge: false: {type(pipeline).__name__} loads no adapter of a {component}; leave it out (true)"
        )


def arguments(pipeline: Any) -> tuple[str, ...]:
    """What the pipeline's own way to save adapters takes; nothing where it has none."""
    return tuple(inspect.signature(getattr(pipeline, "save_lora_weights", lambda: None)).parameters)


def as_file(tuner: Any, pipeline: Any, component: str) -> bytes:
    """The adapter as the pipeline's class writes it."""
    state = need("peft").get_peft_model_state_dict(tuner.model, adapter_name=NAME)
    options = {f"{component}_lora_layers": state}
    if f"{component}_lora_adapter_metadata" in arguments(pipeline):  # the alpha, which older diffusers take as the rank
        options[f"{component}_lora_adapter_metadata"] = tuner.peft_config[NAME].to_dict()
    with tempfile.TemporaryDirectory() as folder:
        type(pipeline).save_lora_weights(folder, **options)
        return Path(folder, ADAPTER_FILE).read_bytes()
