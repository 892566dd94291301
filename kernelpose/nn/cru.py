"""The channel reconstruction unit of SCConv as a drop-in module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernelpose import ops
from kernelpose.nn.folding import Folder, bias_of
from kernelpose.nn.inference import core_infers
from kernelpose.nn.untouched import has_geometry, untouched
from kernelpose.ops import _winograd


class CRU(nn.Module):
    """Channel reconstruction unit: (B, C, H, W) -> (B, C, H, W).

    The first alpha of the channels is squeezed and goes through a grouped and a pointwise
    convolution; the rest is squeezed and goes through a pointwise one beside itself. Their channels
    are weighted by `kernelpose.ops.channel_fuse` and added. Constructor and parameters are those of
    the released MiTPOSE code. In eval mode, where no gradient is wanted, nothing traces and no
    backend is named, fewer products compute the same on a CPU in float32, of weights that are
    transformed anew when they have changed, which their `.data` does unseen.

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
        self._folder = Folder(_packed)

    def forward(self, x: Tensor) -> Tensor:
        if self._by_winograd(x):
            first, second = self._inferred(x)
        else:
            up, low = torch.split(x, [self.up_channel, self.low_channel], 1)
            up, low = self.squeeze1(up), self.squeeze2(low)
            first = self.GWC(up) + self.PWC1(up)
            second = torch.cat([self.PWC2(low), low], 1)
        return ops.channel_fuse(first, second, softmax=self.softmax)

    def _by_winograd(self, x: Tensor) -> bool:
        grouped, pointwise = self.GWC, (self.squeeze1, self.squeeze2, self.PWC1, self.PWC2)
        return (
            not self.training
            and untouched(grouped, *pointwise)
            and has_geometry(grouped, 3, padding=1)
            and all(has_geometry(layer, 1) for layer in pointwise)
            and core_infers(x, grouped.weight, grouped.bias, *(p.weight for p in pointwise))
            and _winograd.suits(x, grouped.weight, grouped.groups)
        )

    def _inferred(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two maps that `forward` fuses, of fewer products and copies, in channels_last memory:
        GWC and PWC1 by Winograd's way, the other convolutions as products of matrices that are
        parts of others."""
        batch, channels, height, width = x.shape
        tokens = x.permute(0, 2, 3, 1).reshape(-1, channels)
        squeeze1, squeeze2, expand = (
            layer.weight.flatten(1).t() for layer in (self.squeeze1, self.squeeze2, self.PWC2)
        )
        up = torch.mm(tokens[:, : self.up_channel], squeeze1).view(batch, height, width, -1)
        ((packed,),) = self._folder([(self.GWC, self.PWC1)])
        first = _winograd.convolve(up, packed, self.GWC.groups)
        second = torch.empty_like(first)
        wide, low = second.view(-1, channels).split_with_sizes(list(expand.shape[::-1]), 1)
        torch.mm(tokens[:, self.up_channel :], squeeze2, out=low)
        torch.mm(low, expand, out=wide)
        return first.permute(0, 3, 1, 2), second.permute(0, 3, 1, 2)


def _packed(grouped: nn.Conv2d, pointwise: nn.Conv2d) -> tuple[Tensor, ...]:
    packed = _winograd.pack(grouped.weight, bias_of(grouped), grouped.groups, pointwise.weight)
    return (packed,)
