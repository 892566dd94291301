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
from kernelpose.nn import (
    GRN,
    CascadedGroupSRAttention,
    DilatedPyramid,
    HRPMv2,
    SRAttention,
    WindowAttention,
)
from kernelpose.nn.mobilevit_block import PATCH, StridedAttention
from kernelpose.nn.multi_scale import ChannelAttention


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
        functional = functional_cost(module, *arguments)
        layers += macs
        extra += beside + functional.beside
        attention += functional.attention

    handles = [module.register_forward_hook(hook) for module in model.modules()]
    weight = next(model.parameters())
    training = model.training
    try:
        model.eval()
        # A layer with a hook is called, and no kernel does its work.
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
class Functional:
    """What a module does without calling modules of its own; see `Count` for what each counts.

    beside: what `hooked` adds to `layers`.
    """

    beside: int = 0
    attention: int = 0


@singledispatch
def functional_cost(module: object, *arguments: Any) -> Functional:
    """Of one forward of a module with these arguments."""
    return Functional()


@functional_cost.register
def _(module: WindowAttention, x: torch.Tensor) -> Functional:
    rows, columns, dim = x.shape[1:]
    window = module.window or (rows, columns)
    inside = window[0] * window[1]
    windows = -(-rows // window[0]) * -(-columns // window[1])
    # A token of the grid partition meets the tokens at its place in every window.
    keys = windows if module.partition == "grid" else inside
    if module.pooled:
        keys += windows
    return Functional(attention=2 * x[..., 0].numel() * keys * dim)


@functional_cost.register
def _(module: StridedAttention, x: torch.Tensor) -> Functional:
    rows, columns = (-(-side // patch) for side, patch in zip(x.shape[1:3], PATCH, strict=True))
    width = module.w_out.in_features
    return Functional(attention=2 * x[..., 0].numel() * rows * columns * width)


@functional_cost.register
def _(module: SRAttention, x: torch.Tensor, feat_size: tuple[int, int]) -> Functional:
    keys = math.prod(side // module.sr_ratio for side in feat_size)
    return Functional(attention=2 * x.numel() * keys)


@functional_cost.register
def _(module: CascadedGroupSRAttention, x: torch.Tensor) -> Functional:
    keys = math.prod(side // module.sr_ratio for side in x.shape[2:])
    return Functional(attention=2 * x.numel() * keys)


@functional_cost.register
def _(module: GRN, x: torch.Tensor) -> Functional:
    return Functional(beside=2 * x.numel())


@functional_cost.register
def _(module: ChannelAttention, x: torch.Tensor) -> Functional:
    return Functional(beside=2 * x.shape[0] * module.fc1.out_channels)  # ReLU, of two vectors


@functional_cost.register
def _(module: DilatedPyramid, x: torch.Tensor) -> Functional:
    rows, columns = (-(-side // module.stride) for side in x.shape[2:])
    outputs = sum(conv.out_channels for conv, _ in module.pairs())
    return Functional(beside=x.shape[0] * rows * columns * outputs)  # ReLU


@functional_cost.register
def _(module: HRPMv2, x: torch.Tensor, feat_size: tuple[int, int]) -> Functional:
    return Functional(beside=4 * x.shape[0] * x.shape[1] * module.up.out_channels)  # ReLU
