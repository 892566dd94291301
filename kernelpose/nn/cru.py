"""The channel reconstruction unit of SCConv as a drop-in module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernelpose import ops


class CRU(nn.Module):
    """Channel reconstruction unit: (B, C, H, W) -> (B, C, H, W).

    The first alpha of the channels is squeezed and goes through a grouped and a pointwise
    convolution; the rest is squeezed and goes through a pointwise one beside itself. Their channels
    are weighted by `kernelpose.ops.channel_fuse` and added. Constructor and parameters are those of
    the released MiTPOSE code.

    Args:
        op_channel: C.
        alpha: share of the first part, between 0 and 1.
        squeeze_radio: by which the channels of each part are divided.
        group_size: groups of the grouped convolution.
        group_kernel_size: its kernel, odd.
        softmax: "joint" over the channels of both results, as released, or "pairwise", between the
            two of each channel, as in SCConv (CVPR 2023).

    Raises:
        ValueError: the channels cannot be divided so.
    """

    def __init__(
        self,
        op_channel: int,
        alpha: float = 1 / 2,
        squeeze_radio: int = 2,
        group_size: int = 2,
        group_kernel_size: int = 3,
        *,
        softmax: str = "joint",
    ) -> None:
        super().__init__()
        self.up_channel = up = int(alpha * op_channel)
        self.low_channel = low = op_channel - up
        if min(up, low) < squeeze_radio:
            raise ValueError(
                f"alpha is {alpha}; expected two parts of the {op_channel} channels that can be "
                f"divided by squeeze_radio, which is {squeeze_radio}."
            )
        up, low = up // squeeze_radio, low // squeeze_radio
        if group_kernel_size % 2 == 0:
            raise ValueError(f"group_kernel_size is {group_kernel_size}; expected an odd number.")
        self.softmax = softmax
        self.squeeze1 = nn.Conv2d(self.up_channel, up, 1, bias=False)
        self.squeeze2 = nn.Conv2d(self.low_channel, low, 1, bias=False)
        self.GWC = nn.Conv2d(
            up, op_channel, group_kernel_size, padding=group_kernel_size // 2, groups=group_size
        )
        # Else oneDNN arranges this weight anew in every call: 1.6 times the time at batch 1.
        nn.utils.convert_conv2d_weight_memory_format(self.GWC, torch.channels_last)
        self.PWC1 = nn.Conv2d(up, op_channel, 1, bias=False)
        self.PWC2 = nn.Conv2d(low, op_channel - low, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        up, low = torch.split(x, [self.up_channel, self.low_channel], 1)
        up, low = self.squeeze1(up), self.squeeze2(low)
        first = self.GWC(up) + self.PWC1(up)
        second = torch.cat([self.PWC2(low), low], 1)
        return ops.channel_fuse(first, second, softmax=self.softmax)
