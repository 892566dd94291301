"""Residual addition and LayerNorm, in plain PyTorch: what the op computes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x and residual (..., C) -> (sum, norm), both like it; see `kernelpose.ops.add_layer_norm`."""
    total = x + residual
    wide = torch.promote_types(total.dtype, torch.float32)
    norm = functional.layer_norm(
        total.to(wide), total.shape[-1:], weight.to(wide), bias.to(wide), eps
    )
    return total, norm.to(total.dtype)
