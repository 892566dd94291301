"""A 3x3 convolution in groups, with a dense 1x1 convolution of the same maps added to it.

By Winograd's F(2x2, 3x3) ("Fast Algorithms for Convolutional Neural Networks", Lavin and Gray,
2016): 2x2 results of 4x4 numbers, by 16 products over the channels in place of 36. Only the four
inner ones see the middle tap of a kernel, which is all that a 1x1 convolution has. In float32 on a
CPU, without a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernelpose import _native

TILES = 12  # of 2x2 results, that the core computes together
_MULTIPLE = 32  # what inputs and outputs of a group are divided by, on any CPU


def suits(x: Tensor, weight: Tensor, groups: int) -> bool:
    """Whether `convolve` is for maps of the size of x (B, C, H, W) and such a grouped weight."""
    if x.dim() != 4:
        return False
    batch, _, height, width = x.shape
    outputs, inputs, *kernel = weight.shape
    tiles = ((height + 1) // 2) * ((width + 1) // 2)
    return (
        x.is_cpu
        and x.dtype == weight.dtype == torch.float32
        and kernel == [3, 3]
        and inputs % _MULTIPLE == 0
        and outputs // groups % _MULTIPLE == 0
        and batch > 0
        and tiles >= TILES
        and 3 * tiles <= height * width
    )


def pack(weight: Tensor, bias: Tensor, groups: int, pointwise: Tensor) -> Tensor:
    """What `convolve` reads: weight (outputs, inputs / groups, 3, 3), bias (outputs,) and the 1x1
    convolution's pointwise (outputs, inputs, 1, 1), transformed."""
    assert _native.core is not None
    block = _native.core.cpu_winograd_conv_outputs()
    outputs, own = weight.shape[:2]
    inputs, blocks = groups * own, outputs // block
    dense = weight.new_zeros(groups, outputs // groups, groups, own, 3, 3, dtype=torch.float64)
    each = torch.arange(groups)
    dense[each, :, each] = weight.double().view(groups, -1, own, 3, 3)
    dense = dense.view(outputs, inputs, 3, 3)
    dense[:, :, 1, 1] += pointwise[:, :, 0, 0]
    transform = dense.new_tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
    places = torch.einsum("iy,ocyx,jx->ijco", transform, dense, transform)
    rows = [bias.double().view(blocks, 1, block)]
    for i in range(4):
        for j in range(4):
            place = places[i, j]
            if i in (1, 2) and j in (1, 2):
                place = place.view(inputs, blocks, block).transpose(0, 1)
            else:  # nothing passes from group to group
                place = place.view(groups, own, groups, -1, block)[each, :, each].transpose(1, 2)
                place = place.reshape(blocks, own, block)
            rows.append(place)
    return torch.cat(rows, 1).to(weight.dtype)


def convolve(x: Tensor, packed: Tensor, groups: int) -> Tensor:
    """Contiguous x (B, H, W, inputs) -> (B, H, W, outputs)."""
    batch, height, width, inputs = x.shape
    outputs = packed.shape[0] * packed.shape[2]
    out = x.new_empty(batch, height, width, outputs)
    addresses = [_native.address(t) for t in (x, packed, out)]
    _native.call("winograd_conv", x, *addresses, (batch, inputs, outputs, height, width, groups))
    return out
