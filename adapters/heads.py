"""What a table says of attention: which layers are split into heads, and what follows when heads or dimensions go."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from diffprune_plugin.adapters.rows import Heads

if TYPE_CHECKING:
    from torch import nn


class AttentionFacts:
    """The methods of a `ModelAdapter` that its rows `Heads` answer."""

    heads: tuple[Heads, ...]

    def attentions(self, model: nn.Module) -> Iterator[tuple[Heads, str, Any]]:
        """Each attention that a row describes: the row, its name, the module."""
        return ((row, name, owner) for row in self.heads for name, owner in modules_of(model, row.owner))

    def equal_parts(self, model: nn.Module) -> dict[str, int]:
        """For each layer, into how many parts its channels fall that must lose equally many: norm groups, heads."""
        from torch import nn

        parts = {name: m.num_groups for name, m in model.named_modules() if isinstance(m, nn.GroupNorm)}
        return parts | self.head_counts(model)

    def head_counts(self, model: nn.Module) -> dict[str, int]:
        """For each layer whose outputs an attention splits into heads, how many heads."""
        return {
            below(name, layer): int(getattr(owner, row.count))
            for row, name, owner in self.attentions(model)
            for layer in there(owner, row.layers)
        }

    def head_sizes(self, model: nn.Module) -> dict[str, int]:
        """Dimensions per head of each attention, by module name."""
        return {
            name: owner.get_submodule(row.query).out_features // int(getattr(owner, row.count))
            for row, name, owner in self.attentions(model)
        }

    def head_layers(self, model: nn.Module, whole: bool = False) -> dict[str, str]:
        """For each layer whose outputs are split into heads the attention that it belongs to.

        ``whole``: only of attentions whose heads go whole or stay.
        """
        return {
            below(name, layer): name
            for row, name, owner in self.attentions(model)
            if row.whole or not whole
            for layer in there(owner, row.layers)
        }

    def uncoupled(self, model: nn.Module) -> list[str]:
        """Names of the parameters that all heads of an attention share, whichever of them are left."""
        return [
            f"{below(name, norm)}.{key}"
            for row, name, owner in self.attentions(model)
            for norm in there(owner, row.norms)
            for key, _ in owner.get_submodule(norm).named_parameters()
        ]

    def set_heads_(self, model: nn.Module, heads: Mapping[str, tuple[int, int]]) -> None:
        """Tell each attention that lost whole heads how many (before, after) it has now."""
        for row, name, owner in self.attentions(model):
            if name in heads:
                setattr(owner, row.count, heads[name][1])

    def queries(self, model: nn.Module) -> dict[str, str]:
        """For each query projection the attention that it belongs to."""
        return {below(name, row.query): name for row, name, _ in self.attentions(model)}

    def multiplied(self, model: nn.Module) -> dict[str, str]:
        """For each layer whose outputs go into an attention product that MACs count the attention it belongs to."""
        return {
            below(name, layer): name
            for row, name, owner in self.attentions(model)
            for layer in there(owner, (row.query, row.value))
            if row.value
        }

    def mend_heads_(self, model: nn.Module) -> None:
        """Set what repeats the width of an attention, and the softmax scale, from its query projection."""
        for row, _, owner in self.attentions(model):
            width = owner.get_submodule(row.query).out_features
            for attribute in row.widths:
                setattr(owner, attribute, width)
            if row.scale:
                setattr(owner, row.scale, (width // int(getattr(owner, row.count))) ** -0.5)

    def keep_softmax_scale_(self, model: nn.Module, dense_head_sizes: dict[str, int]) -> None:
        """Multiply each query projection by sqrt(new / dense head size), so that the logits keep the dense scale."""
        import torch

        sizes = self.head_sizes(model)
        for row, name, owner in self.attentions(model):
            factor = math.sqrt(sizes[name] / dense_head_sizes[name])
            if factor != 1:
                with torch.no_grad():
                    for parameter in owner.get_submodule(row.query).parameters():
                        parameter.mul_(factor)


def there(owner: Any, layers: tuple[str, ...]) -> list[str]:
    """Those of the layers that a module has."""
    return [layer for layer in layers if attribute_at(owner, layer) is not None]


def modules_of(model: nn.Module, class_name: str) -> Iterator[tuple[str, Any]]:
    """Name and module of everything in the model whose class has this name; its own may be that of a base class."""
    own = any(base.__name__ == class_name for base in type(model).__mro__)
    return (
        (name, module)
        for name, module in model.named_modules()
        if (own if module is model else type(module).__name__ == class_name)
    )


def below(name: str, layer: str) -> str:
    """The name of a layer of the module ``name``, which is nothing for the model itself."""
    return f"{name}.{layer}" if name else layer


def attribute_at(owner: Any, path: str) -> Any:
    """``owner.a.b`` for ``"a.b"``; None where a step is missing."""
    for step in path.split("."):
        owner = getattr(owner, step, None)
    return owner
