"""HEViTPose in plain PyTorch; see `benchmarks.plain`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.plain.layers import ConvNorm, Decoder


class Group(nn.Module):
    """Tokens (B, H, W, d) -> what they find in a map reduced by `ratio`."""

    def __init__(self, dim: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.heads = heads
        self.sr = nn.Conv2d(dim, dim, ratio, stride=ratio, groups=dim)
        self.norm_q, self.q = nn.LayerNorm(dim), nn.Linear(dim, dim)
        self.norm_k, self.k = nn.LayerNorm(dim), nn.Linear(dim, dim)
        self.norm_v, self.v = nn.LayerNorm(dim), nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        reduced = self.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        q = self._heads(self.q(self.norm_q(x)))
        k = self._heads(self.k(self.norm_k(reduced)))
        v = self._heads(self.v(self.norm_v(reduced)))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        found: Tensor = self.norm(self.proj(y))
        return found

    def _heads(self, x: Tensor) -> Tensor:
        return x.flatten(1, 2).unflatten(2, (self.heads, -1)).transpose(1, 2)


class Attention(nn.Module):
    """Each group of channels sees its own and what the group before it found."""

    def __init__(self, dim: int, groups: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.groups = nn.ModuleList(Group(dim // groups, heads, ratio) for _ in range(groups))
        self.proj = ConvNorm(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        found: list[Tensor] = []
        parts = x.permute(0, 2, 3, 1).chunk(len(self.groups), -1)
        for group, part in zip(self.groups, parts, strict=True):
            found.append(group(part + found[-1] if found else part))
        y: Tensor = self.proj(torch.cat(found, -1).permute(0, 3, 1, 2))
        return y


class FFN(nn.Sequential):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = ConvNorm(dim, hidden, act=nn.ReLU(inplace=True))
        self.fc2 = ConvNorm(hidden, dim)


class Block(nn.Module):
    def __init__(self, dim: int, groups: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.dwconv1 = ConvNorm(dim, dim, 3, groups=dim)
        self.ffn1 = FFN(dim, 2 * dim)
        self.attn = Attention(dim, groups, heads, ratio)
        self.dwconv2 = ConvNorm(dim, dim, 3, groups=dim)
        self.ffn2 = FFN(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = x + layer(x)
        return x


class Backbone(nn.Module):
    def __init__(self, dims: Sequence[int], depths: Sequence[int], ratios: Sequence[int]) -> None:
        super().__init__()
        self.stages = nn.Sequential()
        width = 3
        for dim, depth, ratio in zip(dims, depths, ratios, strict=True):
            embed = (
                ConvNorm(3, dim, 7, stride=4) if width == 3 else ConvNorm(width, dim, 3, stride=2)
            )
            blocks = nn.Sequential(*(Block(dim, 4, 2, ratio) for _ in range(depth)))
            self.stages.append(nn.Sequential(OrderedDict(embed=embed, blocks=blocks)))
            width = dim

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.stages(x)
        return features


class HEViTPose(nn.Sequential):
    """Images (B, 3, H, W) -> heatmaps (B, 17, H / 4, W / 4)."""

    def __init__(self, dims: Sequence[int], depths: Sequence[int]) -> None:
        super().__init__()
        self.backbone = Backbone(dims, depths, (8, 4, 2))
        self.keypoint_head = Decoder(dims[-1], (128, 128), 17)
