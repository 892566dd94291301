"""MobileViTPose in plain PyTorch; see `benchmarks.plain`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.plain.layers import ConvNorm, Decoder

conv_norm = partial(ConvNorm, norm_name="norm_layer")


class InvertedResidual(nn.Module):
    def __init__(self, width: int, out: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = expansion * width
        self.residual = stride == 1 and width == out
        self.conv = nn.Sequential(
            conv_norm(width, hidden),
            conv_norm(hidden, hidden, 3, stride=stride, groups=hidden, act=nn.SiLU(inplace=True)),
            nn.Conv2d(hidden, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.residual else y


class Attention(nn.Module):
    """One head of 32 channels, its scores scaled by the tokens' width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = dim**-0.5
        self.to_qvk = nn.Linear(dim, 3 * 32, bias=False)  # queries, keys, values all the same
        self.w_out = nn.Linear(32, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qvk(x)[:, None].chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        out: Tensor = self.w_out(y[:, 0])
        return out


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(dim, hidden),
            nn.SiLU(inplace=True),
            nn.Dropout(0.1),
            nn.Linear(hidden, dim),
            nn.Dropout(0.1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y


class PreNorm(nn.Module):
    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.fn(self.norm(x))
        return y


class Transformer(nn.Module):
    def __init__(self, dim: int, layers: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(
                nn.Sequential(PreNorm(dim, Attention(dim)), PreNorm(dim, FeedForward(dim, hidden)))
                for _ in range(layers)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


class MobileViTBlock(nn.Module):
    """Convolutions around a transformer of the tokens at the same place of each 2x2 patch."""

    def __init__(self, width: int, out: int, dim: int, layers: int, hidden: int) -> None:
        super().__init__()
        self.local_representation = nn.Sequential(
            conv_norm(width, width, 3, act=nn.SiLU(inplace=True)),
            conv_norm(width, dim, act=nn.SiLU(inplace=True)),
        )
        self.transformer = Transformer(dim, layers, hidden)
        self.fusion_block1 = nn.Conv2d(dim, width, 1)
        self.fusion_block2 = nn.Conv2d(2 * width, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.local_representation(x)
        b, c, h, w = y.shape
        # Unfolding and folding, one copy each.
        y = y.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 2, 4, 1)
        y = self.transformer(y.reshape(4 * b, h * w // 4, c))
        y = y.reshape(b, 2, 2, h // 2, w // 2, c).permute(0, 5, 3, 1, 4, 2).reshape(b, c, h, w)
        fused: Tensor = self.fusion_block2(torch.cat([x, self.fusion_block1(y)], 1))
        return fused


class Backbone(nn.Sequential):
    def __init__(
        self, c: Sequence[int], dims: Sequence[int], layers: Sequence[int], expansion: int
    ) -> None:
        super().__init__()
        residual = partial(InvertedResidual, expansion=expansion)
        self.stem = nn.Sequential(nn.Conv2d(3, c[0], 3, 2, 1), residual(c[0], c[1], 1))
        self.stage1 = nn.Sequential(
            residual(c[1], c[2], 2), residual(c[2], c[2], 1), residual(c[2], c[3], 1)
        )
        for number, dim, depth in zip((2, 3, 4), dims, layers, strict=True):
            i = 2 * number
            hidden = dim * (2 if number == 2 else 4)
            stage = nn.Sequential(
                residual(c[i - 1], c[i], 2), MobileViTBlock(c[i], c[i + 1], dim, depth, hidden)
            )
            if number == 4:
                stage.append(nn.Conv2d(c[9], c[10], 1))
            self.add_module(f"stage{number}", stage)


class MobileViTPose(nn.Sequential):
    """Images (B, 3, H, W) -> heatmaps (B, 17, H / 4, W / 4)."""

    def __init__(
        self,
        features: Sequence[int],
        dims: Sequence[int],
        layers: Sequence[int],
        expansion: int,
    ) -> None:
        super().__init__()
        self.backbone = Backbone(features, dims, layers, expansion)
        self.keypoint_head = Decoder(features[-1], (256, 256, 256), 17)
