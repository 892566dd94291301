"""SCConv's spatial gate in Triton, forward and backward.

What is computed: `kernelpose/reference/spatial_gate.py`, and its gradient as
csrc/include/kernelpose/spatial_gate.h derives it. In each direction sums over the pixels of each
channel, what they make of each group, and, with x from the L2 cache, the result; a program takes
channels of the first half with their partners. Every sum has one order: no atomics, the same bits
on every run.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from kernelpose.triton_kernels import maps
from torch import Tensor

REGISTERS = 128  # a thread at most, on either architecture; ptxas would spill to use fewer
OPTIONS = {"num_warps": 8, "maxnreg": REGISTERS}
SUM_BLOCK = 1024
PARAMETER_BLOCK = 64


@triton.jit
def _sum(pointer, count, SUM_BLOCK: tl.constexpr):
    total = tl.zeros((SUM_BLOCK,), tl.float32)
    for first in range(0, count, SUM_BLOCK):
        place = first + tl.arange(0, SUM_BLOCK)
        total += tl.load(pointer + place, mask=place < count, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _sigmoid(t):
    e = tl.exp(-tl.abs(t))
    return tl.where(t < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def _factors(weight, bias, statistics, channel, own, size, inverse):
    """t = (x - mean) scale + offset for some channels of the image whose statistics these are."""
    gamma = tl.load(weight + channel, mask=own, other=0.0)
    share = gamma * inverse
    mean = tl.load(statistics + channel // size * 2, mask=own, other=0.0)
    deviation = tl.load(statistics + channel // size * 2 + 1, mask=own, other=0.0)
    offset = share * tl.load(bias + channel, mask=own, other=0.0)
    return mean[None, :], (share * gamma * deviation)[None, :], offset[None, :]


@triton.jit
def _through_gate(t, x, own, partner, limit):
    """What t and x themselves get from the gradients of a channel's result and its partner's."""
    r = _sigmoid(t)
    weak = r * (own + partner)
    above = t > limit
    return tl.where(above, 0.0, x * weak * (1.0 - r)), tl.where(above, own, weak)


@triton.jit(do_not_specialize=maps.SIZES)
def _spatial_gate_moments_kernel(
    x,
    means,  # (B, C)
    squares,  # (B, C): sums of squared differences from them
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
        total += maps.load(x, places, inside)
    mean = tl.sum(total, 0) / pixels
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, pixels, BLOCK_P):
        places, inside = maps.tile(first, channel, channels, pixels, CHANNELS_LAST, BLOCK_P)
        difference = tl.where(inside, maps.load(x, places, inside) - mean[None, :], 0.0)
        total += difference * difference
    own = channel < channels
    tl.store(means + image * channels + channel, mean, mask=own)
    tl.store(squares + image * channels + channel, tl.sum(total, 0), mask=own)


@triton.jit(do_not_specialize=["size", "pixels"])
def _spatial_gate_statistics_kernel(
    means,  # (B, groups, size)
    squares,
    statistics,  # (B, groups, 2)
    size,
    pixels,
    eps,
    SUM_BLOCK: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    means += group * size
    mean = _sum(means, size, SUM_BLOCK) / size
    between = tl.zeros((SUM_BLOCK,), tl.float32)
    for first in range(0, size, SUM_BLOCK):
        place = first + tl.arange(0, SUM_BLOCK)
        difference = tl.load(means + place, mask=place < size, other=0.0) - mean
        between += tl.where(place < size, difference * difference, 0.0)
    within = _sum(squares + group * size, size, SUM_BLOCK)
    variance = (within + pixels * tl.sum(between, 0)) / (pixels.to(tl.float32) * size)
    tl.store(statistics + 2 * group, mean)
    tl.store(statistics + 2 * group + 1, 1.0 / tl.sqrt(variance + eps))


@triton.jit(do_not_specialize=[*maps.SIZES, "groups"])
def _spatial_gate_output_kernel(
    x,
    weight,  # (C,)
    bias,
    statistics,  # (B, groups, 2)
    out,
    groups,
    limit,
    row_vectors,
    rows,
    VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
):
    channels, pixels = maps.sizes(row_vectors, rows, VECTOR, CHANNELS_LAST)
    pairs, size = channels // 2, channels // groups
    image, channel = maps.block(pairs, BLOCK_C)
    to_partner = pairs if CHANNELS_LAST else pairs * pixels
    x += image * channels * pixels
    out += image * channels * pixels
    statistics += image * groups * 2
    inverse = 1.0 / _sum(weight, channels, SUM_BLOCK)
    own = channel < pairs
    mean0, scale0, offset0 = _factors(weight, bias, statistics, channel, own, size, inverse)
    mean1, scale1, offset1 = _factors(weight, bias, statistics, channel + pairs, own, size, inverse)
    for first in range(0, pixels, BLOCK_P):
        places, inside = maps.tile(first, channel, channels, pixels, CHANNELS_LAST, BLOCK_P)
        inside = inside & own[None, :]
        x0 = maps.load(x, places, inside)
        x1 = maps.load(x + to_partner, places, inside)
        t0 = (x0 - mean0) * scale0 + offset0
        t1 = (x1 - mean1) * scale1 + offset1
        weak0 = _sigmoid(t0) * x0
        weak1 = _sigmoid(t1) * x1
        out0 = tl.where(t0 > limit, x0, weak0) + tl.where(t1 > limit, 0.0, weak1)
        out1 = tl.where(t1 > limit, x1, weak1) + tl.where(t0 > limit, 0.0, weak0)
        maps.store(out, places, inside, out0)
        maps.store(out + to_partner, places, inside, out1)


@triton.jit(do_not_specialize=[*maps.SIZES, "groups"])
def _spatial_gate_gradient_sums_kernel(
    grad_out,
    x,
    weight,  # (C,)
    bias,
    statistics,  # (B, groups, 2)
    u0,  # (B, C): U0 and, less its reciprocal deviation, U1 of kernelpose/spatial_gate.h
    u1,
    groups,
    limit,
    row_vectors,
    rows,
    VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
):
    channels, pixels = maps.sizes(row_vectors, rows, VECTOR, CHANNELS_LAST)
    pairs, size = channels // 2, channels // groups
    image, channel = maps.block(pairs, BLOCK_C)
    to_partner = pairs if CHANNELS_LAST else pairs * pixels
    x += image * channels * pixels
    grad_out += image * channels * pixels
    statistics += image * groups * 2
    inverse = 1.0 / _sum(weight, channels, SUM_BLOCK)
    own = channel < pairs
    mean0, scale0, offset0 = _factors(weight, bias, statistics, channel, own, size, inverse)
    mean1, scale1, offset1 = _factors(weight, bias, statistics, channel + pairs, own, size, inverse)
    sum00 = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sum01 = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sum10 = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sum11 = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for first in range(0, pixels, BLOCK_P):
        places, inside = maps.tile(first, channel, channels, pixels, CHANNELS_LAST, BLOCK_P)
        inside = inside & own[None, :]
        x0 = maps.load(x, places, inside)
        x1 = maps.load(x + to_partner, places, inside)
        grad0 = maps.load(grad_out, places, inside)
        grad1 = maps.load(grad_out + to_partner, places, inside)
        t0, _ = _through_gate((x0 - mean0) * scale0 + offset0, x0, grad0, grad1, limit)
        t1, _ = _through_gate((x1 - mean1) * scale1 + offset1, x1, grad1, grad0, limit)
        sum00 += t0
        sum01 += t1
        sum10 += t0 * (x0 - mean0)
        sum11 += t1 * (x1 - mean1)
    at = image * channels + channel
    tl.store(u0 + at, tl.sum(sum00, 0), mask=own)
    tl.store(u0 + at + pairs, tl.sum(sum01, 0), mask=own)
    tl.store(u1 + at, tl.sum(sum10, 0), mask=own)
    tl.store(u1 + at + pairs, tl.sum(sum11, 0), mask=own)


@triton.jit(do_not_specialize=["size", "pixels", "groups"])
def _spatial_gate_group_gradients_kernel(
    weight,  # (C,)
    bias,
    statistics,  # (B, groups, 2)
    u0,  # (B, groups, size)
    u1,  # here it gets its reciprocal deviation
    of_groups,  # (3, B, groups): of x - mean, of 1, and the group's sum of shares' gradients
    size,
    pixels,
    groups,
    SUM_BLOCK: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    count = tl.num_programs(0).to(tl.int64)
    inverse = 1.0 / _sum(weight, groups * size, SUM_BLOCK)
    deviation = tl.load(statistics + 2 * group + 1)
    of_mean = tl.zeros((SUM_BLOCK,), tl.float32)
    of_deviation = tl.zeros((SUM_BLOCK,), tl.float32)
    of_shares = tl.zeros((SUM_BLOCK,), tl.float32)
    for first in range(0, size, SUM_BLOCK):
        place = first + tl.arange(0, SUM_BLOCK)
        inside = place < size
        channel = group % groups * size + place
        gamma = tl.load(weight + channel, mask=inside, other=0.0)
        beta = tl.load(bias + channel, mask=inside, other=0.0)
        sum0 = tl.load(u0 + group * size + place, mask=inside, other=0.0)
        sum1 = tl.load(u1 + group * size + place, mask=inside, other=0.0) * deviation
        tl.store(u1 + group * size + place, sum1, mask=inside)
        share = gamma * inverse
        of_mean += share * gamma * sum0
        of_deviation += share * gamma * sum1
        of_shares += share * (gamma * sum1 + beta * sum0)
    factor = -deviation / (pixels.to(tl.float32) * size)
    tl.store(of_groups + group, factor * deviation * tl.sum(of_deviation, 0))
    tl.store(of_groups + count + group, factor * tl.sum(of_mean, 0))
    tl.store(of_groups + 2 * count + group, tl.sum(of_shares, 0))


@triton.jit(do_not_specialize=[*maps.SIZES, "groups", "batch"])
def _spatial_gate_gradient_kernel(
    grad_out,
    x,
    weight,  # (C,)
    bias,
    statistics,  # (B, groups, 2)
    of_groups,  # (3, B, groups)
    grad_x,
    batch,
    groups,
    limit,
    row_vectors,
    rows,
    VECTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
):
    channels, pixels = maps.sizes(row_vectors, rows, VECTOR, CHANNELS_LAST)
    pairs, size = channels // 2, channels // groups
    image, channel = maps.block(pairs, BLOCK_C)
    to_partner = pairs if CHANNELS_LAST else pairs * pixels
    x += image * channels * pixels
    grad_out += image * channels * pixels
    grad_x += image * channels * pixels
    statistics += image * groups * 2
    inverse = 1.0 / _sum(weight, channels, SUM_BLOCK)
    own = channel < pairs
    mean0, scale0, offset0 = _factors(weight, bias, statistics, channel, own, size, inverse)
    mean1, scale1, offset1 = _factors(weight, bias, statistics, channel + pairs, own, size, inverse)
    slopes = of_groups + image * groups
    constants = slopes + batch.to(tl.int64) * groups
    slope0 = tl.load(slopes + channel // size, mask=own, other=0.0)[None, :]
    slope1 = tl.load(slopes + (channel + pairs) // size, mask=own, other=0.0)[None, :]
    constant0 = tl.load(constants + channel // size, mask=own, other=0.0)[None, :]
    constant1 = tl.load(constants + (channel + pairs) // size, mask=own, other=0.0)[None, :]
    for first in range(0, pixels, BLOCK_P):
        places, inside = maps.tile(first, channel, channels, pixels, CHANNELS_LAST, BLOCK_P)
        inside = inside & own[None, :]
        x0 = maps.load(x, places, inside)
        x1 = maps.load(x + to_partner, places, inside)
        grad0 = maps.load(grad_out, places, inside)
        grad1 = maps.load(grad_out + to_partner, places, inside)
        t0, direct0 = _through_gate((x0 - mean0) * scale0 + offset0, x0, grad0, grad1, limit)
        t1, direct1 = _through_gate((x1 - mean1) * scale1 + offset1, x1, grad1, grad0, limit)
        direct0 += t0 * scale0 + ((x0 - mean0) * slope0 + constant0)
        direct1 += t1 * scale1 + ((x1 - mean1) * slope1 + constant1)
        maps.store(grad_x, places, inside, direct0)
        maps.store(grad_x + to_partner, places, inside, direct1)


@triton.jit(do_not_specialize=["batch", "channels", "groups"])
def _spatial_gate_parameters_kernel(
    weight,  # (C,)
    bias,
    u0,  # (B, C)
    u1,
    of_shares,  # (B, groups)
    grad_weight,
    grad_bias,
    batch,
    channels,
    groups,
    BLOCK: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = channel < channels
    inverse = 1.0 / _sum(weight, channels, SUM_BLOCK)
    shared = _sum(of_shares, batch * groups, SUM_BLOCK)
    sum0 = tl.zeros((BLOCK,), tl.float32)
    sum1 = tl.zeros((BLOCK,), tl.float32)
    at = channel.to(tl.int64)
    for _ in range(batch):
        sum0 += tl.load(u0 + at, mask=own, other=0.0)
        sum1 += tl.load(u1 + at, mask=own, other=0.0)
        at += channels
    gamma = tl.load(weight + channel, mask=own, other=0.0)
    beta = tl.load(bias + channel, mask=own, other=0.0)
    share = gamma * inverse
    through_share = (gamma * sum1 + beta * sum0 - shared) * inverse
    tl.store(grad_weight + channel, share * sum1 + through_share, mask=own)
    tl.store(grad_bias + channel, share * sum0, mask=own)


def pair_layout(x: Tensor) -> dict[str, Any]:
    """`maps.layout` with half as large tiles: a program has those of the partners, too."""
    layout = maps.layout(x)
    across = "BLOCK_P" if layout["CHANNELS_LAST"] else "BLOCK_C"
    return {**layout, across: layout[across] // 2}


def _pair_grid(x: Tensor, block_c: int) -> tuple[int]:
    return (x.shape[0] * triton.cdiv(x.shape[1] // 2, block_c),)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    statistics: Tensor,
    scratch: Tensor,
    limit: float,
    eps: float,
) -> None:
    """Fill out and statistics (B, groups, 2); x and out (B, C, H, W) are dense and lie alike, not
    empty; scratch has 2 B C numbers."""
    batch, channels, height, width = x.shape
    groups = statistics.shape[1]
    means, squares = scratch[: 2 * batch * channels].view(2, batch, channels)
    layout = pair_layout(x)
    with torch.cuda.device_of(x):
        _spatial_gate_moments_kernel[maps.grid(x)](x, means, squares, **maps.layout(x), **OPTIONS)
        _spatial_gate_statistics_kernel[(batch * groups,)](
            *(means, squares, statistics, channels // groups, height * width, eps),
            SUM_BLOCK=SUM_BLOCK,
        )
        _spatial_gate_output_kernel[_pair_grid(x, layout["BLOCK_C"])](
            *(x, weight, bias, statistics, out, groups, limit),
            **layout,
            SUM_BLOCK=SUM_BLOCK,
            **OPTIONS,
        )


def backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    grad_x: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    scratch: Tensor,
    limit: float,
) -> None:
    """Fill the gradients; the maps lie alike; scratch has 2 B C numbers."""
    batch, channels, height, width = x.shape
    groups = statistics.shape[1]
    u0, u1 = scratch[: 2 * batch * channels].view(2, batch, channels)
    of_groups = statistics.new_empty(3, batch, groups)
    layout = pair_layout(x)
    grid = _pair_grid(x, layout["BLOCK_C"])
    with torch.cuda.device_of(x):
        _spatial_gate_gradient_sums_kernel[grid](
            *(grad_out, x, weight, bias, statistics, u0, u1, groups, limit),
            **layout,
            SUM_BLOCK=SUM_BLOCK,
            **OPTIONS,
        )
        _spatial_gate_group_gradients_kernel[(batch * groups,)](
            *(weight, bias, statistics, u0, u1, of_groups),
            *(channels // groups, height * width, groups),
            SUM_BLOCK=SUM_BLOCK,
        )
        _spatial_gate_gradient_kernel[grid](
            *(grad_out, x, weight, bias, statistics, of_groups, grad_x, batch, groups, limit),
            **layout,
            SUM_BLOCK=SUM_BLOCK,
            **OPTIONS,
        )
        _spatial_gate_parameters_kernel[(triton.cdiv(channels, PARAMETER_BLOCK),)](
            *(weight, bias, u0, u1, of_groups[2], grad_weight, grad_bias),
            *(batch, channels, groups),
            BLOCK=PARAMETER_BLOCK,
            SUM_BLOCK=SUM_BLOCK,
        )
