"""A convolution and the norm of its result as one convolution, in the quickest way there is."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from kernelpose.nn.folding import Folder, can_fold
from kernelpose.nn.packed_conv import PackedConv
from kernelpose.nn.untouched import has_geometry, untouched
from kernelpose.nn.winograd import WinogradConv


class FoldedConv:
    """norm(conv(x)): maps (B, C, H, W) -> (B, outputs, h, w), for conv without a bias.

    One convolution where norm uses the statistics it keeps, a `WinogradConv` or a `PackedConv`
    where those are for x; layers that are not `untouched` are called.
    """

    def __init__(self) -> None:
        self._folder = Folder()
        self._winograd = WinogradConv()
        self._packed = PackedConv()

    def __call__(self, x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
        if self._winograd.suits(x, conv, norm):
            y = self._winograd(x, conv, norm)
        elif self._packed.suits(x, conv, norm) and conv.groups == 1:
            y = self._packed(x, conv, norm)
        elif not untouched(conv, norm):
            y = norm(conv(x))
        elif can_fold([norm]):
            ((weight, bias),) = self._folder([(conv, norm)])
            y = _convolve(x, conv, weight, bias)
        else:
            y = norm(_convolve(x, conv, conv.weight, conv.bias))
        return y


def is_pointwise(conv: nn.Conv2d) -> bool:
    """Whether a convolution is a linear of every place."""
    return conv.groups == 1 and has_geometry(conv, 1)


def _convolve(x: Tensor, conv: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> Tensor:
    if is_pointwise(conv):
        # A product of tokens: of one image on one thread, torch's convolution would copy them.
        return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
