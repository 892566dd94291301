"""Ops that are being written, in plain PyTorch: of the same signatures as `kernelpose.ops`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def dwconv_gelu(x: Tensor, weight: Tensor, bias: Tensor, *, size: tuple[int, int]) -> Tensor:
    maps = x.unflatten(1, size).permute(0, 3, 1, 2)
    y = F.gelu(F.conv2d(maps, weight, bias, padding=1, groups=weight.shape[0]))
    return y.permute(0, 2, 3, 1).flatten(1, 2)
