"""A chain of dilated convolutions, whose every map counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from kernelpose import ops
from kernelpose.nn.folded_conv import FoldedConv
from kernelpose.nn.folding import Folder, can_fold
from kernelpose.nn.inference import core_infers
from kernelpose.nn.untouched import has_geometry, untouched
from kernelpose.ops.dilated_pyramid import CPU_CHANNELS


class DilatedPyramid(nn.Module):
    """x (B, C, H, W) -> the maps f_1, f_2, ... with f_i = ReLU(BN(conv 3x3 of f_(i-1))), f_0 = x.

    Concatenated (B, n * width, h, w), or added up (B, width, h, w). Dilations that share no divisor
    (1, 2, 5) leave no hole in what a map has seen ("Understanding Convolution for Semantic
    Segmentation"). In eval mode the norms are folded into the convolutions and
    `kernelpose.ops.dilated_pyramid` runs; live norms, and layers that are not `untouched`, take the
    modules one by one, and so do many channels on a CPU without a gradient (`FoldedConv`).

    Args:
        in_channels: C.
        width: of each map.
        dilations: of each convolution; the padding is as large.
        stride: of the first convolution, 1 or 2.
        mode: "concat" or "sum".
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        dilations: Sequence[int],
        *,
        stride: int = 1,
        mode: str = "concat",
    ) -> None:
        super().__init__()
        self.dilations = tuple(dilations)
        self.stride = stride
        self.mode = mode
        self.convs = nn.ModuleList(
            nn.Conv2d(
                width if i else in_channels,
                width,
                3,
                stride=1 if i else stride,
                padding=dilation,
                dilation=dilation,
                bias=False,
            )
            for i, dilation in enumerate(self.dilations)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in self.dilations)
        self._folder = Folder()
        self._convolve = [FoldedConv() for _ in self.dilations]

    def pairs(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        """The convolutions, each with its norm."""
        return cast("Any", list(zip(self.convs, self.norms, strict=True)))

    def forward(self, x: Tensor) -> Tensor:
        pairs = self.pairs()
        if self._is_one_op(x):
            folded = self._folder(pairs)
            return ops.dilated_pyramid(
                x,
                [weight for weight, _ in folded],
                [bias for _, bias in folded],
                dilations=self.dilations,
                stride=self.stride,
                mode=self.mode,
            )
        maps = []
        for convolve, pair in zip(self._convolve, pairs, strict=True):
            x = torch.relu(convolve(x, *pair))
            maps.append(x)
        return torch.cat(maps, 1) if self.mode == "concat" else sum(maps[1:], maps[0])

    def _is_one_op(self, x: Tensor) -> bool:
        if x.shape[1] >= CPU_CHANNELS and core_infers(x):
            return False  # which the core has faster one by one
        return (
            untouched(*self.convs, *self.norms)
            and can_fold([norm for _, norm in self.pairs()])
            and all(
                has_geometry(
                    conv, 3, stride=1 if i else self.stride, padding=dilation, dilation=dilation
                )
                for i, (conv, dilation) in enumerate(zip(self.convs, self.dilations, strict=True))
            )
        )
