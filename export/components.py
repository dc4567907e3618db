"""The parts of a pipeline other than its denoiser: which ONNX files each becomes, in optimum-onnx's layout."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from diffprune_plugin.adapters.ports import Port, sized
from diffprune_plugin.errors import BadInput
from diffprune_plugin.export.convert import IMAGE, ExportReport, check_options, odd_multiple
from diffprune_plugin.export.graphs import exported, versions, written
from diffprune_plugin.export.integrity import check_output
from diffprune_plugin.graph.costs import costs_of, macs_of

MODEL_FILE = "model.onnx"
SEQUENCE = 77  # tokens, where a config does not say
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Part:
    """One ONNX file made of a component: the end of its folder's name, its inputs and outputs, and what it computes.

    ``outputs``: names for a model. ``compute``: the tensors for the model and its inputs, in the order of both.
    ``scale``: sides of the input beside those of the denoiser's sample, for a model.
    """

    ending: str
    inputs: Callable[[Any], tuple[Port, ...]]
    outputs: Callable[[Any], tuple[str, ...]]
    compute: Callable[[Any, Sequence[torch.Tensor]], tuple[torch.Tensor, ...]]
    scale: Callable[[Any], int] = lambda _: 1


def text_inputs(model: Any) -> tuple[Port, ...]:
    ids = Port("input_ids", "batch sequence", "int64", integers_below=("vocab_size",))
    masked = Port("attention_mask", "batch sequence", "int64")
    return (ids, masked) if getattr(model.config, "use_attention_mask", False) else (ids,)


def text_layers(model: Any) -> int:
    config = model.config
    return int(getattr(config, "num_hidden_layers", None) or config.encoder_layers)


def text_outputs(model: Any) -> tuple[str, ...]:
    """In the order of the model's own output, of which pipelines read the first; then the states after each layer."""
    kind = type(model).__name__
    names: dict[str, tuple[str, ...]] = {"CLIPTextModel": ("last_hidden_state", "pooler_output")}
    names |= {
        "CLIPTextModelWithProjection": ("text_embeds", "last_hidden_state"),
        "LDMBertModel": ("last_hidden_state",),
    }
    first, states = names[kind], 0 if kind == "LDMBertModel" else text_layers(model)
    return first + tuple(f"hidden_states.{layer}" for layer in range(states))


def read_text(model: Any, values: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    names = text_outputs(model)
    states = any(name.startswith("hidden_states") for name in names)
    given = {"input_ids": values[0]} | ({"attention_mask": values[1]} if len(values) > 1 else {})
    found = model(**given, output_hidden_states=states, return_dict=True)
    named = (name for name in names if not name.startswith("hidden_states"))
    layers = found.hidden_states[: text_layers(model)] if states else ()
    return (*(getattr(found, name) for name in named), *layers)


def depth(model: Any) -> int:
    """How many pixels a side of a latent stands for."""
    return int(2 ** (len(model.config.block_out_channels) - 1))


TEXT = Part("", text_inputs, text_outputs, read_text)
ENCODER = Part(
    "_encoder",
    lambda model: (Port("sample", ("batch", model.config.in_channels, *IMAGE)),),
    lambda _: ("latent_parameters",),
    lambda model, values: (model.encode(values[0]).latent_dist.parameters,),
    depth,
)
DECODER = Part(
    "_decoder",
    lambda model: (Port("latent_sample", ("batch", model.config.latent_channels, *IMAGE)),),
    lambda _: ("sample",),
    lambda model, values: (model.decode(values[0], return_dict=False)[0],),
)
PARTS: Mapping[str, tuple[Part, ...]] = {
    "AutoencoderKL": (ENCODER, DECODER),
    "VQModel": (DECODER,),
    "CLIPTextModel": (TEXT,),
    "CLIPTextModelWithProjection": (TEXT,),
    "LDMBertModel": (TEXT,),
}
# What has no ONNX form in these pipelines; an image that is drawn has not passed through it.
LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")


def parts_of(name: str, kind: str) -> tuple[Part, ...]:
    """The parts of a component of this class; raises BadInput for one that has no row here."""
    if kind not in PARTS:
        raise BadInput(
            f"{name}: a {kind} cannot be exported, only {', '.join(sorted(PARTS))}; export the UNet alone: name a file "
            "that ends in .onnx"
        )
    return PARTS[kind]


class Piece(nn.Module):
    """A part with its model: tensors in, tensors out, both in a row."""

    def __init__(self, part: Part, model: Any, side: tuple[int, int]) -> None:
        super().__init__()
        self.part, self.model = part, model
        self.ports, self.names = part.inputs(model), part.outputs(model)
        words = dict(zip(IMAGE, (length * part.scale(model) for length in side), strict=True))
        length = getattr(model.config, "max_position_embeddings", None) or SEQUENCE
        used = [word for port in self.ports for word in port.shape({}) if isinstance(word, str)]
        sizes = {"batch": 1, "sequence": min(length, SEQUENCE), **words}
        self.sizes = {word: sizes[word] for word in dict.fromkeys(used)}

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.part.compute(self.model, values)

    def example(self, seed: int = 0, **changed: int) -> Tensors:
        """Seeded inputs by name: unit noise, tokens; masks of ones. ``changed``: sizes of axes by word."""
        generator = torch.Generator().manual_seed(seed)
        dtype, found = next(self.model.parameters()).dtype, {}
        for port in self.ports:
            shape = sized(port.shape({}), self.sizes | changed)
            if port.integers_below:
                most = int(self.model.config.vocab_size)
                found[port.name] = torch.randint(0, most, shape, generator=generator)
            elif port.torch_dtype is torch.int64:
                found[port.name] = torch.ones(shape, dtype=torch.int64)
            else:
                found[port.name] = torch.randn(shape, generator=generator).to(dtype)
        return found

    def answers(self, inputs: Tensors) -> Tensors:
        """The outputs by name."""
        with torch.no_grad():
            return dict(zip(self.names, self(*inputs.values()), strict=True))


@contextlib.contextmanager
def first_greatest_in_floats() -> Iterator[None]:
    """Inside it ``argmax`` of integers is one of floats: CUDA has no kernel for integers, and CLIP looks for the end of
    the text by it. Of equal ones the first counts, which no provider promises: so each place has a number of its own,
    exact below 2 ** 24."""
    whole = torch.Tensor.argmax

    def argmax(values: torch.Tensor, dim: int | None = None, keepdim: bool = False) -> torch.Tensor:
        if dim is None or values.is_floating_point():
            return whole(values, dim, keepdim)
        last = values.movedim(dim, -1)
        count = last.shape[-1]
        found = whole(last.float() * count + torch.arange(count, 0, -1, device=values.device), -1)
        return found.unsqueeze(dim) if keepdim else found

    with mock.patch.object(torch.Tensor, "argmax", argmax):
        yield


def part_to_onnx(piece: Piece, path: Path, *, opset: int, dynamic: Sequence[str], dtype: str) -> ExportReport:
    """Write one part as an ONNX file with its manifest and where it came from; raises as `to_onnx` does."""
    start = time.perf_counter()
    check_output(path)
    check_options(opset, dtype)
    model = piece.model
    open_axes = [{i: w for i, w in port.words({}).items() if w in dynamic} for port in piece.ports]
    step = piece.part.scale(model)
    sides = {word: odd_multiple(piece.sizes[word], step) for word in IMAGE if word in dynamic and word in piece.sizes}
    inputs = piece.example(**({"batch": 2} if "batch" in dynamic else {}), **sides)
    kind = type(model).__name__
    with first_greatest_in_floats():
        program = exported(piece, inputs, open_axes, piece.names, opset, kind)
    example = piece.example()
    config = model.config if isinstance(model.config, Mapping) else model.config.to_dict()
    facts = {
        "format": "1",
        "model_class": kind,
        "config": {key: value for key, value in plain(config).items() if not key.startswith("_")},
        "axes": piece.sizes,
        "params": str(sum(p.numel() for p in model.parameters())),
        "macs": str(macs_of(costs_of(piece, lambda copied: copied(*(v.to("meta") for v in example.values()))))),
        "versions": versions(),
        "opset": str(opset),
        "dtype": dtype,
        "dynamic": ",".join(word for word in dynamic if word in piece.sizes),
    }
    texts, nodes, files = written(program, path, model, facts)
    return ExportReport(path, files, nodes, time.perf_counter() - start, texts)


def plain(value: Any) -> Any:
    """A config as JSON has it; what it does not know as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
