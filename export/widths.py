"""Which widths of an exported file waste the hardware or lose a kernel, by the table of `planning.widths`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffprune_plugin.export.integrity import parse
from diffprune_plugin.planning.widths import RUNTIMES, Part, runtime_name
from diffprune_plugin.utils.optional import need

LINEAR = ("Conv", "Gemm", "MatMul", "NhwcConv")
Node = Any


@dataclass(frozen=True)
class Waste:
    """A width that a kernel does not take: of a layer, or of each of its norm groups, heads or halves.

    ``rounded``: the next width that it takes, which round_to would leave; None where there is none.
    """

    layer: str
    width: int
    multiple: int
    rounded: int | None
    kernel: str
    of: Part


def wasteful_layers(path: str | Path, provider: str, dtype: str, fused: bool = False) -> list[Waste]:
    """The widths that some kernel of the runtime does not take; ``fused``: those of fused operators too.

    Layers as narrow as the image's channels are left out: nothing can be done about them.
    """
    rules = RUNTIMES.get(runtime_name(provider, dtype, fused), ())
    found = [
        Waste(layer, width, rule.multiple, rounded, rule.kernel, rule.of)
        for of, layer, width in Widths(parse(Path(path)).graph).found()
        for rule in rules
        if rule.of == of and (rounded := rule.at_least(width)) != width and width >= rule.multiple
    ]
    return list(dict.fromkeys(found))


def lost_kernels(pruned: Sequence[Waste], dense: Sequence[Waste]) -> list[Waste]:
    """The fused operators that a pruned file has not and the dense one has: widths that pruning took from a kernel."""
    without = {(waste.layer, waste.kernel) for waste in dense}
    return [waste for waste in pruned if waste.of != "layer" and (waste.layer, waste.kernel) not in without]


class Widths:
    """The widths of a graph that the table of kernels has a word for."""

    def __init__(self, graph: Any) -> None:
        self.nodes: list[Node] = list(graph.node)
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.shapes = {name: list(tensor.dims) for name, tensor in self.constants.items()}
        self.makers = {name: node for node in self.nodes for name in node.output}
        self.users: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in node.input:
                self.users.setdefault(name, []).append(node)
        self.bias = {i: j for node in self.nodes if node.op_type == "Add" for i, j in (node.input, node.input[::-1])}
        self.names = self.named()

    def found(self) -> Iterator[tuple[Part, str, int]]:
        """What each width is of, its layer, and how wide; a norm goes by the layer behind it."""
        for node in self.nodes:
            if node.op_type == "InstanceNormalization":
                norm = self.next(node.output[0], "Mul")
                if norm is not None and (weight := self.shapes.get(norm.input[1])):
                    yield (
                        "norm group",
                        f"the norm before {self.behind(norm)}",
                        weight[0] // self.shapes[node.input[1]][0],
                    )
            if node.op_type == "MultiHeadAttention" and (maker := self.makers.get(node.input[0])):
                heads = next(attribute.i for attribute in node.attribute if attribute.name == "num_heads")
                yield "head", self.names.get(maker.output[0], node.name), self.out_channels(maker) // heads
            if node.output[0] not in self.names:
                continue
            layer, width = self.layer(node), self.out_channels(node)
            yield "layer", layer, width
            yield from (("head", layer, size) for size in self.head_sizes(node))
            if any(self.next(split.output[-1], "Gelu", steps=1) for split in self.following(node, "Split")):
                yield "half", layer, width // 2

    def out_channels(self, node: Node) -> int:
        return int(self.shapes[node.input[1]][node.op_type == "MatMul"])

    def layer(self, node: Node) -> str:
        """A layer's name, by its weight; the exporter renames those that it transposes, which go by their bias, and
        where they have none by the layer behind them."""
        return self.names[node.output[0]]

    def named(self) -> dict[str, str]:
        """`layer` by output, from the last to the first."""
        names, last = {}, "the output"
        for node in reversed(self.nodes):
            if node.op_type in LINEAR and len(node.input) > 1 and node.input[1] in self.shapes:
                known = [n for n in (*node.input[1:3], self.bias.get(node.output[0], "")) if "." in n]
                last = known[0].partition(".")[2].rsplit(".", 1)[0] if known else last
                names[node.output[0]] = last if known else f"a layer before {last}"
        return names

    def head_sizes(self, node: Node) -> Iterator[int]:
        """The last size of (batch, words, heads, size), where a layer's output becomes that."""
        for reshape in self.following(node, "Reshape"):
            shape = self.constants.get(reshape.input[1])
            if shape is not None and list(shape.dims) == [4] and self.next(reshape.output[0], "Transpose", steps=1):
                yield int(need("onnx").numpy_helper.to_array(shape)[-1])

    def following(self, node: Node, operator: str) -> list[Node]:
        """The operators of a kind that take a layer's output, its bias added."""
        users = self.users.get(node.output[0], [])
        users = users + [u for add in users if add.op_type == "Add" for u in self.users.get(add.output[0], [])]
        return [user for user in users if user.op_type == operator]

    def next(self, value: str, operator: str, steps: int = 3) -> Node | None:
        """The first operator of a kind behind a value, at most so many steps on."""
        for _ in range(steps):
            users = self.users.get(value, [])
            if found := next((user for user in users if user.op_type == operator), None):
                return found
            if not users:
                return None
            value = users[0].output[0]
        return None

    def behind(self, node: Node) -> str:
        """The name of the first layer that takes an operator's output."""
        for _ in range(6):
            users = self.users.get(node.output[0], [])
            if found := next((self.layer(user) for user in users if user.output[0] in self.names), None):
                return found
            if not users:
                break
            node = users[-1]
        return "the output"
