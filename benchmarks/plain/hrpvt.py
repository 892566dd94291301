"""HRPVT in plain PyTorch; see `benchmarks.plain`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Size = tuple[int, int]


def to_maps(x: Tensor, size: Size) -> Tensor:
    """Tokens (B, N, C) -> maps (B, C, h, w), a view in channels_last memory."""
    return x.transpose(1, 2).unflatten(2, size)


def to_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.heads, self.ratio = heads, ratio
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        if ratio > 1:
            self.sr = nn.Conv2d(dim, dim, ratio, stride=ratio)
            self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        y = self.norm(to_tokens(self.sr(to_maps(x, size)))) if self.ratio > 1 else x
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(y).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        out: Tensor = self.proj(attended)
        return out


class MixFFN(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        y: Tensor = self.fc2(F.gelu(to_tokens(self.dwconv(to_maps(self.fc1(x), size)))))
        return y


class Pyramid(nn.Module):
    """The maps of a chain of dilated convolutions."""

    def __init__(self, width: int, out: int, dilations: Sequence[int], stride: int = 1) -> None:
        super().__init__()
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for d in dilations:
            self.convs.append(nn.Conv2d(width, out, 3, stride, d, d, bias=False))
            self.norms.append(nn.BatchNorm2d(out))
            width, stride = out, 1

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)), inplace=True)
            maps.append(x)
        return maps


class HRPMv1(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pyramid = Pyramid(3, 16, (1, 2, 5, 1, 2, 5), stride=2)
        self.proj = nn.Conv2d(96, dim, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(torch.cat(self.pyramid(x), 1))
        return to_maps(self.norm(to_tokens(x)), (x.shape[2], x.shape[3]))


class HRPMv2(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        half = dim // 2
        self.up = nn.ConvTranspose2d(dim, half, 4, stride=2, padding=1, bias=False)
        self.up_norm = nn.BatchNorm2d(half)
        self.pyramid = Pyramid(half, half, (1, 2, 5))
        self.down = nn.Conv2d(half, dim, 3, stride=2, padding=1, bias=False)
        self.down_norm = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        y = F.relu(self.up_norm(self.up(to_maps(x, size))), inplace=True)
        a, b, c = self.pyramid(y)
        return to_tokens(self.down_norm(self.down(a + b + c)))


class PatchEmbed(nn.Module):
    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(width, dim, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        return to_maps(self.norm(to_tokens(x)), (x.shape[2], x.shape[3]))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, ratio: int, hidden: int, hrpm: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, ratio)
        self.mlp = MixFFN(dim, hidden)
        self.hrpm = HRPMv2(dim) if hrpm else None

    def forward(self, x: Tensor, size: Size) -> Tensor:
        x = x + self.attn(self.norm1(x), size)
        x = x + self.mlp(self.norm2(x), size)
        return x if self.hrpm is None else x + self.hrpm(x, size)


class Stage(nn.Module):
    def __init__(
        self, width: int | None, dim: int, depth: int, index: int, every_stage: bool
    ) -> None:
        super().__init__()
        self.downsample = None if width is None else PatchEmbed(width, dim)
        heads, ratio, expansion = (1, 2, 5, 8)[index], (8, 4, 2, 1)[index], (8, 8, 4, 4)[index]
        self.blocks = nn.ModuleList(
            Block(dim, heads, ratio, expansion * dim, i == depth - 1 if every_stage else index == 0)
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        if self.downsample is not None:
            x = self.downsample(x)
        size = (x.shape[2], x.shape[3])
        x = to_tokens(x)
        for block in self.blocks:
            x = block(x, size)
        return to_maps(self.norm(x), size)


class Backbone(nn.Module):
    def __init__(self, dims: Sequence[int], depths: Sequence[int], every_stage: bool) -> None:
        super().__init__()
        self.stem = HRPMv1(dims[0])
        sizes = zip((None, *dims[:-1]), dims, depths, strict=True)
        self.stages = nn.Sequential(*(Stage(*size, i, every_stage) for i, size in enumerate(sizes)))

    def forward(self, x: Tensor) -> Tensor:
        maps: Tensor = self.stages(self.stem(x))
        return maps


class SimCCHead(nn.Module):
    def __init__(self, width: int, image_size: Size, num_keypoints: int) -> None:
        super().__init__()
        height, breadth = image_size
        places = height // 32 * (breadth // 32)
        self.final_layer = nn.Conv2d(width, num_keypoints, 1)
        self.mlp_head_x = nn.Linear(places, 2 * breadth)
        self.mlp_head_y = nn.Linear(places, 2 * height)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.final_layer(x).flatten(2)
        return self.mlp_head_x(maps), self.mlp_head_y(maps)


class HRPVT(nn.Sequential):
    """Images (B, 3, H, W) -> SimCC logits.

    every_stage: HRPM v2 stands at the end of every stage, not after each block of the first one.
    """

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        image_size: Size,
        *,
        every_stage: bool,
    ) -> None:
        super().__init__()
        self.backbone = Backbone(dims, depths, every_stage)
        self.keypoint_head = SimCCHead(dims[-1], image_size, 17)
