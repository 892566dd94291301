"""The second module of HRPVT: a residual branch at twice a map's size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernelpose.nn.dilated_pyramid import DilatedPyramid
from kernelpose.nn.folding import Folder, Pair, can_fold
from kernelpose.nn.untouched import has_geometry, untouched


class HRPMv2(nn.Module):
    """Tokens (B, h * w, C) of a map -> what is added to them, of the same shape.

    A deconvolution to twice the size and half the channels, three dilated convolutions in a chain,
    their sum, and a convolution of stride 2 back, each with BatchNorm, all but the last with ReLU
    ("HRPVT", arXiv 2410.22079, HRPM v2; kernel 4 of the deconvolution, dilations, norms and
    activations are our choice). In eval mode the norms are folded into the convolutions.

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
        self._folder = Folder()

    def forward(self, x: Tensor, feat_size: tuple[int, int]) -> Tensor:
        maps = x.unflatten(1, feat_size).permute(0, 3, 1, 2)
        pairs: list[Pair] = [(self.up, self.up_norm), (self.down, self.down_norm)]
        if (
            all(untouched(*pair) for pair in pairs)
            and can_fold([norm for _, norm in pairs])
            and has_geometry(self.up, 4, stride=2, padding=1)
            and has_geometry(self.down, 3, stride=2, padding=1)
        ):
            (up, up_bias), (down, down_bias) = self._folder(pairs)
            large = F.conv_transpose2d(maps, up, up_bias, stride=2, padding=1)
            y = F.conv2d(self.pyramid(F.relu_(large)), down, down_bias, stride=2, padding=1)
        else:
            y = self.down_norm(self.down(self.pyramid(torch.relu(self.up_norm(self.up(maps))))))
        return y.permute(0, 2, 3, 1).flatten(1, 2)
