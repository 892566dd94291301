"""Global response normalisation in Triton, forward and backward.

What is computed: `kernelpose/reference/grn.py`, and its gradient as csrc/include/kernelpose/grn.h
derives it. Two passes in each direction, the second through the L2 cache: sums over the pixels of
each channel, then, with what all channels' sums of an image make, the result. Every sum has one
order: no atomics, the same bits on every run.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from kernelpose.triton_kernels import maps
from torch import Tensor

OPTIONS = {"num_warps": 8}
REGISTERS = 80  # a thread at most, on either architecture
SUM_BLOCK = 1024


@triton.jit
def _inverse_mean(norms, channels, eps, SUM_BLOCK: tl.constexpr):
    """1 / m of the image that norms point at."""
    total = tl.zeros((SUM_BLOCK,), tl.float32)
    for first in range(0, channels, SUM_BLOCK):
        channel = first + tl.arange(0, SUM_BLOCK)
        total += tl.load(norms + channel, mask=channel < channels, other=0.0)
    return 1.0 / (tl.sum(total, 0) / channels + eps)


@triton.jit(do_not_specialize=maps.SIZES)
def _grn_norms_kernel(
    x,
    norms,  # (B, C)
    row_vectors,
    rows,
    VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels, pixels = maps.sizes(row_vectors, rows, VECTOR, CHANNELS_LAST)
    image, channel = maps.block(channels, BLOCK_C)
    x += image * channels * pixels
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, pixels, BLOCK_P):
        places, inside = maps.tile(first, channel, channels, pixels, CHANNELS_LAST, BLOCK_P)
        values = maps.load(x, places, inside)
        total += values * values
    tl.store(norms + image * channels + channel, tl.sqrt(tl.sum(total, 0)), mask=channel < channels)


@triton.jit(do_not_specialize=maps.SIZES)
def _grn_output_kernel(
    x,
    gamma,  # (C,)
    beta,
    norms,  # (B, C)
    out,
    eps,
    row_vectors,
    rows,
    VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
):
    channels, pixels = maps.sizes(row_vectors, rows, VECTOR, CHANNELS_LAST)
    image, channel = maps.block(channels, BLOCK_C)
    x += image * channels * pixels
    out += image * channels * pixels
    norms += image * channels
    inverse = _inverse_mean(norms, channels, eps, SUM_BLOCK)
    own = channel < channels
    response = tl.load(norms + channel, mask=own, other=0.0) * inverse
    scale = 1.0 + tl.load(gamma + channel, mask=own, other=0.0) * response
    shift = tl.load(beta + channel, mask=own, other=0.0)
    for first in range(0, pixels, BLOCK_P):
        places, inside = maps.tile(first, channel, channels, pixels, CHANNELS_LAST, BLOCK_P)
        values = maps.load(x, places, inside) * scale[None, :] + shift[None, :]
        maps.store(out, places, inside, values)


@triton.jit(do_not_specialize=maps.SIZES)
def _grn_gradient_sums_kernel(
    grad_out,
    x,
    products,  # (B, C): sums of grad_out x
    totals,  # (B, C): sums of grad_out
    row_vectors,
    rows,
    VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels, pixels = maps.sizes(row_vectors, rows, VECTOR, CHANNELS_LAST)
    image, channel = maps.block(channels, BLOCK_C)
    x += image * channels * pixels
    grad_out += image * channels * pixels
    product = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, pixels, BLOCK_P):
        places, inside = maps.tile(first, channel, channels, pixels, CHANNELS_LAST, BLOCK_P)
        grad = maps.load(grad_out, places, inside)
        product += grad * maps.load(x, places, inside)
        total += grad
    own = channel < channels
    tl.store(products + image * channels + channel, tl.sum(product, 0), mask=own)
    tl.store(totals + image * channels + channel, tl.sum(total, 0), mask=own)


@triton.jit(do_not_specialize=maps.SIZES)
def _grn_gradient_kernel(
    grad_out,
    x,
    gamma,  # (C,)
    norms,  # (B, C)
    products,  # (B, C): sums of grad_out x
    grad_gammas,  # (B, C): each image's part of the gradient of gamma
    grad_x,
    eps,
    row_vectors,
    rows,
    VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
):
    channels, pixels = maps.sizes(row_vectors, rows, VECTOR, CHANNELS_LAST)
    image, channel = maps.block(channels, BLOCK_C)
    x += image * channels * pixels
    grad_out += image * channels * pixels
    grad_x += image * channels * pixels
    norms += image * channels
    products += image * channels
    inverse = _inverse_mean(norms, channels, eps, SUM_BLOCK)
    shared = tl.zeros((SUM_BLOCK,), tl.float32)
    for first in range(0, channels, SUM_BLOCK):
        other = first + tl.arange(0, SUM_BLOCK)
        inside = other < channels
        term = tl.load(gamma + other, mask=inside, other=0.0)
        term *= tl.load(products + other, mask=inside, other=0.0)
        shared += term * tl.load(norms + other, mask=inside, other=0.0)
    own = channel < channels
    norm = tl.load(norms + channel, mask=own, other=0.0)
    product = tl.load(products + channel, mask=own, other=0.0)
    scale = tl.load(gamma + channel, mask=own, other=0.0)
    response = norm * inverse
    tl.store(grad_gammas + image * channels + channel, product * response, mask=own)
    of_norm = scale * product * inverse - tl.sum(shared, 0) * inverse * inverse / channels
    of_x = tl.where(norm == 0.0, 0.0, of_norm / tl.where(norm == 0.0, 1.0, norm))
    of_grad = 1.0 + scale * response
    for first in range(0, pixels, BLOCK_P):
        places, inside = maps.tile(first, channel, channels, pixels, CHANNELS_LAST, BLOCK_P)
        grad = maps.load(grad_out, places, inside) * of_grad[None, :]
        grad += maps.load(x, places, inside) * of_x[None, :]
        maps.store(grad_x, places, inside, grad)


def forward(x: Tensor, gamma: Tensor, beta: Tensor, out: Tensor, norms: Tensor, eps: float) -> None:
    """Fill out and norms (B, C); x and out (B, C, H, W) are dense and lie alike, not empty."""
    layout, grid = maps.layout(x), maps.grid(x)
    with torch.cuda.device_of(x):
        _grn_norms_kernel[grid](x, norms, **layout, **OPTIONS)
        _grn_output_kernel[grid](
            x, gamma, beta, norms, out, eps, **layout, SUM_BLOCK=SUM_BLOCK, **OPTIONS
        )


def backward(
    grad_out: Tensor,
    x: Tensor,
    gamma: Tensor,
    norms: Tensor,
    sums: Tensor,
    grad_x: Tensor,
    eps: float,
) -> None:
    """Fill sums (3, B, C), see csrc/cuda/grn.h, and grad_x; the maps lie alike."""
    layout, grid = maps.layout(x), maps.grid(x)
    with torch.cuda.device_of(x):
        _grn_gradient_sums_kernel[grid](grad_out, x, sums[0], sums[1], **layout, **OPTIONS)
        _grn_gradient_kernel[grid](
            *(grad_out, x, gamma, norms, sums[0], sums[2], grad_x, eps),
            **layout,
            SUM_BLOCK=SUM_BLOCK,
            **OPTIONS,
        )
