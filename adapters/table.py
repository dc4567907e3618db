"""The form of an adapter: the facts about one UNet class that pruning, reloading and export need."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffprune_plugin.adapters.state import check_stock
from diffprune_plugin.errors import BadInput


@dataclass(frozen=True)
class Port:
    """One tensor that goes into or comes out of the UNet.

    ``axes`` is its shape: a number, ``{key}`` the UNet config's value, ``{key-6*other}`` computed from two of them, any
    other word a dynamic axis. ``when`` holds conditions on the config, ``key`` (it is set) or ``key=value``; the port
    exists if one of them holds. ``integers_below`` (config keys) makes it an integer index. ``inside``: the forward
    takes it as an item of this dict argument; ONNX names are flat.
    """

    name: str
    axes: str
    dtype: torch.dtype = torch.float32
    when: tuple[str, ...] = ()
    integers_below: tuple[str, ...] = ()
    inside: str = ""


@dataclass(frozen=True)
class Heads:
    """Attention of class ``owner`` splits the outputs of ``layers`` into as many heads as its attribute ``count`` says.

    Heads lose equally many dimensions each; the softmax keeps the dense scale: ``query``'s weights are multiplied by
    sqrt(new / old head size), which cancels the 1/sqrt(head size) that scaled_dot_product_attention applies, and the
    attribute ``scale``, which other processors read, is set to 1/sqrt(new head size).
    """

    owner: str
    count: str
    layers: tuple[str, ...]
    query: str
    scale: str


@dataclass(frozen=True)
class Pairs:
    """The output of ``layer`` in modules of class ``owner`` is cut into ``parts`` whose channels go together.

    ``when``: only in owners whose attribute has this value.
    """

    owner: str
    layer: str
    parts: int
    when: tuple[str, str] | None = None


@dataclass(frozen=True)
class Mirror:
    """``attribute`` of modules of class ``owner`` repeats the size ``source`` and goes stale when that shrinks."""

    owner: str
    attribute: str
    source: str


@dataclass(frozen=True)
class Known:
    """The values (or items, if it is a list) of config key ``key`` that the table covers; others are refused."""

    key: str
    values: tuple[Any, ...]


# What to do about attention processors that no adapter covers, by the beginning of their names; the first that fits.
REMEDIES = (
    ("Fused", "load the model again without fuse_qkv_projections() (unfusing keeps the fused layers)"),
    ("IPAdapter", "call pipeline.unload_ip_adapter() first"),
    ("CustomDiffusion", "load the model again without the custom diffusion weights"),
    ("", "call unet.set_default_attn_processor() first"),
)


@dataclass(frozen=True)
class UNetAdapter:
    """One UNet class as a table; everything else is derived from it. ``module``: where the class is imported from."""

    model_class: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    keep: tuple[str, ...]
    heads: tuple[Heads, ...] = ()
    pairs: tuple[Pairs, ...] = ()
    mirrors: tuple[Mirror, ...] = ()
    known: tuple[Known, ...] = ()
    words: tuple[tuple[str, int], ...] = ()  # sizes of dynamic axes other than batch, height and width, in examples
    processors: tuple[str, ...] = ("AttnProcessor2_0", "AttnProcessor")
    module: str = "diffusers"

    def ports(self, unet: nn.Module) -> tuple[Port, ...]:
        """The inputs that this UNet's config asks for."""
        return tuple(p for p in self.inputs if not p.when or any(holds(unet, condition) for condition in p.when))

    def example_inputs(
        self,
        unet: nn.Module,
        batch: int = 1,
        size: tuple[int, int] | None = None,
        seed: int = 0,
        words: Mapping[str, int] | None = None,
    ) -> dict[str, Any]:
        """The arguments of a forward: `flat_inputs`, with those that the UNet takes inside a dict put there."""
        return self.nested(self.flat_inputs(unet, batch, size, seed, words))

    def flat_inputs(
        self,
        unet: nn.Module,
        batch: int = 1,
        size: tuple[int, int] | None = None,
        seed: int = 0,
        words: Mapping[str, int] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Seeded inputs by name: ``batch`` samples of ``size`` (height, width), by default the config's.

        ``words``: sizes of other dynamic axes, by default the table's.
        """
        generator = torch.Generator().manual_seed(seed)
        height, width = size or sample_size(unet)
        parameter = next(unet.parameters())
        sizes = {"batch": batch, "height": height, "width": width, **dict(self.words), **(words or {})}
        inputs = {}
        for port in self.ports(unet):
            shape = [axis_size(unet, axis, sizes) for axis in port.axes.split()]
            if port.integers_below:
                tensor = torch.randint(0, self.classes(unet, port), shape, generator=generator, dtype=port.dtype)
            elif port.dtype is torch.int64:
                tensor = torch.arange(1, batch + 1)
            else:
                tensor = torch.randn(shape, generator=generator).to(parameter.dtype)
            inputs[port.name] = tensor.to(parameter.device)
        return inputs

    def classes(self, unet: nn.Module, port: Port) -> int:
        """How many values an integer index has."""
        return next(int(value) for key in port.integers_below if (value := config_value(unet, key)))

    def shapes(self, unet: nn.Module) -> dict[str, tuple[int | str, ...]]:
        """The shape of each input by name: numbers, and words for dynamic axes."""
        return {
            port.name: tuple(
                axis_size(unet, axis, {}) if axis.isdigit() or axis.startswith("{") else axis
                for axis in port.axes.split()
            )
            for port in self.ports(unet)
        }

    def nested(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs by port name as the forward takes them: some inside a dict argument."""
        inside = {port.name: port.inside for port in self.inputs if port.inside}
        arguments = {name: value for name, value in inputs.items() if name not in inside}
        for name, holder in inside.items():
            if name in inputs:
                arguments[holder] = arguments.get(holder, {}) | {name: inputs[name]}
        return arguments

    def trace_inputs(self, unet: nn.Module) -> dict[str, Any]:
        """The smallest inputs that pass through every layer."""
        return self.example_inputs(unet, size=self.trace_size(unet), words={word: 2 for word, _ in self.words})

    def trace_size(self, unet: nn.Module) -> tuple[int, int]:
        """The smallest (height, width) whose bottom level still has two pixels a side: cheap to trace through."""
        side = 2 ** len(config_value(unet, "block_out_channels"))
        return side, side

    def kept_layers(self, unet: nn.Module) -> set[str]:
        """Names of the layers whose output channels must stay.

        Raises BadInput if a pattern of the table matches no layer.
        """
        names = [name for name, _ in unet.named_modules()]
        kept = set()
        for pattern in self.keep:
            found = fnmatch.filter(names, pattern)
            if not found:
                raise BadInput(f"adapter {self.model_class}: keep={pattern!r} matches no layer; mend its table")
            kept.update(found)
        return kept

    def equal_parts(self, unet: nn.Module) -> dict[str, int]:
        """For each layer, into how many parts its channels fall that must lose equally many: norm groups, heads."""
        parts = {name: m.num_groups for name, m in unet.named_modules() if isinstance(m, nn.GroupNorm)}
        return parts | self.head_counts(unet)

    def head_counts(self, unet: nn.Module) -> dict[str, int]:
        """For each layer whose outputs an attention splits into heads, how many heads."""
        return {
            f"{name}.{layer}": int(getattr(owner, row.count))
            for row in self.heads
            for name, owner in modules_of(unet, row.owner)
            for layer in row.layers
        }

    def torch_pruning_kwargs(self, unet: nn.Module) -> dict[str, Any]:
        """What torch_pruning.pruner.BasePruner has to be told about this UNet, in dicts of its own for each call.

        ``BasePruner(unet, example_inputs, importance, **adapter.torch_pruning_kwargs(unet))``, and `mend_` after
        each step. What no argument mends: ``round_to`` beside norm groups, the softmax scale, reloading; for those
        there is `diffprune_plugin.Pruner`.
        """
        return {
            "ignored_layers": [unet.get_submodule(name) for name in sorted(self.kept_layers(unet))],
            "num_heads": {unet.get_submodule(name): count for name, count in self.head_counts(unet).items()},
            "in_channel_groups": {},
            "out_channel_groups": {unet.get_submodule(name): parts for name, parts in self.paired(unet).items()},
        }

    def paired(self, unet: nn.Module) -> dict[str, int]:
        """For each layer whose output is cut into parts that live and die together, how many parts."""
        return {
            f"{name}.{row.layer}": row.parts
            for row in self.pairs
            for name, owner in modules_of(unet, row.owner)
            if row.when is None or getattr(owner, row.when[0]) == row.when[1]
        }

    def check(self, unet: nn.Module) -> None:
        """Raises BadInput, by name, for what the table does not cover: a config value, a processor, a loaded LoRA; and
        for a model that is masked or hooked."""
        check_stock(unet)
        for row in self.known:
            value = config_value(unet, row.key)
            for item in value if isinstance(value, (list, tuple)) else (value,):
                if item not in row.values:
                    raise BadInput(
                        f"{row.key}: {item!r} is not covered by the adapter for {self.model_class}, "
                        f"which knows {', '.join(map(str, row.values))}; see README, 'A new UNet'"
                    )
        for name, module in unet.named_modules():
            if hasattr(module, "base_layer"):
                adapters = ", ".join(getattr(unet, "peft_config", {})) or type(module).__name__
                raise BadInput(
                    f"{name} carries a loaded LoRA or other adapter ({adapters}); "
                    "call pipeline.unload_lora_weights() first, and before that pipeline.fuse_lora() to keep its effect"
                )
            processor = type(getattr(module, "processor", None)).__name__
            if getattr(module, "fused_projections", False):
                processor = "FusedAttnProcessor2_0"
            if processor not in (*self.processors, "NoneType"):
                remedy = next(remedy for start, remedy in REMEDIES if processor.startswith(start))
                raise BadInput(
                    f"{name} uses {processor}; the adapter for {self.model_class} knows {', '.join(self.processors)}; "
                    f"{remedy}"
                )

    def head_sizes(self, unet: nn.Module) -> dict[str, int]:
        """Dimensions per head of each attention, by module name."""
        return {
            name: owner.get_submodule(row.query).out_features // int(getattr(owner, row.count))
            for row in self.heads
            for name, owner in modules_of(unet, row.owner)
        }

    def head_layers(self, unet: nn.Module) -> dict[str, str]:
        """For each layer whose outputs are split into heads the attention that it belongs to."""
        return {
            f"{name}.{layer}": name
            for row in self.heads
            for name, _ in modules_of(unet, row.owner)
            for layer in row.layers
        }

    def set_heads_(self, unet: nn.Module, heads: Mapping[str, tuple[int, int]]) -> None:
        """Tell each attention that lost whole heads how many (before, after) it has now."""
        for row in self.heads:
            for name, owner in modules_of(unet, row.owner):
                if name in heads:
                    setattr(owner, row.count, heads[name][1])

    def queries(self, unet: nn.Module) -> dict[str, str]:
        """For each query projection the attention that it belongs to."""
        return {f"{name}.{row.query}": name for row in self.heads for name, _ in modules_of(unet, row.owner)}

    def mend_(self, unet: nn.Module) -> None:
        """Set every attribute that repeats a size from the layer it repeats."""
        for mirror in self.mirrors:
            for _, owner in modules_of(unet, mirror.owner):
                size = attribute_at(owner, mirror.source)
                *path, last = mirror.attribute.split(".")
                target = attribute_at(owner, ".".join(path)) if path else owner
                if size is not None and target is not None:
                    setattr(target, last, size)
        for row in self.heads:
            for _, owner in modules_of(unet, row.owner):
                size = owner.get_submodule(row.query).out_features // int(getattr(owner, row.count))
                setattr(owner, row.scale, size**-0.5)

    def keep_softmax_scale_(self, unet: nn.Module, dense_head_sizes: dict[str, int]) -> None:
        """Multiply each query projection by sqrt(new / dense head size), so that the logits keep the dense scale."""
        sizes = self.head_sizes(unet)
        for row in self.heads:
            for name, owner in modules_of(unet, row.owner):
                query = owner.get_submodule(row.query)
                factor = math.sqrt(sizes[name] / dense_head_sizes[name])
                if factor != 1:
                    with torch.no_grad():
                        for parameter in query.parameters():
                            parameter.mul_(factor)


def modules_of(unet: nn.Module, class_name: str) -> Iterator[tuple[str, Any]]:
    """Name and module of everything in the UNet whose class has this name."""
    return ((name, module) for name, module in unet.named_modules() if type(module).__name__ == class_name)


def attribute_at(owner: Any, path: str) -> Any:
    """``owner.a.b`` for ``"a.b"``; None where a step is missing."""
    for step in path.split("."):
        owner = getattr(owner, step, None)
    return owner


def config_value(unet: nn.Module, key: str) -> Any:
    """The value of a key of the UNet's diffusers config, or None."""
    config: Any = unet.config
    return config.get(key)


def sample_size(unet: nn.Module) -> tuple[int, int]:
    """(height, width) of the config's sample_size; 32 where it has none."""
    size = config_value(unet, "sample_size") or 32
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def holds(unet: nn.Module, condition: str) -> bool:
    """Whether all parts of a port's condition hold."""
    return all(part_holds(unet, part) for part in condition.split(" & "))


def part_holds(unet: nn.Module, part: str) -> bool:
    found = re.fullmatch(r"(.+?)(!?=)(.+)", part)
    if not found:
        return bool(config_value(unet, part))
    left, sign, right = found.groups()
    value = axis_size(unet, left, {}) if left.startswith("{") else config_value(unet, left)
    other = axis_size(unet, right, {}) if right.startswith("{") else right
    return (str(value) == str(other)) is (sign == "=")


def axis_size(unet: nn.Module, axis: str, words: Mapping[str, int]) -> int:
    """The size of one axis of a port: a number, a word with its size, or config keys in braces."""
    found = re.fullmatch(r"\{(\w+)(?:-(\d+)\*(\w+))?\}", axis)
    if not found:
        return int(axis) if axis.isdigit() else words[axis]
    key, times, other = found.groups()
    return config_size(unet, key) - (int(times) * config_size(unet, other) if times else 0)


def config_size(unet: nn.Module, key: str) -> int:
    """A width in the config; of one per block, which share their input, the first."""
    value = config_value(unet, key)
    return int(value[0] if isinstance(value, (list, tuple)) else value)
