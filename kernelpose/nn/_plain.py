"""Ops that are being written, in plain PyTorch: of the same signatures as `kernelpose.ops`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return total, F.layer_norm(total, weight.shape, weight, bias, eps)


def dwconv_gelu(x: Tensor, weight: Tensor, bias: Tensor, *, size: tuple[int, int]) -> Tensor:
    maps = x.unflatten(1, size).permute(0, 3, 1, 2)
    y = F.gelu(F.conv2d(maps, weight, bias, padding=1, groups=weight.shape[0]))
    return y.permute(0, 2, 3, 1).flatten(1, 2)


def reduced_attention(
    q: Tensor, kv: Tensor, *, num_heads: int, scale: float | None = None
) -> Tensor:
    queries = q.unflatten(2, (num_heads, -1)).transpose(1, 2)
    keys, values = kv.unflatten(2, (2, num_heads, -1)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(queries, keys, values, scale=scale)
    return out.transpose(1, 2).flatten(2)


def dilated_pyramid(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    dilations: Sequence[int],
    stride: int = 1,
    mode: str = "concat",
    activation: str = "relu",
) -> Tensor:
    maps = []
    for weight, bias, dilation in zip(weights, biases, dilations, strict=True):
        x = F.conv2d(x, weight, bias, stride=stride, padding=dilation, dilation=dilation)
        x = F.relu(x) if activation == "relu" else x
        maps.append(x)
        stride = 1
    return torch.cat(maps, 1) if mode == "concat" else sum(maps[1:], maps[0])
