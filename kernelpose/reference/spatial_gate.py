"""The gate of SCConv's spatial unit, in plain PyTorch: what the op computes."""

from __future__ import annotations

import torch
from torch import Tensor


def spatial_gate(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, threshold: float, eps: float
) -> Tensor:
    """x (B, C, H, W), weight and bias (C,) -> (B, C, H, W); see `kernelpose.ops.spatial_gate`."""
    features = x.to(torch.promote_types(x.dtype, torch.float32))
    weight, bias = weight.to(features.dtype), bias.to(features.dtype)
    normalized = torch.group_norm(features, groups, weight, bias, eps)
    return reconstruct(features, normalized, weight, threshold).to(x.dtype)


def reconstruct(x: Tensor, normalized: Tensor, weight: Tensor, threshold: float) -> Tensor:
    """The gate of x (B, C, H, W) by its normalised form, and the cross reconstruction."""
    share = (weight / weight.sum()).reshape(1, -1, 1, 1)
    gate = torch.sigmoid(share * normalized)
    informative = gate > threshold
    weak = gate * x
    kept = torch.where(informative, x, weak)
    rest = torch.where(informative, 0, weak)
    return kept + torch.cat(rest.chunk(2, 1)[::-1], 1)
