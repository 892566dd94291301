"""Attention to the keys and values of a reduced map, in plain PyTorch: what the op computes."""

from __future__ import annotations

import torch
from torch import Tensor


def reduced_attention(q: Tensor, kv: Tensor, num_heads: int, scale: float | None = None) -> Tensor:
    """softmax(scale · q kᵀ) v, head by head; see `kernelpose.ops.reduced_attention`.

    q (B, N, C), kv (B, M, 2C) -> (B, N, C): PVT v2's attention (arXiv 2106.13797) between its
    projections.
    """
    q = q.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # (B, heads, N, d)
    k, v = kv.unflatten(-1, (2, num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, M, d) each
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * (q @ k.transpose(-2, -1))  # (B, heads, N, M)
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    attention = scores.softmax(-1).to(v.dtype)
    return (attention @ v).transpose(1, 2).flatten(2)
