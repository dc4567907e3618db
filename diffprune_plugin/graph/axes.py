"""torch-pruning's graph with the axes of transformers: concatenations and splits of features, not of tokens.

torch-pruning 1.6 takes dimension 1 for the channels everywhere. Of (batch, tokens, features) that is the tokens: the
linear layer behind a concatenation of features was then coupled wrongly, in silence; and it guesses the sizes of
chunks, for which torch has another name by now.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from torch_pruning import ops
from torch_pruning.dependency import index_mapping, shape_infer


class AlongChannels:
    """An autograd node that says it works on dimension 1, which is what torch-pruning looks for."""

    def __init__(self, node: Any) -> None:
        self.node = node

    def __getattr__(self, key: str) -> Any:
        return 1 if key == "_saved_dim" else getattr(self.node, key)


def axis_of(node: Any) -> tuple[int, int]:
    """(rank, axis) of what a concatenation's or a split's autograd node works on."""
    sizes = getattr(node, "_saved_self_sym_sizes", None)
    rank = len(sizes) if sizes is not None else len(node._input_metadata[0].shape)
    axis = node._saved_dim
    return rank, (axis - 2**64 if axis >= 2**31 else axis) % rank  # unsigned: -1 is 2**64 - 1


def of_features(node: Any) -> bool:
    """Whether it works on the features: axis 1 of (b, c) and of (b, c, h, w), else the last."""
    rank, axis = axis_of(node)
    return axis == (1 if rank in (2, 4) else rank - 1)


def only_features(update: Callable[[Any, Any], None], kind: Any) -> Callable[[Any, Any], None]:
    """torch-pruning's update of the index mappings of one kind of operation, for those of features alone."""

    def call(graph: Any, node: Any) -> None:
        if node.type == kind and of_features(node.grad_fn):
            grad_fn, node.grad_fn = node.grad_fn, AlongChannels(node.grad_fn)
            try:
                update(graph, node)
            finally:
                node.grad_fn = grad_fn

    return call


def split_sizes(graph: Any) -> None:
    """The sizes of the parts of every split of features, as its autograd node has them."""
    for node in graph.module2node.values():
        if node.type == ops.OPTYPE.SPLIT and of_features(node.grad_fn):
            saved = node.grad_fn
            if hasattr(saved, "_saved_split_sizes"):
                parts = list(saved._saved_split_sizes)
            else:
                total, size = saved._saved_self_sym_sizes[axis_of(saved)[1]], saved._saved_split_size
                parts = [size] * (total // size)
            node.module.split_sizes, node.module.offsets = parts, [sum(parts[:i]) for i in range(len(parts) + 1)]


@contextlib.contextmanager
def feature_axes() -> Iterator[None]:
    """While a dependency graph is built or its groups are listed; torch-pruning is as it was afterwards."""
    concat = only_features(index_mapping.update_concat_index_mapping, ops.OPTYPE.CONCAT)
    split = only_features(index_mapping.update_split_index_mapping, ops.OPTYPE.SPLIT)
    with (
        mock.patch.object(index_mapping, "update_concat_index_mapping", concat),
        mock.patch.object(index_mapping, "update_split_index_mapping", split),
        mock.patch.object(shape_infer, "init_shape_information", split_sizes),
    ):
        yield
