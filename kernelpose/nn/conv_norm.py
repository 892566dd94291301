"""A convolution and the BatchNorm of its result."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernelpose.nn.folding import Folder, can_fold


class ConvNorm(nn.Module):
    """BN(conv(x)), with ReLU on request: (B, C, H, W) -> (B, out_channels, H / stride, W / stride).

    The convolution has no bias and pads with half its kernel. In eval mode the norm is folded into
    it. Maps in channels_last memory stay so.

    Args:
        in_channels: C.
        out_channels: of the result.
        kernel_size: odd.
        stride: of the convolution.
        groups: of the convolution, as nn.Conv2d has them; C for a depthwise one.
        relu: whether a ReLU follows.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        *,
        stride: int = 1,
        groups: int = 1,
        relu: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=kernel_size // 2,
            groups=groups,
            bias=False,
        )
        # As in SRAttention.
        nn.utils.convert_conv2d_weight_memory_format(self.conv, torch.channels_last)
        self.norm = nn.BatchNorm2d(out_channels)
        self.relu = relu
        self._folder = Folder()

    def forward(self, x: Tensor) -> Tensor:
        if can_fold([self.norm]):
            ((weight, bias),) = self._folder([(self.conv, self.norm)])
            y = self._convolve(x, weight, bias)
        else:
            y = self.norm(self._convolve(x, self.conv.weight, None))
        return F.relu(y) if self.relu else y

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        conv = self.conv
        if conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.groups == 1:
            # A product of tokens: of one image on one thread, torch's convolution would copy them.
            return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
        return F.conv2d(x, weight, bias, conv.stride, conv.padding, groups=conv.groups)
