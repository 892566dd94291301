"""Global response normalisation, in plain PyTorch: what the op computes."""

from __future__ import annotations

import torch
from torch import Tensor


def grn(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """x (B, C, H, W), gamma and beta of C elements -> (B, C, H, W); see `kernelpose.ops.grn`."""
    features = x.to(torch.promote_types(x.dtype, torch.float32))
    gamma, beta = (p.to(features.dtype).reshape(1, -1, 1, 1) for p in (gamma, beta))
    norm = torch.linalg.vector_norm(features, dim=(2, 3), keepdim=True)
    response = norm / (norm.mean(1, keepdim=True) + eps)
    return (gamma * (features * response) + beta + features).to(x.dtype)
