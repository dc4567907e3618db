"""Ports: the tensors that go into and come out of a model, their shapes, and on which configs they exist."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

Config = Mapping[str, Any]  # of a diffusers model
Axis = str | int | Callable[[Config], int]


@dataclass(frozen=True)
class Port:
    """One tensor that goes into or comes out of the model.

    ``axes`` is its shape, as a text or a tuple: a number, ``{key}`` the config's value, a function of the config, any
    other word a dynamic axis. ``dtype``: a torch dtype, or its name, for which a table need not import torch. ``when``:
    a function of the config that says whether the port exists. ``integers_below`` (a number, or config keys, the first
    that is set counts) makes it an integer index; ``none``: the one behind the last stands for none. ``inside``: the
    forward takes it as an item of this dict argument; ONNX names are flat. ``optional``: the forward computes without
    it too, something else. ``made``: of the sizes of all axes by word the input itself, which no data has to give.
    """

    name: str
    axes: str | tuple[Axis, ...]
    dtype: str | torch.dtype = "float32"
    when: Callable[[Config], bool] | None = None
    integers_below: tuple[str, ...] | int = ()
    inside: str = ""
    none: bool = False
    optional: bool = False
    made: Callable[[Mapping[str, int]], torch.Tensor] | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        """torch's own for a name."""
        import torch

        named: torch.dtype = getattr(torch, self.dtype) if isinstance(self.dtype, str) else self.dtype
        return named

    def shape(self, config: Config) -> tuple[int | str, ...]:
        """Numbers, and words for dynamic axes."""
        axes = self.axes.split() if isinstance(self.axes, str) else self.axes
        return tuple(axis_of(axis, config) for axis in axes)

    def words(self, config: Config) -> dict[int, str]:
        """The dynamic axes by position."""
        return {place: axis for place, axis in enumerate(self.shape(config)) if isinstance(axis, str)}

    def exists(self, config: Config) -> bool:
        """Whether a model of this config has it."""
        return self.when is None or self.when(config)

    def classes(self, config: Config) -> int:
        """How many values an integer index has."""
        if isinstance(self.integers_below, int):
            return self.integers_below
        return next(int(value) for key in self.integers_below if (value := config.get(key)))


@dataclass(frozen=True)
class Packing:
    """Latents (batch, channels, height, width) go through the model as (batch, tokens, squares * channels).

    ``unpack`` takes these, the height and the width of the latents.
    """

    pack: Callable[[torch.Tensor], torch.Tensor]
    unpack: Callable[[torch.Tensor, int, int], torch.Tensor]
    squares: int


def axis_of(axis: Axis, config: Config) -> int | str:
    """The size of an axis, or its word."""
    if callable(axis):
        return axis(config)
    if isinstance(axis, str) and axis.startswith("{"):
        return width(config, axis.strip("{}"))
    return int(axis) if isinstance(axis, int) or axis.isdigit() else axis


def sized(shape: tuple[int | str, ...], words: Mapping[str, int]) -> list[int]:
    """A shape with numbers for its words."""
    return [words[axis] if isinstance(axis, str) else axis for axis in shape]


def config_of(model: nn.Module) -> Config:
    """The diffusers config of a model, also of one that is wrapped to be trained by several processes."""
    config: Any = getattr(model, "config", None) or model.module.config  # type: ignore[union-attr]
    return config  # type: ignore[no-any-return]


def width(config: Config, key: str) -> int:
    """A width in the config; of one per block, which share their input, the first."""
    value = config.get(key)
    return int(value[0] if isinstance(value, (list, tuple)) else value)  # type: ignore[arg-type]


def configured_size(config: Config) -> tuple[int, int]:
    """(height, width) of the config's sample_size; 32 where it has none."""
    size = config.get("sample_size") or 32
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def two_pixels_at_the_bottom(config: Config) -> tuple[int, int]:
    """The smallest (height, width) whose bottom level still has two pixels a side: cheap to trace through."""
    side = 2 ** len(config["block_out_channels"])
    return side, side


def two_patches(config: Config) -> tuple[int, int]:
    """The smallest (height, width) of which a transformer makes more than one token a side."""
    side = 2 * int(config["patch_size"])
    return side, side


def any_timestep(_: Config) -> range:
    """Of a model that computes its time embedding, which has no end."""
    return range(sys.maxsize)


def whole_ones(_: Config) -> bool:
    """Of a model that is not known to take timesteps between whole ones."""
    return False


def is_set(key: str) -> Callable[[Config], bool]:
    """For ``when``: the config has a value for the key."""
    return lambda config: bool(config.get(key))


def counts_classes(config: Config) -> bool:
    """For ``when``: a model of classes that are counted; of another kind of embedding diffusers reads no count."""
    return config.get("class_embed_type") is None and bool(config.get("num_class_embeds"))


def is_one_of(key: str, *values: Any) -> Callable[[Config], bool]:
    """For ``when``: the config's value for the key is one of these."""
    return lambda config: config.get(key) in values
