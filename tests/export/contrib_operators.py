"""ONNX Runtime's own operators that only CUDA has, in NumPy by their documentation: what ONNX's reference runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from onnx.reference.op_run import OpRun
from torch.nn import functional


def norm(x: Any, gamma: Any, beta: Any, groups: int, epsilon: float, activation: int) -> Any:
    """x: (batch, height, width, channels)."""
    n, h, w, c = x.shape
    grouped = x.astype(np.float32).reshape(n, h * w, groups, c // groups)
    mean, variance = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
    y = ((grouped - mean) / np.sqrt(variance + epsilon)).reshape(x.shape) * gamma + beta
    return (y / (1 + np.exp(-y)) if activation else y).astype(x.dtype)


class GroupNorm(OpRun):
    op_domain = "com.microsoft"

    def _run(self, x, gamma, beta, activation=None, channels_last=1, epsilon=1e-5, groups=None):
        return (norm(x, gamma, beta, groups, epsilon, activation),)


class SkipGroupNorm(OpRun):
    op_domain = "com.microsoft"

    def _run(self, x, gamma, beta, skip, bias=None, activation=None, channels_last=1, epsilon=1e-5, groups=None):
        skip = skip.reshape(skip.shape[0], 1, 1, -1) if skip.ndim == 2 else skip
        total = x + skip + (0 if bias is None else bias)
        return (norm(total, gamma, beta, groups, epsilon, activation), total.astype(x.dtype))[
            : len(self.onnx_node.output)
        ]


class NhwcConv(OpRun):
    op_domain = "com.microsoft"

    def _run(self, x, w, b=None, auto_pad=None, dilations=None, group=1, kernel_shape=None, pads=None, strides=None):
        out = functional.conv2d(
            torch.tensor(x).permute(0, 3, 1, 2),
            torch.tensor(w).permute(0, 3, 1, 2),
            None if b is None else torch.tensor(b),
            tuple(strides or (1, 1)),
            tuple(pads[:2]) if pads else 0,
        )
        return (out.permute(0, 2, 3, 1).contiguous().numpy(),)


class BiasSplitGelu(OpRun):
    op_domain = "com.microsoft"

    def _run(self, x, bias):
        left, right = torch.tensor(x + bias).chunk(2, -1)
        return ((left * functional.gelu(right)).numpy(),)


class BiasAdd(OpRun):
    op_domain = "com.microsoft"

    def _run(self, x, bias, skip):
        return (x + bias + skip,)


class SkipLayerNormalization(OpRun):
    op_domain = "com.microsoft"

    def _run(self, x, skip, gamma, beta=None, bias=None, epsilon=1e-12):
        total = x + skip + (0 if bias is None else bias)
        y = functional.layer_norm(
            torch.tensor(total), total.shape[-1:], torch.tensor(gamma), torch.tensor(beta), epsilon
        )
        empty = np.zeros(0, np.float32)
        return (y.numpy(), empty, empty, total)[: len(self.onnx_node.output)]


class MultiHeadAttention(OpRun):
    op_domain = "com.microsoft"

    def _run(self, q, k, v, *_: Any, mask_filter_value=None, num_heads=None, scale=None, unidirectional=0):
        heads = [torch.tensor(x).unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v)]
        out = functional.scaled_dot_product_attention(*heads, scale=scale or None)
        return (out.transpose(1, 2).flatten(2).numpy(),)


OPERATORS = [GroupNorm, SkipGroupNorm, NhwcConv, BiasSplitGelu, BiasAdd, SkipLayerNormalization, MultiHeadAttention]
