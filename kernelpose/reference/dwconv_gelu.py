"""Depthwise 3x3 convolution and GELU of tokens, in plain PyTorch: what the op computes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def dwconv_gelu(x: Tensor, weight: Tensor, bias: Tensor, size: tuple[int, int]) -> Tensor:
    """x (B, h * w, C) -> (B, h * w, C); see `kernelpose.ops.dwconv_gelu`."""
    maps = x.transpose(1, 2).unflatten(2, size)
    maps = F.conv2d(maps, weight.to(x.dtype), bias.to(x.dtype), padding=1, groups=x.shape[2])
    return F.gelu(maps.flatten(2).transpose(1, 2))
