"""HEViTPose T, S, B: a pyramid with cascaded group attention ("HEViTPose", arXiv 2311.13615).

Published are the three stages at 1/4, 1/8 and 1/16, the order of a block, and for each variant
parameters and GMACs. Widths, depths, groups, reductions and the head's widths are a reconstruction:
those of a search on the six published figures, which they meet within 1.1 %, and not they alone.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kernelpose.models.decoders import build_decoder, heatmap_size
from kernelpose.models.pose_model import PoseModel
from kernelpose.models.pvtv2 import init_weights
from kernelpose.models.vitpose import is_pair
from kernelpose.models.zoo import register
from kernelpose.nn import CascadedGroupSRAttention, ConvNorm
from kernelpose.nn.depthwise_ffn import DepthwiseFFN
from kernelpose.nn.untouched import unhooked

SIZES: dict[str, dict[str, Any]] = {
    "hevitpose-t": {"embed_dims": (64, 128, 192), "depths": (1, 4, 4)},
    "hevitpose-s": {"embed_dims": (128, 192, 256), "depths": (1, 4, 4)},
    "hevitpose-b": {"embed_dims": (160, 256, 384), "depths": (1, 3, 4)},
}
NUM_HEADS = 2  # of a group, in all of them

STRIDES = (4, 8, 16)  # of the stages' maps
DECONV_CHANNELS = (128, 128)


class Block(nn.Module):
    """x += dwconv1(x); x += ffn1(x); x += attn(x); x += dwconv2(x); x += ffn2(x)."""

    def __init__(
        self, dim: int, num_groups: int, num_heads: int, sr_ratio: int, hidden: int
    ) -> None:
        super().__init__()
        self.dwconv1 = ConvNorm(dim, dim, 3, groups=dim)
        self.ffn1 = FFN(dim, hidden)
        self.attn = CascadedGroupSRAttention(dim, num_groups, num_heads, sr_ratio)
        self.dwconv2 = ConvNorm(dim, dim, 3, groups=dim)
        self.ffn2 = FFN(dim, hidden)
        self._fused = DepthwiseFFN(), DepthwiseFFN()

    def forward(self, x: Tensor) -> Tensor:
        x = _half(x, self.dwconv1, self.ffn1, self._fused[0])
        x = self.attn(x, residual=x)
        return _half(x, self.dwconv2, self.ffn2, self._fused[1])


class FFN(nn.Module):
    """x + fc2(fc1(x))."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = ConvNorm(dim, hidden, act=nn.ReLU())
        self.fc2 = ConvNorm(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.fc1(x), residual=x)
        return y


def _half(x: Tensor, dwconv: nn.Module, ffn: nn.Module, fused: DepthwiseFFN) -> Tensor:
    if type(ffn) is FFN and unhooked(ffn):
        layers = (dwconv, ffn.fc1, ffn.fc2)
        if fused.suits(x, layers):
            return fused(x, layers)
    y: Tensor = ffn(dwconv(x, residual=x))
    return y


class HEViT(nn.Module):
    """Images (B, 3, H, W) -> features (B, C, H / 16, W / 16), in channels_last memory throughout.

    A stage is an overlapping convolution (7x7 of stride 4, then 3x3 of stride 2) and its blocks.

    Args:
        embed_dims, depths, num_groups, num_heads, sr_ratios, ffn_ratio: see `HEViTPose`.

    Raises ValueError, with the argument's name, for a value out of its range.
    """

    def __init__(
        self,
        *,
        embed_dims: Sequence[int],
        depths: Sequence[int],
        num_groups: int,
        num_heads: int,
        sr_ratios: Sequence[int],
        ffn_ratio: float,
    ) -> None:
        super().__init__()
        for name, values in (
            ("embed_dims", embed_dims),
            ("depths", depths),
            ("sr_ratios", sr_ratios),
        ):
            if not isinstance(values, Sequence) or len(values) != 3 or min(values) < 1:
                raise ValueError(
                    f"{name} is {values!r}; expected three positive numbers, one a stage."
                )
        if not ffn_ratio > 0:
            raise ValueError(f"ffn_ratio is {ffn_ratio}; expected a positive number.")
        self.divisor = math.lcm(*(s * r for s, r in zip(STRIDES, sr_ratios, strict=True)))
        self.stages = nn.Sequential()
        width = 3
        for dim, depth, sr_ratio in zip(embed_dims, depths, sr_ratios, strict=True):
            first = not len(self.stages)
            embed = ConvNorm(width, dim, 7 if first else 3, stride=4 if first else 2)
            blocks = [
                Block(dim, num_groups, num_heads, sr_ratio, round(dim * ffn_ratio))
                for _ in range(depth)
            ]
            stage = OrderedDict(embed=embed, blocks=nn.Sequential(*blocks))
            self.stages.append(nn.Sequential(stage))
            width = dim
        self.apply(init_weights)

    def forward(self, images: Tensor) -> Tensor:
        if any(side % self.divisor for side in images.shape[2:]):
            raise ValueError(
                f"images has shape {tuple(images.shape)}; expected H and W multiples of "
                f"{self.divisor}."
            )
        # One copy of three channels, and no other.
        features: Tensor = self.stages(images.contiguous(memory_format=torch.channels_last))
        return features


class HEViTPose(PoseModel):
    """Images to one heatmap a keypoint by HEViT and deconvolutions.

    The names of the state_dict are ours, for nothing was released; the buffer input_size records
    (height, width), which no shape tells, and loading a state_dict leaves it.

    Args:
        embed_dims, depths: width and blocks of each of the three stages.
        num_groups: of each attention's channels.
        num_heads: of each group.
        sr_ratios: reduction of the keys' map in each stage.
        ffn_ratio: hidden width over width.
        num_keypoints: joints, 17 of COCO or 16 of MPII for instance, or {data set: joints} for one
            decoder each on the one encoder.
        image_size: (height, width), multiples of 32: of every stage's stride times its reduction.
            Others such run too.
        decoder: "classic", or "simple", see `kernelpose.models.decoders.build_decoder`.
        deconv_channels: of the classic decoder, (128, 128) by default.

    Raises ValueError, with the argument's name, for a value out of its range.
    """

    def __init__(
        self,
        *,
        embed_dims: Sequence[int],
        depths: Sequence[int],
        num_groups: int = 4,
        num_heads: int = NUM_HEADS,
        sr_ratios: Sequence[int] = (8, 4, 2),
        ffn_ratio: float = 2.0,
        num_keypoints: int | Mapping[str, int] = 17,
        image_size: tuple[int, int] = (256, 192),
        decoder: str = "classic",
        deconv_channels: Sequence[int] | None = None,
    ) -> None:
        backbone = HEViT(
            embed_dims=embed_dims,
            depths=depths,
            num_groups=num_groups,
            num_heads=num_heads,
            sr_ratios=sr_ratios,
            ffn_ratio=ffn_ratio,
        )
        divisor = backbone.divisor
        if not is_pair(image_size, divisor) or any(side % divisor for side in image_size):
            raise ValueError(
                f"image_size is {image_size}; expected (height, width), multiples of {divisor}."
            )
        if decoder == "classic" and deconv_channels is None:
            deconv_channels = DECONV_CHANNELS
        stride = STRIDES[-1]
        upsample = stride // STRIDES[0]
        super().__init__(
            backbone,
            head=partial(
                build_decoder,
                decoder,
                embed_dims[-1],
                upsample=upsample,
                deconv_channels=deconv_channels,
            ),
            num_keypoints=num_keypoints,
            image_size=image_size,
            heatmap_size=heatmap_size((image_size[0] // stride, image_size[1] // stride), upsample),
            least_side=divisor,
        )
        self.record_image_size()


@register(*SIZES)
def _build(name: str, **options: Any) -> HEViTPose:
    return HEViTPose(**{**SIZES[name], **options})
