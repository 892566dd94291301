"""Attention with spatially reduced keys and values, as a drop-in module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernelpose import ops
from kernelpose.nn.packed_sr_attention import PackedSRAttention
from kernelpose.nn.untouched import untouched


class SRAttention(nn.Module):
    """Tokens (B, h * w, C) of a map -> the same shape, every token a query.

    Keys and values come from the map reduced by a convolution of kernel and stride `sr_ratio`, and
    a LayerNorm: 48 of 3072 tokens with sr_ratio 8. What is left of a side over a multiple of it is
    no key. Constructor and state_dict are those of timm's PVT v2 attention ("PVT v2: Improved
    Baselines with Pyramid Vision Transformer"), without its linear form and its dropout.

    Args:
        dim: C.
        num_heads: a divisor of dim.
        sr_ratio: reduction of both sides; 1 for none.
        qkv_bias: whether the projections to queries, keys and values have a bias.

    forward: x (B, N, C) and feat_size (h, w) of its map, N = h * w.

    Raises:
        ValueError: num_heads does not divide dim, or sr_ratio is less than 1.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, sr_ratio: int = 1, *, qkv_bias: bool = True
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads is {num_heads}; expected a divisor of the {dim} channels.")
        if sr_ratio < 1:
            raise ValueError(f"sr_ratio is {sr_ratio}; expected at least 1.")
        self.num_heads = num_heads
        self.sr_ratio = sr_ratio
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio)
            # Else oneDNN arranges this weight anew in every call: 1.5 to 4 times the time.
            nn.utils.convert_conv2d_weight_memory_format(self.sr, torch.channels_last)
            self.norm = nn.LayerNorm(dim)
        self._packed = PackedSRAttention()

    def forward(self, x: Tensor, feat_size: tuple[int, int]) -> Tensor:
        layers = (self.q, self.kv, self.proj)
        reduction = (self.sr, self.norm) if self.sr_ratio > 1 else None
        if untouched(*layers, *(reduction or ())) and self._packed.suits(
            x, layers, reduction, self.num_heads, feat_size
        ):
            return self._packed(x, layers, reduction, self.num_heads, feat_size)
        y = x
        if reduction is not None:
            maps = x.unflatten(1, feat_size).permute(0, 3, 1, 2)
            y = self.norm(self.sr(maps).permute(0, 2, 3, 1).flatten(1, 2))
        out: Tensor = self.proj(
            ops.reduced_attention(self.q(x), self.kv(y), num_heads=self.num_heads)
        )
        return out
