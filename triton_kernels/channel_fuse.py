"""CRU's fusion in Triton, forward and backward.

What is computed: `kernelpose/reference/channel_fuse.py`, and its gradient as
csrc/include/kernelpose/channel_fuse.h derives it. Two passes in each direction, the second through
the L2 cache: sums over the pixels of each channel, then, with the softmax of all channels' means of
an image, the result. Every sum has one order: no atomics, the same bits on every run.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from kernelpose.triton_kernels import maps
from torch import Tensor

OPTIONS = {"num_warps": 8}
REGISTERS = 96  # a thread at most, on either architecture
SUM_BLOCK = 1024


@triton.jit
def _softmax(means, channels, PAIRWISE: tl.constexpr, SUM_BLOCK: tl.constexpr):
    """(largest mean, 1 / sum of exponentials) of an image's means (2, C); not used pairwise."""
    largest = tl.zeros((), tl.float32)
    inverse = tl.zeros((), tl.float32) + 1.0
    if not PAIRWISE:
        top = tl.full((SUM_BLOCK,), float("-inf"), tl.float32)
        for first in range(0, 2 * channels, SUM_BLOCK):
            i = first + tl.arange(0, SUM_BLOCK)
            mean = tl.load(means + i, mask=i < 2 * channels, other=float("-inf"))
            top = tl.maximum(top, mean)
        largest = tl.max(top, 0)
        total = tl.zeros((SUM_BLOCK,), tl.float32)
        for first in range(0, 2 * channels, SUM_BLOCK):
            i = first + tl.arange(0, SUM_BLOCK)
            mean = tl.load(means + i, mask=i < 2 * channels, other=float("-inf"))
            total += tl.exp(mean - largest)
        inverse = 1.0 / tl.sum(total, 0)
    return largest, inverse


@triton.jit
def _weights(means, channel, channels, largest, inverse, PAIRWISE: tl.constexpr):
    """(w1, w2) of some channels."""
    own = channel < channels
    m1 = tl.load(means + channel, mask=own, other=0.0)
    m2 = tl.load(means + channels + channel, mask=own, other=0.0)
    if PAIRWISE:
        return 1.0 / (1.0 + tl.exp(m2 - m1)), 1.0 / (1.0 + tl.exp(m1 - m2))
    return tl.exp(m1 - largest) * inverse, tl.exp(m2 - largest) * inverse


@triton.jit(do_not_specialize=maps.SIZES)
def _channel_fuse_means_kernel(
    y1,
    y2,
    means,  # (B, 2, C)
    row_vectors,
    rows,
    VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels, pixels = maps.sizes(row_vectors, rows, VECTOR, CHANNELS_LAST)
    image, channel = maps.block(channels, BLOCK_C)
    y1 += image * channels * pixels
    y2 += image * channels * pixels
    sum1 = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sum2 = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, pixels, BLOCK_P):
        places, inside = maps.tile(first, channel, channels, pixels, CHANNELS_LAST, BLOCK_P)
        sum1 += maps.load(y1, places, inside)
        sum2 += maps.load(y2, places, inside)
    own = channel < channels
    means += image * 2 * channels + channel
    tl.store(means, tl.sum(sum1, 0) / pixels, mask=own)
    tl.store(means + channels, tl.sum(sum2, 0) / pixels, mask=own)


@triton.jit(do_not_specialize=maps.SIZES)
def _channel_fuse_output_kernel(
    y1,
    y2,
    means,  # (B, 2, C)
    out,
    row_vectors,
    rows,
    VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PAIRWISE: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
):
    channels, pixels = maps.sizes(row_vectors, rows, VECTOR, CHANNELS_LAST)
    image, channel = maps.block(channels, BLOCK_C)
    y1 += image * channels * pixels
    y2 += image * channels * pixels
    out += image * channels * pixels
    means += image * 2 * channels
    largest, inverse = _softmax(means, channels, PAIRWISE, SUM_BLOCK)
    w1, w2 = _weights(means, channel, channels, largest, inverse, PAIRWISE)
    for first in range(0, pixels, BLOCK_P):
        places, inside = maps.tile(first, channel, channels, pixels, CHANNELS_LAST, BLOCK_P)
        fused = maps.load(y1, places, inside) * w1[None, :]
        fused += maps.load(y2, places, inside) * w2[None, :]
        maps.store(out, places, inside, fused)


@triton.jit(do_not_specialize=maps.SIZES)
def _channel_fuse_gradient_sums_kernel(
    grad_out,
    y1,
    y2,
    products,  # (B, 2, C): sums of grad_out y1 and grad_out y2
    row_vectors,
    rows,
    VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels, pixels = maps.sizes(row_vectors, rows, VECTOR, CHANNELS_LAST)
    image, channel = maps.block(channels, BLOCK_C)
    grad_out += image * channels * pixels
    y1 += image * channels * pixels
    y2 += image * channels * pixels
    sum1 = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sum2 = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, pixels, BLOCK_P):
        places, inside = maps.tile(first, channel, channels, pixels, CHANNELS_LAST, BLOCK_P)
        grad = maps.load(grad_out, places, inside)
        sum1 += grad * maps.load(y1, places, inside)
        sum2 += grad * maps.load(y2, places, inside)
    own = channel < channels
    products += image * 2 * channels + channel
    tl.store(products, tl.sum(sum1, 0), mask=own)
    tl.store(products + channels, tl.sum(sum2, 0), mask=own)


@triton.jit(do_not_specialize=maps.SIZES)
def _channel_fuse_gradient_kernel(
    grad_out,
    means,  # (B, 2, C)
    products,  # (B, 2, C)
    grad_y1,
    grad_y2,
    row_vectors,
    rows,
    VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PAIRWISE: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
):
    channels, pixels = maps.sizes(row_vectors, rows, VECTOR, CHANNELS_LAST)
    image, channel = maps.block(channels, BLOCK_C)
    grad_out += image * channels * pixels
    grad_y1 += image * channels * pixels
    grad_y2 += image * channels * pixels
    means += image * 2 * channels
    products += image * 2 * channels
    largest, inverse = _softmax(means, channels, PAIRWISE, SUM_BLOCK)
    w1, w2 = _weights(means, channel, channels, largest, inverse, PAIRWISE)
    own = channel < channels
    d1 = tl.load(products + channel, mask=own, other=0.0)
    d2 = tl.load(products + channels + channel, mask=own, other=0.0)
    if PAIRWISE:
        total = w1 * d1 + w2 * d2
    else:
        parts = tl.zeros((SUM_BLOCK,), tl.float32)
        for first in range(0, 2 * channels, SUM_BLOCK):
            i = first + tl.arange(0, SUM_BLOCK)
            mean = tl.load(means + i, mask=i < 2 * channels, other=float("-inf"))
            parts += tl.exp(mean - largest) * tl.load(
                products + i, mask=i < 2 * channels, other=0.0
            )
        total = tl.sum(parts, 0) * inverse
    shift1 = w1 * (d1 - total) / pixels
    shift2 = w2 * (d2 - total) / pixels
    for first in range(0, pixels, BLOCK_P):
        places, inside = maps.tile(first, channel, channels, pixels, CHANNELS_LAST, BLOCK_P)
        grad = maps.load(grad_out, places, inside)
        maps.store(grad_y1, places, inside, grad * w1[None, :] + shift1[None, :])
        maps.store(grad_y2, places, inside, grad * w2[None, :] + shift2[None, :])


def forward(y1: Tensor, y2: Tensor, out: Tensor, means: Tensor, pairwise: bool) -> None:
    """Fill out and means (B, 2, C); the maps (B, C, H, W) are dense and lie alike, not empty."""
    layout, grid = maps.layout(y1), maps.grid(y1)
    with torch.cuda.device_of(y1):
        _channel_fuse_means_kernel[grid](y1, y2, means, **layout, **OPTIONS)
        _channel_fuse_output_kernel[grid](
            *(y1, y2, means, out), **layout, PAIRWISE=pairwise, SUM_BLOCK=SUM_BLOCK, **OPTIONS
        )


def backward(
    grad_out: Tensor,
    y1: Tensor,
    y2: Tensor,
    means: Tensor,
    products: Tensor,
    grad_y1: Tensor,
    grad_y2: Tensor,
    pairwise: bool,
) -> None:
    """Fill products (B, 2, C), grad_y1 and grad_y2; the maps lie alike."""
    layout, grid = maps.layout(y1), maps.grid(y1)
    with torch.cuda.device_of(y1):
        _channel_fuse_gradient_sums_kernel[grid](*(grad_out, y1, y2, products), **layout, **OPTIONS)
        _channel_fuse_gradient_kernel[grid](
            *(grad_out, means, products, grad_y1, grad_y2),
            **layout,
            PAIRWISE=pairwise,
            SUM_BLOCK=SUM_BLOCK,
            **OPTIONS,
        )
