"""The form of an adapter: the facts about one model class that pruning, reloading and export need."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffprune_plugin.adapters.depth import Blocks, DepthPlan, Residual
from diffprune_plugin.adapters.heads import AttentionFacts, attribute_at, below, modules_of
from diffprune_plugin.adapters.ports import (
    Config,
    Packing,
    Port,
    any_timestep,
    config_of,
    configured_size,
    sized,
    two_pixels_at_the_bottom,
    whole_ones,
)
from diffprune_plugin.adapters.rows import Heads, Keep, Known, Mirror, Pairs, Refused
from diffprune_plugin.adapters.state import (
    check_own_layers,
    check_plain,
    check_stock,
    check_unhooked,
    check_unquantized,
    remedy_of,
)
from diffprune_plugin.errors import BadInput

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Heads", "Keep", "Known", "Mirror", "ModelAdapter", "Pairs", "Refused"]

# What the pipelines of Stable Diffusion and XL return for prompts.
STATES_AND_POOLED = ("encoder_hidden_states", "null encoder_hidden_states", "text_embeds", "null text_embeds")


@dataclass(frozen=True)
class ModelAdapter(AttentionFacts):
    """One model class as a table; everything else is derived from it.

    component: the attribute of a pipeline that holds the model. sample, timestep: names of the inputs that hold the
        noisy sample (batch, channels, ...) and its timesteps (batch,).
    size, smallest: of a config, (height, width) of a sample, and the least that passes every layer; any_size: data of
        any size are taken, with sides of the ``largest`` at most. timesteps: taken.
    words: sizes, in examples, of axes other than batch, height and width, or a function of the sizes of the others.
    real_timesteps: whether those between whole ones are taken too.
    blocks, residuals, depths: lists of blocks of which any may go, modules that may, published plans that take some.
    packing: of latents into tokens, where the pipeline does it.
    objective: what it was trained for, a key of `diffusion.loss.OBJECTIVES`; model_time: what its timesteps are times
        those of the scheduler.
    encoded: the inputs that the pipeline's encode_prompt returns, by place, or nothing; after "null" those for no
        prompt. patches: those of `export.patches` that its export needs. module: where the class is imported from.
    narrower: of a pruned model what a config of the class itself would have to say for its layers to have these sizes.
    """

    model_class: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    keep: tuple[str | Keep, ...]
    heads: tuple[Heads, ...] = ()
    pairs: tuple[Pairs, ...] = ()
    mirrors: tuple[Mirror, ...] = ()
    known: tuple[Known, ...] = ()
    refused: tuple[Refused, ...] = ()
    words: tuple[tuple[str, int | Callable[[Mapping[str, int]], int]], ...] = ()
    blocks: tuple[Blocks, ...] = ()
    residuals: tuple[Residual, ...] = ()
    depths: tuple[DepthPlan, ...] = ()
    processors: tuple[str, ...] = ("AttnProcessor2_0", "AttnProcessor")
    module: str = "diffusers"
    component: str = "unet"
    sample: str = "sample"
    timestep: str = "timestep"
    size: Callable[[Config], tuple[int, int]] = configured_size
    smallest: Callable[[Config], tuple[int, int]] = two_pixels_at_the_bottom
    timesteps: Callable[[Config], range] = any_timestep
    any_size: bool = False
    largest: Callable[[Config], int] | None = None
    packing: Packing | None = None
    real_timesteps: Callable[[Config], bool] = whole_ones
    objective: str = "noise_prediction"
    model_time: float = 1.0
    encoded: tuple[str, ...] = STATES_AND_POOLED
    patches: tuple[str, ...] = ()
    narrower: Callable[[Any], dict[str, Any]] | None = None

    def ports(self, model: nn.Module) -> tuple[Port, ...]:
        """The inputs that this model's config asks for."""
        return tuple(port for port in self.inputs if port.exists(config_of(model)))

    def further_ports(self, model: nn.Module) -> tuple[Port, ...]:
        """The inputs other than the sample and its timesteps that data have to give."""
        given = (port for port in self.ports(model) if port.made is None)
        return tuple(port for port in given if port.name not in (self.sample, self.timestep))

    def sample_shape(self, model: nn.Module) -> tuple[int, ...]:
        """(channels, height, width) of one sample of the config's size, before it is packed."""
        height, width = self.size(config_of(model))
        if self.packing:
            return self.channels(model)[0], height, width
        return tuple(sized(self.shapes(model)[self.sample][1:], self.sizes(model)))

    def channels(self, model: nn.Module) -> tuple[int, int]:
        """How many channels of a sample the model takes, and how many it gives."""
        sizes, places = self.sizes(model), (-1 if self.packing else 1, self.packing.squares if self.packing else 1)
        shapes = self.shapes(model)[self.sample], self.outputs[0].shape(config_of(model))
        taken, given = (sized((shape[places[0]],), sizes)[0] // places[1] for shape in shapes)
        return taken, given

    def sizes(
        self,
        model: nn.Module,
        batch: int = 1,
        size: tuple[int, int] | None = None,
        words: Mapping[str, int] | None = None,
    ) -> dict[str, int]:
        """The size of each axis by its word: ``words`` or the table's, ``size`` (height, width) or the config's."""
        height, width = size or self.size(config_of(model))
        found: dict[str, int] = {"batch": batch, "height": height, "width": width}
        for word, count in self.words:
            found[word] = (words or {}).get(word, count(found) if callable(count) else count)
        return found | dict(words or {})

    def example_inputs(
        self,
        model: nn.Module,
        batch: int = 1,
        size: tuple[int, int] | None = None,
        seed: int = 0,
        words: Mapping[str, int] | None = None,
    ) -> dict[str, Any]:
        """The arguments of a forward: `flat_inputs`, with those that the model takes inside a dict put there."""
        return self.nested(self.flat_inputs(model, batch, size, seed, words))

    def flat_inputs(
        self,
        model: nn.Module,
        batch: int = 1,
        size: tuple[int, int] | None = None,
        seed: int = 0,
        words: Mapping[str, int] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Seeded inputs by name: ``batch`` samples of ``size`` (height, width), by default the config's.

        ``words``: sizes of other dynamic axes, by default the table's.
        """
        import torch

        generator, config = torch.Generator().manual_seed(seed), config_of(model)
        steps, parameter = self.tried_timesteps(config), next(model.parameters())
        sizes, inputs = self.sizes(model, batch, size, words), {}
        for port in self.ports(model):
            shape = sized(port.shape(config), sizes)
            if port.made:
                tensor = port.made(sizes).to(parameter.dtype)
            elif port.integers_below:
                tensor = torch.randint(0, port.classes(config), shape, generator=generator, dtype=port.torch_dtype)
            elif port.torch_dtype is torch.int64 or port.name == self.timestep:
                rows = [steps[(i + 1) % len(steps)] * self.model_time for i in range(batch)]
                tensor = torch.tensor(rows, dtype=port.torch_dtype)
            else:
                tensor = torch.randn(shape, generator=generator).to(parameter.dtype)
            inputs[port.name] = tensor.to(parameter.device)
        return inputs

    def tried_timesteps(self, config: Config) -> range:
        """Those of examples: what schedulers have, of a model that takes any."""
        taken = self.timesteps(config)
        return range(taken.start, min(taken.stop, 1000))

    def shapes(self, model: nn.Module) -> dict[str, tuple[int | str, ...]]:
        """The shape of each input by name: numbers, and words for dynamic axes."""
        return {port.name: port.shape(config_of(model)) for port in self.ports(model)}

    def nested(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs by port name as the forward takes them: some inside a dict argument."""
        inside = {port.name: port.inside for port in self.inputs if port.inside}
        arguments = {name: value for name, value in inputs.items() if name not in inside}
        for name, holder in inside.items():
            if name in inputs:
                arguments[holder] = arguments.get(holder, {}) | {name: inputs[name]}
        return arguments

    def denoise(self, model: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The model's output, shape of ``outputs``, for inputs by port name."""
        output: torch.Tensor = model(**self.nested(inputs), return_dict=False)[0]
        return output

    def noise_in(self, model: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
        """What `denoise` gives, without the variances that some models tell behind the prediction of a sample."""
        output = self.denoise(model, inputs)
        return output if self.packing else output[:, : min(self.channels(model))]

    def predict(
        self, model: nn.Module, sample: torch.Tensor, timesteps: torch.Tensor, extra: Mapping[str, Any]
    ) -> torch.Tensor:
        """The model's output, of the shape of a sample, for noisy samples (batch, channels, ...), timesteps (batch,)
        and further inputs."""
        return self.unpacked(self.denoise(model, self.given(model, sample, timesteps, extra)), sample)

    def given(
        self, model: nn.Module, sample: torch.Tensor, timesteps: torch.Tensor, extra: Mapping[str, Any]
    ) -> dict[str, Any]:
        """All inputs by name for what `predict` takes: packed, and with those that no data has to give."""
        if not self.packing and not any(port.made for port in self.inputs):
            return {self.sample: sample, self.timestep: timesteps, **extra}
        sizes = self.sizes(model, len(sample), (sample.shape[-2], sample.shape[-1]), self.lengths(model, extra))
        made = {port.name: port.made(sizes).to(sample) for port in self.ports(model) if port.made}
        packed = self.packing.pack(sample) if self.packing else sample
        return {self.sample: packed, self.timestep: timesteps, **made, **extra}

    def lengths(self, model: nn.Module, extra: Mapping[str, Any]) -> dict[str, int]:
        """The size that each axis with a word has in these inputs; those of another number of axes say nothing."""
        shapes = {name: shape for name, shape in self.shapes(model).items() if name in extra}
        return {
            axis: extra[name].shape[place]
            for name, shape in shapes.items()
            for place, axis in enumerate(shape)
            if isinstance(axis, str) and len(shape) == len(extra[name].shape)
        }

    def unpacked(self, output: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """An output of the model in the shape of a sample."""
        return self.packing.unpack(output, like.shape[-2], like.shape[-1]) if self.packing else output

    def trace_inputs(self, model: nn.Module) -> dict[str, Any]:
        """The smallest inputs that pass through every layer."""
        words = {word: 2 for word, count in self.words if not callable(count)}
        return self.example_inputs(model, size=self.trace_size(model), words=words)

    def trace_size(self, model: nn.Module) -> tuple[int, int]:
        """The smallest (height, width) of a sample that passes through every layer."""
        return self.smallest(config_of(model))

    def kept_layers(self, model: nn.Module) -> dict[str, str]:
        """The layers whose output channels must stay, with the reason.

        Raises BadInput if a pattern of the table matches no layer.
        """
        names = [name for name, _ in model.named_modules()]
        kept: dict[str, str] = {}
        rows = (Keep(row, always) if isinstance(row, str) else row for row in self.keep)
        for row in (row for row in rows if row.when(config_of(model))):
            found = fnmatch.filter(names, row.layers)
            if not found:
                raise BadInput(f"adapter {self.model_class}: keep={row.layers!r} matches no layer; mend its table")
            kept |= dict.fromkeys(found, row.why)
        return kept

    def torch_pruning_kwargs(self, model: nn.Module) -> dict[str, Any]:
        """What torch_pruning.pruner.BasePruner has to be told about this UNet, in dicts of its own for each call.

        ``BasePruner(model, example_inputs, importance, **adapter.torch_pruning_kwargs(model))``, and `mend_` after
        each step. What no argument mends: ``round_to`` beside norm groups, the softmax scale, reloading; for those
        there is `diffprune_plugin.Pruner`.
        """
        return {
            "ignored_layers": [model.get_submodule(name) for name in sorted(self.kept_layers(model))],
            "num_heads": {model.get_submodule(name): count for name, count in self.head_counts(model).items()},
            "in_channel_groups": {},
            "out_channel_groups": {model.get_submodule(name): parts for name, parts in self.paired(model).items()},
        }

    def paired(self, model: nn.Module) -> dict[str, int]:
        """For each layer whose output is cut into parts that live and die together, how many parts."""
        return {
            below(name, row.layer): row.parts
            for row in self.pairs
            for name, owner in modules_of(model, row.owner)
            if row.when is None or getattr(owner, row.when[0]) == row.when[1]
        }

    def residual_modules(self, model: nn.Module) -> dict[str, Residual]:
        """The modules that may go without a config that says so, in the model's order; none inside another."""
        rows, found = {row.owner: row for row in self.residuals}, dict[str, Residual]()
        for name, module in model.named_modules():
            row, inside = rows.get(type(module).__name__), any(name.startswith(f"{outer}.") for outer in found)
            if row is not None and not inside and row.keeps(module):
                found[name] = row
        return found

    def check(self, model: nn.Module) -> None:
        """Raises BadInput, by name, for what the table does not cover: a config value, a processor, a loaded LoRA; and
        for a model that is masked, hooked, compiled or quantized."""
        check_stock(model)
        check_unhooked(model)
        check_plain(model)
        check_unquantized(model)
        for row in self.known:
            value = config_of(model).get(row.key)
            for item in value if isinstance(value, (list, tuple)) else (value,):
                if item not in row.values:
                    raise BadInput(
                        f"{row.key}: {item!r} is not covered by the adapter for {self.model_class}, "
                        f"which knows {', '.join(map(str, row.values))}; see docs/extending.md, 'A new model'"
                    )
        config = config_of(model)
        for refused in self.refused:
            if refused.when(config):
                why = refused.why if isinstance(refused.why, str) else refused.why(config)
                raise BadInput(f"{refused.key}: {config.get(refused.key)!r} {why}")
        check_own_layers(model)
        for name, module in model.named_modules():
            processor = type(getattr(module, "processor", None)).__name__
            if processor not in (*self.processors, "NoneType"):
                raise BadInput(
                    f"{name} uses {processor}; the adapter for {self.model_class} knows {', '.join(self.processors)}; "
                    f"{remedy_of(processor)}"
                )

    def mend_(self, model: nn.Module) -> None:
        """Set every attribute that repeats a size from the layer it repeats."""
        for mirror in self.mirrors:
            for _, owner in modules_of(model, mirror.owner):
                size = attribute_at(owner, mirror.source)
                *path, last = mirror.attribute.split(".")
                target = attribute_at(owner, ".".join(path)) if path else owner
                if size is not None and target is not None:
                    setattr(target, last, size)
        self.mend_heads_(model)


def always(_: Config) -> bool:
    return True


UNetAdapter = ModelAdapter  # its name of before
