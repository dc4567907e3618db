"""Operators that ONNX Runtime has a kernel of its own for, in the place of what the exporter writes.

Attention and SkipLayerNormalization by onnxscript's fusions for ONNX Runtime, which know the exporter's graphs and run
on CPU and CUDA; norms and convolutions with channels last by ONNX Runtime's own optimizer of diffusion UNets, GEGLUs
here: these have kernels on CUDA only, for some widths only (`planning.widths`), and others are left as they are.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

from diffprune_plugin.errors import BadInput
from diffprune_plugin.planning.widths import FUSES, GROUP_NORM, SPLIT_GELU
from diffprune_plugin.utils.optional import need

DOMAIN = "com.microsoft"


def check_fuse(provider: str | None) -> str:
    """The provider that a file is fused for, without its options; raises BadInput where there are no such kernels."""
    name = (provider or "").partition(":")[0]
    if name not in FUSES:
        told = f"--provider {name}" if name else "no --provider"
        raise BadInput(f"--fuse: {told}: fused operators are a provider's; give --provider {' or '.join(FUSES)}")
    return name


def fused(model: Any, provider: str) -> Any:
    """The onnx_ir model with fused operators for a provider, one of `FUSES`; changes the one that is given."""
    ir = need("onnx_ir")
    if check_fuse(provider) == "cuda":
        proto = ir.to_proto(model)
        fuse_geglu_(proto)
        model = ir.from_proto(unet_optimized(proto))
    model.graph.opset_imports.setdefault(DOMAIN, 1)
    found = need("onnxscript.rewriter.ort_fusions").optimize_for_ort(model)
    return found[0] if isinstance(found, tuple) else found


def own_operators(model: Any) -> dict[str, int]:
    """How many operators of ONNX Runtime's own an onnx_ir model has, by kind."""
    return dict(Counter(node.op_type for node in model.graph.all_nodes() if node.domain == DOMAIN))


def unet_optimized(proto: Any) -> Any:
    """A ModelProto after ONNX Runtime's optimizer of model type unet, which leaves norms that CUDA cannot compute."""
    optimizer = need("onnxruntime.transformers.optimizer")
    options = need("onnxruntime.transformers.fusion_options").FusionOptions("unet")
    options.enable_attention = False  # done before, by fusions that know the exporter's form of it
    with even_norms(sys.modules[optimizer.MODEL_TYPES["unet"][0].__module__]), quiet():
        return optimizer.optimize_by_fusion(proto, "unet", 0, 0, options).model


@contextlib.contextmanager
def even_norms(module: Any) -> Iterator[None]:
    """GroupNorm fused where its kernel runs alone: an odd number of channels per group fails when it is called.

    Its scale and shift become fp32, which they have to be; of an fp16 graph the optimizer takes the bytes as they are.
    """
    stock = module.FusionGroupNorm

    class Even(stock):  # type: ignore[misc, valid-type]
        def fuse(self, add: Any, *rest: Any) -> None:
            path = self.model.match_parent_path(add, ["Mul", "Reshape", "InstanceNormalization"], [0, 0, 0], rest[1])
            if path is None:
                return
            weight, scale = (self.model.get_constant_value(node.input[1]) for node in (path[0], path[2]))
            if weight is None or scale is None or weight.size // scale.size % GROUP_NORM.multiple:
                return
            super().fuse(add, *rest)

        def add_initializer(self, name: str, data_type: int, dims: Any, vals: Any, raw: bool = True) -> Any:
            kind = need("onnx").helper.tensor_dtype_to_np_dtype(data_type)
            return super().add_initializer(name, data_type, dims, need("numpy").asarray(vals, kind), raw)

    module.FusionGroupNorm = Even
    try:
        yield
    finally:
        module.FusionGroupNorm = stock


def fuse_geglu_(proto: Any) -> None:
    """Put BiasSplitGelu for Add, Split, Gelu and Mul where the kernel knows the width."""
    graph, helper = proto.graph, need("onnx").helper
    makers = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    users = Counter(name for node in graph.node for name in node.input)

    def made_by(name: str, operator: str) -> Any:
        """What computes a value, if it is of a kind and nothing else takes that value."""
        node = makers.get(name)
        return node if node is not None and node.op_type == operator and users[name] == 1 else None

    for mul in [node for node in graph.node if node.op_type == "Mul"]:
        gelu = made_by(mul.input[1], "Gelu") or made_by(mul.input[0], "Gelu")
        split: Any = made_by(gelu.input[0], "Split") if gelu else None
        add: Any = made_by(split.input[0], "Add") if split else None
        bias = next((name for name in add.input if name in constants), None) if add else None
        if bias is None or split.output[0] not in mul.input or constants[bias].dims[0] // 2 not in SPLIT_GELU.listed:
            continue
        value = next(name for name in add.input if name != bias)
        node = helper.make_node("BiasSplitGelu", [value, bias], list(mul.output), domain=DOMAIN)
        graph.node.insert(list(graph.node).index(mul), node)
        for old in (add, split, gelu, mul):
            graph.node.remove(old)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The optimizer's notes and its progress bar off the user's screen."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
