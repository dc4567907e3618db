"""Attention products: the MACs that no layer's parameters tell of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

# What multiplies queries with keys: its arguments up to those two, and the axis that counts the keys.
KEYS: dict[Any, tuple[tuple[str, ...], int]] = {
    F.scaled_dot_product_attention: (("query", "key"), -2),
    torch.baddbmm: (("input", "batch1", "batch2"), -1),  # of the processors without it; keys transposed
}


class Products(TorchFunctionMode):
    """While it is on, ``found`` says by name of an attention for how many pairs of a query and a key it multiplies.

    A pair takes a multiplication for each channel of the queries, and one for each of the values. The model, a copy, is
    left with hooks.
    """

    def __init__(self, model: nn.Module, attentions: Iterable[str]) -> None:
        super().__init__()
        self.found: dict[str, int] = {}
        self.inside: list[str] = []
        for name in attentions:
            module = model.get_submodule(name)
            module.register_forward_pre_hook(lambda *_, name=name: self.inside.append(name))
            module.register_forward_hook(lambda *_, name=name: self.inside.remove(name))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in KEYS and self.inside:
            names, keys = KEYS[func]
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            name, pairs = self.inside[-1], given[names[-2]].shape[-2] * given[names[-1]].shape[keys]
            self.found[name] = self.found.get(name, 0) + pairs
        return func(*args, **(kwargs or {}))
