"""A chain of dilated 3x3 convolutions, in plain PyTorch: what the op computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def dilated_pyramid(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    dilations: Sequence[int],
    stride: int,
    mode: str,
    activation: str,
) -> Tensor:
    """x (B, C, H, W) -> (B, C', h, w); see `kernelpose.ops.dilated_pyramid`."""
    maps = []
    for weight, bias, dilation in zip(weights, biases, dilations, strict=True):
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        x = F.conv2d(x, weight, bias, stride, padding=dilation, dilation=dilation)
        if activation == "relu":
            x = F.relu(x)
        maps.append(x)
        stride = 1
    return torch.cat(maps, 1) if mode == "concat" else sum(maps[1:], maps[0])
