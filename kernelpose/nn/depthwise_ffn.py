"""Half a block of HEViTPose, a depthwise convolution and a feed-forward network, as one call."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from kernelpose import _native
from kernelpose.nn.conv_norm import ConvNorm
from kernelpose.nn.folding import Folder, can_fold, fold
from kernelpose.nn.inference import core_infers
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
        if not all(type(layer) is ConvNorm for layer in layers):
            return False
        depthwise, expand, project = cast("tuple[ConvNorm, ConvNorm, ConvNorm]", layers)
        if not (
            depthwise.is_untouched() and expand.is_untouched(nn.ReLU) and project.is_untouched()
        ):
            return False
        pairs = depthwise.pair, expand.pair, project.pair
        weights = [conv.weight for conv, _ in pairs]
        channels, hidden = project.conv.out_channels, project.conv.in_channels
        return (
            core_infers(x, *weights)
            and can_fold([norm for _, norm in pairs])
            and [weight.shape for weight in weights]
            == [(channels, 1, 3, 3), (hidden, channels, 1, 1), (channels, hidden, 1, 1)]
            and has_geometry(pairs[0][0], 3, padding=1)
            and all(has_geometry(conv, 1) for conv, _ in pairs[1:])
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
    assert _native.core is not None
    panel = _native.core.cpu_depthwise_ffn_panel()
    parts = [depthwise[0].flatten(1).t(), depthwise[1]]
    for weight, bias in pointwise:
        parts += [weight.view(-1, panel, weight.shape[1]).transpose(1, 2), bias]
    return (torch.cat([part.flatten() for part in parts]),)
