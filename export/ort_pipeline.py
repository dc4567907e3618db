"""A directory of ONNX files as diffusers' own pipeline, with ONNX Runtime in the place of each model."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import nn

from diffprune_plugin.errors import BadInput, nearest
from diffprune_plugin.export.components import DECODER, ENCODER, MODEL_FILE, PARTS, TEXT
from diffprune_plugin.export.integrity import check_files
from diffprune_plugin.export.ort_session import OrtSession, StandIn
from diffprune_plugin.export.ort_unet import ORTUNet
from diffprune_plugin.plugins import components
from diffprune_plugin.pruning.building import foreign_errors
from diffprune_plugin.pruning.directory import read_json
from diffprune_plugin.pruning.index import INDEX_FILE, read_index
from diffprune_plugin.utils.files import check_unchanged

Opener = Callable[[str, Path], OrtSession]  # from a folder's name and the file in it


class ORTText(StandIn):
    """A text encoder: pipelines read its first output by place, and hidden states by name."""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool = True,
        **_: Any,
    ) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling
        from transformers.models.clip.modeling_clip import CLIPTextModelOutput

        found = self.run({"input_ids": input_ids, "attention_mask": attention_mask})  # type: ignore[dict-item]
        found = {name: value.to(self.dtype) for name, value in found.items()}
        states = tuple(found.pop(name) for name in [*found] if name.startswith("hidden_states"))
        kind: Any = CLIPTextModelOutput if "text_embeds" in found else BaseModelOutputWithPooling
        # As in transformers the last of the states is the last layer's; its norm makes no difference to what is read.
        last = (*states, found["last_hidden_state"]) if output_hidden_states and states else None
        output = kind(**found, hidden_states=last)
        return output if return_dict else output.to_tuple()


class ORTVae(nn.Module):
    """An autoencoder: its decoder, and the encoder where there is one."""

    def __init__(self, decoder: StandIn, encoder: StandIn | None) -> None:
        super().__init__()
        self.decoder, self.encoder = decoder, encoder
        self.post_quant_conv = decoder  # whose dtype some pipelines ask for
        self.config, self.dtype, self.device = decoder.config, decoder.dtype, decoder.device

    def decode(self, z: torch.Tensor, return_dict: bool = True, **_: Any) -> Any:
        """Images (batch, channels, height, width) of latents."""
        (images,) = self.decoder.run({"latent_sample": z}).values()
        return DecoderOutput(sample=images) if return_dict else (images,)

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        """The distribution of the latents of images; raises BadInput where there is no encoder."""
        if self.encoder is None:
            raise BadInput("this pipeline has no encoder; it draws from noise only")
        (moments,) = self.encoder.run({"sample": x}).values()
        found = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=found) if return_dict else (found,)

    def to(self, *args: Any, **kwargs: Any) -> ORTVae:
        """Itself: a session stays where it was opened, and takes tensors of any dtype, as diffusers upcasts a VAE's.

        Raises BadInput for another device than its own.
        """
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        self.decoder.to(device or self.device)
        return self


def ORTPipeline(directory: str | Path, *, provider: str = "cpu", threads: int = 1, arena: bool = True) -> Any:
    """The pipeline of a directory that ``diffprune-export`` wrote, of diffusers' own class, computed by ONNX Runtime.

    Its call is that of the class. ``arena``: off, a run takes less of a CPU's memory, and more time.

    Raises BadInput for a directory that is none or was damaged, HardwareUnproved where ONNX Runtime falls back to
    another provider.
    """
    return assembled(Path(directory), lambda _, path: OrtSession(path, provider, threads, arena=arena))


def assembled(directory: Path, opened: Opener, **given: Any) -> Any:
    """The pipeline of a directory, its sessions as ``opened`` gives them; ``given``: components in place of its own."""
    check_directory(directory)
    parts = read_index(directory)
    content = read_json(directory / INDEX_FILE)
    cls = pipeline_class(directory)
    arguments: dict[str, Any] = {}
    for name in inspect.signature(cls).parameters:
        if name in given:
            arguments[name] = given[name]
        elif name in parts:
            arguments[name] = component(directory, name, *parts[name], opened)
        elif name in content:
            arguments[name] = None if isinstance(content[name], list) else content[name]
    with foreign_errors(f"{directory}: cannot be loaded as a {cls.__name__}"):
        pipeline: Any = cls(**arguments)
    pipeline.register_to_config(_name_or_path=str(directory))
    pipeline.save_pretrained = partial(not_saved, directory)
    return pipeline


def not_saved(directory: Path, *_: Any, **__: Any) -> None:
    raise BadInput(f"save_pretrained: would write no models, which are ONNX files; copy {directory} itself")


def pipeline_class(directory: Path) -> Any:
    """The class that a pipeline directory names; raises BadInput for none of this diffusers' pipelines."""
    kind = read_json(directory / INDEX_FILE)["_class_name"]
    cls: Any = getattr(diffusers, kind, None)
    if not (inspect.isclass(cls) and issubclass(cls, diffusers.DiffusionPipeline)):
        raise BadInput(f"{directory / INDEX_FILE}: _class_name {kind!r} is no pipeline of this diffusers{near(kind)}")
    return cls


def near(kind: str) -> str:
    return nearest(kind, (name for name in dir(diffusers) if name.endswith("Pipeline")))


def check_directory(directory: Path) -> None:
    """Raises BadInput unless a directory is one of ours, every file as it was written."""
    if not (directory / INDEX_FILE).is_file():
        raise BadInput(f"{directory}: no {INDEX_FILE}; give a directory that diffprune-export wrote")
    # Files with a manifest are hashed when they are opened.
    check_unchanged(directory, except_for=("*.onnx", "*.data", "README.md"))


def component(directory: Path, name: str, library: str, kind: str, opened: Opener) -> Any:
    """One component: a stand-in for a model, the object itself for what is none."""
    if name in components():
        path = directory / name / MODEL_FILE
        check_files(path)
        return ORTUNet(path, session=opened(name, path))
    if kind in PARTS:
        found = {
            part: stand_in(directory, name + part.ending, ORTText if part is TEXT else StandIn, opened)
            for part in PARTS[kind]
        }
        return found[TEXT] if TEXT in found else ORTVae(found[DECODER], found.get(ENCODER))
    with foreign_errors(f"{directory / name}: cannot be loaded as a {kind}"):
        return getattr(importlib.import_module(library), kind).from_pretrained(str(directory / name))


def stand_in(directory: Path, folder: str, cls: type[StandIn], opened: Opener) -> StandIn:
    path = directory / folder / MODEL_FILE
    facts = check_files(path)
    return cls(facts, opened(folder, path))
