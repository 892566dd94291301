"""The first module of HRPVT: image to tokens at a quarter of its size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kernelpose.nn.dilated_pyramid import DilatedPyramid


class HRPMv1(nn.Module):
    """Images (B, 3, H, W) -> tokens (B, ceil(H / 4), ceil(W / 4), dim), as a patch embedding does.

    Six maps at half the image's size, each 16 wide and made of the one before, see
    `DilatedPyramid`; all of them through one convolution of stride 2, and a LayerNorm ("HRPVT",
    arXiv 2410.22079, HRPM v1; kernel sizes, norms and the order of dilations are our choice).

    Args:
        dim: channels of a token.
        in_channels: of the image.
        width: of each map.
        dilations: of each map's convolution.
    """

    def __init__(
        self,
        dim: int,
        *,
        in_channels: int = 3,
        width: int = 16,
        dilations: Sequence[int] = (1, 2, 5, 1, 2, 5),
    ) -> None:
        super().__init__()
        self.pyramid = DilatedPyramid(in_channels, width, dilations, stride=2)
        self.proj = nn.Conv2d(width * len(dilations), dim, 3, stride=2, padding=1)
        # As in SRAttention.
        nn.utils.convert_conv2d_weight_memory_format(self.proj, torch.channels_last)
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        # One copy of three channels, so that what the last convolution writes are tokens.
        images = images.contiguous(memory_format=torch.channels_last)
        tokens: Tensor = self.norm(self.proj(self.pyramid(images)).permute(0, 2, 3, 1))
        return tokens
