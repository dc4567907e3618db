"""Which part of a model a low-rank adapter trains."""

from __future__ import annotations

from pydantic import Field

from diffprune_plugin.planning.options import Patterns
from diffprune_plugin.utils.checked import Checked


class LoraConfig(Checked):
    """The keys of a config's ``lora``, named as in peft."""

    rank: int = Field(default=16, ge=1, le=4096, description="Of the two factors of each layer's change.")
    alpha: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        description="The change is multiplied by alpha / rank; by default they are equal.",
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Of the inputs of the factors.")
    target_modules: Patterns = Field(
        default=("*",),
        min_length=1,
        max_length=10_000,
        description="Patterns of the linear layers and convolutions that get an adapter, as in ignored_layers.",
    )
    merge: bool = Field(
        default=True,
        description="Whether the weights that are saved hold the change; false keeps them as they were, and writes "
        "pytorch_lora_weights.safetensors beside them for diffusers' load_lora_weights.",
    )
