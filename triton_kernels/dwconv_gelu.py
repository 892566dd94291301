"""Depthwise 3x3 convolution and GELU of tokens in Triton, forward and backward.

What is computed: `kernelpose/reference/dwconv_gelu.py`, its gradient as
csrc/include/kernelpose/dwconv_gelu.h has it, GELU as csrc/include/kernelpose/gelu.h does it. A
program takes a tile of pixels and a block of channels; what neighbours share comes from the cache.
Backward there are two passes: g, with each tile's part of the weights' gradients, goes to memory in
float32; then g is convolved with the turned kernel. No atomics: the same bits on every run.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

REGISTERS = 128  # a thread at most: two blocks a multiprocessor
OPTIONS = {"num_warps": 8, "maxnreg": REGISTERS}
TILE_H, TILE_W = 4, 8
SIZES = ["height", "width", "channel_vectors"]


@triton.jit
def _gelu_tail(z):
    """(a, exp(-a^2 / 2), R(a)) for a = |z| up to 11."""
    magnitude = tl.abs(z)
    a = tl.where(magnitude > 11.0, 11.0, magnitude)
    w = a / (1.0 + 0.3 * a)
    ratio = w * 2.2534377421834506e-06 - 2.7525084078661166e-05
    ratio = ratio * w + 7.615455979248509e-05
    ratio = ratio * w + 2.8486025985330343e-04
    ratio = ratio * w - 3.8725550984963775e-04
    ratio = ratio * w - 1.8917707726359367e-02
    ratio = ratio * w + 1.3032494485378265e-01
    ratio = ratio * w - 3.989429175853729e-01
    ratio = ratio * w + 0.5
    return a, tl.exp2(a * a * -0.7213475204444817), ratio


@triton.jit
def _gelu(z):
    a, power, ratio = _gelu_tail(z)
    return tl.where(z > 0.0, z, 0.0) - a * (power * ratio)


@triton.jit
def _gelu_derivative(z):
    a, power, ratio = _gelu_tail(z)
    d = power * (ratio - 0.3989422804014327 * a)
    return tl.where(z < 0.0, d, 1.0 - d)


@triton.jit
def _tile(
    height, width, channels, TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr
):
    """(which tile of all images, image, rows, columns, channels) of this program."""
    blocks = tl.cdiv(channels, BLOCK_C)
    across, down = tl.cdiv(width, TILE_W), tl.cdiv(height, TILE_H)
    tile = tl.program_id(0) // blocks
    pixel = tl.arange(0, TILE_H * TILE_W)
    row = tile // across % down * TILE_H + pixel // TILE_W
    column = tile % across * TILE_W + pixel % TILE_W
    channel = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    return tile.to(tl.int64), (tile // (across * down)).to(tl.int64), row, column, channel


@triton.jit
def _load(image, row, column, channel, height, width, channels):
    """A tile in float32, zeros off the map; `image` points at its first element."""
    on_map = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    places = (row * width + column)[:, None] * channels + channel[None, :]
    mask = on_map[:, None] & (channel < channels)[None, :]
    return tl.load(image + places, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(image, values, row, column, channel, height, width, channels):
    places = (row * width + column)[:, None] * channels + channel[None, :]
    mask = ((row < height) & (column < width))[:, None] & (channel < channels)[None, :]
    tl.store(image + places, values.to(image.dtype.element_ty), mask=mask)


@triton.jit
def _convolve(
    image, weight, start, row, column, channel, height, width, channels, TURNED: tl.constexpr
):
    """start (BLOCK_C,) + the 3x3 products around a tile, with the kernel turned or not."""
    own = channel < channels
    total = tl.zeros((row.shape[0], channel.shape[0]), tl.float32) + start[None, :]
    for dy in range(3):  # three loads under way: all nine do not fit into the registers
        for dx in tl.static_range(3):
            t = dy * 3 + dx
            tap = tl.load(weight + channel * 9 + (8 - t if TURNED else t), mask=own, other=0.0)
            y, x = row + (dy - 1), column + (dx - 1)
            total += _load(image, y, x, channel, height, width, channels) * tap[None, :]
    return total


@triton.jit(do_not_specialize=SIZES)
def _dwconv_gelu_forward_kernel(
    x,
    weight,  # (C, 9)
    bias,
    out,
    height,
    width,
    channel_vectors,
    VECTOR: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels = channel_vectors * VECTOR
    _, image, row, column, channel = _tile(height, width, channels, TILE_H, TILE_W, BLOCK_C)
    x += image * height * width * channels
    out += image * height * width * channels
    start = tl.load(bias + channel, mask=channel < channels, other=0.0)
    z = _convolve(x, weight, start, row, column, channel, height, width, channels, False)
    _store(out, _gelu(z), row, column, channel, height, width, channels)


@triton.jit(do_not_specialize=SIZES)
def _dwconv_gelu_inner_gradient_kernel(
    grad_out,
    x,
    weight,  # (C, 9)
    bias,
    g,
    partial,  # (tiles, 10, C)
    height,
    width,
    channel_vectors,
    VECTOR: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels = channel_vectors * VECTOR
    tile, image, row, column, channel = _tile(height, width, channels, TILE_H, TILE_W, BLOCK_C)
    x += image * height * width * channels
    grad_out += image * height * width * channels
    g += image * height * width * channels
    partial += tile * 10 * channels + channel
    own = channel < channels
    start = tl.load(bias + channel, mask=own, other=0.0)
    z = _convolve(x, weight, start, row, column, channel, height, width, channels, False)
    # Pixels off the map have no gradient, and so no part in the sums.
    incoming = _load(grad_out, row, column, channel, height, width, channels)
    inner = incoming * _gelu_derivative(z)
    _store(g, inner, row, column, channel, height, width, channels)
    for t in range(9):
        y, x_ = row + (t // 3 - 1), column + (t % 3 - 1)
        products = inner * _load(x, y, x_, channel, height, width, channels)
        tl.store(partial + t * channels, tl.sum(products, 0), mask=own)
    tl.store(partial + 9 * channels, tl.sum(inner, 0), mask=own)


@triton.jit(do_not_specialize=SIZES)
def _dwconv_gelu_gradient_kernel(
    g,
    weight,  # (C, 9)
    grad_x,
    height,
    width,
    channel_vectors,
    VECTOR: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels = channel_vectors * VECTOR
    _, image, row, column, channel = _tile(height, width, channels, TILE_H, TILE_W, BLOCK_C)
    g += image * height * width * channels
    grad_x += image * height * width * channels
    start = tl.zeros((BLOCK_C,), tl.float32)
    total = _convolve(g, weight, start, row, column, channel, height, width, channels, True)
    _store(grad_x, total, row, column, channel, height, width, channels)


def layout(x: Tensor, size: tuple[int, int]) -> dict[str, Any]:
    """The arguments that say how tokens x (B, N, C), dense, lie."""
    channels = x.shape[2]
    vector = math.gcd(channels, 16 // x.element_size())
    return {
        "height": size[0],
        "width": size[1],
        "channel_vectors": channels // vector,
        "VECTOR": vector,
        "TILE_H": TILE_H,
        "TILE_W": TILE_W,
        "BLOCK_C": 128 // x.element_size(),
    }


def parts(batch: int, size: tuple[int, int]) -> int:
    """Tiles of all images, each of which has a part of the weights' gradients."""
    return batch * triton.cdiv(size[0], TILE_H) * triton.cdiv(size[1], TILE_W)


def _grid(x: Tensor, size: tuple[int, int]) -> tuple[int]:
    return (parts(x.shape[0], size) * triton.cdiv(x.shape[2], 128 // x.element_size()),)


def forward(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, size: tuple[int, int]) -> None:
    """Fill out; x and out (B, N, C) are dense, not empty; weight and bias float32."""
    with torch.cuda.device_of(x):
        _dwconv_gelu_forward_kernel[_grid(x, size)](
            x, weight, bias, out, **layout(x, size), **OPTIONS
        )


def backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    partial: Tensor,
    grad_x: Tensor,
    size: tuple[int, int],
) -> None:
    """Fill grad_x and partial (parts, 10, C), parts of the gradients of the taps and the bias."""
    g = torch.empty_like(x, dtype=torch.float32)
    grid, lies = _grid(x, size), layout(x, size)
    with torch.cuda.device_of(x):
        _dwconv_gelu_inner_gradient_kernel[grid](
            grad_out, x, weight, bias, g, partial, **lies, **OPTIONS
        )
        _dwconv_gelu_gradient_kernel[grid](g, weight, grad_x, **lies, **OPTIONS)
