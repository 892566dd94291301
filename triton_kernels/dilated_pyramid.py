"""The chain of dilated 3x3 convolutions in Triton, a kernel a layer; and the activation's backward.

What is computed: `kernelpose/reference/dilated_pyramid.py`. A program multiplies a row of pixels by
some output channels: the taps, or with few channels the taps and channels together, are the inner
dimension. Every sum has one order: no atomics, the same bits on every run.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

REGISTERS = 255  # a thread at most: told to ptxas, which else may spill for more blocks
OPTIONS = {"num_warps": 4, "num_stages": 3, "maxnreg": REGISTERS}
SHARED = 40960  # bytes a block at most
ELEMENTS = 1024  # of a program of the activation's backward
MASK_OPTIONS = {"num_warps": 4}

SIZES = ["outputs", "height", "width", "out_width", "out_pixels", "stride", "dilation", "terms"]


@triton.jit
def _product(
    x, weight, column, output, y, left, inside, exists, tap, sum,
    height, width, dilation, in_pixel, in_channel, CHANNELS: tl.constexpr,
):  # fmt: skip
    """sum + the product of pixels and weights for some channels `column` of taps `tap`."""
    row = y[:, None] + (tap // 3 - 1) * dilation
    side = left[:, None] + (tap % 3 - 1) * dilation
    own = inside[:, None] & (row >= 0) & (row < height) & (side >= 0) & (side < width)
    own = own & ((column < CHANNELS) & (tap < 9))
    pixels = tl.load(x + (row * width + side) * in_pixel + column * in_channel, mask=own, other=0.0)
    # As (inner, output).
    inner = tl.trans(column * 9 + tap)
    known = tl.trans((column < CHANNELS) & (tap < 9)) & exists[None, :]
    taps = tl.load(weight + output[None, :] * (9 * CHANNELS) + inner, mask=known, other=0.0)
    return tl.dot(pixels, taps.to(pixels.dtype), sum, input_precision="ieee")


@triton.jit(do_not_specialize=SIZES)
def _dilated_pyramid_layer_kernel(
    x,
    weight,  # (outputs, CHANNELS, 3, 3) float32
    bias,  # (outputs) float32
    out,  # this layer's map; None where nobody needs it
    first,  # all maps of the sum; None but in its last layer
    total,  # their sum; None but in the last layer
    outputs,
    height,
    width,
    out_width,
    out_pixels,
    stride,
    dilation,
    terms,  # maps before this one
    in_image,
    in_pixel,
    in_channel,
    out_image,
    out_pixel,
    out_channel,
    total_image,
    total_pixel,
    CHANNELS: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    blocks = tl.cdiv(out_pixels, BLOCK_M)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = pixel < out_pixels
    exists = output < outputs
    y = pixel // out_width * stride
    left = pixel % out_width * stride
    x += image * in_image
    sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    inner = tl.arange(0, BLOCK_K)[None, :]
    if CHANNELS < BLOCK_K:
        for start in tl.static_range(0, 9 * CHANNELS, BLOCK_K):
            sum = _product(
                x, weight, (start + inner) % CHANNELS, output, y, left, inside, exists,
                (start + inner) // CHANNELS, sum, height, width, dilation, in_pixel, in_channel,
                CHANNELS,
            )  # fmt: skip
    else:
        for tap in range(9):
            for start in range(0, CHANNELS, BLOCK_K):
                sum = _product(
                    x, weight, start + inner, output, y, left, inside, exists, tap, sum,
                    height, width, dilation, in_pixel, in_channel, CHANNELS,
                )  # fmt: skip
    sum += tl.load(bias + output, mask=exists, other=0.0)[None, :]
    if RELU:
        sum = tl.where(sum <= 0.0, 0.0, sum)  # keeps NaN
    own = inside[:, None] & exists[None, :]
    places = pixel[:, None] * out_pixel + output[None, :] * out_channel
    if out is not None:
        tl.store(out + image * out_image + places, sum.to(x.dtype.element_ty), mask=own)
    if total is not None:
        before = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        first += image * out_image
        for term in range(terms):
            before += tl.load(
                first + places + term * outputs * out_channel, mask=own, other=0.0
            ).to(tl.float32)
        to = pixel[:, None] * total_pixel + output[None, :] * out_channel
        tl.store(total + image * total_image + to, (before + sum).to(x.dtype.element_ty), mask=own)


@triton.jit(do_not_specialize=["rows", "columns"])
def _dilated_pyramid_mask_kernel(
    grad_out,
    carry,  # or None
    maps,  # or None
    grad,
    rows,
    columns,
    grad_out_row,
    map_row,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    across = tl.cdiv(columns, BLOCK_C)
    row = (tl.program_id(0) // across).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    column = tl.program_id(0) % across * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    own = (row < rows) & (column < columns)
    sum = tl.load(grad_out + row * grad_out_row + column, mask=own, other=0.0).to(tl.float32)
    if carry is not None:
        sum += tl.load(carry + row * columns + column, mask=own, other=0.0).to(tl.float32)
    if maps is not None:
        values = tl.load(maps + row * map_row + column, mask=own, other=0.0)
        sum = tl.where(values <= 0.0, 0.0, sum)
    tl.store(grad + row * columns + column, sum.to(grad.dtype.element_ty), mask=own)


def blocks(channels: int, outputs: int, element_size: int) -> dict[str, int]:
    """Sizes of the product of a layer, by what compiles without spilling registers; nothing here
    was timed on a GPU yet."""
    block_n = 16 if outputs <= 16 else 32
    return {
        "BLOCK_M": 64 if element_size == 4 or block_n == 32 else 128,
        "BLOCK_N": block_n,
        "BLOCK_K": 16 if 16 <= channels < 32 or element_size == 4 else 32,
    }


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    dilations: Sequence[int],
    stride: int,
    relu: bool,
    maps: Tensor,
    total: Tensor | None,
    keep: bool,
) -> None:
    """Fill maps (B, all channels, h, w) and, if given, their sum `total`; then the last map only if
    `keep`. x, maps and total are dense and lie alike, not empty."""
    last = not x.is_contiguous()
    layer_in, first, in_strides = x, 0, _strides(x, last)
    with torch.cuda.device_of(x):
        for i, (weight, bias, dilation) in enumerate(zip(weights, biases, dilations, strict=True)):
            outputs = weight.shape[0]
            out = maps[:, first : first + outputs]
            ends = total is not None and i + 1 == len(weights)
            pixels = out.shape[2] * out.shape[3]
            sizes = blocks(weight.shape[1], outputs, x.element_size())
            grid = (
                x.shape[0] * triton.cdiv(pixels, sizes["BLOCK_M"]),
                triton.cdiv(outputs, sizes["BLOCK_N"]),
            )
            _dilated_pyramid_layer_kernel[grid](
                layer_in,
                weight,
                bias,
                None if ends and not keep else out,
                maps if ends else None,
                total if ends else None,
                outputs,
                layer_in.shape[2],
                layer_in.shape[3],
                out.shape[3],
                pixels,
                1 if i else stride,
                dilation,
                i,
                *in_strides,
                *_strides(maps, last),
                *_strides(maps if total is None else total, last)[:2],
                CHANNELS=weight.shape[1],
                RELU=relu,
                **sizes,
                **OPTIONS,
            )
            layer_in, first, in_strides = out, first + outputs, _strides(maps, last)


def mask(
    grad_out: Tensor,
    carry: Tensor | None,
    maps: Tensor | None,
    grad: Tensor,
    table: tuple[int, int, int, int],
) -> None:
    """grad = grad_out + carry, 0 where maps <= 0, as tables of (rows, columns, the elements from
    one row to the next in grad_out, and in maps)."""
    rows, columns, *_ = table
    block_c = min(ELEMENTS, triton.next_power_of_2(columns))
    block_r = ELEMENTS // block_c
    grid = (triton.cdiv(rows, block_r) * triton.cdiv(columns, block_c),)
    with torch.cuda.device_of(grad):
        _dilated_pyramid_mask_kernel[grid](
            grad_out, carry, maps, grad, *table, BLOCK_R=block_r, BLOCK_C=block_c, **MASK_OPTIONS
        )


def _strides(maps: Tensor, last: bool) -> tuple[int, int, int]:
    """From one image, pixel and channel of dense maps to the next."""
    channels, pixels = maps.shape[1], maps.shape[2] * maps.shape[3]
    return channels * pixels, channels if last else 1, 1 if last else pixels
