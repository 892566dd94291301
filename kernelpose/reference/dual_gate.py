"""A channel gate and a spatial gate of the same maps, in plain PyTorch: what the op computes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dual_gate(
    y: Tensor, reduce_weight: Tensor, expand_weight: Tensor, spatial_weight: Tensor
) -> Tensor:
    """y (B, C, H, W) and the three weights -> (B, C, H, W); see `kernelpose.ops.dual_gate`."""
    maps = y.to(torch.promote_types(y.dtype, torch.float32))
    reduce, expand, spatial = (
        weight.to(maps.dtype) for weight in (reduce_weight, expand_weight, spatial_weight)
    )

    def bottleneck(pooled: Tensor) -> Tensor:
        return F.conv2d(F.relu(F.conv2d(pooled, reduce)), expand)

    mean, largest = maps.mean((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    of_channels = torch.sigmoid(bottleneck(mean) + bottleneck(largest))
    pooled = torch.cat((maps.mean(1, keepdim=True), maps.amax(1, keepdim=True)), 1)
    of_pixels = torch.sigmoid(F.conv2d(pooled, spatial, padding=spatial.shape[-1] // 2))
    return ((of_channels + of_pixels) * maps).to(y.dtype)
