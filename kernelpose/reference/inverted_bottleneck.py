"""Two 1x1 convolutions around a wider map, in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "silu": F.silu}


def inverted_bottleneck(
    x: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    depthwise: Tensor | None,
    depthwise_bias: Tensor | None,
    project: Tensor,
    project_bias: Tensor,
    stride: int = 1,
    residual: bool = False,
    activations: tuple[str, str] = ("none", "silu"),
) -> Tensor:
    """The op's definition, layer by layer; see `kernelpose.ops.inverted_bottleneck`."""
    first, second = (ACTIVATIONS[name] for name in activations)
    y = first(_pointwise(x, expand, expand_bias))
    if depthwise is not None:
        channels = depthwise.shape[0]
        y = second(F.conv2d(y, depthwise, depthwise_bias, stride, 1, groups=channels))
    y = _pointwise(y, project, project_bias)
    return x + y if residual else y


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    # A product of tokens: of one image on one thread, torch's convolution would copy them.
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
