"""Depthwise convolutions of three sizes and their grouped mix, in plain PyTorch: what the op
computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def multi_granularity(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    mix_weight: Tensor,
    mix_bias: Tensor,
    groups: int,
) -> Tensor:
    """x (B, C, H, W) -> (B, C, H, W); see `kernelpose.ops.multi_granularity`."""
    branches = [
        F.conv2d(x, w.to(x.dtype), b.to(x.dtype), padding=w.shape[-1] // 2, groups=x.shape[1])
        for w, b in zip(weights, biases, strict=True)
    ]
    grouped = in_groups(branches, groups)
    mix = F.conv2d(grouped, mix_weight.to(x.dtype), mix_bias.to(x.dtype), groups=groups)
    return mix + x


def in_groups(branches: Sequence[Tensor], groups: int) -> Tensor:
    """Branches (B, C, H, W) -> the channels of all as the mix takes them: group by group, and in
    each the branches one after the other."""
    return torch.stack([branch.unflatten(1, (groups, -1)) for branch in branches], 2).flatten(1, 3)
