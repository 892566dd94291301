"""Parameters and multiply-accumulates of a model, in the three conventions that papers use.

Published figures do not share a convention: ViTPose's 17.1 G (B) is `all` of the encoder alone,
its 59.8 G (L) and 122.8 G (H) are `layers` with the decoder, and figures printed by MMCV's counter
are `hooked`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
from torch import nn

from kernelpose.backend import backend
from kernelpose.models.mobilevit import InvertedResidual
from kernelpose.nn import (
    GRN,
    SRU,
    CascadedGroupSRAttention,
    ConvNorm,
    DilatedPyramid,
    HRPMv2,
    LocalPerception,
    MixFFN,
    SRAttention,
    WindowAttention,
)
from kernelpose.nn.mobilevit_block import PATCH, StridedAttention


@dataclass(frozen=True)
class Count:
    """What one forward pass of one image costs; a multiply-accumulate counts 1.

    Attributes:
        parameters: number of parameters.
        layers: products inside convolutions, transposed convolutions and linears.
        hooked: `layers`, 1 a bias add, 2 an element of a normalisation, 1 an element of a ReLU:
            what a counter that hooks modules sees. It cannot see the products of attention.
        all: `layers` and the products QK^T and AV of attention.
    """

    parameters: int
    layers: int
    hooked: int
    all: int


def count(model: nn.Module, image_size: tuple[int, int] = (256, 192), **inputs: Any) -> Count:
    """Counts by running the model once on zeros (1, 3, height, width), on the model's device.

    Build the model under `torch.device("meta")` to count it without memory or arithmetic.

    Args:
        model: takes images.
        image_size: (height, width).
        inputs: keyword arguments of the model's forward.
    """
    layers = extra = attention = 0

    def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        nonlocal layers, extra, attention
        macs, beside = _layer_cost(module, arguments[0], output)
        fused = fused_cost(module, *arguments)
        layers += macs + fused.layers
        extra += beside + fused.beside
        attention += fused.attention

    handles = [module.register_forward_hook(hook) for module in model.modules()]
    weight = next(model.parameters())
    training = model.training
    try:
        model.eval()
        # Eager layers are modules that the hook sees.
        with torch.no_grad(), backend("eager"):
            model(
                torch.zeros(1, 3, *image_size, device=weight.device, dtype=weight.dtype), **inputs
            )
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Count(parameters, layers, layers + extra, layers + attention)


def _layer_cost(module: nn.Module, x: torch.Tensor, y: Any) -> tuple[int, int]:
    """Products of a layer, and what the hooked convention adds to them."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        # A convolution applies its kernel at each output position, a transposed one at each input.
        positions = x if isinstance(module, nn.ConvTranspose2d) else y
        channels = -1 if isinstance(module, nn.Linear) else 1
        places = positions.numel() // positions.shape[channels]
        bias = y.numel() if module.bias is not None else 0
        return places * module.weight.numel(), bias
    if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)):
        return 0, 2 * x.numel()
    if isinstance(module, nn.ReLU):
        return 0, y.numel()
    return 0, 0


@dataclass(frozen=True)
class Fused:
    """What a module does without calling modules of its own; see `Count` for what each counts.

    beside: what `hooked` adds to `layers`.
    """

    layers: int = 0
    beside: int = 0
    attention: int = 0


@singledispatch
def fused_cost(module: object, *arguments: Any) -> Fused:
    """Of one forward of a module with these arguments; modules around fused ops register theirs."""
    return Fused()


@fused_cost.register
def _(module: WindowAttention, x: torch.Tensor) -> Fused:
    rows, columns, dim = x.shape[1:]
    window = module.window or (rows, columns)
    inside = window[0] * window[1]
    windows = -(-rows // window[0]) * -(-columns // window[1])
    # A token of the grid partition meets the tokens at its place in every window.
    keys = windows if module.partition == "grid" else inside
    if module.pooled:
        keys += windows
    return Fused(attention=2 * x[..., 0].numel() * keys * dim)


@fused_cost.register
def _(module: SRU, x: torch.Tensor) -> Fused:
    return Fused(beside=2 * x.numel())  # its GroupNorm


@fused_cost.register
def _(module: GRN, x: torch.Tensor) -> Fused:
    return Fused(beside=2 * x.numel())


@fused_cost.register
def _(module: LocalPerception, x: torch.Tensor) -> Fused:
    places, channels = x.numel() // x.shape[1], x.shape[1]
    maps = (module.conv_7x7, module.conv_5x5, module.conv_3x3, module.conv_1x1_final1)
    layers = places * sum(conv.weight.numel() for conv in (*maps, module.SA.conv1))
    beside = sum(places * conv.out_channels for conv in maps)
    # The channel gate runs on two vectors, means and maxima.
    vectors, hidden = 2 * x.shape[0], module.CA.fc1.out_channels
    return Fused(layers + vectors * 2 * channels * hidden, beside + vectors * hidden)


@fused_cost.register
def _(module: SRAttention, x: torch.Tensor, feat_size: tuple[int, int]) -> Fused:
    keys = math.prod(side // module.sr_ratio for side in feat_size)
    return Fused(attention=2 * x.numel() * keys)


@fused_cost.register
def _(module: MixFFN, x: torch.Tensor, feat_size: tuple[int, int]) -> Fused:
    places = x.numel() // x.shape[2]
    weight = module.dwconv.weight
    return Fused(places * weight.numel(), places * weight.shape[0])


@fused_cost.register
def _(module: DilatedPyramid, x: torch.Tensor) -> Fused:
    rows, columns = (-(-side // module.stride) for side in x.shape[2:])
    weights = [conv.weight for conv, _ in module.pairs()]
    places = x.shape[0] * rows * columns
    # Folded, yet counted as it stands: a BatchNorm and a ReLU of each map.
    outputs = sum(weight.shape[0] for weight in weights)
    return Fused(places * sum(weight.numel() for weight in weights), 3 * places * outputs)


@fused_cost.register
def _(module: HRPMv2, x: torch.Tensor, feat_size: tuple[int, int]) -> Fused:
    places = x.numel() // x.shape[2]
    layers = places * (module.up.weight.numel() + module.down.weight.numel())
    # BatchNorm and ReLU at four times the places, BatchNorm at theirs.
    return Fused(layers, places * (12 * module.up.out_channels + 2 * module.down.out_channels))


@fused_cost.register
def _(module: ConvNorm, x: torch.Tensor) -> Fused:
    return _folded(module.conv, x)


def _folded(conv: nn.Conv2d, x: torch.Tensor) -> Fused:
    """Of a padded convolution of x and the BatchNorm folded into it, counted as they stand."""
    rows, columns = (-(-side // conv.stride[0]) for side in x.shape[2:])
    places = x.shape[0] * rows * columns
    return Fused(places * conv.weight.numel(), 2 * places * conv.out_channels)


@fused_cost.register
def _(module: InvertedResidual, x: torch.Tensor) -> Fused:
    first, second, third = (conv for conv, _ in module.pairs())
    stride = second.stride[0]
    parts = [_folded(first, x), _folded(second, x), _folded(third, x[..., ::stride, ::stride])]
    return Fused(sum(part.layers for part in parts), sum(part.beside for part in parts))


@fused_cost.register
def _(module: StridedAttention, x: torch.Tensor) -> Fused:
    rows, columns = (-(-side // patch) for side, patch in zip(x.shape[1:3], PATCH, strict=True))
    width = module.w_out.in_features
    return Fused(attention=2 * x[..., 0].numel() * rows * columns * width)


@fused_cost.register
def _(module: CascadedGroupSRAttention, x: torch.Tensor) -> Fused:
    batch, dim, *size = x.shape
    keys = math.prod(side // module.sr_ratio for side in size)
    width = dim // len(module.groups)
    # Each place is reduced once, and has a query and an output; each key has keys and values.
    layers = x.numel() * (1 + 2 * width) + 2 * batch * keys * dim * width
    # Norms and biases: of queries and outputs; of keys and values, beside the reduction's bias.
    beside = (4 + 2) * x.numel() + (4 + 2 + 1) * batch * keys * dim
    return Fused(layers, beside, 2 * x.numel() * keys)
