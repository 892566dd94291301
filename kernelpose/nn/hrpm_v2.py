"""The second module of HRPVT: a residual branch at twice a map's size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernelpose.nn.deconvolution import DeconvNormRelu
from kernelpose.nn.dilated_pyramid import DilatedPyramid
from kernelpose.nn.folded_conv import FoldedConv
from kernelpose.nn.folding import Folder, can_fold
from kernelpose.nn.untouched import has_geometry, untouched


class HRPMv2(nn.Module):
    """Tokens (B, h * w, C) of a map -> what is added to them, of the same shape.

    A deconvolution to twice the size and half the channels, three dilated convolutions in a chain,
    their sum, and a convolution of stride 2 back, each with BatchNorm, all but the last with ReLU
    ("HRPVT", arXiv 2410.22079, HRPM v2; kernel 4 of the deconvolution, dilations, norms and
    activations are our choice). In eval mode the norms are folded into the convolutions; in float32
    on a CPU, without a gradient, the deconvolution takes fewer products, too (`DeconvNormRelu`).

    Args:
        dim: C, even.
        dilations: of the three convolutions.

    forward: x (B, N, C) and feat_size (h, w) of its map, N = h * w.

    Raises:
        ValueError: dim is odd.
    """

    def __init__(self, dim: int, *, dilations: Sequence[int] = (1, 2, 5)) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"dim is {dim}; expected an even number.")
        self.up = nn.ConvTranspose2d(dim, dim // 2, 4, stride=2, padding=1, bias=False)
        self.up_norm = nn.BatchNorm2d(dim // 2)
        self.pyramid = DilatedPyramid(dim // 2, dim // 2, dilations, mode="sum")
        self.down = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, bias=False)
        self.down_norm = nn.BatchNorm2d(dim)
        self._fused_up, self._up_folder = DeconvNormRelu(), Folder()
        self._folded_down = FoldedConv()

    def forward(self, x: Tensor, feat_size: tuple[int, int]) -> Tensor:
        maps = x.unflatten(1, feat_size).permute(0, 3, 1, 2)
        maps = self.pyramid(self._enlarged(maps))
        maps = self._folded_down(maps, self.down, self.down_norm)
        return maps.permute(0, 2, 3, 1).flatten(1, 2)

    def _enlarged(self, maps: Tensor) -> Tensor:
        up, norm = self.up, self.up_norm
        if self._fused_up.suits(maps, up, norm):
            return self._fused_up(maps, up, norm)
        if untouched(up, norm) and can_fold([norm]) and has_geometry(up, 4, stride=2, padding=1):
            ((weight, bias),) = self._up_folder([(up, norm)])
            return F.relu_(F.conv_transpose2d(maps, weight, bias, stride=2, padding=1))
        return torch.relu(norm(up(maps)))
