"""CRU's fusion of two feature maps, in plain PyTorch: what the op computes."""

from __future__ import annotations

import torch
from torch import Tensor


def channel_fuse(y1: Tensor, y2: Tensor, softmax: str) -> Tensor:
    """y1, y2 (B, C, H, W) -> (B, C, H, W); see `kernelpose.ops.channel_fuse`."""
    wide = torch.promote_types(y1.dtype, torch.float32)
    both = torch.stack((y1.to(wide), y2.to(wide)), 1)  # (B, 2, C, H, W)
    means = both.mean((3, 4), keepdim=True)
    joint = means.flatten(1).softmax(1).view_as(means)
    weights = joint if softmax == "joint" else means.softmax(1)
    return (weights * both).sum(1).to(y1.dtype)
