"""Half a block of HEViTPose, a depthwise convolution and a feed-forward network, as one call."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from kernelpose import _native
from kernelpose.nn.conv_norm import ConvNorm
from kernelpose.nn.folding import Folder, can_fold, fold
from kernelpose.nn.inference import core_infers
from kernelpose.nn.panels import product_panels
from kernelpose.nn.untouched import has_geometry

_MULTIPLE = 32  # what channels and hidden width are divided by, on any CPU


class DepthwiseFFN:
    """y = x + BN(depthwise(x)); y + BN(project(relu(BN(expand(y))))) of maps (B, C, H, W).

    For inference: in float32 on a CPU, where neither a gradient nor a graph is wanted and no
    backend is named. The depthwise convolution is 3x3 of stride 1, the others 1x1. Nothing between
    x and the result is written to memory. The norms are folded, and the weights, arranged as the
    core reads them, are kept until a tensor changes.
    """

    def __init__(self) -> None:
        self._folder = Folder(_pack)

    def suits(self, x: Tensor, layers: tuple[nn.Module, nn.Module, nn.Module]) -> bool:
        """Whether that is so; layers: the three convolutions with their norms, `ConvNorm`s.

        Not where one of them, or what it holds, is not `untouched`.
        """
        depthwise, expand, project = layers
        if not (
            type(depthwise) is type(expand) is type(project) is ConvNorm
            and depthwise.is_untouched()
            and expand.is_untouched(nn.ReLU)
            and project.is_untouched()
        ):
            return False
        (first, norm), (second, second_norm), (third, third_norm) = (
            depthwise.pair,
            expand.pair,
            project.pair,
        )
        weight = third.weight
        channels, hidden = weight.shape[:2]
        return (
            core_infers(x, first.weight, second.weight, weight)
            and can_fold((norm, second_norm, third_norm))
            and has_geometry(first, 3, padding=1)
            and has_geometry(second, 1)
            and has_geometry(third, 1)
            and first.weight.shape[:2] == (channels, 1)
            and second.weight.shape[:2] == (hidden, channels)
            and channels % _MULTIPLE == hidden % _MULTIPLE == 0
            and x.ndim == 4
            and x.shape[1] == channels
        )

    def __call__(self, x: Tensor, layers: tuple[nn.Module, nn.Module, nn.Module]) -> Tensor:
        pairs = [cast("ConvNorm", layer).pair for layer in layers]
        ((packed,),) = self._folder([[layer for pair in pairs for layer in pair]])
        x = x.permute(0, 2, 3, 1).contiguous()
        out = x.new_empty(x.shape)
        if out.numel():
            addresses = [t.data_ptr() for t in (x, packed, out)]
            sizes = (*x.shape, pairs[1][0].out_channels)
            _native.call("depthwise_ffn", x, *addresses, sizes)
        return out.permute(0, 3, 1, 2)


def _pack(*layers: Any) -> tuple[Tensor]:
    """What the core reads, from the three convolutions and their norms in turns."""
    depthwise, *pointwise = (fold(*pair) for pair in zip(layers[::2], layers[1::2], strict=True))
    parts = [depthwise[0].flatten(1).t(), depthwise[1]]
    for weight, bias in pointwise:
        parts += [product_panels(weight.flatten(1)), bias]
    return (torch.cat([part.flatten() for part in parts]),)
