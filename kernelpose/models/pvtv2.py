"""PVT v2 b0, b1, b2 ("PVT v2: Improved Baselines with Pyramid Vision Transformer", 2106.13797)."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kernelpose.models.vit import DropPath
from kernelpose.models.zoo import register
from kernelpose.nn import AddLayerNorm, HRPMv2, MixFFN, SRAttention
from kernelpose.nn.packed_conv import PackedConv

SIZES: dict[str, dict[str, Any]] = {
    "pvtv2-b0": {"embed_dims": (32, 64, 160, 256), "depths": (2, 2, 2, 2)},
    "pvtv2-b1": {"embed_dims": (64, 128, 320, 512), "depths": (2, 2, 2, 2)},
    "pvtv2-b2": {"embed_dims": (64, 128, 320, 512), "depths": (3, 4, 6, 3)},
}

STRIDE = 32  # of the last map
DROP_PATH = 0.1  # of the released configurations

# timm's (and the official code's): norms of blocks and stages 1e-6, the others PyTorch's 1e-5.
# mmpose has 1e-6 everywhere.
_EPS = 1e-6


class PatchEmbed(nn.Module):
    """Maps (B, C, H, W) -> tokens (B, h, w, dim): an overlapping convolution and a LayerNorm."""

    def __init__(self, in_channels: int, dim: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel, stride=stride, padding=kernel // 2)
        # As in SRAttention.
        nn.utils.convert_conv2d_weight_memory_format(self.proj, torch.channels_last)
        self.norm = nn.LayerNorm(dim)
        self._packed = PackedConv()

    def forward(self, x: Tensor) -> Tensor:
        y = self._packed(x, self.proj) if self._packed.suits(x, self.proj) else self.proj(x)
        tokens: Tensor = self.norm(y.permute(0, 2, 3, 1))
        return tokens


class Block(nn.Module):
    """x += attn(norm1(x)); x += mlp(norm2(x)); x += hrpm(x), if any.

    The last branch is handed on, for the next norm to add.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        sr_ratio: int,
        mlp_ratio: float,
        drop_path: float,
        hrpm: HRPMv2 | None,
    ) -> None:
        super().__init__()
        self.norm1 = AddLayerNorm(dim, eps=_EPS)
        self.attn = SRAttention(dim, num_heads, sr_ratio)
        self.drop_path = DropPath(drop_path)
        self.norm2 = AddLayerNorm(dim, eps=_EPS)
        self.mlp = MixFFN(dim, round(dim * mlp_ratio))
        self.hrpm = hrpm

    def forward(
        self, x: Tensor, branch: Tensor | None, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        x, y = self.norm1(x, branch)
        x, y = self.norm2(x, self.drop_path(self.attn(y, size)))
        branch = self.drop_path(self.mlp(y, size))
        if self.hrpm is not None:
            x = x + branch
            branch = self.hrpm(x, size)
        return x, branch


class Stage(nn.Module):
    """Tokens (B, h, w, dim), or with a downsampling maps (B, C, H, W) -> maps (B, dim, h, w).

    Args:
        in_channels: C; None for no downsampling.
        drop_paths: rate of each block.
        hrpm: after which blocks there is an `HRPMv2`.
    """

    def __init__(
        self,
        in_channels: int | None,
        dim: int,
        *,
        num_heads: int,
        sr_ratio: int,
        mlp_ratio: float,
        drop_paths: Sequence[float],
        hrpm: Collection[int],
    ) -> None:
        super().__init__()
        self.downsample = None if in_channels is None else PatchEmbed(in_channels, dim, 3, 2)
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, sr_ratio, mlp_ratio, rate, HRPMv2(dim) if layer in hrpm else None)
            for layer, rate in enumerate(drop_paths)
        )
        self.norm = AddLayerNorm(dim, eps=_EPS)

    def forward(self, x: Tensor) -> Tensor:
        if self.downsample is not None:
            x = self.downsample(x)
        size = (x.shape[1], x.shape[2])
        x = x.flatten(1, 2)
        branch = None
        for block in self.blocks:
            x, branch = block(x, branch, size)
        _, y = self.norm(x, branch)
        maps: Tensor = y.unflatten(1, size).permute(0, 3, 1, 2)
        return maps


class PVTv2(nn.Module):
    """Images (B, 3, H, W) -> features (B, C, ceil(H / 32), ceil(W / 32)), any H, W >= 32.

    Names of parameters are timm's. The residual stream is tokens, so that maps are in channels_last
    memory.

    Args:
        embed_dims, depths, num_heads, sr_ratios, mlp_ratios: width, blocks, heads, reduction of
            keys and hidden width over width of each stage.
        drop_path: rate of the last block; the first has 0, linear in between; in training alone.
        stem: images to tokens (B, ceil(H / 4), ceil(W / 4), embed_dims[0]), in place of a 7x7
            convolution of stride 4 with its LayerNorm.
        hrpm: for each stage, after which blocks there is a `kernelpose.nn.HRPMv2`; none by default.

    Raises ValueError, with the argument's name, for a value out of its range.
    """

    def __init__(
        self,
        *,
        embed_dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int] = (1, 2, 5, 8),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        drop_path: float = 0.0,
        stem: nn.Module | None = None,
        hrpm: Sequence[Collection[int]] = ((), (), (), ()),
    ) -> None:
        super().__init__()
        for name, values in (
            ("embed_dims", embed_dims),
            ("depths", depths),
            ("num_heads", num_heads),
            ("sr_ratios", sr_ratios),
            ("mlp_ratios", mlp_ratios),
        ):
            if not isinstance(values, Sequence) or len(values) != 4 or min(values) <= 0:
                raise ValueError(
                    f"{name} is {values!r}; expected four positive numbers, one a stage."
                )
        if not 0.0 <= drop_path < 1.0:
            raise ValueError(f"drop_path is {drop_path}; expected 0 <= drop_path < 1.")
        self.stem = stem
        self.patch_embed = PatchEmbed(3, embed_dims[0], 7, 4) if stem is None else None
        last = max(sum(depths) - 1, 1)
        rates = iter([drop_path * block / last for block in range(sum(depths))])
        self.stages = nn.ModuleList(
            Stage(
                embed_dims[stage - 1] if stage else None,
                embed_dims[stage],
                num_heads=num_heads[stage],
                sr_ratio=sr_ratios[stage],
                mlp_ratio=mlp_ratios[stage],
                drop_paths=[next(rates) for _ in range(depths[stage])],
                hrpm=hrpm[stage],
            )
            for stage in range(4)
        )
        self.apply(init_weights)

    def forward(self, images: Tensor) -> Tensor:
        return self.maps(images)[-1]

    def maps(self, images: Tensor) -> list[Tensor]:
        """The maps of the four stages, at 1/4, 1/8, 1/16 and 1/32 of the images."""
        x = images
        for embed in (self.stem, self.patch_embed):
            if embed is not None:
                x = embed(x)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


def init_weights(module: nn.Module) -> None:
    """Linears and convolutions as PVT v2 starts them; other modules keep PyTorch's start."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)


@register(*SIZES)
def _build(name: str, **options: Any) -> PVTv2:
    """A backbone alone, which has no keypoints and takes images of any size."""
    for option in ("num_keypoints", "image_size", "decoder"):
        if option in options:
            raise ValueError(
                f"{option} is {options[option]!r}; expected None for {name}, a backbone alone."
            )
    return PVTv2(**{**SIZES[name], "drop_path": DROP_PATH, **options})
